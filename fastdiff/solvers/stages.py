"""Where exponential Runge-Kutta methods evaluate the model: intervals of one to three stages over a grid."""

from __future__ import annotations

import numpy as np

from fastdiff.grid import Grid
from fastdiff.schedules import Schedule

__all__ = ["groups", "visits"]

Array = np.ndarray


def groups(grid: Grid, order: int, *, own: bool, lower_final: bool) -> tuple[Array, Array]:
    """Start and order [G] of every interval; own: the inner points are the grid's, orders shrink at the end."""
    n, from_nothing = len(grid.at.t), grid.alpha[0] == 0
    if not own:
        sizes = np.full(n, order)
        if from_nothing:
            sizes[0] = 1
        if grid.clean:
            sizes[-1] = 1
        return np.arange(n), sizes
    found = [1] if from_nothing else []
    while (left := n - sum(found)) > 0:
        found.append(min(order, left) if left != order or not lower_final else max(order - 1, 1))
    if grid.clean and found[-1] > 1:
        found[-1:] = [found[-1] - 1, 1]
    sizes = np.array(found)
    return np.cumsum(sizes) - sizes, sizes


def visits(schedule: Schedule, grid: Grid, starts: Array, sizes: Array, *, own: bool) -> Array:
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
