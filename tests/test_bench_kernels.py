"""The kernels' benchmarks: every column compared, sizes and bytes as stated, the roofline's points and floors."""

import json
import math
import os
import platform
import subprocess
import sys

import pytest
import torch

from fastdiff.commands.options import one_line
from fastdiff_bench import kernels, options, roofline, suite, throughput, timing, work
from fastdiff_bench.cases import KERNELS
from fastdiff_bench.networks import NETWORKS, build
from fastdiff_bench.textbook import compiled

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
COLUMNS = ("torch", "diffusers", "fastdiff eager")
# fp32, bf16: what is read and written an element. affine_step: x in and out in fp32, the output and the next input in
# the model's dtype; classes: 8 bytes a token of 32 numbers; binned: x and p in fp32, two outputs; unmask_step: half of
# the logits, 36 bytes a token of 256
BYTES = {
    "affine_step": (12, 12), "add_noise": (8, 4), "add_noise_flow": (8, 4), "posterior": (16, 8), "guide": (12, 6),
    "denoising_loss": (16, 8), "threshold": (8, 4), "gaussian_kl": (24, 12), "binned": (16, 12),
    "binned_mean": (16, 12), "categorical_noise": (4.25, 2.25), "categorical_loss": (8.25, 4.25),
    "unmask_step": (2 + 36 / 256, 1 + 36 / 256),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", kernels.MAKERS)
def test_columns_agree_and_bytes_are_what_must_move(kernel, dtype):
    with torch.no_grad():
        work = kernels.MAKERS[kernel]("scaled_linear_betas", 1 << 10, dtype, CPU, COLUMNS)
        assert work.differs and max(work.differs.values()) < (2e-5 if dtype == torch.float32 else 2e-2)
        found = kernels.times(work, CPU, rounds=5, seconds=0.01)
    assert {"torch", "fastdiff eager"} <= set(found) and all(v["median"] > 0 for v in found.values())
    if kernel in BYTES:
        assert work.bytes_per_element == BYTES[kernel][dtype == torch.bfloat16]
    assert all(torch.is_tensor(t) for buffers in work.sets for t in buffers)


def test_every_kernel_can_be_asked_for():
    assert set(KERNELS) == set(kernels.MAKERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_the_same_every_time_and_keep_the_shape(name):
    a, b = build(name, CPU), build(name, CPU)
    x = torch.randn(NETWORKS[name].shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(x),), 0.3)
    y = a(x, t)
    assert y.shape == x.shape and torch.equal(y, b(x, t))
    assert not torch.equal(y, a(x, t + 0.5))  # the time matters
    assert not any(p.requires_grad for p in a.parameters())


def test_roofline_measures_sizes_and_draws_floors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "exponents", lambda request: [8, 10])
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 10.0)
    out, plots = tmp_path / "r.json", tmp_path / "plots"
    argv = ["--quick", "--no-compile", "--kernels", "add_noise", "posterior", "--dtype", "fp32", "--json", str(out)]
    assert roofline.main([*argv, "--plot", str(plots)]) == 0
    data = json.loads(out.read_text())
    assert data["complete"] and {p["elements"] for p in data["roofline"]} == {256, 1024}
    for p in data["roofline"]:
        assert p["gb_s"] == pytest.approx(p["bytes_per_element"] * p["elements"] / p["us"]["median"] / 1e3)
    assert (plots / "roofline.png").stat().st_size > 10_000 and (plots / "report.html").exists()
    text = capsys.readouterr().out
    assert "2^10" in text and "launch floor" in text


def test_the_largest_difference_counts_in_whichever_piece_it_lies(monkeypatch):
    monkeypatch.setattr(work, "PIECE", 8)
    want = torch.linspace(-2, 2, 30).view(3, 10)
    for i in (0, 7, 8, 29):
        got = want.clone()
        got.view(-1)[i] += 0.5
        assert work.gap(got, want) == pytest.approx(0.25)
        got.view(-1)[i] = math.nan
        assert math.isnan(work.gap(got, want))


def test_sizes_end_at_the_largest_asked_for():
    def sizes(*argv):
        return roofline.exponents(
            options.Request(options.parser().parse_args(["--roofline", "--device", "cpu", *argv]))
        )

    assert sizes() == [10, 12, 14, 16, 18, 20, 22, 24] and sizes("--largest", "13") == [10, 12]
    assert sizes("--largest", "28")[-2:] == [26, 28] and sizes("--quick", "--largest", "16") == [10, 16]


