"""Gradients from the slopes that a loss left: every sample times a number, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.native import TYPES
from fastdiff.ops import _dispatch, _fused

__all__ = ["scaled"]


def scaled(x: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """g[b] x[b] of x's dtype (or another), rounded once; x [B, *] contiguous, g [B]."""
    dtype = dtype or x.dtype
    if _dispatch.transformed():
        return (x * _dispatch.spread(g, x)).to(dtype)
    known = g.dtype == torch.float32 and x.dtype in TYPES and dtype in TYPES
    if known and _dispatch.kernels_for(x):
        out = torch.empty_like(x, dtype=dtype)
        if x.numel():
            torch.ops.fastdiff.scaled(x, g.contiguous(), out)
        return out
    if dtype != x.dtype:
        return (x * _dispatch.spread(g, x)).to(dtype)
    out = torch.empty_like(x)
    if known and _fused.wanted(x, g):
        if native.run("noise", "scaled_samples", x, g.contiguous(), out, *native.types(x), *native.layout(x)):
            return out
    return torch.mul(x, _dispatch.spread(g, x), out=out)


def _launch(x: Tensor, g: Tensor, out: Tensor) -> None:
    n = x.shape[1:].numel()
    _dispatch.launch(_dispatch.kernels("scaled").scaled_kernel, (x, g, out, n, _dispatch.FIRST), n, x.shape[0])


_dispatch.register("scaled(Tensor x, Tensor g, Tensor(a!) out) -> ()", _launch)
