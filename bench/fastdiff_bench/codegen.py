"""What the kernels compile to, without a GPU: registers, spills, shared memory, access widths, instructions an element.

Every kernel is compiled ahead of time as the operations launch it (same constexprs, same tile, all features in), down
to SASS or AMD's assembly, and held against budgets.json; access widths, NaN clamps and round trips to memory on NVIDIA
only. Counts are static: both sides of a branch are counted.

    python -m fastdiff_bench.codegen [--arch 80 89 90 100] [--hip gfx942] [--only affine_step] [--json FILE]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fastdiff_bench.sass import instructions, round_trips

BUDGETS = Path(__file__).with_name("budgets.json")
SAMPLE, BATCH = 1 << 24, 8  # the size the shipped launch table is asked for
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel as launched: pointer and scalar types, constexprs, tile tensors read and written, budget name."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    loads: tuple[str, ...]
    stores: tuple[str, ...]
    clamps: bool = False
    scalars: int = 0  # predicated accesses of single numbers
    num_warps: int = 4
    lanes: int = 32
    vector: int = 4  # neighbouring elements of a thread
    indices: int = 0  # predicated accesses of single int64 numbers, at most
    divisible: tuple[str, ...] = ("n",)  # sizes that are multiples of 16

    @property
    def elements_per_thread(self) -> float:
        c = self.constants
        return (c["BLOCK"] if "BLOCK" in c else c.get("ROWS", 1) * c["COLS"]) / (self.lanes * self.num_warps)


def tile_of(slots: int = 1, *, lanes: int = 32) -> tuple[dict[str, Any], int]:
    from fastdiff.ops._dispatch import tiling

    tile = tiling(SAMPLE, BATCH, slots=slots, lanes=lanes)
    return {"BLOCK": tile["BLOCK"], "PARTS": tile["PARTS"], "ALIGNED": True, "WIDE": False}, tile["num_warps"]


def _step(slots: int, model: str, *, lanes: int = 32, noise: bool = True, guided: bool = True, copies: int = 1,
          ruled: bool = False, numbered: bool = False) -> Case:  # fmt: skip
    from fastdiff.plan import ROW_HEADER, row_width

    scalars = ("n", "batch", "first", "row_stride", "w_row_stride", "w_batch_stride", "stream")
    types = {"state_ptr": "*fp32", "model_ptr": f"*{model}", "table_ptr": "*fp32", "row": "i32" if numbered else "*i32"}
    types |= dict.fromkeys(scalars, "i32")
    if copies:
        types["model_in_ptr"] = "*bf16"
    if guided:
        types |= {"uncond_ptr": f"*{model}", "w_ptr": "*fp32"}
    if ruled:
        types["bound_ptr"] = "*fp32"
    if noise:
        types |= {"seed_ptr": "*i64", "index_ptr": "*i64"}
    tile, warps = tile_of(slots, lanes=lanes)
    constants = {"SLOTS": slots, "HEADER": ROW_HEADER, "WIDTH": row_width(slots), "NOISE": int(noise)}
    constants |= {"GUIDED": guided + ruled, "COPIES": copies, **tile}
    has = {"noise": noise, "guidance": guided, "rule": ruled, "2copies": copies == 2, "number": numbered}
    features = [name for name, on in has.items() if on]
    return Case(
        f"affine_step/r{slots}/{'+'.join(features) or 'plain'}/{model}",
        "affine_step", "affine_step_kernel", types, constants,
        loads=(model,) * (1 + guided) + ("fp32",) * slots, stores=("fp32",) * slots + ("bf16",) * copies,
        clamps=True, num_warps=warps, lanes=lanes,
    )  # fmt: skip


def _outer(slots: int, dtype: str, lanes: int) -> Case:
    """A scheduler's step: x and x' of the caller's dtype, given noise."""
    from fastdiff.plan import ROW_HEADER, row_width

    types = dict.fromkeys(("x_ptr", "model_ptr", "out_ptr"), f"*{dtype}") | {"table_ptr": "*fp32"}
    types |= {"noise_ptr": "*fp32", **dict.fromkeys(("n", "batch", "first", "row", "stream"), "i32")}
    types |= {"slab_ptr": "*fp32"} if slots > 1 else {}
    tile, warps = tile_of(slots, lanes=lanes)
    constants = {"SLOTS": slots, "HEADER": ROW_HEADER, "WIDTH": row_width(slots), "NOISE": 2, **tile}
    return Case(
        f"outer_step/r{slots}/{dtype}", "outer_step", "outer_step_kernel", types, constants,
        loads=(dtype,) * 2 + ("fp32",) * slots, stores=(dtype,) + ("fp32",) * (slots - 1),
        clamps=True, num_warps=warps, lanes=lanes,
    )  # fmt: skip


