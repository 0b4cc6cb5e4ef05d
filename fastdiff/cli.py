"""The command line: fastdiff demo | plan | sample | doctor."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import fastdiff as fd
from fastdiff.files import write_atomic
from fastdiff.grid import SPACINGS
from fastdiff.prediction import PREDICTIONS
from fastdiff.request import MODES

__all__ = ["main", "make_schedule", "schedule_names", "solver_names"]

BAD_INPUT = 2
MODEL_FAILED = 1
INTERRUPTED = 130
CHAIN_LENGTH = 1000


class UsageError(Exception):
    """Bad input: one line for stderr, exit code 2."""


class ModelError(Exception):
    """The user's own model raised."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def solver_names() -> list[str]:
    """The solvers the command line knows: fastdiff.solvers.__all__."""
    return list(fd.solvers.__all__)


def _schedule_makers() -> dict[str, Callable[..., Any]]:
    """Names of the command line -> makers: schedule classes in lower case, and the functions that give betas."""
    makers: dict[str, Callable[..., Any]] = {}
    for name in fd.schedules.__all__:
        thing = getattr(fd.schedules, name)
        if not inspect.isclass(thing):
            if "T" in inspect.signature(thing).parameters:
                makers[name] = thing
        elif issubclass(thing, fd.schedules.Schedule) and thing not in (fd.schedules.Schedule, fd.schedules.Betas):
            makers[name.lower()] = thing
    return makers


def schedule_names() -> list[str]:
    """The schedules the command line knows, made from fastdiff.schedules.__all__."""
    return sorted(_schedule_makers())


def _pick(kind: str, name: str, valid: Sequence[str]) -> str:
    if name not in valid:
        raise UsageError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")
    return name


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _assignments(kind: str, texts: Sequence[str], valid: Sequence[str]) -> dict[str, Any]:
    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{kind}: expected KEY=VALUE, got {text!r}")
        _pick(kind, name.strip(), valid)
        out[name.strip()] = _value(value.strip())
    return out


def make_schedule(text: str) -> fd.schedules.Schedule:
    """A schedule from NAME or NAME:KEY=VALUE,..., e.g. "vp:beta_max=12" or "linear_betas:T=100" (T defaults to 1000).

    Raises: UsageError for unknown names and keys; ValueError for values the schedule refuses.
    """
    makers = _schedule_makers()
    name, _, rest = text.partition(":")
    make = makers[_pick("schedule", name, sorted(makers))]
    parameters = inspect.signature(make).parameters
    given = _assignments(f"option of schedule {name}", [p for p in rest.split(",") if p], list(parameters))
    if not inspect.isclass(make):
        given.setdefault("T", CHAIN_LENGTH)
    lacking = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if lacking:
        raise UsageError(f"schedule {name} needs {', '.join(lacking)}: write {name}:{lacking[0]}=...")
    made = make(**given)
    return made if inspect.isclass(make) else fd.schedules.Betas(made)


def _make_plan(args: argparse.Namespace) -> fd.Plan:
    schedule = make_schedule(args.schedule)
    solve = getattr(fd.solvers, _pick("solver", args.solver, solver_names()))
    own = [n for n, p in inspect.signature(solve).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options = _assignments(
        f"option of solver {args.solver}",
        args.set,
        [*own, "t_start", "t_end", "sign", "sigma_data", "rho", "steps_offset", "sigmas"],
    )
    for name in ("prediction", "spacing", "final", "clip", "start"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return solve(schedule, args.steps, **options)


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LO,HI, got {text!r}") from None
    return low, high


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers B,N,..., got {text!r}") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"every size must be >= 1, got {text!r}")
    return shape


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no torch device; write cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not here: {torch.cuda.device_count()} CUDA devices were found")
    return device


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False, default=str))


def _numbers(array: np.ndarray) -> Any:
    """A list for JSON, which has no infinity: an open clamp is null."""
    return np.where(np.isfinite(array), array.astype(object), None).tolist()  # type: ignore[call-overload]


def run_plan(args: argparse.Namespace) -> int:
    """fastdiff plan."""
    plan = _make_plan(args)
    if not args.json:
        print(plan)
        return 0
    columns = ("times", "t", "alpha", "sigma", "c_in", "c_skip", "c_out", "lo", "hi", "A", "b", "d", "s", "draws")
    content: dict[str, Any] = {"name": plan.name, "nfe": plan.nfe, "slots": plan.slots, "stochastic": plan.stochastic}
    content |= {"readout": plan.readout, "classes": plan.classes, "last_readout": plan.last_readout}
    content |= {"init_scale": plan.init_scale, "init_noise": plan.init_noise, "end": plan.end}
    content |= {"bytes_per_element": plan.bytes_per_element().tolist(), "entry_rows": plan.entry_rows}
    _print_json(content | {name: _numbers(getattr(plan, name)) for name in columns})
    return 0


