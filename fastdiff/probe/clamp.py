"""The prediction inside a table: which combination of x and m is x0, where it is clamped, which form a row takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdiff.prediction import PREDICTIONS
from fastdiff.probe.observe import Clamp, Observation, Refused
from fastdiff.probe.realise import Table

__all__ = ["Prediction", "end_of", "name_of", "prediction_of", "split"]

PARALLEL = 1e-9
EXACT = 1e-12
CONSISTENT = 1e-6
NEARLY = 1e-2
STOCK = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class Prediction(NamedTuple):
    """x0 = clamp(c_skip x + c_out m, lo, hi): [N] each; NaN where unknown."""

    c_skip: np.ndarray
    c_out: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def _pair(v: np.ndarray, x: np.ndarray, m: int) -> tuple[float, float] | None:
    """v = c_skip x + c_out e_m, or None."""
    i = int(np.argmax(np.abs(x)))
    c_skip = v[i] / x[i]
    rest = v - c_skip * x
    c_out = rest[m]
    rest[m] = 0.0
    size = np.linalg.norm(v) + abs(c_skip) * np.linalg.norm(x)
    return (float(c_skip), float(c_out)) if np.linalg.norm(rest) <= PARALLEL * size else None


def prediction_of(seen: Observation, named: str | None, alpha: np.ndarray, sigma: np.ndarray) -> Prediction:
    """c_skip, c_out and the clamp of every row: from a clamp, from the reported x0, or from the prediction's name.

    Args: named: one of PREDICTIONS, a leading minus for models that return -m, or None; alpha, sigma: [N] of the
        state, NaN unknown.
    Raises: ValueError: a clamp of something that is not c_skip x + c_out m, or two different ones in a row.
    """
    N = len(seen.times)
    c_skip, c_out = np.full(N, np.nan), np.full(N, np.nan)
    lo, hi = np.full(N, -np.inf), np.full(N, np.inf)
    outputs = np.flatnonzero(seen.kinds == "m")
    for clamp in _cuts(seen):
        k = clamp.row
        pair = _pair(clamp.argument.copy(), seen.state[k], outputs[k]) if k >= 0 else None
        if pair is None:
            raise Refused(f"it clamps something that is not a combination of x and the model's output (row {k})")
        if np.isfinite(lo[k]) or np.isfinite(hi[k]):
            raise Refused(f"it clamps twice in row {k}")
        (c_skip[k], c_out[k]), lo[k], hi[k] = pair, clamp.lo, clamp.hi
    for k, v in enumerate(seen.predicted):
        pair = None if v is None or np.isfinite(c_skip[k]) else _pair(v.copy(), seen.state[k], outputs[k])
        if pair is not None:
            c_skip[k], c_out[k] = pair
    unknown = np.isnan(c_skip)
    if named is not None and unknown.any():
        skip, out = _by_name(named, alpha, sigma)
        c_skip[unknown], c_out[unknown] = skip[unknown], out[unknown]
    return Prediction(c_skip, c_out, lo, hi)


def _cuts(seen: Observation) -> list[Clamp]:
    """The clamps whose results the states need; in a row without one, that of the x0 it reports."""
    needed = np.abs(seen.state).max(axis=0) > 0
    cuts = [c for c in seen.clamps if needed[c.column]]
    rows = {c.row for c in cuts}
    for c in seen.clamps:
        told = seen.predicted[c.row] if c.row >= 0 else None
        if told is not None and told[c.column] and c.row not in rows:
            cuts.append(c)
            rows.add(c.row)
    return cuts


def _by_name(named: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row, NaN where the name is unknown or its coefficients are not finite (zero signal)."""
    form = PREDICTIONS.get(named.removeprefix("-"))
    if form is None:
        return np.full(len(alpha), np.nan), np.full(len(alpha), np.nan)
    with np.errstate(all="ignore"):
        skip, out = form(alpha, sigma, 0.5)[:2]
    out = -out if named.startswith("-") else out
    good = np.isfinite(skip) & np.isfinite(out) & (out != 0)
    return np.where(good, skip, np.nan), np.where(good, out, np.nan)


