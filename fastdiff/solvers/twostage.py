"""Steps of one or two rows: a stage in the middle of the step, then the step itself with fresh noise."""

from __future__ import annotations

import numpy as np

from fastdiff.grid import Grid, Points
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import Value
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["ancestral_split", "two_stage_plan", "visits"]

Array = np.ndarray


def ancestral_split(grid: Grid, eta: float, s_noise: float) -> tuple[Array, Array]:
    """[N] (down / r', noise) of a step in r = sigma/alpha.

    up = min(r', eta r' sqrt(1 - r'^2/r^2)),  down^2 = r'^2 - up^2.
    """
    eta, s_noise = nonnegative(eta=eta, s_noise=s_noise)
    up = np.minimum(1.0, eta * np.sqrt(-np.expm1(-2 * grid.h)))
    return np.sqrt(1 - up * up), s_noise * up * grid.sigma[1:]


def visits(schedule: Schedule, grid: Grid, down: Array, *, in_sigma: bool) -> tuple[Points, Array]:
    """Points at t_0, middle_0, t_1, ... and which steps have two rows; the middle is geometric in r or in sigma.

    A step that ends clean, or starts from zero signal (geometric in r), has one row.
    """
    two = (grid.sigma[1:] > 0) & (down > 0) & (in_sigma | (grid.alpha[:-1] > 0))
    i = np.flatnonzero(two)
    if in_sigma:
        middle = np.sqrt(grid.sigma[i] * grid.sigma[i + 1])
        lam = np.log((1 - middle) / middle)
    else:
        lam = grid.lam[i] + (grid.h[i] - np.log(down[i])) / 2
    t = np.repeat(grid.t[:-1], 1 + two)
    t[i + np.cumsum(two)[i]] = np.clip(schedule.t_of(2 * lam), 0, schedule.t_max)
    return grid.points(t), two


def two_stage_plan(
    name: str, grid: Grid, at: Points, two: Array, value: Value, rows: tuple[Array, ...], s: Array
) -> Plan:
    """x_m = to_m x + by_m v, then x' = to_1 x + by_1 v_m + s n; steps of one row: x' = to_1 x + by_1 v + s n.

    The second slot keeps to_1 x.
    """
    to_m, by_m, to_1, by_1 = rows
    first = np.arange(len(two)) + np.cumsum(two) - two
    last = first + two
    n, r = len(at.t), 1 + bool(two.any())
    A, b, d, noisy = np.zeros((n, r, r)), np.zeros((n, r)), np.zeros((n, r)), np.zeros((n, r))
    for at_rows, c in ((first[two], by_m), (last, by_1)):
        A[at_rows, 0, 0] = c * value.x[at_rows]
        b[at_rows, 0], d[at_rows, 0] = c * value.p[at_rows], c * value.m[at_rows]
    A[first[two], 0, 0] += to_m
    A[first[~two], 0, 0] += to_1[~two]
    if r == 2:
        A[first[two], 1, 0], A[last[two], 0, 1] = to_1[two], 1
    noisy[last, 0] = s
    if grid.clean:
        A[-1, 0], b[-1, 0], d[-1, 0] = 0, 1, 0
    return Plan.of(name, at, A, b, d=d, s=noisy, end=grid.end)
