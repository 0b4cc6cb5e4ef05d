"""Ramps: how sigma/alpha falls from its largest to its smallest value, whatever the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = ["AYS", "RAMPS", "RHO", "beta_quantile", "ramp"]

Array = np.ndarray
RHO = {"karras": 7.0, "polyexponential": 1.0}
BETA = 0.6
SERIES_TERMS = 64
NEWTON_STEPS = 8
# the published ten-step levels and their end (Sabour et al. 2024, arXiv:2404.14507)
AYS = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def beta_quantile(q: Array, a: float = BETA) -> Array:
    """The quantiles of Beta(a, a), to rounding.

    B_x(a, a) = x^a sum_k (1 - a)_k / k! x^k / (a + k) for x <= 1/2, solved by Newton's method in x^a; else by symmetry.
    """
    q = np.asarray(q, np.float64)
    low = np.minimum(q, 1 - q)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    terms, rising = [], 1.0
    for k in range(SERIES_TERMS):
        terms.append(rising / (a + k))
        rising *= (1 - a + k) / (k + 1)
    u = np.minimum(low * a * whole, 0.5**a)
    for _ in range(NEWTON_STEPS):
        x = u ** (1 / a)
        excess = u * np.polyval(terms[::-1], x) - low * whole
        u = np.clip(u - excess * a * (1 - x) ** (1 - a), 0, 0.5**a)
    x = u ** (1 / a)
    return np.where(q <= 0.5, x, 1 - x)


def _karras(high: float, low: float, u: Array, rho: float) -> Array:
    a, b = high ** (1 / rho), low ** (1 / rho)
    return (a + u * (b - a)) ** rho


def _exponential(high: float, low: float, u: Array, rho: float) -> Array:
    return np.exp(math.log(high) + u * math.log(low / high))


def _polyexponential(high: float, low: float, u: Array, rho: float) -> Array:
    return np.exp(math.log(low) + (1 - u) ** rho * math.log(high / low))


def _beta(high: float, low: float, u: Array, rho: float) -> Array:
    return low + (high - low) * beta_quantile(1 - u)


RAMPS: dict[str, Callable[[float, float, Array, float], Array]] = {
    "karras": _karras,
    "exponential": _exponential,
    "logsnr": _exponential,
    "lu": _exponential,
    "polyexponential": _polyexponential,
    "beta": _beta,
}


def ramp(spacing: str, high: float, low: float, steps: int, *, end: bool, rho: float | None) -> Array:
    """sigma/alpha from `high` down, [steps], or [steps + 1] with the end point.

        karras: (high^(1/rho) + u (low^(1/rho) - high^(1/rho)))^rho, u = 0..1
        exponential, logsnr, lu: ln sigma linear     polyexponential: ln sigma linear in (1 - u)^rho
        beta: sigma linear in the quantiles of Beta(0.6, 0.6)
        ays_*: the published table for any number of steps, ln sigma linear between its entries

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5; Lee et al. 2024, arXiv:2407.12173 (beta); k-diffusion's
    get_sigmas_polyexponential; Sabour et al. 2024, arXiv:2404.14507 (ays).
    """
    if spacing in AYS:
        table = np.log(AYS[spacing])
        levels: Array = np.exp(np.interp(np.linspace(0, len(table) - 1, steps + 1), np.arange(len(table)), table))
        return levels if end else levels[:-1]
    u = np.linspace(0, 1, steps + end)
    return RAMPS[spacing](high, low, u, RHO.get(spacing, 1.0) if rho is None else rho)
