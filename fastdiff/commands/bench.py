"""fastdiff bench: checks the request, then measures in a process of its own."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from typing import Any

from fastdiff.commands.options import INTERRUPTED, failed, written

__all__ = ["add_bench", "run_bench"]

# a case of codegen where it is not the kernel's own name
COMPILED_AS = {"binned_mean": "binned/mean", "add_noise_flow": "levels/Flow"}
QUICK_TARGETS = ("--arch", "90")
TARGETS = ("--arch", "80", "89", "90", "100", "--hip", "gfx942")

GRACE = 10.0  # seconds for a process that was told by the terminal to keep what it has


def add_bench(commands: Any) -> None:  # noqa: ANN401 - argparse's own type is private
    """The parser of the command."""
    from fastdiff_bench.options import add_options

    about = "What a step costs across schedules and solvers, beside what others cost (see bench/README.md)."
    bench = commands.add_parser("bench", help="what a step costs, beside what others cost", description=about)
    add_options(bench)
    bench.set_defaults(run=run_bench)


def measuring(*, large: bool = False) -> dict[str, str]:
    """For a measuring process: glibc's thresholds, no interpreter, no profiler chatter, the packages of this one."""
    from fastdiff_bench.timing import with_malloc

    env = with_malloc(os.environ, large=large)
    env.pop("TRITON_INTERPRET", None)
    env["KINETO_LOG_LEVEL"] = "99"
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return env


def run_bench(args: argparse.Namespace) -> int:
    """Bad input ends here, in a second; else the exit code is the measurement's."""
    from fastdiff_bench.options import Request, as_arguments

    request = Request(args)
    if args.codegen:
        command = ["fastdiff_bench.codegen", *(QUICK_TARGETS if args.quick else TARGETS)]
        only = dict.fromkeys(COMPILED_AS.get(name, name) for name in request.kernels)
        command += ["--only", *only] if args.kernels else []
        command += ["--json", args.json] if args.json else []
    else:
        command = ["fastdiff_bench.roofline" if args.roofline else "fastdiff_bench.suite", *as_arguments(args)]
    before_it = written(args.json)
    process = subprocess.Popen([sys.executable, "-m", *command], env=measuring(large=args.roofline))
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))  # it keeps what it has
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(GRACE)  # a terminal has told it too
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if code < 0:
        now = written(args.json)
        kept = f"; what was measured before is in {args.json}" if now and now != before_it else ""
        return failed("bench", ValueError(f"the measuring process was ended by signal {-code} (no memory?){kept}"))
    return code
