"""Loss weights: defined on the squared error of x0, converted to the training target without dividing 0 by 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.devices import widest
from fastdiff.schedules import BFNContinuous, BFNDiscrete, Schedule

__all__ = ["WEIGHTINGS", "WeightOptions", "target_weight"]


class WeightOptions(NamedTuple):
    """gamma: of min_snr. p2_k, p2_gamma: of p2. sigma_data: std of the data, of edm."""

    gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    sigma_data: float = 0.5


class _Level(NamedTuple):
    """A noise level in units z of the target: signal = alpha^2 / z, noise = sigma^2 / z, rate = g^2 / sigma^2."""

    signal: Tensor
    noise: Tensor
    rate: Callable[[], Tensor]


def _p2(level: _Level, o: WeightOptions) -> Tensor:
    s, n = level.signal, level.noise  # s / (k + s / n)^p, in n / s where s is the larger, so that neither end is 0 / 0
    low = s / (o.p2_k + s / n) ** o.p2_gamma if o.p2_k else s ** (1 - o.p2_gamma) * n**o.p2_gamma
    high = s ** (1 - o.p2_gamma) * (n / (o.p2_k * (n / s) + 1)) ** o.p2_gamma
    return torch.where(s < n, low, high)


# each returns w sigma^2 / z for the weight w of the x0 loss: homogeneous, so z may be any scale
WEIGHTINGS: dict[str, Callable[[_Level, WeightOptions], Tensor]] = {
    "snr": lambda v, o: v.signal,
    "min_snr": lambda v, o: torch.minimum(v.signal, o.gamma * v.noise),
    "truncated_snr": lambda v, o: torch.maximum(v.signal, v.noise),
    "edm": lambda v, o: v.signal + v.noise / o.sigma_data**2,
    "sigma2": lambda v, o: v.signal,
    "likelihood": lambda v, o: torch.where(v.signal == 0, 0.0, v.signal * v.rate()),  # where rate is infinite
    "p2": _p2,
}


def target_weight(name: str | None, target: str, schedule: Schedule, t: Tensor, options: WeightOptions) -> Tensor:
    """The weight of a target's squared error at times t, [B] float64.

        w_target = w (dx0 / dtarget)^2:   eps: w / SNR;   x0: w;   v: w / (SNR + 1);
        score: w sigma^2 / SNR;   flow: w / (1 + sqrt(SNR))^2,   SNR = alpha^2 / sigma^2

    Args:    name: None (1, on the target itself) or one of WEIGHTINGS.   target: eps, x0, v, score or flow.
    Numerics: at t = 1 of a Bayesian flow, where SNR is 0 / 0, the weight just before: its limit, to fp32's rounding.
    """
    if name is None:
        return torch.ones_like(t, dtype=widest(t.device))
    if isinstance(schedule, BFNContinuous | BFNDiscrete):
        wide = widest(t.device)
        t = t.to(wide).clamp(max=1.0 - torch.finfo(wide).eps / 2)  # the time before 1, where alpha = sigma = 0
    a, s = schedule.alpha_sigma(t)
    a2, s2 = a * a, s * s

    def rate() -> Tensor:
        return schedule.diffusion2(t) / s2

    if target in ("eps", "score"):
        level = _Level(torch.ones_like(a2), s2 / a2, rate)
    elif target == "x0":
        level = _Level(a2 / s2, torch.ones_like(s2), rate)
    else:
        z = a2 + s2 if target == "v" else (a + s) ** 2
        level = _Level(a2 / z, s2 / z, rate)
    weight = WEIGHTINGS[name](level, options)
    return s2 * weight if target == "score" else weight
