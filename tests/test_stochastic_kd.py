"""Stochastic solvers against k-diffusion's samplers in float64 and fp32, with the same noise."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample
from fastdiff_bench.peers import k_diffusion_sampling
from tests.test_stochastic import CHAIN, SHAPE, both, far, pool_of


def k_diffusion() -> types.ModuleType:
    """k-diffusion's sampling module alone: the package's other requirements are not needed here."""
    sampling = k_diffusion_sampling()
    if sampling is None:
        pytest.skip("k-diffusion is not installed")
    return sampling


def net(x: Tensor, t: Any) -> Tensor:
    """A denoiser for sigma up to 80."""
    sigma = (t if isinstance(t, Tensor) else torch.tensor(t)).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x / (1 + sigma) + 0.2 * torch.log(sigma))


def against_k_diffusion(
    plan: Plan, sampler: str, noise: list[Tensor], options: dict[str, Any], draw: Callable[..., Tensor] | None = None
) -> None:
    kd, sigmas = k_diffusion(), torch.from_numpy(np.append(S.EDM().sigma(np.linspace(1, 0, 12)), 0.0))
    x_T = pool_of(1, 1)[0] * 80

    def run(dtype: torch.dtype) -> Tensor:
        source = iter(noise)
        pick = (lambda a, b: next(source).to(dtype)) if draw is None else draw(source, dtype)
        return getattr(kd, sampler)(net, x_T.to(dtype), sigmas.to(dtype), noise_sampler=pick, disable=True, **options)

    exact, theirs = run(torch.float64), run(torch.float32)
    reference, ours = both(plan, x_T, noise, net)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5
    assert far(ours, theirs) <= far(theirs, exact) + 1e-5


@pytest.mark.parametrize(
    ("solver", "sampler", "native", "theirs"),
    [
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"kind": "heun", "eta": 0.5}, {"solver_type": "heun", "eta": 0.5}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"eta": 0.0}, {"eta": 0.0}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"s_noise": 1.1, "eta": 1.3}, {"s_noise": 1.1, "eta": 1.3}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}, {}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.0}, {"eta": 0.0}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.6, "s_noise": 0.9}),
    ],
)
def test_equals_k_diffusion(solver: str, sampler: str, native: dict[str, Any], theirs: dict[str, Any]) -> None:
    if solver == "dpmpp_2m_sde":
        native = {"lower_order_final": False, **native}
    plan = getattr(solvers, solver)(S.EDM(), 12, prediction="x0", **native)
    against_k_diffusion(plan, sampler, pool_of(12), theirs)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 1.2}, {"eta": 0.0}, {"eta": 2.0}, {"r": 0.3}])
def test_dpmpp_sde_equals_k_diffusion(options: dict[str, Any]) -> None:
    """Their tree gives increments of one path in sigma: w over the step shares w over its first part."""
    plan = solvers.dpmpp_sde(S.EDM(), 12, prediction="x0", **options)

    def tree(source: Iterator[Tensor], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        part: list[tuple[float, Tensor]] = []

        def noise(start: Tensor, end: Tensor) -> Tensor:
            length = float(start.double() - end.double())
            if not part:
                part.append((length, next(source).to(dtype)))
                return part[0][1]
            first, n = part.pop()
            share = first / length
            return math.sqrt(share) * n + math.sqrt(1 - share) * next(source).to(dtype)

        return noise

    noise = pool_of(24) if plan.stochastic else []
    if not plan.stochastic:
        tree = lambda source, dtype: lambda a, b: torch.zeros(SHAPE, dtype=dtype)  # noqa: E731
    against_k_diffusion(plan, "sample_dpmpp_sde", noise, options, tree)


CHURN = [
    {},
    {"s_churn": 20.0},
    {"s_churn": 20.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
    {"s_churn": 1e3, "s_max": 10.0},
]


@pytest.mark.parametrize("options", CHURN, ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_churn_equals_k_diffusion(options: dict[str, float], order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws in the same order, the first step's included: noise given, and torch's own stream."""
    kd, steps = k_diffusion(), 12
    sampler = kd.sample_heun if order == 2 else kd.sample_euler
    keys = {"s_min": "s_tmin", "s_max": "s_tmax"}
    theirs = {keys.get(k, k): v for k, v in options.items()}
    sigmas = torch.from_numpy(np.append(S.EDM().sigma(np.linspace(1, 0, steps)), 0.0))
    plan = solvers.edm_stochastic(S.EDM(), steps, prediction="x0", order=order, **options)
    noise, start = pool_of(steps), pool_of(1, 1)[0]
    assert int(plan.draws.sum()) + (plan.init_noise > 0) == steps

    def run(dtype: torch.dtype) -> Tensor:
        source = iter(noise)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: next(source).to(x.dtype))
            return sampler(net, 80 * start.to(dtype), sigmas.to(dtype), disable=True, **theirs)

    exact, stock = run(torch.float64), run(torch.float32)
    x_T, rest = 80 * start.double(), noise
    if plan.init_noise:
        x_T, rest = x_T + plan.init_noise * noise[0].double(), noise[1:]
    first, second = iter(rest), iter(rest)
    reference = reference_sample(net, plan, x_T, lambda k, like: next(first).double())
    ours = fd.sample(net, plan, SHAPE, x_T=x_T.float(), noise=lambda k, like: next(second))
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5
    assert far(ours, stock) <= far(stock, exact) + 1e-5

    torch.manual_seed(7)
    stock = sampler(net, 80 * torch.randn(SHAPE), sigmas.float(), disable=True, **theirs)
    ours = fd.sample(net, plan, SHAPE, noise="torch", generator=torch.Generator().manual_seed(7))
    assert far(ours, stock) <= 2e-5


def test_churn_without_churn_is_heun_and_euler() -> None:
    for schedule in (S.VP(), S.EDM(), CHAIN):
        for order, name in ((2, "heun"), (1, "euler")):
            ours, plain = (f(schedule, 9, **o) for f, o in
                           ((solvers.edm_stochastic, {"order": order}), (getattr(solvers, name), {})))  # fmt: skip
            for v in ("A", "b", "times", "c_out"):
                np.testing.assert_allclose(getattr(ours, v), getattr(plain, v), rtol=1e-11, atol=1e-12)
