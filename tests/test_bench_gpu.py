"""What measures on a GPU, without one: gpu.sh's verdict, rows kept as they come, columns that need a GPU."""

import json
import os
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.graph import CaptureError
from fastdiff_bench import energy, environment, gpu, gpu_categorical, options, suite, textbook_graph
from fastdiff_bench.kernels_categorical import textbook_step
from fastdiff_bench.textbook import Textbook
from fastdiff_bench.timing import MALLOC

ROOT = Path(__file__).parents[1]
# a python whose test processes print one line and end as their file's name is told to
FAKE = """#!/usr/bin/env bash
case "$*" in
    *"-m pytest tests/test_rng.py"*) echo "3 passed in 0.1s"; exit {code} ;;
    *"-m pytest"*) echo "5 passed in 0.1s" ;;
    *matplotlib*) exit 1 ;;
esac
"""

TIMES = {"median": 2.0, "p10": 2.0, "p90": 2.0}
ROW = {"schedule": "vp", "shape": [1, 8], "dtype": "fp32", "us": {"torch": TIMES, "fastdiff eager": TIMES},
       "steps_per_s": {"fastdiff eager": 5e5}, "bytes_per_element": 12.0, "skipped": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "says"),
    [(0, "rng: 3 passed"), (1, "rng: exit 1; 3 passed"), (5, "rng: no test was run; "), (124, "rng: timed out; "),
     (137, "rng: timed out; ")],
)  # fmt: skip
def test_the_verdict_of_gpu_sh_is_the_exit_status_of_every_test_file(code, says, tmp_path):
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    fake, out = tmp_path / "python", tmp_path / "out"
    fake.write_text(FAKE.format(code=code))
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake)}
    command = ["bash", str(tmp_path / "bench" / "gpu.sh"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (code != 0), done.stdout + done.stderr
    lines = (out / "tests.txt").read_text().splitlines()
    assert len(lines) == 41 and "gpu: 5 passed in 0.1s" in lines and "unmask_step:4/4: 5 passed in 0.1s" in lines
    assert [line for line in lines if line.startswith("rng: ")][0].startswith(says)


def test_every_file_that_tests_a_kernel_is_in_gpu_sh():
    listed = re.search(r"^files=\((.*?)\)", (ROOT / "bench" / "gpu.sh").read_text(), re.S | re.M)[1].split()
    runs = re.compile(r"^def test_\w+\([^)]*\b(kernel_device|device)\b|mark\.gpu\b", re.M)
    files = [path for path in (ROOT / "tests").glob("test_*.py") if runs.search(path.read_text())]
    found = {path.stem.removeprefix("test_") for path in files}
    assert len(set(listed)) == len(listed)
    parts = [name.rsplit(":", 1)[1] for name in listed if name.startswith("unmask_step:")]
    assert parts == ["1/4", "2/4", "3/4", "4/4"]
    assert found <= {name.split(":")[0] for name in listed}


@pytest.mark.parametrize("file", ["bench/gpu.sh", "Makefile"])
def test_scripts_start_python_with_the_thresholds_that_results_are_asked_for(file):
    assert dict(re.findall(r"(MALLOC_\w+_)=(\d+)", (ROOT / file).read_text())) == MALLOC


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 130, "fastdiff bench: interrupted"),
     (torch.OutOfMemoryError("no\nmemory"), 2, "fastdiff bench: error: OutOfMemoryError: no memory"),
     (KeyError("x"), 2, "fastdiff bench: error: KeyError: 'x'")],
)  # fmt: skip
def test_a_suite_that_stops_prints_and_keeps_the_rows_before(error, code, says, monkeypatch, tmp_path, capsys):
    def measure(case, shape, *args, **kwargs):
        if shape[-1] == 9:
            raise error
        return {**ROW, "solver": case.solver}

    monkeypatch.setattr(suite, "measure", measure)
    monkeypatch.setattr(suite, "copy_bandwidth", lambda device: 10.0)
    path = tmp_path / "a.json"
    argv = ["--quick", "--device", "cpu", "--schedules", "vp", "--solvers", "ddim", "--shapes", "1x8", "1x9"]
    assert suite.main([*argv, "--json", str(path)]) == code
    out, err = capsys.readouterr()
    assert out.startswith("interrupted: 1 rows") and "| vp       | ddim   |   1x8 |" in out
    assert err.splitlines()[-1] == f"{says}; what was measured before is in {path}"
    data = json.loads(path.read_text())
    assert data["complete"] is False and [r["solver"] for r in data["rows"]] == ["ddim"]


