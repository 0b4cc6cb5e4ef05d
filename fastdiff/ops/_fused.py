"""Noising and loss on a CPU: C++ loops that draw the noise and use it at once, so that it is never stored."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64, c_void_p

from torch import Tensor

from fastdiff import native
from fastdiff.ops import _dispatch

_enabled = True


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
) -> tuple[object, tuple[Tensor | None, ...]]:
    """A reference to the noise of like [B, *sample], and the tensors that must outlive it."""
    seeds, index = seeds.contiguous(), None if index is None else index.contiguous()
    batch = like.shape[0]
    made = Noise(
        seeds.data_ptr(), None if index is None else index.data_ptr(), stream, row, batch, like.numel() // max(1, batch)
    )  # fmt: skip
    return ctypes.byref(made), (seeds, index)


def noised(
    x: Tensor, coef: Tensor, t: Tensor | None, seeds: Tensor, index: Tensor | None, row: int, stream: int,
    outs: Sequence[Tensor],
) -> bool:  # fmt: skip
    """outs[i] = c[2 i] x + c[2 i + 1] noise, c a sample's row; False, and nothing written, where no loop can run.

    Args: x: [B, *sample]. coef: fp32 [T, 4], t int64 [B] or [1]; or [B or 1, 4] and None. outs: one or two [B, *sample]
        of one dtype, contiguous. No float64.
    """
    if not wanted(x, seeds):
        return False
    x, (out, target) = x.contiguous(), (*outs, None)[:2]
    noise, _held = _noise(seeds, index, row, stream, x)
    rows, _table = native.coef_rows(coef, t)
    threads = native.threads(x.numel(), heavy=True)
    return native.run("noise", "add_noise", noise, rows, x, out, target, *native.types(x, outs[0]), threads)


def loss_and_slopes(
    m: Tensor, x0: Tensor | None, coef: Tensor, t: Tensor | None, seeds: Tensor, index: Tensor | None, row: int,
    stream: int, kind: int, delta: float, loss: Tensor, slope: Tensor, scale: Tensor,
) -> bool:  # fmt: skip
    """loss = c[2] mean rho(m - c[0] x0 - c[1] noise), its gradient by m as scale slope; False where no loop can run.

    Args: m, x0: [B, *sample]. coef, t: as for `noised`. kind: index into LOSSES. loss, scale: fp32 [B]. slope:
        [B, *sample] of m's dtype, contiguous. No float64.
    """
    if not wanted(m, seeds):
        return False
    m, x0 = m.contiguous(), None if x0 is None else x0.contiguous()
    noise, _held = _noise(seeds, index, row, stream, m)
    rows, _table = native.coef_rows(coef, t)
    options = *native.types(m, m if x0 is None else x0), kind, float(delta), native.threads(m.numel(), heavy=True)
    return native.run("noise", "denoising_loss", noise, rows, m, x0, loss, slope, scale, *options)
