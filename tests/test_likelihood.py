"""The probability-flow drift under other people's integrators, and the likelihood, on Gaussian data."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S

MEAN, STD = 0.7, 0.5
SCHEDULES = [S.VP(), S.SubVP(), S.VE(0.01, 50.0), S.EDM(), S.Cosine(), S.Flow(2.0)]


def levels(schedule: S.Schedule, t: Any) -> tuple[Any, Any]:
    return schedule.alpha(t), schedule.sigma(t)


def model_of(schedule: S.Schedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The ideal model of N(MEAN, STD^2), told the schedule's model_time."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        if isinstance(schedule, S.EDM):
            a, s = torch.ones_like(t), t
        elif isinstance(schedule, S.Flow):
            a, s = 1 - t, t
        else:
            a, s = levels(schedule, t)
        a, s = (v.view(-1, *[1] * (x.ndim - 1)) for v in (a, s))
        wide = a * a * STD**2 + s * s
        eps = s * (x - a * MEAN) / wide
        x0 = MEAN + a * STD**2 * (x - a * MEAN) / wide
        return {"eps": eps, "x0": x0, "flow": eps - x0, "v": (a * eps - s * x0) / torch.sqrt(a * a + s * s)}[
            prediction
        ].to(x.dtype)

    return model


def start_of(schedule: S.Schedule, prediction: str) -> tuple[float, float]:
    return (0.0 if float(schedule.sigma(0.0)) > 0 else 1e-5), schedule.t_start(prediction)


def density(schedule: S.Schedule, t: float, x: Tensor) -> Tensor:
    a, s = (float(v) for v in levels(schedule, t))
    variance = a * a * STD**2 + s * s
    return (-0.5 * (x - a * MEAN) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)).flatten(1).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_drift_under_scipy_is_the_exact_flow(schedule: S.Schedule, prediction: str) -> None:
    low, top = start_of(schedule, "eps")
    low, top = max(low, 1e-3), min(top, 0.99)
    f = fd.drift(model_of(schedule, prediction), schedule, prediction)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1)
    (a0, s0), (a1, s1) = levels(schedule, low), levels(schedule, top)
    done = solve_ivp(
        lambda t, y: f(t, torch.from_numpy(y).view(9, 1)).flatten().numpy(), (low, top), x.flatten().numpy(),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    gain = math.sqrt((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2))
    np.testing.assert_allclose(done.y[:, -1], a1 * MEAN + gain * (x.flatten() - a0 * MEAN), rtol=1e-5, atol=1e-6)


def test_drift_under_torchdiffeq() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    schedule = S.VP()
    f = fd.drift(model_of(schedule, "eps"), schedule)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1)
    times = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    end = torchdiffeq.odeint(f, x, times, rtol=1e-8, atol=1e-8, options={"step_t": times[-1:]})[-1]
    (a0, s0), (a1, s1) = levels(schedule, 1e-3), levels(schedule, 1.0)
    gain = math.sqrt((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2))
    torch.testing.assert_close(end, a1 * MEAN + gain * (x - a0 * MEAN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_log_likelihood_of_gaussian_data(schedule: S.Schedule, trace: str) -> None:
    """Equal to 1e-4 nats; the ideal model's Jacobian is diagonal, so Rademacher probes are exact too."""
    prediction = "v" if isinstance(schedule, S.Flow) else "eps"
    low, top = start_of(schedule, prediction)
    x = torch.linspace(-1, 2.2, 12, dtype=torch.float64).reshape(4, 3)
    got = fd.log_likelihood(
        model_of(schedule, prediction), schedule, x, prediction, trace=trace, rtol=1e-7, atol=1e-7,
        prior=lambda y: density(schedule, top, y),
    )  # fmt: skip
    assert float((got - density(schedule, low, x)).abs().max()) <= 1e-4


def test_log_likelihood_with_the_standard_prior() -> None:
    """Flow ends in N(0, I) exactly; fp32 data; x in any shape."""
    x = torch.linspace(-1, 2.2, 12).reshape(3, 2, 2)
    model = model_of(S.Flow(), "flow")
    got = fd.log_likelihood(model, S.Flow(), x, "flow", rtol=1e-7, atol=1e-7)
    assert got.dtype == torch.float64 and got.shape == (3,)
    assert float((got - density(S.Flow(), 0.0, x.double())).abs().max()) <= 3e-4


ZERO_SNR = [S.Cosine(), *(S.Betas(S.zero_terminal_snr(S.linear_betas(n))) for n in (100, 1000))]


