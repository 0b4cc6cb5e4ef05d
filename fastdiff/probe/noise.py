"""Draws on overlapping intervals as combinations of independent normals."""

from __future__ import annotations

import numpy as np

from fastdiff.probe.observe import Observation

__all__ = ["correlated"]


def correlated(seen: Observation) -> Observation:
    """The same observation, its noise sampler's draws those of one Brownian motion.

        n(t0, t1) = (W(t1) - W(t0)) / sqrt|t1 - t0|,   cov = overlap / sqrt(len len'),   n = L z with L L^T = cov

    A draw is what earlier draws say about it plus a fresh normal; one that lies in their span needs no fresh normal.
    """
    at = [j for j, span in enumerate(seen.spans) if span is not None and span[0] != span[1]]
    if not at:
        return seen
    ends = np.sort(np.array([seen.spans[j] for j in at], np.float64), axis=1)
    low, high = ends[:, 0], ends[:, 1]
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    length = np.sqrt(high - low)
    covariance = np.maximum(overlap, 0.0) / np.outer(length, length)
    L = np.zeros_like(covariance)
    for i in range(len(at)):
        for j in range(i):
            rest = covariance[i, j] - L[i, :j] @ L[j, :j]
            L[i, j] = rest / L[j, j] if L[j, j] else 0.0
        left = 1.0 - L[i, :i] @ L[i, :i]
        L[i, i] = np.sqrt(left) if left > 1e-12 else 0.0
    L[np.abs(L) < 1e-12] = 0.0

    def mixed(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[:, at] = rows[:, at] @ L
        return rows

    clamps = [c._replace(argument=mixed(c.argument[None])[0]) for c in seen.clamps]
    predicted = [None if p is None else mixed(p[None])[0] for p in seen.predicted]
    return seen._replace(state=mixed(seen.state), seen=mixed(seen.seen), clamps=clamps, predicted=predicted)
