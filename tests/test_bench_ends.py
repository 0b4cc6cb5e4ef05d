"""How fastdiff bench ends: bad input and what fails in one line with exit code 2, what was measured before kept."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastdiff.cli import main
from fastdiff.commands import bench
from fastdiff_bench import options, page, roofline, suite, timing


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "copy_bandwidth", lambda device: timing.copy_bandwidth(device, 1 << 18))


SMALL = ["--quick", "--no-compile", "--schedules", "scaled_linear_betas", "--solvers", "ddim", "--steps", "4"]


MODEL = """
def picky(x, t):
    if x.shape[-1] == 32:
        raise RuntimeError("out of\\nluck")
    return 0 * x

def wide(x, t):
    return x.new_zeros(len(x), 3, 5)

def nothing(x, t):
    return None

def pair(x, t):
    return x, t

def nan(x, t):
    return x * float("nan")
"""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--schedules", "vpp"], "unknown schedule 'vpp'; valid: bfncontinuous"),
        (["--schedules", "vp:beta=1"], "valid: beta_min, beta_max"),
        (["--solvers", "dimm"], "unknown solver 'dimm'; valid: ancestral"),
        (["--peers", "stable"], "unknown peer 'stable'; valid: torch, torch.compile, diffusers, k-diffusion"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'; valid: fp32, bf16, fp16"),
        (["--shapes", "1x0"], "unknown shape '1x0'; valid: policy, latent, batch"),
        (["--shapes", "big"], "unknown shape 'big'"),
        (["--shapes", "99999999999999999999"], "unknown shape '99999999999999999999'"),
        (["--compile-only", "--json", "a.json", "--plot", "p"], "--compile-only does not read --json, --plot"),
        (["--roofline", "--kernels", "gemm"], "unknown kernel 'gemm'; valid: affine_step"),
        (["--codegen", "--kernels", "gemm"], "unknown kernel 'gemm'; valid: affine_step"),
        (["--roofline", "--largest", "0"], "--largest must be in 10 .. 30, got 0"),
        (["--roofline", "--sizes", "12", "31"], "--sizes must be in 10 .. 30, got 31"),
        (["--roofline", "--sizes", "12", "--largest", "12"], "--sizes says the largest: leave --largest out"),
        (
            ["--kernels", "guide", "--largest", "12"],
            "the main table does not read --kernels, --largest: leave them out",
        ),
        (["--roofline", "--model", "mlp"], "--roofline does not read --model: leave it out"),
        (["--roofline", "--steps", "4", "--solvers", "ddim"], "--roofline does not read --solvers, --steps"),
        (["--codegen", "--shapes", "1x2", "--peers", "torch"], "--codegen does not read --shapes, --peers"),
        (["--codegen", "--compile-only", "--no-compile"], "--codegen does not read --no-compile, --compile-only"),
        (["--codegen", "--roofline"], "--roofline and --codegen are two runs: leave one of them out"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99' is not here"),
        (["--device", "banana"], "argument --device: 'banana' is no device to run on; write cpu, cuda or cuda:0"),
        (["--device", "meta"], "argument --device: 'meta' is no device to run on"),
        (["--json", "/proc/x/a.json"], "--json: '/proc/x/a.json' cannot be written"),
        (["--plot", "/proc/x"], "--plot: '/proc/x/report.html' cannot be written"),
        (["--compare", "nowhere.json"], "--compare: 'nowhere.json' cannot be read"),
        (["--compare", __file__], "is not JSON"),
        (["--schedules", "vp", "--solvers", "bfn_continuous"], "no case is left to run"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(argv, says, capsys):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize("more", [["--largest", "0", "--roofline"], ["--compare", "nowhere.json"]])
def test_bad_input_leaves_no_file(more, tmp_path):
    new, old = tmp_path / "folder" / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for path in (new, old):
        assert main(["bench", "--json", str(path), "--plot", str(tmp_path / "plots"), *more]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"] and old.read_text() == "kept"


def test_pictures_without_matplotlib_are_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--quick", "--plot", str(tmp_path / "p")]) == 2
    assert "--plot: pictures need matplotlib: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [("wide", "the model must return the shape of its input, (1, 16), got (1, 3, 5)"),
     ("nothing", "the model must return a Tensor, got NoneType"), ("pair", "must return a Tensor, got tuple"),
     ("nan", "the model's loop ends in numbers that are not finite")],
)  # fmt: skip
def test_a_model_that_returns_something_else_is_one_line(name, says, small, tmp_path, capsys):
    (tmp_path / "m.py").write_text(MODEL)
    assert suite.main([*SMALL, "--peers", "torch", "--shapes", "1x16", "--model", f"{tmp_path}/m.py:{name}"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert says in error


def test_the_steps_and_sizes_asked_for_are_measured():
    def request(text):
        return options.Request(options.parser().parse_args(["--device", "cpu", *text.split()]))

    asked = ["", "--model unet1d", "--model unet1d --steps 20", "--model unet1d --steps 50"]
    assert [request(text).steps for text in asked] == [50, 100, 20, 50]
    sizes = ["--quick", "--quick --largest 24", "--quick --largest 16", "--quick --sizes 26 12 12"]
    asked = [roofline.exponents(request(f"--roofline {text}")) for text in sizes]
    assert asked == [[10, 16, 20], [10, 16, 20, 24], [10, 16], [12, 26]]


@pytest.mark.parametrize(
    ("code", "writes", "says"), [(-9, True, "ended by signal 9"), (-9, False, "ended by signal 9"), (3, True, "")]
)
def test_a_measuring_process_that_is_killed_is_one_line(code, writes, says, monkeypatch, tmp_path, capsys):
    kept = tmp_path / "a.json"
    kept.write_text("{}")  # of a run before
    end = f"os.kill(os.getpid(), {-code}) if {code} < 0 else os._exit({code})"
    argv = [sys.executable, "-c", f"import os; open({str(kept)!r}, 'w').close() if {writes} else 0; {end}"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: start(argv))
    assert main(["bench", "--quick", "--device", "cpu", "--json", str(kept)]) == (2 if code < 0 else code)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == (code < 0) and (str(kept) in err) == (code < 0 and writes)


def test_an_interrupt_that_only_the_command_heard_is_passed_on(monkeypatch, capsys):
    program = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *a: sys.exit(0)); time.sleep(60)"
    start, told = subprocess.Popen, []

    def heard(command, env):
        process = start([sys.executable, "-c", program])
        wait, send = process.wait, process.send_signal

        def waiting(timeout=None):
            if timeout is None and not told:
                time.sleep(0.5)  # its handler is there
                raise KeyboardInterrupt
            return wait(timeout)

        process.wait, process.send_signal = waiting, lambda sent: (told.append(sent), send(sent))
        return process

    monkeypatch.setattr(subprocess, "Popen", heard)
    monkeypatch.setattr(bench, "GRACE", 0.2)
    assert main(["bench", "--quick", "--device", "cpu"]) == 130 and told == [signal.SIGINT]


def test_a_failing_model_keeps_the_rows_before_it(small, tmp_path, capsys):
    (tmp_path / "m.py").write_text(MODEL)
    out = tmp_path / "a.json"
    argv = [
        *SMALL,
        "--peers",
        "torch",
        "--shapes",
        "1x16",
        "1x32",
        "--model",
        f"{tmp_path}/m.py:picky",
        "--json",
        str(out),
    ]
    assert suite.main(argv) == 2
    text, err = capsys.readouterr()
    error = [line for line in err.splitlines() if "error" in line]
    assert "interrupted: 1 rows" in text and "| scaled_linear_betas | ddim   |  1x16 |" in text
    assert len(error) == 1 and "the model failed: RuntimeError: out of luck" in error[0] and str(out) in error[0]
    data = json.loads(out.read_text())
    assert [r["shape"] for r in data["rows"]] == [[1, 16]] and data["complete"] is False


def test_a_full_disk_at_the_pictures_keeps_the_rows(small, tmp_path, monkeypatch, capsys):
    def full(data, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_report", full)
    out = tmp_path / "a.json"
    argv = [*SMALL, "--shapes", "1x32", "--peers", "torch", "--json", str(out), "--plot", str(tmp_path / "p")]
    assert suite.main(argv) == 2
    text, err = capsys.readouterr()
    assert "| scaled_linear_betas | ddim" in text and json.loads(out.read_text())["complete"]
    said = "fastdiff bench: error: [Errno 28] No space left on device; what was measured before is in"
    assert err.splitlines()[-1] == f"{said} {out}"


def test_a_full_disk_at_the_rows_prints_them(small, tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(suite, "write_atomic", full)
    (tmp_path / "a.json").write_text("{}")  # of a run before: nothing of this one is in it
    argv = [*SMALL, "--shapes", "1x32", "--peers", "torch", "--json", str(tmp_path / "a.json")]
    assert suite.main(argv) == 2
    text, err = capsys.readouterr()
    assert "| scaled_linear_betas | ddim" in text
    assert err.splitlines()[-1] == "fastdiff bench: error: [Errno 28] No space left on device"


@pytest.mark.parametrize(("then", "code", "moved"), [(100, 1, "slower"), (0.01, 0, "faster")])
def test_a_row_slower_than_in_the_stored_results_is_exit_code_1(then, code, moved, small, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    argv = [*SMALL, "--shapes", "1x32", "--peers", "torch"]
    assert suite.main([*argv, "--json", str(old)]) == 0
    data = json.loads(old.read_text())
    for row in data["rows"]:
        row["times_faster"] = {n: {q: then * v[q] for q in v} for n, v in row["times_faster"].items()}
    old.write_text(json.dumps(data))
    assert suite.main([*argv, "--compare", str(old), "--json", str(new)]) == code
    assert f"{moved} (beyond 10 % and beyond both intervals):" in capsys.readouterr().out
    found = json.loads(new.read_text())["comparison"]
    assert found["columns"] == 1 and {k: len(found[k]) for k in ("slower", "faster")}[moved] == 1


def test_fp32_is_exact_in_every_run():
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        assert suite.main([*SMALL, "--shapes", "1x8", "--peers", "torch", "--compile-only"]) == 0
        assert not any(backend.allow_tf32 for backend in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
