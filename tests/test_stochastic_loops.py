"""Stochastic solvers against textbook loops, written from the papers' algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample

SHAPE = (2, 3, 4, 4)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + 0.1 * t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)))


def noises(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(count)]


def same(plan: Plan, x: Tensor, noise: list[Tensor], want: Tensor, net: Callable[..., Tensor] = model) -> None:
    source = iter(noise)
    got = reference_sample(net, plan, x, lambda k, like: next(source))
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-12


def at(t: float) -> Tensor:
    return torch.full((SHAPE[0],), t, dtype=torch.float64)


def test_annealed_langevin_is_the_textbook_loop() -> None:
    """Song and Ermon 2019, algorithm 1, then the denoising step."""
    levels, inner, eps = 6, 4, 2e-5
    n, start = noises(levels * inner), 10 * noises(1)[0]
    sigmas = np.geomspace(10, 0.01, levels)
    x, i = start, iter(n)
    for j, sigma in enumerate(sigmas):
        step = eps * sigma**2 / sigmas[-1] ** 2
        for _ in range(inner):
            x = x + step / 2 * model(x, at(1 - j / (levels - 1))) + math.sqrt(step) * next(i)
    want = x + sigmas[-1] ** 2 * model(x, at(0.0))
    schedule, options = S.VE(0.01, 10.0), {"inner": inner, "eps": eps, "prediction": "score"}
    plan = solvers.langevin(schedule, levels, **options)
    assert plan.nfe == levels * inner + 1 and plan.init_scale == pytest.approx(10)
    same(plan, start, n, want)
    plan = solvers.langevin(schedule, levels, denoise=False, **options)
    assert plan.nfe == levels * inner and plan.end == (1.0, pytest.approx(0.01))
    same(plan, start, n, x)


def test_reverse_diffusion_and_ancestral_are_the_textbook_predictors() -> None:
    """Song et al. 2021 on the DDPM chain and on the geometric one, every step; the last row returns x0."""
    T = 30
    betas, n, x_T = np.linspace(0.1 / T, 20 / T, T), noises(T), noises(1)[0]
    bars = np.cumprod(1 - betas)
    for solver in ("reverse_diffusion", "ancestral"):
        x = x_T
        for k, i in enumerate(range(T - 1, -1, -1)):
            score = model(x, at(i))
            if i == 0:
                x = (x + (1 - bars[0]) * score) / math.sqrt(bars[0])
            elif solver == "ancestral":
                x = (x + betas[i] * score) / math.sqrt(1 - betas[i]) + math.sqrt(betas[i]) * n[k]
            else:
                x = (2 - math.sqrt(1 - betas[i])) * x + betas[i] * score + math.sqrt(betas[i]) * n[k]
        same(getattr(solvers, solver)(S.Betas(betas), T, prediction="score"), x_T, n, x)
    sigmas = np.geomspace(50, 0.01, T)
    for solver in ("reverse_diffusion", "ancestral"):
        x = 50 * x_T
        for k, sigma in enumerate(sigmas):
            below = sigmas[k + 1] if k + 1 < T else 0.0
            gap = sigma**2 - below**2
            std = math.sqrt(gap) * (below / sigma if solver == "ancestral" else 1.0) * (below > 0)
            x = x + gap * model(x, at(1 - k / (T - 1))) + std * n[k]
        same(getattr(solvers, solver)(S.VE(0.01, 50.0), T, prediction="score"), 50 * x_T, n, x)


def test_consistency_is_the_textbook_loop() -> None:
    """Song et al. 2023, algorithm 1, with the network F behind the boundary condition."""
    sigmas, low, data, n, x_T = [80.0, 12.0, 1.5], 0.002, 0.5, noises(3), 80 * noises(1)[0]
    net = lambda x, t: torch.tanh(x + t.to(x.dtype).reshape(-1, 1, 1, 1))  # noqa: E731

    def f(x: Tensor, sigma: float) -> Tensor:
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        out = (sigma - low) * data / math.sqrt(sigma**2 + data**2)
        return skip * x + out * net(x / math.sqrt(sigma**2 + data**2), at(math.log(sigma) / 4))

    x = f(x_T, sigmas[0])
    for i, sigma in enumerate(sigmas[1:]):
        x = f(x + math.sqrt(sigma**2 - low**2) * n[i], sigma)
    schedule = S.EDM()
    times = schedule.t_of(-2 * np.log(sigmas))
    plan = solvers.consistency(schedule, 3, prediction="edm", spacing=np.clip(times, 0, 1))
    assert list(plan.draws) == [1, 1, 1] and list(solvers.consistency(schedule, 1).draws) == [0]
    same(plan, x_T, n, x, net)


def test_restart_is_the_textbook_loop() -> None:
    """Xu et al. 2023, algorithm 1: Heun, and K times noise up and Heun down at one level."""
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.1, 0.0]
    low, high, repeats, inner = 1.0, 6.0, 2, 3
    n, x_T = noises(repeats), 80 * noises(1)[0]

    def heun(x: Tensor, s: float, s1: float) -> Tensor:
        d = (x - model(x, at(s))) / s
        y = x + (s1 - s) * d
        return y if s1 == 0 else x + (s1 - s) * (d + (y - model(y, at(s1))) / s1) / 2

    x, source = x_T, iter(n)
    for s, s1 in zip(sigmas, sigmas[1:], strict=False):
        x = heun(x, s, s1)
        if s1 == low:
            ramp = (high ** (1 / 7) + np.linspace(0, 1, inner + 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
            for _ in range(repeats):
                x = x + math.sqrt(high**2 - low**2) * next(source)
                for u, v in zip(ramp, ramp[1:], strict=False):
                    x = heun(x, u, v)
    schedule = S.EDM(0.1, 80.0)
    times = np.clip(schedule.t_of(-2 * np.log(sigmas[:-1])), 0, 1)
    options = {"prediction": "x0", "spacing": times}
    plan = solvers.restart(schedule, 5, intervals=[(1.1, high, repeats, inner)], **options)
    assert plan.nfe == 9 + 2 * repeats * inner
    same(plan, x_T, n, x)
