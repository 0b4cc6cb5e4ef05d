"""Learned variances: a scheduler whose model returns a second plane v, read at three values of v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastdiff.plan import Plan
from fastdiff.probe.observe import Refused

__all__ = ["with_second_plane"]

SAME = ("A", "b", "d", "c_in", "c_skip", "c_out", "lo", "hi", "alpha", "sigma", "times", "draws")


def with_second_plane(read: Callable[[float], Plan]) -> Plan:
    """The plan of a scheduler that takes [m, v] and interpolates the logarithm of its variance by v.

        s(v) = exp((f log_var_hi + (1 - f) log_var_lo) / 2),  f = (v + 1) / 2:  s(-1), s(1), and s(0)^2 = s(-1) s(1)

    Args: read: the plan for a plane of one value v everywhere.
    Raises: Refused: v does anything else than scale slot 0's noise in this way.
    """
    low, middle, high = (read(v) for v in (-1.0, 0.0, 1.0))
    for name in SAME:
        first, *others = (np.asarray(getattr(plan, name)) for plan in (low, middle, high))
        if not all(v.shape == first.shape and np.allclose(v, first, 1e-9, 1e-12, equal_nan=True) for v in others):
            raise Refused(f"the second plane of the model's output changes more than the noise ({name})")
    scales = [plan.s[:, 0] for plan in (low, middle, high)]
    noisy = scales[0] > 0
    alone = all(not np.any(plan.s[:, 1:]) and np.array_equal(plan.s[:, 0] > 0, noisy) for plan in (low, middle, high))
    least, half, most = (np.where(noisy, s, 1.0) for s in scales)
    if not alone or np.abs(half**2 / (least * most) - 1).max() > 1e-9:
        raise Refused("the second plane of the model's output does not interpolate the logarithm of a variance")
    return replace(
        low, s=noisy[:, None] * np.eye(1, low.slots), log_var_lo=2 * np.log(least), log_var_hi=2 * np.log(most),
    )  # fmt: skip