QUICK = ["--quick", "--no-compile", "--device", "cpu", "--dtype", "fp32", "--peers", "torch", "diffusers"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(roofline, "exponents", lambda request: [8, 10])
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 10.0)


@pytest.mark.parametrize("gap", [0.5, math.nan])
def test_two_columns_that_disagree_are_not_timed_and_end_in_exit_2(gap, small, monkeypatch, tmp_path, capsys):
    """The kernels after them are measured all the same."""

    def wrong(*args):
        work = kernels.add_noise(*args)
        if args[1] == 2**8:
            work.differs["fastdiff eager"] = gap
        return work

    stored = tmp_path / "a.json"
    monkeypatch.setitem(roofline.MAKERS, "add_noise", wrong)
    assert roofline.main([*QUICK, "--kernels", "add_noise", "posterior", "--json", str(stored)]) == 2
    out, err = capsys.readouterr()
    said = f"add_noise fp32 2^8: fastdiff eager differs by {gap:.1e}; what was measured before is in {stored}"
    assert err.splitlines()[-1].endswith(f"error: RuntimeError: {said}")
    data = json.loads(stored.read_text())
    assert f"add_noise, fp32 2^8: not timed: fastdiff eager differs by {gap:.1e}" in out
    timed = {(p["kernel"], p["elements"]) for p in data["roofline"] if p["column"] == "fastdiff eager"}
    assert timed == {("add_noise", 2**10), ("posterior", 2**8), ("posterior", 2**10)}