def test_plain_torch_does_the_categorical_step_on_the_same_buffers(monkeypatch):
    timed = []

    def clock(calls):
        for call in calls:
            call()
        timed.append(calls)
        return 2.0

    monkeypatch.setattr(gpu_categorical, "QUICK", (2, 5))
    monkeypatch.setattr(gpu_categorical, "ELEMENTS", 400)
    monkeypatch.setattr(gpu_categorical, "compiled", lambda function, elements: function)
    rows = list(gpu_categorical.categorical_rows(10.0, clock, quick=True, device="cpu"))
    assert [r["what"] for r in rows] == [
        f"{kind} K={K}{how}" for K in (2, 5)
        for kind, how in (("categorical step", ""), ("plain step", " eager"), ("plain step", " torch.compile"))
    ]  # fmt: skip
    assert all(r["equal_work"] and r["differs"] <= 1e-2 for r in rows if r["what"].startswith("plain"))
    for ours, plain in zip(timed[::3], timed[1::3], strict=True):
        assert [c.args[1].data_ptr() for c in ours] == [c.args[1].data_ptr() for c in plain]  # the same rotated sets
        state, seen = plain[0]()
        assert state.dtype == torch.float32 and seen.dtype == plain[0].args[1].dtype == torch.bfloat16


@pytest.mark.parametrize("classes", [2, 5, 16385])
def test_a_state_that_is_read_twice_must_move_once(classes, monkeypatch):
    """bf16 logits and input, 2 bytes each, and the state in and out."""
    monkeypatch.setattr(gpu_categorical, "QUICK", (classes,))
    monkeypatch.setattr(gpu_categorical, "ELEMENTS", 8 * classes)
    monkeypatch.setattr(gpu_categorical, "_plain_rows", lambda *args: iter(()))
    [row] = gpu_categorical.categorical_rows(10.0, lambda calls: 2.0, quick=True, device="cpu")
    assert row["gb_s"] == pytest.approx(12 * row["elements"] / 2.0 / 1e3) and row["of_copy"] == row["gb_s"] / 10


def test_the_textbook_draws_two_classes_as_often_as_their_logit_says():
    step = textbook_step(3.0, 0.0)
    logits, state = torch.full((1, 20000, 1), 1.0), torch.zeros(1, 1, 20000, 1)
    z, seen = step(state, logits, logits)
    assert set(z.unique().tolist()) == {-3.0, 3.0} and torch.equal(seen, torch.tanh(z / 2))
    assert float((z > 0).float().mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.02)


def test_kernels_of_a_gpu_are_written_as_they_come(monkeypatch, tmp_path):
    def two(copy, quick):
        yield {"what": "copy", "gb_s": copy, "of_copy": 1.0, "elements": 1}
        yield {"what": "step", "gb_s": 6.0, "of_copy": 0.9, "elements": 1}
        raise KeyboardInterrupt

    states = iter([{"throttle_bits": 0x1}, {"throttle_bits": 0x4}])  # idle, then held down by the power cap
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {"gpu": "a card"})
    monkeypatch.setattr(gpu, "Meter", lambda device: types.SimpleNamespace(state=lambda: next(states)))
    monkeypatch.setattr(gpu.timing, "copy_bandwidth", lambda device: 7.0)
    monkeypatch.setattr(gpu, "rows", two)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(tmp_path / "a")])
    rows = json.loads((tmp_path / "a" / "gpu.json").read_text())["rows"]
    assert [(r["gb_s"], r["throttled"]) for r in rows] == [(7.0, False), (6.0, True)]


def test_the_environment_is_of_the_device_that_is_measured(monkeypatch):
    def properties(device):
        name = f"card {torch.device(device).index or 0}"
        return types.SimpleNamespace(name=name, multi_processor_count=2, total_memory=3 << 30, uuid="u")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert "gpu" not in environment.environment("cpu")
    found = environment.environment(torch.device("cuda", 1))
    assert (found["gpu"], found["sms"], found["memory_gib"]) == ("card 1", 2, 3)
    line = environment.describe({**environment.environment("cpu"), "k-diffusion": "0.1", "scipy": "1.2"})
    assert ", k-diffusion 0.1, scipy 1.2; commit" in line


