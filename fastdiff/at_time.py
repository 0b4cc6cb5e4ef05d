"""A plan's numbers by the time its model is called with: what stands around a model sees x and t, not the row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.lasting import lasting, traced_constant
from fastdiff.plan import Plan

__all__ = ["check_times", "numbers_at", "planes"]

SAME = 1e-5  # relative; rows of one fp32 time


def check_times(plan: Plan) -> None:
    """Raises: ValueError for a plan that records no noise levels, with a row whose x0 is not the model's, or with rows
    of one time that read the model's output differently."""
    unknown = ~(np.isfinite(plan.alpha) & np.isfinite(plan.sigma))
    if unknown.any():
        raise ValueError(
            f"{plan.name} does not record the alpha and sigma of its rows, first of row {int(np.argmax(unknown))} "
            "(a probed plan?); use a plan of fastdiff.solvers"
        )
    silent = plan.c_out == 0
    if silent.any():
        raise ValueError(
            f"{plan.name} takes nothing of x0 from its model's output in row {int(np.argmax(silent))} (c_out = 0)"
        )
    times, table = _rows(plan)
    _, first, of = np.unique(times, return_index=True, return_inverse=True)
    differ = ~np.isclose(table, table[first[of]], rtol=SAME, atol=0, equal_nan=True).all(1)
    if differ.any():
        row = int(np.argmax(differ))
        raise ValueError(
            f"{plan.name} calls its model at t = {plan.times[row]:g} in rows {int(first[of[row]])} and {row} with "
            "different conversions: the time does not say which"
        )


def numbers_at(plan: Plan, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Five numbers a sample, shaped to multiply the model's input x [B, *], of the row whose time is t [B].

    The output that predicts x0 is m = of_x0 x0 + of_x x, a score g added to the model's is m + of_score g, the state is
    of_state x, and clean data as the model would see them of_clean x0.
    Returns: of_x0, of_x, of_score, of_state, of_clean, fp32; NaN at a time that is none of the plan's.
    """
    rows = _table(plan, t.device)[torch.searchsorted(_edges(plan, t.device), t.float(), right=True)]
    return rows.view(*t.shape, *[1] * (x.dim() - 1), rows.shape[-1]).unbind(-1)


def planes(m: object, x: Tensor) -> int:
    """Planes of x's shape in a model's output: 1; 2 with a learned variance or bins; 0 where it is no output of x."""
    if not isinstance(m, Tensor):
        return 0
    if m.shape == x.shape:
        return 1
    return 2 * (x.dim() > 1 and m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]))


def _rows(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Times [N] as fp32 and the numbers [N, 5] of all rows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        of_x0, of_x = 1 / plan.c_out, -plan.c_skip / (plan.c_out * plan.c_in)
        of_score = plan.sigma**2 / (plan.alpha * plan.c_out)
    table = np.stack([of_x0, of_x, of_score, 1 / plan.c_in, plan.c_in], axis=1)
    return plan.times.astype(np.float32), table


@traced_constant
def _edges(plan: Plan, device: torch.device) -> Tensor:
    return _kept(plan, device)[0]


@traced_constant
def _table(plan: Plan, device: torch.device) -> Tensor:
    return _kept(plan, device)[1]


def _kept(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every time and the fp32 number after it, rising [2 U]; the numbers between two of those, [2 U + 1, 5]: a time's
    own, and NaN between times. Made once, and kept as long as the plan, since a graph reads them."""
    cache = plan.__dict__.setdefault("_at_time", {})
    if device not in cache:
        times, table = _rows(plan)
        times, first = np.unique(times, return_index=True)
        edges = np.stack([times, np.nextafter(times, np.float32(np.inf))], axis=1).ravel()
        between = np.full((len(edges) + 1, table.shape[1]), np.nan, np.float32)
        between[1::2] = table[first]
        with lasting():
            cache[device] = (torch.from_numpy(edges).to(device), torch.from_numpy(between).to(device))
    return cache[device]  # type: ignore[no-any-return]
