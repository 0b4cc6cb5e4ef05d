"""fastdiff profile: parts that add up, a trace with a name for every row and part, one line for bad input."""

import json
import sys
import time

import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main, make_schedule
from fastdiff_bench import plan_plot, plots, profiling
from fastdiff_bench.profiling import profile_run, table

PLAN = fd.solvers.ddpm(fd.schedules.VP(), 6)
MODEL = """
import torch

def half(x, t):
    return 0.5 * x

def boom(x, t):
    raise KeyError("inside the model")

def values(x, t):
    raise ValueError("not\\nthese")

calls = 0

def late(x, t):
    global calls
    calls += 1
    if calls > 2 * 10:
        raise RuntimeError("tired")
    return 0 * x
"""


def slow(x, t):
    time.sleep(0.002)
    return 0 * x


class Network(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, set()

    def forward(self, x, t):
        self.seen.add(x.dtype)
        return self.inner(x)


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


def test_a_low_precision_network_sees_its_own_dtype():
    net = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    result = profile_run(network := Network(net), fd.solvers.ddim(fd.schedules.VP(), 2), (1, 4))
    assert network.seen == {torch.bfloat16} and result["wall_us"] > 0


def test_a_plan_that_starts_from_data_is_profiled_on_some():
    result = profile_run(lambda x, t: 0.5 * x, fd.solvers.ddim_inversion(fd.schedules.VP(), 3), (1, 8))
    assert result["plan"] == "ddim_inversion" and result["nfe"] == 3 and result["wall_us"] > 0


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
        (["--model", "{model}:boom"], "error: the model failed: KeyError: 'inside the model'"),
        (["--model", "{model}:values"], "error: the model failed: ValueError: not these"),
        (["--model", "{model}:late"], "error: the model failed: RuntimeError: tired"),
        (["--model", "{model}:none"], "it has: boom, half"),
        (["--device", "mps"], "'mps' is no device to run on"),
        (["--device", "xpu"], "'xpu' is no device to run on"),
        (["--device", "cuda:99"], "'cuda:99' is not here"),
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


def test_a_model_that_cannot_be_moved_to_the_device_is_one_line(tmp_path, capsys):
    path = tmp_path / "stuck.py"
    path.write_text(
        "import torch\nclass Stuck(torch.nn.Module):\n"
        "    def to(self, device):\n        raise RuntimeError('no room')\nmodel = Stuck()\n"
    )
    assert main(["profile", "--model", f"{path}:model"]) == 2
    assert capsys.readouterr().err == "fastdiff profile: error: RuntimeError: no room\n"


def test_an_interruption_is_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile_run", interrupted)
    assert main(["profile"]) == 130
    assert capsys.readouterr().err == "fastdiff profile: interrupted\n"


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
    for name in ("ddim", "edm"):
        assert main(["plan", name, "--plot", str(tmp_path / "c.xyz")]) == 2
        assert "--plot: Format 'xyz' is not supported" in capsys.readouterr().err


def test_a_schedule_is_drawn(tmp_path, monkeypatch):
    drawn = []
    saved = plan_plot._saved
    monkeypatch.setattr(
        plan_plot, "_saved", lambda fig, *args, **kwargs: drawn.append(fig) or saved(fig, *args, **kwargs)
    )
    for name in ("ve", "scaled_linear_betas", "flow"):
        path = tmp_path / f"{name}.png"
        assert main(["plan", name, "--plot", str(path)]) == 0 and path.stat().st_size > 5000
        schedule = make_schedule(name)
        alpha, sigma, logsnr = (line for axis in drawn[-1].axes for line in axis.lines)
        for line, function in ((alpha, schedule.alpha), (sigma, schedule.sigma), (logsnr, schedule.logsnr)):
            t, values = line.get_data()
            assert len(t) > 100 and values == pytest.approx(function(t))


@pytest.mark.parametrize("name", ["ddim", "vp"])
def test_pictures_need_matplotlib(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", name, "--plot", str(tmp_path / "a.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"fastdiff plan: error: {plots.INSTALL}\n"


class Event:
    """A profiler's event as a GPU gives it: there is none here. Times in ns; `of` numbers a launch and its kernel."""

    def __init__(self, name, start, duration, gpu=True, of=0):
        self.values = name, start, duration, gpu, of

    def name(self):
        return self.values[0]

    def start_ns(self):
        return self.values[1]

    def duration_ns(self):
        return self.values[2]

    def device_type(self):
        kinds = torch.autograd.DeviceType
        return kinds.CUDA if self.values[3] else kinds.CPU

    def correlation_id(self):
        return self.values[4]

    def is_user_annotation(self):
        return self.values[0].startswith("row ")


def host(name, start, duration, of=0):
    return Event(name, start, duration, gpu=False, of=of)


CUDA = torch.device("cuda")
ROW = [host("row 0", 1_000, 9_000), host("row 0 model", 1_000, 4_000), host("row 0 noise", 5_000, 1_000),
       host("row 0 step", 6_000, 2_000)]  # fmt: skip


def test_device_time_belongs_to_the_range_that_launched_it():
    pytest.importorskip("triton")
    launches = [
        host("cudaMemsetAsync", 500, 10, of=1), host("cudaLaunchKernel", 1_100, 10, of=2),
        host("cuLaunchKernelEx", 2_000, 10, of=3), host("aten::mm", 1_050, 10, of=4),
        host("cudaLaunchKernel", 5_500, 10, of=5), host("cudaMemcpyAsync", 6_500, 10, of=6),
        host("cuLaunchKernelEx", 7_000, 10, of=7),
    ]  # fmt: skip
    device = [
        Event("row 0", 10_000, 20_000), Event("Memset", 10_000, 1_000, of=1), Event("gemm", 11_000, 4_000, of=2),
        Event("affine_step_kernel", 16_000, 2_000, of=3), Event("normal", 18_000, 500, of=5),
        Event("Memcpy", 20_000, 4_000, of=6), Event("affine_step_kernel", 23_000, 3_000, of=7),
    ]  # fmt: skip
    parts = profiling._device_parts([*ROW, *launches, *device], 2)  # of two rows; the last two overlap by 1 us
    # a model that uses fastdiff's kernels takes their time; a copy that the step makes is the step's
    assert parts == {"before and after the rows": 0.5, "model": 3.0, "noise": 0.25, "step": 3.5,
                     "launch gaps": (1.0 + 1.5) / 2}  # fmt: skip


def test_device_time_of_a_graph_is_told_by_fastdiffs_names():
    pytest.importorskip("triton")
    found = [host("row 0", 1_000, 5_000), host("cudaGraphLaunch", 1_500, 10, of=9)]
    found += [Event("gemm", 2_000, 4_000, of=9), Event("affine_step_kernel", 6_000, 2_000, of=9)]
    found += [Event("gemm", 8_000, 1_000, of=77), Event("advance_kernel", 9_000, 1_000, of=77)]  # their launch is lost
    parts = profiling._device_parts(found, 1)
    assert parts == {"model and other kernels": 5.0, "step": 3.0, "launch gaps": 0.0}


def test_waits_for_a_gpu_are_a_part_of_their_own():
    loop = host("sample", 0, 12_000)
    waits = [host("cudaStreamSynchronize", 2_000, 1_500), host("cudaDeviceSynchronize", 8_500, 500),
             host("cudaDeviceSynchronize", 12_500, 9_000)]  # fmt: skip
    parts = profiling._host_parts([*ROW, loop, *waits], loop, CUDA, 1)  # the last one is the profiler's own
    assert parts == {"model": 2.5, "noise": 1.0, "step": 2.0, "rest of the row": 1.5,
                     "before and after the rows": 3.0, "waits for the GPU": 2.0}  # fmt: skip
    assert sum(parts.values()) == 12.0
    assert profiling._host_parts([*ROW, loop], loop, CUDA, 1)["waits for the GPU"] == 0


def test_counts_of_a_gpu():
    pytest.importorskip("triton")
    found = [
        Event("row 0", 0, 20_000), Event("gemm", 1_000, 4_000), Event("affine_step_kernel", 6_000, 2_000),
        Event("gemm", 10_000, 4_000), Event("advance_kernel", 13_000, 3_000), host("cudaLaunchKernel", 0, 10),
        host("cudaDeviceSynchronize", 20_000, 10), host("cudaStreamSynchronize", 9_000, 10),
    ]  # fmt: skip
    counts = profiling._counts(found, CUDA, 2)
    assert counts["kernels, copies and fills"] == 2 and counts["of them fastdiff's"] == 1
    assert counts["launches"] == 0.5 and counts["host waits"] == 0.5  # one wait is the profiler's own
    assert [t["name"] for t in profiling._top(found, CUDA, 2)][0] == "gemm"
