"""The CPU's C++ loops, fastdiff_kernels/*_cpu.cpp, built once a machine by torch's toolchain: loading, and noise."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad

from fastdiff.caller import warn

__all__ = [
    "ONE_THREAD", "TYPES", "available", "build", "call", "coef_rows", "compiled", "draw", "fill", "function", "layout",
    "plain", "run", "source", "threads", "types", "usable",
]  # fmt: skip

# torch's toolchain forbids vector code of the compiler's own; a square root that sets errno is none
FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")
INCLUDE = re.compile(r'#include "(\w+\.hpp)"')
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as fastdiff_kernels/types_cpu.hpp has them
KINDS = ("normal", "gumbel", "logistic")
ONE_THREAD = 1 << 16
HEAVY = 16  # a number that is drawn, or an exponential, is worth that many plain elements
_broken: list[str] = []
_bound: dict[tuple[str, str], Callable[..., None]] = {}  # the loops that `run` has called


class Rows(ctypes.Structure):
    """A sample's row of a table of coefficients, as fastdiff_kernels/types_cpu.hpp reads it."""

    _fields_ = [("table", c_void_p), ("t", c_void_p), ("each", c_int64)]


def coef_rows(table: Tensor, t: Tensor | None) -> tuple[object, tuple[Tensor, ...]]:
    """A reference to the rows of a fp32 table [T, width] at t int64 [B] or [1], or of [B or 1, width] where t is None;
    and the tensors that must outlive it."""
    table = table.contiguous()
    if t is None:
        return ctypes.byref(Rows(table.data_ptr(), None, table.shape[0] > 1)), (table,)
    t = t.contiguous()
    return ctypes.byref(Rows(table.data_ptr(), t.data_ptr(), t.numel() > 1)), (table, t)


def unusable(error: Exception | None = None) -> bool:
    """Has the CPU compiler failed in this process? With an error: it has now, which is said once."""
    if error is not None and not _broken:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warn(
            f"the CPU compiler is not usable ({reason[0][:200]}); steps and noise run eagerly. "
            "A C++ compiler (g++, or another one named by CXX) makes them several times faster."
        )
    if error is not None:
        _broken.append(str(error))
    return bool(_broken)


def source(name: str) -> str:
    """fastdiff_kernels/<name>_cpu.cpp with what it includes, in one text: torch's cache knows a library by its text."""
    folder = importlib.resources.files("fastdiff_kernels")
    text = folder.joinpath(f"{name}_cpu.cpp").read_text()
    return INCLUDE.sub(lambda found: folder.joinpath(found[1]).read_text(), text)


def compiled(text: str, *flags: str) -> ctypes.CDLL:
    """A text's library, built by torch's toolchain unless it is in its cache."""
    from torch._inductor.codecache import CppCodeCache

    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    return CppCodeCache.load(text, device_type="cpu", extra_flags=(*FLAGS, *wide, *flags))


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    """The loops of fastdiff_kernels/<name>_cpu.cpp; None (and one warning a process) where no C++ compiler works."""
    if unusable():
        return None
    try:
        return compiled(source(name))
    except Exception as error:  # any failure of the compiler has the same answer: eager
        unusable(error)
        return None


def build() -> list[str]:
    """Builds every loop, side by side, so that no later process has to. Returns: the names of those there are now."""
    folder = importlib.resources.files("fastdiff_kernels").iterdir()
    names = sorted(p.name.removesuffix("_cpu.cpp") for p in folder if p.name.endswith("_cpu.cpp"))
    with ThreadPoolExecutor() as pool:
        return [name for name, found in zip(names, pool.map(_library, names), strict=True) if found is not None]


def call(loop: Callable[..., None], *args: object) -> None:
    """Calls a loop; a profiler that is on sees it by its name, as it sees torch's operations."""
    if _profiler_enabled():
        with torch._C._profiler._RecordFunctionFast(f"fastdiff::{loop.__name__}"):
            loop(*args)
    else:
        loop(*args)


@functools.cache
def function(file: str, name: str, *arguments: type) -> Callable[..., None] | None:
    """A loop of fastdiff_kernels/<file>_cpu.cpp with the ctypes of its arguments; None without a compiler."""
    found = _library(file)
    if found is None:
        return None
    loop = getattr(found, name)
    loop.restype, loop.argtypes = None, list(arguments)
    return loop


