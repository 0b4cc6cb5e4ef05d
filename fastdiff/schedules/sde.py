"""The SDEs of the score-model papers: VP, sub-VP and VE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastdiff.schedules.base import Array, Schedule, plain, positive, xp_of


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving SDE with a linear beta(t).

        B(t) = beta_min t + (beta_max - beta_min) t^2 / 2,  alpha = exp(-B/2),  sigma^2 = 1 - exp(-B)

    Args: beta_min, beta_max: beta(0) and beta(1), per unit time.
    Raises: ValueError unless 0 < beta_min <= beta_max < inf.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        plain(self, "beta_min", "beta_max")
        positive(beta_min=self.beta_min, beta_max=self.beta_max)
        if self.beta_max < self.beta_min:
            raise ValueError(f"beta_max must be >= beta_min, got {self.beta_max} < {self.beta_min}")

    def _beta(self, t: Array) -> Array:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Array) -> Array:
        t = self._time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _t_of_integral(self, B: Array) -> Array:
        slope = self.beta_max - self.beta_min
        return 2.0 * B / (self.beta_min + np.sqrt(self.beta_min**2 + 2.0 * slope * B))

    def alpha(self, t: Array) -> Array:
        return self._alpha_of(self._integral(t))

    def sigma(self, t: Array) -> Array:
        return self._sigma_of(self._integral(t))

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        B = self._integral(t)
        return self._alpha_of(B), self._sigma_of(B)

    def _alpha_of(self, B: Array) -> Array:
        return xp_of(B).exp(-0.5 * B)

    def _sigma_of(self, B: Array) -> Array:
        return xp_of(B).sqrt(-xp_of(B).expm1(-B))

    def drift(self, t: Array) -> Array:
        return -0.5 * self._beta(self._time(t))

    def diffusion2(self, t: Array) -> Array:
        return self._beta(self._time(t))

    def t_of(self, logsnr: Array) -> Array:
        return self._t_of_integral(np.logaddexp(0.0, -np.asarray(logsnr, np.float64)))

    def t_end(self, steps: int) -> float:
        return 1e-3


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance-preserving SDE: VP's alpha with a smaller sigma (no square root).

        alpha = exp(-B/2),  sigma = 1 - exp(-B) = 1 - alpha^2,  g^2 = beta (1 - exp(-2B))

    Source: Song et al. 2021, arXiv:2011.13456, appendix B, eq. 29.
    """

    def _sigma_of(self, B: Array) -> Array:
        return -xp_of(B).expm1(-B)

    def diffusion2(self, t: Array) -> Array:
        B = self._integral(t)
        return self._beta(self._time(t)) * -xp_of(B).expm1(-2.0 * B)

    def t_of(self, logsnr: Array) -> Array:
        # alpha / sigma = r with sigma = 1 - alpha^2, so r alpha^2 + alpha - r = 0
        r = np.exp(0.5 * np.asarray(logsnr, np.float64))
        sigma = 2.0 / (1.0 + np.sqrt(1.0 + 4.0 * r * r))
        return self._t_of_integral(-np.log1p(-sigma))


@dataclass(frozen=True)
class VE(Schedule):
    """Variance-exploding SDE with a geometric sigma.

        alpha = 1,  sigma = sigma_min (sigma_max / sigma_min)^t

    Args: sigma_min, sigma_max: noise levels at t = 0 and t = 1, in units of the data.
    Source: Song et al. 2021, arXiv:2011.13456, eq. 30, so g^2 = 2 sigma^2 ln(sigma_max / sigma_min).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        plain(self, "sigma_min", "sigma_max")
        positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max must be > sigma_min, got {self.sigma_max} <= {self.sigma_min}")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Array) -> Array:
        return xp_of(t).ones_like(self._time(t))

    def sigma(self, t: Array) -> Array:
        t = self._time(t)
        return self.sigma_min * xp_of(t).exp(t * self._log_ratio)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        sigma = self.sigma(t)
        return xp_of(sigma).ones_like(sigma), sigma

    def drift(self, t: Array) -> Array:
        return 0.0 * self._time(t)

    def diffusion2(self, t: Array) -> Array:
        return 2.0 * self._log_ratio * self.sigma(t) ** 2

    def t_of(self, logsnr: Array) -> Array:
        return (-0.5 * np.asarray(logsnr, np.float64) - math.log(self.sigma_min)) / self._log_ratio
