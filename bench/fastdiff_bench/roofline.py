"""us against elements for every kernel, dtype and column, beside what the machine cannot go below.

    python -m fastdiff_bench.roofline [--quick] [--sizes N ...] [--kernels ...] [--dtype ...] [--json FILE] [--plot DIR]

The bandwidth floor is bytes an element (from the plan, or what an operation must read and write) over the measured copy
bandwidth; the launch floor is the smallest operation there is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastdiff.commands.options import failed, one_line, written
from fastdiff_bench import options, tables
from fastdiff_bench.cases import PEERS
from fastdiff_bench.energy import Meter
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.kernels import MAKERS, times
from fastdiff_bench.options import LARGEST, SMALLEST, Request
from fastdiff_bench.suite import method, save
from fastdiff_bench.timing import copy_bandwidth, launch_floor_us, return_freed
from fastdiff_bench.work import Work, fails

__all__ = ["main", "points", "run"]

SCHEDULE = {
    **dict.fromkeys(("categorical_step", "categorical_noise", "categorical_loss"), "bfndiscrete"),
    "unmask_step": "masked",
    **dict.fromkeys(("binned", "binned_mean"), "bfn"),
    "add_noise_flow": "flow",
    **dict.fromkeys(("guide", "threshold", "gaussian_kl"), "any"),
}
CHAIN = "scaled_linear_betas"
GAP = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 3e-3}


def exponents(request: Request) -> list[int]:
    """log2 of the sizes: those asked for, a quick run's few, or every second one up to the largest."""
    if request.sizes:
        return request.sizes
    quick = [12, 20, 24, 26] if request.device.type == "cuda" else [10, 16, 20]
    if request.asked_largest:
        quick = [*(n for n in quick if n < request.largest), request.largest]
    return [n for n in (quick if request.quick else range(SMALLEST, LARGEST + 1, 2)) if n <= request.largest]


def _call(work: Work, name: str) -> None:
    work.prepare.get(name, lambda: None)()
    work.columns[name](*work.sets[0])


def made(kernel: str, dtype: torch.dtype, elements: int, request: Request) -> Work:
    """The kernel's columns; a peer that fails, in its making or its first call, is a note."""
    names = [c for c in request.columns if not c.endswith("_graph")]
    work = MAKERS[kernel](SCHEDULE.get(kernel, CHAIN), elements, dtype, request.device, names)
    for name in [n for n in work.columns if n in PEERS]:
        if why := fails(partial(_call, work, name)):
            work.skipped[name] = why
            del work.columns[name]
    return work


def points(
    kernel: str, dtype_name: str, elements: int, request: Request
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One point a column at one size, and why columns are missing."""
    dtype, device = request.dtypes[dtype_name], request.device
    with torch.no_grad():
        work = made(kernel, dtype, elements, request)
        for name, gap in work.differs.items():
            if not gap <= GAP[dtype_name]:  # NaN too
                raise ValueError(f"{name} differs by {gap:.1e}")
        found = times(work, device, rounds=9 if request.quick else 15, seconds=0.3 if request.quick else 0.8)
    return [
        {"kernel": kernel, "schedule": work.schedule, "dtype": dtype_name, "elements": elements, "column": name,
         "us": us, "bytes_per_element": work.bytes_per_element,
         "gb_s": work.bytes_per_element * elements / us["median"] / 1e3, "sets": len(work.sets)}
        for name, us in found.items()
    ], work.skipped  # fmt: skip


def compile_all(request: Request, *, say: Callable[[str], object]) -> None:
    """Calls every column once, and leaves what was compiled in the compilers' caches on disk."""
    for kernel in request.kernels:
        for dtype in request.dtypes:
            for exponent in exponents(request):
                say(f"compiling {kernel} {dtype} 2^{exponent}")
                with torch.no_grad():
                    work = made(kernel, request.dtypes[dtype], 1 << exponent, request)
                    for name in work.columns:
                        _call(work, name)


def run(data: dict[str, Any], request: Request, *, say: Callable[[str], object]) -> None:
    """Every kernel and dtype over all sizes, the result and its JSON current after each size.

    Raises: RuntimeError after the last one where a size failed or two columns disagreed; the others are measured.
    """
    device, failures = request.device, []
    meter = Meter(device)
    say("measuring the copy bandwidth and the launch floor")
    data |= {
        "environment": environment(device), "complete": False, "state_before": meter.state(), "rows": [],
        "roofline": [], "skipped": {}, "method": method(request, copy_bandwidth(device), launch_floor_us(device)),
    }  # fmt: skip
    try:
        for kernel in request.kernels:
            for dtype in request.dtypes:
                for exponent in exponents(request):
                    say(f"{kernel} {dtype} 2^{exponent}")
                    try:
                        found, skipped = points(kernel, dtype, 1 << exponent, request)
                    except torch.OutOfMemoryError:
                        found, skipped = [], {f"{dtype} 2^{exponent}": f"more memory than {device} has"}
                    except Exception as error:
                        why = str(error) if isinstance(error, ValueError) else one_line(error)
                        found, skipped = [], {f"{dtype} 2^{exponent}": f"not timed: {why}"}
                        failures.append(f"{kernel} {dtype} 2^{exponent}: {why}")
                    data["roofline"] += found
                    data["skipped"].update({f"{kernel}, {name}": why for name, why in skipped.items()})
                    save(request.json, data)
                    return_freed()
        data["complete"] = True
    finally:
        data["state_after"] = meter.state()
        save(request.json, data)
    if failures:
        raise RuntimeError(failures[0] + (f"; and {len(failures) - 1} more" if failures[1:] else ""))


def text(data: dict[str, Any]) -> str:
    """Everything for a terminal."""
    copy, floor = data["method"]["copy_gb_s"], data["method"]["launch_floor_us"]
    stopped = [] if data["complete"] else [tables.interrupted(data["roofline"], "points"), ""]
    lines = [*stopped, tables.roofline(data["roofline"], copy, aligned=True)]
    lines += [f"{name}: {why}" for name, why in data["skipped"].items()]
    lines.append(f"copy bandwidth {copy:.1f} GB/s, launch floor {floor:.2f} us")
    return "\n".join([*lines, describe(data["environment"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 2 with one line for bad input or a failure."""
    args = options.parser().parse_args(argv, argparse.Namespace(roofline=True))
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    data: dict[str, Any] = {}
    before = written(args.json)
    try:
        request = Request(args)
        if request.compile_only:
            compile_all(request, say=say)
            return 0
        try:
            run(data, request, say=say)
        finally:
            if data.get("roofline"):
                print(text(data))
        if request.plot is not None:
            from fastdiff_bench.page import write_report

            print(f"wrote {write_report(data, request.plot)}")
    except (Exception, KeyboardInterrupt) as error:
        return failed("bench", error, found=data.get("roofline"), path=args.json, before=before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
