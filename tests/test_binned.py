"""The binned readout against the error function written out, its kernel against its reference, its gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.ops._log_ndtr import log_ndtr
from fastdiff.ops.binned import bin_log_probability, bin_mean, bin_of, binned_readout, binned_readout_ref

COEF = torch.tensor([[1.2, -0.4], [0.0, 1.0], [1.05, -0.2]])


@pytest.fixture
def device(device_of_loops: torch.device) -> torch.device:
    return device_of_loops


def probabilities(mean: float, std: float, bins: int) -> np.ndarray:
    """Mass of N(mean, std^2) in each bin, tails in the outer ones, by math.erf (eq. 109 of the paper)."""
    cdf = [0.0] + [0.5 * (1 + math.erf((2 * j / bins - 1 - mean) / (std * 2**0.5))) for j in range(1, bins)] + [1.0]
    return np.diff(cdf)


def centres(bins: int) -> np.ndarray:
    return (2 * np.arange(bins) + 1) / bins - 1


def case(sample: tuple[int, ...], dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, *sample, generator=g)
    m = torch.cat([torch.randn(3, *sample, generator=g), 0.5 * torch.randn(3, *sample, generator=g)], 1)
    return x.to(device), m.to(device, dtype)


@pytest.mark.parametrize("bins", [2, 17, 256])
@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.3), (-1.7, 0.2), (0.9999, 1e-4), (0.0, 5.0)])
def test_the_mean_is_the_sum_over_bins(bins: int, mean: float, std: float) -> None:
    at = torch.tensor([[mean]], dtype=torch.float64)
    got = bin_mean(at, torch.full_like(at, std), bins).item()
    assert got == pytest.approx(float(probabilities(mean, std, bins) @ centres(bins)), abs=1e-14)


@pytest.mark.parametrize("bins", [2, 17, 256])
def test_samples_have_the_bins_probabilities(bins: int) -> None:
    mean, std, count = 0.4, 0.5, 200_000
    x = torch.full((1, count), mean)
    p = binned_readout(x, torch.zeros(1, 2 * count), torch.tensor([[1.0, std]]), torch.zeros(1).long(), bins=bins,
                       seeds=torch.tensor([5]))  # fmt: skip
    seen = np.bincount(((p + 1) * bins / 2).long().flatten().numpy(), minlength=bins)
    expected = probabilities(mean, std, bins) * count
    kept = expected > 5
    statistic = np.sum((seen[kept] - expected[kept]) ** 2 / expected[kept])
    assert abs(statistic - kept.sum() + 1) < 4 * math.sqrt(2 * max(kept.sum() - 1, 1))


@pytest.mark.parametrize("sample", [(1,), (63,), (3, 5, 7), (2, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [2, 16])
def test_the_kernel_equals_the_reference(
    sample: tuple[int, ...], dtype: torch.dtype, bins: int, device: torch.device
) -> None:
    x, m = case(sample, dtype, device)
    seeds, index = torch.tensor([3, 3, 9], device=device), torch.tensor([0, 4, 0], device=device)
    for row in (torch.tensor([2]), torch.tensor([0, 1, 2], dtype=torch.int32)):
        at = {"coef": COEF.to(device), "row": row.to(device), "bins": bins}
        got = binned_readout(x, m, **at, readout="mean")
        want = binned_readout_ref(x.double(), m, **at, readout="mean")
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
        got = binned_readout(x, m, **at, seeds=seeds, index=index)
        want = binned_readout_ref(x.double(), m, **at, seeds=seeds, index=index)
        assert (got.double() - want).abs().max() < 2.1 / bins  # the next bin, where v lies on an edge
        assert ((got.double() - want).abs() > 1e-6).float().mean() < 1e-3
        noise = torch.stack(
            [rng.normal(seeds[i : i + 1], sample, row=int(row[i % len(row)]), stream=2, index=index[i : i + 1])[0]
             for i in range(3)]
        )  # fmt: skip
        given = binned_readout(x, m, **at, noise=noise)
        assert ((given - got).abs() > 1e-6).float().mean() < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: 1 / 0, exp
@pytest.mark.parametrize("bins", [2, 3, 9, 10, 21, 22, 37, 256, 1000])
def test_the_mean_of_any_gaussian(bins: int, device: torch.device) -> None:
    """Stds from a hundredth of a bin to thousands, 0 and infinity, means inside, on edges and far outside: within 6e-7.

    A mean is a multiple of 2^-9, so that its distance to an edge is the same number in fp32 where the bins' are, too.
    """
    g = torch.Generator().manual_seed(bins)
    far = torch.tensor([0.0, 1.0, -1.0, 3.0, -40.0, 1e4, -1e30])
    mean = torch.cat([torch.randint(-700, 701, (1493,), generator=g) / 512, far])
    spread = torch.linspace(math.log(0.01 / bins), 9, len(mean))[torch.randperm(len(mean), generator=g)]
    mean, spread = torch.cat([mean, torch.full((2,), 2 / 7)]), torch.cat([spread, torch.tensor([120.0, -200.0])])
    m = torch.cat([mean, spread])[None]
    at = {"coef": torch.tensor([[0.0, 1.0]], device=device), "row": torch.tensor([0], device=device), "bins": bins}
    x = torch.zeros(1, len(mean))
    got = binned_readout(x.to(device), m.to(device), **at, readout="mean").cpu().double()
    want = bin_mean(mean.double(), spread.double().exp(), bins)
    # 6e-7: eight Phi of 2e-7 and 2 / 9 each, and p's own rounding; of many bins a sum's ends and differences.
    # half an ulp of an edge that is no fp32 number moves p by the width times Phi's slope, 0.4 / std, times as much
    edge = 0.0 if bins & (bins - 1) == 0 else 2.0**-22
    slope = (0.4 * edge / spread.double().exp()).clamp(max=1)
    assert ((got[0] - want).abs() <= 6e-7 + slope * 2 / bins).all()


def test_the_mean_is_differentiable() -> None:
    """Of two bins it is erf(mean / (std sqrt 2)) / 2, whose slope at 0 is 1 / (std sqrt(2 pi))."""
    m = torch.tensor([[0.0, math.log(0.3)]], requires_grad=True)
    p = binned_readout(torch.zeros(1, 1), m, torch.tensor([[0.0, 1.0]]), torch.tensor([0]), bins=2, readout="mean")
    (slope,) = torch.autograd.grad(p.sum(), m)
    assert slope[0, 0].item() == pytest.approx(1 / (0.3 * math.sqrt(2 * math.pi)), rel=1e-6) and slope[0, 1] == 0


def test_a_row_that_is_none_is_refused_on_a_cpu() -> None:
    for loops in (True, False):
        with ops.cpu_compiler(loops), pytest.raises(IndexError):
            binned_readout(torch.zeros(1, 8), torch.zeros(1, 16), COEF, torch.tensor([3]), bins=16, readout="mean")


def test_registration(kernel_device: torch.device) -> None:
    x, m = torch.randn(2, 8, device=kernel_device), torch.randn(2, 16, device=kernel_device)
    coef, row = torch.rand(3, 2, device=kernel_device), torch.tensor([1], device=kernel_device)
    seeds = torch.tensor([1, 2], device=kernel_device)
    for sampled, key in ((True, seeds), (False, None)):
        args = (x, m, coef, row, 8, sampled, key, None, 2, None, torch.empty_like(x))
        torch.library.opcheck(torch.ops.fastdiff.binned.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bins", [8, 16, 64])
@pytest.mark.parametrize("readout", ["mean", "sample"])
def test_nan_stays(bins: int, readout: str, device: torch.device, request: pytest.FixtureRequest) -> None:
    x, m = torch.zeros(1, 8, device=device), torch.zeros(1, 16, device=device)
    m[0, 3], m[0, 8 + 5] = torch.nan, torch.nan
    seeds = {"seeds": torch.tensor([1], device=device)} if readout == "sample" else {}
    interpreted = request.node.callspec.params["device_of_loops"] == "kernel" and not torch.cuda.is_available()
    row = torch.tensor([2], device=device)
    p = binned_readout(x, m, COEF.to(device), row, bins=bins, readout=readout, **seeds)
    assert p.shape == x.shape
    if not (interpreted and readout == "sample"):  # the interpreter's clamp
        assert p.isnan().flatten().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("bins", [2, 17, 256])
def test_log_probabilities(bins: int) -> None:
    for mean, std in ((0.1, 0.3), (-1.7, 0.2), (0.5, 2.0)):
        k = torch.arange(bins)
        at = torch.full((bins,), mean, dtype=torch.float64)
        got = bin_log_probability(at, torch.full_like(at, std), k, bins)
        p = probabilities(mean, std, bins)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-12)
        near = p > 1e-6
        np.testing.assert_allclose(got.numpy()[near], np.log(p[near]), rtol=0, atol=1e-9)


def test_log_probabilities_far_away_keep_value_and_gradient() -> None:
    """Bin 0 of 256 from mean 0.9, std 0.02: z = 94.6 std; ln Phi(-z) = -z^2/2 - ln(z sqrt(2 pi)) + O(1/z^2)."""
    for dtype in (torch.float64, torch.float32):
        mean = torch.tensor([0.9], dtype=dtype, requires_grad=True)
        got = bin_log_probability(mean, torch.full_like(mean, 0.02), torch.tensor([0]), 256)
        z = (0.9 - (2 / 256 - 1)) / 0.02
        assert got.item() == pytest.approx(-z * z / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-5)
        (grad,) = torch.autograd.grad(got, mean)
        assert grad.item() == pytest.approx(-z / 0.02, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_log_ndtr(dtype: torch.dtype) -> None:
    """phi(x) / Phi(-x) = x + 1 / (x + 2 / (x + 3 / ...)), Laplace's continued fraction; once more by its derivative."""
    z = torch.tensor([-3.0, -40.0, -2000.0, -1e5, -1e10], dtype=dtype, requires_grad=True)
    x = -z.detach().double()
    want = x.clone()
    for k in range(60, 0, -1):
        want = x + k / want
    (got,) = torch.autograd.grad(log_ndtr(z).sum(), z, create_graph=True)
    torch.testing.assert_close(got.detach().double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0)
    (second,) = torch.autograd.grad(got[0], z)
    assert second[0].item() == pytest.approx(-want[0].item() * (want[0].item() - 3), rel=1e-5)
    assert torch.equal(torch.func.grad(lambda v: log_ndtr(v).sum())(z.detach()), got.detach())


