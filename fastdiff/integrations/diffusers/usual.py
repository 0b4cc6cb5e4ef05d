"""The usual step(model_output, timestep, sample), of a class whose own is handed its past (CogVideoXDPMScheduler)."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

__all__ = ["USUAL", "leading", "takes_past", "usual"]

USUAL = ["model_output", "timestep", "sample"]
GIVEN = ["model_output", "old_pred_original_sample", "timestep", "timestep_back", "sample"]


def leading(stock: Any) -> int:
    """How many parameters of step, self included, come before its options."""
    return 1 + len(GIVEN if takes_past(stock) else USUAL)


def takes_past(stock: Any) -> bool:
    """Is this a class whose step is handed its past?"""
    return list(inspect.signature(stock.step).parameters)[1 : 1 + len(GIVEN)] == GIVEN


@functools.cache
def usual(stock: type) -> type:
    """The class itself or, where step is handed its past, one with the usual step that remembers it."""
    if not takes_past(stock):
        return stock
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    def step(self: Any, m: Tensor, timestep: Any, x: Tensor, return_dict: bool = True, **options: Any) -> Any:
        last, before = self.__dict__.get("_past", (None, None))
        made = stock.step(self, m, last, timestep, before, x, **options, return_dict=False)  # type: ignore[attr-defined]
        self._past = made[1], timestep
        return DDIMSchedulerOutput(*made) if return_dict else made

    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "step": step})
