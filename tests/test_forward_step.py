"""One step of the forward chain: kernel against reference, and the chain against its closed form."""

import math

import pytest
import torch

from fastdiff import ops, rng
from fastdiff.schedules import VP, Betas, linear_betas

CHAIN = Betas(linear_betas(1000))
SEEDS = torch.tensor([3, 2**62 + 5, 8])
TOLERANCE = 4e-6


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def close(got, want):
    got, want = got.cpu().double(), want.cpu().double()
    assert got.shape == want.shape
    return got.numel() == 0 or bool((got - want).abs().max() <= TOLERANCE * want.abs().max())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (2, 19, 7), (3, 1003)])
def test_against_the_formula(shape, device):
    """sqrt(1 - beta_t) x + sqrt(beta_t) n with n = rng.normal(seeds, sample)."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 499, 999])
    n = rng.normal(SEEDS, shape, row=2).double()
    beta = (1e-4 + (0.02 - 1e-4) * t.double() / 999).view(3, *[1] * len(shape))
    want = torch.sqrt(1 - beta) * x.double() + torch.sqrt(beta) * n
    assert close(ops.forward_step(x.to(device), t.to(device), CHAIN, seeds=SEEDS.to(device), row=2), want)


def test_explicit_coefficients(device):
    """a and s as numbers or per sample, also with a^2 + s^2 != 1."""
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)).transpose(1, 2)
    n = rng.normal(SEEDS, (6, 5)).double()
    a, s = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([3.0, 0.0, 0.1])
    got = ops.forward_step(x.to(device), a=a.to(device), s=s.to(device), seeds=SEEDS.to(device))
    assert close(got, a.double().view(3, 1, 1) * x.double() + s.double().view(3, 1, 1) * n)
    got = ops.forward_step(x.to(device), a=1, s=s.to(device), seeds=SEEDS.to(device))
    assert close(got, x.double() + s.double().view(3, 1, 1) * n)
    got = ops.forward_step(x.to(device), a=0.5, s=2.0, noise=n.float().to(device))
    assert close(got, 0.5 * x.double() + 2.0 * n)


def test_steps_compose_to_the_marginal():
    """Forward steps of a constant, new noise each: mean alpha_t, variance 1 - alpha_bar_t (5 standard errors)."""
    n, steps = 1 << 15, 60
    chain = Betas(linear_betas(steps, 1e-3, 0.05))
    x = torch.ones(1, n)
    for t in range(steps):
        x = ops.forward_step(x, t, chain, seeds=[4], row=t)
    alpha, sigma = float(chain.alpha(steps - 1)), float(chain.sigma(steps - 1))
    assert abs(x.double().mean() - alpha) < 5 * sigma / math.sqrt(n)
    assert abs(x.double().std() / sigma - 1) < 5 / math.sqrt(2 * n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, device):
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    want = ops.forward_step_ref(x.double(), 700, CHAIN, noise=rng.normal(SEEDS, (33,)).double())
    got = ops.forward_step(x.to(device), 700, CHAIN, seeds=SEEDS.to(device))
    assert got.dtype == dtype
    error = (got.cpu().double() - want).abs()
    assert bool((error <= torch.finfo(dtype).eps * want.abs() + TOLERANCE * want.abs().max()).all())


def test_gradient(device):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.forward_step(x, 999, CHAIN, seeds=SEEDS.to(device)).sum(), x)
    assert close(gradient, torch.full((3, 4), math.sqrt(1 - 0.02)))


def test_gradient_of_the_coefficients(device):
    """d/da and d/ds of the sum: each sample's sum of x, and of its noise."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).to(device)
    a, s = (torch.full((3,), v, device=device, requires_grad=True) for v in (0.5, 2.0))
    of_a, of_s = torch.autograd.grad(ops.forward_step(x, a=a, s=s, seeds=SEEDS.to(device)).sum(), (a, s))
    assert close(of_a, x.sum(1)) and close(of_s, rng.normal(SEEDS, (4,)).sum(1))


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((X,), {}, ValueError, "t and schedule, or a and s"),
        ((X, 0), {}, ValueError, "t and schedule"),
        ((X, 0, CHAIN), {"a": 1.0, "s": 1.0}, ValueError, "neither t nor schedule"),
        ((X,), {"a": 1.0}, ValueError, "together"),
        ((X, 0.5, VP()), {}, TypeError, "Betas"),
        ((X, 0.5, CHAIN), {}, TypeError, "integer index"),
        ((X, 1000, CHAIN), {}, ValueError, "0..999"),
        ((X,), {"a": "1", "s": 1.0}, TypeError, "str"),
        ((X,), {"a": torch.ones(2), "s": 1.0}, ValueError, r"\(3,\), got \(2,\)"),
        ((X,), {"a": torch.ones(3, device="meta"), "s": 1.0}, ValueError, "meta"),
        ((X, 0, CHAIN), {"seeds": None}, ValueError, "neither"),
        ((X.long(), 0, CHAIN), {}, TypeError, "int64"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.forward_step(*args, **{"seeds": [1, 2, 3], **kwargs})
