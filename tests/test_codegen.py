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


@pytest.fixture
def triton_of_the_budgets():
    """Skips where the installed Triton is not the one whose code the budgets were set by."""
    from fastdiff_bench.codegen import BUDGETS

    triton, of = pytest.importorskip("triton"), json.loads(BUDGETS.read_text())["triton"]
    if triton.__version__ != of:
        pytest.skip(f"the budgets are of triton {of}, this is {triton.__version__}")


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.usefixtures("triton_of_the_budgets")
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
    reductions = ("guide/rescale", "guide/apg", "guide/zero_star", "threshold/bound", "categorical", "unmask_step")
    assert all(r["shared"] == r["barriers"] == 0 for r in reports if not r["case"].startswith(reductions))
    assert all(r["fmnmx_nan"] > 0 for r in reports if r["case"].startswith(("affine_step", "posterior")))


@pytest.mark.compiled
@pytest.mark.usefixtures("triton_of_the_budgets")
def test_amd_is_within_its_budgets():
    done = codegen("--arch", "--hip", "gfx942", "--only", "r2/noise+guidance/bf16", "denoising_loss/eps", "posterior")
    assert done.returncode == 0 and "5 kernels, 0 over budget" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("gfx942") == 5


SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;           /* 0x0000000402027981 */
                                                                             /* 0x000fe2000c1e1900 */
        /*0010*/                   LDC R9, c[0x0][0x28] ;                    /* 0x0 */
        /*0020*/              @!P0 LDG.E.128 R12, desc[UR4][R20.64+0x10] ;   /* 0x0 */
        /*0030*/                   IMAD.WIDE R6, R{0}, 0x8, R10 ;            /* 0x0 */
        /*0040*/                   LDG.E.CONSTANT R8, desc[UR4][R6.64] ;     /* 0x0 */
        /*0050*/                   NOP ;                                     /* 0x0 */
        /*0060*/                   FFMA R{1}, R{2}.reuse, R12, -R{3} ;       /* 0x0 */
        /*0070*/              @!P0 STG.E.128 desc[UR4][R{5}.64], R{4} ;        /* 0x0 */
        /*0080*/                   FADD R1, R8, R8 ;                         /* 0x0 */
        /*0090*/                   EXIT ;                                    /* 0x0 */
"""


@pytest.mark.parametrize(
    ("registers", "trips"),
    [
        ((3, 16, 9, 30, 16, 4), 1),  # the address's upper half is waited for, and R12, asked for before, has come too
        ((10, 16, 9, 30, 16, 4), 1),  # nothing reads the first load: one wait, for R12
        ((2, 16, 8, 30, 16, 4), 2),  # the second is for R8
        ((3, 16, 9, 30, 8, 4), 2),  # what a store writes is waited for
        ((3, 16, 9, 30, 16, 7), 2),  # and where to: R7 and R8
        ((10, 16, 9, 14, 16, 4), 1),  # R14 is one of the four that came with R12
    ],
)
def test_round_trips_are_waits_before_the_first_store(registers, trips):
    from fastdiff_bench.sass import instructions, round_trips

    code = instructions(SASS.format(*registers))
    assert len(code) == 9 and code[2] == (True, "LDG.E.128", ("R12", "desc[UR4][R20.64+0x10]"))
    assert round_trips(code) == trips


@pytest.mark.parametrize(
    "use",
    [
        "STG.E.128 desc[UR4][R2.64], R4",
        "STS [R6], R9",
        "STS.64 [UR4], R6",
        "ISETP.GE.AND P0, PT, R6, UR4, PT",
        "R2UR UR6, R6",
    ],
)
def test_every_register_that_is_read_is_waited_for(use):
    """A wide store's last register; an address, a predicate's operand, a uniform register's source: no results of R."""
    from fastdiff_bench.sass import instructions, round_trips

    lines = ["LDG.E R6, desc[UR4][R2.64]", use, "STG.E desc[UR4][R2.64], R20"]
    text = "\n".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines))
    assert round_trips(instructions(text)) == 1


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


def test_amds_budgets_are_of_what_can_be_compared():
    """Its counts; it has other instructions for accesses and clamps. A target without budgets is reported."""
    from fastdiff_bench import codegen as c

    case = next(x for x in c.cases(64) if x.name == "denoising_loss/eps/bf16")
    budgets = json.loads(c.BUDGETS.read_text())
    report = {"target": "gfx942", "registers": 40, "stack": 0, "spills": 0, "shared": 0, "barriers": 0,
              "per_element": 77.0, "tile_accesses": {"buffer_load_dwordx2": 4}}  # fmt: skip
    assert 77 > budgets["cases"]["denoising_loss/eps"]["per_element"] and c.over_budget(case, report, budgets) == []
    many = {**report, "per_element": 90.0, "spills": 2}
    assert c.over_budget(case, many, budgets) == ["spills 2 > 0", "per_element 90.0 > 81"]
    assert c.over_budget(case, {**many, "target": "gfx90a"}, budgets) == []


