"""Solvers that integrate the reverse SDE and the probability-flow ODE in t, with the schedule's drift and diffusion."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["euler_maruyama", "probability_flow"]


def _integrate(name: str, schedule: Schedule, steps: int, options: GridOptions, *, eta: float) -> Plan:
    """x' = x - h (f x + (1 + eta^2)/2 g^2 eps / sigma) + eta g sqrt(h) n; a clean end is x' = p."""
    grid = make_grid(schedule, steps, options)
    n = len(grid.at.t) - grid.clean
    t, sigma = grid.t[:n], grid.sigma[:n]
    h = t - grid.t[1 : n + 1]
    f, g2 = schedule.drift(t), schedule.diffusion2(t)
    infinite = ~(np.isfinite(f) & np.isfinite(g2))
    if np.any(infinite):
        raise ValueError(
            f"{name} needs a finite drift and diffusion, {schedule} has none at t = {t[infinite][0]:g}; "
            f"give t_start below it, or use euler or ddim"
        )
    pull = 0.5 * (1 + eta**2) * g2 * h / sigma  # x' = (1 - f h) x - pull eps
    A, b, d, s = (np.zeros(len(grid.at.t)) for _ in range(4))
    A[:n] = 1 - f * h
    _add_eps(grid, -pull, A, b, d, clipped=options.get("clip") is not None or options.get("prediction") == "edm")
    s[:n] = eta * np.sqrt(g2 * h)
    if grid.clean:
        A[n:], b[n:], d[n:], s[n:] = 0, 1, 0, 0
    return Plan.of(name, grid.at, A, b, d=d, s=s, end=grid.end)


def _add_eps(grid: Grid, c: np.ndarray, A: np.ndarray, b: np.ndarray, d: np.ndarray, *, clipped: bool) -> None:
    """Adds c * eps to a row: from the model's own output (fewer roundings), or from the clamped p."""
    n = len(c)
    if clipped:
        A[:n] += c / grid.sigma[:n]
        b[:n] -= c * grid.alpha[:n] / grid.sigma[:n]
    else:
        A[:n] += c * grid.at.convert.e_skip[:n]
        d[:n] += c * grid.at.convert.e_out[:n]


def euler_maruyama(schedule: Schedule, steps: int, *, eta: float = 1.0, **options: Unpack[GridOptions]) -> Plan:
    """Euler-Maruyama on the reverse-time SDE dx = (f x - g^2 score) dt + g dW, or on one with more or less noise.

        x' = x - h (f(t) x - (1 + eta^2)/2 g(t)^2 score) + eta g(t) sqrt(h) n,   score = -eps / sigma
        h: the grid's own spacing

    Every eta has the same marginals. With final="zero" the last row returns p (the denoising step) and has no noise.
    Args: eta: >= 0; 0 is probability_flow; on Flow(), a shift's levels given by sigmas=, a / sqrt(2) is Flow-GRPO's
        step, whose noise is a sqrt(t / (1 - t)). The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot; weak order 1, strong order 1 (the noise is additive).
    Raises: ValueError where f or g is infinite (zero signal: give t_start), or eta is no finite number >= 0.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 6 and appendix D; the reference code uses h = 1/N on a grid whose
        spacing is (1 - t_end)/(N - 1): this one uses the spacing. Liu et al. 2025, arXiv:2505.05470, section 4.
    """
    (eta,) = nonnegative(eta=eta)
    name = "euler_maruyama" if eta == 1 else f"euler_maruyama(eta={eta:g})"
    return _integrate(name, schedule, steps, options, eta=eta)


def probability_flow(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """Euler in t on the probability-flow ODE dx/dt = f x - g^2 score / 2.

        x' = x - h (f(t) x + g(t)^2 eps / (2 sigma))

    With final="zero" the last row returns p. euler integrates the same ODE in sigma/alpha, which is exact for a
    constant x0: prefer it unless t itself matters.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, order 1. Source: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    return _integrate("probability_flow", schedule, steps, options, eta=0.0)
