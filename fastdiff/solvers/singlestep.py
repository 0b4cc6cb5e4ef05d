"""Exponential Runge-Kutta methods of one to three stages as rows: every interval starts from slot 0 alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastdiff.grid import Grid, Points
from fastdiff.phi import phi, quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import Form, Value
from fastdiff.solvers.stages import groups, visits

__all__ = ["singlestep_plan"]

Array = np.ndarray
Formula = Callable[[Array, Array, Array, Array, Array], Form]
Fresh = Callable[[Array, Array], Array]


def singlestep_plan(
    name: str,
    schedule: Schedule,
    grid: Grid,
    order: int,
    formula: Formula,
    value_of: Callable[[Points], Value],
    *,
    exact: bool,
    own: bool,
    lower_final: bool,
    fresh: Fresh | None = None,
) -> Plan:
    """Rows of exponential Runge-Kutta intervals; slots: the stage, and what the next stages still need.

    Two stages: the part of the end known after the first. Three: v_0 (with the stage it gives back the interval's
    start), then the part of the end known after the second.
    Args: exact: phi_2, phi_3 throughout; own: the grid's inner points; lower_final: no last step of full order;
        fresh: (sigma', lam' - lam) -> the noise that an SDE adds between two points. What it has added up to a stage
        goes on by the same ratios as the state, so that the stages of an interval share one path.
    """
    starts, sizes = groups(grid, order, own=own, lower_final=lower_final)
    at = grid.points(visits(schedule, grid, starts, sizes, own=own))
    value, first = value_of(at), np.cumsum(sizes) - sizes
    n, r = len(at.t), min(int(sizes.max()), 2)
    A, b, d, s = np.zeros((n, r, r)), np.zeros((n, r)), np.zeros((n, r)), np.zeros((n, r))
    ends = starts + (sizes if own else 1)

    def form(rows: Array, alpha: Array, sigma: Array, lam: Array) -> Form:
        """From the state at these rows to (alpha, sigma)."""
        return formula(at.alpha[rows], at.sigma[rows], alpha, sigma, lam - at.lam[rows])

    def write(rows: Array, slot: int, of_x: Array | float, of_v: Array | float) -> None:
        A[rows, slot, 0] += of_x + of_v * value.x[rows]
        b[rows, slot] += of_v * value.p[rows]
        d[rows, slot] += of_v * value.m[rows]

    def draw(rows: Array, slot: int, sigma: Array, lam: Array, onward: Array | float = 1.0) -> None:
        """A row's noise up to (sigma, lam), and from there to where the slot is."""
        if fresh is not None:
            s[rows, slot] = onward * fresh(sigma, lam - at.lam[rows])

    for k in np.unique(sizes):
        r0, e = first[sizes == k], ends[sizes == k]
        to_end = form(r0, grid.alpha[e], grid.sigma[e], grid.lam[e])
        if k == 1:
            write(r0, 0, to_end.ratio, to_end.gain)
            draw(r0, 0, grid.sigma[e], grid.lam[e])
            continue
        r1, r2 = r0 + 1, r0 + 2
        to_1 = form(r0, at.alpha[r1], at.sigma[r1], at.lam[r1])
        to_2 = to_end if k == 2 else form(r0, at.alpha[r2], at.sigma[r2], at.lam[r2])
        write(r0, 0, to_1.ratio, to_1.gain)
        draw(r0, 0, at.sigma[r1], at.lam[r1])
        u1 = (at.lam[r1] - at.lam[r0]) / ((grid.lam[e] if k == 2 else at.lam[r2]) - at.lam[r0])
        slope = phi(2, to_2.z) / phi(1, to_2.z) if exact or (k == 3 and not own) else 0.5
        w1 = to_2.gain * slope / u1  # v_1's weight in stage 2, v_0 has the rest
        if k == 2:
            write(r0, 1, to_2.ratio, to_2.gain - w1)
            A[r1, 0, 1] = 1
            write(r1, 0, 0.0, w1)
            draw(r0, 1, at.sigma[r1], at.lam[r1], to_2.ratio / to_1.ratio)
            draw(r1, 0, grid.sigma[e], grid.lam[e])
            continue
        span = grid.lam[e] - at.lam[r0]
        nodes = np.stack([0 * span, (at.lam[r1] - at.lam[r0]) / span, (at.lam[r2] - at.lam[r0]) / span], axis=1)
        if exact:
            w = quadrature(nodes, to_end.z)
        else:
            slope = phi(2, to_end.z) / phi(1, to_end.z) / nodes[:, 2]
            w = np.stack([1 - slope, 0 * slope, slope], axis=1)
        w *= to_end.gain[:, None]
        write(r0, 1, 0.0, 1.0)
        for slot, target, of_0, of_1 in ((0, to_2, to_2.gain - w1, w1), (1, to_end, w[:, 0], w[:, 1])):
            write(r1, slot, target.ratio / to_1.ratio, of_1)
            A[r1, slot, 1] = of_0 - target.ratio / to_1.ratio * to_1.gain
        draw(r1, 0, at.sigma[r2], at.lam[r2])
        draw(r1, 1, at.sigma[r2], at.lam[r2], to_end.ratio / to_2.ratio)
        A[r2, 0, 1] = 1
        write(r2, 0, 0.0, w[:, 2])
        draw(r2, 0, grid.sigma[e], grid.lam[e])
    if grid.clean:
        A[-1, 0], b[-1, 0], d[-1, 0] = 0, 1, 0
    return Plan.of(name, at, A, b, d=d, s=s, end=grid.end)
