"""The noised data set itself: its density at every time, its exact score, and the model that knows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from fastdiff.devices import has_float64, widest
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.prediction import PREDICTIONS, Prediction
from fastdiff.schedules import EDM, Flow, Schedule

__all__ = ["ideal_model", "log_density", "score"]

CHUNK = 1 << 22  # products of queries and data points held at a time
FLOATS = (torch.float32, torch.float64)
EXACT = 1e-10  # error of a logarithm from which the leading points' distances are taken from differences
LEADING = 50.0  # below the largest logarithm: e^-50 is nothing beside 1


def log_density(
    x: Tensor, data: Tensor, t: float | Tensor, schedule: Schedule, *, weights: Tensor | None = None
) -> Tensor:
    """ln q_t(x) of an empirical data set: a mixture of one Gaussian a data point, summed in log space.

        q_t(x) = sum_i w_i N(x; alpha x_i, sigma^2 I)

    Args:    x: [M, *sample], the points (of a grid, say).   data: [N, *sample].   t: schedule time, a number or [M].
             weights: [N] > 0, normalised here; default equal.
    Returns: [M] float64 (fp32 on a device without float64), in nats; finite however far x lies.
    Raises:  TypeError, ValueError for shapes and dtypes that do not fit, t outside the schedule, sigma(t) = 0.
    """
    mixture = _Mixture(data, weights)
    alpha, sigma = _levels(schedule, t, x)
    total, _ = mixture(mixture.seen(x), alpha, sigma)
    n = mixture.points.shape[1]
    return _back(total - n * (torch.log(sigma) + 0.5 * math.log(2 * math.pi)), x)


def score(x: Tensor, data: Tensor, t: float | Tensor, schedule: Schedule, *, weights: Tensor | None = None) -> Tensor:
    """grad_x ln q_t(x) = (alpha E[x0 | x] - x) / sigma^2: [M, *sample].   Args, dtype, Raises: as `log_density`."""
    alpha, sigma = _levels(schedule, t, x)
    mixture = _Mixture(data, weights)
    flat = mixture.seen(x)
    _, mean = mixture(flat, alpha, sigma)
    # from the centre of the data, as the mixture itself: an offset costs no digits
    away = flat - alpha[:, None] * mixture.centre
    return _back(((alpha[:, None] * (mean - mixture.centre) - away) / sigma[:, None] ** 2).view(x.shape), x)


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
    Returns: model(x, t): x [B, *sample], t the plan's model time, a number or [B] -> [B, *sample] of x's dtype. It
             reads t on the host, so it cannot be captured into a CUDA graph.
    Raises:  TypeError, ValueError for bad data, an unknown prediction, a sign that is not +-1 or a sigma_data <= 0;
             the model for another shape of x or t, or a t outside the schedule.
    Numerics: float64 (on the host for a device that has none), in chunks: memory does not grow with the data set beyond
             its own copy. Where sigma is 0, x0-hat is the nearest data point, and what is divided by sigma is 0 on that
             point, infinite off it: the limit.
    Source:  Karras et al. 2022, arXiv:2206.00364, appendix B.3.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be one of fastdiff.schedules, got {type(schedule).__name__}")
    if not callable(prediction) and prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}, or a function")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    if sigma_data is None:
        sigma_data = schedule.sigma_data if isinstance(schedule, EDM) else 0.5
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, Real) or not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data must be None or a finite number > 0, got {sigma_data!r}")
    mixture, std = _Mixture(data, weights), float(sigma_data)

    def model(x: Tensor, t: float | Tensor) -> Tensor:
        check_tensor("x", x, dtypes=FLOATS64)
        check_batched("x", x)
        flat = mixture.seen(x)
        a, s = (v[:, None].to(flat.device) for v in _model_levels(schedule, t, len(x), prediction))
        if prediction == "edm":  # the network is shown c_in x
            flat = flat * a * torch.sqrt((s / a) ** 2 + std**2)
        x0 = mixture(flat, a[:, 0], s[:, 0])[1]
        blank = (a == 0) & (s == 0)
        rounding = 4 * torch.finfo(torch.float64).eps * (flat.abs() + (a * mixture.centre).abs())
        eps = torch.where(blank, 0.0, _over(flat - a * x0, s, rounding))
        if callable(prediction):
            levels = (v[:, 0].cpu().numpy() for v in (a, s))
            skip, out = (torch.as_tensor(np.asarray(c, np.float64)).to(flat.device) for c in prediction(*levels))
            m = _over(x0 - skip.view(-1, 1) * flat, out.view(-1, 1), rounding)
        elif prediction == "edm":
            r2 = (s / a) ** 2 + std**2
            m = _over((x0 - std**2 / r2 * flat / a) * torch.sqrt(r2), s / a * std, rounding)
        else:
            m = {
                "eps": eps, "x0": x0, "v": torch.where(blank, -x0, (a * eps - s * x0) / torch.hypot(a, s)),
                "score": _over(-eps, s), "flow": eps - x0,
            }[prediction]  # fmt: skip
        return (sign * m).view(x.shape).to(x.dtype).to(x.device)

    return model


def _home(v: Tensor) -> Tensor:
    """Where float64 is: on the host, for a device that has none."""
    return v if has_float64(v.device) else v.cpu()


def _back(v: Tensor, x: Tensor) -> Tensor:
    return v.to(widest(x.device)).to(x.device)


def _over(a: Tensor, b: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """a / b, and 0 where both are, a to rounding."""
    return torch.where((b == 0) & (a.abs() <= rounding), 0.0, a / b)


class _Mixture:
    """ln sum_i w_i exp(-|x - alpha x_i|^2 / (2 sigma^2)) and the mean of x_i under it, some points at a time.

    Distances are |q|^2 - 2 q y + |y|^2 of q = x - alpha c and y = alpha (x_i - c), c the data's mean: one product of
    matrices. Where that loses digits the leading points' are summed from the differences q - y.
    """

    def __init__(self, data: Tensor, weights: Tensor | None) -> None:
        check_tensor("data", data, dtypes=FLOATS)
        if data.dim() < 2 or data.shape[0] < 1:
            raise ValueError(f"data must be [N, *sample] with N >= 1, got {tuple(data.shape)}")
        self.sample, self.device = tuple(data.shape[1:]), data.device
        points = _home(data).flatten(1).double()
        self.centre = points.mean(0)
        self.points = points - self.centre
        self.half = 0.5 * self.points.square().sum(1)
        if weights is None:
            self.log_weights = torch.full_like(self.half, -math.log(len(data)))
        else:
            check_tensor("weights", weights, shape=(len(data),), dtypes=FLOATS, like=data)
            if not bool(((weights > 0) & weights.isfinite()).all()):
                raise ValueError("weights must be finite and > 0")
            wide = _home(weights).double()
            self.log_weights = torch.log(wide / wide.sum())
        self.spread = self.log_weights.max() - self.log_weights.min()

    def seen(self, x: Tensor) -> Tensor:
        """x [M, *sample], checked, as float64 [M, n] where the data are."""
        if tuple(x.shape[1:]) != self.sample:
            raise ValueError(f"x must be [M, {', '.join(map(str, self.sample))}], got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x must be on the data's device, {self.device}, got {x.device}")
        return _home(x).flatten(1).double()

    def __call__(self, flat: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        totals, means = [], []
        rows = max(1, CHUNK // len(self.points))
        for q, a, s in zip(flat.split(rows), alpha[:, None].split(rows), sigma[:, None].split(rows), strict=True):
            part = self._logarithms(q - a * self.centre, a, s)
            means.append(self.centre + torch.softmax(part, 1) @ self.points)
            totals.append(torch.logsumexp(part, 1))
        return torch.cat(totals), torch.cat(means)

    def _logarithms(self, q: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """ln w_i - |q - a points_i|^2 / (2 s^2) [M, N] of q [M, n], a and s [M, 1]."""
        half = 0.5 * q.square().sum(1, keepdim=True)
        apart = half - a * (q @ self.points.T) + a**2 * self.half
        lost = 4 * torch.finfo(torch.float64).eps * (half + a**2 * self.half.max())  # of apart, to rounding
        known = torch.where((a == 0) & (s == 0), math.inf, s**2)  # a flow's start: nothing is known
        if bool((lost > EXACT * known).any()):
            apart = self._from_differences(q, a, apart, 2 * lost + (LEADING + self.spread) * known)
        clean = known == 0
        if bool(clean.any()):  # the limit: the nearest alone
            apart = torch.where(clean, torch.where(apart > apart.amin(1, keepdim=True), math.inf, 0.0), apart)
            known = torch.where(clean, 1.0, known)
        return self.log_weights - apart / known

    def _from_differences(self, q: Tensor, a: Tensor, apart: Tensor, margin: Tensor) -> Tensor:
        """apart with those within `margin` of the least made again, some points at a time."""
        with torch.no_grad():
            count = int((apart <= apart.amin(1, keepdim=True) + margin).sum(1).max())
            leading = apart.topk(count, 1, largest=False).indices
        width = max(1, CHUNK // max(1, q.numel()))
        made = [0.5 * (q[:, None] - a[..., None] * self.points[at]).square().sum(2) for at in leading.split(width, 1)]
        return apart.scatter(1, leading, torch.cat(made, 1))


def _levels(schedule: Schedule, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma [M] float64 at schedule times, sigma > 0, where x's float64 is."""
    check_tensor("x", x, dtypes=FLOATS)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be one of fastdiff.schedules, got {type(schedule).__name__}")
    check_batched("x", x)
    home = x.device if has_float64(x.device) else "cpu"
    given = t.to(home) if isinstance(t, Tensor) else t
    at = torch.as_tensor(given, dtype=torch.float64, device=home).reshape(-1)
    if at.numel() not in (1, len(x)):
        raise ValueError(f"t must be a number or have shape ({len(x)},), got {tuple(at.shape)}")
    alpha, sigma = (v.expand(len(x)) for v in schedule.alpha_sigma(at))
    if not bool((sigma > 0).all()):
        raise ValueError("the density of the data itself (sigma = 0) is a sum of points; give a t with noise")
    return alpha, sigma


