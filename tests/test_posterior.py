"""The DDPM posterior: kernel against reference, reference against Bayes' rule."""

import math

import numpy as np
import pytest
import torch

from fastdiff import ops
from fastdiff.schedules import VP, Betas, cosine_betas, linear_betas

CHAIN = Betas(linear_betas(1000))
PREDICTIONS = ("eps", "x0", "v", "score", "flow")
TOLERANCE = 4e-6


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, want, tolerance=TOLERANCE):
    got, want = got.cpu().double(), want.cpu().double()
    assert got.shape == want.shape
    return got.numel() == 0 or bool((got - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(50)], ids=["linear", "cosine"])
def test_bayes_rule(betas):
    """q(x_{t-1} | x_t, x0) from the product of two Gaussians: precisions add, means weigh in."""
    chain, t = Betas(betas), np.arange(1, len(betas))
    x_t, x0 = data(len(t), 3, dtype=torch.float64), data(len(t), 3, seed=1, dtype=torch.float64)
    mean, variance, log_variance, got_x0 = ops.posterior(x_t, x0, torch.from_numpy(t), chain, "x0")
    bar = np.cumprod(1 - betas)
    for i, k in enumerate(t):
        prior, noise, step = 1 - bar[k - 1], betas[k], math.sqrt(1 - betas[k])
        precision = 1 / prior + step**2 / noise
        want = (math.sqrt(bar[k - 1]) * x0[i] / prior + step * x_t[i] / noise) / precision
        assert torch.allclose(mean[i], want, rtol=1e-9, atol=1e-9)
        assert abs(float(variance[i]) * precision - 1) < 1e-9
        assert abs(float(log_variance[i]) - math.log(1 / precision)) < 1e-9
    assert torch.equal(got_x0, x0)


def test_first_step():
    """t = 0: mean is x0 exactly, variance 0, the log-variance that of t = 1."""
    x_t, m = data(2, 5, dtype=torch.float64), data(2, 5, seed=1, dtype=torch.float64)
    mean, variance, log_variance, x0 = ops.posterior(x_t, m, torch.tensor([0, 1]), CHAIN, "x0")
    assert torch.equal(mean[0], m[0]) and torch.equal(x0, m)
    assert variance[0] == 0 and variance[1] > 0
    assert log_variance[0] == log_variance[1] == torch.log(variance[1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_agree(prediction):
    """Every prediction of the same (x0, eps) gives the same posterior."""
    x0, eps = data(4, 6, dtype=torch.float64), data(4, 6, seed=1, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    x_t, target = ops.add_noise(x0, t, CHAIN, noise=eps, target=prediction)
    mean, _, _, got = ops.posterior(x_t, target, t, CHAIN, prediction)
    assert torch.allclose(got, x0, rtol=0, atol=1e-10)
    assert torch.allclose(mean, ops.posterior(x_t, x0, t, CHAIN, "x0")[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, (-0.8, 1.1)])
def test_against_float64(prediction, clip, device):
    x_t, m, t = data(3, 2, 41), data(3, 2, 41, seed=1), torch.tensor([0, 300, 700])
    want = ops.posterior_ref(x_t.double(), m.double(), t, CHAIN, prediction, clip)
    got = ops.posterior(x_t.to(device), m.to(device), t.to(device), CHAIN, prediction, clip)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    if clip:
        assert got[3].min() >= clip[0] and got[3].max() <= np.float32(clip[1])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (2, 19, 7), (3, 1003)])
def test_odd_shapes(shape, device):
    x_t, m, t = data(3, *shape), data(3, *shape, seed=1), torch.tensor([1, 2, 999])
    want = ops.posterior_ref(x_t.double(), m.double(), t, CHAIN, "v")
    got = ops.posterior(x_t.to(device), m.to(device), t.to(device), CHAIN, "v")
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_strides_and_scalar_time(dtype, device):
    x_t, m = (data(3, 6, 5, seed=s, dtype=dtype).transpose(1, 2) for s in (0, 1))
    want = ops.posterior_ref(x_t.double(), m.double(), 40, CHAIN, "v", (-1, 1))
    got = ops.posterior(x_t.to(device), m.to(device), 40, CHAIN, "v", (-1, 1))
    for i in (0, 3):
        assert got[i].dtype == dtype
        error = (got[i].cpu().double() - want[i]).abs()
        assert bool((error <= torch.finfo(dtype).eps * want[i].abs() + TOLERANCE).all())
    assert got[1].dtype == torch.float32 and close(got[1], want[1]) and close(got[2], want[2])


def test_nan_survives_the_clip(device):
    m = torch.zeros(1, 6, device=device)
    m[0, 2] = math.nan
    mean, _, _, x0 = ops.posterior(torch.zeros(1, 6, device=device), m, 5, CHAIN, "x0", (-1, 1))
    for y in (mean, x0):
        assert y.isnan().tolist() == [[e == 2 for e in range(6)]]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("n", [7, 512, 70003])
def test_the_cpus_loop_is_the_reference(n, dtypes):
    """The C++ loop against plain torch in float64, and the same bits for a sample alone."""
    x_t, m = data(3, n, dtype=dtypes[0]), 2 * data(3, n, seed=1, dtype=dtypes[1])
    t = torch.tensor([999, 3, 500])
    got = ops.posterior(x_t, m, t, CHAIN, "v", (-0.5, 0.75))
    want = ops.posterior_ref(x_t.double(), m.double(), t, CHAIN, "v", (-0.5, 0.75))
    unit = 2.0**-11 if dtypes[0] == torch.float16 else TOLERANCE
    assert all(close(g, w, unit) for g, w in zip(got, want, strict=True))
    alone = ops.posterior(x_t[1:2], m[1:2], t[1:2], CHAIN, "v", (-0.5, 0.75))
    assert all(torch.equal(a, g[1:2]) for a, g in zip(alone, got, strict=True))


def test_gradient(device):
    """d mean / d m of an x0 prediction is its coefficient, sqrt(ab_prev) beta / (1 - ab)."""
    x_t, m = data(2, 4).to(device), data(2, 4, seed=1).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.posterior(x_t, m, 10, CHAIN, "x0")[0].sum(), m)
    bar = np.cumprod(1 - CHAIN.betas)
    assert close(gradient, torch.full((2, 4), math.sqrt(bar[9]) * CHAIN.betas[10] / (1 - bar[10])))


