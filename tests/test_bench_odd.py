"""What a sceptic tries: peers given more work than they need, options that nothing reads, models of all kinds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.names import load_model
from fastdiff_bench import environment, kernels, plots, suite, throughput
from fastdiff_bench.cases import Case
from fastdiff_bench.kernels_categorical import textbook_step
from fastdiff_bench.profiling import profile_run
from fastdiff_bench.stock import Stock
from fastdiff_bench.textbook import Textbook, drawn
from fastdiff_bench.textbook_tokens import TokensTextbook
from fastdiff_bench.throughput import Settings, compare_outputs, measure

CPU = torch.device("cpu")
SMALL = ("--solver", "ddim", "--schedule", "vp", "--steps", "2", "--shape", "4,2")


class Done(TorchDispatchMode):
    """The names of the operations done, and how many random numbers but normal ones they drew."""

    def __init__(self):
        super().__init__()
        self.names, self.random = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in ("rand", "rand_like", "uniform_", "exponential_", "multinomial"):
            self.random += sum(v.numel() for v in tree_leaves(out))
        return out


def _flow():
    plan = fd.solvers.bfn_discrete(fd.schedules.BFNDiscrete(3.0, 5), 4)
    out = torch.randn(4, 9, 5)
    return (lambda: Textbook(plan, lambda x, t: out)(torch.zeros(4, 9, 5))), plan.nfe


def _tokens(**options):
    plan = fd.solvers.unmask(fd.schedules.Masked(5), 4, order="confidence", **options)
    out = torch.randn(4, 9, 5)
    return (lambda: TokensTextbook(plan, lambda x, t: out)(torch.full((4, 9), 5))), plan.nfe


def _row():
    step, m = textbook_step(3.0, 1.0), torch.randn(4, 9, 5)
    return (lambda: step(torch.zeros(1, 4, 9, 5), m, m)), 1


def _unmask():
    work = kernels.MAKERS["unmask_step"]("masked", 36 * 256, torch.float32, CPU, ["torch"])
    return (lambda: work.columns["torch"](*work.sets[0])), 1


@pytest.mark.parametrize("made", [_flow, _tokens, lambda: _tokens(temperature=0.5), _row, _unmask])
def test_plain_torch_draws_one_number_a_token_for_a_class(made):
    """On a CPU K exponentials a token were most of its step."""
    run, rows = made()
    with torch.no_grad(), Done() as done:
        run()
    assert done.random == 36 * rows


def test_plain_torchs_classes_have_their_shares():
    theta = torch.tensor([0.0, 0.2, 0.0, 0.3, 0.5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        k = drawn((theta * 7).expand(40_000, 5))  # what does not sum to 1 is scaled
    shares = k.bincount(minlength=5) / len(k)
    assert len(shares) == 5 and float((shares - theta).abs().max()) < 0.01 and not shares[theta == 0].any()


@pytest.mark.parametrize("elements", [1, 8, 1 << 12])
def test_plain_torch_thresholds_without_sorting_all(elements):
    work = kernels.MAKERS["threshold"]("any", elements, torch.float32, CPU, ["torch"])
    x = work.sets[0][0]
    with Done() as done:
        got = work.columns["torch"](x)
    assert "sort" not in done.names
    s = torch.quantile(x.abs(), 0.995, dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(got, x.clamp(-s, s) / s, rtol=2e-6, atol=2e-6)


FILES = {
    "pkg/__init__.py": "", "pkg/layers.py": "W = 0.5", "pkg/deep/__init__.py": "SCALE = 2.0",
    "pkg/deep/net.py": "from . import SCALE\nfrom ..layers import W\n\ndef half(x, t):\n    return x * W * SCALE / 2",
    "pkg2/__init__.py": "def half(x, t):\n    return x * 0.5",
    "beside_helper.py": "W = 0.5", "net.py": "from beside_helper import W\n\ndef half(x, t):\n    return x * W",
    "quits.py": "import sys\nsys.exit(0)", "json/__init__.py": "", "json/net.py": "def half(x, t):\n    return x / 2",
    "v1.0/__init__.py": "", "v1.0/net.py": "def half(x, t):\n    return x / 2", "json/bad.py": "from . import net",
    "odd.py": "import sys\n\nclass Net:\n    pass\n\ndef quits(x, t):\n    sys.exit(0)\n",
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in FILES.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path / "own"
    for name in [n for n in sys.modules if n.partition(".")[0] in ("pkg", "pkg2", "beside_helper")]:
        del sys.modules[name]


@pytest.mark.parametrize("file", ["pkg/deep/net.py", "pkg2/__init__.py", "net.py", "json/net.py", "v1.0/net.py"])
def test_a_model_of_a_package_or_beside_its_helpers_is_imported(file, files):
    x = torch.ones(2)
    assert torch.equal(load_model(f"{files / file}:half")(x, x), x / 2)


@pytest.mark.parametrize(
    ("model", "says"),
    [("quits.py:half", "cannot import"), ("odd.py:Net", "is a class: name an instance of it"),
     ("json/bad.py:half", "no known parent package"), ("pkg/deep/net.py:whole", "no callable 'whole'; it has: half")],
)  # fmt: skip
def test_a_file_that_has_no_model_is_one_line(model, says, files, capsys):
    argv = [*SMALL, "--model", str(files / model)]
    for command in (["sample", "--out", str(files / "x.npy")], ["profile", "--device", "cpu"]):
        assert main([*command, *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and says in err


def test_a_model_that_quits_has_failed(files, capsys):
    argv = [*SMALL, "--model", f"{files}/odd.py:quits"]
    assert main(["sample", *argv, "--out", str(files / "x.npy")]) == 1
    assert main(["profile", *argv, "--device", "cpu"]) == 2
    assert "the model failed: SystemExit: 0" in capsys.readouterr().err


TWO = "bfndiscrete:beta_1=3.0,num_classes=2"
ODD_PLANS = [
    ("unmask", "masked:num_classes=5", "2,8", []), ("bfn_discrete", "bfndiscrete:beta_1=3.0,num_classes=5", "2,8", []),
    ("bfn_discrete", TWO, "2,8", []), ("bfn_discretised", "bfncontinuous:sigma_1=0.02", "2,3,4", ["--set", "bins=16"]),
    ("ddpm", "linear_betas", "2,3,4", ["--set", "variance=learned_range"]),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "schedule", "size", "more"), ODD_PLANS)
def test_the_model_that_does_nothing_suits_every_plan(solver, schedule, size, more, capsys):
    argv = ["--solver", solver, "--schedule", schedule, "--shape", size, "--steps", "3", "--device", "cpu", *more]
    assert main(["profile", *argv]) == 0
    assert " rows, shape (2, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "solver", "skipped"),
    [
        (TWO, "bfn_discrete", ()),
        ("masked:num_classes=2", "unmask", ()),
        ("bfncontinuous", "bfn_discretised", ("torch",)),
    ],
)
def test_a_row_of_every_kind_of_plan(schedule, solver, skipped):
    case = Case(schedule, solver, 3)
    settings = Settings(CPU, ("torch", "fastdiff eager"), rounds=5, seconds=0.01)
    row = measure(case, (2, 8), "fp32", torch.float32, settings)
    assert tuple(row["skipped"]) == skipped and "fastdiff eager" in row["us"]
    assert all("two planes are not written out" in why for why in row["skipped"].values())


def test_a_class_that_is_drawn_in_the_last_row_is_not_compared():
    case = Case("bfndiscrete", "bfn_solver", 3)
    gaps, failed = compare_outputs(case, case.plan(), (2, 8, 27), torch.float32, CPU, ("torch",))
    assert not gaps and not failed


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--no-compile", "--peers", "torch", "torch.compile"], "--no-compile leaves out torch.compile, which --peers"),
     (["--solvers", "ddim", "bfn_solver"], "bfn_solver is in no row by default: name --schedules too")],
)  # fmt: skip
def test_what_would_be_left_out_in_silence_is_refused(argv, says, capsys):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize("readout", ["argmax", "mean"])
def test_two_classes_of_the_textbook_agree_without_noise(readout):
    plan = fd.solvers.bfn_discrete(fd.schedules.BFNDiscrete(3.0, 2), 6, readout=readout)
    x, out = torch.randn(4, 9, 1), torch.randn(4, 9, 1)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    plan = replace(plan, last_readout="argmax")
    want = fd.sample(lambda x, t: out + x, plan, (4, 9), x_T=x, noise="torch", generator=generators[0], mode="eager")
    assert torch.equal(Textbook(plan, lambda x, t: out + x)(x, generators[1]), want)


def test_a_repository_around_an_installation_is_not_the_sources(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTDIFF_COMMIT", raising=False)
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*named, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    folder = tmp_path / "site-packages" / "fastdiff_bench"
    folder.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    assert environment._commit() == "unknown"


def test_a_profile_counts_the_second_of_two_loops(tmp_path):
    """The first one pays for the profiler's start."""
    plan, trace = fd.solvers.ddim(fd.schedules.VP(), 4), tmp_path / "trace.json"
    result = profile_run(lambda x, t: x.sin(), plan, (2, 8), trace=trace)
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    begins = {e["name"]: e["ts"] for e in events if "row" not in e["name"]}
    assert sum(e["name"] == "row 0" for e in events) == 2 and begins["first loop, not counted"] < begins["sample"]
    assert next(t["calls"] for t in result["top"] if t["name"] == "aten::sin") == 1
    assert sum(result["parts"].values()) == pytest.approx(result["profiled_us"])


