"""Solvers that integrate the reverse SDE and the probability-flow ODE in t, with the schedule's drift and diffusion."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule

__all__ = ["euler_maruyama", "probability_flow"]


def _integrate(name: str, schedule: Schedule, steps: int, options: GridOptions, *, noisy: bool) -> Plan:
    """x' = x - h (f x + w g^2 eps / sigma) + noise, w = 1 for the SDE, 1/2 for the ODE; a clean end is x' = p."""
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
    pull = (1.0 if noisy else 0.5) * g2 * h / sigma  # x' = (1 - f h) x - pull eps
    A, b, d, s = (np.zeros(len(grid.at.t)) for _ in range(4))
    A[:n] = 1 - f * h
    _add_eps(grid, -pull, A, b, d, clipped=options.get("clip") is not None or options.get("prediction") == "edm")
    if noisy:
        s[:n] = np.sqrt(g2 * h)
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


def euler_maruyama(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """Euler-Maruyama on the reverse-time SDE dx = (f x - g^2 score) dt + g dW.

        x' = x - h (f(t) x - g(t)^2 score) + g(t) sqrt(h) n,   score = -eps / sigma,   h: the grid's own spacing

    With final="zero" the last row returns p (the denoising step) and has no noise.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot; weak order 1, strong order 1 (the noise is additive).
    Raises: ValueError where f or g is infinite (zero signal).
    Source: Song et al. 2021, arXiv:2011.13456, eq. 6 and appendix D; the reference code uses h = 1/N on a grid whose
        spacing is (1 - t_end)/(N - 1): this one uses the spacing.
    """
    return _integrate("euler_maruyama", schedule, steps, options, noisy=True)


def probability_flow(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """Euler in t on the probability-flow ODE dx/dt = f x - g^2 score / 2.

        x' = x - h (f(t) x + g(t)^2 eps / (2 sigma))

    With final="zero" the last row returns p. euler integrates the same ODE in sigma/alpha, which is exact for a
    constant x0: prefer it unless t itself matters.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, order 1. Source: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    return _integrate("probability_flow", schedule, steps, options, noisy=False)
