"""What the categorical operations share: classes and rows of logits, padded buffers, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops._dispatch import FLOATS, check_tensor

READOUTS = ("sample", "argmax", "mean")
PAD = 16  # elements a padded row is a multiple of


def channels(num_classes: int) -> int:
    """Numbers a token has for K classes: K, or the one difference of two logits for K = 2."""
    return 1 if num_classes == 2 else num_classes


def classes_of(width: int) -> int:
    """K of a last dimension: 1 channel is K = 2."""
    return 2 if width == 1 else width


def categorical_buffer(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """An uninitialised [..., K'] tensor whose rows start at multiples of 16 elements.

    Args:    shape: the logical shape; K' = 1 (two classes) is not padded.   dtype, device: of the tensor.
    Returns: a view [..., K'] of a padded buffer, which the categorical operations take as state, logits or output.
    Raises:  ValueError for a shape without dimensions.
    """
    if len(shape) < 1:
        raise ValueError("shape must have a last dimension, the classes, got ()")
    *lead, width = shape
    padded = width if width == 1 else -(-width // PAD) * PAD
    return torch.empty(*lead, padded, dtype=dtype, device=device)[..., :width]


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
            f"{name} is written in place and must have dense, evenly spaced rows (contiguous, or as from "
            f"categorical_buffer), got strides {x.stride()}"
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
    if x.is_cpu and not torch.compiler.is_compiling() and x.numel():
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