def cases(lanes: int = 32) -> Iterator[Case]:
    """The kernels of the package in the variants that matter, tiled for warps of `lanes` threads."""
    for model in ("fp32", "bf16"):
        yield _step(1, model, lanes=lanes, noise=False, guided=False)
        yield _step(1, model, lanes=lanes, guided=False)
        yield _step(1, model, lanes=lanes, noise=False, guided=False, numbered=True)
        yield _step(1, model, lanes=lanes, guided=False, numbered=True)
        for slots in (1, 2, 3, 4):
            yield _step(slots, model, lanes=lanes)
        yield _step(2, model, lanes=lanes, ruled=True)
    yield _step(4, "bf16", lanes=lanes, copies=2)
    yield _step(5, "bf16", lanes=lanes)
    for slots, model in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (4, "fp32"), (4, "bf16")):
        yield _outer(slots, model, lanes)
    tile, warps = tile_of(lanes=lanes)
    seeds = {"seed_ptr": "*i64", "index_ptr": "*i64"}
    counts = {"n": "i32", "first": "i32", "rows": "i32", "t_stride": "i32"}
    for dtype in ("fp32", "bf16"):
        p = f"*{dtype}"
        for target in (False, True):
            types = {"x_ptr": p, "out_ptr": p, "coef_ptr": "*fp32", "t_ptr": "*i64", **seeds, **counts}
            types |= {"row": "i32", "stream": "i32", **({"target_ptr": p} if target else {})}
            name = f"add_noise/{'target' if target else 'plain'}/{dtype}"
            yield Case(
                name,
                "add_noise",
                "add_noise_kernel",
                types,
                tile,
                (dtype,),
                (dtype,) * (1 + target),
                num_warps=warps,
                lanes=lanes,
            )
        types = {"x_ptr": p, "model_ptr": p, "coef_ptr": "*fp32", "t_ptr": "*i64", "mean_ptr": p, "x0_ptr": p}
        types |= {"variance_ptr": "*fp32", "batch": "i32", "lo": "fp32", "hi": "fp32", **counts}
        yield Case(
            f"posterior/clip/{dtype}", "posterior", "posterior_kernel", types, {"CLIP": True, **tile},
            (dtype,) * 2, (dtype,) * 2, clamps=True, scalars=4, num_warps=warps, lanes=lanes,
        )  # fmt: skip
    types = {"out_ptr": "*fp32", "rows_ptr": "*i64", **seeds}
    types |= dict.fromkeys(("n", "batch", "first", "stream"), "i32")
    yield Case("normal/fp32", "philox", "normal_kernel", types, tile, (), ("fp32",), num_warps=warps, lanes=lanes)
    from fastdiff_bench.codegen_binned import binned_cases
    from fastdiff_bench.codegen_categorical import categorical_cases
    from fastdiff_bench.codegen_samples import sample_cases
    from fastdiff_bench.codegen_training import training_cases

    for dtype in ("fp32", "bf16"):
        yield from binned_cases(dtype, tile, warps, lanes)
        yield from sample_cases(dtype, tile, warps, lanes)

    yield from categorical_cases(lanes)
    yield from training_cases(lanes)


def compile_case(case: Case, backend: str, arch: int | str) -> Any:
    """Compiles one case for ("cuda", 90) or ("hip", "gfx942"), as the JIT specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"fastdiff_kernels.{case.module}"), case.kernel)
    constants = {**case.constants, "MATH": backend}
    types = {k: case.types.get(k, "constexpr") for k in kernel.arg_names}
    at = kernel.arg_names.index
    absent = {k: constants.get(k) for k, v in types.items() if v == "constexpr"}
    # the JIT notes 16-byte pointers and sizes divisible by 16
    marked = (k for k, v in types.items() if v.startswith("*") or (v != "constexpr" and k in case.divisible))
    attributes = {(at(k),): [["tt.divisibility", 16]] for k in marked}
    source = ASTSource(
        fn=kernel, signature=types, constexprs={(at(k),): v for k, v in absent.items()}, attrs=attributes
    )
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, "enable_fp_fusion": False})


def source_hash(module: str) -> str:
    """The first 12 digits of the SHA-256 over a kernel's source file and those it takes device functions from."""
    folder = Path(importlib.import_module("fastdiff_kernels").__file__ or "").parent
    files: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name not in files:
            files[name] = (folder / f"{name}.py").read_text("utf-8")
            left += re.findall(r"^from fastdiff_kernels\.(\w+) import", files[name], re.M)
    return hashlib.sha256("".join(files[k] for k in sorted(files)).encode()).hexdigest()[:12]


