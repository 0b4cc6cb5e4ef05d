"""The kernels' budgets, compiled ahead of time in a process of their own (the interpreter is off there)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def codegen(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "bench"))
    command = [sys.executable, "-m", "fastdiff_bench.codegen", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(
    "args",
    [
        ["--arch", "90"],
        ["--arch", "80", "89", "100", "--only", "r4/noise+guidance/"],
        ["--arch", "80", "89", "100", "--only", "categorical_step/k"],
    ],
    ids=["sm_90", "sm_80, 89, 100: four slots", "sm_80, 89, 100: classes"],
)
def test_budgets(args, tmp_path):
    """Registers, spills, shared memory, barriers, access widths, NaN clamps and instructions an element."""
    done = codegen(*args, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "report.json").read_text())["reports"]
    # the float64 sine of large angles, which none is, has a stack
    assert reports and all(r["spills"] == 0 for r in reports if not r["case"].startswith("levels/Cosine"))
    # sums between warps
    reductions = ("guide/rescale", "guide/apg", "guide/zero_star", "threshold/bound", "categorical")
    assert all(r["shared"] == r["barriers"] == 0 for r in reports if not r["case"].startswith(reductions))
    assert all(r["fmnmx_nan"] > 0 for r in reports if r["case"].startswith(("affine_step", "posterior")))


@pytest.mark.compiled
def test_amd_compiles():
    done = codegen("--arch", "--hip", "gfx942", "--only", "r2/noise+guidance/bf16")
    assert done.returncode == 0 and "gfx942" in done.stdout, done.stdout + done.stderr


def test_over_budget_is_seen():
    """A report past one limit, with narrow accesses and a clamp that loses NaN, is refused on each count."""
    from fastdiff_bench import codegen as c

    case = next(x for x in c.cases() if x.name == "affine_step/r1/noise/fp32")
    budgets = json.loads(c.BUDGETS.read_text())
    report = {
        "target": "sm_90", "registers": 40, "stack": 0, "spills": 0, "shared": 0, "barriers": 0, "per_element": 43.0,
        "tile_accesses": {"LDG16": 4, "STG16": 2, "STG8": 2}, "narrow_accesses": 0, "fmnmx_nan": 2,
    }  # fmt: skip
    assert c.over_budget(case, report, budgets) == []
    for change, text in (
        ({"registers": 97}, "registers 97 > 96"),
        ({"spills": 1}, "spills 1 > 0"),
        ({"per_element": 56.1}, "per_element 56.1 > 56"),
        ({"tile_accesses": {"LDG16": 2, "LDG8": 4, "STG16": 2, "STG8": 2}}, "accesses"),
        ({"narrow_accesses": 3}, "narrow"),
        ({"fmnmx_nan": 0}, "NaN"),
    ):
        (line,) = c.over_budget(case, {**report, **change}, budgets)
        assert text in line


def test_every_case_has_a_budget():
    from fastdiff_bench import codegen as c

    budgets = json.loads(c.BUDGETS.read_text())["cases"]
    assert {x.name.rsplit("/", 1)[0] for x in c.cases()} == set(budgets)


@pytest.mark.parametrize(
    ("env", "args", "text"),
    [({"TRITON_INTERPRET": "1"}, [], "unset TRITON_INTERPRET"), ({}, ["--only", "nothing"], "no case contains")],
)
def test_bad_input(env, args, text, monkeypatch, capsys):
    from fastdiff_bench import codegen as c

    monkeypatch.setenv("TRITON_INTERPRET", env.get("TRITON_INTERPRET", "0"))
    assert c.main(args) == 2
    assert text in capsys.readouterr().err


def test_every_kernel_of_the_help_is_one_of_codegens(monkeypatch):
    from fastdiff.cli import main
    from fastdiff.commands import bench
    from fastdiff_bench import codegen as c
    from fastdiff_bench.cases import KERNELS

    asked = []

    class Process:
        def __init__(self, command, env):
            asked.extend(command[command.index("--only") + 1 :])

        def wait(self):
            return 0

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    assert main(["bench", "--codegen", "--kernels", "binned_mean", "guide"]) == 0
    assert asked == ["binned/mean", "guide"]
    names = [x.name for x in c.cases()]
    assert all(any(bench.COMPILED_AS.get(k, k) in name for name in names) for k in KERNELS)
