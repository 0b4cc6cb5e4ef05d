"""Losses of Bayesian flow networks: worked values, the paper's densities, information identities, gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, training
from fastdiff import schedules as S
from fastdiff.training import bfn
from tests.bfn_oracle import one_hot, posterior_logits

C = S.BFNContinuous(0.02)


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_the_worked_continuous_value() -> None:
    """22.28 +- 0.04: mu, eps' and x are rounded to four digits."""
    mu, noise, x = double(0.2959, 0.4435, 0.2119), double(0.05, -0.02, 0.03), double(0.3, 0.5, 0.2)
    loss = training.bfn_continuous_loss(noise, x, mu, 0.5, S.BFNContinuous(0.001))
    assert loss.item() == pytest.approx(22.28, abs=0.04)
    bits = training.bfn_continuous_loss(noise, x, mu, 0.5, S.BFNContinuous(0.001), units="bits_per_dim")
    assert bits.item() == pytest.approx(loss.item() / (3 * math.log(2)), rel=1e-14)


def test_the_worked_discrete_value() -> None:
    logits = double(0.2, 0.6, 0.2).log()[:, None]
    loss = training.bfn_discrete_loss(logits, torch.tensor([[1]]), 0.5, S.BFNDiscrete(4.0, 3))
    assert loss.item() == pytest.approx(1.44, rel=1e-14)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [None, 8])
