"""Which call of a loop a timestep belongs to, without reading it from a device where that can be helped."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.integrations.diffusers.cached import Unsupported

__all__ = ["near", "pointer", "position_of", "stranger", "value_of", "viewed"]

NEAR = 1e-5


def position_of(timestep: Any, timesteps: Tensor) -> int:
    """Where in the schedule a timestep stands: the first place, or the second of several, as stock.

    Raises: ValueError: it is not in the schedule.
    """
    at = viewed(timestep, timesteps)
    if at is not None:
        return at
    value = value_of(timestep)
    found = np.flatnonzero(near(timesteps.detach().cpu().double().numpy(), value))
    if not len(found):
        raise ValueError(stranger(value, timesteps))
    return int(found[1 if len(found) > 1 else 0])


def pointer(t: Tensor) -> int:
    """Where a tensor lies, 0 where that cannot be told."""
    try:
        return t.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0


def viewed(timestep: Any, timesteps: Tensor) -> int | None:
    """The index of a timestep that is an entry of the schedule's own tensor: no value is read, nothing waits."""
    if not isinstance(timestep, Tensor) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    base, mine = pointer(timesteps), pointer(timestep)
    if not base or not mine:
        return None
    at, rest = divmod(mine - base, timesteps.element_size())
    inside = rest == 0 and 0 <= at < len(timesteps)
    alone = timestep.numel() == 1 or not any(timestep.stride())
    return at if inside and alone else None


def value_of(timestep: Any) -> float:
    """A timestep as a number. Raises: Unsupported: a batch of different ones."""
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1 and timestep.numel() and bool((timestep != timestep.reshape(-1)[0]).any()):
            raise Unsupported("each sample has a timestep of its own")
        timestep = timestep.reshape(-1)[0].item()
    return float(timestep)


def near(values: np.ndarray, value: float) -> np.ndarray:
    """Which values are this one, but for rounding."""
    return np.abs(values - value) <= NEAR * max(1e-3, abs(value))


def stranger(value: float, timesteps: Tensor) -> str:
    """The message about a timestep of another schedule."""
    shown = [f"{v:g}" for v in timesteps.tolist()]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-2:]]
    return f"timestep {value:g} is not in the schedule ({', '.join(shown)}); pass an entry of scheduler.timesteps"