class Clock:
    """time, of a board whose counter grows by 100 W and by 40 J a call of half a second."""

    def __init__(self):
        self.now, self.calls, self.slept = 0.0, 0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def run(self):
        self.calls += 1
        self.now += 0.5

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return int(1000 * (100 * self.now + 40 * self.calls))


def test_energy_is_counted_over_windows_of_5_seconds_and_the_idle_power_once(monkeypatch):
    clock, prepared = Clock(), []
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    meter = energy.Meter(torch.device("cpu"))
    meter.nvml, meter.handle = clock, None
    readings = [meter.energy(clock.run, prepare=lambda: prepared.append(clock.calls)) for _ in range(2)]
    assert readings == [energy.Reading(pytest.approx(40), 180, 100, 10, 5)] * 2  # 100 W idle and 80 W of the calls
    assert clock.slept == [5.0] and clock.now == 2 * 0.5 + 2 * 5.0 + 5.0
    assert prepared == list(range(22))  # before every call, the one that warms up included


def request(*argv):
    return options.Request(options.parser().parse_args(list(argv)))


def test_plain_torch_in_a_graph_is_a_column_of_gpus_only(monkeypatch, capsys):
    assert "torch graph" not in request("--device", "cpu").columns
    with pytest.raises(ValueError, match="unknown peer 'torch graph'; valid: torch, torch.compile, diffusers, k-diff"):
        request("--device", "cpu", "--peers", "torch graph")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert request("--device", "cuda").columns[:3] == ("torch", "torch.compile", "torch graph")
    assert request("--device", "cuda", "--peers", "torch graph", "torch").columns[:2] == ("torch", "torch graph")
    with pytest.raises(ValueError, match="unknown peer 'graph'; valid: torch, torch.compile, torch graph, diffusers"):
        request("--device", "cuda", "--peers", "torch", "graph")
    with pytest.raises(SystemExit):
        request("--device", "cuda:1")
    assert "--device: 'cuda:1' is not here: 1 CUDA devices were found" in capsys.readouterr().err


def test_a_graphed_loop_is_captured_once_and_replays_from_its_own_input(monkeypatch):
    captures = []

    class Graph:
        def __init__(self, body):
            self.replay = body

    def capture(body, rewind, device):
        captures.append(device)
        body()
        return Graph(body)

    monkeypatch.setattr(textbook_graph, "_capture", capture)
    plan = fd.solvers.ddim(fd.schedules.VP(), 4)
    loop = Textbook(plan, lambda x, t: 0.2 * x)
    graphed, starts = textbook_graph.Graphed([loop]), [torch.randn(1, 8) for _ in range(2)]
    ends = [graphed(x) for x in starts]
    assert len(captures) == 1 and all(torch.equal(e, loop(x)) for e, x in zip(ends, starts, strict=True))
    noisy = Textbook(fd.solvers.ddpm(fd.schedules.VP(), 4), lambda x, t: 0.2 * x)
    got, want = (f(starts[0], torch.Generator().manual_seed(1)) for f in (textbook_graph.Graphed([noisy]), noisy))
    assert torch.equal(got, want) and len(captures) == 1  # a given generator: no graph


def test_a_loop_that_cannot_be_captured_makes_room_for_the_next(monkeypatch):
    tried = []

    def capture(body, rewind, device):
        tried.append(body)
        if len(tried) == 1:
            raise CaptureError("not permitted")
        body()
        return types.SimpleNamespace(replay=body)

    monkeypatch.setattr(textbook_graph, "_capture", capture)
    plan = fd.solvers.ddim(fd.schedules.VP(), 4)
    compiled, eager = (Textbook(plan, lambda x, t: 0.2 * x, compiled=c) for c in (True, False))
    graphed, x = textbook_graph.Graphed([compiled, eager]), torch.randn(1, 8)
    assert graphed.note() == "" and torch.equal(graphed(x), eager(x)) and graphed.note() == "of the eager rows"
    tried.clear()
    with pytest.raises(CaptureError, match="not permitted"):
        textbook_graph.Graphed([eager])(x)


def test_without_a_compiler_no_column_needs_one():
    args = options.parser().parse_args(["--no-compile", "--quick", "--device", "cpu"])
    args.device = torch.device("cuda")
    columns = options.Request(args).columns
    assert columns == (
        "torch",
        "diffusers",
        "k-diffusion",
        "fastdiff eager",
        "fastdiff step_graph",
        "fastdiff loop_graph",
    )