def _load_model(text: str) -> Callable[..., Any]:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"--model must be path.py:function, got {text!r}")
    path = Path(where)
    if not path.is_file():
        raise UsageError(f"--model: there is no file {where!r}")
    spec = importlib.util.spec_from_file_location(f"_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--model: {where!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--model: cannot import {where!r}: {type(error).__name__}: {error}") from error
    model = getattr(module, name, None)
    if not callable(model):
        callables = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(f"--model: {where!r} has no callable {name!r}; it has: {', '.join(callables) or 'none'}")
    return model


def _guarded(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, whose own exceptions are told apart from bad input."""

    def call(x: torch.Tensor, t: torch.Tensor) -> Any:
        try:
            return model(x, t)
        except Exception as error:
            raise ModelError from error

    return call


def run_sample(args: argparse.Namespace) -> int:
    """fastdiff sample."""
    out = Path(args.out)
    if out.suffix != ".npy":
        raise UsageError(f"--out must end in .npy, got {args.out!r}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out: {str(out.parent)!r} is not a folder that can be written")
    plan = _make_plan(args)
    model = _load_model(args.model)
    if isinstance(model, torch.nn.Module):
        model = model.to(args.device).eval()
    began = time.perf_counter()
    with torch.no_grad():
        x = fd.sample(
            _guarded(model) if args.mode == "eager" else model, plan, args.shape, seed=args.seed, first=args.first,
            mode=args.mode, device=args.device, progress=not args.json and sys.stderr.isatty(), check_finite="warn",
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
        _print_json(summary)
    else:
        print(f"{out}: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, {plan.name}, {plan.nfe} evaluations, {seconds:.2f} s")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """fastdiff doctor."""
    from fastdiff.doctor import examine

    found = examine()
    if args.json:
        _print_json([asdict(f) for f in found])
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
        _print_json(content)
    else:
        print(f"wrote {args.out}/demo.json and {len(content['pictures'])} pictures in {content['seconds']:.0f} s")
    if content["missed"]:
        print(f"fastdiff demo: error: targets missed: {'; '.join(content['missed'])}", file=sys.stderr)
        return 1
    return 0


def _add_plan_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    names = ", ".join(schedule_names())
    schedule = names if required else f"{names}; default vp"
    steps = "intervals of the grid" if required else "intervals of the grid; default 10"
    parser.add_argument("--schedule", required=required, default="vp", metavar="NAME[:KEY=VALUE,...]", help=schedule)
    parser.add_argument("--steps", required=required, default=10, type=int, help=steps)
    parser.add_argument("--prediction", choices=sorted(PREDICTIONS), help="what the model returns; default eps")
    parser.add_argument("--spacing", choices=SPACINGS, help="where the model is evaluated; default: the schedule's own")
    parser.add_argument("--final", choices=("zero", "min"), help="end clean (zero, the default) or at the last time")
    parser.add_argument("--clip", type=_pair, metavar="LO,HI", help="clamp of the predicted x0")
    parser.add_argument("--start", type=int, help="skip this many intervals (image-to-image)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the solver")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(prog="fastdiff", description="Diffusion samplers as tables, run by one fused kernel a step.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on real data, sample by every solver, write pictures")
    demo.add_argument("--out", default="demo_out", metavar="DIR", help="folder of the results; default %(default)s")
    demo.add_argument("--only", metavar="PART,...", help="parts to run: schedules, spiral, digits; default all")
    demo.add_argument("--seed", type=int, default=0, help="seed of training and sampling; default 0")
    demo.set_defaults(run=run_demo)

    plan = commands.add_parser("plan", help="print a solver's table", description="Print a solver's table.")
    plan.add_argument("solver", metavar="NAME", help=", ".join(solver_names()))
    _add_plan_options(plan, required=False)
    plan.set_defaults(run=run_plan)

    sample = commands.add_parser("sample", help="sample a model of your own", description="Sample your own model.")
    sample.add_argument("--model", required=True, metavar="FILE.py:NAME", help="a callable model(x, t) -> Tensor")
    sample.add_argument("--solver", required=True, metavar="NAME", help=", ".join(solver_names()))
    _add_plan_options(sample, required=True)
    sample.add_argument("--shape", required=True, type=_shape, metavar="B,N,...", help="shape of the samples")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise; default 0")
    sample.add_argument("--first", type=int, default=0, help="index of the first sample; default 0")
    sample.add_argument("--mode", choices=MODES, default="eager", help="how to run; default %(default)s")
    sample.add_argument("--device", type=_device, default="cpu", help="torch device; default %(default)s")
    sample.add_argument("--out", required=True, metavar="FILE.npy", help="where to write the samples")
    sample.set_defaults(run=run_sample)

    doctor = commands.add_parser("doctor", help="what this installation has", description="Look at the installation.")
    doctor.set_defaults(run=run_doctor)
    for command in (demo, plan, sample, doctor):
        command.add_argument("--json", action="store_true", help="report as JSON on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args: argv: arguments without the program's name; default sys.argv.
    Returns: 0; 1 where the user's model raised or a demo target is missed; 2 for bad input, with one line on stderr.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.run(args)
    except ModelError as error:
        traceback.print_exception(error.__cause__)
        return MODEL_FAILED
    except (UsageError, ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"fastdiff {args.command}: error: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
