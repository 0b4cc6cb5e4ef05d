"""Discretised Bayesian flows: whole sampling against float64, losses against written-out densities and information."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import rng, solvers, training
from fastdiff import schedules as S
from fastdiff.reference import reference_sample
from tests.replay import device_path  # noqa: F401 - a fixture
from tests.test_binned import centres, probabilities

C, SHAPE, BINS = S.BFNContinuous(0.05), (4, 2, 3), 16


def network(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    time = t.view(-1, 1, 1).to(x.dtype)
    steer = shift.view(-1, 1, 1) if isinstance(shift, Tensor) else shift
    return torch.cat([torch.sin(2 * x + time) + steer, -1 + 0.3 * torch.cos(x)], 1)


def plans(readout: str, prediction: str) -> fd.Plan:
    return solvers.bfn_discretised(C, 6, bins=BINS, readout=readout, prediction=prediction)


def exact(plan: fd.Plan, seed: int) -> Tensor:
    """The same Philox numbers in float64."""
    seeds, index = torch.full((4,), seed), torch.arange(4)

    def draw(row: int, stream: int) -> Tensor:
        return rng.normal(seeds, SHAPE[1:], row=row, stream=stream, index=index).double()

    bins = np.clip(np.floor((draw(1, 0).numpy() + 1) * BINS / 2), 0, BINS - 1)
    second = torch.from_numpy(centres(BINS)[bins.astype(int)])
    start = plan.init_scale * draw(0, 0) + plan.init_noise * second
    return reference_sample(network, plan, start, lambda row, like: draw(row, 1), gumbel=lambda row, like: draw(row, 2))


@pytest.mark.parametrize("readout", ["binned", "binned_mean"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_equals_the_float64_run(readout: str, prediction: str, device: torch.device) -> None:
    plan = plans(readout, prediction)
    got = fd.sample(network, plan, SHAPE, seed=3)
    torch.testing.assert_close(got.double(), exact(plan, 3), rtol=0, atol=2e-5)
    if readout == "binned":
        assert np.abs(got[..., None].numpy() - centres(BINS)).min(-1).max() < 1e-6


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
@pytest.mark.parametrize("readout", ["binned", "binned_mean"])
def test_modes_and_guidance(mode: str, readout: str, request: pytest.FixtureRequest) -> None:
    plan = plans(readout, "eps")
    options: dict[str, Any] = {
        "cond": {"shift": torch.ones(4)}, "uncond": {"shift": torch.zeros(4)}, "guidance": 1.7, "seed": 2,
    }  # fmt: skip
    want = fd.sample(network, plan, SHAPE, **options)
    alone = fd.sample(network, plan, SHAPE, seed=2, cond={"shift": torch.full((4,), 1.7)})
    torch.testing.assert_close(want, alone, rtol=0, atol=1e-5)  # the shift is added to the mean
    assert torch.equal(
        fd.sample(network, plan, (1, 2, 3), seed=2, first=1), fd.sample(network, plan, SHAPE, seed=2)[1:2]
    )
    drawn = fd.sample(network, plan, SHAPE, noise="torch", generator=torch.Generator().manual_seed(4))
    assert torch.equal(fd.sample(network, plan, SHAPE, batched_guidance=False, **options), want)
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(network, plan, mode=mode)
    torch.testing.assert_close(sampler(SHAPE, **options), want, rtol=0, atol=1e-5)
    if mode != "loop_graph":
        for _ in range(2):
            got = sampler(SHAPE, noise="torch", generator=torch.Generator().manual_seed(4))
            torch.testing.assert_close(got, drawn, rtol=0, atol=1e-5)


def test_compiled_and_low_precision() -> None:
    plan = plans("binned_mean", "x0")
    want = fd.sample(network, plan, SHAPE, seed=5)
    torch.testing.assert_close(fd.Sampler(network, plan, mode="compile")(SHAPE, seed=5), want, rtol=0, atol=1e-5)
    low = fd.sample(lambda x, t: network(x.float(), t).bfloat16(), plan, SHAPE, seed=5, dtype=torch.bfloat16)
    assert (low - want).abs().max() < 0.05


@pytest.mark.parametrize("log_std", [-4.0, -6.0, -8.0, -12.0, -48.0, -200.0])
def test_fp32_gradients_of_a_narrow_prediction(log_std: float) -> None:
    """Those of float64 for any std, also where it or its square is no fp32 number."""
    schedule, found = S.BFNContinuous(0.03), []
    for dtype in (torch.float32, torch.float64):
        m = torch.tensor([[[0.05], [log_std]]], dtype=dtype, requires_grad=True)
        x, mu = torch.full((1, 1, 1), 1 / 512, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
        options = {"bins": 256, "prediction": "x0", "steps": 10, "seeds": [3]}
        loss = training.bfn_discretised_loss(m, x, mu, 0.5, schedule, **options)
        found.append(torch.cat([loss, *torch.autograd.grad(loss.sum(), m)[0].flatten(1)]).double())
    torch.testing.assert_close(found[0], found[1], rtol=5e-5, atol=0)


def quantised(count: int) -> tuple[Tensor, Tensor]:
    """Bin centres [count, 2, 3] and their bins."""
    g = torch.Generator().manual_seed(0)
    k = torch.randint(0, BINS, (count, 2, 3), generator=g)
    return torch.from_numpy(centres(BINS))[k], k


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_losses_are_the_papers(prediction: str) -> None:
    x, k = quantised(6)
    i = torch.arange(1, 7)
    t = 1 - (i - 1).double() / 6
    mu = training.add_noise(x, t, C, seeds=range(6))[0]
    m = network(mu, C.model_time(t))
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"bins": BINS, "prediction": prediction}
    whole = training.bfn_discretised_loss(m, x, mu, t, C, **options)
    sent = training.bfn_discretised_loss(m, x, mu, t, C, **options, steps=6, noise=noise)
    mu_end = training.add_noise(x, 0.0, C, seeds=range(6))[0]
    m_end = network(mu_end, torch.ones(6))
    left = training.bfn_discretised_reconstruction(m_end, x, mu_end, C, **options)
    for b in range(6):
        gamma, a = 1 - 0.05 ** (2 * (1 - t[b].item())), 0.05 ** (-2 * (b + 1) / 6) * (1 - 0.05 ** (2 / 6))
        expect = [0.0, 0.0, 0.0]
        for c, d in np.ndindex(2, 3):

            def gaussian(out: Tensor, state: Tensor, g: float) -> tuple[float, float]:
                m0, s = out[b, c, d].item(), math.exp(out[b, 2 + c, d].item())  # noqa: B023 - used at once
                if prediction == "x0":
                    return m0, s
                scale = math.sqrt((1 - g) / g) if g > 1e-5 else 0.0
                return (state[b, c, d].item() / g - scale * m0, scale * s) if scale else (0.0, 1.0)  # noqa: B023

            p, q = (probabilities(*gaussian(*of), BINS) for of in ((m, mu, gamma), (m_end, mu_end, 1 - 0.05**2)))
            data, y = x[b, c, d].item(), x[b, c, d].item() + noise[b, c, d].item() / math.sqrt(a)
            expect[0] += -math.log(0.05) / 0.05 ** (2 * (1 - t[b].item())) * (data - p @ centres(BINS)) ** 2
            density = np.exp(-0.5 * a * (y - centres(BINS)) ** 2)
            expect[1] += 6 * (-0.5 * a * (y - data) ** 2 - math.log(p @ density))
            expect[2] -= math.log(q[k[b, c, d]])
        got = [v[b].item() for v in (whole, sent, left)]
        np.testing.assert_allclose(got, expect, rtol=1e-8)


def test_gradients() -> None:
    x, _ = quantised(3)
    t = 1 - torch.arange(3, dtype=torch.float64) / 3
    mu = training.add_noise(x, t, C, seeds=range(3))[0]
    m = network(mu, C.model_time(t)).requires_grad_()
    for options in ({}, {"steps": 3, "seeds": range(3)}):
        assert torch.autograd.gradcheck(
            lambda v, o=options: training.bfn_discretised_loss(v, x, mu, t, C, bins=BINS, **o), m
        )
    wide = network(mu, C.model_time(t)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: training.bfn_discretised_reconstruction(v, x, mu, C, bins=BINS, prediction="x0"), wide
    )


def test_a_hopeless_prediction_has_a_finite_loss_and_gradient() -> None:
    x = torch.full((1, 1, 4), 1 / 256 - 1)
    m = torch.cat([torch.full((1, 1, 4), 0.9), torch.full((1, 1, 4), -4.0)], 1).requires_grad_()
    loss = training.bfn_discretised_reconstruction(m, x, x, C, bins=256, prediction="x0")
    (grad,) = torch.autograd.grad(loss.sum(), m)
    assert loss.isfinite().all() and loss.item() > 1e4 and grad.isfinite().all() and (grad != 0).all()


X, M = torch.zeros(2, 3), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: training.bfn_discretised_loss(X, X, X, 0.5, C, bins=4),
            ValueError,
            r"model_out must have shape \(2, 6\)",
        ),
        (lambda: training.bfn_discretised_loss(M, X, X, 0.5, C, bins=1), ValueError, "bins must be an integer >= 2"),
        (lambda: training.bfn_discretised_loss(M, X, X, 0.5, C, bins=4, prediction="v"), ValueError, "eps or x0"),
        (lambda: training.bfn_discretised_loss(M, X, X, 0.5, C, bins=4, seeds=[1, 2]), ValueError, "give steps"),
        (lambda: training.bfn_discretised_loss(M, X, X, 0.5, S.VP(), bins=4), TypeError, "schedules.BFNContinuous"),  # type: ignore[arg-type]
        (
            lambda: fd.sample(lambda x, t: x, plans("binned", "x0"), SHAPE),
            ValueError,
            r"mean and a log-std .*\(4, 4, 3\)",
        ),
        (lambda: fd.sample(network, plans("binned", "x0"), (4,)), ValueError, "2 C channels"),
        (lambda: fd.sample(network, plans("binned", "x0"), SHAPE, threshold=(0.9, 1.0)), ValueError, "no threshold"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_x_init_is_noised_once() -> None:
    """Where an eps plan begins a bin of the prior stands in for the data; given data need no stand-in."""
    flow = S.BFNContinuous(0.02)
    for start in (0, 1):  # both begin at u = 1/5
        plan = solvers.bfn_discretised(flow, 5, start=start)
        x_init = torch.full((20_000, 1), 0.5)
        _, seen = fd.sample(lambda x, u: torch.cat([x, x], 1), plan, (20_000, 1), x_init=x_init, trajectory=True)
        alpha, sigma = plan.alpha[0], plan.sigma[0]
        assert abs(seen.x[0].mean() - 0.5 * alpha) <= 4.5 * sigma / math.sqrt(20_000)
        assert abs(seen.x[0].std() / sigma - 1) <= 4.5 / math.sqrt(40_000)