@functools.cache
def _tool() -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise ValueError("this triton has no cuobjdump, which its wheel has: pip install triton")
    return str(tool)


def _dump(flag: str, path: str) -> str:
    return subprocess.run([_tool(), flag, path], capture_output=True, text=True, check=True).stdout


def nvidia_report(case: Case, arch: int) -> dict[str, Any]:
    """Resources and SASS of one case on sm_<arch>."""
    compiled = compile_case(case, "cuda", arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage, sass = _dump("--dump-resource-usage", f.name), _dump("--dump-sass", f.name)
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code = instructions(sass)
    ops = [(i.predicated, i.op) for i in code]
    heads = collections.Counter(op.split(".")[0] for _, op in ops)
    tile, scalar = collections.Counter[str](), 0
    for predicated, op in ops:
        head = op.split(".")[0]
        if head not in ("LDG", "STG"):
            continue
        width = 16 if ".128" in op else 8 if ".64" in op else 2 if "16" in op else 4
        # a tile's loads are masked; its stores too, but the last one of a program may be guarded by an early exit
        if width >= 8 and (predicated or head == "STG"):
            tile[f"{head}{width}"] += 1
        elif predicated or head == "STG":
            scalar += 1
    return {
        "case": case.name,
        "target": f"sm_{arch}",
        "registers": used.get("REG", 0),
        "stack": used.get("STACK", 0),
        "spills": heads["LDL"] + heads["STL"],
        "shared": compiled.metadata.shared,
        "barriers": heads["BAR"],
        "round_trips": round_trips(code),
        "per_element": round(len(ops) / case.elements_per_thread, 1),
        "mufu": heads["MUFU"],
        "fmnmx_nan": sum(op.startswith("FMNMX") and ".NAN" in op for _, op in ops),
        "tile_accesses": dict(tile),
        "narrow_accesses": scalar,
        "constants": {**case.constants, "MATH": "cuda", "num_warps": case.num_warps},
        "source": source_hash(case.module),
    }


def hip_report(case: Case, arch: str) -> dict[str, Any]:
    """Resources and instructions of one case on an AMD target."""
    compiled = compile_case(case, "hip", arch)
    text = compiled.asm["amdgcn"]
    number = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|sgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    ops = re.findall(r"^\t((?:v|s|global|buffer|flat|ds|scratch)_\w+)", text, re.M)
    memory = collections.Counter(op for op in ops if op.startswith(("global_", "buffer_", "flat_")))
    return {
        "case": case.name,
        "target": arch,
        "registers": number.get("vgpr_count", 0),
        "stack": 0,
        "spills": number.get("vgpr_spill_count", 0),
        "shared": compiled.metadata.shared,
        "barriers": ops.count("s_barrier"),
        "per_element": round(len(ops) / case.elements_per_thread, 1),
        "tile_accesses": dict(memory),
        "constants": {**case.constants, "MATH": "hip", "num_warps": case.num_warps},
        "source": source_hash(case.module),
    }


def _report(case: Case, backend: str, arch: Any) -> dict[str, Any]:
    try:
        return nvidia_report(case, arch) if backend == "cuda" else hip_report(case, arch)
    except Exception as error:  # Triton's own do not all survive the way to another process
        from fastdiff.commands.options import one_line

        raise ValueError(f"{case.name} for {arch}: {one_line(error)}") from None


def reports(work: list[tuple[Case, str, Any]]) -> Iterator[dict[str, Any]]:
    """The reports in their order, by processes side by side that leave an interruption to this one."""
    workers = max(1, min(len(work), os.cpu_count() or 1))
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:  # fmt: skip
        yield from pool.map(_report, *zip(*work, strict=True))


def over_budget(case: Case, report: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """What a report exceeds, one line each; empty when it is within budget, or of an AMD target that has none."""
    nvidia = report["target"].startswith("sm_")
    if not nvidia and report["target"] not in budgets:
        return []
    name = case.name.rsplit("/", 1)[0]
    limits = {**budgets["all"], **budgets["cases"].get(name, {}), **budgets.get(report["target"], {}).get(name, {})}
    if "per_element" not in limits:
        return [f"no budget for {name}"]
    if not nvidia:
        limits.pop("round_trips", None)  # counted in SASS only
    missed = [f"{k} {report[k]} > {v}" for k, v in limits.items() if report[k] > v]
    if not nvidia:
        return missed
    want = collections.Counter[str]()
    for head, dtypes in (("LDG", case.loads), ("STG", case.stores)):
        for dtype in dtypes:
            width = min(16, SIZES[dtype] * case.vector)
            want[f"{head}{width}"] += int(case.elements_per_thread * SIZES[dtype]) // width
    found = collections.Counter(report["tile_accesses"])
    for ids in ("LDG8", "STG8"):
        if 0 < found[ids] - want[ids] <= case.indices:
            found[ids] = want[ids]
    if +found != +want or report["narrow_accesses"] > case.scalars:
        missed.append(f"accesses {report['tile_accesses']} + {report['narrow_accesses']} narrow, expected {dict(want)}")
    if case.clamps and not report["fmnmx_nan"]:
        missed.append("the clamp does not propagate NaN (no FMNMX.NAN)")
    return missed


def run(args: argparse.Namespace, found: list[dict[str, Any]]) -> int:
    """Compiles, prints and writes report by report; 1 where one is over budget."""
    from fastdiff.commands.options import writable
    from fastdiff.files import write_atomic

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("codegen compiles for real targets: unset TRITON_INTERPRET")
    path = writable("--json", args.json)
    targets = [*(("cuda", a) for a in args.arch), *(("hip", h) for h in args.hip)]
    work = [(c, backend, a) for backend, a in targets for c in cases(32 if backend == "cuda" else 64)
            if any(part in c.name for part in args.only)]  # fmt: skip
    if not work:
        names = ", ".join(c.name for c in cases())
        raise ValueError(f"no case contains {' or '.join(args.only)}; there are: {names}")
    try:
        import triton
    except ModuleNotFoundError:
        raise ValueError("codegen needs Triton's compiler: pip install triton") from None
    if args.arch:
        _tool()
    print(f"triton {triton.__version__}; instructions are static counts per element; constexprs and source at the end")
    budgets = json.loads(BUDGETS.read_text())
    if triton.__version__ != budgets["triton"]:
        print(f"the budgets are of triton {budgets['triton']}: another one's code may be over them")
    for (case, _, _), report in zip(work, reports(work), strict=True):
        missed = over_budget(case, report, budgets)
        found.append({**report, "over_budget": missed})
        if path is not None:
            data = {"triton": triton.__version__, "complete": len(found) == len(work), "reports": found}
            write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
        trips = f"{report['round_trips']} trips  " if "round_trips" in report else ""
        print(
            f"{report['target']:7s} {case.name:42s} {report['per_element']:6.1f}/el  {report['registers']:3d} regs"
            f"  {report['spills']} spills  {report['shared']} smem  {report['barriers']} bar  "
            f"{trips}{report['tile_accesses']}{'  OVER: ' + '; '.join(missed) if missed else ''}",
            flush=True,
        )
    for report in {r["case"]: r for r in found}.values():
        print(f"{report['case']}: source {report['source']} {report['constants']}")
    over = sum(bool(r["over_budget"]) for r in found)
    print(f"{len(found)} kernels, {over} over budget")
    return int(over > 0)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 over budget, 2 with one line where it cannot run or a kernel does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff_bench.codegen", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", nargs="*", type=int, default=[80, 89, 90, 100], help="NVIDIA targets, sm_<arch>")
    parser.add_argument("--hip", nargs="*", default=[], help="AMD targets, for instance gfx942")
    parser.add_argument("--only", nargs="+", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--json", metavar="FILE", help="write all reports to a file")
    args = parser.parse_args(argv)
    from fastdiff.commands.options import failed, written

    found: list[dict[str, Any]] = []
    before = written(args.json)
    try:
        return run(args, found)
    except (Exception, KeyboardInterrupt) as error:
        return failed("bench", error, found=found, path=args.json, before=before)


if __name__ == "__main__":
    sys.exit(main())
