"""Schedulers whose noise is a Brownian tree: stock's own tree, or Philox normals of one path."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd

pytest.importorskip("torchsde")
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
COSINE, SDE = "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"
CASES = [(COSINE, {}), (COSINE, {"solver_order": 1}), (SDE, {"noise_sampler_seed": 3}), (SDE, {}),
         (SDE, {"beta_schedule": "scaled_linear", "use_karras_sigmas": True})]  # fmt: skip


def run(scheduler: Any, steps: int = 8, *, seed: int | list[int] | None = 5, x: Tensor = X, begin: int = 0) -> Tensor:
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    if begin:
        scheduler.set_begin_index(begin)
    given = {}
    if type(scheduler).__name__ == COSINE and seed is not None:
        made = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
        given = {"generator": made if isinstance(seed, list) else made[0]}
    out = []
    for t in scheduler.timesteps[begin:]:
        m = torch.tanh(1.3 * scheduler.scale_model_input(x, t))
        x = scheduler.step(m, t, x, **given).prev_sample
        out.append(x)
    return torch.stack(out)


def far(got: Tensor, want: Tensor) -> float:
    """Of every state by its own size."""
    return float(((got - want).flatten(1).abs().amax(1) / want.flatten(1).abs().amax(1)).max())


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("steps", [1, 3, 8, 20])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_noise_is_that_of_stocks_tree(name: str, config: dict[str, Any], steps: int, begin: int) -> None:
    """The same seed, asked for the same intervals to the last digit; torch's own generator is where stock leaves it."""
    if begin >= steps:
        return
    results = []
    for made in (getattr(diffusers, name)(**config), fd.accelerate(getattr(diffusers, name)(**config))):
        torch.manual_seed(9)  # of which a tree without a seed takes one
        results.append((run(made, steps, begin=begin), torch.rand(1)))
    (want, after), (got, left) = results
    assert far(got, want) <= 3e-6
    assert torch.equal(left, after)


def test_a_generator_a_sample_and_a_tree_of_ones_own() -> None:
    """Every loop has another tree; a noise sampler that somebody sets is asked like stock's."""
    stock = diffusers.CosineDPMSolverMultistepScheduler()
    ours = fd.accelerate(diffusers.CosineDPMSolverMultistepScheduler())
    for seed in ([5, 6], [7, 8]):
        assert far(run(ours, seed=seed), run(stock, seed=seed)) <= 3e-6
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(8)
        scheduler.noise_sampler = lambda start, end: torch.full_like(X, float(start - end))
        x = X
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x).prev_sample
        results.append(x)
    assert far(results[0][None], results[1][None]) <= 3e-6


@pytest.mark.parametrize(("name", "config"), CASES)
def test_philox_noise_is_one_of_independent_normals(name: str, config: dict[str, Any]) -> None:
    """It depends on no other sample of the batch, no tree is made, and another seed is other noise."""

    def made(seed: int) -> Any:
        return fd.accelerate(getattr(diffusers, name)(**config), noise="philox", seed=seed)

    scheduler = made(4)
    both = run(scheduler, seed=None)
    assert scheduler.noise_sampler is None
    alone = run(made(4), seed=None, x=X[:1])
    assert torch.allclose(both[:, :1], alone, rtol=1e-5, atol=1e-5)
    assert far(run(made(5), seed=None), both) > 0.01


@pytest.mark.parametrize("name", [COSINE, SDE])
def test_philox_noise_has_the_paths_covariance(name: str) -> None:
    """Without a model the result is linear in the noise: its variance is that of the sum over one Brownian path.

    n(a, b) = (W(b) - W(a)) / sqrt|b - a|, so that cov(n, n') = overlap / sqrt(len len'); the weights of the draws are
    read from stock, one draw at a time.
    """
    n, spans = 6, []
    stock = getattr(diffusers, name)()

    def result(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            x = scheduler.step(0 * scheduler.scale_model_input(x, t), t, x).prev_sample
        return x

    def impulse(which: int) -> float:
        calls = 0

        def noise(start: Any, end: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if which < 0:
                spans.append((float(start), float(end)))
            return torch.full((1, 1), float(calls - 1 == which))

        stock.set_timesteps(n)
        x = torch.zeros(1, 1)
        for t in stock.timesteps:
            stock.noise_sampler = noise
            x = stock.step(torch.zeros(1, 1), t, x).prev_sample
        return float(x)

    impulse(-1)
    weights = np.array([impulse(k) for k in range(len(spans))])
    low, high = np.sort(np.array(spans), axis=1).T
    length = np.maximum(high - low, 1e-30)
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    covariance = np.clip(overlap, 0, None) / np.sqrt(np.outer(length, length))
    np.fill_diagonal(covariance, 1.0)
    variance = weights @ covariance @ weights
    result(fd.accelerate(getattr(diffusers, name)()), torch.zeros(1, 4))  # its reading is another one
    got = result(fd.accelerate(getattr(diffusers, name)(), noise="philox", seed=2), torch.zeros(1, 1 << 16))
    assert float(got.double().var()) == pytest.approx(variance, rel=5 * (2 / (1 << 16)) ** 0.5)
