"""What the operations that run a row of a plan check alike: slots, table, row, guidance, seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._dispatch import INTS, check_tensor
from fastdiff.plan import MAX_SLOTS, row_width

__all__ = ["check_guidance", "check_row", "check_seeds", "check_table"]


def check_table(table: Tensor, slots: int, like: Tensor) -> None:
    """table [N, W] of `Plan.pack()` for 1..MAX_SLOTS slots."""
    if not isinstance(slots, int) or not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be an int in 1..{MAX_SLOTS}, got {slots!r}")
    check_tensor("table", table, dtypes=(torch.float32,), like=like, contiguous=True)
    width = row_width(slots)
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(f"table must be [N, {width}] for {slots} slots, got {tuple(table.shape)}")


def check_row(row: Tensor | int, table: Tensor, batch: int, like: Tensor) -> None:
    """row [1] or [B], or one number, inside the table where looking at it costs no sync."""
    if isinstance(row, int) and not isinstance(row, bool):
        if not 0 <= row < table.shape[0]:
            raise ValueError(f"row must be in 0..{table.shape[0] - 1}, got {row}")
        return
    check_tensor("row", row, dtypes=INTS, like=like)
    assert isinstance(row, Tensor)
    if tuple(row.shape) not in ((1,), (batch,)):
        raise ValueError(f"row must have shape (1,) or ({batch},), got {tuple(row.shape)}")
    if not row.is_cuda and not torch.compiler.is_compiling() and row.numel():
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"row must be in 0..{table.shape[0] - 1}, got {low}..{high}")


def check_guidance(guidance: Tensor, table: Tensor, batch: int, like: Tensor) -> None:
    """guidance: one number or [N or 1, B or 1]."""
    check_tensor("guidance", guidance, dtypes=(torch.float32,), like=like)
    fits = guidance.dim() == 2 and guidance.shape[0] in (1, table.shape[0]) and guidance.shape[1] in (1, batch)
    if guidance.numel() != 1 and not fits:
        raise ValueError(
            f"guidance must be one number or [{table.shape[0]} or 1, {batch} or 1], got {tuple(guidance.shape)}"
        )


def check_seeds(seeds: Tensor | None, index: Tensor | None, batch: int, like: Tensor) -> None:
    """seeds and index [B], index only with seeds."""
    if index is not None and seeds is None:
        raise ValueError("index goes with seeds, which is None")
    for name, x in (("seeds", seeds), ("index", index)):
        if x is not None:
            check_tensor(name, x, shape=(batch,), dtypes=(torch.int64,), like=like)
