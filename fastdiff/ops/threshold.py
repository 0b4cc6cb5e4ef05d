"""Dynamic thresholding: every sample clamped to a quantile of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import _dispatch
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor, spread
from fastdiff.ops.guide import sum_tile


def threshold(x0: Tensor, quantile: float = 0.995, maximum: float = math.inf) -> Tensor:
    """Dynamic thresholding: clamps every sample to its own quantile of |x0| and scales it back to [-1, 1].

        s = clamp(quantile of |x0|, 1, maximum);   y = clamp(x0, -s, s) / s

    Args:
        x0: [B, *sample], fp32, bf16 or fp16 (float64 too), any strides.   quantile: in 0..1, linear between neighbours.
        maximum: of s, at least 1; 1 is a plain clamp to [-1, 1].
    Returns: y [B, *sample] of x0's dtype; a sample that holds a NaN becomes NaN.
    Raises:  TypeError, ValueError: a wrong dtype, no batch axis, a quantile outside 0..1, a maximum below 1.
    Numerics: exact order statistics, found by counting digits (integers: no order of summation), interpolated in fp32
        (float64 for float64 data, by sorting). No host sync.
    Source:  Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """
    _threshold_checked(x0, quantile, maximum)
    graded = torch.is_grad_enabled() and x0.requires_grad
    if not _dispatch.kernels_for(x0) or graded or x0.dtype == torch.float64 or not x0.numel():
        return threshold_ref(x0, quantile, maximum)
    out = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    torch.ops.fastdiff.threshold(x0, float(quantile), float(maximum), out)
    return out


def threshold_ref(x0: Tensor, quantile: float = 0.995, maximum: float = math.inf) -> Tensor:
    """`threshold` in plain torch, by sorting; differentiable."""
    _threshold_checked(x0, quantile, maximum)
    if not x0.numel():
        return x0.clone()
    x = x0.to(torch.float64 if x0.dtype == torch.float64 else torch.float32)
    flat = x.abs().reshape(len(x), -1)
    rank = quantile * (flat.shape[1] - 1)
    below, above = math.floor(rank), math.ceil(rank)
    ordered = flat.sort(dim=1).values  # NaN comes last: it reaches the largest value
    low, high, last = ordered[:, below], ordered[:, above], ordered[:, -1]
    s = (low + (rank - below) * (high - low)).clamp(1.0, maximum)
    s = spread(torch.where(last.isnan(), last, s), x0)
    return (torch.minimum(torch.maximum(x, -s), s) / s).to(x0.dtype)


def _threshold_checked(x0: Tensor, quantile: float, maximum: float) -> None:
    check_tensor("x0", x0, dtypes=FLOATS64)
    check_batched("x0", x0)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in 0..1, got {quantile!r}")
    if not maximum >= 1:
        raise ValueError(f"maximum must be at least 1, got {maximum!r}")


def _launch_threshold(x0: Tensor, quantile: float, maximum: float, out: Tensor) -> None:
    batch, n = x0.shape[0], x0.shape[1:].numel()
    kernels, tile, x0 = _dispatch.kernels("threshold"), sum_tile(n), x0.contiguous()
    rank = quantile * (n - 1)
    k, first = math.floor(rank), _dispatch.FIRST
    counts = torch.zeros(batch, 8, 16, dtype=torch.int32, device=x0.device)
    ends = torch.zeros(batch, 2, dtype=torch.int32, device=x0.device)
    ends[:, 0] = 2**31 - 1
    for digit in range(8):
        _dispatch.launch(kernels.digit_kernel, (x0, counts, n, first, k), n, batch, tile=tile, PASS=digit)
    _dispatch.launch(kernels.next_kernel, (x0, counts, ends, n, first, k), n, batch, tile=tile)
    args = (x0, counts, ends, out, n, first, k, rank - k, maximum)
    _dispatch.launch(kernels.threshold_kernel, args, n, batch, tile=tile)


_dispatch.register("threshold(Tensor x0, float quantile, float maximum, Tensor(a!) out) -> ()", _launch_threshold)