def test_gradients() -> None:
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.1, -1.2, 0.7], [0.3, 0.2, 0.05]))
    k = torch.tensor([3, 0, 15])
    assert torch.autograd.gradcheck(lambda m, s: bin_log_probability(m, s, k, 16), (mean, std))
    assert torch.autograd.gradcheck(lambda m, s: bin_mean(m, s, 16), (mean, std))


def test_bins() -> None:
    v = torch.tensor([-3.0, -1.0, -0.51, -0.49, 0.0, 0.99, 1.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(bin_of(v, 4), torch.tensor([-3, -3, -3, -1, 1, 3, 3, 3], dtype=torch.float64) / 4)


X, M, ROW, SEEDS = torch.zeros(2, 3), torch.zeros(2, 6), torch.zeros(1).long(), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((X, X, COEF, ROW), {"seeds": SEEDS}, ValueError, r"model_out must have shape \(2, 6\)"),
        ((X[0], M, COEF, ROW), {"seeds": SEEDS}, ValueError, r"x must be \[B, C"),
        ((X, M, COEF[0], ROW), {"seeds": SEEDS}, ValueError, r"coef must be \[N, 2\]"),
        ((X, M, COEF, SEEDS[:0]), {"seeds": SEEDS}, ValueError, "row must have shape"),
        ((X, M, COEF, ROW), {"seeds": SEEDS, "bins": 1}, ValueError, "bins must be an integer >= 2"),
        ((X, M, COEF, ROW), {"readout": "mode"}, ValueError, "valid: sample, mean"),
        ((X, M, COEF, ROW), {}, ValueError, "needs seeds or noise"),
        ((X, M, COEF, ROW), {"readout": "mean", "seeds": SEEDS}, ValueError, "draws nothing"),
        ((X, M, COEF, ROW), {"noise": X, "index": SEEDS}, ValueError, "index goes with seeds"),
        ((X.long(), M, COEF, ROW), {"seeds": SEEDS}, TypeError, "x must be"),
    ],
)
def test_bad_input(args: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        binned_readout(*args, **{"bins": 16, **options})
