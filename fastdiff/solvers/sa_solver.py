"""SA-Solver: stochastic Adams predictor and corrector, one evaluation a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.phi import quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule

__all__ = ["sa_solver"]

MOST = 4


def _orders(grid: Grid, predictor: int, corrector: int, *, lower_order_final: bool) -> tuple[np.ndarray, np.ndarray]:
    """Predictor's and corrector's order of every interval: limited by the finite points before it."""
    n = len(grid.at.t)
    known = np.arange(n) + 1 - np.isinf(grid.lam[0])  # points of finite lam up to the interval's start
    ahead = n - np.arange(n) if lower_order_final else np.full(n, MOST + 1)
    first = np.maximum(1, np.minimum(np.minimum(predictor, known), ahead))
    second = np.minimum(np.minimum(corrector, known + 1), ahead + 1)
    first = np.where(np.isfinite(grid.h), first, 1)
    return first, np.where(np.isfinite(grid.h), second, 0)


def _weights(grid: Grid, H: np.ndarray, orders: np.ndarray, slots: int, *, new: bool, few: bool) -> np.ndarray:
    """[N, slots] weights of (p_new,) p_i, p_(i-1), .. in x' = .. + sum w p, through the nodes the order allows."""
    mu, out = -np.expm1(-H), np.zeros((len(orders), slots))
    for order in np.unique(orders[orders > 0]):
        i = np.flatnonzero(orders == order)
        if order == 1 and not new:
            out[i, 0] = mu[i]
            continue
        back = i[:, None] + new - np.arange(order)  # index of the node's point
        nodes = (grid.lam[back] - grid.lam[i][:, None]) / grid.h[i][:, None]
        if few and order == 2:
            out[i, 1] = (0.5 * H[i] - mu[i] * nodes[:, 0]) / (nodes[:, 1] - nodes[:, 0])
            out[i, 0] = mu[i] - out[i, 1]
        else:
            out[i, :order] = mu[i, None] * quadrature(nodes, -H[i])
    return out


def sa_solver(
    schedule: Schedule, steps: int, *, tau: float | Callable[[float], float] = 1.0, predictor_order: int = 2,
    corrector_order: int = 2, few_steps: bool = False, lower_order_final: bool = True, **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """SA-Solver: exact integral of the polynomial through x0 predictions, in the reverse SDE with noise tau(t).

        x' = (sigma'/sigma) e^(-tau^2 h) x + alpha' sum_j w_j p_j + sigma' sqrt(1 - e^(-2 tau^2 h)) n
        w_j = H int_0^1 e^(-H (1 - s)) L_j(s) ds,  H = (1 + tau^2) h;   L_j: Lagrange's polynomials on the known lam

    The corrector does the same through the new point as well, with the same noise, in the row that evaluates it: it
    adds (w - w_predictor) p, so neither the old x nor the noise is kept. First order into a clean end.
    Args:
        tau: >= 0, or a function of the schedule's time at the interval's start. predictor_order: 1..4;
        corrector_order: 0 (none) .. 4: both fall where fewer points are known. few_steps: the variant with w's first
        moment replaced by H/2 in order 2 (diffusers). lower_order_final: order 1 in the last row, 2 before it, ..
        The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 + max(predictor_order, corrector_order - 1) slots (predictor_order without
        corrector), order 2 as an ODE solver with the defaults. draws: one a row, also where tau = 0.
    Source: Xue et al. 2023, arXiv:2309.05019, eq. 14-18 and appendix B.
    """
    for name, value, low in (("predictor_order", predictor_order, 1), ("corrector_order", corrector_order, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= MOST:
            raise ValueError(f"{name} must be an integer in {low}..{MOST}, got {value!r}")
    grid = make_grid(schedule, steps, options)
    n = len(grid.at.t)
    taus = np.array([tau(float(t)) for t in grid.t[:-1]] if callable(tau) else [tau] * n, np.float64)
    if not np.all(np.isfinite(taus) & (taus >= 0)):
        raise ValueError(f"tau must be finite and >= 0, got {tau if not callable(tau) else taus}")
    h, tau2 = grid.h, taus**2
    decay = np.where(tau2 > 0, tau2, 1) * np.where(tau2 > 0, h, 0)  # tau^2 h; h may be infinite
    first, second = _orders(grid, predictor_order, corrector_order, lower_order_final=lower_order_final)
    slots = 1 + max(predictor_order, corrector_order - 1) if corrector_order else predictor_order
    gain = grid.alpha[1:, None]
    P = gain * _weights(grid, h + decay, first, max(slots, MOST), new=False, few=few_steps)  # of p, S1, S2, ..
    C = gain * _weights(grid, h + decay, second, MOST + 1, new=True, few=few_steps)  # of p_new, p, S1, ..
    keep = grid.sigma[1:] / grid.sigma[:-1] * np.exp(-decay)
    A, b, s = np.zeros((n, slots, slots)), np.zeros((n, slots)), np.zeros((n, slots))
    # the corrected state of a row: S0 + fix0 p + fix_k S_k, where its S_k was the last row's k-th newest
    fix = np.zeros((n, slots))
    applied = np.flatnonzero(second[:-1] > 0)
    fix[applied + 1, 0] = C[applied, 0]
    fix[applied + 1, 1:] = C[applied, 1:slots] - P[applied, : slots - 1]
    A[:, 0, 0], A[:, 0, 1:] = keep, keep[:, None] * fix[:, 1:] + P[:, 1:slots]
    b[:, 0], s[:, 0] = keep * fix[:, 0] + P[:, 0], grid.sigma[1:] * np.sqrt(-np.expm1(-2 * decay))
    if slots > 1:
        b[:, 1] = 1.0
        A[:, np.arange(2, slots), np.arange(1, slots - 1)] = 1.0
    plan = Plan.of(f"sa_solver({predictor_order}, {corrector_order})", grid.at, A, b, s=s, end=grid.end)
    return replace(plan, draws=np.ones(n, np.int64))
