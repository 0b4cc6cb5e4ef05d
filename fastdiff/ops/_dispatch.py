"""Which path an operation takes, what it refuses, and how its kernel is launched.

CUDA tensors go to the Triton kernels, CPU tensors to plain torch (which torch.compile fuses, vmap and autograd
understand). Kernels are registered with `torch.library.Library`, the cheapest form to call; triton is imported on the
first launch only. There is no autotuning at run time: one small table picks the tile.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS64 = (*FLOATS, torch.float64)  # float64 runs plain torch on every device
INTS = (torch.int32, torch.int64)
GRID_LIMIT = 65535  # of a CUDA grid's second axis

LIBRARY = torch.library.Library("fastdiff", "DEF")

_forced = False


class Call(NamedTuple):
    """A launch that was made: what Triton compiled, the grid, every argument of the kernel."""

    compiled: Any
    grid: tuple[int, int, int]
    args: list[object]


_recorded = threading.local()


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Inside, this thread's launches are also kept in the list (the interpreter's are not)."""
    calls: list[Call] = []
    _recorded.calls = calls
    try:
        yield calls
    finally:
        _recorded.calls = None


@contextmanager
def use_kernels() -> Iterator[None]:
    """Inside this context CPU tensors go to the Triton kernels too, run by Triton's interpreter.

    For tests: needs TRITON_INTERPRET=1 in the environment before the first launch. Compiled code keeps plain torch.
    """
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def kernels_for(x: Tensor) -> bool:
    """Does an operation on x run the Triton kernel?"""
    if x.is_cuda:
        return True
    return _forced and not torch.compiler.is_compiling()


def graded(*values: object) -> bool:
    """Is a gradient to one of these asked for?"""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def register(schema: str, launch: Callable[..., None]) -> None:
    """Registers an operation that writes into its arguments: its launch (CUDA, the interpreter), nothing for Meta."""
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, launch, "CUDA")
    LIBRARY.impl(name, launch, "CPU")
    LIBRARY.impl(name, lambda *args, **kwargs: None, "Meta")


def kernels(name: str) -> ModuleType:
    """The Triton module of one operation, imported when first needed."""
    try:
        return importlib.import_module(f"fastdiff_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "triton":
            raise RuntimeError("CUDA tensors need triton, which is not installed: pip install triton") from error
        raise


def math_of(kernel: object) -> str:
    """The sine, cosine and square root a kernel is compiled with: "cuda", "hip" or, in the interpreter, "exact"."""
    import triton

    if not isinstance(kernel, triton.JITFunction):
        return "exact"
    return "hip" if torch.version.hip else "cuda"


def tiling(n: int, batch: int, *, slots: int = 1, lanes: int = 32) -> dict[str, int]:
    """BLOCK, PARTS and num_warps for samples of n elements: small tiles where parallelism is scarce.

    Every piece is at least one vector of 4 elements a thread, and exactly one with three slots or more, which keeps
    registers low. `lanes` is the threads of a warp. On an H200 1024 elements a program are 1 to 3 % faster than 2048.
    """
    if n <= 4 * lanes:
        return {"BLOCK": 4 * lanes, "PARTS": 1, "num_warps": 1}
    if n * batch < 1 << 20:
        return {"BLOCK": 512, "PARTS": 1, "num_warps": 128 // lanes}
    return {"BLOCK": 1024, "PARTS": 2 if slots > 2 else 1, "num_warps": 128 // lanes}


def launch(
    kernel: Any, args: Sequence[object], n: int, batch: int, *, slots: int = 1, depth: int = 1,
    tile: dict[str, int] | None = None, tiles: int | None = None, **meta: object,
) -> None:  # fmt: skip
    """Launches an element-wise kernel on grid (tiles of a sample, samples, depth), 65535 samples at a time.

    A reduction gives its own `tile`, one that does not depend on the batch, so that neither do its sums, and tiles=1.
    `args` are the kernel's arguments up to its constexprs; the entry FIRST is replaced by each launch's first sample.
    """
    tile = tile or tiling(n, batch, slots=slots, lanes=64 if torch.version.hip else 32)
    block = tile["BLOCK"]
    constants = {"ALIGNED": n % 4 == 0, "WIDE": n > 2**31 - 2 * block, **tile, **meta}
    run(kernel, args, tiles or -(-n // block), batch, depth=depth, **constants)


def run(
    kernel: Any, args: Sequence[object], programs: int, batch: int, *, depth: int = 1, **constants: object
) -> None:  # fmt: skip
    """Runs a kernel on grid (programs, samples, depth), 65535 samples at a time; FIRST as in `launch`."""
    tensor = next(a for a in args if isinstance(a, Tensor))
    constants["MATH"] = math_of(kernel)
    if constants["MATH"] == "exact" and tensor.is_cuda:
        raise RuntimeError("TRITON_INTERPRET is set: Triton's interpreter runs CPU tensors, not CUDA tensors")
    if constants["MATH"] != "exact" and not tensor.is_cuda:
        raise RuntimeError("kernels run CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before import")
    if batch > 2**31 - GRID_LIMIT:  # kernels count samples in 32 bits
        raise ValueError(f"a kernel takes at most {2**31 - GRID_LIMIT} samples, got {batch}")
    for first in range(0, batch, GRID_LIMIT):
        grid = (programs, min(GRID_LIMIT, batch - first), depth)
        filled = [first if a is FIRST else a for a in args]
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                compiled = kernel[grid](*filled, **constants, enable_fp_fusion=False)
        else:
            compiled = kernel[grid](*filled, **constants, enable_fp_fusion=False)
        calls = getattr(_recorded, "calls", None)
        if calls is not None and compiled is not None:
            names = kernel.arg_names[len(filled) :]
            calls.append(Call(compiled, grid, [*filled, *(constants[name] for name in names)]))


FIRST = object()


def check_tensor(
    name: str,
    x: object,
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Refuses what a kernel cannot take, saying what came and what is allowed.

    Raises: TypeError for something that is no tensor or of another dtype; ValueError for shape, device and strides.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} is written in place and must be contiguous, got strides {x.stride()}")


def whole_sample(n: int) -> dict[str, int]:
    """The tile of a program that reads a whole sample in turns: wide where there is much to read."""
    return {"BLOCK": 4096, "PARTS": 1, "num_warps": 16} if n > 1024 else {"BLOCK": 1024, "PARTS": 1, "num_warps": 4}


def pieces(n: int) -> tuple[int, int]:
    """Elements of a piece of a sample that one program reads, and how many there are: at most 1024, by n alone."""
    piece = max(4096, 1 << (-(-n // 1024) - 1).bit_length())
    return piece, max(1, -(-n // piece))


def weight_strides(w: Tensor) -> tuple[int, int]:
    """Strides of a weight over plan rows and samples: one number, [B], or [N or 1, B or 1] (contiguous)."""
    rows, batch = (1, w.numel()) if w.dim() < 2 else (w.shape[0], w.shape[1])
    return (batch if rows > 1 else 0), int(batch > 1)


def check_batched(name: str, x: object) -> tuple[int, int]:
    """A tensor [B, *sample]: returns B and the elements of a sample."""
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError(f"{name} must have a batch axis, [B, *sample], got a 0-d tensor")
    assert isinstance(x, Tensor)
    return x.shape[0], x.shape[1:].numel()


def spread(c: Tensor, x: Tensor) -> Tensor:
    """c [B or 1] shaped to multiply x [B, *]."""
    return c.view(-1, *[1] * (x.dim() - 1))