REPORT = {
    "case": "posterior/clip/fp32", "target": "gfx942", "registers": 20, "stack": 0, "spills": 0, "shared": 0,
    "barriers": 0, "per_element": 20.0, "tile_accesses": {}, "constants": {}, "source": "abc",
}  # fmt: skip


def ended(monkeypatch, path, found):
    """codegen's exit code where its reports are these: dictionaries, or what is raised instead of one."""
    from fastdiff_bench import codegen as c

    def reports(work):
        for report in found:
            if isinstance(report, BaseException):
                raise report
            yield report

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(c, "reports", reports)
    return c.main(["--arch", "--hip", "gfx942", "--only", "posterior/clip", "--json", str(path)])


def test_budgets_of_another_triton_are_said_to_be(monkeypatch, tmp_path, capsys):
    from fastdiff_bench import codegen as c

    budgets = json.loads(c.BUDGETS.read_text()) | {"triton": "1.0"}
    (path := tmp_path / "budgets.json").write_text(json.dumps(budgets))
    monkeypatch.setattr(c, "BUDGETS", path)
    monkeypatch.setattr(c, "reports", lambda work: [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="shorter"):
        c.run(c.argparse.Namespace(json=None, arch=[90], hip=[], only=["posterior"]), [])
    assert "the budgets are of triton 1.0: another one's code may be over them" in capsys.readouterr().out


def test_over_budget_is_exit_code_1(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    out = tmp_path / "folder" / "a.json"
    assert ended(monkeypatch, out, [REPORT, {**REPORT, "spills": 3}]) == 1
    assert "OVER: spills 3 > 0" in (text := capsys.readouterr().out) and "2 kernels, 1 over budget" in text
    data = json.loads(out.read_text())
    assert data["complete"] is True and [r["over_budget"] for r in data["reports"]] == [[], ["spills 3 > 0"]]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("posterior/clip/bf16 for gfx942: CompilationError: at 3:1"), 2, "error: posterior/clip/bf16 for"),
        (AssertionError(), 2, "error: AssertionError"),
    ],
    ids=repr,
)
def test_the_reports_before_a_failure_are_kept(error, code, says, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    out = tmp_path / "a.json"
    assert ended(monkeypatch, out, [REPORT, error]) == code
    data = json.loads(out.read_text())
    assert data["complete"] is False and [r["case"] for r in data["reports"]] == ["posterior/clip/fp32"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastdiff bench: {says}") and line.endswith(f"; what was measured before is in {out}")


def test_a_kernel_that_does_not_compile_is_named_by_its_process():
    from fastdiff_bench import codegen as c

    case = c.Case("lost/kernel", "no_such_module", "kernel", {}, {}, (), ())
    with pytest.raises(ValueError, match=r"lost/kernel for gfx942: (ModuleNotFound|Import)Error: No module named"):
        list(c.reports([(case, "hip", "gfx942")]))


def test_every_case_has_a_budget():
    from fastdiff_bench import codegen as c

    budgets = json.loads(c.BUDGETS.read_text())["cases"]
    assert {x.name.rsplit("/", 1)[0] for x in c.cases()} == set(budgets)


@pytest.mark.parametrize(
    ("env", "args", "text"),
    [
        ({"TRITON_INTERPRET": "1"}, [], "unset TRITON_INTERPRET"),
        ({}, ["--only", "nothing"], "no case contains"),
        ({}, ["--json", "/proc/x/a.json"], "--json: '/proc/x/a.json' cannot be written"),
    ],
)
def test_bad_input(env, args, text, monkeypatch, capsys):
    from fastdiff_bench import codegen as c

    monkeypatch.setenv("TRITON_INTERPRET", env.get("TRITON_INTERPRET", "0"))
    assert c.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and text in err


@pytest.mark.parametrize("lacks", ["triton", "cuobjdump"])
def test_what_it_needs_is_said_before_anything_is_compiled(lacks, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    import triton

    from fastdiff_bench import codegen as c

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    c._tool.cache_clear()
    if lacks == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(triton, "__file__", str(tmp_path / "triton" / "__init__.py"))
    assert c.main(["--only", "posterior/clip", "--json", str(tmp_path / "a.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "pip install triton" in err and not list(tmp_path.iterdir())


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
