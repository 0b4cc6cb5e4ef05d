"""Models of two times, which know where a step ends: flow maps, mean flows, shortcut models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.lasting import lasting, traced_constant
from fastdiff.plan import Plan

__all__ = ["flow_map"]


def flow_map(model: Callable[..., Any], plan: Plan, *, end: float = 0.0) -> Callable[..., Any]:
    """A model of two times as the model of one time that a plan calls: model(x, t, r, **cond), r the next row's time.

        r(t) = max {s in (times[1], ..., times[-1], end): s < t}

    Of a mean flow u(x, t, r) = (x_t - x_r) / (t - r), `solvers.euler(Flow(), steps, prediction="flow")` is its own
    sampler, x_r = x_t - (t - r) u. A shortcut model takes the length of the step: lambda x, t, r: net(x, t, t - r).
    Args:
        model: called with x [B, *], t [B], r [B] and the keyword arguments of fd.sample. plan: the one it is sampled
        with; its times fall from row to row. end: the time after the last row.
    Returns: a function (x, t, **cond), for fd.sample and Sampler in every mode; two small operations a call.
    Raises:  ValueError: times that are integers, rise or repeat, or end below `end`.
    Source:  Geng et al. 2025, arXiv:2505.13447, section 4.2; Frans et al. 2024, arXiv:2410.12557, section 3.
    """
    if plan.times.dtype == np.int64 or not (np.diff(np.append(plan.times, end)) < 0).all():
        raise ValueError(
            f"a model of two times needs real times that fall from row to row to {end:g}, {plan.name} has "
            f"{', '.join(f'{t:g}' for t in plan.times[:4])}{', ...' if plan.nfe > 4 else ''}"
        )

    def of_one_time(x: Tensor, t: Tensor, **cond: Any) -> Any:  # noqa: ANN401 - any model argument
        times = _rising(plan, end, t.device)
        return model(x, t, times[torch.searchsorted(times[1:], t.float())], **cond)

    return of_one_time


@traced_constant
def _rising(plan: Plan, end: float, device: torch.device) -> Tensor:
    """end and the plan's times, the lowest first; made once, and kept as long as the plan, since a graph reads it."""
    cache = plan.__dict__.setdefault("_rising", {})
    if (end, device) not in cache:
        with lasting():
            cache[end, device] = torch.from_numpy(np.append(plan.times, end)[::-1].copy()).float().to(device)
    return cache[end, device]
