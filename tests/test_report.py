"""The README's results are what the stored measurements say."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff_bench import report


def test_readme_is_generated() -> None:
    assert report.main(["--check"]) == 0


def test_a_missed_target_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "machine" / "2026-01-01"
    folder.mkdir(parents=True)
    row = {
        "solver": "ddim",
        "peer": "DDIMScheduler",
        "shape": [1, 2],
        "target": 3,
        "stock_us": 10.0,
        "auto_us": 5.0,
        "auto_ratio": 2.0,
    }
    row |= {"eager_us": 4.0, "eager_ratio": 2.5}
    environment = {"cpu": "a cpu", "cores": 2, "python": "3", "torch": "2", "commit": "abc"}
    (folder / "steps.json").write_text(json.dumps({"environment": environment, "rows": [row]}))
    text = report.render(tmp_path)
    assert "| ddim | diffusers DDIMScheduler | (1, 2) | 10 | 5 | 2.0 (missed) | 3 | 4 | 2.5 |" in text
    assert "a cpu, 2 cores" in text and "GPU: not measured yet" in text
