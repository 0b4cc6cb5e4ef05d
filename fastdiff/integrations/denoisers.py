"""Between a model of this library, model(x, t), and k-diffusion's denoiser, denoiser(y, sigma) -> x0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops._dispatch import spread
from fastdiff.prediction import Prediction, conversion
from fastdiff.schedules import Schedule

__all__ = ["from_denoiser", "to_denoiser"]

KNOWN = 4096  # levels kept; a loop asks for few, a training run for ever new ones


class _At:
    """alpha, model time and conversion at noise levels sigma / alpha, kept per level: a loop asks for few of them."""

    def __init__(self, schedule: Schedule, prediction: Prediction, sign: int) -> None:
        self.schedule, self.prediction, self.sign = schedule, prediction, sign
        self.known: dict[tuple[float, ...], tuple[Tensor, ...]] = {}

    def __call__(self, level: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """[B] each: model time, alpha, c_skip, c_out."""
        values = tuple(level.detach().double().reshape(-1).tolist())
        if values not in self.known:
            t = np.clip(self.schedule.t_of(-2 * np.log(np.array(values))), 0, self.schedule.t_max)
            alpha, sigma = _at_level(*self.schedule.alpha_sigma(t), np.array(values))
            c = conversion(self.prediction, alpha, sigma, sigma_data=0.5, sign=self.sign)
            time = np.asarray(self.schedule.model_time(t))
            told = torch.from_numpy(time if np.issubdtype(time.dtype, np.integer) else time.astype(np.float32))
            rest = (torch.from_numpy(np.asarray(v, np.float32)) for v in (alpha, c.c_skip, c.c_out))
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[values] = (told, *rest)
        told, *others = self.known[values]
        return told.to(device, copy=True), *(v.to(device) for v in others)  # a network may change its time in place


def _at_level(alpha: np.ndarray, sigma: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha, sigma with sigma = level alpha also outside of the schedule, where x keeps the size it has at the end."""
    with np.errstate(invalid="ignore"):
        outside = np.isfinite(level) & ~np.isclose(sigma, alpha * level, rtol=1e-6, atol=0)
        near = np.where(outside, np.hypot(alpha, sigma) / np.hypot(1, level), alpha)
        return near, np.where(outside, near * level, sigma)


def to_denoiser(
    model: Callable[..., Tensor], schedule: Schedule, *, prediction: Prediction = "eps", sign: int = 1
) -> Callable[..., Tensor]:
    """A k-diffusion denoiser made of model(x, t, **cond).

        D(y, sigma) = c_skip alpha y + c_out model(alpha y, t),   sigma(t) / alpha(t) = sigma,   x = alpha y

    Args: model: predicts `prediction` (not edm) at x = alpha x0 + sigma eps. sign: -1 where it returns minus that.
        A level outside of the schedule has the time of its nearest end, and x the size it has there.
    Returns: denoiser(y, sigma, **cond) -> x0, sigma a number or [B]. It reads sigma on the host in every call.
    """
    at = _At(schedule, prediction, sign)

    def denoiser(y: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        t, alpha, c_skip, c_out = at(torch.as_tensor(sigma).expand(y.shape[0]), y.device)
        x = (spread(alpha, y) * y.float()).to(y.dtype)
        m = model(x, t, **cond)
        return (spread(c_skip, y) * x.float() + spread(c_out, y) * m.float()).to(y.dtype)

    return denoiser


def from_denoiser(
    denoiser: Callable[..., Tensor], schedule: Schedule, *, prediction: Prediction = "eps", sign: int = 1
) -> Callable[..., Tensor]:
    """A model(x, t, **cond) of this library made of a k-diffusion denoiser.

        model(x, t) = (D(x / alpha, sigma / alpha) - c_skip x) / c_out

    Args: denoiser: D(y, sigma [B], **cond) -> x0. prediction: what the model is to predict.
    Returns: model(x, t [B], **cond), t as plans of the schedule pass it.
    Raises: ValueError: the prediction does not depend on the model's output there (alpha = 0 with x0 ...).
    """

    def model(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        times = schedule.time_of_model(t.detach().double().cpu().numpy())
        alpha, sigma = schedule.alpha_sigma(times)
        if np.any(alpha == 0):
            raise ValueError(f"a denoiser has no level without signal (alpha = 0 at t = {times[alpha == 0][0]:g})")
        c = conversion(prediction, alpha, sigma, sigma_data=0.5, sign=sign)
        values = (alpha, sigma / alpha, c.c_skip, c.c_out)
        a, level, c_skip, c_out = (torch.from_numpy(np.asarray(v, np.float32)).to(x.device) for v in values)
        x0 = denoiser((x.float() / spread(a, x)).to(x.dtype), level.to(x.dtype), **cond)
        return ((x0.float() - spread(c_skip, x) * x.float()) / spread(c_out, x)).to(x.dtype)

    return model