@pytest.mark.parametrize("schedule", ZERO_SNR, ids=["cosine", "100", "1000"])
@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_it_starts_where_there_is_signal(schedule: S.Schedule, prediction: str) -> None:
    """By default, of a prediction that samples from zero SNR: N(0, sigma^2) is off by alpha MEAN / sigma, times |z|."""
    x = torch.linspace(-0.5, 1.9, 4, dtype=torch.float64).reshape(4, 1)
    got = fd.log_likelihood(model_of(schedule, prediction), schedule, x, prediction, rtol=1e-7, atol=1e-7)
    start = 0.9946 if isinstance(schedule, S.Cosine) else schedule.t_max - 1
    alpha, sigma = levels(schedule, start)
    low = 0.0 if float(schedule.sigma(0.0)) > 0 else 1e-5
    assert float((got - density(schedule, low, x)).abs().max()) <= 4 * float(alpha) * (MEAN + STD) / float(sigma) + 1e-4
    with pytest.raises(ValueError, match="there is no signal at t_start="):
        fd.log_likelihood(model_of(schedule, prediction), schedule, x, prediction, t_start=schedule.t_max)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_bayesian_flow_starts_where_it_has_noise(prediction: str) -> None:
    """By default: N(0, sigma^2) is off by alpha MEAN / sigma = sqrt(SNR) MEAN = 2e-4 there, times |z| < 4."""
    schedule = S.BFNContinuous(0.02)
    model = model_of(schedule, prediction)
    x = torch.linspace(-0.5, 1.9, 4, dtype=torch.float64).reshape(4, 1)
    got = fd.log_likelihood(lambda x, u: model(x, 1 - u.double()), schedule, x, prediction, rtol=1e-8, atol=1e-8)
    assert float((got - density(schedule, 0.0, x)).abs().max()) <= 8e-4


def test_hutchinson_is_unbiased_where_the_jacobian_is_not_diagonal() -> None:
    """eps = x @ M: one probe is noisy, the mean over 512 seeds is the exact trace's value within 5 standard errors."""
    M = torch.tensor([[0.8, 0.5], [0.1, 0.6]], dtype=torch.float64)
    model = lambda x, t: x @ M.to(x.dtype)  # noqa: E731
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(512, 2)
    probes = fd.log_likelihood(model, S.VP(), x, seeds=list(range(512)), t_end=1e-2)
    exact = fd.log_likelihood(model, S.VP(), x[:1], trace="exact", t_end=1e-2)
    assert probes.std() > 0.01
    assert abs(float(probes.mean() - exact)) <= 5 * float(probes.std()) / math.sqrt(512)
    again = fd.log_likelihood(model, S.VP(), x[:2], seeds=[0, 1], t_end=1e-2)
    torch.testing.assert_close(again, probes[:2], rtol=1e-4, atol=1e-4)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", fake)


def test_without_an_integrator_the_error_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "scipy", "torchdiffeq")
    with pytest.raises(ImportError, match="pip install scipy"):
        fd.log_likelihood(model_of(S.VP(), "eps"), S.VP(), torch.zeros(1, 2))


def test_torchdiffeq_is_used_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchdiffeq")
    x, model = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3), model_of(S.VP(), "eps")
    by_scipy = fd.log_likelihood(model, S.VP(), x)
    hide(monkeypatch, "scipy")
    torch.testing.assert_close(fd.log_likelihood(model, S.VP(), x), by_scipy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"trace": "full"}, ValueError, "valid: hutchinson, exact"),
        ({"t_start": 1.5}, ValueError, r"t_end must be < t_start, both in \[0, 1\], got t_start=1.5, t_end=0"),
        ({"t_end": math.nan}, ValueError, "t_end must be < t_start"),
        ({"x0": torch.full((2, 3), math.nan)}, ValueError, "x0 must be finite"),
        ({"schedule": "vp"}, TypeError, "needs a fastdiff.schedules.Schedule, got str"),
        ({"schedule": S.BFNDiscrete(1.0, 3)}, ValueError, "BFNDiscrete is a flow of classes"),
        ({"model": None}, TypeError, "model must be callable as model.x, t, ..cond., got NoneType"),
        ({"t_end": 1.0}, ValueError, "t_end must be < t_start"),
        ({"x0": torch.zeros(3)}, TypeError, r"x0 must be a float32 or float64 tensor \[B, \*\]"),
        ({"x0": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x0 must be a float32 or float64"),
        ({"prediction": "noise"}, ValueError, "unknown prediction 'noise'"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"model": lambda x, t: x, "schedule": S.VP(), "x0": torch.zeros(3, 2), **options}
    with pytest.raises(error, match=text):
        fd.log_likelihood(**given)


@pytest.mark.parametrize("around", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference"])
def test_a_model_without_a_graph_is_refused(around: Any) -> None:
    """Its divergence would be left out: 44 nats of 53 here."""
    model = around(model_of(S.VP(), "eps"))
    with pytest.raises(ValueError, match="does not depend on x through autograd"):
        fd.log_likelihood(model, S.VP(), torch.zeros(2, 8, dtype=torch.float64))


def test_the_likelihood_of_nothing() -> None:
    assert fd.log_likelihood(model_of(S.VP(), "eps"), S.VP(), torch.zeros(0, 3)).shape == (0,)


def test_an_infinite_drift_is_refused() -> None:
    with pytest.raises(ValueError, match="is not finite at t = 1"):
        fd.drift(lambda x, t: x, S.Cosine(), "v")(1.0, torch.zeros(1, 2))
