"""Guidance by a gradient: Gaussian data and a noisy measurement, whose posterior is known at every noise level."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.prediction import conversion
from tests.replay import close, device_path  # noqa: F401 - one is a fixture

MEAN, STD, NOISE, Y = 0.4, 0.7, 0.3, 1.1  # data N(MEAN, STD^2), measured once with deviation NOISE as Y
POSTERIOR_VAR = 1 / (1 / STD**2 + 1 / NOISE**2)
POSTERIOR_MEAN = POSTERIOR_VAR * (MEAN / STD**2 + Y / NOISE**2)
SHAPE = (3, 2, 4)


def level(plan: fd.Plan, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma, c_in and the conversion's numbers of the rows whose time is t, float64."""
    at = [int(np.argmin(np.abs(plan.times - float(v)))) for v in t]
    return tuple(torch.tensor(v[at]).view(-1, *[1] * (x.dim() - 1))
                 for v in (plan.alpha, plan.sigma, plan.c_in, plan.c_skip, plan.c_out))  # fmt: skip


def x0_of(x: Tensor, alpha: Tensor, sigma: Tensor, mean: float, var: float) -> Tensor:
    """E[x0 | x_t] of N(mean, var) data."""
    return (mean / var + alpha * x / sigma**2) / (1 / var + alpha**2 / sigma**2)


def network(plan: fd.Plan, mean: float = MEAN, var: float = STD**2) -> Any:
    """The exact model of Gaussian data in the plan's own prediction."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, c_in, c_skip, c_out = level(plan, t, x)
        state = x.double() / c_in
        return ((x0_of(state, alpha, sigma, mean, var) - c_skip * state) / c_out).to(x.dtype)

    return model


def measured(plan: fd.Plan, x: Tensor, t: Tensor, y: float | Tensor = Y) -> Tensor:
    """log p(y | x_t): y ~ N(E[x0 | x_t], Var[x0 | x_t] + NOISE^2)."""
    alpha, sigma, *_ = level(plan, t, x)
    var = 1 / (1 / STD**2 + alpha**2 / sigma**2) + NOISE**2
    return (-((y - x0_of(x.double(), alpha, sigma, MEAN, STD**2)) ** 2) / (2 * var)).flatten(1).sum(1).float()


VP, EDM, CHAIN = S.VP(), S.EDM(0.02, 20.0), S.Betas(S.linear_betas(1000))
PLANS = [
    solvers.ddim(CHAIN, 6), solvers.dpmpp_2m(VP, 6, prediction="v"), solvers.dpmpp_2m(VP, 6, prediction="x0"),
    solvers.euler(VP, 6, prediction="score"), solvers.heun(EDM, 5, prediction="edm"),
    solvers.dpmpp_2m(S.VE(0.02, 20.0), 6), solvers.euler(S.Flow(), 6, prediction="flow", t_start=0.98),
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.name}-{p.nfe}")
def test_the_guided_model_is_the_posteriors(plan: fd.Plan) -> None:
    """In every prediction and at every row: the exact model of p(x0 | y), to fp32's digits of x0."""
    guided = fd.classifier_guidance(network(plan), plan, lambda x, t: measured(plan, x, t))
    want = network(plan, POSTERIOR_MEAN, POSTERIOR_VAR)
    g = torch.Generator().manual_seed(0)
    for k in range(plan.nfe):
        x0 = MEAN + STD * torch.randn(SHAPE, generator=g)
        state = plan.alpha[k] * x0 + plan.sigma[k] * torch.randn(SHAPE, generator=g)
        x, t = (plan.c_in[k] * state).float(), torch.full((3,), float(plan.times[k]))
        with torch.no_grad():
            m, exact = guided(x, t), want(x, t)
        assert not m.requires_grad
        assert float((m - exact).abs().max()) * abs(plan.c_out[k]) <= 2e-6 * max(
            1, 1 / plan.alpha[k], abs(plan.c_out[k])
        )


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_samples_are_the_posteriors(mode: str) -> None:
    """40 rows of a second-order ODE solver: mean and deviation within five standard errors and 0.5 %."""
    plan, many = solvers.dpmpp_2m(VP, 40, spacing="logsnr"), 20_000
    guided = fd.classifier_guidance(network(plan), plan, lambda x, t: measured(plan, x, t))
    x = fd.sample(guided, plan, (many // 4, 4), seed=0, mode=mode).double()
    assert abs(float(x.mean()) - POSTERIOR_MEAN) <= 5 * (POSTERIOR_VAR / many) ** 0.5 + 2e-3
    assert abs(float(x.std()) / POSTERIOR_VAR**0.5 - 1) <= 5 / (2 * many) ** 0.5 + 5e-3


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[1], PLANS[4]], ids=lambda p: f"{p.name}-{p.nfe}")
def test_through_the_model(plan: fd.Plan) -> None:
    """Of log_prob(x0) = -|x0 - y|^2 / 2, x0 = a + b x_t: the gradient is b (y - x0); scale and sign."""
    guided = fd.classifier_guidance(network(plan), plan, lambda x0, t: -((x0 - Y) ** 2).flatten(1).sum(1) / 2, of="x0",
                                    scale=0.5)  # fmt: skip
    k = plan.nfe // 2
    x, t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), torch.full((3,), float(plan.times[k]))
    alpha, sigma, c_in, c_skip, c_out = level(plan, t, x)
    state = x.double() / c_in
    x0 = x0_of(state, alpha, sigma, MEAN, STD**2)
    b = alpha / sigma**2 / (1 / STD**2 + alpha**2 / sigma**2)
    want = x0 + 0.5 * sigma**2 / alpha * b * (Y - x0)
    got = c_skip * state + c_out * guided(x, t).double()
    assert float((got - want).abs().max()) <= 2e-5


