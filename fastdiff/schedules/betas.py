"""Discrete chains: Betas and the functions that make them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fastdiff.lasting import lasting, traced_constant
from fastdiff.schedules.base import Array, Schedule, positive, quiet, xp_of


class Betas(Schedule):
    """A discrete DDPM chain given by its betas; t is an index 0..T-1.

        alpha_bar_t = prod_{i<=t} (1 - beta_i),  alpha = sqrt(alpha_bar),  sigma = sqrt(1 - alpha_bar)

    Between indices (float t) ln(sigma / alpha) is linear; f and g^2 are that interpolant's (at an index: of the
    interval below it).
    Args: betas: [T] in (0, 1]; 1 (zero terminal SNR) is allowed as the last one only.
    Raises: ValueError for NaN, values outside (0, 1], or 1 before the last.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """

    def __init__(self, betas: Sequence[float] | np.ndarray | torch.Tensor) -> None:
        host = betas.detach().cpu().double().numpy() if isinstance(betas, torch.Tensor) else betas
        values = np.array(host, np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"betas must be a non-empty 1-D array, got shape {values.shape}")
        outside = ~((values > 0) & (values <= 1))
        if np.any(outside):
            i = int(np.flatnonzero(outside)[0])
            raise ValueError(f"betas must be in (0, 1], got betas[{i}] = {values[i]}")
        if np.any(values[:-1] == 1):
            i = int(np.flatnonzero(values[:-1] == 1)[0])
            raise ValueError(f"beta = 1 is allowed as the last beta only, got betas[{i}] = 1 of {len(values)}")
        values.setflags(write=False)
        self.betas = values
        self.t_max = float(len(values) - 1)
        with np.errstate(divide="ignore"):
            log_alpha_bar = np.cumsum(np.log1p(-values))
            self._alpha = np.exp(0.5 * log_alpha_bar)
            self._sigma = np.sqrt(-np.expm1(log_alpha_bar))
            self._ell = np.log(self._sigma) - 0.5 * log_alpha_bar  # ln(sigma / alpha)

    @property
    def alpha_bar(self) -> np.ndarray:
        """[T] float64: alpha(t)^2, the cumulative product of 1 - beta."""
        return self._alpha**2

    def __repr__(self) -> str:
        return f"Betas(T={len(self.betas)}, {self.betas[0]:.3g}..{self.betas[-1]:.3g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Betas) and np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())

    def _lookup(self, t: Array) -> tuple[Array, Array]:
        t = self._time(t)
        alpha: Array
        sigma: Array
        ell: Array
        if isinstance(t, torch.Tensor):
            alpha, sigma, ell = _table(self, t.device)
            low = t.floor().clamp(0, max(self.t_max - 1, 0)).long()
        else:
            alpha, sigma, ell = self._alpha, self._sigma, self._ell
            low = np.clip(np.floor(t), 0, max(self.t_max - 1, 0)).astype(np.int64)
        xp = xp_of(t)
        near = xp.round(t).long() if xp is torch else np.round(t).astype(np.int64)
        high = (low + 1).clip(0, int(self.t_max))
        exact = t == near
        with quiet(t):
            between = ell[low] + (t - low) * (ell[high] - ell[low])
            a, s = 1.0 / xp.sqrt(1.0 + xp.exp(2.0 * between)), 1.0 / xp.sqrt(1.0 + xp.exp(-2.0 * between))
        return xp.where(exact, alpha[near], a), xp.where(exact, sigma[near], s)

    def alpha(self, t: Array) -> Array:
        return self._lookup(t)[0]

    def sigma(self, t: Array) -> Array:
        return self._lookup(t)[1]

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        return self._lookup(t)

    def drift(self, t: Array) -> Array:
        return -0.5 * self.diffusion2(t)

    def diffusion2(self, t: Array) -> Array:
        if self.t_max == 0:
            raise ValueError("a chain of one beta has no continuous drift and diffusion")
        sigma, t = self.sigma(t), self._time(t)
        if isinstance(t, torch.Tensor):
            ell = _table(self, t.device)[2]
            low = (t.ceil() - 1).clamp(0).long()
        else:
            ell = self._ell
            low = np.clip(np.ceil(t) - 1, 0, None).astype(np.int64)
        return 2.0 * sigma**2 * (ell[low + 1] - ell[low])

    def t_of(self, logsnr: Array) -> Array:
        ell = -0.5 * np.asarray(logsnr, np.float64)
        finite = self._ell[np.isfinite(self._ell)]
        return np.where(np.isposinf(ell), self.t_max, np.interp(ell, finite, np.arange(len(finite), dtype=np.float64)))

    def model_time(self, t: Array) -> Array:
        at = self._time(t)
        if isinstance(t, torch.Tensor):
            return t
        return at.astype(np.int64) if np.all(at == np.round(at)) else at


@traced_constant
def _table(chain: Betas, device: torch.device) -> torch.Tensor:
    """alpha, sigma and ln(sigma / alpha) as [3, T] on a device, made once; compiled code holds it as a constant."""
    cache = chain.__dict__.setdefault("_tables", {})
    if device not in cache:
        with lasting():
            cache[device] = torch.from_numpy(np.stack([chain._alpha, chain._sigma, chain._ell])).to(device)
    return cache[device]


def _count(T: int) -> None:
    if not isinstance(T, int | np.integer) or isinstance(T, bool) or T < 1:
        raise ValueError(f"T, the number of betas, must be an integer >= 1, got {T!r}")


def linear_betas(T: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """[T] betas spaced linearly from start to end (Ho et al. 2020, section 4)."""
    _count(T)
    return np.linspace(start, end, T, dtype=np.float64)


def scaled_linear_betas(T: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """[T] betas whose square roots are spaced linearly (latent diffusion; Rombach et al. 2022)."""
    _count(T)
    positive(start=start, end=end)
    return np.linspace(math.sqrt(start), math.sqrt(end), T, dtype=np.float64) ** 2


def cosine_betas(T: int, max_beta: float = 0.999, s: float = 0.008) -> np.ndarray:
    """[T] betas of the cosine alpha_bar, clipped at max_beta.

        beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta)

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    _count(T)
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta must be in (0, 1], got {max_beta!r}")
    if not 0 <= s < math.inf:
        raise ValueError(f"s must be a finite number >= 0, got {s!r}")
    alpha_bar = np.cos((np.arange(T + 1) / T + s) / (1 + s) * (0.5 * math.pi)) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def constant_betas(T: int, beta: float) -> np.ndarray:
    """[T] equal betas."""
    _count(T)
    return np.full(T, beta, dtype=np.float64)


