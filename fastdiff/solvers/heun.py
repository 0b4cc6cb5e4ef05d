"""Heun's second-order method: two evaluations a step, two slots."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Flow, Schedule

__all__ = ["heun"]


def heun(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """Heun (explicit trapezoid) on the probability-flow ODE in d(x/alpha) / d(sigma/alpha) = eps.

        y^ = y + (r' - r) eps(y, r),   y' = y + (r' - r) (eps(y, r) + eps(y^, r')) / 2,   y = x/alpha, r = sigma/alpha

    On Flow: dx/dsigma = eps - x0 in place of it. A step that ends clean is one Euler row (x' = p).
    Slots: x^, and eps at the step's start; as x' = x^ + alpha' (r' - r) (eps^ - eps) / 2 keeps most digits where r'/r
    is small.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = 2 steps - 1 (2 steps with final="min"), 2 slots, order 2.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    grid = make_grid(schedule, steps, options)
    flow = isinstance(schedule, Flow)
    if not flow:
        grid.require_signal("heun")
    n = len(grid.at.t)
    two = n - grid.clean  # steps with a correction
    alpha, sigma = grid.alpha, grid.sigma
    now, then = slice(0, two), slice(1, two + 1)
    A, b = np.zeros((n + two, 2, 2)), np.zeros((n + two, 2))
    first, second = np.arange(0, 2 * two, 2), np.arange(1, 2 * two, 2)
    ratio = sigma[then] / sigma[now]
    k = 0.5 * (1 - 1 / ratio) if flow else -0.5 * np.expm1(grid.h[:two])  # half the step over sigma'
    A[first, 0, 0] = ratio
    b[first, 0] = 1 - ratio if flow else -alpha[then] * np.expm1(-grid.h[:two])
    A[first, 1, 0] = 1 / sigma[now]
    b[first, 1] = -(1.0 if flow else alpha[now]) / sigma[now]
    A[second, 0, 0], A[second, 0, 1] = 1 + k, -k * sigma[then]
    b[second, 0] = -k if flow else -k * alpha[then]
    if grid.clean:
        b[-1, 0] = 1.0
    visits = np.minimum((np.arange(n + two) + 1) // 2, n)  # 0, 1, 1, 2, 2, ...
    at = grid.points(grid.t if visits[-1] == n else grid.t[:-1]).take(visits)
    return Plan.of("heun", at, A, b, end=grid.end)
