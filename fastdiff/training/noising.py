"""Noisy data and its target in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops._noising import Seeds
from fastdiff.schedules import Schedule

__all__ = ["add_noise"]


def add_noise(
    x0: Tensor,
    t: int | float | Tensor,
    schedule: Schedule,
    *,
    seeds: Seeds,
    target: str = "eps",
    index: Tensor | None = None,
    row: int = 0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Noises a batch and gives what the network should predict.

        x_t = alpha(t) x0 + sigma(t) n,   n = rng.normal(seeds, x0.shape[1:], row=row, stream=1)

    Args:    x0, t, schedule, seeds, index, row, out_dtype: as `fastdiff.ops.add_noise`; pass the training step as `row`
             (or new seeds) for new noise.   target: "eps", "v", "x0", "score" or "flow".
    Returns: (x_t, target), [B, *sample] each.
    Raises:  TypeError, ValueError as `fastdiff.ops.add_noise`; ValueError for target=None.
    """
    if target is None:
        raise ValueError("training needs a target: eps, v, x0, score or flow")
    out = ops.add_noise(x0, t, schedule, seeds=seeds, index=index, row=row, target=target, out_dtype=out_dtype)
    assert isinstance(out, tuple)
    return out
