"""The benchmark of accelerated schedulers runs, compares before it times, and reports what it says it does."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff_bench import dropin

pytest.importorskip("diffusers")


def test_a_row_and_the_table(tmp_path):
    case = next(c for c in dropin.CASES if c.name == "Euler")
    with torch.no_grad():
        row = dropin.measure(case, 3)
    assert row["gap"] <= 1e-5 and row["target"] == 1.5 and row["repeats"] == 3
    assert 0 < row["ours_us_p10"] <= row["ours_us"] <= row["ours_us_p90"]
    assert json.loads(json.dumps(row)) == row
    text = dropin.table([row, {**row, "name": "slow", "ratio": 0.5, "target": None}])
    assert text.count("\n") == 3 and "0.50 (missed) | not slower" in text


def test_every_case_is_a_scheduler_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, c.scheduler) for c in dropin.CASES)
    assert len({c.name for c in dropin.CASES}) == len(dropin.CASES)


def test_unknown_rows_are_refused(monkeypatch, capsys):
    for name, value in dropin.MALLOC.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        dropin.main(["--only", "Euler 3"])
    assert "unknown rows ['Euler 3']; valid: DDPM" in capsys.readouterr().err


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, capsys):
    from fastdiff_bench import dropin_gpu

    given = ["--device", "cpu", "--steps", "4", "--repeats", "1", "--json", str(tmp_path / "a" / "r.json")]
    code = dropin_gpu.main(given)
    rows = json.loads((tmp_path / "a" / "r.json").read_text())["rows"]
    assert code == 0 and rows[0]["name"] == "stock" and rows[0]["ratio"] == 1.0
    assert [r["name"] for r in rows[1:]] == ["accelerated", "accelerated, philox", "Sampler, eager"]
    assert "| Sampler, eager |" in capsys.readouterr().out


def test_the_gpu_benchmark_keeps_the_repeats_before_it_was_stopped(tmp_path, monkeypatch):
    from fastdiff_bench import dropin_gpu

    calls = []

    def loop(name):
        calls.append(name)
        if len(calls) == 8:  # 4 warm, 2 of the first repeat, 1 of the second
            raise KeyboardInterrupt
        return torch.zeros(1)

    ways = {name: (lambda name=name: loop(name)) for name in ("stock", "Sampler, eager")}
    monkeypatch.setattr(dropin_gpu, "ways", lambda *args: ways)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        dropin_gpu.main(["--device", "cpu", "--repeats", "9", "--json", str(path)])
    assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["stock", "Sampler, eager"]
