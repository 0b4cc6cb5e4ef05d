"""Exponential Runge-Kutta methods of one to three stages as rows: every interval starts from slot 0 alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastdiff.grid import Grid, Points
from fastdiff.phi import phi, quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import Form, Value

__all__ = ["singlestep_plan"]

Array = np.ndarray
Formula = Callable[[Array, Array, Array, Array, Array], Form]


def _groups(grid: Grid, order: int, *, own: bool, lower_final: bool) -> tuple[Array, Array]:
    """Start and order [G] of every interval; own: the inner points are the grid's, orders shrink at the end."""
    n, from_nothing = len(grid.at.t), grid.alpha[0] == 0
    if not own:
        sizes = np.full(n, order)
        sizes[0] = 1 if from_nothing else order
        sizes[-1] = 1 if grid.clean else order
        return np.arange(n), sizes
    found = [1] if from_nothing else []
    while (left := n - sum(found)) > 0:
        found.append(min(order, left) if left != order or not lower_final else max(order - 1, 1))
    if grid.clean and found[-1] > 1:
        found[-1:] = [found[-1] - 1, 1]
    sizes = np.array(found)
    return np.cumsum(sizes) - sizes, sizes


def _visits(schedule: Schedule, grid: Grid, starts: Array, sizes: Array, *, own: bool) -> Array:
    """[nfe] times at which the model is evaluated."""
    if own:
        return grid.t[:-1]
    group = np.repeat(np.arange(len(sizes)), sizes)
    stage = np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]
    with np.errstate(invalid="ignore"):
        lam = grid.lam[starts][group] + grid.h[starts][group] * stage / sizes[group]
    t = grid.t[starts][group].copy()
    inner = stage > 0
    t[inner] = np.clip(schedule.t_of(2 * lam[inner]), 0, schedule.t_max)
    return t


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
) -> Plan:
    """Rows of exponential Runge-Kutta intervals; slots: the stage, and what the next stages still need.

    Two stages: the part of the end known after the first. Three: v_0 (with the stage it gives back the interval's
    start), then the part of the end known after the second.
    Args: exact: phi_2, phi_3 throughout; own: the grid's inner points; lower_final: no last step of full order.
    """
    starts, sizes = _groups(grid, order, own=own, lower_final=lower_final)
    at = grid.points(_visits(schedule, grid, starts, sizes, own=own))
    value, first = value_of(at), np.cumsum(sizes) - sizes
    n, r = len(at.t), min(int(sizes.max()), 2)
    A, b, d = np.zeros((n, r, r)), np.zeros((n, r)), np.zeros((n, r))
    ends = starts + (sizes if own else 1)

    def form(rows: Array, alpha: Array, sigma: Array, lam: Array) -> Form:
        """From the state at these rows to (alpha, sigma)."""
        return formula(at.alpha[rows], at.sigma[rows], alpha, sigma, lam - at.lam[rows])

    def write(rows: Array, slot: int, of_x: Array | float, of_v: Array | float) -> None:
        A[rows, slot, 0] += of_x + of_v * value.x[rows]
        b[rows, slot] += of_v * value.p[rows]
        d[rows, slot] += of_v * value.m[rows]

    for k in np.unique(sizes):
        r0, e = first[sizes == k], ends[sizes == k]
        to_end = form(r0, grid.alpha[e], grid.sigma[e], grid.lam[e])
        if k == 1:
            write(r0, 0, to_end.ratio, to_end.gain)
            continue
        r1, r2 = r0 + 1, r0 + 2
        to_1 = form(r0, at.alpha[r1], at.sigma[r1], at.lam[r1])
        to_2 = to_end if k == 2 else form(r0, at.alpha[r2], at.sigma[r2], at.lam[r2])
        write(r0, 0, to_1.ratio, to_1.gain)
        u1 = (at.lam[r1] - at.lam[r0]) / np.abs(to_2.z)
        slope = phi(2, to_2.z) / phi(1, to_2.z) if exact or (k == 3 and not own) else 0.5
        w1 = to_2.gain * slope / u1  # v_1's weight in stage 2, v_0 has the rest
        if k == 2:
            write(r0, 1, to_2.ratio, to_2.gain - w1)
            A[r1, 0, 1] = 1
            write(r1, 0, 0.0, w1)
            continue
        span = np.abs(to_end.z)
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
        A[r2, 0, 1] = 1
        write(r2, 0, 0.0, w[:, 2])
    if grid.clean:
        A[-1, 0], b[-1, 0], d[-1, 0] = 0, 1, 0
    return Plan.of(name, at, A, b, d=d, end=grid.end)