def test_predictions_of_the_same_x0_have_the_same_loss(prediction: str, steps: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    x, p = (torch.randn(8, 3, 2, dtype=torch.float64, generator=g) for _ in range(2))
    t = 1 - torch.arange(8, dtype=torch.float64) / 8
    mu, eps = training.add_noise(x, t, C, seeds=range(8))
    a, s = (f(t).view(-1, 1, 1) for f in (C.alpha, C.sigma))
    m = {"eps": (mu - a * p) / s, "x0": p, "v": (a * (mu - a * p) / s - s * p) / torch.sqrt(a * a + s * s)}[prediction]
    got = training.bfn_continuous_loss(m[1:], x[1:], mu[1:], t[1:], C, prediction=prediction, steps=steps)
    u = 1 - t[1:]
    if steps is None:
        weight = -math.log(0.02) / 0.02 ** (2 * u)
    else:
        weight = 8 / 2 * (1 - 0.02 ** (2 / 8)) / 0.02 ** (2 * (8 * u + 1) / 8)
    torch.testing.assert_close(got, weight * ((x - p) ** 2).sum((1, 2))[1:], rtol=1e-9, atol=0)
    nothing = training.bfn_continuous_loss(m[:1].nan_to_num(), x[:1], 0 * x[:1], 1.0, C, prediction=prediction)
    known = {"eps": torch.zeros_like(p), "x0": p, "v": -m.nan_to_num()}[prediction][:1]  # at u = 0
    torch.testing.assert_close(nothing, -math.log(0.02) * ((x[:1] - known) ** 2).sum((1, 2)))


def test_the_continuous_loss_is_the_information_of_the_flow() -> None:
    """I-MMSE for data N(0, s^2): the loss of the ideal network integrates to ln(1 + s^2 (1/sigma_1^2 - 1)) / 2."""
    s2, nodes = 0.3**2, np.polynomial.legendre.leggauss(200)
    u = torch.from_numpy((nodes[0] + 1) / 2)
    x = torch.ones(200, 1, dtype=torch.float64)
    mmse = 1 / (1 / s2 + 0.02 ** (-2 * u) - 1)  # the posterior variance: precision 1/s^2 + rho - 1
    loss = training.bfn_continuous_loss(x - mmse.sqrt()[:, None], x, 0 * x, 1 - u, C, prediction="x0")
    total = float((loss * torch.from_numpy(nodes[1] / 2)).sum())
    assert total == pytest.approx(0.5 * math.log(1 + s2 * (0.02**-2 - 1)), rel=1e-10)

    # n steps cost more: every step uses what was known before it; twice the steps, half the surplus
    def chain(n: int) -> float:
        v = torch.arange(n, dtype=torch.float64) / n
        gap = (1 / (1 / s2 + 0.02 ** (-2 * v) - 1)).sqrt()[:, None]
        one = torch.ones(n, 1, dtype=torch.float64)
        return training.bfn_continuous_loss(one - gap, one, 0 * one, 1 - v, C, prediction="x0", steps=n).mean().item()

    surplus = [chain(n) - total for n in (200, 400, 800)]
    assert surplus[0] / surplus[1] == pytest.approx(2, abs=0.1) and surplus[1] / surplus[2] == pytest.approx(2, abs=0.1)


def test_continuous_reconstruction() -> None:
    g = torch.Generator().manual_seed(1)
    x, p = (torch.randn(4, 5, dtype=torch.float64, generator=g) for _ in range(2))
    got = training.bfn_continuous_reconstruction(p, x, 0 * x, C, prediction="x0")
    want = -torch.distributions.Normal(p, 0.02).log_prob(x).sum(1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("K", [2, 3, 27])
def test_the_n_step_loss_is_the_papers_ratio_of_densities(K: int) -> None:
    """n (ln N(y | a (K e_x - 1), a K) - ln sum_k p_k N(y | a (K e_k - 1), a K)), the densities written out."""
    schedule, n, g = S.BFNDiscrete(1.7, K), 5, torch.Generator().manual_seed(2)
    x = torch.randint(0, K, (n, 4), generator=g)
    noise = torch.randn(n, 4, K, dtype=torch.float64, generator=g)
    m = torch.randn(n, 4, 1 if K == 2 else K, dtype=torch.float64, generator=g)
    i = torch.arange(1, n + 1)
    got = training.bfn_discrete_loss(
        m, x, 1 - (i - 1).double() / n, schedule, steps=n,
        noise=noise if K > 2 else (noise.gather(-1, x[..., None]) - noise.gather(-1, 1 - x[..., None])) / 2**0.5,
    )  # fmt: skip
    a = torch.from_numpy(schedule.accuracy(i.numpy(), n))[:, None, None, None]
    logits = torch.cat([torch.zeros_like(m), m], -1) if K == 2 else m
    centres = a * (K * torch.eye(K, dtype=torch.float64) - 1)  # [n, 1, k, K]
    spread = torch.sqrt(a * K)
    y = a * (K * one_hot(x, K)[:, :, None] - 1) + spread * noise[:, :, None]  # [n, 4, 1, K]
    density = torch.distributions.Normal(centres, spread).log_prob(y).sum(-1)  # [n, 4, k]
    true = density.gather(-1, x[..., None])[..., 0]
    want = n * (true - torch.logsumexp(torch.log_softmax(logits, -1) + density, -1)).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("K", [2, 3, 27])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_exact_network_pays_the_entropy_for_every_n(K: int, steps: int) -> None:
    """Sum of the steps' KL is the information of what was sent, reconstruction the rest: together H(prior)."""
    schedule, B = S.BFNDiscrete(1.0, K), 60_000 // steps
    pi = 1.0 / torch.arange(1, K + 1, dtype=torch.float64)
    pi /= pi.sum()
    g = torch.Generator().manual_seed(3)
    network: Callable[..., Tensor] = posterior_logits(pi)
    parts = []
    for i in range(1, steps + 2):
        x = torch.multinomial(pi, B, replacement=True, generator=g)[:, None]
        t = 1.0 - (i - 1) / steps
        z = ops.categorical_noise(x, t, schedule, seeds=[1000 * i + j for j in range(B)], out_dtype=torch.float64)
        m = network(z, 0)
        if i <= steps:
            sent = training.bfn_discrete_loss(m, x, t, schedule, steps=steps, seeds=range(B), row=i)
            parts.append(sent / steps)
        else:
            parts.append(training.bfn_discrete_reconstruction(m, x, schedule))
    total = sum(p.mean().item() for p in parts)
    error = math.sqrt(sum(p.var().item() / B for p in parts))
    entropy = -(pi * pi.log()).sum().item()
    assert total == pytest.approx(entropy, abs=4 * error)
    assert error < 0.02 * entropy


def test_infinitely_many_steps() -> None:
    """The n-step loss, averaged over its noise in antithetic pairs, approaches K beta_1 u ||e_x - p||^2."""
    schedule, n, count = S.BFNDiscrete(1.0, 3), 1000, 20_000
    m = torch.tensor([[[0.3, -0.2, 0.5]]], dtype=torch.float64).expand(count, 1, 3)
    x = torch.ones(count, 1, dtype=torch.int64)
    limit = training.bfn_discrete_loss(m[:1], x[:1], 0.5, schedule).item()
    noise = torch.randn(count, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    pair = [training.bfn_discrete_loss(m, x, 0.5, schedule, steps=n, noise=s * noise) for s in (1, -1)]
    loss = (pair[0] + pair[1]) / 2
    error = loss.std().item() / count**0.5
    assert loss.mean().item() == pytest.approx(limit, abs=4 * error + 0.01 * limit)  # 1/n of it is left
    assert error < 0.01 * limit


@pytest.mark.parametrize("K", [2, 5])
def test_gradients_of_the_discrete_losses(K: int) -> None:
    schedule, g = S.BFNDiscrete(1.7, K), torch.Generator().manual_seed(4)
    x, t = torch.randint(0, K, (4, 3), generator=g), 1 - torch.arange(4, dtype=torch.float64) / 4
    m = torch.randn(4, 3, 1 if K == 2 else K, dtype=torch.float64, generator=g, requires_grad=True)
    for options in ({}, {"steps": 4, "seeds": range(4)}, {"units": "bits_per_dim"}):
        assert torch.autograd.gradcheck(lambda v, o=options: training.bfn_discrete_loss(v, x, t, schedule, **o), m)
    assert torch.autograd.gradcheck(lambda v: training.bfn_discrete_reconstruction(v, x, schedule), m)


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_without_axes_are_samples_of_one_element(K: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    x = torch.randint(0, K, (4,), generator=g)
    m = torch.randn(4, 1 if K == 2 else K, dtype=dtype, generator=g)
    options: list[dict[str, Any]] = [{}, {"steps": 3, "seeds": range(4)}]
    for loss, given in (
        (training.bfn_discrete_reconstruction, [{}]), (functools.partial(training.bfn_discrete_loss, t=1.0), options),
    ):  # fmt: skip
        for some in given:
            got, want = (
                loss(m.view(*s, -1), x.view(s), schedule=S.BFNDiscrete(1.7, K), **some) for s in ((4,), (4, 1))
            )
            assert torch.equal(got, want)
    values = torch.randn(3, 4, dtype=dtype, generator=g)
    for some in options[:1] + [{"steps": 4}]:
        got, want = (training.bfn_continuous_loss(*values.view(3, *s), 0.5, C, **some) for s in ((4,), (4, 1)))
        assert torch.equal(got, want)
    got, want = (training.bfn_continuous_reconstruction(*values.view(3, *s), C) for s in ((4,), (4, 1)))
    assert torch.equal(got, want)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_gradients_of_the_continuous_losses(prediction: str) -> None:
    g = torch.Generator().manual_seed(5)
    x, mu, m = (torch.randn(4, 3, dtype=torch.float64, generator=g) for _ in range(3))
    t = 1 - torch.arange(4, dtype=torch.float64) / 4
    m.requires_grad_()
    for steps in (None, 4):
        assert torch.autograd.gradcheck(
            lambda v, n=steps: training.bfn_continuous_loss(v, x, mu, t, C, prediction=prediction, steps=n), m
        )
    assert torch.autograd.gradcheck(
        lambda v: training.bfn_continuous_reconstruction(v, x, mu, C, prediction=prediction), m
    )


def test_losses_of_many_classes_in_bf16_are_finite() -> None:
    schedule, x = S.BFNDiscrete(16.0, 262_144), torch.tensor([[5, 262_143]])
    z = ops.categorical_noise(x, 0.0, schedule, seeds=[1], out_dtype=torch.bfloat16)
    assert isinstance(z, Tensor) and z.isfinite().all()
    m = (40 * z).requires_grad_()
    for t, options in ((0.0, {}), (1.0, {"steps": 1, "seeds": [2]})):
        loss = training.bfn_discrete_loss(m, x, t, schedule, **options)
        (grad,) = torch.autograd.grad(loss.sum(), m)
        assert loss.isfinite().all() and grad.isfinite().all()


def test_many_classes_keep_the_digits_of_the_n_step_loss() -> None:
    """fp32 against float64 to 1e-5 where the sent message is 4 million: K = 262,144, beta_1 = 16, one step."""
    g = torch.Generator().manual_seed(3)
    K = 262144
    x, m, noise = torch.tensor([[7]]), torch.randn(1, 1, K, generator=g), torch.randn(1, 1, K, generator=g)
    options: dict[str, Any] = {"steps": 1, "t": 1.0, "schedule": S.BFNDiscrete(16.0, K)}
    want = training.bfn_discrete_loss(m.double(), x, noise=noise.double(), **options)
    got = training.bfn_discrete_loss(m, x, noise=noise, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_exported() -> None:
    names = [n for n in training.__all__ if n.startswith("bfn")]
    assert names and all(hasattr(fd.training, n) for n in names)


X, MU = torch.zeros(2, 3), torch.zeros(2, 3)
Z, K5 = torch.zeros(2, 3, 5), S.BFNDiscrete(1.0, 5)
CLASSES = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: training.bfn_continuous_loss(X, X, MU, 0.5, K5),
            TypeError,
            "schedules.BFNContinuous, got BFNDiscrete",
        ),
        (lambda: training.bfn_continuous_loss(X, X[:1], MU, 0.5, C), ValueError, "x must have shape"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 1.5, C), ValueError, r"t must be in 0\.\.1"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 0.5, C, prediction="flow"), ValueError, "valid: eps, x0, v"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 0.5, C, steps=0), ValueError, "steps must be an integer >= 1"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 0.3, C, steps=4), ValueError, "the beginning of a step"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 0.0, C, steps=4), ValueError, "the beginning of a step"),
        (lambda: training.bfn_continuous_loss(X, X, MU, 0.5, C, units="bits"), ValueError, "valid: nats, bits_per_dim"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES, 0.5, C), TypeError, "schedules.BFNDiscrete, got BFNContinuous"),
        (lambda: training.bfn_discrete_loss(Z[..., :3], CLASSES, 0.5, K5), ValueError, "logits must end in 5"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES + 5, 0.5, K5), ValueError, r"x must be in 0\.\.4"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES - 1, 0.5, K5), ValueError, r"x must be in 0\.\.4"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES.float(), 0.5, K5), TypeError, "x must be int64"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES, -0.1, K5), ValueError, r"t must be in 0\.\.1"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES, 0.5, K5, seeds=[1, 2]), ValueError, "give steps"),
        (lambda: training.bfn_discrete_loss(Z, CLASSES, 0.5, K5, steps=2), ValueError, "either seeds or noise"),
        (lambda: training.bfn_discrete_reconstruction(Z, CLASSES[:1], K5), ValueError, "x must have shape"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("steps", [1, 20, 5000])
def test_times_of_steps(steps):
    """Every one begins a step, every step comes up equally often, and times between steps are refused."""
    schedule = S.BFNDiscrete(3.0, 5)
    t = fd.training.step_times(4000, steps, generator=torch.Generator().manual_seed(0))
    i, _ = bfn.interval(t, schedule, steps)
    assert torch.equal((1 - (i - 1) / steps).float(), t)
    if steps == 20:
        count = torch.bincount(i.long(), minlength=21)[1:]
        assert float(((count - 200.0) ** 2 / 200).sum()) < 19 + 5 * 38**0.5
    with pytest.raises(ValueError, match="beginning of a step"):
        bfn.interval(torch.tensor([1 - 0.4 / steps]), schedule, steps)
    with pytest.raises(ValueError, match="steps must be an int >= 1, got 0"):
        fd.training.step_times(3, 0)
