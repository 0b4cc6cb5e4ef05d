"""Bayesian flow networks as schedules: what is known about the data at time t, in the form alpha x0 + sigma eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

from fastdiff.schedules.base import Array, Schedule, plain, positive, quiet, xp_of


def _check_step(i: Array, steps: int) -> np.ndarray:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    i = np.asarray(i, np.float64)
    if np.any((i < 1) | (i > steps) | (i != np.round(i))):
        raise ValueError(f"i must be in 1..{steps}, got {i}")
    return i


@dataclass(frozen=True)
class BFNContinuous(Schedule):
    """Bayesian flow of continuous data; the state is the input distribution's mean mu.

        u = 1 - t,   gamma(u) = 1 - sigma_1^(2u),   mu ~ N(gamma x, gamma (1 - gamma) I)
        alpha = gamma,   sigma = sqrt(gamma (1 - gamma)): the STANDARD DEVIATION

    u is the paper's t: 0 knows nothing (mu = 0, alpha = sigma = 0), 1 is the end. The model receives u.
    Args: sigma_1: std of the input distribution at the end, in units of the data, in (0, 1).
    Raises: ValueError for sigma_1 outside (0, 1).
    Source: Graves et al. 2023, arXiv:2308.07037, section 4, eq. 72-80; as an SDE: Xue et al. 2024, arXiv:2404.15766.
    """

    sigma_1: float

    def __post_init__(self) -> None:
        plain(self, "sigma_1")
        if isinstance(self.sigma_1, bool) or not isinstance(self.sigma_1, Real) or not 0 < self.sigma_1 < 1:
            raise ValueError(f"sigma_1 must be in (0, 1), got {self.sigma_1!r}")

    @property
    def rate(self) -> float:
        """-2 ln(sigma_1): 1 - gamma = exp(-rate u)."""
        return -2.0 * math.log(self.sigma_1)

    def accuracy(self, i: Array, steps: int) -> Array:
        """The accuracy of step i of n, the paper's alpha_i: sigma_1^(-2i/n) (1 - sigma_1^(2/n)) (eq. 95).

        Args: i: 1..n. steps: n >= 1. Returns: float64 like i. Raises: ValueError for i or n outside.
        """
        return np.exp(self.rate * _check_step(i, steps) / steps) * -math.expm1(-self.rate / steps)

    def gamma(self, t: Array) -> Array:
        """gamma = 1 - sigma_1^(2u)."""
        t = self._time(t)
        return -xp_of(t).expm1(-self.rate * (1.0 - t))

    def _rest(self, t: Array) -> Array:
        """1 - gamma, without cancellation."""
        t = self._time(t)
        return xp_of(t).exp(-self.rate * (1.0 - t))

    def alpha(self, t: Array) -> Array:
        return self.gamma(t)

    def sigma(self, t: Array) -> Array:
        rest = self._rest(t)
        return xp_of(rest).sqrt(self.gamma(t) * rest)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        gamma, rest = self.gamma(t), self._rest(t)
        return gamma, xp_of(rest).sqrt(gamma * rest)

    def logsnr(self, t: Array) -> Array:
        gamma, t = self.gamma(t), self._time(t)
        with quiet(gamma):
            return xp_of(gamma).log(gamma) + self.rate * (1.0 - t)

    def drift(self, t: Array) -> Array:
        with quiet(t):
            return -self.rate * self._rest(t) / self.gamma(t)

    def diffusion2(self, t: Array) -> Array:
        return self.rate * self._rest(t)

    def t_of(self, logsnr: Array) -> Array:
        return 1.0 - np.logaddexp(0.0, np.asarray(logsnr, np.float64)) / self.rate

    def model_time(self, t: Array) -> Array:
        return 1.0 - self._time(t)

    def time_of_model(self, t: Array) -> Array:
        return 1.0 - self._time(t)


@dataclass(frozen=True)
class BFNDiscrete(Schedule):
    """Bayesian flow of K classes; the state is the logits z of the input distribution theta = softmax(z).

        u = 1 - t,   beta(u) = beta_1 u^2,   z ~ N(beta (K e_x - 1), beta K I)
        alpha = sigma^2 = K beta(u) for one-hot data e_x: the constant -beta along K drops out in theta

    u is the paper's t: at 0 theta is uniform (z = 0), at 1 it is sharpest. The model receives u.
    Args: beta_1: beta(1) > 0. num_classes: K >= 2.
    Raises: ValueError for beta_1 <= 0 or K < 2; TypeError for K that is no integer.
    Source: Graves et al. 2023, arXiv:2308.07037, section 6, eq. 181-185; as an SDE: Xue et al. 2024, arXiv:2404.15766.
    """

    beta_1: float
    num_classes: int

    def __post_init__(self) -> None:
        plain(self, "beta_1")
        positive(beta_1=self.beta_1)
        K = self.num_classes
        if isinstance(K, bool) or not isinstance(K, int | np.integer):
            raise TypeError(f"num_classes must be an integer, got {K!r}")
        if K < 2:
            raise ValueError(f"num_classes must be >= 2, got {K}")

    @property
    def scale(self) -> float:
        """K beta_1: alpha(0) = sigma(0)^2."""
        return float(self.num_classes) * self.beta_1

    def accuracy(self, i: Array, steps: int) -> Array:
        """The accuracy of step i of n, the paper's alpha_i: beta_1 (2i - 1) / n^2 (section 6.7).

        Args: i: 1..n. steps: n >= 1. Returns: float64 like i. Raises: ValueError for i or n outside.
        """
        return self.beta_1 * (2.0 * _check_step(i, steps) - 1.0) / steps**2

    def beta(self, t: Array) -> Array:
        """beta = beta_1 u^2."""
        return self.beta_1 * (1.0 - self._time(t)) ** 2

    def alpha(self, t: Array) -> Array:
        return self.scale * (1.0 - self._time(t)) ** 2

    def sigma(self, t: Array) -> Array:
        return math.sqrt(self.scale) * (1.0 - self._time(t))

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        u = 1.0 - self._time(t)
        return self.scale * u**2, math.sqrt(self.scale) * u

    def logsnr(self, t: Array) -> Array:
        t = self._time(t)
        with quiet(t):
            return math.log(self.scale) + 2.0 * xp_of(t).log(1.0 - t)

    def drift(self, t: Array) -> Array:
        with quiet(t):
            return -2.0 / (1.0 - self._time(t))

    def diffusion2(self, t: Array) -> Array:
        return 2.0 * self.scale * (1.0 - self._time(t))

    def t_of(self, logsnr: Array) -> Array:
        return 1.0 - np.exp(0.5 * (np.asarray(logsnr, np.float64) - math.log(self.scale)))

    def model_time(self, t: Array) -> Array:
        return 1.0 - self._time(t)

    def time_of_model(self, t: Array) -> Array:
        return 1.0 - self._time(t)
