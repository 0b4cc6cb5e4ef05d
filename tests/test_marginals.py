"""The noised data set: densities against torch's mixtures, the score against autograd, the ideal model sampled."""

import pytest
import torch

import fastdiff as fd
from fastdiff.schedules import EDM, VE, VP, Betas, BFNContinuous, Cosine, Flow, SubVP, linear_betas
from fastdiff.training import ideal_model, log_density, marginals, score

CHAIN = Betas(linear_betas(100))
DATA = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 5.0, 1.0], dtype=torch.float64)


def points(count=11, seed=1):
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(alpha, sigma):
    parts = torch.distributions.Independent(torch.distributions.Normal(alpha * DATA, sigma), 2)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS), parts)


@pytest.mark.parametrize(("schedule", "t"), [(VP(), 0.3), (VE(0.01, 50.0), 0.9), (CHAIN, 40), (Flow(), 0.02)], ids=repr)
def test_density_and_score(schedule, t, monkeypatch):
    """Against torch.distributions and its gradient, also in chunks of one query."""
    q, x = mixture(float(schedule.alpha(t)), float(schedule.sigma(t))), points().requires_grad_()
    want = q.log_prob(x)
    (gradient,) = torch.autograd.grad(want.sum(), x)
    for chunk in (marginals.CHUNK, 7):
        monkeypatch.setattr(marginals, "CHUNK", chunk)
        x = x.detach()
        torch.testing.assert_close(
            log_density(x, DATA, t, schedule, weights=WEIGHTS), want.detach(), rtol=1e-10, atol=1e-9
        )
        torch.testing.assert_close(score(x, DATA, t, schedule, weights=WEIGHTS), gradient, rtol=1e-8, atol=1e-8)


def test_times_per_point_and_far_away():
    t = torch.linspace(0.1, 1.0, 11)
    got = log_density(points(), DATA, t, VP())
    for i in (0, 4, 10):
        torch.testing.assert_close(got[i], log_density(points()[i : i + 1], DATA, t[i].double(), VP())[0])
    assert torch.isfinite(log_density(torch.full((1, 2, 3), 1e3), DATA, 0.05, VP())).all()


def test_density_on_a_grid_integrates_to_one():
    data = torch.tensor([[-0.5, 0.2], [0.7, -0.4], [0.1, 0.9]])
    axis = torch.linspace(-5, 5, 201, dtype=torch.float64)
    q = log_density(torch.cartesian_prod(axis, axis), data, 0.25, VP()).exp()
    assert abs(q.sum().item() * 0.05**2 - 1) < 1e-6


CASES = [
    (VP(), "eps"), (VP(), "v"), (SubVP(), "score"), (VE(0.02, 50.0), "x0"), (Flow(2.0), "flow"), (Cosine(), "v"),
    (CHAIN, "eps"), (CHAIN, "x0"), (EDM(0.01, 80.0), "edm"), (EDM(0.01, 80.0), "x0"), (VP(), "edm"), (SubVP(), "edm"),
    (CHAIN, "edm"), (VE(0.02, 50.0), "edm"), (Flow(2.0), "edm"), (Cosine(), "edm"),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "prediction"), CASES, ids=repr)
def test_ideal_model_samples_its_data(schedule, prediction):
    """Every prediction on its schedule: the end of a deterministic run is one of the data points."""
    model = ideal_model(DATA, schedule, prediction)
    start = {"t_start": 0.99} if prediction == "edm" and isinstance(schedule, Flow | Cosine) else {}  # alpha > 0
    plan = fd.solvers.dpmpp_2m(schedule, 30, prediction=prediction, **start)
    x = fd.sample(model, plan, (64, 2, 3), seed=2, mode="eager").double()
    distance = torch.cdist(x.flatten(1), DATA.flatten(1)).amin(1)
    assert distance.max() < 2e-3
    assert len(set(torch.cdist(x.flatten(1), DATA.flatten(1)).argmin(1).tolist())) >= 4


def test_predictions_agree_and_signs():
    """All prediction types of one state give one x0-hat, by the plan's own conversion."""
    x, plans = points(4).float(), {}
    for prediction in ("eps", "x0", "v", "score", "flow", lambda a, s: (a / (a + s), -s / (2 + a))):
        plan = fd.solvers.euler(VP(), 5, prediction=prediction)
        m = ideal_model(DATA, VP(), prediction)(x, torch.full((4,), float(plan.times[2])))
        plans[str(prediction)] = plan.c_skip[2] * x + plan.c_out[2] * m
    first = plans["x0"]
    for p in plans.values():
        torch.testing.assert_close(p, first, rtol=1e-4, atol=1e-5)
    t = torch.full((4,), 0.4)
    torch.testing.assert_close(ideal_model(DATA, VP(), sign=-1)(x, t), -ideal_model(DATA, VP())(x, t))


def test_the_score_is_what_drift_integrates():
    """ln p by the probability flow of the ideal model equals the mixture's density at t_end."""
    schedule, x = VP(), points(3)
    got = fd.log_likelihood(
        ideal_model(DATA, schedule, weights=WEIGHTS), schedule, x, trace="exact", t_end=0.2, rtol=1e-8, atol=1e-8,
        prior=lambda z: log_density(z, DATA, 1.0, schedule, weights=WEIGHTS),
    )  # fmt: skip
    torch.testing.assert_close(got, log_density(x, DATA, 0.2, schedule, weights=WEIGHTS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_ideal_model_where_nothing_is_known(prediction):
    """At the start of a Bayesian flow x0-hat is the mean of the data, and the run ends at data points."""
    schedule, weights = BFNContinuous(0.01), torch.arange(1.0, len(DATA) + 1)
    model = ideal_model(DATA, schedule, prediction, weights=weights)
    out = model(torch.zeros(2, 2, 3), torch.zeros(2)).double() * (1 if prediction == "x0" else -1)
    want = (weights.double() / weights.sum()) @ DATA.flatten(1).double()
    torch.testing.assert_close(out.flatten(1), want.expand(2, 6), rtol=1e-6, atol=1e-7)
    plan = fd.solvers.bfn_continuous(schedule, 50, prediction=prediction)
    x = fd.sample(model, plan, (16, 2, 3), seed=2, mode="eager").double()
    assert torch.cdist(x.flatten(1), DATA.flatten(1)).amin(1).max() < 2e-3


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: log_density(points(), DATA.tolist(), 0.1, VP()), TypeError, "list"),
        (lambda: log_density(points(), DATA[0, 0], 0.1, VP()), ValueError, r"\[N, \*sample\]"),
        (lambda: log_density(points()[:, :1], DATA, 0.1, VP()), ValueError, r"x must be \[M, 2, 3\]"),
        (lambda: log_density(points(), DATA, 0.0, Flow()), ValueError, "sigma = 0"),
        (lambda: log_density(points(), DATA, 1.5, VP()), ValueError, "1.5"),
        (lambda: log_density(points(), DATA, torch.ones(3), VP()), ValueError, r"\(11,\)"),
        (lambda: score(points(), DATA, 0.1, VP(), weights=torch.zeros(7)), ValueError, "> 0"),
        (lambda: score(points(), DATA, 0.1, "vp"), TypeError, "str"),
        (lambda: ideal_model(DATA, VP(), "noise"), ValueError, "eps, x0, v, score, flow, edm"),
        (lambda: ideal_model(DATA, VP(), sign=2), ValueError, "sign"),
        (lambda: ideal_model(DATA, None), TypeError, "NoneType"),
        (lambda: log_density(points(), DATA.to("meta"), 0.1, VP()), ValueError, "device, meta"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
