"""What it takes to get a plan: building every solver's of 50 rows, and reading 50 steps of diffusers' schedulers back.

    python -m fastdiff_bench.plans [--json FILE]

Medians and worst values of 9 builds or probes, each from nothing: no cache of plans is used.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import fastdiff as fd
from fastdiff import schedules, solvers
from fastdiff.commands.options import writable
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.single import save

__all__ = ["main"]

STEPS, REPEATS = 50, 9
ASKED = {"build": 5.0, "probe": 150.0, "probe, clamp": 300.0}  # ms
SLOW = ("LMSDiscreteScheduler", "SASolverScheduler")  # no target: the stock code itself takes that long
# a schedule other than the chain of betas, or options that have no default
OTHERWISE: dict[str, tuple[schedules.Schedule, dict[str, Any]]] = {
    "ancestral": (schedules.VE(0.01, 50.0), {}),
    "euler_maruyama": (schedules.VP(), {}),
    "langevin": (schedules.VE(0.01, 50.0), {}),
    "probability_flow": (schedules.VP(), {}),
    "reverse_diffusion": (schedules.VE(0.01, 50.0), {}),
    "bfn_continuous": (schedules.BFNContinuous(0.001), {}),
    "bfn_discretised": (schedules.BFNContinuous(0.001), {"bins": 16}),
    "bfn_discrete": (schedules.BFNDiscrete(3.0, 27), {}),
    "bfn_solver": (schedules.BFNContinuous(0.001), {}),
}


def _ms(make: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        make()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _row(kind: str, name: str, times: list[float], asked: float | None) -> dict[str, Any]:
    ms = statistics.median(times)
    missed = asked is not None and ms > asked
    return {"kind": kind, "name": name, "ms": ms, "worst_ms": max(times), "asked_ms": asked, "missed": missed}


def builds() -> list[dict[str, Any]]:
    """Every solver's plan of 50 intervals."""
    chain, rows = schedules.Betas(schedules.scaled_linear_betas(1000)), []
    for name in solvers.__all__:
        schedule, options = OTHERWISE.get(name, (chain, {}))
        make = partial(getattr(solvers, name), schedule, STEPS, **options)
        rows.append(_row("build", name, _ms(make), ASKED["build"]))
    return rows


def probes() -> list[dict[str, Any]]:
    """Every scheduler of diffusers that makes a plan, as it comes; with a clamp where it has one by default."""
    try:
        import diffusers
    except ModuleNotFoundError:
        print("probes skipped: diffusers is not installed: pip install diffusers", file=sys.stderr)
        return []
    diffusers.utils.logging.set_verbosity_error()
    rows, cache = [], importlib.import_module("fastdiff.probe")._cache
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        try:
            scheduler = getattr(diffusers, name)()
            plan = fd.probe(scheduler, steps=STEPS)
        except Exception:  # one that is not a plan, or needs arguments: docs/probe.md
            continue

        def read(scheduler: Any = scheduler) -> None:
            cache.clear()
            fd.probe(scheduler, steps=STEPS)

        kind = "probe, clamp" if plan.clamped else "probe"
        rows.append(_row(kind, name, _ms(read), None if name in SLOW else ASKED[kind]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | of | median ms | worst ms | asked |", "|---|---|---|---|---|"]
    for r in rows:
        asked = "-" if r["asked_ms"] is None else f"{r['asked_ms']:g}{' (missed)' if r['missed'] else ''}"
        lines.append(f"| {r['kind']} | {r['name']} | {r['ms']:.2f} | {r['worst_ms']:.2f} | {asked} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="What building and probing a plan take.")
    parser.add_argument("--json", type=partial(writable, "file"), help="write the rows here")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    env = environment("cpu")
    rows = builds()
    save(args.json, env, rows)
    rows += probes()
    print(table(rows))
    print(describe(env))
    save(args.json, env, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
