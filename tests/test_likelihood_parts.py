"""A likelihood alone and in a batch, of a chain, and of a model whose parameters hide that it does not see x."""

import math

import pytest
import torch

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import training as T

MEAN, STD = 0.4, 0.5


@pytest.mark.parametrize("point", [0.02, 1.0, 2.0])
def test_alone_and_among_many_alike(point):
    """A sample far from the data beside 500 that are close: the integrator's tolerance is that of every sample."""
    schedule, t = S.VP(), 0.01
    data = torch.tensor([[-3.0], [3.0]]).double()
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    close = 3 * a + s * torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
    far = torch.tensor([[point]]).double()

    def of(x):
        return fd.log_likelihood(
            T.ideal_model(data, schedule), schedule, x, trace="exact", t_end=t,
            prior=lambda z: T.log_density(z, data, 1.0, schedule),
        )  # fmt: skip

    alone, among = of(far)[0].item(), of(torch.cat([far, close]))[0].item()
    assert among == pytest.approx(alone, rel=5e-5)
    assert among == pytest.approx(T.log_density(far, data, t, schedule).item(), rel=5e-4)


@pytest.mark.parametrize("betas", [(50, 2e-3, 0.4), (1000, 1e-4, 0.02)])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
def test_a_chain_meets_its_tolerance(betas, tolerance):
    """Over ln(sigma / alpha) a chain's field has no jumps: N(m, s^2) to ten tolerances in some 200 evaluations."""
    schedule, calls = S.Betas(S.linear_betas(*betas)), []

    def model(x, t):
        calls.append(t)
        a, g = (v.view(-1, 1) for v in schedule.alpha_sigma(t))
        return g * (x - a * MEAN) / (a * a * STD**2 + g * g)

    def exact(x, t):
        a, g = float(schedule.alpha(t)), float(schedule.sigma(t))
        v = a * a * STD**2 + g * g
        return (-0.5 * (x - a * MEAN) ** 2 / v - 0.5 * math.log(2 * math.pi * v)).sum(1)

    x = MEAN + STD * torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    got = fd.log_likelihood(
        model, schedule, x, trace="exact", prior=lambda z: exact(z, betas[0] - 1.0), rtol=tolerance, atol=tolerance
    )
    assert (got - exact(x, 0.0)).abs().max() <= 10 * tolerance
    assert len(calls) <= 250


def test_a_model_with_parameters_that_detaches_x():
    net = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="the model's output does not depend on x through autograd"):
        fd.log_likelihood(lambda x, t: net(x.detach()), S.VP(), torch.zeros(2, 3))
    assert fd.log_likelihood(lambda x, t: net(x), S.VP(), torch.zeros(2, 3)).isfinite().all()
