"""The options of `fastdiff bench`, and the check of everything they name before anything is measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.commands.options import device, writable
from fastdiff.names import pick
from fastdiff_bench import cases
from fastdiff_bench.cases import COLUMNS, GPU_PEERS, KERNELS, PEERS
from fastdiff_bench.compare import compare, comparison_text
from fastdiff_bench.networks import NETWORKS

__all__ = ["Request", "add_options", "as_arguments", "parser"]


NO_MODEL = "returns a fixed tensor"
SMALLEST, LARGEST = 10, 30  # log2 of a roofline's elements
MODES = ("roofline", "codegen")  # beside the main table
LOOPS = ("schedules", "solvers", "shapes", "steps", "model", "compare")
NOT_READ = {
    "": ("kernels", "largest", "sizes"),
    "roofline": LOOPS,
    "codegen": (*LOOPS, "largest", "sizes", "dtype", "peers", "device", "no_compile", "compile_only", "plot"),
}


class Request:
    """A checked request; ValueError or UsageError says what is wrong with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        _check_read(args)
        self.quick, self.device = args.quick, args.device
        known = [p for p in PEERS if self.device.type == "cuda" or p not in GPU_PEERS]
        peers = known if args.peers is None else [pick("peer", p, known) for p in _listed(args.peers)]
        self.columns = tuple(c for c in COLUMNS if c.startswith("fastdiff") or c in peers)
        if args.no_compile:
            if args.peers is not None and (off := [p for p in peers if "compile" in p or p in GPU_PEERS]):
                raise ValueError(f"--no-compile leaves out {', '.join(off)}, which --peers names")
            self.columns = tuple(c for c in self.columns if "compile" not in c and c not in GPU_PEERS)
        self.dtypes = {name: cases.dtype_of(name) for name in _listed(args.dtype)}
        given = _listed(args.shapes) if args.shapes else []
        self.shapes = [cases.parse_shape(text) for text in given]
        self.schedules, self.solvers = _listed(args.schedules), _listed(args.solvers)
        self.steps = cases.STEPS if args.steps is None else args.steps
        if self.steps < 1:
            raise ValueError(f"--steps must be >= 1, got {self.steps}")
        self.network = NETWORKS.get(args.model) if args.model else None
        if self.network is not None and not (self.schedules or self.solvers):
            net = self.network
            self.schedules, self.solvers = [net.schedule], [net.solver]
            self.steps = net.steps if args.steps is None else args.steps
        asked = list(cases.make_cases(self.schedules, self.solvers, quick=args.quick, steps=self.steps))
        self.cases = [c for c in asked if isinstance(c, cases.Case)]
        self.refused = [c for c in asked if isinstance(c, cases.Refused)]
        if not self.cases:
            reasons = "; ".join(r.why for r in self.refused) or "none of these solvers is benchmarked with it"
            raise ValueError(f"no case is left to run: {reasons}")
        default = 28 if self.device.type == "cuda" else 24
        self.largest = default if args.largest is None else args.largest
        self.asked_largest = args.largest is not None
        if not SMALLEST <= self.largest <= LARGEST:
            raise ValueError(f"--largest must be in {SMALLEST} .. {LARGEST}, got {self.largest}")
        self.sizes = sorted(set(args.sizes or []))
        if self.sizes and self.asked_largest:
            raise ValueError("--sizes says the largest: leave --largest out")
        if outside := [n for n in self.sizes if not SMALLEST <= n <= LARGEST]:
            raise ValueError(f"--sizes must be in {SMALLEST} .. {LARGEST}, got {outside[0]}")
        self.kernels = [pick("kernel", name, KERNELS) for name in _listed(args.kernels)] or list(KERNELS)
        self.model_text, self.compile_only = args.model, args.compile_only
        self.stored = self._stored(args) if args.compare else None
        self.json, self.plot = writable("--json", args.json), _folder("--plot", args.plot)

    def _stored(self, args: argparse.Namespace) -> dict[str, Any]:
        """The stored results; ValueError where what they measured is not what is asked for."""
        data = _stored(args.compare)
        then = data["method"] | {"device": str(data["method"].get("device")).partition(":")[0]}
        now = {"model": self.model_text or NO_MODEL, "device": self.device.type, "steps": self.steps}
        for name, value in now.items():
            if then.get(name) != value:
                raise ValueError(f"--compare: {args.compare!r} is of {name} {then.get(name)!r}, this run of {value!r}")
        return data

    def work(self) -> list[tuple[cases.Case, tuple[int, ...], str]]:
        """What to measure: every case at the first shape, the quick ones at the others."""
        if self.network is not None and not self.shapes:
            return [(case, self.network.shape, dtype) for case in self.cases for dtype in self.dtypes]
        shapes = self.shapes or ([cases.SHAPES["latent"]] if self.quick else [*cases.SHAPES.values()])
        main = shapes if self.shapes else [cases.SHAPES["latent"]]
        few = {(s, n) for s, names in cases.QUICK.items() for n in names}
        out = []
        for shape in shapes:
            for case in self.cases:
                discrete = case.kind in cases.DISCRETE
                if shape not in main and ((case.schedule, case.solver) not in few or discrete):
                    continue
                size = cases.TEXT if discrete and not self.shapes else shape
                out += [(case, size, dtype) for dtype in self.dtypes]
        return out