def test_what_is_given_goes_to_log_prob_alone() -> None:
    plan = solvers.dpmpp_2m(VP, 6)

    def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return network(plan)(x, t) + 0 * shift

    guided = fd.classifier_guidance(model, plan, lambda x, t, y: measured(plan, x, t, y), given=("y",))
    y = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    x = fd.sample(guided, plan, SHAPE, seed=0, cond={"y": y, "shift": torch.ones(3, 1, 1)})
    for b in range(3):
        alone = fd.classifier_guidance(network(plan), plan, lambda x, t, b=b: measured(plan, x, t, float(y[b])))
        torch.testing.assert_close(fd.sample(alone, plan, SHAPE, seed=0)[b], x[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["x", "x0"])
@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_graphs(of: str, mode: str, request: pytest.FixtureRequest) -> None:
    """The backward pass is captured with the rest, and y is filled in."""
    plan = solvers.dpmpp_2m(VP, 6, prediction="x0")
    log_prob = lambda x, t, y: -((x - y) ** 2).flatten(1).sum(1) / 2  # noqa: E731
    guided = fd.classifier_guidance(lambda x, t: torch.tanh(x), plan, log_prob, of=of, given=("y",), scale=0.3)
    calls = [{"y": torch.full((3, 1, 1), v)} for v in (0.2, 1.0)]
    want = [fd.sample(guided, plan, SHAPE, seed=1, cond=one) for one in calls]
    assert not close(want[0], want[1])
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(guided, plan, mode=mode)
    assert all(close(sampler(SHAPE, seed=1, cond=one), x) for one, x in zip(calls, want, strict=True))
    assert len(sampler._runs) == 1


def test_beside_classifier_free_guidance_it_is_added_once() -> None:
    plan = solvers.dpmpp_2m(VP, 6)
    model = lambda x, t, c: network(plan)(x, t) + 0.1 * c  # noqa: E731
    ones, zeros = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    guided = fd.classifier_guidance(model, plan, lambda x, t: measured(plan, x, t))
    asked = {"cond": {"c": ones}, "uncond": {"c": zeros}, "guidance": 3.0, "seed": 0}
    joined, apart = (fd.sample(guided, plan, SHAPE, batched_guidance=on, **asked) for on in (True, False))
    by_hand = fd.classifier_guidance(lambda x, t: model(x, t, 3 * ones), plan, lambda x, t: measured(plan, x, t))
    want = fd.sample(by_hand, plan, SHAPE, seed=0)
    for x in (joined, apart):
        torch.testing.assert_close(x, want, rtol=2e-5, atol=2e-6)


def test_a_learned_variance_keeps_its_plane() -> None:
    plan = solvers.ddpm(CHAIN, 6, variance="learned_range")
    plain = network(plan)
    two = lambda x, t: torch.cat([plain(x, t), torch.tanh(x)], 1)  # noqa: E731
    guided = fd.classifier_guidance(two, plan, lambda x, t: measured(plan, x, t))
    x, t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), torch.full((3,), int(plan.times[2]))
    one = fd.classifier_guidance(plain, plan, lambda x, t: measured(plan, x, t))
    assert torch.equal(guided(x, t), torch.cat([one(x, t), torch.tanh(x)], 1))


@pytest.mark.parametrize("of", ["x", "x0"])
def test_gradients_through_the_sampler(of: str) -> None:
    """Unrolled: d sample / d y by autograd against a difference in float64 models; parameters get theirs."""
    plan = solvers.dpmpp_2m(VP, 4, prediction="x0", spacing="logsnr")
    net = torch.nn.Linear(4, 4)
    y = torch.tensor(0.5, requires_grad=True)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def sampled(y: Tensor) -> Tensor:
        log_prob = lambda x, t, y: -((x - y) ** 2).flatten(1).sum(1) / 2  # noqa: E731
        model = fd.classifier_guidance(lambda x, t: net(x), plan, log_prob, of=of, given=("y",), scale=0.2)
        out: Tensor = fd.Unrolled(model, plan)(start, cond={"y": y}).double().sum()
        return out

    slope, weight = torch.autograd.grad(sampled(y), (y, net.weight))
    with torch.no_grad():
        h = 0.05  # a Gaussian energy: the sample is linear in y
        difference = (sampled(y + h) - sampled(y - h)) / (2 * h)
    assert abs(float(slope.detach() / difference) - 1) <= 1e-4 and bool(weight.abs().max() > 0)


