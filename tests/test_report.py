"""The README's results are what the stored measurements say."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff_bench import report, tables


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


def test_the_kernels_of_a_gpu_are_printed_beside_a_copy_and_plain_torch(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "card" / "2026-01-03"
    folder.mkdir(parents=True)
    environment = {"gpu": "a card", "python": "3", "torch": "2", "commit": "abc"}
    (folder / "throughput.json").write_text(
        json.dumps({"environment": environment, "method": {"copy_gb_s": 4000.0}, "rows": []})
    )
    large = {"elements": 1 << 26, "us": 200.0, "gb_s": 3600.0, "of_copy": 0.9}
    rows = [
        {"what": "copy", "elements": 1 << 26, "gb_s": 4000.0, "of_copy": 1.0},
        {"what": "step ddim float32", **large, "of_same_copy": 0.95},
        {"what": "step ddim float32", **large, "elements": 1 << 16},
        {"what": "categorical step K=2", **large},
        {"what": "plain step K=2 torch.compile", "elements": 1 << 27, "us": 2560.0},
    ]
    (folder / "gpu.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    assert "pipeline" not in report.render(tmp_path)
    loop = {"name": "Sampler, loop_graph", "ms": 62.5, "ratio": 8.0, "steps": 100, "batch": 1}
    (folder / "loops.json").write_text(json.dumps({"environment": environment, "rows": [loop]}))
    assert "| Sampler, loop_graph | 62.5 | 8.00 |" in report.page(folder)
    text = report.render(tmp_path)
    assert "on a card, DDPM over a small UNet, 100 steps, batch 1, the model included, ms: Sampler, loop_graph" in text
    assert "on a card: GB/s of the bytes they must move, beside a copy's 4000" in text
    assert "| step ddim float32 | 67108864 | 200.0 | 3600 | 90 % | 95 % |  |  |" in text
    assert "| categorical step K=2 | 67108864 | 200.0 | 3600 | 90 % |  |  | 2560 |" in text
    assert "65536" not in text  # inside the cache
    assert "beside the categorical steps plain torch in fp32, Graves et al.'s algorithm 9:" in text
    rows[-1]["equal_work"] = True
    (folder / "gpu.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    assert "plain torch's same row on the same bf16 buffers:" in report.render(tmp_path)


def test_a_schedules_options_are_shown() -> None:
    rows = [{"schedule": s, "solver": "euler", "shape": [1, 2], "dtype": "fp32"} for s in ("edm", "edm:sigma_max=20")]
    assert [tables.label(r)[0] for r in rows] == ["edm", "edm:sigma_max=20"]
    notes = tables.footnotes([{**rows[0], "us": {}, "skipped": {}}, {**rows[1], "us": {}, "skipped": {"torch": "why"}}])
    assert notes == ["torch: why (edm:sigma_max=20 euler)"]


def test_the_main_table_is_printed_with_what_was_lost_and_all_rows_beside_the_result(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "machine" / "2026-01-02"
    folder.mkdir(parents=True)
    times = {"torch": 10.0, "diffusers": 40.0, "fastdiff eager": 20.0, "fastdiff compiled": 12.5}
    row = {
        "schedule": "scaled_linear_betas", "solver": "ddim", "shape": [1, 4, 64, 64], "dtype": "fp32", "skipped": {},
        "us": {name: {"median": v, "p10": v, "p90": v} for name, v in times.items()}, "bytes_per_element": 12.0,
        "steps_per_s": {name: 1e6 / v for name, v in times.items()}, "gb_s": 15.7, "of_copy": 0.5, "against": "torch",
        "launches": {"torch": 4.0, "fastdiff compiled": 0.1},
    }  # fmt: skip
    environment = {"cpu": "a cpu", "cores": 2, "python": "3", "torch": "2", "commit": "abc"}
    rows = [row, {**row, "shape": [1, 16, 7]}, {**row, "solver": "lms"}]
    data = {"environment": environment, "method": {"copy_gb_s": 31.4}, "rows": rows}
    (folder / "throughput.json").write_text(json.dumps(data))
    text = report.render(tmp_path)
    assert (
        text.count("| scaled_linear_betas | ddim | 1x4x64x64 | fp32 | 10 | 40 | 20 | 12.5 | 80000 | 0.8 (slower) |")
        == 1
    )
    assert "lms" not in text and "1x16x7" not in text  # all rows: on the page beside
    assert "copy 31.4 GB/s" in text and "bench/results/machine/2026-01-02/README.md" in text
    ((path, page),) = report.pages(tmp_path).items()
    assert path == folder / "README.md" and "| lms |" in page and "1x16x7" in page and "0.1 / 4" in page
    assert "[all 3 rows](" in text and "interrupted" not in text + page
    (folder / "throughput.json").write_text(json.dumps(data | {"complete": False}))
    assert "[interrupted: 3 rows](" in report.render(tmp_path) and "all 3 rows" not in report.render(tmp_path)
    assert "\ninterrupted: 3 rows.\n" in report.pages(tmp_path)[path]
    (folder / "throughput.json").write_text(json.dumps(data))
    # a roofline of the same day joins the page; a day that has nothing else has a page too
    point = {"kernel": "add_noise", "dtype": "bf16", "elements": 1024, "column": "fastdiff eager", "gb_s": 3.14,
             "us": {"median": 7.5}, "bytes_per_element": 4}  # fmt: skip
    floors = {"environment": environment, "method": {"copy_gb_s": 31.4, "launch_floor_us": 0.75}, "rows": []}
    alone = folder.with_name("2026-01-04")
    alone.mkdir()
    for place in (folder, alone):
        (place / "roofline.json").write_text(json.dumps({**floors, "roofline": [point]}))
    (alone / "roofline.png").write_bytes(b"")
    both = report.pages(tmp_path)
    assert "interrupted" not in "".join(both.values())
    (alone / "roofline.json").write_text(json.dumps({**floors, "roofline": [point], "complete": False}))
    assert "\ninterrupted: 1 points.\n" in report.pages(tmp_path)[alone / "README.md"]
    line = "| add_noise | bf16 | 2^10 | 7.5 | 3.14 | 10 % |"
    assert line in both[folder / "README.md"] and "| lms |" in both[folder / "README.md"]
    assert line in both[alone / "README.md"] and "](roofline.png)" in both[alone / "README.md"]
    assert "](roofline.png)" not in both[folder / "README.md"] and "launch floor 0.75 us" in both[alone / "README.md"]
    # the GPU's stands beside the CPU's
    other = tmp_path / "bench" / "results" / "board" / "2026-01-03"
    other.mkdir(parents=True)
    gpu = {**data, "environment": {**environment, "gpu": "a board"}}
    (other / "throughput.json").write_text(json.dumps(gpu))
    text = report.render(tmp_path)
    assert "on a CPU" in text and "on a GPU" in text and "a board; Python 3" in text and "not measured" not in text
