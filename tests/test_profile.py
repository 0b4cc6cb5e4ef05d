"""fastdiff profile: parts that add up, a trace with a name for every row and part, one line for bad input."""

import json
import time

import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main
from fastdiff_bench import profiling
from fastdiff_bench.profiling import profile_run, table

PLAN = fd.solvers.ddpm(fd.schedules.VP(), 6)
MODEL = """
import torch

def half(x, t):
    return 0.5 * x

def boom(x, t):
    raise KeyError("inside the model")
"""


def slow(x, t):
    time.sleep(0.002)
    return 0 * x


def test_parts_add_up_and_the_model_takes_what_it_takes(tmp_path):
    trace = tmp_path / "trace.json"
    result = profile_run(slow, PLAN, (2, 8), trace=trace)
    parts = result["parts"]
    assert 2000 <= parts["model"] <= result["profiled_us"]
    assert sum(parts.values()) == pytest.approx(result["profiled_us"], rel=1e-6)
    assert set(parts) == {"model", "noise", "step", "rest of the row", "before and after the rows"}
    assert min(parts.values()) >= 0 and result["wall_us"] >= 2000
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert {f"row {k}{part}" for k in range(6) for part in ("", " model", " noise", " step")} <= names
    text = table(result)
    assert "| model " in text and str(trace) in text


def test_operations_of_the_model_are_counted():
    ops = profile_run(lambda x, t: x.sin().cos(), fd.solvers.ddim(fd.schedules.VP(), 4), (1, 8))["counts"]
    none = profile_run(lambda x, t: x, fd.solvers.ddim(fd.schedules.VP(), 4), (1, 8))["counts"]
    # a model that returns its input costs one copy; the other two operations
    assert ops["torch operations"] - none["torch operations"] == 1 and ops["host reads (item)"] == 0


def test_nothing_is_left_on_the_run():
    from fastdiff_bench.profiling import ranges

    sampler = fd.Sampler(lambda x, t: 0.5 * x, PLAN, mode="eager")
    want = sampler((1, 4), seed=1)
    prepared = next(iter(sampler._runs.values()))
    before = set(vars(prepared.run)), set(vars(prepared.run.noise))
    with ranges(prepared):
        assert torch.equal(sampler((1, 4), seed=1), want)
    assert (set(vars(prepared.run)), set(vars(prepared.run.noise))) == before


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_command_reports(model, tmp_path, capsys):
    trace = tmp_path / "t.json"
    args = ["profile", "--model", f"{model}:half", "--solver", "heun", "--steps", "3", "--shape", "2,4"]
    assert main([*args, "--json", "--trace", str(trace)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["nfe"] == 5 and result["shape"] == [2, 4] and trace.stat().st_size > 1000
    assert main(["profile", "--model", "mlp", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "shape (256, 2)" in out and "where a step's time goes" in out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model", "{model}:boom"], "the model failed: KeyError"),
        (["--model", "{model}:none"], "it has: boom, half"),
        (["--model", "resnet"], "path.py:function"),
        (["--solver", "dimm"], "unknown solver 'dimm'"),
        (["--mode", "loop_graph"], "CUDA"),
        (["--nvtx"], "--nvtx"),
        (["--trace", "/proc/x/t.json"], "--trace: '/proc/x/t.json' cannot be written"),
        (["--shape", "0,2"], ">= 1"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(more, says, model, capsys):
    if torch.cuda.is_available() and more[0] in ("--mode", "--nvtx"):
        pytest.skip("there is a GPU")
    assert main(["profile", *(m.format(model=model) for m in more)]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("USDT")]
    assert out == "" and len(lines) == 1 and says in lines[0]


def test_a_failed_profile_keeps_the_trace_that_was_there(model, tmp_path, capsys):
    old, none = tmp_path / "old.json", tmp_path / "none.json"
    old.write_text("an older trace")
    for trace in (old, none):
        assert main(["profile", "--model", f"{model}:boom", "--trace", str(trace)]) == 2
        assert main(["profile", "--solver", "dimm", "--trace", str(trace)]) == 2
    assert old.read_text() == "an older trace" and not none.exists()


def test_a_plan_is_drawn(tmp_path, capsys):
    for name, more in (("a.png", ["ddpm"]), ("b.svg", ["unipc", "--schedule", "edm", "--prediction", "x0"])):
        assert main(["plan", *more, "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 5000
    capsys.readouterr()
    assert main(["plan", "ddim", "--plot", str(tmp_path / "c.xyz")]) == 2
    assert "'xyz' is not supported" in capsys.readouterr().err


class Event:
    """A profiler's event as a GPU gives it: there is none here. Times in ns."""

    def __init__(self, name, start, duration, gpu=True):
        self.values = name, start, duration, gpu

    def name(self):
        return self.values[0]

    def start_ns(self):
        return self.values[1]

    def duration_ns(self):
        return self.values[2]

    def device_type(self):
        kinds = torch.autograd.DeviceType
        return kinds.CUDA if self.values[3] else kinds.CPU

    def is_user_annotation(self):
        return self.values[0].startswith("row ")


def test_device_time_is_split_into_model_step_and_gaps():
    pytest.importorskip("triton")
    found = [
        Event("row 0", 0, 20_000), Event("gemm", 1_000, 4_000), Event("affine_step_kernel", 6_000, 2_000),
        Event("gemm", 10_000, 4_000), Event("advance_kernel", 13_000, 3_000), Event("cudaLaunchKernel", 0, 10, False),
        Event("cudaDeviceSynchronize", 20_000, 10, False), Event("cudaStreamSynchronize", 9_000, 10, False),
    ]  # fmt: skip
    parts = profiling._device_parts(found, 2)  # two rows; the last two kernels overlap by 1 us
    assert parts == {"model": 4.0, "step": 2.5, "launch gaps": (1.0 + 2.0) / 2}
    counts = profiling._counts(found, torch.device("cuda"), 2)
    assert counts["kernels, copies and fills"] == 2 and counts["of them fastdiff's"] == 1
    assert counts["launches"] == 0.5 and counts["host waits"] == 0.5  # one wait is the profiler's own
    assert [t["name"] for t in profiling._top(found, torch.device("cuda"), 2)][0] == "gemm"
