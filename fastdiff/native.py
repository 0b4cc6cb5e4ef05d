"""Normals on a CPU by a compiled loop, fastdiff_kernels/normal_cpu.cpp, built once a machine by torch's toolchain."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.inductor import ONE_THREAD, unusable

__all__ = ["fill_normal", "normal_filler"]

# Inductor writes its own vector code and forbids the compiler's; a square root that sets errno is no vector code
FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")
Filler = Callable[..., None]


@functools.cache
def _library() -> ctypes.CDLL | None:
    if unusable():
        return None
    try:
        from torch._inductor.codecache import CppCodeCache

        source = importlib.resources.files("fastdiff_kernels").joinpath("normal_cpu.cpp").read_text()
        wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
        library = CppCodeCache.load(source, device_type="cpu", extra_flags=(*FLAGS, *wide))
        library.fill_normal.restype = None
        library.fill_normal.argtypes = [*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 3, ctypes.c_int]
        return library
    except Exception as error:  # any failure of the compiler has the same answer: eager
        unusable(error)
        return None


def normal_filler() -> Filler | None:
    """The function (seeds [B], index [B], streams [k], rows [k], out [k, B, n]) that fills out with normals.

    Returns: None (and one warning a process) where no C++ compiler works. The first call on a machine takes 2 s.
    Numerics: the integers of rng.normal; values within 2e-6 of it, the same in any batch, position and thread count.
    """
    return None if _library() is None else fill_normal


def fill_normal(
    seeds: Tensor, index: Tensor, streams: Tensor, rows: Tensor, out: Tensor, x: Tensor | None = None,
    coef: Tensor | None = None,
) -> None:  # fmt: skip
    """out[i, b] = n = rng.normal(seeds[b], row=rows[i], stream=streams[i], index=index[b]).

    With x and coef, for one row: out[b] = coef[b, 0] x[b] + coef[b, 1] n.
    Args: seeds, index: int64 [B]. streams, rows: int64 [k]. out: fp32 [k, B, *sample]. x: fp32 [B, *sample]. coef: fp32
        [B, 4]. All on the CPU, contiguous.
    """
    library = _library()
    assert library is not None
    k, batch = rows.shape[0], seeds.shape[0]
    n = out.numel() // max(1, k * batch)
    threads = 1 if out.numel() < ONE_THREAD else torch.get_num_threads()
    pointers = (None if v is None else v.data_ptr() for v in (out, seeds, index, streams, rows, x, coef))
    library.fill_normal(*pointers, k, batch, n, threads)
