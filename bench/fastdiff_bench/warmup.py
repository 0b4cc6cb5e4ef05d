"""Fills the compiler's cache with what a run will need, on every core, before its clock starts.

    python -m fastdiff_bench.warmup I N ...        (every N-th row from row I, with the options of the run)

The measuring process compiles one row after another; on a machine that has compiled none of them that is most of a
quick run. Its processes share what they compile through Inductor's cache on the disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from fastdiff_bench import options
from fastdiff_bench.options import Request
from fastdiff_bench.throughput import Settings, ready

__all__ = ["main", "warm", "worth_warming"]

FEW = 4  # rows that are compiled sooner than processes start
KEPT = ("--json", "--compare", "--plot")  # of the measuring process alone


def worth_warming(request: Request) -> bool:
    """On a CPU with several rows that compile and no model of the user's, which would be called behind his back."""
    compiles = any("compile" in column for column in request.columns)
    cpu, cores = request.device.type == "cpu", os.cpu_count() or 1
    return cpu and compiles and request.model_text is None and cores > 1 and len(request.work()) >= FEW


def warm(arguments: Sequence[str], workers: int | None = None) -> int:
    """Runs the workers to their end; how many failed (the run itself will say why)."""
    given = list(arguments)
    for option in KEPT:
        if option in given:
            del given[given.index(option) : given.index(option) + 2]
    count = workers or os.cpu_count() or 1
    command = [sys.executable, "-m", "fastdiff_bench.warmup"]
    quiet = subprocess.DEVNULL
    running = [
        subprocess.Popen([*command, str(i), str(count), *given], stdout=quiet, stderr=quiet) for i in range(count)
    ]
    try:
        return sum(process.wait() != 0 for process in running)
    finally:
        for process in running:
            process.terminate()


def main(argv: Sequence[str] | None = None) -> int:
    """Makes every N-th row ready: compiles, compares, runs each column once."""
    first, count, *rest = sys.argv[1:] if argv is None else argv
    request = Request(options.parser().parse_args(rest))
    set_ = Settings(request.device, request.columns)
    for case, shape, dtype in request.work()[int(first) :: int(count)]:
        plan = case.plan()
        ready(case, plan, case.state_shape(plan, shape), dtype, request.dtypes[dtype], set_)
    return 0


if __name__ == "__main__":
    sys.exit(main())
