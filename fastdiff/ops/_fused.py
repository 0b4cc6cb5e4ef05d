"""Noising and loss on a CPU: C++ loops that draw the noise and use it at once, so that it is never stored."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.native import TYPES
from fastdiff.ops import _dispatch

_enabled = True
BLOCK = 256  # elements whose loss is added up first: WIDTH of fastdiff_kernels/noise_cpu.cpp


@contextmanager
def cpu_compiler(enabled: bool) -> Iterator[None]:
    """Inside this context the CPU's operations run as C++ loops (the default), or as eager torch."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def wanted(*tensors: Tensor) -> bool:
    """Are these plain CPU tensors for the loops: outside of tracing, functorch and `cpu_compiler(False)`?"""
    return _enabled and native.plain(tensors) and not _dispatch.kernels_for(tensors[0])


class Noise(ctypes.Structure):
    """Normals [batch, n] of one stream and row, as fastdiff_kernels/noise_cpu.cpp reads them."""

    _fields_ = [("seeds", c_void_p), ("index", c_void_p), *((v, c_int64) for v in ("stream", "row", "batch", "n"))]


def _noise(
    seeds: Tensor, index: Tensor | None, row: int, stream: int, like: Tensor
) -> tuple[Noise, tuple[Tensor, ...]]:
    """The noise of like's shape [B, n], and the tensors that must outlive it."""
    held = seeds.contiguous(), (torch.zeros_like(seeds) if index is None else index).contiguous()
    return Noise(*(v.data_ptr() for v in held), stream, row, *like.shape), held


def noised(
    x: Tensor, coef: Tensor, seeds: Tensor, index: Tensor | None, row: int, stream: int, outs: Sequence[Tensor]
) -> bool:
    """outs[i] = coef[:, 2 i] x + coef[:, 2 i + 1] noise; False, and nothing written, where no loop can run.

    Args: x: [B, n]. coef: fp32 [B, 4]. outs: one or two [B, n] of one dtype. All contiguous, no float64.
    """
    kinds = (c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int, c_int)
    loop = native.function("noise", "add_noise", *kinds) if wanted(x, seeds) else None
    if loop is None:
        return False
    noise, _held = _noise(seeds, index, row, stream, x)
    out, target = (*(v.data_ptr() for v in outs), None)[:2]
    native.call(
        loop, ctypes.byref(noise), x.data_ptr(), TYPES[x.dtype], coef.data_ptr(), out, target, TYPES[outs[0].dtype],
        native.threads(x.numel(), heavy=True),
    )  # fmt: skip
    return True


def loss_and_gradient(
    m: Tensor, x0: Tensor | None, coef: Tensor, seeds: Tensor, index: Tensor | None, row: int, stream: int, kind: int,
    delta: float, loss: Tensor, grad: Tensor,
) -> bool:  # fmt: skip
    """loss = coef[:, 2] mean rho(m - coef[:, 0] x0 - coef[:, 1] noise) and its gradient by m; False where no loop runs.

    Args: m, x0, grad: [B, n], grad of m's dtype. coef: fp32 [B, 4]. kind: index into LOSSES. loss: fp32 [B]. All
        contiguous, no float64.
    """
    kinds = (c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_int, c_float, c_void_p, c_void_p, c_void_p, c_int)
    loop = native.function("noise", "denoising_loss", *kinds) if wanted(m, seeds) else None
    if loop is None:
        return False
    noise, _held = _noise(seeds, index, row, stream, m)
    sums = torch.empty(m.shape[0], -(-m.shape[1] // BLOCK), dtype=torch.float64)
    clean = (None, 0) if x0 is None else (x0.data_ptr(), TYPES[x0.dtype])
    outputs = (v.data_ptr() for v in (loss, grad, sums))
    native.call(
        loop, ctypes.byref(noise), m.data_ptr(), TYPES[m.dtype], *clean, coef.data_ptr(), kind, delta, *outputs,
        native.threads(m.numel(), heavy=True),
    )  # fmt: skip
    return True