def run(file: str, name: str, *arguments: object) -> bool:
    """Calls a loop with contiguous tensors (or None, or a reference), int64s and floats; False without a compiler.

    A position holds one kind of argument in every call, the one that the loop declares.
    """
    key = file, name
    loop = _bound.get(key)
    if loop is None:
        kinds = (c_float if isinstance(a, float) else c_int64 if isinstance(a, int) else c_void_p for a in arguments)
        loop = function(file, name, *kinds)
        if loop is None:
            return False
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if _profiler_enabled():
        call(loop, *given)
    else:
        loop(*given)
    _bound[key] = loop
    return True


def layout(x: Tensor, *, heavy: bool = False) -> tuple[int, int, int]:
    """What most loops' last arguments are: samples, elements of a sample, threads."""
    return x.shape[0], x.shape[1:].numel(), threads(x.numel(), heavy=heavy)


def types(*tensors: Tensor) -> tuple[int, ...]:
    """The loops' numbers for dtypes."""
    return tuple(TYPES[v.dtype] for v in tensors)


@functools.cache
def _filler() -> Callable[..., None] | None:
    return function("noise", "fill_noise", *[c_void_p] * 4, *[c_int64] * 5, *[c_int] * 3)


def available() -> bool:
    """Are there loops? False, and one warning a process, without a C++ compiler. A machine's first call takes 5 s."""
    return _filler() is not None


def plain(tensors: Sequence[Tensor]) -> bool:
    """Tensors on the CPU whose memory a loop may touch: outside of tracing and of function transforms."""
    if torch.compiler.is_compiling():
        return False
    for a in tensors:
        if type(a) not in (Tensor, torch.nn.Parameter) or not a.is_cpu:
            return False
    traced = torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None
    return not traced and forward_ad._current_level < 0


def usable(*tensors: Tensor) -> bool:
    """`plain` and `available`."""
    return plain(tensors) and available()


def threads(elements: int, *, heavy: bool = False) -> int:
    """How many threads a loop over so many elements is worth: waking one takes longer than a small loop.

    heavy: the loop draws noise, or takes exponentials.
    """
    return 1 if elements * (HEAVY if heavy else 1) < ONE_THREAD else torch.get_num_threads()


def fill(
    out: Tensor, seeds: Tensor, index: Tensor, stream: int, rows: Tensor, *, kind: str = "normal", first: int = 0,
    paired: bool = False,
) -> None:  # fmt: skip
    """out[i, b] = the noise of (seeds[b], index[b], stream, rows[i]), from Philox counter `first` on.

    Args: out: fp32 [k, B, *sample]. seeds, index: int64 [B]. rows: int64 [k]; paired: k = 1, rows [B], one a sample.
        kind: "normal", "gumbel" or "logistic". out contiguous; all `usable`.
    Numerics: the integers of rng.normal and fastdiff.gumbel; normals within 2e-6 of theirs, Gumbel and logistic numbers
        within 4e-6 (relative above 1), the same in any batch, position and thread count.
    """
    filler = _filler()
    assert filler is not None
    if out.numel() == 0:
        return
    k, batch = 1 if paired else rows.shape[0], seeds.shape[0]
    held = (out, seeds.contiguous(), index.contiguous(), rows.contiguous())
    n = out.numel() // (k * batch)
    pointers = (v.data_ptr() for v in held)
    last = KINDS.index(kind), int(paired), threads(out.numel(), heavy=True)
    call(filler, *pointers, stream, k, batch, n, first, *last)


def draw(
    seeds: Tensor, index: Tensor, row: Tensor, stream: int, n: int, *, kind: str = "normal", first: int = 0
) -> Tensor | None:
    """fp32 [B, n] of one row [1] or one a sample [B]; None where the loops are not `usable`."""
    if not usable(seeds, index, row):
        return None
    out = torch.empty(1, seeds.shape[0], n, dtype=torch.float32, device="cpu")
    fill(out, seeds, index, stream, row.long(), kind=kind, first=first, paired=row.shape[0] > 1)
    return out[0]
