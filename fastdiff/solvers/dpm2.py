"""Two-evaluation solvers of k-diffusion: DPM-2 in sigma/alpha and DPM-Solver++(2S), plain and ancestral."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Flow, Schedule
from fastdiff.solvers.multistep import Value, data, noise
from fastdiff.solvers.twostage import ancestral_split, two_stage_plan, visits

__all__ = ["dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral"]


def _dpm2(
    name: str, schedule: Schedule, steps: int, eta: float, s_noise: float, options: GridOptions, *, flow: bool
) -> Plan:
    """flow: integrate dx/dsigma in place of d(x/alpha) / d(sigma/alpha)."""
    grid = make_grid(schedule, steps, options)
    if not flow:
        grid.require_signal(name)
    keep, s = ancestral_split(grid, eta, s_noise)
    at, two = visits(schedule, grid, keep, in_sigma=flow)
    eps, i = noise(at, options), np.flatnonzero(two)
    middle = i + np.cumsum(two)[i]
    alpha, sigma = grid.alpha, grid.sigma
    if flow:  # dx/dsigma = eps - x0
        v = Value(eps.x, eps.p - 1, eps.m)
        ones = np.ones(len(two))
        rows = ones[i], at.sigma[middle] - sigma[i], ones, np.diff(sigma)
        return two_stage_plan(name, grid, at, two, v, rows, s)
    r = sigma / alpha
    to_m = at.alpha[middle] / alpha[i]
    by_m = at.alpha[middle] * (at.sigma[middle] / at.alpha[middle] - r[i])
    rows = to_m, by_m, alpha[1:] / alpha[:-1], alpha[1:] * (keep * r[1:] - r[:-1])
    return two_stage_plan(name, grid, at, two, eps, rows, s)


def dpm2(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """DPM-2: the midpoint method on d(x/alpha) / d(sigma/alpha) = eps, the middle geometric in r = sigma/alpha.

        y_m = y + (r_m - r) eps(y, r),   y' = y + (r' - r) eps(y_m, r_m),   y = x/alpha, r_m = sqrt(r r')

    On Flow: dx/dsigma = eps - x0 in place of it. A step that ends clean is one row, x' = p.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = 2 steps - 1 (2 steps with final="min"), 2 slots, order 2.
    Raises: ValueError for a start of zero signal, but on Flow with flow, v or x0 prediction.
    Source: Karras et al. 2022, arXiv:2206.00364, appendix D.1; k-diffusion's sample_dpm_2.
    """
    return _dpm2("dpm2", schedule, steps, 0.0, 1.0, options, flow=isinstance(schedule, Flow))


def dpm2_ancestral(
    schedule: Schedule, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, **options: Unpack[GridOptions]
) -> Plan:
    """DPM-2 to sigma_down, then fresh noise up to sigma' (in units of r = sigma/alpha).

        up = min(r', eta r' sqrt(1 - r'^2/r^2)),  down^2 = r'^2 - up^2
        y_m = y + (r_m - r) eps,  y' = y + (down - r) eps(y_m, r_m) + s_noise up n,   r_m = sqrt(r down)

    Args: eta, s_noise >= 0; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = 2 steps - 1, 2 slots, order 2 in the mean and variance of Gaussian data.
    Raises: ValueError for a start of zero signal. Source: k-diffusion's sample_dpm_2_ancestral.
    """
    return _dpm2(f"dpm2_ancestral(eta={eta:g})", schedule, steps, eta, s_noise, options, flow=False)


def dpmpp_2s_ancestral(
    schedule: Schedule, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, **options: Unpack[GridOptions]
) -> Plan:
    """DPM-Solver++(2S) to sigma_down, then fresh noise up to sigma' (in units of r = sigma/alpha).

        y_m = (r_m/r) y + (1 - r_m/r) p,  y' = (down/r) y + (1 - down/r) p(y_m, r_m) + s_noise up n,  r_m = sqrt(r down)

    up and down as in dpm2_ancestral. A step that ends clean is one row, x' = p.
    Args: eta, s_noise >= 0; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = 2 steps - 1, 2 slots, order 2 in the mean and variance of Gaussian data.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r_1 = 1/2; k-diffusion's sample_dpmpp_2s_ancestral.
    """
    grid = make_grid(schedule, steps, options)
    keep, s = ancestral_split(grid, eta, s_noise)
    at, two = visits(schedule, grid, keep, in_sigma=False)
    i = np.flatnonzero(two)
    middle = i + np.cumsum(two)[i]
    to_m, by_m = at.sigma[middle] / grid.sigma[i], -at.alpha[middle] * np.expm1(grid.lam[i] - at.lam[middle])
    to_1, by_1 = keep * grid.sigma[1:] / grid.sigma[:-1], grid.alpha[1:] * (1 - keep * np.exp(-grid.h))
    name = f"dpmpp_2s_ancestral(eta={eta:g})"
    return two_stage_plan(name, grid, at, two, data(at), (to_m, by_m, to_1, by_1), s)
