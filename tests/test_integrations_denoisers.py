"""Models of this library as k-diffusion denoisers and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import schedules, solvers
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.denoisers import from_denoiser, to_denoiser

SHAPE = (2, 3, 4, 4)
MEAN, STD = 0.3, 0.6


def exact(schedule, prediction):
    """The best prediction for data N(MEAN, STD^2), in closed form."""

    def model(x, t):
        a, s = (torch.from_numpy(np.asarray(f(t.double().numpy()))).reshape(-1, 1, 1, 1)
                for f in (schedule.alpha, schedule.sigma))  # fmt: skip
        x = x.double()
        x0 = MEAN + STD**2 * a / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        eps = (x - a * x0) / s
        out = {"eps": eps, "x0": x0, "v": (a * eps - s * x0) / torch.sqrt(a**2 + s**2), "flow": eps - x0}[prediction]
        return out.float()

    return model


CASES = [
    (schedules.VP(), "eps", 5e-6), (schedules.VP(), "v", 2e-6), (schedules.VP(), "x0", 2e-6),
    (schedules.Cosine(), "v", 2e-6), (schedules.VE(0.02, 30.0), "eps", 5e-6), (schedules.Flow(), "flow", 2e-6),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "prediction", "bound"), CASES, ids=str)
def test_a_denoiser_of_gaussian_data_is_the_posterior_mean(schedule, prediction, bound):
    denoiser = to_denoiser(exact(schedule, prediction), schedule, prediction=prediction)
    y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 2
    for sigma in (0.05, 0.7, 6.0):
        got = denoiser(y, torch.tensor([sigma, sigma]))
        assert torch.equal(denoiser(y, sigma), got)
        want = MEAN + STD**2 / (STD**2 + sigma**2) * (y.double() - MEAN)
        assert float((got.double() - want).abs().max()) <= bound * (1 + sigma)


@pytest.mark.parametrize(
    ("schedule", "prediction", "bound"),
    [*CASES, (schedules.Flow(3.0), "flow", 2e-6), (schedules.EDM(), "x0", 2e-6)],
    ids=str,
)
def test_there_and_back(schedule, prediction, bound):
    """Told the time of a model, which is sigma of a shifted flow."""
    inner = exact(schedule, prediction)

    def model(x, t):
        return inner(x, schedule.time_of_model(t))

    again = from_denoiser(to_denoiser(model, schedule, prediction=prediction), schedule, prediction=prediction)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    t = schedule.model_time(torch.tensor([0.2, 0.8]))
    assert float((again(x, t) - model(x, t)).abs().max()) <= 20 * bound


def test_a_chain_with_prediction_v_and_sign():
    chain = schedules.Betas(schedules.scaled_linear_betas(1000))
    model = exact(chain, "v")
    plus = to_denoiser(model, chain, prediction="v")
    minus = to_denoiser(lambda x, t: -model(x, t), chain, prediction="v", sign=-1)
    y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 3.0])
    assert torch.allclose(plus(y, sigma), minus(y, sigma), atol=1e-6)


def test_the_same_sample_through_k_diffusion_and_through_a_plan():
    chain = schedules.Betas(schedules.scaled_linear_betas(1000))
    model = exact(chain, "eps")
    plan = solvers.dpmpp_2m(chain, 12, lower_order_final=False)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    want = fd.sample(model, plan, SHAPE, x_T=x * plan.init_scale)
    sigmas = torch.tensor([*(plan.sigma / plan.alpha), 0.0], dtype=torch.float64)
    start = x.double() * plan.init_scale / plan.alpha[0]
    got = k_diffusion.sample_dpmpp_2m(to_denoiser(model, chain), start, sigmas, disable=True)
    assert float((got - want).abs().max()) <= 2e-5


def test_a_network_may_change_its_time_in_place():
    def network(x, t):
        t *= 1000
        return torch.cos(t / 300)[:, None] * torch.ones_like(x)

    denoiser = to_denoiser(network, schedules.VP(), prediction="x0")
    outs = [denoiser(torch.ones(1, 2), torch.tensor([1.0])) for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_no_denoiser_without_signal():
    model = from_denoiser(lambda x, s: x, schedules.Flow(), prediction="flow")
    with pytest.raises(ValueError, match="without signal"):
        model(torch.ones(SHAPE), torch.ones(2))


@pytest.mark.parametrize("level", [0.0, 0.001, 0.02, 20.0, 80.0])
def test_a_level_outside_of_the_schedule(level):
    """k-diffusion's: x = y / sqrt(sigma^2 + 1), D = y - sigma eps, at the time of the nearest end."""
    schedule = schedules.Betas(schedules.scaled_linear_betas(1000))
    told = []

    def model(x, t):
        told.append(int(t[0]))
        return torch.tanh(x)

    y = max(level, 0.1) * torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    want = y - level * torch.tanh(y / (level**2 + 1) ** 0.5)
    got = to_denoiser(model, schedule)(y, torch.tensor([level]))
    assert torch.allclose(got, want, rtol=0, atol=2e-7 * float(y.max()))
    assert told == [0 if level < 1 else 999]
