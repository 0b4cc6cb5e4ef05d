"""Heun with noise between its steps (EDM's churn): the noise of a step is part of the row before it."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, Points, make_grid, points
from fastdiff.plan import Plan
from fastdiff.prediction import Conversion
from fastdiff.schedules import EDM, Schedule
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["edm_stochastic", "noisy_heun"]

MOST_CHURN = np.sqrt(2) - 1
REACHED = 1e-6  # in ln(alpha/sigma)


def noisy_euler(name: str, grid: Grid, hat: Points, lift: np.ndarray) -> Plan:
    """As noisy_heun with Euler steps hat_j -> the grid's next point: one row each."""
    r, r_hat, alpha = grid.sigma[1:] / grid.alpha[1:], hat.sigma / hat.alpha, np.append(hat.alpha[1:], grid.alpha[-1])
    A, b = alpha * r / (hat.alpha * r_hat), alpha * (1 - r / r_hat)
    start = float(grid.sigma[0] * (hat.alpha[0] / grid.alpha[0]))
    return Plan.of(name, hat, A, b, s=alpha * np.append(lift[1:], 0.0), end=grid.end, init_scale=start)


def noisy_heun(name: str, grid: Grid, hat: Points, end: Points, lift: np.ndarray) -> Plan:
    """Heun steps hat_j -> end_j in y = x/alpha, r = sigma/alpha, each after noise: y = y_end_(j-1) + lift_j n.

    Args: hat [M]: where the steps start. end [M], or [M - 1] where the last step ends clean and is x' = p.
        lift [M]: std of the noise before step j, in units of y; lift_0 belongs to the start, x = sigma_0 n0 + ...
    """
    steps, two = len(hat.t), len(end.t)
    first, second = np.arange(0, 2 * two, 2), np.arange(1, 2 * two, 2)
    r_hat, r = hat.sigma / hat.alpha, end.sigma / end.alpha
    A, b, s = np.zeros((steps + two, 2, 2)), np.zeros((steps + two, 2)), np.zeros((steps + two, 2))
    A[first, 0, 0], A[first, 1, 0] = end.sigma / hat.sigma[:two], 1 / hat.sigma[:two]
    b[first, 0] = end.alpha * (1 - r / r_hat[:two])
    b[first, 1] = -hat.alpha[:two] / hat.sigma[:two]
    half = 0.5 * end.alpha * (r - r_hat[:two])
    scale = np.ones(two)  # x carries alpha, which the noise changes
    scale[: steps - 1] = hat.alpha[1:] / end.alpha[: steps - 1]
    A[second, 0, 0], A[second, 0, 1] = scale * (1 + half / end.sigma), -scale * half
    b[second, 0] = -scale * half * end.alpha / end.sigma
    s[second[: steps - 1], 0] = hat.alpha[1:] * lift[1:]
    if two < steps:
        b[-1, 0] = 1.0
    rows = np.empty(steps + two, np.int64)
    rows[first], rows[second] = np.arange(two), steps + np.arange(two)
    rows[2 * two :] = np.arange(two, steps)
    t, alpha, sigma, lam, times = (
        np.append(getattr(hat, v), getattr(end, v))[rows] for v in ("t", "alpha", "sigma", "lam", "times")
    )
    convert = Conversion(*(np.append(u, v)[rows] for u, v in zip(hat.convert, end.convert, strict=True)))
    at = Points(t, alpha, sigma, lam, times, convert, hat.clip)
    start = float(grid.sigma[0] * (hat.alpha[0] / grid.alpha[0]))
    return Plan.of(name, at, A, b, s=s, end=grid.end, init_scale=start)


def _levels(schedule: Schedule, grid: Grid, options: GridOptions, r: np.ndarray) -> Points:
    """The schedule where sigma/alpha = r. Only EDM's model time, sigma itself, exists above the schedule's top."""
    t = schedule.t_of(-2 * np.log(r))
    at = grid.points(np.clip(t, 0, schedule.t_max))
    if np.allclose(at.lam, -np.log(r), rtol=0, atol=REACHED):  # a chain's times end at its top, whatever r
        return at
    if not isinstance(schedule, EDM):
        raise ValueError(
            f"noise would lift row 0 to sigma/alpha = {r.max():g}, above the top of {schedule}: give s_max or t_start"
        )
    taller = replace(schedule, sigma_max=float(2 * r.max()))
    at = points(
        taller, taller.t_of(-2 * np.log(r)), prediction=options.get("prediction", "eps"), clip=options.get("clip"),
        sign=options.get("sign", 1), sigma_data=options.get("sigma_data"),
    )  # fmt: skip
    return replace(at, t=t)


def edm_stochastic(
    schedule: Schedule, steps: int, *, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0, order: int = 2, **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """EDM's stochastic sampler: noise up to r^ = (1 + g) r, then a Heun step from r^ to r'.

        g = min(s_churn / N, sqrt(2) - 1) where s_min <= r <= s_max, else 0;   y = x/alpha, r = sigma/alpha
        y^ = y + s_noise sqrt(r^^2 - r^2) n,   then heun from (y^, r^)

    With s_churn = 0 this is heun. The first step's noise belongs to the start (init_noise).
    Args: s_churn, s_min, s_max, s_noise: above (N counts skipped steps); order: 2, or 1: Euler; the rest: GridOptions.
    Returns: Plan, nfe = 2 steps - 1 (2 steps with final="min"), 2 slots, order 2 (weak, on Gaussian data, with a
        fixed s_churn); order 1: nfe = steps, 1 slot. draws: once a step, also where g = 0, as the reference code.
    Raises: ValueError for zero signal, or churn above the top of a schedule whose model time is not sigma.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    s_churn, s_min, s_noise = nonnegative(s_churn=s_churn, s_min=s_min, s_noise=s_noise)
    if isinstance(s_max, bool) or not isinstance(s_max, Real) or np.isnan(s_max):
        raise ValueError(f"s_max must be a number, got {s_max!r}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    grid = make_grid(schedule, steps, options)
    grid.require_signal("edm_stochastic")
    n = len(grid.at.t)
    two, r = n - grid.clean, grid.sigma[:n] / grid.alpha[:n]
    share = s_churn / (n + options.get("start", 0))
    churn = np.where((r >= s_min) & (r <= s_max), min(share, MOST_CHURN), 0.0)
    hat = grid.at
    if churn.any():
        hat = _levels(schedule, grid, options, r * (1 + churn))
    lift, name = s_noise * r * np.sqrt(churn * (2 + churn)), f"edm_stochastic(s_churn={s_churn:g})"
    if order == 1:
        plan = noisy_euler(name, grid, hat, lift)
    else:
        plan = noisy_heun(name, grid, hat, grid.points(grid.t[1 : two + 1]), lift)
    draws = np.zeros(plan.nfe, np.int64)
    draws[order - 1 : order * (n - 1) : order] = 1
    draws[min(order - 1, plan.nfe - 1)] += lift[0] == 0 and n > 1  # the unused draw of the first step
    return replace(plan, draws=draws, init_noise=float(hat.alpha[0] * lift[0]))
