"""What the categorical operations share: classes and rows of logits, padded buffers, checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops._dispatch import FLOATS, check_tensor
from fastdiff.transforms import readable

READOUTS = ("sample", "argmax", "mean")
WIDEST_ROW = 1 << 14  # positions of a token in one program; longer ones are split
PIECE = 1 << 12  # positions of a program of a split token; half of it where tokens start anywhere in a vector
TILE = 2048  # positions of a program that holds several tokens
NARROW = 32  # positions of a token up to which a thread holds 8 of them instead of 16


def channels(num_classes: int) -> int:
    """Numbers a token has for K classes: K, or the one difference of two logits for K = 2."""
    return 1 if num_classes == 2 else num_classes


def classes_of(width: int) -> int:
    """K of a last dimension: 1 channel is K = 2."""
    return 2 if width == 1 else width


def categorical_buffer(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """An uninitialised tensor in the layout the categorical kernels read in 16-byte accesses: dense rows.

    Their windows start at whole Philox counters, which dense rows of any K meet at multiples of 4 elements; rows padded
    to 16 would not, and would move up to 18 % more bytes (K = 27).
    Args:    shape: [..., K'].   dtype, device: of the tensor.
    Raises:  ValueError for a shape without a last dimension.
    """
    if len(shape) < 1:
        raise ValueError("shape must have a last dimension, the classes, got ()")
    return torch.empty(*shape, dtype=dtype, device=device)


def row_stride(x: Tensor) -> int | None:
    """Elements between neighbouring rows of x [..., K'], row-major, or None where no single number says it."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    stride, rows = None, 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != rows * stride:
            return None
        rows *= size
    if stride is None:
        stride = x.shape[-1]
    if x.shape[-1] == 1:
        return stride if stride == 1 else None  # two classes: the kernel is element-wise
    return stride if stride >= x.shape[-1] else None


def with_rows(x: Tensor) -> Tensor:
    """x, or its contiguous copy where its rows are not evenly spaced."""
    return x if row_stride(x) is not None else x.contiguous()


def check_rows(name: str, x: object, shape: Sequence[int], like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """check_tensor for a tensor [..., K'] that is written: rows must be evenly spaced, the last dimension dense."""
    check_tensor(name, x, shape=shape, dtypes=dtypes, like=like)
    assert isinstance(x, Tensor)
    if row_stride(x) is None:
        raise ValueError(
            f"{name} is written in place and must have dense, evenly spaced rows, got strides {x.stride()} for shape "
            f"{tuple(x.shape)}"
        )


def check_width(name: str, width: int) -> None:
    """The last dimension of logits: 1 for two classes, else K >= 3."""
    if width < 1 or width == 2:
        raise ValueError(
            f"{name} must have a last dimension of K >= 3 classes, or 1 for K = 2 (one logit, of class 1), got {width}"
        )


def check_classes(name: str, x: object, num_classes: int, shape: Sequence[int] | None = None,
                  like: Tensor | None = None) -> None:  # fmt: skip
    """int64 classes; their range is looked at on the CPU only."""
    check_tensor(name, x, shape=shape, dtypes=(torch.int64,), like=like)
    assert isinstance(x, Tensor)
    if readable(x) and x.numel():
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must be in 0..{num_classes - 1} for K = {num_classes}, got {low}..{high}")


def check_logits(name: str, x: object, *, like: Tensor | None = None, shape: Sequence[int] | None = None,
                 dtypes: Sequence[torch.dtype] = FLOATS) -> None:  # fmt: skip
    """Logits [B, *D, K'] of a float dtype."""
    check_tensor(name, x, shape=shape, dtypes=dtypes, like=like)
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise ValueError(f"{name} must be [B, *D, K'], got shape {tuple(x.shape)}")
    check_width(name, x.shape[-1])


def belief(z: Tensor) -> Tensor:
    """The network's input of logits z [..., K']: 2 softmax(z) - 1, or tanh(z / 2) for the one difference of K = 2."""
    return torch.tanh(0.5 * z) if z.shape[-1] == 1 else 2 * torch.softmax(z, -1) - 1


class Rows(NamedTuple):
    """How a kernel cuts tokens of K classes into windows."""

    rows: int  # tokens of a program
    cols: int  # positions of a window
    pieces: int  # windows of a token
    num_warps: int

    @property
    def widest(self) -> int:
        """pieces, rounded up to a power of two."""
        return 1 << (self.pieces - 1).bit_length()

    def reach(self, tokens: int, stride: int) -> int:
        """An offset that none in a sample of tokens `stride` apart is above, masked ones included."""
        return (tokens + self.rows) * stride + 2 * self.cols * self.pieces


def rows_of(num_classes: int, tokens: int, *, heavy: bool = False, lanes: int = 32) -> Rows:
    """The windows of tokens of K classes; they depend on nothing but the sample, and so do its sums.

    Args:    tokens: of a sample.   heavy: an update of several slots, whose registers allow half as wide a row.
             lanes: threads of a warp.
    """
    need = num_classes + (0, 3, 2, 3)[num_classes % 4]  # a window starts up to that many positions early
    cols = max(8, 1 << (need - 1).bit_length())
    if cols > WIDEST_ROW >> heavy:
        piece = PIECE if num_classes % 4 == 0 else PIECE // 2
        return Rows(1, piece, -(-need // piece), piece // 16 // lanes)
    rows = min(max(1, TILE // cols), 1 << max(0, tokens - 1).bit_length())
    each = 8 if cols <= NARROW else 16  # positions of a thread
    warps = max(1, rows * cols // each // lanes)
    return Rows(rows, cols, 1, min(warps, 512 // lanes))


def vectors(num_classes: int, tokens: int, strides: Sequence[int]) -> bool:
    """Do the windows of tensors with these distances between tokens, slots or copies start at multiples of 4?"""
    if num_classes % 4 == 0:
        return all(s % 4 == 0 for s in strides)
    return tokens * num_classes % 4 == 0 and all(s == num_classes for s in strides)