def name_of(seen: Observation, named: str | None, alpha: np.ndarray, sigma: np.ndarray) -> str | None:
    """The prediction type that keeps the marginal mean over the first step, the named one first; None if none does.

    x_1 = a x_0 + d m = A x_0 + B p    with A alpha_0 + B = alpha_1, which every consistent solver obeys
    """
    outputs = np.flatnonzero(seen.kinds == "m")
    target = alpha[1] if len(alpha) > 1 else 1.0
    if not np.isfinite(alpha[0] + sigma[0] + target):
        return None
    a, d = seen.state[1, 0] / seen.state[0, 0], seen.state[1, outputs[0]]
    first = STOCK.get(named or "", named or "eps")
    misses = {}
    straight = np.abs(alpha + sigma - 1).max() <= CONSISTENT  # at alpha = 0 the first step cannot tell flow from v
    velocity = ("flow", "v") if straight else ("v", "flow")
    for name in dict.fromkeys((first, *velocity, "eps", "x0", "edm", "-edm")):
        skip, out = _by_name(name, alpha[:1], sigma[:1])
        if np.isfinite(skip[0]):
            misses[name] = abs((a - d * skip[0] / out[0]) * alpha[0] + d / out[0] - target)
    for name, miss in misses.items():
        if miss <= CONSISTENT:
            return name
    return first if named is not None and misses.get(first, np.inf) <= NEARLY else None  # grids of rounded times


def split(table: Table, prediction: Prediction, alpha: np.ndarray, sigma: np.ndarray) -> tuple[Table, Prediction]:
    """Each unclamped update in its smaller form: about m (d m) or about x0 (b p); an x0 nobody names is m itself.

    d m = (d / c_out) (p - c_skip x): the form with the smaller coefficients cancels less in fp32.
    """
    known = np.isfinite(prediction.c_skip) & (prediction.c_out != 0)
    c_skip = np.where(np.isfinite(prediction.c_skip), prediction.c_skip, 0.0)
    c_out = np.where(np.isfinite(prediction.c_skip), prediction.c_out, 1.0)
    A, b, d = table.A.copy(), table.b.copy(), table.d.copy()
    size = np.sqrt(alpha**2 + sigma**2)
    size = np.where(np.isfinite(size), size, 1.0)[:, None]
    with np.errstate(all="ignore"):
        b_p = d / c_out[:, None]
        a_p = A[:, :, 0] - b_p * c_skip[:, None]
    a_p[np.abs(a_p) <= EXACT * np.abs(A[:, :, 0])] = 0.0
    b_p[np.abs(b_p - 1) <= EXACT] = 1.0
    smaller = np.abs(a_p) * size + np.abs(b_p) <= np.abs(A[:, :, 0]) * size + np.abs(d)
    clamped = np.isfinite(prediction.lo) | np.isfinite(prediction.hi)
    take = (known & ~clamped)[:, None] & (d != 0) & smaller
    A[:, :, 0], b, d = np.where(take, a_p, A[:, :, 0]), np.where(take, b_p, b), np.where(take, 0.0, d)
    return table._replace(A=A, b=b, d=d), Prediction(c_skip, c_out, prediction.lo, prediction.hi)


def end_of(table: Table, prediction: Prediction, alpha: float, sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of the result: its mean and standard deviation where the data are one point, 1."""
    N, r = table.b.shape
    S = np.zeros((r, N + 3))  # columns: x0, the start's noise, its second noise, the rows' noise
    S[0, :3] = alpha, sigma, table.init_noise
    one = np.eye(1, N + 3)[0]
    for k in range(N):
        c_out = prediction.c_out[k]
        m = (one - prediction.c_skip[k] * S[0]) / c_out if c_out else 0 * one
        S = table.A[k] @ S + np.outer(table.b[k], one) + np.outer(table.d[k], m)
        S[:, 3 + k] += table.s[k]
    mean, deviation = float(S[0, 0]), float(np.linalg.norm(S[0, 1:]))
    clean = table.s[-1, 0] == 0 and abs(mean - 1) <= 1e-9 and deviation <= 1e-9 * max(1.0, abs(sigma))
    return (1.0, 0.0) if clean else (mean, deviation)
