"""The density of a sampler's step, which policy gradients on samplers (DDPO, Flow-GRPO) differentiate."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from fastdiff.devices import widest
from fastdiff.lasting import traced_constant
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor, spread
from fastdiff.plan import ROW_HEADER, Plan
from fastdiff.transforms import transformed

__all__ = ["transition", "transition_log_prob"]


def transition(plan: Plan, k: int | Tensor, x: Tensor, model_out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Gaussian from which a row of a plan draws its next state.

        p = clamp(c_skip x + c_out m, lo, hi);   mean = A x + b p + d m;   std = s;   x' = mean + std n

    Args:
        plan: of one slot. k: the row, an integer or an int64 tensor [B], one a sample, on x's device.
        x: [B, *sample], the state before the row: `Trajectory.x[k]`. model_out: like x, the model's output (after
            guidance) at (plan.c_in[k] x, plan.times[k]). Each fp32, bf16, fp16 or float64.
    Returns: mean [B, *sample] and std [B], fp32 (float64 if x or model_out is), differentiable in x and model_out.
    Raises:  TypeError, ValueError: more slots than one, learned variances, classes or bins; a wrong shape, dtype or
        device; a row outside the plan (of a tensor on a device, in compiled or transformed code: NaN).
    Numerics: the sampler's own fp32 coefficients.
    Source:  Black et al. 2024, arXiv:2305.13301, section 4.3.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a fastdiff.Plan (from fastdiff.solvers), got {type(plan).__name__}")
    if plan.slots != 1:
        raise ValueError(f"a step's density needs a plan of one slot, {plan.name} has {plan.slots}")
    if plan.beyond_table:
        raise ValueError(f"a step's density needs rows that are the table's alone, {plan.name} {plan.beyond_table}")
    check_tensor("x", x, dtypes=FLOATS64)
    check_batched("x", x)
    check_tensor("model_out", model_out, shape=x.shape, dtypes=FLOATS64, like=x)
    wide = torch.float64 if torch.float64 in (x.dtype, model_out.dtype) else torch.float32
    row = _row(plan, k, x).to(wide)
    c_skip, c_ratio, lo, hi = (spread(row[:, i], x) for i in range(4))
    keep, b, d, s = (row[:, ROW_HEADER + i] for i in range(4))
    x, m = x.to(wide), model_out.to(wide)
    p = torch.minimum(torch.maximum(c_skip * (x + c_ratio * m), lo), hi)
    return spread(keep, x) * x + spread(b, x) * p + spread(d, x) * m, s.abs().expand(x.shape[0]).clone()


def transition_log_prob(plan: Plan, k: int | Tensor, x: Tensor, model_out: Tensor, x_next: Tensor) -> Tensor:
    """The log-density of the state after a row of a plan, given the one before and the model's output.

        ln p(x' | x) = -sum_e (x' - mean)^2 / (2 std^2) - n ln(std sqrt(2 pi))

    Args: plan, k, x, model_out: as for `transition`. x_next: like x, the state after the row: `Trajectory.x[k + 1]`.
    Returns: float64 [B], differentiable in model_out, x and x_next: two of them give the ratio of PPO and GRPO by
        exp(a - b), the mean over elements by a / n.
    Raises:  as `transition`; ValueError for a row that adds no noise (of a tensor on a device, in compiled or
        transformed code: NaN).
    Numerics: fp32 or float64 terms, summed in float64, since a ratio is a small difference of two large sums.
    Source:  Black et al. 2024, arXiv:2305.13301, section 4.3; Liu et al. 2025, arXiv:2505.05470, section 4.
    """
    mean, std = transition(plan, k, x, model_out)
    check_tensor("x_next", x_next, shape=x.shape, dtypes=FLOATS64, like=x)
    if not transformed():
        rows = (k.tolist() if k.is_cpu else []) if isinstance(k, Tensor) else [int(k)]
        if quiet := [row for row in rows if plan.s[row, 0] == 0]:
            raise ValueError(f"row {quiet[0]} of {plan.name} adds no noise: its next state has no density")
    std = torch.where(std == 0, torch.nan, std)
    off = ((x_next.to(mean.dtype) - mean) / spread(std, mean)).reshape(x.shape[0], x.shape[1:].numel())
    constant = off.shape[1] * (std.to(widest(std.device)).log() + 0.5 * math.log(2 * math.pi))
    return -0.5 * (off * off).sum(1, dtype=widest(off.device)) - constant


@traced_constant
def _table(plan: Plan, device: torch.device) -> Tensor:
    return plan.pack(device)


def _row(plan: Plan, k: int | Tensor, x: Tensor) -> Tensor:
    """The packed rows, [1 or B, width]."""
    table = _table(plan, x.device)
    if isinstance(k, Tensor):
        check_tensor("k", k, shape=x.shape[:1], dtypes=(torch.int64,), like=x)
        if k.is_cpu and not transformed():
            if not bool(((k >= 0) & (k < plan.nfe)).all()):
                raise ValueError(f"k must be rows 0..{plan.nfe - 1} of {plan.name}, got {int(k.min())}..{int(k.max())}")
            return table[k]
        known = (k >= 0) & (k < plan.nfe)
        return torch.where(known[:, None], table[torch.where(known, k, 0)], torch.nan)
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an integer or an int64 tensor [B], got {type(k).__name__}")
    if not 0 <= k < plan.nfe:
        raise ValueError(f"k must be a row 0..{plan.nfe - 1} of {plan.name}, got {k}")
    return table[int(k) : int(k) + 1]
