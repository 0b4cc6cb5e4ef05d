"""What is shipped, what importing needs, and that names agree wherever they are listed."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fastdiff as fd
from fastdiff import cli, native
from fastdiff_bench.codegen import BUDGETS
from fastdiff_bench.peers import k_diffusion_sampling

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastdiff", "fastdiff_bench", "fastdiff_kernels"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
sys.path[:0] = {paths}
"""


def python(code, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_import_and_sampling_need_neither_triton_nor_extras():
    names = {"triton", "diffusers", "matplotlib", "sklearn", "PIL", "scipy"}
    code = BLOCK.format(names=names, paths=[str(ROOT), str(ROOT / "kernels")]) + (
        "import fastdiff as fd\n"
        "plan = fd.solvers.ddim(fd.schedules.VP(), 3)\n"
        "print(tuple(fd.sample(lambda x, t: 0 * x, plan, (2, 3), mode='eager').shape))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & " + repr(names) + "))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(2, 3)", "[]"]


def test_source_roots_do_not_shadow_installed_packages(tmp_path):
    # a regular package later on the path must win over our folder of the same name
    for name in ("kernels", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, bench; print(kernels.mine, bench.mine)"
    done = python(code)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("fastdiff", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = (
        "from setuptools import build_meta as b\n"
        f"sdist, wheel = b.build_sdist({str(out)!r}), b.build_wheel({str(out)!r})\n"
        "import json; print('RESULT', json.dumps([sdist, wheel]))"
    )
    done = python(code, cwd=source)
    assert done.returncode == 0, done.stderr
    sdist, wheel = json.loads(done.stdout.split("RESULT")[1])
    return tarfile.open(out / sdist).getnames(), zipfile.ZipFile(out / wheel)


def test_wheel_installs_the_three_packages_and_nothing_else(built):
    names = built[1].namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == PACKAGES
    for needed in ("fastdiff/py.typed", "fastdiff/cli.py", "fastdiff_kernels/affine_step.py"):
        assert needed in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(re.fullmatch(r"fastdiff_bench/\w+\.json", n) for n in names)


def test_wheel_metadata(built):
    wheel = built[1]
    (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "\nName: fastdiff-samplers\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    assert f"\nVersion: {fd.__version__}\n" in text
    (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "fastdiff = fastdiff.cli:main" in wheel.read(entry).decode()


def test_sdist_holds_all_source_roots(built):
    inside = {n.split("/", 1)[1] for n in built[0] if "/" in n}
    for needed in ("fastdiff/__init__.py", "kernels/fastdiff_kernels/__init__.py", "bench/fastdiff_bench/__init__.py"):
        assert needed in inside
    assert "kernels/__init__.py" not in inside and "bench/__init__.py" not in inside


def test_nothing_is_skipped_in_ci_for_what_is_not_installed():
    """Elsewhere tests that need k-diffusion, a C++ compiler or the budgets' Triton may be skipped."""
    if os.environ.get("CI"):
        assert k_diffusion_sampling() is not None and native.available()
        assert version("triton") == json.loads(BUDGETS.read_text())["triton"], "set the kernels' budgets again"


def test_every_dependency_is_pinned_but_triton():
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[\w.-]+", text).group() for text in wanted}
    assert names - pins == {"triton"}


@pytest.mark.parametrize("module", [fd, fd.schedules, fd.solvers, fd.ops], ids=lambda m: m.__name__)
def test_all_names_exist(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name, None) is not None, name


def test_solvers_are_documented_functions_of_schedule_and_steps():
    for name in fd.solvers.__all__:
        solver = getattr(fd.solvers, name)
        assert solver.__name__ == name and inspect.getdoc(solver)
        assert list(inspect.signature(solver).parameters)[:2] == ["schedule", "steps"]


def section(name):
    text = (ROOT / "docs" / "solvers.md").read_text()
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL).group(1)


def test_readme_names_what_exists():
    rows = [line.split("|")[1].strip() for line in section("solvers").splitlines()[2:]]
    assert rows == [f"`{name}`" for name in sorted(fd.solvers.__all__)]
    named = set(re.findall(r"`(\w+)`", section("schedules")))
    assert named == set(fd.schedules.__all__) - {"Schedule"}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_table_gives_the_evaluations_and_slots_of_the_plans():
    for line in section("solvers").splitlines()[2:]:
        name, evaluations, slots = (cell.strip() for cell in line.split("|")[1:4])
        name = name.strip("`")
        flow = fd.schedules.BFNDiscrete(3.0, 5) if name == "bfn_discrete" else fd.schedules.BFNContinuous(0.02)
        flow = fd.schedules.Masked(5) if name == "unmask" else flow
        plan = getattr(fd.solvers, name)(flow if name.startswith(("bfn", "unmask")) else fd.schedules.VP(), 7)
        counts = {"steps": 7, "steps + 1": 8, "2 steps - 1": 13, "2 steps + 29": 43, "5 steps + 1": 36}
        assert plan.nfe == counts[evaluations], name
        assert plan.slots == int(slots), name


def test_command_line_lists_the_registries():
    assert cli.solver_names() == list(fd.solvers.__all__)
    classes = {n.lower() for n in fd.schedules.__all__ if n[0].isupper()} - {"schedule", "betas"}
    assert set(cli.schedule_names()) == classes | {n for n in fd.schedules.__all__ if n.endswith("_betas")}


def test_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    scope = {}
    exec(code.replace("(16, 4, 64, 64)", "(64, 1, 8, 8)"), scope)
    assert abs(scope["x"].std().item() - 1) < 0.1  # the model is exact for N(0, I)
