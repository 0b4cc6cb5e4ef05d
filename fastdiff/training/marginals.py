"""The noised data set itself: its density at every time, its exact score, and the model that knows it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops._dispatch import check_tensor
from fastdiff.prediction import PREDICTIONS, Prediction
from fastdiff.schedules import EDM, Flow, Schedule

__all__ = ["ideal_model", "log_density", "score"]

CHUNK = 1 << 22  # products of queries and data points held at a time
FLOATS = (torch.float32, torch.float64)


def log_density(
    x: Tensor, data: Tensor, t: float | Tensor, schedule: Schedule, *, weights: Tensor | None = None
) -> Tensor:
    """ln q_t(x) of an empirical data set: a mixture of one Gaussian a data point, summed in log space.

        q_t(x) = sum_i w_i N(x; alpha x_i, sigma^2 I)

    Args:    x: [M, *sample], the points (of a grid, say).   data: [N, *sample].   t: schedule time, a number or [M].
             weights: [N] > 0, normalised here; default equal.
    Returns: [M] float64, in nats; finite however far x lies.
    Raises:  TypeError, ValueError for shapes and dtypes that do not fit, t outside the schedule, sigma(t) = 0.
    """
    mixture = _Mixture(data, weights)
    alpha, sigma = _levels(schedule, t, x)
    total, _ = mixture(x, alpha, sigma)
    n = mixture.points.shape[1]
    return total - n * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))


def score(x: Tensor, data: Tensor, t: float | Tensor, schedule: Schedule, *, weights: Tensor | None = None) -> Tensor:
    """grad_x ln q_t(x) = (alpha E[x0 | x] - x) / sigma^2: [M, *sample] float64.   Args, Raises: as `log_density`."""
    alpha, sigma = _levels(schedule, t, x)
    _, mean = _Mixture(data, weights)(x, alpha, sigma)
    flat = (alpha[:, None] * mean - x.flatten(1).double()) / sigma[:, None] ** 2
    return flat.view(x.shape)


def ideal_model(
    data: Tensor,
    schedule: Schedule,
    prediction: Prediction = "eps",
    *,
    weights: Tensor | None = None,
    sigma_data: float | None = None,
    sign: int = 1,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible model of an empirical data set, ready to be sampled: what a perfect network would return.

        x0-hat = E[x0 | x_t] = sum_i x_i softmax_i(ln w_i - |x - alpha x_i|^2 / (2 sigma^2))

    Sampled to the end it returns data points, so it tests samplers and schedules, and shows what a network adds.
    Args:    data: [N, *sample].   schedule: the plan's.   prediction, sigma_data, sign: as the plan's.   weights: [N].
    Returns: model(x, t): x [B, *sample], t [B] the plan's model time -> [B, *sample] of x's dtype. It reads t on the
             host, so it cannot be captured into a CUDA graph.
    Raises:  TypeError, ValueError for bad data, an unknown prediction or a sign that is not +-1.
    Numerics: float64, in chunks: memory does not grow with the data set beyond its own copy.
    Source:  Karras et al. 2022, arXiv:2206.00364, appendix B.3.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be one of fastdiff.schedules, got {type(schedule).__name__}")
    if not callable(prediction) and prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}, or a function")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    mixture = _Mixture(data, weights)
    std = sigma_data or (schedule.sigma_data if isinstance(schedule, EDM) else 0.5)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a, s = (v[:, None].to(x.device) for v in _model_levels(schedule, t, prediction))
        flat = x.flatten(1).double()
        if prediction == "edm":  # the network is shown c_in x
            flat = flat * a * torch.sqrt((s / a) ** 2 + std**2)
        x0 = mixture(flat.view(x.shape), a[:, 0], s[:, 0])[1]
        blank = (a == 0) & (s == 0)
        eps = torch.where(blank, 0.0, (flat - a * x0) / s)
        if callable(prediction):
            levels = (v[:, 0].cpu().numpy() for v in (a, s))
            skip, out = (torch.as_tensor(np.asarray(c, np.float64)).to(x.device) for c in prediction(*levels))
            m = (x0 - skip.view(-1, 1) * flat) / out.view(-1, 1)
        elif prediction == "edm":
            r2 = (s / a) ** 2 + std**2
            m = (x0 - std**2 / r2 * flat / a) * torch.sqrt(r2) / (s / a * std)
        else:
            m = {
                "eps": eps, "x0": x0, "v": torch.where(blank, -x0, (a * eps - s * x0) / torch.hypot(a, s)),
                "score": -eps / s, "flow": eps - x0,
            }[prediction]  # fmt: skip
        return (sign * m).view(x.shape).to(x.dtype)

    return model


class _Mixture:
    """ln sum_i w_i exp(-|x - alpha x_i|^2 / (2 sigma^2)) and the mean of x_i under it, some points at a time."""

    def __init__(self, data: Tensor, weights: Tensor | None) -> None:
        check_tensor("data", data, dtypes=FLOATS)
        if data.dim() < 2 or data.shape[0] < 1:
            raise ValueError(f"data must be [N, *sample] with N >= 1, got {tuple(data.shape)}")
        self.sample = tuple(data.shape[1:])
        self.points = data.flatten(1).double()
        self.half = 0.5 * self.points.square().sum(1)
        if weights is None:
            self.log_weights = torch.full_like(self.half, -math.log(len(data)))
        else:
            check_tensor("weights", weights, shape=(len(data),), dtypes=FLOATS, like=data)
            if not bool((weights > 0).all()):
                raise ValueError("weights must be > 0")
            self.log_weights = torch.log(weights.double() / weights.double().sum())

    def __call__(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != self.sample:
            raise ValueError(f"x must be [M, {', '.join(map(str, self.sample))}], got {tuple(x.shape)}")
        if x.device != self.points.device:
            raise ValueError(f"x must be on the data's device, {self.points.device}, got {x.device}")
        flat = x.flatten(1).double()
        totals, means = [], []
        rows = max(1, CHUNK // len(self.points))
        for q, a, s in zip(flat.split(rows), alpha.split(rows), sigma.split(rows), strict=True):
            inverse = torch.where((a == 0) & (s == 0), 0.0, 1 / s**2)[:, None]  # a flow's start: nothing is known
            part = self.log_weights + inverse * (a[:, None] * (q @ self.points.T) - a[:, None] ** 2 * self.half)
            total = torch.logsumexp(part, 1)
            means.append(torch.exp(part - total[:, None]) @ self.points)
            totals.append(total - 0.5 * inverse[:, 0] * q.square().sum(1))
        return torch.cat(totals), torch.cat(means)


def _levels(schedule: Schedule, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma [M] float64 at schedule times, sigma > 0."""
    check_tensor("x", x, dtypes=FLOATS)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be one of fastdiff.schedules, got {type(schedule).__name__}")
    at = torch.as_tensor(t, dtype=torch.float64, device=x.device).reshape(-1)
    if at.numel() not in (1, len(x)):
        raise ValueError(f"t must be a number or have shape ({len(x)},), got {tuple(at.shape)}")
    alpha, sigma = (v.expand(len(x)) for v in schedule.alpha_sigma(at))
    if not bool((sigma > 0).all()):
        raise ValueError("the density of the data itself (sigma = 0) is a sum of points; give a t with noise")
    return alpha, sigma


def _model_levels(schedule: Schedule, t: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """alpha, sigma [B] float64 on the host from what the model receives as t; of edm, whose x is c_in x, 1 and r."""
    at = t.detach().cpu().double()
    if prediction == "edm":  # whatever the schedule: t = ln(sigma / alpha) / 4
        return torch.ones_like(at), torch.exp(4 * at)
    if isinstance(schedule, Flow):
        return 1 - at, at
    if isinstance(schedule, EDM):
        return torch.ones_like(at), at
    backwards = float(np.asarray(schedule.model_time(0.0))) == 1.0  # Bayesian flow networks count from noise to data
    at = (1 - at if backwards else at).clamp(0, schedule.t_max)
    return schedule.alpha_sigma(at)
