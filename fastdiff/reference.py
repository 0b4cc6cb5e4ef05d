"""The sampler as its definition reads: float64, no renaming, no fusion. The oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff.plan import Plan

__all__ = ["reference_sample"]


def reference_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    x_T: Tensor,
    noise: Callable[[int, Tensor], Tensor],
    *,
    edit: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs a plan's logical rows in the dtype of x_T (float64 for a reference) with unrounded coefficients.

        p = clamp(c_skip S[0] + c_out m, lo, hi);   S' = A @ S + b p + d m + s n

    Args:
        model: model(c_in x, t) with t [B]. x_T: the state at row 0, [B, *].
        noise: (row, like) -> Tensor, called plan.draws[row] times a row; the last draw is n.
        edit: applied to the state after each row.
    Returns: the final state, [B, *] of x_T's dtype.
    """
    S: list[Tensor | None] = [x_T] + [None] * (plan.slots - 1)
    for k in range(plan.nfe):
        x = S[0]
        assert x is not None
        t = torch.full((len(x),), plan.times[k].item(), dtype=torch.int64 if plan.times.dtype == np.int64 else x.dtype)
        m = model(float(plan.c_in[k]) * x, t)
        n: Tensor | None = None
        for _ in range(plan.draws[k]):  # type: ignore[index]
            n = noise(k, x)
        p = torch.clamp(float(plan.c_skip[k]) * x + float(plan.c_out[k]) * m, float(plan.lo[k]), float(plan.hi[k]))
        new: list[Tensor | None] = []
        for i in range(plan.slots):
            terms = [(plan.A[k, i, j], S[j]) for j in range(plan.slots)]
            terms += [(plan.b[k, i], p), (plan.d[k, i], m), (plan.s[k, i], n)]
            y = torch.zeros_like(x)
            absent = any(c != 0 and v is None for c, v in terms)
            for c, v in terms:
                if c != 0 and v is not None:
                    y = y + float(c) * v
            new.append(None if absent else y)
        assert new[0] is not None
        S = [edit(k, new[0]), *new[1:]] if edit is not None else new
    assert S[0] is not None
    return S[0]
