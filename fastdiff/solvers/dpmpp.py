"""DPM-Solver++ multistep methods: one evaluation a step, earlier predictions kept as slots."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule

__all__ = ["dpmpp_2m"]

FEW_STEPS = 15


def dpmpp_2m(schedule: Schedule, steps: int, *, lower_order_final: bool = True, **options: Unpack[GridOptions]) -> Plan:
    """DPM-Solver++(2M): second-order multistep on x0, in lam = ln(alpha/sigma).

        D = p + (p - p_prev) h / (2 h_prev),   x' = (sigma'/sigma) x + alpha' (1 - e^-h) D

    First order in the first row, in a row after zero signal (its lam is infinite) and in a row that ends clean.
    Args: lower_order_final: first order in the last row also with fewer than 15 steps (stability with final="min");
        the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 2 slots (x, p_prev), order 2.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    grid = make_grid(schedule, steps, options)
    n, h = len(grid.at.t), grid.h
    weight = np.zeros(n)
    weight[1:] = np.where(np.isfinite(h[1:]), h[1:], 0) / (2 * h[:-1])
    if lower_order_final and n < FEW_STEPS:
        weight[-1] = 0
    gain = -grid.alpha[1:] * np.expm1(-h)
    A, b = np.zeros((n, 2, 2)), np.zeros((n, 2))
    A[:, 0, 0] = grid.sigma[1:] / grid.sigma[:-1]
    A[:, 0, 1] = -gain * weight
    b[:, 0], b[:, 1] = gain * (1 + weight), 1.0
    return Plan.of("dpmpp_2m", grid.at, A, b, end=grid.end)
