"""Dynamic thresholding: kernel and reference against torch.quantile."""

import math

import numpy as np
import pytest
import torch

from fastdiff import native, ops

X = torch.zeros(3, 4)


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantile", "maximum"), [(0.995, math.inf), (0.9, 2.0), (0.5, 1.0), (0.0, 3.0), (1.0, 9.0)])
def test_threshold(quantile, maximum, dtype, device):
    x = (2 * data(3, 4, 9, 7)).to(dtype)
    x[1] *= 0.1  # inside [-1, 1]: unchanged
    got = ops.threshold(x.to(device), quantile, maximum)
    s = torch.quantile(x.double().abs().reshape(3, -1), quantile, dim=1).clamp(1, maximum)
    s = s.reshape(3, 1, 1, 1)
    want = x.double().clamp(-s, s) / s
    assert got.dtype == dtype and float(got.abs().max()) <= 1
    assert bool((got.cpu().double() - want).abs().max() <= max(2e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("quantile", [1, 0, np.float64(0.75), torch.tensor(0.75).item()])
def test_quantiles_of_any_kind(quantile, device, monkeypatch):
    """An int or a NumPy number as the first quantile of a process, and an ordinary one after it."""
    monkeypatch.setattr(native, "_bound", {})
    native.function.cache_clear()
    x = (3 * torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))).to(device)
    want = torch.quantile(x.abs(), float(quantile), dim=1).clamp(min=1)
    torch.testing.assert_close(ops.threshold_bound(x, quantile), want, rtol=1e-6, atol=0)
    want = torch.quantile(x.abs(), 0.9, dim=1).clamp(min=1)
    torch.testing.assert_close(ops.threshold_bound(x, 0.9), want, rtol=1e-6, atol=0)


def test_threshold_edges(device):
    x = 3 * data(2, 30).float().to(device)
    x[0, 4] = math.nan
    got = ops.threshold(x)
    assert got[0].isnan().all() and not got[1].isnan().any()
    together = ops.threshold(x[1:].expand(3, 30))
    assert torch.equal(together[2], got[1])
    assert ops.threshold(x[:, :0]).shape == (2, 0)
    one = torch.tensor([[3.0]], device=device)
    assert float(ops.threshold(one)) == 1
    for args, text in (((X, 1.5), "0..1"), ((X, 0.9, 0.5), "at least 1"), ((torch.tensor(1.0),), "0-d")):
        with pytest.raises(ValueError, match=text):
            ops.threshold(*args)
    with pytest.raises(TypeError, match="int32"):
        ops.threshold(X.int())


def test_samples_too_large_to_count(kernel_device):
    """Refused before anything of that size is made: the kernel's histogram has 32 bits."""
    if kernel_device.type == "cuda":
        pytest.skip("the same code, with 8 GiB")
    x, bound = torch.zeros(1).expand(1, 2**31), torch.empty(1)
    with pytest.raises(ValueError, match="at most 2\\^31 - 1 elements of a sample, got 2147483648"):
        torch.ops.fastdiff.threshold_bound(x, None, None, None, None, None, False, 1, 0.5, 1.0, bound)


@pytest.mark.parametrize("n", [255, 256, 257, 5000, 8193, 20001])  # from 8193 on the kernels cut a sample into pieces
def test_any_order_statistic(n, device):
    """Magnitudes of all sizes, zeros, the smallest and infinite ones: low + f (high - low) of the sorted sample."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, generator=g) * torch.exp(8 * torch.randn(2, n, generator=g))
    x[0, :7], x[1, :3] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, math.inf, 3e38, 1.5]), -math.inf
    ordered = x.abs().double().sort(1).values
    for k in (0, 1, n // 2, n - 9, n - 4, n - 1) if n <= 5000 else (n // 2, n - 4):
        for fraction in (0.0, 0.25):
            if k + fraction < n - 1 or fraction == 0:
                quantile = (k + fraction) / (n - 1)
                rank = quantile * (n - 1)
                low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
                want = torch.where(low == high, low, low + (rank - math.floor(rank)) * (high - low)).clamp(min=1)
                got = ops.threshold_bound(x.to(device), quantile).cpu().double()
                assert (got == want).logical_or((got - want).abs() <= 3e-7 * want).all()


def test_equal_values_and_compile(device):
    """Ranks between equal values, and a rank between two groups of them."""
    x = torch.tensor([[3.0, -3.0, 3.0, 1.0, -1.0, 5.0, 5.0, 5.0]]).to(device)
    for quantile in (0.1, 0.3, 0.5, 0.6, 0.65, 0.9):
        s = torch.quantile(x.cpu().abs(), quantile).clamp(min=1)
        assert torch.allclose(ops.threshold(x, quantile).cpu(), x.cpu().clamp(-s, s) / s, rtol=1e-6)
    compiled = torch.compile(lambda x: ops.threshold(x, 0.8), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x.cpu()), ops.threshold(x, 0.8).cpu())
