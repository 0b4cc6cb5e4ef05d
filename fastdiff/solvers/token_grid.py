"""What the rows of a plan of tokens are made of: numbers a row, thresholds as scores, times."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

__all__ = ["each", "score", "times"]


def each(name: str, value: object, n: int) -> np.ndarray:
    """A number of every row."""
    heat = np.asarray(value)
    if heat.dtype.kind not in "fiu" or heat.shape not in ((), (n,)) or not np.all((heat >= 0) & np.isfinite(heat)):
        raise ValueError(f"{name} must be a number >= 0, or {n} of them, one a row, got {value!r}")
    return np.broadcast_to(heat.astype(np.float64), n)


def score(threshold: float, order: str) -> float:
    """A threshold in the units of ops.unmask_step's scores."""
    valid = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if order == "entropy":
        if not valid or not 0 <= threshold < np.inf:
            raise ValueError(f"threshold of order 'entropy' is nats >= 0, got {threshold!r}")
        return -float(threshold)
    if not valid or not 0 < threshold < 1:
        raise ValueError(f"threshold of order {order!r} is a probability in (0, 1), got {threshold!r}")
    return float(np.log(threshold) - np.log1p(-threshold))


def times(spacing: Sequence[float] | np.ndarray | None, rows: int) -> np.ndarray:
    """A block's times, the first noisiest."""
    if spacing is None:
        return np.arange(rows, 0, -1) / rows
    t = np.asarray(spacing, np.float64) if not isinstance(spacing, str) else np.empty(0)
    if t.shape != (rows,) or not np.all(np.isfinite(t)) or np.any(np.diff(t) >= 0) or not 0 < t[-1] <= t[0] <= 1:
        raise ValueError(f"spacing must be {rows} decreasing times in (0, 1], got {spacing!r}")
    return t