def test_a_kernel_that_fails_leaves_the_others(small, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setitem(roofline.MAKERS, "affine_step", broken)
    assert roofline.main([*QUICK, "--kernels", "affine_step", "posterior"]) == 2
    out, err = capsys.readouterr()
    said = "affine_step fp32 2^8: RuntimeError: no such instruction; and 1 more"
    assert err.splitlines()[-1].endswith(said) and "posterior" in out


@pytest.mark.parametrize("kernel", ["affine_step", "add_noise"])
def test_a_peer_that_fails_is_a_note_of_the_roofline(kernel, small, monkeypatch, tmp_path, capsys):
    def failing(*args):
        raise AssertionError("no\ncompiler")

    def maker(*args):
        work = kernels.add_noise(*args)
        work.columns["diffusers"] = failing
        return work

    def column_of(name, *args):
        return throughput.Column(failing) if name == "diffusers" else throughput.column_of(name, *args)

    monkeypatch.setitem(roofline.MAKERS, "add_noise", maker)
    monkeypatch.setattr(kernels, "column_of", column_of)  # whole loops run once in their making
    out = tmp_path / "a.json"
    assert roofline.main([*QUICK, "--kernels", kernel, "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert {(p["elements"], p["column"]) for p in data["roofline"]} >= {
        (n, c) for n in (256, 1024) for c in ("torch", "fastdiff eager")
    }
    assert data["complete"] and "diffusers" not in {p["column"] for p in data["roofline"]}
    assert data["skipped"] == {f"{kernel}, diffusers": "it failed: AssertionError: no compiler"}
    assert f"{kernel}, diffusers: it failed: AssertionError: no compiler" in capsys.readouterr().out
    monkeypatch.setattr(roofline, "times", lambda *args, **kwargs: pytest.fail("measured"))
    assert roofline.main([*QUICK, "--kernels", kernel, "--compile-only"]) == 0


@pytest.mark.parametrize("error", [AssertionError(), KeyError("n"), RuntimeError("no kernel")], ids=repr)
def test_fastdiff_failing_at_a_size_is_one_line_and_the_other_points(error, small, monkeypatch, tmp_path, capsys):
    def maker(schedule, elements, *args):
        def failing(*buffers):
            raise error

        work = kernels.add_noise(schedule, elements, *args)
        if elements == 256:
            work.columns["fastdiff eager"] = failing
        return work

    monkeypatch.setitem(roofline.MAKERS, "add_noise", maker)
    out = tmp_path / "a.json"
    assert roofline.main([*QUICK, "--kernels", "add_noise", "--json", str(out)]) == 2
    text, err = capsys.readouterr()
    said = f"fp32 2^8: {one_line(error)}"
    assert f"add_noise, {said.replace(': ', ': not timed: ', 1)}" in text
    assert {p["elements"] for p in json.loads(out.read_text())["roofline"]} == {1024}
    last = f"fastdiff bench: error: RuntimeError: add_noise {said}; what was measured before is in {out}"
    assert err.splitlines()[-1] == last


def test_a_full_disk_at_the_rooflines_picture_is_one_line(small, tmp_path, monkeypatch, capsys):
    def full(data, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff_bench.page.write_report", full)
    assert roofline.main([*QUICK, "--kernels", "guide", "--plot", str(tmp_path)]) == 2
    text, err = capsys.readouterr()
    assert "2^10" in text and err.splitlines()[-1] == "fastdiff bench: error: [Errno 28] No space left on device"


def test_a_size_too_large_for_the_memory_is_left_out_and_said(monkeypatch, capsys):
    def points(kernel, dtype, elements, request):
        if elements == 1 << 16:
            raise torch.OutOfMemoryError
        return [{"kernel": kernel, "dtype": dtype, "elements": elements, "column": "fastdiff eager", "gb_s": 3.0,
                 "us": {"median": 7.5}}], {}  # fmt: skip

    monkeypatch.setattr(roofline, "points", points)
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 10.0)
    assert roofline.main(["--quick", "--device", "cpu", "--kernels", "add_noise"]) == 0
    out = capsys.readouterr().out
    assert "2^10" in out and "2^20" in out and "add_noise, fp32 2^16: more memory than cpu has" in out


def test_compile_only_makes_every_column_and_measures_none(monkeypatch, capsys):
    ran = []

    def maker(schedule, elements, dtype, device, names):
        columns = {name: lambda x, name=name: ran.append((name, elements, dtype, x)) for name in names}
        return work.Work("guide", schedule, elements, str(dtype), 8, [(1,), (2,)], columns)

    monkeypatch.setitem(roofline.MAKERS, "guide", maker)
    for module in (roofline, suite):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: pytest.fail("measured"))
    argv = ["--quick", "--compile-only", "--device", "cpu", "--peers", "torch", "--no-compile"]
    assert roofline.main([*argv, "--kernels", "guide", "--dtype", "fp32", "bf16", "--largest", "16"]) == 0
    wanted = {(n, 1 << e, d, 1) for n in ("torch", "fastdiff eager") for e in (10, 16) for d in DTYPES}
    assert set(ran) == wanted
    made = []
    monkeypatch.setattr(throughput, "measure", lambda *a, **k: pytest.fail("measured"))
    column_of = throughput.column_of
    monkeypatch.setattr(throughput, "column_of", lambda name, *a: made.append(name) or column_of(name, *a))
    assert suite.main([*argv, "--schedules", "flow", "--solvers", "euler", "--shapes", "1x8"]) == 0
    assert {"torch", "fastdiff eager"} <= set(made)
    assert capsys.readouterr().out == ""


def test_an_interrupted_roofline_prints_the_points_before(monkeypatch, capsys):
    def points(kernel, dtype, elements, request):
        if elements > 1 << 10:
            raise KeyboardInterrupt
        return [{"kernel": kernel, "dtype": dtype, "elements": elements, "column": "fastdiff eager", "gb_s": 3.0,
                 "us": {"median": 7.5}}], {}  # fmt: skip

    monkeypatch.setattr(roofline, "points", points)
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: 10.0)
    assert roofline.main(["--quick", "--device", "cpu", "--kernels", "add_noise"]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("interrupted: 1 points") and "| add_noise | fp32  |     2^10 |" in out
    assert err.splitlines()[-1] == "fastdiff bench: interrupted"


@pytest.mark.compiled
def test_torch_compile_stays_compiled_over_more_sizes_than_dynamo_compiles_one_function_for():
    """Past its limit of recompilations Dynamo runs a function eagerly: the column would be another one."""
    frames = []

    def scale(x):
        frames.append(torch.compiler.is_compiling())
        return 2 * x

    for n in range(1, 10):
        x = torch.arange(float(n))
        assert torch.equal(compiled(scale, n)(x), 2 * x)
    assert len(frames) == 9 and all(frames)  # traced once a size, never called as it is


FAULTS = """
import resource, torch
from fastdiff_bench.timing import malloc_is_set, return_freed
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(n << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert malloc_is_set()
first, warm = faults(1280), faults(1280)
found = [first, sum(faults(1280) for _ in range(4))]
return_freed()
print(*found, faults(64))
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="glibc's thresholds")
def test_what_a_column_frees_the_next_one_does_not_fault_in():
    """1.25 GiB are few or many faults (pages of 2 MiB or of 4 KiB) the first time, and once warm none; the second time
    a small block may lie in the way of the first place."""
    env = timing.with_malloc(os.environ, large=True)
    out = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True).stdout
    first, again, returned = map(int, out.split())
    assert first >= 1280 // 2 and again <= first / 50 and returned >= 64 // 2