def sigmoid_betas(T: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """[T] betas along a sigmoid of linspace(-6, 6), from about start to about end (GeoDiff; Xu et al. 2022)."""
    _count(T)
    return start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, T)))


def _of_alpha_bar(T: int, log_alpha_bar: np.ndarray, max_beta: float) -> np.ndarray:
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta must be in (0, 1], got {max_beta!r}")
    return np.minimum(-np.expm1(np.diff(log_alpha_bar)), max_beta)


def laplace_betas(T: int, max_beta: float = 0.999) -> np.ndarray:
    """[T] betas of diffusers' "laplace" alpha_bar, clipped at max_beta.

        alpha_bar(t) = (1 + e^-l)^(-1/2),   l(t) = -sign(1/2 - t) ln(1 - 2 |1/2 - t| + 1e-6) / 2

    The paper has l = logsnr, hence the square of this alpha_bar; kept, as models were trained on these betas.
    Source: Hang et al. 2024, arXiv:2407.03297, table 1.
    """
    _count(T)
    t = 0.5 - np.arange(T + 1) / T
    level = -0.5 * np.where(t >= 0, 1.0, -1.0) * np.log(1.0 - 2.0 * np.abs(t) + 1e-6)
    return _of_alpha_bar(T, -0.5 * np.log1p(np.exp(-level)), max_beta)


def exp_betas(T: int, rate: float = 12.0, max_beta: float = 0.999) -> np.ndarray:
    """[T] betas of alpha_bar(t) = e^(-rate t), clipped at max_beta: all equal."""
    _count(T)
    positive(rate=rate)
    return _of_alpha_bar(T, -rate * np.arange(T + 1) / T, max_beta)


def zero_terminal_snr(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """[T] betas whose last level has no signal: alpha shifted to 0 there and rescaled to its old first value.

        alpha' = (alpha - alpha_T) alpha_1 / (alpha_1 - alpha_T),   so the last beta is 1

    Raises: ValueError for fewer than two betas, or what Betas refuses.
    Source: Lin et al. 2024, arXiv:2305.08891, algorithm 1.
    """
    alpha = np.sqrt(Betas(betas).alpha_bar)
    if len(alpha) < 2:
        raise ValueError("zero_terminal_snr needs at least two betas")
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return 1.0 - np.append(alpha[0], alpha[1:] / alpha[:-1]) ** 2
