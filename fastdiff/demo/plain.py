"""Textbook sampling loops in plain eager torch: what the demo's times and samples are compared with.

Each is written as its paper writes it, on the times and noise levels of a plan's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.plan import Plan
from fastdiff.schedules import Schedule

__all__ = ["LOOPS", "Trip", "trip"]

Tensor = torch.Tensor
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trip:
    """The grid of a loop: N evaluation points; alpha and sigma have one more entry, the clean end."""

    schedule: Schedule
    t: list[float]
    times: Tensor
    alpha: list[float]
    sigma: list[float]


def trip(plan: Plan, schedule: Schedule, *, per_step: int = 1, limit: int | None = None) -> Trip:
    """The grid that `plan` walks on, every `per_step` rows (2 for Heun); `limit` keeps the first points only."""
    pick = slice(None, None if limit is None else limit * per_step, per_step)
    kind = torch.float32 if np.issubdtype(plan.times.dtype, np.floating) else torch.int64
    ends = [np.append(a[pick], end).tolist() for a, end in zip((plan.alpha, plan.sigma), plan.end, strict=True)]
    return Trip(schedule, plan.t[pick].tolist(), torch.tensor(plan.times[pick], dtype=kind), *ends)


def _clean(x: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    return (x - sigma * eps) / alpha


def _call(model: Model, x: Tensor, go: Trip, i: int) -> Tensor:
    return model(x, go.times[i].expand(len(x)))


def ddim(model: Model, x: Tensor, go: Trip) -> Tensor:
    """DDIM with eta = 0, which is also Euler on the probability-flow ODE in sigma/alpha."""
    for i in range(len(go.t)):
        eps = _call(model, x, go, i)
        x0 = _clean(x, eps, go.alpha[i], go.sigma[i])
        x = go.alpha[i + 1] * x0 + go.sigma[i + 1] * eps
    return x


def ddpm(model: Model, x: Tensor, go: Trip) -> Tensor:
    """DDPM with the posterior variance, written with the beta of each step."""
    for i in range(len(go.t)):
        bar, bar_next = go.alpha[i] ** 2, go.alpha[i + 1] ** 2
        keep = bar / bar_next
        x0 = _clean(x, _call(model, x, go, i), go.alpha[i], go.sigma[i])
        mean = (math.sqrt(bar_next) * (1 - keep) * x0 + math.sqrt(keep) * (1 - bar_next) * x) / (1 - bar)
        noise = torch.randn_like(x)
        x = mean + math.sqrt((1 - bar_next) * (1 - keep) / (1 - bar)) * noise
    return x


def _reverse(model: Model, x: Tensor, go: Trip, *, noisy: bool) -> Tensor:
    for i in range(len(go.t)):
        eps = _call(model, x, go, i)
        if i + 1 == len(go.t):
            return _clean(x, eps, go.alpha[i], go.sigma[i])
        h = go.t[i] - go.t[i + 1]
        f, g2 = float(go.schedule.drift(go.t[i])), float(go.schedule.diffusion2(go.t[i]))
        score = -eps / go.sigma[i]
        x = x - h * (f * x - (1.0 if noisy else 0.5) * g2 * score)
        if noisy:
            x = x + math.sqrt(g2 * h) * torch.randn_like(x)
    return x


def euler_maruyama(model: Model, x: Tensor, go: Trip) -> Tensor:
    """Euler-Maruyama on the reverse-time SDE, with one denoising step at the end."""
    return _reverse(model, x, go, noisy=True)


def probability_flow(model: Model, x: Tensor, go: Trip) -> Tensor:
    """Euler in t on the probability-flow ODE, with one denoising step at the end."""
    return _reverse(model, x, go, noisy=False)


def heun(model: Model, x: Tensor, go: Trip) -> Tensor:
    """Heun on dy/dr = eps for y = x/alpha, r = sigma/alpha; plain Euler where r ends at 0."""
    y = x / go.alpha[0]
    for i in range(len(go.t)):
        r, r_next = go.sigma[i] / go.alpha[i], go.sigma[i + 1] / go.alpha[i + 1]
        slope = _call(model, go.alpha[i] * y, go, i)
        ahead = y + (r_next - r) * slope
        if r_next > 0 and i + 1 < len(go.t):
            slope = (slope + _call(model, go.alpha[i + 1] * ahead, go, i + 1)) / 2
            ahead = y + (r_next - r) * slope
        y = ahead
    return go.alpha[-1] * y


def dpmpp_2m(model: Model, x: Tensor, go: Trip) -> Tensor:
    """DPM-Solver++(2M): second order from the previous x0 prediction; first order at both ends."""
    before: Tensor | None = None
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(go.alpha, go.sigma, strict=True)]
    for i in range(len(go.t)):
        x0 = _clean(x, _call(model, x, go, i), go.alpha[i], go.sigma[i])
        h = lam[i + 1] - lam[i]
        target = x0
        if before is not None and math.isfinite(h):
            ratio = (lam[i] - lam[i - 1]) / h
            target = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
        x = go.sigma[i + 1] / go.sigma[i] * x - go.alpha[i + 1] * math.expm1(-h) * target
        before = x0
    return x


def bfn_continuous(model: Model, x: Tensor, go: Trip) -> Tensor:
    """The update of a continuous Bayesian flow network: mean mu and precision rho, a noisy message y a step."""
    rho = 1 / (1 - go.alpha[0])
    for i in range(len(go.t)):
        x0 = _clean(x, _call(model, x, go, i), go.alpha[i], go.sigma[i])
        if go.alpha[i + 1] == 1:
            return x0
        accuracy = 1 / (1 - go.alpha[i + 1]) - rho
        y = x0 + torch.randn_like(x) / math.sqrt(accuracy)
        x = (rho * x + accuracy * y) / (rho + accuracy)
        rho += accuracy
    return x


LOOPS: dict[str, Callable[[Model, Tensor, Trip], Tensor]] = {
    "bfn_continuous": bfn_continuous,
    "bfn_solver": dpmpp_2m,  # its flow of second order
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler": ddim,
    "euler_maruyama": euler_maruyama,
    "heun": heun,
    "probability_flow": probability_flow,
}
