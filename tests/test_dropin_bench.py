"""The benchmark of accelerated schedulers runs, compares before it times, and reports what it says it does."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff_bench import dropin, dropin_gpu, single, timing
from fastdiff_bench.dropin_gpu import Way

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
    for name, value in timing.MALLOC.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        dropin.main(["--only", "Euler 3"])
    assert "unknown rows ['Euler 3']; valid: DDPM" in capsys.readouterr().err


def test_a_process_without_the_thresholds_starts_again_with_them_and_its_arguments(monkeypatch):
    started = []
    monkeypatch.setattr(single.os, "execve", lambda *args: started.append(args))
    for name in timing.MALLOC:
        monkeypatch.delenv(name, raising=False)
    single.restart("a.module", [])  # no arguments are none: not the process's own
    ((program, command, env),) = started
    assert command == [program, "-m", "a.module"] and timing.MALLOC.items() <= env.items()
    for name, value in timing.MALLOC.items():
        monkeypatch.setenv(name, value)
    single.restart("a.module", [])
    assert len(started) == 1


def test_a_rows_numbers_are_those_of_the_main_table():
    found = single.summarised("us", [float(v) for v in range(100, 0, -1)])
    assert found == {"us": 50.5, "us_p10": 11.0, "us_p90": 90.0}


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, capsys):
    given = ["--device", "cpu", "--steps", "4", "--repeats", "1", "--json", str(tmp_path / "a" / "r.json")]
    code = dropin_gpu.main(given)
    data = json.loads((tmp_path / "a" / "r.json").read_text())
    rows = data["rows"]
    assert code == 0 and rows[0]["name"] == "stock" and rows[0]["ratio"] == 1.0
    assert [r["name"] for r in rows[1:]] == ["accelerated", "accelerated, philox", "Sampler, eager"]
    assert (rows[0]["steps"], rows[0]["batch"], data["skipped"]) == (4, 1, {})
    assert data["differs"]["stock"] == 0 and max(data["differs"].values()) <= 2e-5 and len(data["differs"]) == 4
    assert "| Sampler, eager |" in capsys.readouterr().out


def ones(value, like=dropin_gpu.STOCK):
    return Way(lambda generator: torch.full((2,), value), like=like)


def test_a_way_that_differs_is_refused_and_so_are_those_known_by_it_alone(tmp_path, monkeypatch, capsys):
    ways = {"stock": ones(1.0), "near": ones(1.0001), "far": ones(1.001), "nan": ones(float("nan")),
            dropin_gpu.OURS: ones(0.5), "philox": ones(0.5, dropin_gpu.OURS)}  # fmt: skip
    monkeypatch.setattr(dropin_gpu, "ways", lambda *args: ways)
    assert dropin_gpu.main(["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "r.json")]) == 0
    data = json.loads((tmp_path / "r.json").read_text())
    assert [r["name"] for r in data["rows"]] == ["stock", "near"]
    assert data["skipped"]["philox"] == "its result differs by 5.0e-01: not the same computation, not timed"
    assert list(data["skipped"]) == ["far", "nan", dropin_gpu.OURS, "philox"]
    assert "far: its result differs by 1.0e-03: not the same" in capsys.readouterr().out


def test_ways_of_one_kind_of_noise_start_from_one_seed_and_set_timesteps_is_not_timed(monkeypatch):
    clock, draws = [0.0], []

    def pass_time(seconds):
        clock[0] += seconds

    def draw(generator):
        pass_time(0.25)
        draws.append(None if generator is None else generator.initial_seed())
        return torch.ones(1)

    monkeypatch.setattr(dropin_gpu.time, "perf_counter", lambda: clock[0])
    ways = {"stock": Way(draw, lambda: pass_time(4.0)), dropin_gpu.OURS: Way(draw),
            "philox": Way(draw, like=dropin_gpu.OURS)}  # fmt: skip
    assert dropin_gpu.differences(ways, "cpu") == {"stock": 0, dropin_gpu.OURS: 0, "philox": 0}
    assert draws == [3, 3, 3, None, None]
    *_, times = dropin_gpu.measure(ways, "cpu", 2)
    assert times == dict.fromkeys(ways, [250.0, 250.0])


def test_the_gpu_benchmark_keeps_the_repeats_before_it_was_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def loop(generator):
        calls.append(generator)
        if len(calls) == 8:  # 3 compared, 2 warm, 2 of the first repeat, 1 of the second
            raise KeyboardInterrupt
        return torch.zeros(1)

    monkeypatch.setattr(dropin_gpu, "ways", lambda *args: {"stock": Way(loop), dropin_gpu.OURS: Way(loop)})
    path = tmp_path / "r.json"
    assert dropin_gpu.main(["--device", "cpu", "--repeats", "9", "--json", str(path)]) == 130
    out = capsys.readouterr().out
    assert out.startswith("interrupted: 1 of 9 repeats\n\n| way") and "| stock |" in out
    assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["stock", dropin_gpu.OURS]
