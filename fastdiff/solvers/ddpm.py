"""Ancestral solvers: DDPM and DDIM, and Euler in the same clothes. One evaluation a step, one slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep_sde import fraction, nonnegative

__all__ = ["ddim", "ddpm", "euler", "euler_ancestral"]

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def _gaussian_rows(grid: Grid, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x' = alpha' p + keep eps + std n for std = eta sigma' sqrt(1 - exp(-2h)), keep^2 + std^2 = sigma'^2.

    Returns A, b, s [N] of the p-form, where eps = (x - alpha p) / sigma. h = ln(alpha'/sigma') - ln(alpha/sigma)
    may be infinite at either end.
    """
    alpha, sigma, h = grid.alpha[1:], grid.sigma[1:], grid.h
    shrink = -eta * eta * -np.expm1(-2 * h)  # keep = sigma' sqrt(1 + shrink)
    with np.errstate(divide="ignore"):
        log_keep = 0.5 * np.log1p(shrink)
    A = sigma * np.exp(log_keep) / grid.sigma[:-1]
    b = -alpha * np.expm1(-h + log_keep)
    return A, b, eta * sigma * np.sqrt(-np.expm1(-2 * h))


def ddpm(schedule: Schedule, steps: int, *, variance: str = "fixed_small", **options: Unpack[GridOptions]) -> Plan:
    """DDPM ancestral sampling: the exact posterior q(x' | x, x0) with x0 = p.

        x' = (sigma'/sigma) e^-h x + alpha' (1 - e^-2h) p + s n,   h = ln(alpha'/sigma') - ln(alpha/sigma)
        s = sigma' sqrt(1 - e^-2h)  (fixed_small: beta~)   or   sigma sqrt(1 - e^-2h)  (fixed_large: beta)
        ln s^2 = f ln beta + (1 - f) ln beta~,  f = (v + 1) / 2  (learned_range), both of the grid's own steps

    Args: variance: learned_range: the model returns 2 C channels, v the second half (guided: the conditional
        output's); the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, weak order 1. No noise on the row that ends clean.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 6-7; Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; valid: {', '.join(VARIANCES)}")
    grid = make_grid(schedule, steps, options)
    A, b, small = _gaussian_rows(grid, 1.0)
    large = grid.sigma[:-1] * np.sqrt(-np.expm1(-2 * grid.h)) * (small > 0)
    plan = Plan.of(f"ddpm({variance})", grid.at, A, b, s=large if variance == "fixed_large" else small, end=grid.end)
    low, high = (2 * np.log(np.where(small > 0, s, 1.0)) for s in (small, large))
    columns = {"s": (plan.s > 0).astype(np.float64), "log_var_lo": low, "log_var_hi": high}
    return replace(plan, **columns) if variance == "learned_range" else plan  # type: ignore[arg-type]


def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = True,
    **options: Unpack[GridOptions],
) -> Plan:
    """DDIM: deterministic at eta = 0, DDPM's posterior at eta = 1.

        x' = alpha' p + sqrt(sigma'^2 - s^2) eps + s n,   s = eta sigma' sqrt(1 - e^-2h)

    Args:
        eta: in [0, 1]. use_clipped_model_output: with clip, eps is re-derived from the clamped p (guided-diffusion);
        False keeps the model's own eps (diffusers' default), but not under fd.sample's threshold=, which re-derives
        it always. The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, order 1 (eta = 0).
    Source: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.
    """
    eta = fraction("eta", eta)
    grid = make_grid(schedule, steps, options)
    A, b, s = _gaussian_rows(grid, eta)
    d = None
    if options.get("clip") is not None and not use_clipped_model_output:
        keep = A * grid.sigma[:-1]
        A, b, d = keep * grid.at.convert.e_skip, grid.alpha[1:], keep * grid.at.convert.e_out
    return Plan.of(f"ddim(eta={eta:g})", grid.at, A, b, d=d, s=s, end=grid.end)


def euler(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """Euler on the probability-flow ODE in d(x/alpha) / d(sigma/alpha) = eps (on Flow: dx/dsigma = eps - x0).

        x' = (sigma'/sigma) x + alpha' (1 - e^-h) p

    The same update as DDIM with eta = 0, whatever the schedule.
    Returns: Plan, nfe = steps, 1 slot, order 1. Source: Karras et al. 2022, arXiv:2206.00364, alg. 1.
    """
    grid = make_grid(schedule, steps, options)
    A, b, _ = _gaussian_rows(grid, 0.0)
    return Plan.of("euler", grid.at, A, b, end=grid.end)


def euler_ancestral(schedule: Schedule, steps: int, *, eta: float = 1.0, **options: Unpack[GridOptions]) -> Plan:
    """Euler to sigma_down, then fresh noise up to sigma' (in units of sigma/alpha).

        r = sigma/alpha,  up = min(r', eta r' sqrt(1 - r'^2/r^2)),  down^2 = r'^2 - up^2
        x'/alpha' = (down/r) x/alpha + (1 - down/r) p + up n

    For eta <= 1 this is DDIM with the same eta; above, up is capped at r'.
    Args: eta >= 0; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, weak order 1. Source: k-diffusion's sample_euler_ancestral.
    """
    (eta,) = nonnegative(eta=eta)
    grid = make_grid(schedule, steps, options)
    A, b, s = _gaussian_rows(grid, eta) if eta <= 1 else _capped_rows(grid, eta)
    return Plan.of(f"euler_ancestral(eta={eta:g})", grid.at, A, b, s=s, end=grid.end)


def _capped_rows(grid: Grid, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alpha, sigma = grid.alpha[1:], grid.sigma[1:]
    up = np.minimum(1.0, eta * np.sqrt(-np.expm1(-2 * grid.h)))  # in units of sigma'
    keep = np.sqrt(1 - up * up)
    return sigma * keep / grid.sigma[:-1], alpha * (1 - keep * np.exp(-grid.h)), up * sigma
