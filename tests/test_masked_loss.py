"""Training masked diffusion: which tokens are masked, and the loss against the data's entropy and by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import rng, training
from fastdiff import schedules as S
from tests.test_masked import JOINT, KINDS, SCHEDULE, TOKENS, K, L, near, of_joint


def expected_loss(schedule: S.Masked, logits: Any, units: str = "nats") -> float:
    """E over times, data and masks of masked_loss for two tokens of JOINT: quadrature and enumeration."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    data = torch.tensor(list(itertools.product(range(3), range(3))))
    total = 0.0
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        gone = float(schedule.masked(u))
        for hidden in itertools.product((False, True), repeat=2):
            tokens = torch.where(torch.tensor(hidden), schedule.mask, data)
            p = gone ** sum(hidden) * (1 - gone) ** (2 - sum(hidden))
            t = torch.full((9,), u, dtype=torch.float64)
            loss = training.masked_loss(logits(tokens, t).double(), data, tokens, t, schedule, units=units)
            total += w * p * float((JOINT.flatten().double() * loss).sum())
    return total


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_the_exact_network_reaches_the_entropy(kind: str) -> None:
    """Masked diffusion is autoregression in every order: with exact conditionals the bound is the data's entropy."""
    schedule = S.Masked(3, kind=kind, power=2.0 if kind == "polynomial" else 1.0)
    entropy = float(-torch.xlogy(JOINT, JOINT).double().sum())
    assert expected_loss(schedule, of_joint) == pytest.approx(entropy, rel=1e-6)
    assert expected_loss(schedule, of_joint, "bits_per_dim") == pytest.approx(entropy / 2 / math.log(2), rel=1e-6)
    assert expected_loss(schedule, lambda x, t: 0.9 * of_joint(x, t)) > entropy + 1e-3


def test_masking_tokens() -> None:
    drawn = torch.randint(0, K, (3, 20_000), generator=torch.Generator().manual_seed(1))
    x = torch.where(drawn == 2, 0, drawn)  # data hold no mask
    t = torch.tensor([0.1, 0.5, 0.9])
    seeds, index = rng.keys(3, batch=3)
    for schedule in KINDS:
        got = training.mask_tokens(x, t, schedule, seeds=seeds, index=index)
        hidden = got == schedule.mask
        for i in range(3):
            assert near(float(hidden[i].float().mean()), float(schedule.masked(t[i].double())), 20_000)
        assert torch.equal(got[~hidden], x[~hidden])
        one = training.mask_tokens(x[2:], t[2:], schedule, seeds=seeds[2:], index=index[2:])
        assert torch.equal(one[0], got[2])
        assert not torch.equal(training.mask_tokens(x, t, schedule, seeds=seeds, index=index, row=1), got)
    u = torch.rand(3, 20_000)
    assert torch.equal(training.mask_tokens(x, 0.25, SCHEDULE, noise=u), torch.where(u <= 0.25, K, x))
    assert torch.equal(training.mask_tokens(x, 0.0, SCHEDULE, seeds=[1, 2, 3]), x)
    assert bool((training.mask_tokens(x, 1.0, SCHEDULE, seeds=[1, 2, 3]) == K).all())


def test_the_loss_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(2)
    schedule = S.Masked(K, 2)
    x = torch.tensor([[0, 1, 3, 4], [4, 3, 1, 0], [0, 0, 1, 1]])
    tokens = torch.tensor([[2, 1, 2, 4], [2, 2, 2, 2], [0, 0, 1, 1]])
    t = torch.tensor([0.3, 0.7, 0.0])
    logits = torch.randn(3, 4, K, generator=g, dtype=torch.float64, requires_grad=True)
    loss = training.masked_loss(logits, x, tokens, t, schedule)
    allowed = logits.detach().clone()
    allowed[..., 2] = -torch.inf
    logp = torch.log_softmax(allowed, -1).gather(-1, x[..., None])[..., 0]
    hidden = tokens == 2
    want = -(logp * hidden).sum(1) / t.double().clamp_min(1e-300)
    want[2] = 0
    assert torch.allclose(loss, want, rtol=1e-12)
    loss.sum().backward()
    p = torch.softmax(allowed, -1) - torch.nn.functional.one_hot(x, K)
    scale = torch.where(hidden, 1 / t.double().clamp_min(1e-300)[:, None], 0.0)
    assert torch.allclose(logits.grad, scale[..., None] * p, rtol=1e-12)
    bad = torch.where(hidden[..., None], logits.detach(), torch.nan).requires_grad_()
    training.masked_loss(bad, x, tokens, t, schedule).sum().backward()
    assert torch.allclose(bad.grad, logits.grad)
    half = training.masked_loss(logits.detach().bfloat16(), x, tokens, t, schedule)
    assert half.dtype == torch.float32 and torch.allclose(half.double(), want, rtol=2e-2)


def test_certain_and_right_at_the_very_end() -> None:
    """Where the weight is infinite a loss of 0 is 0, with a gradient of 0."""
    x = torch.zeros(1, 2, dtype=torch.int64)
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]] * 2], requires_grad=True)
    loss = training.masked_loss(logits, x, torch.full((1, 2), K), 0.0, SCHEDULE)
    loss.sum().backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(1, 2, K))


def test_traced_whole() -> None:
    x = torch.tensor([[0, 1, 3, 4]])
    t, logits = torch.tensor([0.3]), torch.randn(1, 4, K, generator=torch.Generator().manual_seed(3))

    def step(x: torch.Tensor, t: torch.Tensor, logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return training.masked_loss(logits, x, training.mask_tokens(x, t, SCHEDULE, seeds=seeds), t, SCHEDULE)

    given = x, t, logits, torch.tensor([7])
    assert torch.allclose(torch.compile(step, fullgraph=True, backend="eager")(*given), step(*given))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: training.mask_tokens(TOKENS, 1, SCHEDULE, seeds=[1, 2]), TypeError, "t must be a float or"),
        (lambda: training.mask_tokens(TOKENS, 2.0, SCHEDULE, seeds=[1, 2]), ValueError, r"t must be in \[0, 1\]"),
        (lambda: training.mask_tokens(TOKENS, torch.rand(3), SCHEDULE, seeds=[1, 2]), ValueError, "shape \\(2,\\)"),
        (lambda: training.mask_tokens(TOKENS, 0.5, SCHEDULE), ValueError, "give either seeds or noise"),
        (lambda: training.mask_tokens(TOKENS + 5, 0.5, SCHEDULE, seeds=[1, 2]), ValueError, "x must be in 0..4"),
        (lambda: training.masked_loss(torch.zeros(2, L, 4), TOKENS, TOKENS, 0.5, SCHEDULE), ValueError, "logits must"),
        (
            lambda: training.mask_tokens(TOKENS, 0.5, S.VP(), seeds=[1, 2]),
            TypeError,
            "must be schedules.Masked, got VP",
        ),
        (
            lambda: training.masked_loss(torch.zeros(2, L, K), TOKENS, TOKENS.int(), 0.5, SCHEDULE),
            TypeError,
            "tokens must",
        ),
        (lambda: training.mask_tokens(TOKENS, 0.5, S.Masked(K, 0), seeds=[1, 2]), ValueError, "without the mask, 0"),
    ],
)
def test_errors(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
