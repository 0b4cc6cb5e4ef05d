"""What the commands share: plans, devices and files from text, and what becomes of an error."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdiff as fd
from fastdiff.grid import SPACINGS, GridOptions
from fastdiff.names import assignments, check_types, load_model, make_schedule, pick, schedule_names, solver_names
from fastdiff.prediction import PREDICTIONS

__all__ = [
    "BAD_INPUT",
    "INTERRUPTED",
    "MODEL_FAILED",
    "ModelError",
    "UsageError",
    "add_plan_options",
    "device",
    "dtype_of",
    "failed",
    "guarded",
    "load_model",
    "make_plan",
    "make_schedule",
    "numbers",
    "one_line",
    "pick",
    "print_json",
    "schedule_names",
    "shape",
    "solver_names",
    "writable",
    "written",
]

BAD_INPUT = 2
MODEL_FAILED = 1
INTERRUPTED = 130


class UsageError(argparse.ArgumentTypeError):
    """Bad input: one line for stderr, exit code 2."""


class ModelError(Exception):
    """The user's own model raised."""


def one_line(error: BaseException) -> str:
    """An exception's type and message, folded into one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


def failed(command: str, error: BaseException, *, found: Sequence[Any] | None = None, path: str | None = None,
           before: tuple[int, int] | None = None) -> int:  # fmt: skip
    """Says on stderr, in one line, what ended a command, and where what it had found is kept.

    Args: before: what `written` said of the path when the command began.
    Returns: the exit code: 130 for an interruption, else 2 (not Python's 1, which commands have other uses for).
    """
    line = f"error: {one_line(error)}"
    if isinstance(error, KeyboardInterrupt):
        line = "interrupted"
    elif isinstance(error, ModelError):
        line = f"error: the model failed: {' '.join(str(error).split())}"
    elif isinstance(error, (UsageError, ValueError, TypeError, OSError)) and str(error):
        line = f"error: {' '.join(str(error).split())}"
    kept = f"; what was measured before is in {path}" if found and written(path) not in (None, before) else ""
    print(f"fastdiff {command}: {line}{kept}", file=sys.stderr)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else BAD_INPUT


def make_plan(args: argparse.Namespace) -> fd.Plan:
    schedule = make_schedule(args.schedule)
    solve = getattr(fd.solvers, pick("solver", args.solver, solver_names()))
    own = {n: p.annotation for n, p in inspect.signature(solve).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options = assignments(
        f"option of solver {args.solver}",
        args.set,
        [*own, "t_start", "t_end", "sign", "sigma_data", "rho", "steps_offset", "sigmas"],
    )
    check_types(f"solver {args.solver}", options, {**GridOptions.__annotations__, **own})
    for name in ("prediction", "spacing", "final", "clip", "start"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return solve(schedule, args.steps, **options)


def pair(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LO,HI, got {text!r}") from None
    return low, high


def shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers B,N,..., got {text!r}") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"every size must be >= 1, got {text!r}")
    return shape


def device(text: str) -> torch.device:
    """A CPU, or a CUDA device that is here."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{text!r} is no device to run on; write cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{text!r} is not here: {torch.cuda.device_count()} CUDA devices were found")
    return device


def writable(option: str, text: str | None) -> Path | None:
    """The path of a file that can be written, its folder made; a file that is there stays as it is."""
    if not text:
        return None
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"{option}: {text!r} cannot be written: {error.strerror or error}") from None
    if path.is_dir():
        raise UsageError(f"{option}: {text!r} is a folder")
    return path


def written(text: str | None) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it; None where there is none."""
    if not text or not Path(text).exists():
        return None
    found = Path(text).stat()
    return found.st_ino, found.st_mtime_ns


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False, default=str))


def numbers(array: np.ndarray) -> Any:
    """A list for JSON, which has no infinity: an open clamp is null."""
    return np.where(np.isfinite(array), array.astype(object), None).tolist()  # type: ignore[call-overload]


def dtype_of(model: Callable[..., Any]) -> torch.dtype | None:
    """A network's dtype, which nobody sees behind a guard; None of other callables."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def guarded(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, whose own exceptions become a ModelError; those of torch's compiler stay what they are."""

    def call(x: torch.Tensor, t: torch.Tensor) -> Any:
        try:
            return model(x, t)
        except (Exception, SystemExit) as error:
            if isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise ModelError(one_line(error)) from error

    return call


def add_plan_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    names = ", ".join(schedule_names())
    schedule = names if required else f"{names}; default vp"
    steps = "intervals of the grid" if required else "intervals of the grid; default 10"
    parser.add_argument("--schedule", required=required, default="vp", metavar="NAME[:KEY=VALUE,...]", help=schedule)
    parser.add_argument("--steps", required=required, default=10, type=int, help=steps)
    parser.add_argument("--prediction", choices=sorted(PREDICTIONS), help="what the model returns; default eps")
    parser.add_argument("--spacing", choices=SPACINGS, help="where the model is evaluated; default: the schedule's own")
    parser.add_argument("--final", choices=("zero", "min"), help="end clean (zero, the default) or at the last time")
    parser.add_argument("--clip", type=pair, metavar="LO,HI", help="clamp of the predicted x0")
    parser.add_argument("--start", type=int, help="skip this many intervals (image-to-image)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the solver")
