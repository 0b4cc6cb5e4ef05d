"""Predictors of the score-SDE paper, and annealed Langevin dynamics."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, Points, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.ddpm import ddpm

__all__ = ["ancestral", "langevin", "reverse_diffusion"]


def eps_terms(at: Points, c: np.ndarray, options: GridOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c * eps as coefficients of x, p and m [N]: the model's own output where nothing is clamped (fewer roundings)."""
    if options.get("clip") is not None or options.get("prediction") == "edm":
        return c / at.sigma, -c * at.alpha / at.sigma, 0 * c
    return c * at.convert.e_skip, 0 * c, c * at.convert.e_out


def reverse_diffusion(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """The reverse-diffusion predictor: the discrete forward chain x = a x' + sqrt(beta) n, reversed to first order.

        x' = (2 - a) x + beta score + sqrt(beta) n,   a = alpha/alpha',   beta = sigma^2 - a^2 sigma'^2

    On a chain of betas with every step, a = sqrt(1 - beta_i); on VE, a = 1 and beta = sigma^2 - sigma'^2.
    With final="zero" the last row returns p.
    Args: fastdiff.grid.GridOptions. Returns: Plan, nfe = steps, 1 slot, weak order 1.
    Raises: ValueError for a start of zero signal (a = 0: the chain forgets x').
    Source: Song et al. 2021, arXiv:2011.13456, appendix E, eq. 46; algorithms 2 and 3.
    """
    grid = make_grid(schedule, steps, options)
    grid.require_signal("reverse_diffusion")
    n = len(grid.at.t)
    beta = grid.sigma[:-1] ** 2 * -np.expm1(-2 * grid.h)
    A, b, d = eps_terms(grid.at, -beta / grid.sigma[:-1], options)
    A = A + 2 - grid.alpha[:-1] / grid.alpha[1:]
    s = np.sqrt(beta)
    if grid.clean:
        A[n - 1], b[n - 1], d[n - 1], s[n - 1] = 0, 1, 0, 0
    return Plan.of("reverse_diffusion", grid.at, A, b, d=d, s=s, end=grid.end)


def ancestral(schedule: Schedule, steps: int, **options: Unpack[GridOptions]) -> Plan:
    """The ancestral-sampling predictor: the mean of the posterior, with the variance the paper takes for the SDE.

        x' = (x + beta score) / a + s n,   a = alpha/alpha',   beta = sigma^2 - a^2 sigma'^2
        s^2 = sigma'^2 beta / sigma^2  where alpha is constant (VE),   else s^2 = beta (VP)

    So ddpm with variance="fixed_small" or "fixed_large". No noise on the row that ends clean.
    Args: fastdiff.grid.GridOptions. Returns: Plan, nfe = steps, 1 slot, weak order 1.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 4 and appendix F, eq. 47.
    """
    ends = schedule.alpha(np.array([0.0, schedule.t_max]))
    variance = "fixed_small" if ends[0] == ends[1] else "fixed_large"
    return replace(ddpm(schedule, steps, variance=variance, **options), name="ancestral")


def langevin(
    schedule: Schedule, steps: int, *, inner: int = 5, eps: float | None = None, denoise: bool = True,
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """Annealed Langevin dynamics in y = x/alpha, r = sigma/alpha: `inner` rows at each of `steps` noise levels.

        y' = y + (a_i / 2) score_y + sqrt(a_i) n,   a_i = eps (r_i / r_L)^2,   score_y = -eps_theta / r_i

    Starts at sigma_max n; VE's default grid is ncsnv2's, geometric with both ends.
    Args:
        inner: k. eps: the last level's step (r_L^2 / 10 by default; ncsnv2's step_lr is eps / 2). denoise: a last row
        that returns p; without it the plan ends, with noise, at the last level. The rest: GridOptions but `final`.
    Returns: Plan, nfe = steps k (+ 1 with denoise), 1 slot. A Markov chain, not an integrator: it has no order.
    Raises: ValueError for zero signal, a last level without noise, bad inner or eps; TypeError for final.
    Source: Song and Ermon 2019, arXiv:1907.05600, algorithm 1; denoising: Jolicoeur-Martineau et al. 2020.
    """
    if isinstance(inner, bool) or not isinstance(inner, int | np.integer) or inner < 1:
        raise ValueError(f"inner must be an integer >= 1, got {inner!r}")
    if eps is not None and not 0 < eps < np.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    if "final" in options:
        raise TypeError("langevin takes denoise=True | False in place of final")
    grid = make_grid(schedule, steps, options)
    grid.require_signal("langevin")
    levels = len(grid.at.t)
    visits = np.repeat(np.arange(levels), inner)
    last = grid.at.sigma[-1] / grid.at.alpha[-1]
    at = grid.at.take(np.append(visits, levels - 1) if denoise else visits)
    rows = at.take(np.arange(len(visits)))
    r = rows.sigma / rows.alpha
    a = (0.1 * last**2 if eps is None else float(eps)) * (r / last) ** 2
    after = np.append(at.alpha[1:], at.alpha[-1])[: len(visits)]
    A, b, d = (np.zeros(len(at.t)) for _ in range(3))
    A[: len(visits)], b[: len(visits)], d[: len(visits)] = eps_terms(rows, -0.5 * a / r * after, options)
    A[: len(visits)] += after / rows.alpha
    s = np.zeros(len(at.t))
    s[: len(visits)] = np.sqrt(a) * after
    if denoise:
        b[-1] = 1.0
    end = (1.0, 0.0) if denoise else (float(at.alpha[-1]), float(at.sigma[-1]))
    return Plan.of(f"langevin(inner={inner})", at, A, b, d=d, s=s, end=end)
