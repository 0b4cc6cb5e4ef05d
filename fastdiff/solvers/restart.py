"""Restart sampling: Heun with jumps back up in noise."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.edm import noisy_heun

__all__ = ["restart"]

RHO = 7.0


def _interval(value: Any) -> tuple[float, float, int, int]:
    try:
        low, high, repeats, inner = value
        good = 0 < low < high < np.inf and operator.index(repeats) >= 1 and operator.index(inner) >= 1
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"intervals must be (low, high, repeats, inner) with 0 < low < high and integers repeats, inner >= 1, "
            f"got {value!r}"
        )
    return low, high, repeats, inner


def restart(
    schedule: Schedule, steps: int, *,
    intervals: Sequence[tuple[float, float, int, int]] = ((0.06, 0.2, 5, 3),), **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """Restart: Heun, and at some levels `repeats` times noise up to a higher level and Heun back down.

        at r_low:  y = y + sqrt(r_high^2 - r_low^2) n,  then `inner` Heun steps r_high -> r_low

    y = x/alpha, r = sigma/alpha; the noise is part of the row that arrives at r_low.

    Args:
        intervals: (low, high, repeats, inner) each, low and high in units of sigma/alpha; low is taken at the nearest
        point of the grid. The inner levels are Karras's ramp with rho = 7. The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = heun's + 2 sum(repeats inner), 2 slots.
    Raises: ValueError for zero signal, or low >= high, high above the top, repeats, inner < 1, or not four numbers.
    Source: Xu et al. 2023, arXiv:2306.14878, algorithm 1.
    """
    grid = make_grid(schedule, steps, options)
    grid.require_signal("restart")
    n = len(grid.at.t)
    r = grid.sigma / grid.alpha
    back: dict[int, list[np.ndarray]] = {}
    reachable = np.log(r[1 : n + 1 - grid.clean])
    for low, high, repeats, inner in map(_interval, intervals if isinstance(intervals, Iterable) else [intervals]):
        j = 1 + int(np.argmin(np.abs(reachable - np.log(low)))) if len(reachable) else 0
        if j == 0 or not r[j] < high <= r[0]:
            raise ValueError(
                f"the interval ({low:g}, {high:g}) must lie inside the grid's sigma/alpha, {r[0]:g} to {r[n]:g}, "
                f"with one of its {len(reachable)} inner points below {high:g}"
            )
        top, bottom = high ** (1 / RHO), r[j] ** (1 / RHO)
        ramp = (top + np.linspace(0, 1, inner + 1) * (bottom - top)) ** RHO
        ramp[0], ramp[-1] = high, r[j]
        back.setdefault(j, []).extend([ramp] * repeats)
    pieces = [part for i in range(n) for part in ([r[i : i + 2]] + back.get(i + 1, []))]
    start, end = np.concatenate([p[:-1] for p in pieces]), np.concatenate([p[1:] for p in pieces])
    lift = np.append(0.0, np.sqrt(np.maximum(start[1:] ** 2 - end[:-1] ** 2, 0)))
    reached = end[: len(end) - grid.clean]
    above, below = (grid.points(np.clip(schedule.t_of(-2 * np.log(v)), 0, schedule.t_max)) for v in (start, reached))
    return noisy_heun(f"restart({len(intervals)})", grid, above, below, lift)
