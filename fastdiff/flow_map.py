"""Models of two times, which know where a step ends: flow maps, mean flows, shortcut models."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.lasting import lasting, traced_constant
from fastdiff.plan import Plan
from fastdiff.request import check_pair

__all__ = ["flow_map"]


def flow_map(model: Callable[..., Any], plan: Plan, *, end: float | None = None) -> torch.nn.Module:
    """A model of two times as the model of one time that a plan calls: model(x, t, r, **cond), r the next row's time.

        r(t) = max {s in (*times, end): s < t}

    Of a mean flow u(x, t, r) = (x_t - x_r) / (t - r), `solvers.euler(Flow(), steps, prediction="flow")` is its own
    sampler, x_r = x_t - (t - r) u. What counts time from noise to data and returns data minus noise, as shortcut models
    do, is lambda x, t, r: -net(x, 1 - t, t - r), with the length as the network takes it.
    Args:
        model: called with x [B, *], t [B], r [B] and the keyword arguments of fd.sample. plan: the one it is sampled
            with; its times fall from row to row. end: the time after the last row; None is 0, of plans that end clean.
    Returns: a Module (x, t, **cond), for fd.sample, Sampler in every mode, and Unrolled; a Module's parameters are its
        own. Two small operations a call.
    Raises:  TypeError, ValueError: no plan, times that are integers, rise or repeat, or end below `end`; an `end` that
        is no number, or none for a plan that stops early.
    Source:  Geng et al. 2025, arXiv:2505.13447, section 4.1; Frans et al. 2024, arXiv:2410.12557, section 3.
    """
    check_pair(model, plan)
    if end is None:
        if plan.end != (1.0, 0.0):
            raise ValueError(f"{plan.name} stops early, at alpha, sigma = {plan.end}: give end=, the time there")
        end = 0.0
    if isinstance(end, bool) or not isinstance(end, Real) or not math.isfinite(end):
        raise ValueError(f"end must be a finite number, the time after the last row, got {end!r}")
    if plan.times.dtype == np.int64 or not (np.diff(np.append(plan.times, end)) < 0).all():
        raise ValueError(
            f"a model of two times needs real times that fall from row to row to {end:g}, {plan.name} has "
            f"{', '.join(f'{t:g}' for t in plan.times[:4])}{', ...' if plan.nfe > 4 else ''}"
        )
    return _FlowMap(model, plan, float(end))


class _FlowMap(torch.nn.Module):
    def __init__(self, model: Callable[..., Any], plan: Plan, end: float) -> None:
        super().__init__()
        self.model, self.plan, self.end = model, plan, end

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:  # noqa: ANN401 - any model argument
        times = _rising(self.plan, self.end, t.device)
        return self.model(x, t, times[torch.searchsorted(times[1:], t.float())], **cond)


@traced_constant
def _rising(plan: Plan, end: float, device: torch.device) -> Tensor:
    """end and the plan's times, the lowest first; made once, and kept as long as the plan, since a graph reads it."""
    cache = plan.__dict__.setdefault("_rising", {})
    if (end, device) not in cache:
        with lasting():
            cache[end, device] = torch.from_numpy(np.append(plan.times, end)[::-1].copy()).float().to(device)
    return cache[end, device]
