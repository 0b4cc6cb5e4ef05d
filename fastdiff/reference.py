"""The sampler as its definition reads: float64, no renaming, no fusion. The oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff.plan import Plan
from fastdiff.readout import BINNED, CATEGORICAL, ORDERS

__all__ = ["reference_sample"]


def reference_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    x_T: Tensor,
    noise: Callable[[int, Tensor], Tensor],
    *,
    edit: Callable[[int, Tensor], Tensor] | None = None,
    gumbel: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs a plan's logical rows in the dtype of x_T (float64 for a reference) with unrounded coefficients.

        p = clamp(c_skip S[0] + c_out m, lo, hi)   or plan.readout of m;   S' = A @ S + b p + d m + s n

    Args:
        model: model(c_in x, t) with t [B]. x_T: the state at row 0, [B, *].
        noise: (row, like) -> Tensor, called plan.draws[row] times a row; the last draw is n.
        edit: applied to the state after each row. gumbel: (row, like) -> Tensor, the Gumbel (two classes: logistic)
        numbers of a sampled row; of a row that samples bins, its normals.
    Returns: the final state, [B, *] of x_T's dtype; of a plan of classes, whose x_T is logits [B, *D, K'], the classes
        int64 [B, *D].
    """
    if plan.readout in ORDERS:
        raise ValueError(f"plan {plan.name!r} unmasks tokens: its definition is ops.unmask_step_ref")
    S: list[Tensor | None] = [x_T] + [None] * (plan.slots - 1)
    for k in range(plan.nfe):
        x = S[0]
        assert x is not None
        kind = torch.int64 if plan.times.dtype == np.int64 else x.dtype
        t = torch.full((len(x),), plan.times[k].item(), dtype=kind, device=x.device)
        m = model(_seen(plan, float(plan.c_in[k]) * x), t)
        m, scale = _noise_scale(plan, k, m)
        n: Tensor | None = None
        for _ in range(plan.draws[k]):  # type: ignore[index]
            n = noise(k, x)
        if n is not None and scale is not None:
            n = scale * n
        if plan.readout in CATEGORICAL:
            classes, p = _read(plan, k, m, gumbel)
        elif plan.readout in BINNED:
            p = _read_bins(plan, k, x, m, gumbel)
        else:
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
    return classes if plan.readout in CATEGORICAL else S[0]


def _noise_scale(plan: Plan, k: int, m: Tensor) -> tuple[Tensor, Tensor | None]:
    """The model's output without its second plane v, and what v makes of the noise."""
    if plan.log_var_lo is None or plan.log_var_hi is None:
        return m, None
    m, v = m.chunk(2, 1)
    f = (v + 1) / 2
    return m, torch.exp(0.5 * (f * float(plan.log_var_hi[k]) + (1 - f) * float(plan.log_var_lo[k])))


def _seen(plan: Plan, x: Tensor) -> Tensor:
    """What the model is given of the state: of logits 2 theta - 1, for two classes of class 1 alone."""
    if plan.readout not in CATEGORICAL:
        return x
    return 2 * torch.sigmoid(x) - 1 if plan.classes == 2 else 2 * torch.softmax(x, -1) - 1


def _read(plan: Plan, k: int, m: Tensor, gumbel: Callable[[int, Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """The class and the prediction p of logits: one-hot or softmax, for two classes the difference of two entries."""
    readout = plan.readout if k < plan.nfe - 1 else plan.last_readout
    full = torch.cat([torch.zeros_like(m), m], -1) if plan.classes == 2 else m
    drawn = full
    if readout == "sample":
        assert gumbel is not None
        g = gumbel(k, m)
        drawn = full + (torch.cat([torch.zeros_like(g), g], -1) if plan.classes == 2 else g)
    classes = drawn.argmax(-1)
    p = torch.softmax(full, -1) if readout == "mean" else torch.nn.functional.one_hot(classes, plan.classes).to(m.dtype)
    return classes, p[..., 1:] - p[..., :1] if plan.classes == 2 else p


def _read_bins(plan: Plan, k: int, x: Tensor, m: Tensor, normal: Callable[[int, Tensor], Tensor] | None) -> Tensor:
    """p of a mean and a log-std: the bin of a draw, or every bin by its probability."""
    m0, m1 = m.chunk(2, 1)
    mean, std = float(plan.c_skip[k]) * x + float(plan.c_out[k]) * m0, abs(float(plan.c_out[k])) * m1.exp()
    centres = (2 * torch.arange(plan.classes, dtype=x.dtype, device=x.device) + 1) / plan.classes - 1
    if plan.readout == "binned":
        assert normal is not None
        return centres[(mean + std * normal(k, x))[..., None].sub(centres).abs().argmin(-1)]
    edges = (centres[1:] + centres[:-1]) / 2
    below = torch.special.ndtr((edges - mean[..., None]) / std[..., None])
    mass = torch.diff(below, prepend=torch.zeros_like(mean)[..., None], append=torch.ones_like(mean)[..., None])
    return (mass * centres).sum(-1)
