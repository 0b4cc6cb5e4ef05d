"""The command line: fastdiff demo | plan | sample | bench | profile | doctor."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

import fastdiff as fd
from fastdiff.commands.bench import add_bench
from fastdiff.commands.options import (
    BAD_INPUT,
    MODEL_FAILED,
    ModelError,
    UsageError,
    add_plan_options,
    device,
    dtype_of,
    failed,
    guarded,
    load_model,
    make_plan,
    make_schedule,
    print_json,
    schedule_names,
    shape,
    solver_names,
)
from fastdiff.commands.plan import add_plan
from fastdiff.commands.profile import add_profile
from fastdiff.demo import PARTS
from fastdiff.files import write_atomic
from fastdiff.request import MODES

__all__ = ["main", "make_schedule", "schedule_names", "solver_names"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def run_sample(args: argparse.Namespace) -> int:
    """fastdiff sample."""
    out = Path(args.out)
    if out.suffix != ".npy":
        raise UsageError(f"--out must end in .npy, got {args.out!r}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out: {str(out.parent)!r} is not a folder that can be written")
    if args.start or any(text.partition("=")[0].strip() == "start" for text in args.set):
        raise UsageError("start=k noises data of yours to the plan's start, and sample has none: leave out --start")
    plan = make_plan(args)
    model = load_model(args.model)
    if isinstance(model, torch.nn.Module):
        model = model.to(args.device).eval()
    began = time.perf_counter()
    with torch.no_grad():
        x = fd.sample(
            model if args.mode == "compile" else guarded(model), plan, args.shape, seed=args.seed, first=args.first,
            mode=args.mode, device=args.device, dtype=dtype_of(model), check_finite="warn",
            progress=not args.json and sys.stderr.isatty(),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    buffer = io.BytesIO()
    np.save(buffer, x.cpu().numpy())
    write_atomic(out, buffer.getvalue())
    summary = {
        "out": str(out), "shape": list(x.shape), "plan": plan.name, "evaluations": plan.nfe, "seed": args.seed,
        "first": args.first, "seconds": round(seconds, 3), "finite": bool(torch.isfinite(x).all()),
    }  # fmt: skip
    if args.json:
        print_json(summary)
    else:
        what = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        print(f"{out}: {what}, {plan.name}, {plan.nfe} evaluations, {seconds:.2f} s")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """fastdiff doctor."""
    from fastdiff.doctor import examine

    found = examine()
    if args.json:
        print_json([asdict(f) for f in found])
        return 0
    name, value = (max(len(getattr(f, key)) for f in found) for key in ("name", "value"))
    for f in found:
        print(f"{'yes' if f.ok else 'no ':3}  {f.name:{name}}  {f.value:{value}}  {f.meaning}".rstrip())
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """fastdiff demo; exit code 1 where a quality target is missed."""
    from fastdiff import demo

    only = list(demo.PARTS) if args.only is None else args.only.split(",")
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    try:
        content = demo.run_demo(args.out, only=only, seed=args.seed, say=say)
    except demo.MissingExtraError as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json(content)
    else:
        print(f"wrote {args.out}/demo.json and {len(content['pictures'])} pictures in {content['seconds']:.0f} s")
    if content["missed"]:
        print(f"fastdiff demo: error: targets missed: {'; '.join(content['missed'])}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(prog="fastdiff", description="Diffusion samplers as tables, run by one fused kernel a step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on real data, sample by every solver, write pictures")
    demo.add_argument("--out", default="demo_out", metavar="DIR", help="folder of the results; default %(default)s")
    demo.add_argument("--only", metavar="PART,...", help=f"parts to run: {', '.join(PARTS)}; default all")
    demo.add_argument("--seed", type=int, default=0, help="seed of training and sampling; default 0")
    demo.set_defaults(run=run_demo)

    add_plan(commands)
    sample = commands.add_parser("sample", help="sample a model of your own", description="Sample your own model.")
    sample.add_argument("--model", required=True, metavar="FILE.py:NAME", help="a callable model(x, t) -> Tensor")
    sample.add_argument("--solver", required=True, metavar="NAME", help=", ".join(solver_names()))
    add_plan_options(sample, required=True)
    sample.add_argument("--shape", required=True, type=shape, metavar="B,N,...", help="shape of the samples")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise; default 0")
    sample.add_argument("--first", type=int, default=0, help="index of the first sample; default 0")
    sample.add_argument("--mode", choices=MODES, default="eager", help="how to run; default %(default)s")
    sample.add_argument("--device", type=device, default="cpu", help="torch device; default %(default)s")
    sample.add_argument("--out", required=True, metavar="FILE.npy", help="where to write the samples")
    sample.set_defaults(run=run_sample)

    doctor = commands.add_parser("doctor", help="what this installation has", description="Look at the installation.")
    doctor.set_defaults(run=run_doctor)
    add_bench(commands)
    add_profile(commands)
    for command in (demo, sample, doctor):
        command.add_argument("--json", action="store_true", help="report as JSON on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args: argv: arguments without the program's name; default sys.argv.
    Returns: 0; 1 where the user's model raised or a demo target is missed; 2 for bad input, with one line on stderr.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for at in [at for at, text in enumerate(given[:-1]) if text == "--clip"][::-1]:
        given[at : at + 2] = [f"--clip={given[at + 1]}"]  # argparse takes -1,1 for an option
    try:
        args = build_parser().parse_args(given)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except ModelError as error:
        traceback.print_exception(error.__cause__)
        return MODEL_FAILED
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, ValueError, TypeError, OSError, OverflowError, MemoryError, KeyboardInterrupt) as error:
        return failed(args.command, error)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch's allocators have no class of their own on a CPU
            raise
        return failed(args.command, error)
