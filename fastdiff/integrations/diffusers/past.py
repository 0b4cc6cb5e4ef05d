"""An accelerated step that is handed its own past: is it what the plan remembers?"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from fastdiff.integrations.diffusers.timesteps import near, value_of, viewed

__all__ = ["Past"]


class Past:
    """The x0 that a step returned last, which the next one has to be handed."""

    def __init__(self) -> None:
        self.x0: Any = None  # a weak reference

    def keep(self, x0: Tensor) -> None:
        self.x0 = weakref.ref(x0)

    def differs(self, run: Any, x0: Any, timestep: Any, before: Any) -> str | None:
        """Why a step with these arguments is not the next row of the run, or None."""
        if run is None or not run.started:
            return None if x0 is None else "the first step of the loop was handed a past"
        if x0 is None or self.x0 is None or x0 is not self.x0():
            return "old_pred_original_sample is not what the last step returned"
        at = run.base + run.next
        if not _is_entry(timestep, run.timesteps, at):
            return "timestep is not the next of the schedule"
        return None if _is_entry(before, run.timesteps, at - 1) else "timestep_back is not the last step's timestep"


def _is_entry(timestep: Any, timesteps: Tensor, at: int) -> bool:
    """Is it the schedule's timestep number `at`?"""
    if timestep is None or at >= len(timesteps):
        return False
    place = viewed(timestep, timesteps)
    if place is not None:
        return place == at
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return True  # reading it would stall the device
    return bool(near(timesteps[at].cpu().double().numpy(), value_of(timestep)))
