"""Continuous schedules without an SDE of their own: rectified flow, EDM's ramp, cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastdiff.schedules.base import Array, Schedule, plain, positive, quiet, xp_of


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow / conditional optimal transport, with resolution shift.

        sigma = shift t / (1 + (shift - 1) t),  alpha = 1 - sigma

    The model receives sigma (the shifted time). At t = 1 alpha is 0: f and g are infinite there.
    Args: shift: > 1 spends more steps at high noise (3 for Stable Diffusion 3).
    Source: Lipman et al. 2023, arXiv:2210.02747; shift: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        plain(self, "shift")
        positive(shift=self.shift)

    def _shifted(self, t: Array) -> Array:
        return 1.0 + (self.shift - 1.0) * t

    def alpha(self, t: Array) -> Array:
        t = self._time(t)
        return (1.0 - t) / self._shifted(t)

    def sigma(self, t: Array) -> Array:
        t = self._time(t)
        return self.shift * t / self._shifted(t)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        t = self._time(t)
        by = self._shifted(t)
        return (1.0 - t) / by, self.shift * t / by

    def _dsigma(self, t: Array) -> Array:
        return self.shift / self._shifted(self._time(t)) ** 2

    def drift(self, t: Array) -> Array:
        with quiet(t):
            return -self._dsigma(t) / self.alpha(t)

    def diffusion2(self, t: Array) -> Array:
        with quiet(t):
            return 2.0 * self.sigma(t) * self._dsigma(t) / self.alpha(t)

    def t_of(self, logsnr: Array) -> Array:
        r = np.exp(0.5 * np.asarray(logsnr, np.float64))  # alpha / sigma
        return 1.0 / (1.0 + self.shift * r)

    def model_time(self, t: Array) -> Array:
        return self.sigma(t)

    def time_of_model(self, t: Array) -> Array:
        t = self._time(t)
        return t / (self.shift - (self.shift - 1.0) * t)

    def t_end(self, steps: int) -> float:
        return 1.0 / steps


@dataclass(frozen=True)
class EDM(Schedule):
    """Karras et al.'s sigma schedule: alpha = 1 and t runs along the rho ramp.

        sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    The model receives sigma (ln(sigma) / 4 with prediction="edm").
    Args: sigma_min, sigma_max, sigma_data: in units of the data; rho: curvature of the ramp.
    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5 and table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        plain(self, "sigma_min", "sigma_max", "rho", "sigma_data")
        positive(sigma_max=self.sigma_max, rho=self.rho, sigma_data=self.sigma_data)
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be in [0, sigma_max), got {self.sigma_min!r}")

    @property
    def _ramp(self) -> tuple[float, float]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low, high - low

    def alpha(self, t: Array) -> Array:
        return xp_of(t).ones_like(self._time(t))

    def sigma(self, t: Array) -> Array:
        low, span = self._ramp
        return (low + self._time(t) * span) ** self.rho

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        sigma = self.sigma(t)
        return xp_of(sigma).ones_like(sigma), sigma

    def drift(self, t: Array) -> Array:
        return 0.0 * self._time(t)

    def diffusion2(self, t: Array) -> Array:
        low, span = self._ramp
        t = self._time(t)
        return 2.0 * self.rho * span * (low + t * span) ** (2 * self.rho - 1)

    def t_of(self, logsnr: Array) -> Array:
        low, span = self._ramp
        return (np.exp(-0.5 * np.asarray(logsnr, np.float64) / self.rho) - low) / span

    def model_time(self, t: Array) -> Array:
        return self.sigma(t)

    def time_of_model(self, t: Array) -> Array:
        (low, span), xp = self._ramp, xp_of(t)
        at = (xp.asarray(t, dtype=xp.float64) ** (1 / self.rho) - low) / span
        near = (at > -1e-6) & (at < 1 + 1e-6)  # float32 rounds sigma past an end
        return self._time(xp.where(near, xp.clip(at, 0.0, 1.0), at))


@dataclass(frozen=True)
class Cosine(Schedule):
    """The continuous cosine schedule.

        theta(t) = (t + s) / (1 + s) pi/2,  alpha = cos(theta) / cos(theta(0)),  sigma^2 = 1 - alpha^2

    alpha is exactly 0 at t = 1; with eps or score prediction sampling starts at t = 0.9946.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17; 0.9946: Lu et al. 2022, arXiv:2206.00927, appendix D.4.
    """

    s: float = 0.008

    def __post_init__(self) -> None:
        plain(self, "s")
        positive(s=self.s)

    def _theta(self, t: Array) -> Array:
        return (t + self.s) / (1.0 + self.s) * (0.5 * math.pi)

    def alpha(self, t: Array) -> Array:
        t = self._time(t)
        xp = xp_of(t)
        value = xp.cos(self._theta(t)) / math.cos(self._theta(0.0))
        return xp.where(t == 1.0, xp.zeros_like(value), value)

    def sigma(self, t: Array) -> Array:
        # 1 - alpha^2 = sin(theta - theta0) sin(theta + theta0) / cos(theta0)^2: no cancellation near t = 0
        t = self._time(t)
        theta, theta0 = self._theta(t), self._theta(0.0)
        xp = xp_of(t)
        value = xp.sqrt(xp.sin(theta - theta0) * xp.sin(theta + theta0)) / math.cos(theta0)
        return xp.where(t == 1.0, xp.ones_like(value), value)

    def drift(self, t: Array) -> Array:
        t = self._time(t)
        xp = xp_of(t)
        value = -0.5 * math.pi / (1.0 + self.s) * xp.tan(self._theta(t))
        return xp.where(t == 1.0, xp.full_like(value, -math.inf), value)

    def diffusion2(self, t: Array) -> Array:
        return -2.0 * self.drift(t)

    def t_of(self, logsnr: Array) -> Array:
        logsnr = np.asarray(logsnr, np.float64)
        theta0 = self._theta(0.0)
        with np.errstate(over="ignore"):
            alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-logsnr)), 1.0 / np.sqrt(1.0 + np.exp(logsnr))
        sin2 = (sigma * math.cos(theta0)) ** 2 + math.sin(theta0) ** 2
        theta = np.arctan2(np.sqrt(sin2), alpha * math.cos(theta0))
        return theta * (1.0 + self.s) / (0.5 * math.pi) - self.s

    def t_start(self, prediction: str | object = "eps") -> float:
        return 0.9946 if prediction in ("eps", "score") else 1.0

    def t_end(self, steps: int) -> float:
        return 1.0 / steps


def dynamic_shift(
    tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """Flow's shift for a sequence of image tokens: e^mu, mu linear in their number.

        mu = base_shift + (max_shift - base_shift) (tokens - base_tokens) / (max_tokens - base_tokens)

    Args: tokens: (height / patch) (width / patch) of the latent; the defaults are those of FLUX.1.
    Raises: ValueError unless tokens > 0, base_tokens < max_tokens and the shift is finite.
    Source: Esser et al. 2024, arXiv:2403.03206.
    """
    positive(tokens=tokens, base_tokens=base_tokens, max_tokens=max_tokens)
    if base_tokens >= max_tokens:
        raise ValueError(f"base_tokens must be < max_tokens, got {base_tokens} and {max_tokens}")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    if not abs(mu) < 700:
        raise ValueError(f"the shift e^mu must be finite, got mu = {mu:g} of {base_shift=!r}, {max_shift=!r}")
    return math.exp(mu)