def test_a_peer_that_ends_in_nan_leaves_json(tmp_path, monkeypatch, capsys):
    def broken(*args):
        return Stock("broken", lambda: None, lambda x, generator: x * float("nan"))

    monkeypatch.setattr(throughput, "diffusers_loop", broken)
    monkeypatch.setattr(suite, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(suite, "QUICK_S", 0.01)
    argv = ["--quick", "--no-compile", "--peers", "torch", "diffusers", "--schedules", "edm", "--solvers", "euler"]
    path = tmp_path / "a.json"
    assert suite.main([*argv, "--device", "cpu", "--shapes", "1x8", "--steps", "3", "--json", str(path)]) == 0
    row = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"][0]
    assert row["differs"]["diffusers"] is None and "differs by nan" in row["skipped"]["diffusers"]


def test_a_steps_time_is_a_point_on_a_logarithmic_axis(tmp_path, monkeypatch):
    """A bar's length says nothing there: it begins where the axis happens to."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots.pyplot(), "close", figures.append)
    slow, fast = {"median": 40.0, "p10": 30.0, "p90": 50.0}, {"median": 4.0, "p10": 3.0, "p90": 5.0}
    times = {"torch": slow, "fastdiff eager": fast}
    row = {"schedule": "vp", "solver": "ddim", "shape": [1, 8], "dtype": "fp32", "us": times}
    plots.plot_throughput([row], tmp_path)
    axis = figures[0].axes[0]
    assert axis.get_xscale() == "log" and not axis.patches
    assert [list(line.get_xdata()) for line in axis.lines] == [[30, 50], [40], [3, 5], [4]]
    monkeypatch.undo()
    plots.pyplot().close(figures[0])


def test_a_reader_that_has_seen_enough_is_no_error():
    argv = [sys.executable, "-m", "fastdiff", "plan", "unipc", "--steps", "9", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