def _listed(text: str | Sequence[str] | None) -> list[str]:
    """Names separated by spaces or commas; a schedule's own options keep their commas: "edm:sigma_min=1,rho=3"."""
    words = text.split() if isinstance(text, str) else list(text or [])
    out: list[str] = []
    for word in words:
        for part in word.split(","):
            if out and "=" in part and ":" not in part:
                out[-1] += f",{part}"
            elif part:
                out.append(part)
    return out


def _given(value: object, default: object) -> bool:
    """Is an option's value another than its default? As text: a default is not parsed."""
    return value is not None and str(value) != str(default)


def _check_read(args: argparse.Namespace) -> None:
    """Refuses options that nothing would read: two modes, or what the one asked for takes no notice of."""
    modes = [mode for mode in MODES if getattr(args, mode)]
    if len(modes) > 1:
        raise ValueError("--roofline and --codegen are two runs: leave one of them out")
    mode = "".join(modes)
    known = parser()
    unread = (*NOT_READ[mode], *(("json", "plot", "compare") if args.compile_only else ()))
    given = [name for name in unread if _given(getattr(args, name), known.get_default(name))]
    if given:
        which = (
            "--compile-only"
            if args.compile_only and given[0] in ("json", "plot", "compare")
            else f"--{mode}"
            if mode
            else "the main table"
        )
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{which} does not read {names}: leave {'it' if len(given) == 1 else 'them'} out")


def _folder(option: str, text: str | None) -> Path | None:
    if text is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option}: pictures need matplotlib: pip install 'fastdiff-samplers[bench]'")
    path = writable(option, str(Path(text, "report.html")))
    return path and path.parent


def _stored(text: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(text).read_text())
    except OSError as error:
        raise ValueError(f"--compare: {text!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--compare: {text!r} is not JSON: {error}") from None
    found = data if isinstance(data, dict) else {}
    rows = found.get("rows")
    needed = {"us", "schedule", "solver", "shape", "dtype", "steps"}
    whole = all(isinstance(found.get(name), dict) for name in ("environment", "method"))
    if not whole or not isinstance(rows, list) or not all(isinstance(r, dict) and needed <= set(r) for r in rows):
        raise ValueError(f"--compare: {text!r} is not a result of fastdiff bench")
    if not rows:
        raise ValueError(f"--compare: {text!r} has no rows of the main table")
    try:
        comparison_text(compare(found, found))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise ValueError(f"--compare: {text!r} is not a result of fastdiff bench, or a damaged one") from None
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the main table."""
    parser.add_argument("--roofline", action="store_true", help="us against elements, with the floors, of each kernel")
    parser.add_argument(
        "--largest", type=int, metavar="N", help="of --roofline: to 2^N elements; 24 on a CPU, 28 on a GPU"
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="of --roofline: these alone, 2^N elements")
    parser.add_argument("--codegen", action="store_true", help="what the kernels compile to; no GPU is needed")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help=f"of --roofline, --codegen: {', '.join(KERNELS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rows, one shape, shorter: under 2 minutes")
    parser.add_argument("--schedules", nargs="+", metavar="NAME", help=f"default: a list; {cases.schedules_text()}")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="default: a list; names as in `fastdiff plan`")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="policy, latent, batch, or 16x4x128x128")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], metavar="DTYPE", help="of the model: fp32, bf16, fp16")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help=f"who to compare with: {', '.join(PEERS)}; default all there are here",
    )
    parser.add_argument("--steps", type=int, help=f"intervals of a loop; default {cases.STEPS}, or the network's own")
    parser.add_argument("--model", metavar="FILE.py:NAME", help=f"your model(x, t), or {', '.join(NETWORKS)}")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=here, help="default %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out what a compiler must run for")
    parser.add_argument(
        "--compile-only", action="store_true", help="measure nothing: fill the compilers' caches on disk for a run"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, row by row")
    parser.add_argument("--compare", metavar="FILE", help="flag what is slower than in these stored results")
    parser.add_argument("--plot", metavar="DIR", help="write PNGs and report.html here")


def parser() -> argparse.ArgumentParser:
    """The same options outside the command line of fastdiff."""
    out = argparse.ArgumentParser(prog="fastdiff bench", description="What a step costs, beside what others cost.")
    add_options(out)
    return out


def as_arguments(args: argparse.Namespace) -> list[str]:
    """Parsed options as the arguments that give them, for another process."""
    out: list[str] = []
    for action in parser()._actions:
        value = getattr(args, action.dest, None)
        if value is False or not _given(value, action.default):
            continue
        out.append(action.option_strings[0])
        out += [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return out
