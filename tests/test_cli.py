"""The command line: reports, files, and one clear line with exit code 2 on bad input."""

import json
import os
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.cli import main, make_schedule, schedule_names, solver_names
from fastdiff.doctor import examine
from fastdiff.files import write_atomic

MODEL = """
import torch

def half(x, t):
    return 0.5 * x

def boom(x, t):
    raise KeyError("inside the model")

def wrong(x, t):
    raise ValueError("a value of the model's")

def short(x, t):
    return x[:1]

number = 3
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


BF16 = """
import torch

class Net(torch.nn.Linear):
    def forward(self, x, t):
        return super().forward(x)

net = Net(2, 2, dtype=torch.bfloat16)
"""


def test_a_bf16_network_is_sampled(tmp_path, capsys):
    path = tmp_path / "net.py"
    path.write_text(BF16)
    assert main(sample_args(path, tmp_path / "x.npy", name="net")) == 0
    assert np.load(tmp_path / "x.npy").shape == (16, 2)


def sample_args(model, out, *more, name="half"):
    args = ["sample", "--model", f"{model}:{name}", "--solver", "ddim", "--schedule", "vp", "--steps", "5"]
    return [*args, "--shape", "16,2", "--seed", "3", "--out", str(out), *more]


@pytest.mark.parametrize("command", ["demo", "plan", "sample", "doctor"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"fastdiff {command}" in capsys.readouterr().out


def test_plan_prints_the_table(capsys):
    assert main(["plan", "heun", "--schedule", "vp", "--steps", "4", "--prediction", "v", "--clip", "-1,1"]) == 0
    plan = fd.solvers.heun(fd.schedules.VP(), 4, prediction="v", clip=(-1, 1))
    assert capsys.readouterr().out.strip() == str(plan).strip()


def test_plan_json_is_the_plan(capsys):
    args = ["plan", "ddim", "--schedule", "linear_betas:T=100,end=0.1", "--steps", "4", "--set", "eta=0.5", "--json"]
    assert main([*args, "--spacing", "leading", "--start", "1"]) == 0
    got = json.loads(capsys.readouterr().out)
    schedule = fd.schedules.Betas(fd.schedules.linear_betas(100, end=0.1))
    plan = fd.solvers.ddim(schedule, 4, eta=0.5, spacing="leading", start=1)
    assert got["nfe"] == plan.nfe == 3 and got["stochastic"] is True
    assert got["lo"] == [None] * 3  # no clamp; JSON has no infinity
    for name in ("times", "alpha", "A", "b", "s"):
        np.testing.assert_array_equal(np.array(got[name]), getattr(plan, name))


def test_plan_of_a_schedule_is_its_levels_over_time(capsys):
    assert main(["plan", "vp:beta_max=12", "--steps", "4", "--json"]) == 0
    got, schedule = json.loads(capsys.readouterr().out), fd.schedules.VP(beta_max=12)
    t = np.linspace(1, 0, 5)
    np.testing.assert_array_equal(got["t"], t)
    for name in ("alpha", "sigma", "logsnr"):
        values = getattr(schedule, name)(t)
        assert got[name] == [v if np.isfinite(v) else None for v in values]
    assert main(["plan", "vp:beta_max=12", "--steps", "4"]) == 0
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head == str(schedule) and names.split() == ["t", "alpha", "sigma", "logsnr"]
    assert [float(row.split()[1]) for row in rows] == pytest.approx(schedule.alpha(t), rel=1e-3)


def test_no_schedule_has_a_solvers_name():
    assert not set(schedule_names()) & set(solver_names())


def test_schedules_of_the_command_line():
    assert make_schedule("vp:beta_max=12") == fd.schedules.VP(beta_max=12)
    assert make_schedule("ve") == fd.schedules.VE()
    assert make_schedule("cosine_betas") == fd.schedules.Betas(fd.schedules.cosine_betas(1000))


def test_sample_writes_what_sample_returns(model, tmp_path, capsys):
    out = tmp_path / "samples.npy"
    assert main(sample_args(model, out, "--json")) == 0
    plan = fd.solvers.ddim(fd.schedules.VP(), 5)
    want = fd.sample(lambda x, t: 0.5 * x, plan, (16, 2), seed=3, mode="eager")
    np.testing.assert_array_equal(np.load(out), want.numpy())
    summary = json.loads(capsys.readouterr().out)
    assert summary["shape"] == [16, 2] and summary["evaluations"] == 5 and summary["finite"] is True
    assert not list(tmp_path.glob("*.tmp.*"))


def test_sample_first_continues_the_same_seed(model, tmp_path):
    whole, part = tmp_path / "whole.npy", tmp_path / "part.npy"
    assert main(sample_args(model, whole)) == 0
    args = sample_args(model, part, "--first", "10")
    args[args.index("16,2")] = "6,2"
    assert main(args) == 0
    np.testing.assert_array_equal(np.load(part), np.load(whole)[10:])


def test_model_that_raises_gives_its_traceback_and_keeps_the_old_file(model, tmp_path, capsys):
    out = tmp_path / "samples.npy"
    out.write_bytes(b"old")
    assert main(sample_args(model, out, name="boom")) == 1
    err = capsys.readouterr().err
    assert "inside the model" in err and "model.py" in err
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp.*"))


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_an_error_of_the_models_own_is_no_bad_input(mode, model, tmp_path, capsys):
    assert main(sample_args(model, tmp_path / "x.npy", "--mode", mode, name="wrong")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "a value of the model's" in err and "in wrong" in err


def test_an_open_end_is_a_number(capsys):
    args = ["plan", "edm_stochastic", "--schedule", "edm", "--steps", "4", "--set", "s_churn=3", "--json"]
    assert main([*args, "--set", "s_max=inf", "--set", "s_noise=1e0"]) == 0
    got = json.loads(capsys.readouterr().out)
    plan = fd.solvers.edm_stochastic(fd.schedules.EDM(), 4, s_churn=3, s_max=np.inf, s_noise=1.0)
    np.testing.assert_array_equal(np.array(got["s"]), plan.s)
    assert main([*args, "--set", "s_noise=-inf"]) == 2
    assert "s_noise must be a finite number >= 0, got -inf" in capsys.readouterr().err


def test_true_and_false_are_what_they_say(capsys):
    """In any case; what is neither is refused, where Python would take any text for true."""
    args = ["plan", "unipc", "--steps", "4", "--json"]
    for text, slots in (("false", 2), ("False", 2), ("TRUE", 3)):
        assert main([*args, "--set", f"corrector={text}"]) == 0
        assert json.loads(capsys.readouterr().out)["slots"] == slots
    assert main([*args, "--set", "corrector=no"]) == 2
    assert "solver unipc: corrector must be true or false, got 'no'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["dpm2_ancestral", "--set", "eta=abc"], "solver dpm2_ancestral: eta must be made of numbers, got 'abc'"),
        (["langevin", "--set", "eps=abc"], "solver langevin: eps must be made of numbers, got 'abc'"),
        (["ddim", "--set", "t_start=abc"], "solver ddim: t_start must be made of numbers, got 'abc'"),
        (["ddim", "--schedule", "linear_betas:start=abc"], "schedule linear_betas: start must be made of numbers"),
        (["ddim", "--schedule", "vp:beta_max=abc"], "schedule vp: beta_max must be made of numbers, got 'abc'"),
    ],
)
def test_text_for_a_number(args, text, capsys):
    assert main(["plan", *args]) == 2
    assert f"fastdiff plan: error: {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "ddim", "--steps", "1000000000000000"],
        ["plan", "ddim", "--schedule", "edm:rho=0.001"],
        ["plan", "ddim", "--schedule", "linear_betas:T=1000000000000000"],
    ],
)
def test_numbers_too_large_are_bad_input(args, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdiff plan: error: ") and len(err.strip().splitlines()) == 1


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["torch"]["value"] == torch.__version__
    assert found["CUDA device"]["ok"] is torch.cuda.is_available()
    with mock.patch.object(torch, "__version__", "2.8.1+cpu"):
        assert not {f.name: f.ok for f in examine()}["torch"]
    assert {"Python", "triton", "C++ compiler"} <= set(found) and all(
        f["meaning"] for f in found.values() if not f["ok"]
    )
    for named, there in (("none", False), (sys.executable, True)):  # torch calls $CXX and looks for no other
        with mock.patch.dict(os.environ, {"CXX": named}):
            assert main(["doctor", "--json"]) == 0
        assert {f["name"]: f["ok"] for f in json.loads(capsys.readouterr().out)}["C++ compiler"] is there
    assert main(["doctor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


PLAN = ["plan", "ddim", "--schedule", "vp", "--steps"]
BAD = [
    ([], "COMMAND"),
    (["sing"], "choose from"),
    (["plan", "dimm", "--schedule", "vp", "--steps", "4"], "dpmpp_2m"),
    (["plan", "ddim", "--schedule", "vpp", "--steps", "4"], "valid: bfncontinuous, bfndiscrete, constant_betas"),
    (["plan", "ddim", "--schedule", "vp:beta=3", "--steps", "4"], "valid: beta_min, beta_max"),
    (["plan", "ddim", "--schedule", "vp:beta_min", "--steps", "4"], "KEY=VALUE"),
    (["plan", "ddim", "--schedule", "vp:beta_min=-1", "--steps", "4"], "beta_min"),
    (["plan", "ddim", "--schedule", "vp:beta_min=x", "--steps", "4"], "beta_min"),
    (["plan", "ddim", "--schedule", "constant_betas", "--steps", "4"], "needs beta"),
    (["sample", "--model", "m.py:f", "--solver", "ddim", "--schedule", "vp"], "--steps"),
    ([*PLAN, "0"], "steps must be >= 1, got 0"),
    ([*PLAN, "many"], "many"),
    ([*PLAN, "4", "--set", "etta=1"], "valid: eta"),
    ([*PLAN, "4", "--set", "eta=2"], "eta must be in [0, 1], got 2"),
    ([*PLAN, "4", "--prediction", "noise"], "'eps'"),
    ([*PLAN, "4", "--spacing", "even"], "'karras'"),
    ([*PLAN, "4", "--final", "none"], "'zero'"),
    ([*PLAN, "4", "--clip", "1"], "LO,HI"),
    ([*PLAN, "4", "--clip", "1,-1"], "lo < hi"),
    ([*PLAN, "4", "--start", "9"], "start must be < 4"),
    ([*PLAN, "4", "--plot", "/proc/x/a.png"], "--plot: '/proc/x/a.png' cannot be written"),
    (["plan", "vp", "--set", "eta=1", "--clip=-1,1"], "'vp' is a schedule, which has no --clip, --set"),
    (["plan", "flow", "--schedule", "edm"], "'flow' is a schedule, which has no --schedule"),
    (["plan", "edm:rho=0"], "rho"),
    (["plan", "edm", "--steps", "0"], "--steps must be >= 1, got 0"),
    (["plan", "edm", "--plot", "/proc/x/a.png"], "--plot: '/proc/x/a.png' cannot be written"),
    (["demo", "--only", "faces"], "valid: schedules, spiral, digits"),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(args, says, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("fastdiff") and says in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--model": "nowhere.py:half"}, "no file"),
        ({"--model": "half"}, "path.py:function"),
        ({"--model": "{model}:third"}, "it has: boom, half, short, wrong"),
        ({"--model": "{model}:number"}, "no callable"),
        ({"--model": "{model}:short"}, "(16, 2), got (1, 2)"),
        ({"--model": "{broken}:f"}, "NameError"),
        ({"--solver": "dimm"}, "valid: ancestral"),
        ({"--start": "2"}, "sample has none: leave out --start"),
        ({"--solver": "bfn_continuous", "--schedule": "bfncontinuous", "--set": "start=2"}, "leave out --start"),
        ({"--solver": "ddim_inversion"}, "starts from data, not from noise"),
        ({"--solver": "restart", "--set": "intervals=(0.06,0.2)"}, "intervals must be (low, high, repeats, inner)"),
        ({"--shape": "16,x"}, "integers"),
        ({"--shape": "0,2"}, ">= 1"),
        ({"--seed": "-1"}, "seed"),
        ({"--mode": "graph"}, "step_graph"),
        ({"--mode": "loop_graph"}, "CUDA"),
        ({"--device": "abacus"}, "'abacus' is no device to run on; write cpu, cuda or cuda:0"),
        ({"--device": "mps"}, "'mps' is no device to run on"),
        ({"--device": "cuda:99"}, "CUDA devices were found"),
        ({"--out": "samples.txt"}, ".npy"),
        ({"--out": "nowhere/samples.npy"}, "not a folder"),
    ],
    ids=str,
)
def test_bad_sample_input(change, says, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.py"
    broken.write_text("nonsense\n")
    args = sample_args(model, "samples.npy")
    for flag, value in change.items():
        value = value.format(model=model, broken=broken)
        args = [*args, flag, value]  # the last one counts
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err
    assert not list(tmp_path.glob("*.npy*"))


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    assert main(["plan", "ddim", "--plot", str(tmp_path)]) == 2
    assert f"--plot: '{tmp_path}' is a folder" in capsys.readouterr().err


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.bin", b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