def test_registration(kernel_device):
    x, coef = torch.randn(2, 8, device=kernel_device), torch.rand(4, 8, device=kernel_device)
    t, variance = torch.tensor([0, 3], device=kernel_device), torch.empty(2, 2, device=kernel_device)
    args = (x, x.clone(), coef, t, -1.0, 1.0, True, torch.empty_like(x), torch.empty_like(x), variance)
    torch.library.opcheck(torch.ops.fastdiff.posterior.default, args, test_utils=("test_schema", "test_faketensor"))


def test_time_out_of_range_is_nan_in_the_kernel(kernel_device):
    x, coef = torch.ones(3, 5, device=kernel_device), torch.ones(10, 8, device=kernel_device)
    mean, x0, variance = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(2, 3, device=kernel_device)
    t = torch.tensor([-1, 4, 10], device=kernel_device)
    torch.ops.fastdiff.posterior(x, x, coef, t, -1.0, 1.0, True, mean, x0, variance)
    assert variance.isnan().tolist() == [[True, False, True]] * 2
    for y in (mean, x0):
        assert y.isnan().all(1).tolist() == [True, False, True]


X = torch.zeros(3, 4)
TERMINAL = Betas(np.append(linear_betas(10), 1.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((X, X[:2], 0, CHAIN), {}, ValueError, r"\(3, 4\), got \(2, 4\)"),
        (([0.0], X, 0, CHAIN), {}, TypeError, "list"),
        ((X, X.int(), 0, CHAIN), {}, TypeError, "int32"),
        ((X, X.to("meta"), 0, CHAIN), {}, ValueError, "meta"),
        ((X, X, 0.5, VP()), {}, TypeError, "Betas"),
        ((X, X, 0.5, CHAIN), {}, TypeError, "integer index"),
        ((X, X, 1000, CHAIN), {}, ValueError, "0..999"),
        ((X, X, 0, CHAIN, "noise"), {}, ValueError, "eps, x0, v, score, flow"),
        ((X, X, 0, CHAIN), {"clip": (1, -1)}, ValueError, "lo <= hi"),
        ((X, X, 0, CHAIN), {"clip": (math.nan, 1)}, ValueError, "lo <= hi"),
        ((X, X, 0, TERMINAL), {}, ValueError, "zero"),
        ((torch.tensor(1.0), torch.tensor(1.0), 0, CHAIN), {}, ValueError, "0-d"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.posterior(*args, **kwargs)


def test_zero_terminal_snr_with_v():
    """beta = 1 at the end: v prediction stays finite, x0 = -v there."""
    x, v = data(1, 5), data(1, 5, seed=1)
    mean, variance, _, x0 = ops.posterior(x, v, 10, TERMINAL, "v")
    assert torch.equal(x0, -v) and bool(torch.isfinite(mean).all()) and 0 < float(variance) < 1
