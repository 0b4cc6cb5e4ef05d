"""fastdiff plan: a solver's table or a schedule's levels, printed and drawn."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import fastdiff as fd
from fastdiff.commands.options import UsageError, add_plan_options, make_plan, numbers, print_json, writable
from fastdiff.names import make_schedule, schedule_names, solver_names

__all__ = ["add_plan", "run_plan"]

COLUMNS = ("times", "t", "alpha", "sigma", "c_in", "c_skip", "c_out", "lo", "hi", "A", "b", "d", "s", "draws")
LEVELS = ("alpha", "sigma", "logsnr", "masked", "weight")  # of a schedule; the last two of tokens
OF_SOLVERS = ("prediction", "spacing", "final", "clip", "start", "set")


def add_plan(commands: Any) -> None:  # noqa: ANN401 - argparse's own type is private
    """The parser of the command."""
    about = "Print a solver's table, or a schedule's alpha, sigma and log-SNR over time."
    plan = commands.add_parser("plan", help="print a solver's table or a schedule", description=about)
    names = f"a solver: {', '.join(solver_names())}; or a schedule, written as for --schedule"
    plan.add_argument("solver", metavar="NAME", help=names)
    add_plan_options(plan, required=False)
    plan.add_argument("--plot", metavar="FILE.png", help="draw it too: noise levels, coefficients, times")
    plan.add_argument("--json", action="store_true", help="report as JSON on stdout")
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """fastdiff plan."""
    is_schedule = args.solver.partition(":")[0] in schedule_names()
    found = _schedule(args) if is_schedule else make_plan(args)
    path = writable("--plot", args.plot)
    if path is not None:
        from fastdiff_bench.plan_plot import plot_plan, plot_schedule

        plot_plan(found, path) if isinstance(found, fd.Plan) else plot_schedule(found, path)
    if isinstance(found, fd.Plan):
        print_json(_content(found)) if args.json else print(found)
        return 0
    t = np.linspace(found.t_max, 0.0, args.steps + 1)
    levels = [name for name in LEVELS if hasattr(found, name)]
    columns = {"t": t, **{name: getattr(found, name)(t) for name in levels}}
    if args.json:
        print_json({"name": str(found), **{name: numbers(values) for name, values in columns.items()}})
        return 0
    print(found, "".join(f"{name:>10}" for name in columns), sep="\n")
    for row in zip(*columns.values(), strict=True):
        print("".join(f"{value:10.4g}" for value in row))
    return 0


def _schedule(args: argparse.Namespace) -> fd.schedules.Schedule:
    given = [f"--{name}" for name in OF_SOLVERS if getattr(args, name)]
    given += ["--schedule"] if args.schedule != "vp" else []
    if given:
        raise UsageError(f"{args.solver!r} is a schedule, which has no {', '.join(given)}: leave out what solvers read")
    if args.steps < 1:
        raise UsageError(f"--steps must be >= 1, got {args.steps}")
    return make_schedule(args.solver)


def _content(plan: fd.Plan) -> dict[str, Any]:
    content: dict[str, Any] = {"name": plan.name, "nfe": plan.nfe, "slots": plan.slots, "stochastic": plan.stochastic}
    content |= {"readout": plan.readout, "classes": plan.classes, "last_readout": plan.last_readout}
    content |= {"init_scale": plan.init_scale, "init_noise": plan.init_noise, "end": plan.end}
    content |= {"bytes_per_element": plan.bytes_per_element().tolist(), "entry_rows": plan.entry_rows}
    return content | {name: numbers(getattr(plan, name)) for name in COLUMNS}
