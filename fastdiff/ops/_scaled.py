"""Gradients from the slopes that a loss left: every sample times a number, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.native import TYPES
from fastdiff.ops import _dispatch, _fused
from fastdiff.transforms import batched, transformed

__all__ = ["scaled"]


def scaled(
    x: Tensor, g: Tensor, dtype: torch.dtype | None = None, *, by: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """(factor g[b] by[b]) x[b] of x's dtype (or another), rounded once; x [B, *] contiguous, g and by [B]."""
    dtype = dtype or x.dtype
    known = g.dtype == torch.float32 and x.dtype in TYPES and dtype in TYPES
    apart = transformed() or batched(g)
    if known and _dispatch.kernels_for(x) and not apart:
        out = torch.empty_like(x, dtype=dtype)
        if x.numel():
            torch.ops.fastdiff.scaled(x, g, by, factor, out)
        return out
    g = g if by is None else g * by
    g = g if factor == 1 else g * factor
    if apart or dtype != x.dtype:
        return (x * _dispatch.spread(g, x)).to(dtype)
    out = torch.empty_like(x)
    if known and _fused.wanted(x, g):
        if native.run("noise", "scaled_samples", x, g.contiguous(), out, *native.types(x), *native.layout(x)):
            return out
    return torch.mul(x, _dispatch.spread(g, x), out=out)


def _launch(x: Tensor, g: Tensor, by: Tensor | None, factor: float, out: Tensor) -> None:
    n, by = x.shape[1:].numel(), None if by is None else by.contiguous()
    args = (x, g, by, out, n, _dispatch.FIRST, g.stride(0), factor)  # of a sum's gradient the stride is 0
    _dispatch.launch(_dispatch.kernels("scaled").scaled_kernel, args, n, x.shape[0])


_dispatch.register("scaled(Tensor x, Tensor g, Tensor? by, float factor, Tensor(a!) out) -> ()", _launch)