def _model_levels(
    schedule: Schedule, t: float | Tensor, batch: int, prediction: Prediction
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """alpha, sigma [B] float64 on the host from what the model receives as t; of edm, whose x is c_in x, 1 and r."""
    if isinstance(t, bool) or not isinstance(t, Real | Tensor):
        raise TypeError(f"t must be a number or a tensor [B], got {type(t).__name__}")
    given = t.detach().cpu() if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    if given.dim() > 1 or given.numel() not in (1, batch):
        raise ValueError(f"t must be a number or have shape ({batch},), got {tuple(given.shape)}")
    at = given.double().expand(batch)
    if prediction == "edm":  # whatever the schedule: t = ln(sigma / alpha) / 4
        return torch.ones_like(at), _inside(torch.exp(4 * at), math.inf, given, schedule)
    if isinstance(schedule, EDM):  # its stochastic sampler goes beyond sigma_max
        return torch.ones_like(at), _inside(at, math.inf, given, schedule)
    if isinstance(schedule, Flow):
        at = _inside(at, 1.0, given, schedule)
        return 1 - at, at
    backwards = float(np.asarray(schedule.model_time(0.0))) == 1.0  # Bayesian flow networks count from noise to data
    return schedule.alpha_sigma(_inside(1 - at if backwards else at, schedule.t_max, given, schedule))


def _inside(at: Tensor, largest: float, given: Tensor, schedule: Schedule) -> Tensor:
    """at in [0, largest], from which rounding to the dtype of `given` may have moved it."""
    slack = 2 * torch.finfo(given.dtype).eps * largest if given.dtype.is_floating_point and largest < math.inf else 0.0
    if not bool(((at >= -slack) & (at <= largest + slack)).all()) or bool(at.isinf().any()):
        raise ValueError(f"t must be a model time of {schedule}, got {given.min().item():g}..{given.max().item():g}")
    return at.clamp(0, largest)