@pytest.mark.compiled
def test_compiled() -> None:
    plan = solvers.dpmpp_2m(VP, 6)
    tensor = torch.tensor(0.3)
    for of in ("x", "x0"):
        guided = fd.classifier_guidance(
            lambda x, t: 0.5 * x, plan, lambda x, t: -((x - tensor) ** 2).sum((1, 2)), of=of
        )
        want = fd.sample(guided, plan, SHAPE, seed=0, mode="eager")
        x = fd.sample(guided, plan, SHAPE, seed=0, mode="compile")
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)


PLAN = solvers.dpmpp_2m(VP, 4)


@pytest.mark.parametrize(
    ("log_prob", "says"),
    [
        (lambda x, t: x.sum(), r"a number a sample, shape \(3,\), got \(\)"),
        (lambda x, t: 1.0, r"a number a sample, shape \(3,\), got float"),
        (lambda x, t: x.detach().sum((1, 2)), "does not depend on x through autograd"),
        (lambda x, t: torch.zeros(3, requires_grad=True) * 1, "does not depend on x through autograd"),
    ],
)
def test_errors_of_a_call(log_prob: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fd.sample(fd.classifier_guidance(lambda x, t: x, PLAN, log_prob), PLAN, SHAPE)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": 3}, TypeError, "must be callable"),
        ({"log_prob": None}, TypeError, "log_prob must be callable as log_prob"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": True}, ValueError, "scale must be a finite number, got True"),
        ({"of": "eps"}, ValueError, "unknown of='eps'; valid: x, x0"),
        ({"given": "y"}, TypeError, r"such as \(\"y\",\), got 'y'"),
        ({"given": None}, TypeError, "sequence of names, .* got None"),
        (
            {"plan": dataclasses.replace(PLAN, sigma=np.full(4, np.nan))},
            ValueError,
            "alpha and sigma of its rows, first of row 0",
        ),
        ({"plan": solvers.bfn_discrete(S.BFNDiscrete(1.5, 5), 3)}, ValueError, "reads out 'sample'"),
        ({"plan": solvers.ddim(S.Flow(), 4, prediction="flow")}, ValueError, r"alpha > 0, \S+ has alpha = 0 in row 0"),
        ({"plan": dataclasses.replace(PLAN, times=np.full(4, 0.5))}, ValueError, "rows 0 and 1 with different"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given: dict[str, Any] = {"model": lambda x, t: x, "plan": PLAN, "log_prob": lambda x, t: x.sum((1, 2)), **change}
    with pytest.raises(error, match=says):
        fd.classifier_guidance(given.pop("model"), given.pop("plan"), given.pop("log_prob"), **given)


def test_a_model_that_hides_its_gradient_is_refused() -> None:
    """Of x0 that is part of the answer: x0 depends on x without it too."""
    hidden = torch.no_grad()(lambda x, t: 0.5 * x)
    guided = fd.classifier_guidance(hidden, PLAN, lambda x, t: x.sum((1, 2)), of="x0")
    with pytest.raises(ValueError, match=r"model's output does not depend on x through autograd \(no_grad"):
        fd.sample(guided, PLAN, SHAPE)
    fd.sample(fd.classifier_guidance(hidden, PLAN, lambda x, t: x.sum((1, 2))), PLAN, SHAPE)


def test_an_output_that_is_none_is_the_samplers_to_refuse() -> None:
    guided = fd.classifier_guidance(lambda x, t: (x,), PLAN, lambda x, t: x.sum((1, 2)))
    with pytest.raises(TypeError, match="must return a Tensor, got tuple"):
        fd.sample(guided, PLAN, SHAPE)


def test_the_numbers_are_those_of_the_conversion() -> None:
    """x0 = c_skip x + c_out m of every prediction, solved for m."""
    from fastdiff.at_time import numbers_at

    for name in ("eps", "x0", "v", "score", "flow", "edm"):
        plan = solvers.dpmpp_2m(VP, 5, prediction=name)
        c = conversion(name, plan.alpha, plan.sigma)
        x = torch.ones(5, 1)
        of_x0, of_x, of_score, of_state, of_clean = numbers_at(plan, torch.tensor(plan.times).float(), x)
        np.testing.assert_allclose((1 / of_x0)[:, 0], c.c_out, rtol=1e-6)
        np.testing.assert_allclose((of_x / of_x0)[:, 0] * c.c_in, -c.c_skip, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose((of_score / of_x0)[:, 0], plan.sigma**2 / plan.alpha, rtol=1e-6)
        np.testing.assert_allclose(of_state[:, 0] * c.c_in, 1, rtol=1e-6)
        np.testing.assert_allclose(of_clean[:, 0], c.c_in, rtol=1e-6)
