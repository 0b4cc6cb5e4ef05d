"""DPM-Solver++ multistep methods: one evaluation a step, earlier predictions kept as slots."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.phi import phi, quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import adams_plan, data, data_form, few_steps, orders, weights

__all__ = ["dpmpp_2m", "dpmpp_3m", "published"]


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
    if lower_order_final and few_steps(grid, options):
        weight[-1] = 0
    gain = -grid.alpha[1:] * np.expm1(-h)
    A, b = np.zeros((n, 2, 2)), np.zeros((n, 2))
    A[:, 0, 0] = grid.sigma[1:] / grid.sigma[:-1]
    A[:, 0, 1] = -gain * weight
    b[:, 0], b[:, 1] = gain * (1 + weight), 1.0
    return Plan.of("dpmpp_2m", grid.at, A, b, end=grid.end)


def _midpoint(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Weights of v + v' h / 2 with the slope of a line through two nodes; exact for a line only as h -> 0."""
    slope = 1 / (2 * nodes[:, 1])
    return np.stack([1 - slope, slope], axis=1)


def published(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The 3M weights with half of the quadratic's second difference; two nodes: midpoint."""
    if nodes.shape[1] == 2:
        return _midpoint(nodes, z)
    w = quadrature(nodes, z)
    one, two = nodes[:, 1], nodes[:, 2]
    second = np.stack([1 / (one * two), 1 / (one * (one - two)), 1 / (two * (two - one))], axis=1)
    return w - (phi(3, z) / phi(1, z))[:, None] * second


def dpmpp_3m(
    schedule: Schedule, steps: int, *, exact: bool = False, lower_order_final: bool = True,
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """DPM-Solver++(3M): third-order multistep on x0, in lam = ln(alpha/sigma).

        x' = (sigma'/sigma) x + alpha' h (phi_1 p + phi_2 D1 + phi_3 D2),   phi_k = phi_k(-h)
        D1 = h f'(0), D2 = h^2 f[0, -1, -2] of the parabola f through p, p_1, p_2

    Second order (2M) in the second row, first order in the first and in a row that ends clean.
    Args:
        exact: D2 = h^2 f'' = 2 h^2 f[0, -1, -2], which makes the integral of the parabola exact; the published code,
        diffusers and k-diffusion have half of that, so that it is of order 2 from an exact start too.
        lower_order_final: fall to first order at the end with fewer than 15 steps; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 3 slots (x, p_1, p_2). Order 2, with a quarter to a third of 2M's error; 3 from an exact
        start with exact=True.
    Source: Lu et al. 2022, arXiv:2211.01095, and the authors' code (multistep, order 3).
    """
    grid = make_grid(schedule, steps, options)
    few = lower_order_final and few_steps(grid, options)
    form = data_form(grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], grid.h)
    known = orders(grid, 3, lower_final=few)
    w = weights(known, grid.lam, form.z, quadrature if exact else published)
    return adams_plan("dpmpp_3m", grid, form, data(grid.at), w)
