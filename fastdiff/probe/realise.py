"""From coefficient rows to a plan with the fewest slots: a time-varying minimal realisation.

Before row k the state must hold whatever the future needs of the inputs that came so far: the row space of
Y[k:, inputs before row k], with Y the states' coefficients. Slot 0 is the state itself; the other slots are directions
of that space, the cheapest first: a slot that exists, x, x0, a combination of x and m, m, any other. The whole future
counts (a short horizon misses saved samples), seen through a random sketch of few rows, which has the same row space.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdiff.plan import MAX_SLOTS
from fastdiff.probe.observe import Observation, Refused

__all__ = ["Table", "arrivals", "realise"]

RANK = 1e-12  # of the sketch's singular values
INSIDE = 1e-9  # a direction lies in a space
APART = 1e-6  # a direction is new
UNUSED = 1e-14
RESIDUAL = 1e-10
MARGIN = 0.8  # x0 is the slot of choice: others must be this much cheaper


class Table(NamedTuple):
    """A [N, r, r], b, d, s [N, r], draws [N], init_noise; b is about the clamped prediction only."""

    A: np.ndarray
    b: np.ndarray
    d: np.ndarray
    s: np.ndarray
    draws: np.ndarray
    init_noise: float


def arrivals(seen: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which row each draw belongs to, so that every row has at most one that counts, its last.

    A draw that counts belongs to the row whose result first shows it, not to the one before if it was drawn ahead of
    a model call. It may come earlier (the plan keeps it in a slot), never later; draws keep their order. Unused draws
    are counted where they were made, or in the nearest row that leaves the last place free.
    Returns: the rows of all inputs [J], which draws are used [J] bool, draws [N].
    """
    rows, N = seen.rows.copy(), len(seen.times)
    is_noise = seen.kinds == "n"
    size = np.abs(seen.state).max(axis=1, keepdims=True)
    used = is_noise & (np.abs(seen.state) > UNUSED * size).any(axis=0)
    shown = (np.abs(seen.state) > UNUSED * size).argmax(axis=0) - 1
    rows = np.where(used, np.maximum(rows, shown), rows)
    free = N - 1
    for j in np.flatnonzero(used)[::-1]:
        drawn, rows[j] = rows[j], min(rows[j], free)
        free = rows[j] - 1
        if rows[j] < min(drawn, 0) or rows[j] < -1:
            raise Refused("more normal draws reach the result than there are model evaluations to draw them at")
    draws = np.zeros(N, np.int64)
    taken = -1
    order = np.flatnonzero(is_noise)
    for i, j in enumerate(order):
        if used[j]:
            taken = rows[j]
        else:
            later = [rows[k] for k in order[i:] if used[k]]
            rows[j] = min(max(rows[j], taken + 1), later[0] if later else N)
        if 0 <= rows[j] < N:
            draws[rows[j]] += 1
    return rows, used, draws


def _space(F: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the row space, [rank, J]."""
    if not F.size or not np.any(F):
        return np.zeros((0, F.shape[1]))
    _, size, V = np.linalg.svd(F, full_matrices=False)
    return V[size > RANK * size[0]]


def _future(Y: np.ndarray, rows: np.ndarray, edits: np.ndarray) -> list[np.ndarray]:
    """For every k an orthonormal basis of what the future needs besides nothing: span of Y[k:] on known inputs."""
    N = len(Y) - 1
    Yn = Y / np.maximum(np.abs(Y).max(axis=1, keepdims=True), np.finfo(float).tiny)
    sketch = np.random.default_rng(1).standard_normal((MAX_SLOTS + 4, N + 1))
    spaces = []
    for k in range(N + 1):
        known = rows < k
        F = np.where(known, Yn[k:], 0.0) if k + MAX_SLOTS + 4 > N else (sketch[:, k:] @ Yn[k:]) * known
        if edits[k] >= 0:  # an edit reaches the future through slot 0 alone
            rest = F - np.outer(F[:, edits[k]], Y[k] * known)
            rest[:, edits[k]] = 0
            F = np.concatenate([rest, (Y[k] * known / np.linalg.norm(Y[k] * known))[None]])
        spaces.append(_space(F))
    return spaces


def _choose(space: np.ndarray, x: np.ndarray, wanted: list[np.ndarray], edit: int) -> list[int | np.ndarray]:
    """Directions that complete x to the space: indices into `wanted` where they serve, else new vectors."""
    basis = [space @ x / np.linalg.norm(x)]
    chosen: list[int | np.ndarray] = []

    def add(v: np.ndarray) -> bool:
        size = np.linalg.norm(v)
        inside = space @ v
        if size == 0 or np.linalg.norm(v - inside @ space) > INSIDE * size:
            return False
        Q = np.linalg.qr(np.array(basis).T)[0]
        rest = inside - Q @ (Q.T @ inside)
        if np.linalg.norm(rest) <= APART * size:
            return False
        basis.append(inside / size)
        return True

    for i, v in enumerate(wanted):
        if len(basis) == len(space):
            return chosen
        if add(v):
            chosen.append(i)
    for v in space if edit < 0 else _complement(space, x, [wanted[i] for i in chosen if isinstance(i, int)], edit):
        if len(basis) == len(space):
            break
        if add(v):
            chosen.append(v)
    return chosen


def _complement(space: np.ndarray, x: np.ndarray, named: list[np.ndarray], edit: int) -> np.ndarray:
    """Orthonormal directions of the space without the edit, at right angles to the named ones: nothing cancels."""
    free = space - np.outer(space[:, edit] / x[edit], x)
    if named:
        Q = np.linalg.qr(np.array(named).T)[0]
        free = free - free @ Q @ Q.T
    return _space(free)


def _mixed(space: np.ndarray, x: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """The direction of span{x, m} that lies in the space, if there is one."""
    Q = np.linalg.qr(np.array([x / np.linalg.norm(x), m]).T)[0]
    _, size, V = np.linalg.svd(space @ Q, full_matrices=False)
    return [Q @ V[0]] if len(size) and size[0] > 1 - INSIDE else []


def _by_use(fresh: list[np.ndarray], spaces: list[np.ndarray]) -> list[list[int]]:
    """Which of x0, m and x stay useful for the most rows; those that tie, each as the first choice."""
    rows = []
    for v in fresh:
        size, count = np.linalg.norm(v), 0
        for space in spaces[: MAX_SLOTS + 2]:
            if np.linalg.norm(v - (space @ v) @ space) > INSIDE * size:
                break
            count += 1
        rows.append(count)
    return [[i] for i, count in enumerate(rows) if count == max(rows) > 0]


def _free_of(y: np.ndarray, row: int, seen: Observation, x0: np.ndarray | None) -> np.ndarray:
    """y less its part in that row's x0, which is an input of its own."""
    output = np.flatnonzero((seen.rows == row) & (seen.kinds == "m"))[0]
    return y if x0 is None or not x0[output] else y - y[output] / x0[output] * x0


def _tidy(
    space: np.ndarray, x: np.ndarray, chosen: list[int | np.ndarray], wanted: list[np.ndarray], past: list[np.ndarray]
) -> list[int | np.ndarray]:
    """The directions nobody named, as combinations of few past values and without x, by Gauss-Jordan elimination.

    With x in them, or nearly parallel to each other, fp32 would cancel large numbers.
    """
    basis = np.array([x, *past])
    G = np.linalg.lstsq(basis.T, space.T, rcond=None)[0].T
    if np.linalg.norm(G @ basis - space) > INSIDE * np.sqrt(len(space)):
        return chosen
    _, _, G = np.linalg.svd(G[:, 1:], full_matrices=False)
    G = G[: len(chosen)]
    pivots = [next((j for j, v in enumerate(past) if v is wanted[c]), -1) for c in chosen if isinstance(c, int)]
    if -1 in pivots:
        return chosen
    for row in range(len(G)):
        rest = np.abs(G[row:])
        j = pivots[row] if row < len(pivots) else int(np.argmax(rest.max(axis=0)))
        best = row + int(np.argmax(rest[:, j]))
        if abs(G[best, j]) <= APART:
            return chosen
        G[[row, best]] = G[[best, row]]
        G[row] /= G[row, j]
        for other in range(len(G)):
            if other != row:
                G[other] -= G[other, j] * G[row]
    G[np.abs(G) <= INSIDE * np.abs(G).max(axis=1, keepdims=True)] = 0.0
    return [*(c for c in chosen if isinstance(c, int)), *(G[len(pivots) :] @ np.array(past))]


def _length(c: int | np.ndarray, wanted: list[np.ndarray], lengths: list[float]) -> float:
    """How large a chosen slot's values are: about 1 for x0, the state's size for a state."""
    if isinstance(c, int):
        return lengths[c] if c < len(lengths) else float(np.linalg.norm(wanted[c]))
    return float(np.linalg.norm(c))


def _cost(
    target: np.ndarray, x: np.ndarray, chosen: list[int | np.ndarray], wanted: list[np.ndarray], lengths: list[float],
    size: float,
) -> float:  # fmt: skip
    """The sum of |coefficient| |slot| with which the slots make up the target."""
    new = np.array([x, *(wanted[c] if isinstance(c, int) else c for c in chosen)])
    coefficients = np.linalg.lstsq(new.T, target, rcond=None)[0]
    return float(np.abs(coefficients) @ np.array([size, *(_length(c, wanted, lengths) for c in chosen)]))


def realise(seen: Observation, x0: list[np.ndarray | None], size: np.ndarray) -> Table:
    """The smallest plan that repeats an observation.

    Args: seen: what was observed. x0: [N] the coefficients of x0 where known, as a slot to prefer. size: [N + 1] how
        large the state is at each row.
    Returns: Table; b holds the coefficient of clamped predictions, d that of model outputs.
    Raises: ValueError: more slots than a plan can have, a first row that needs more than x, two draws in a row.
    """
    rows, used, draws = arrivals(seen)
    N, J, Y = len(seen.times), len(seen.kinds), seen.state
    rows = np.where((seen.kinds == "n") & ~used, N + 1, rows)  # never known, never needed
    edits = np.full(N + 1, -1)
    edits[rows[seen.kinds == "e"] + 1] = np.flatnonzero(seen.kinds == "e")
    spaces = _future(Y, rows, edits)
    slots = max(len(space) for space in spaces)
    if slots > MAX_SLOTS:
        raise Refused(f"it carries at least {slots} samples between model evaluations; a plan has {MAX_SLOTS} slots")
    if len(spaces[0]) > 1:
        raise Refused("it uses its start in a way that the first model input does not show")
    A = np.zeros((N, slots, slots))
    b, d, s = (np.zeros((N, slots)) for _ in range(3))
    unit = np.eye(J)
    C, sizes = (Y[0] * (rows < 0))[None], [size[0]]
    for k in range(N):
        at = {kind: np.flatnonzero((rows == k) & (seen.kinds == kind)) for kind in "mpn"}
        m, p, n = unit[at["m"][0]], [unit[c] for c in at["p"]], at["n"]
        space = spaces[k + 1]
        x = Y[k + 1] * (rows <= k)
        if edits[k + 1] >= 0:
            x[edits[k + 1]] = 1.0
        predictions = [*p, *(v for v in [x0[k]] if v is not None)]
        fresh, lengths = [*predictions, m, C[0]], [1.0] * (len(predictions) + 1) + [sizes[0]]
        order = _by_use(fresh, spaces[k + 1 :])
        edit, kept = int(edits[k + 1]), len(C) - 1
        target = _free_of(Y[k + 2], k + 1, seen, x0[k + 1]) * (rows <= k) if k + 2 <= N else None
        best = np.inf
        for first in order or [[]]:
            queue = [*first, *(i for i in range(len(fresh)) if i not in first)]
            pool = [*C[1:], *(fresh[i] for i in queue), *_mixed(space, C[0], m)]
            held = [*sizes[1:], *(lengths[i] for i in queue)]
            picks = _choose(space, x, pool, edit)
            cost = 0.0 if target is None else _cost(target, x, picks, pool, held, size[k + 1])
            if cost < MARGIN * best:
                best, chosen, wanted, lengths_of, keep_x = cost, picks, pool, held, kept + queue.index(len(fresh) - 1)
        if edit < 0 and any(not isinstance(c, int) for c in chosen):
            past = [*C[1:], *(predictions or [m]), *([m] if p else []), *(unit[c] for c in n)]
            chosen = _tidy(space, x, chosen, wanted, past)
        new = [x, *(wanted[c] if isinstance(c, int) else c for c in chosen)]
        sizes = [size[k + 1], *(_length(c, wanted, lengths_of) for c in chosen)]
        solve, realised = _Solver(C), []
        for i, v in enumerate(new):
            pick = chosen[i - 1] if i else -1
            if isinstance(pick, int) and 0 <= pick < len(C) - 1:
                A[k, i, pick + 1] = 1.0  # an old slot, unchanged
            elif isinstance(pick, int) and pick == keep_x:
                A[k, i, 0] = 1.0
            else:
                A[k, i, : len(C)] = solve(v * (rows < k), np.linalg.norm(v))
                d[k, i] = v[at["m"][0]]
                b[k, i] = sum(v[c] for c in at["p"])
                s[k, i] = v[n[0]] if len(n) else 0.0
            got = A[k, i, : len(C)] @ C + np.where(rows == k, v, 0.0)  # what the plan will hold, its errors included
            realised.append(got)
        error = np.linalg.norm(realised[0] - x) / (np.linalg.norm(x) or 1.0)  # a state may be 0
        if not error <= RESIDUAL:
            raise Refused(f"row {k} is not a combination of the slots (residual {error:.1e})")
        C = np.array(realised)
    for table in (b, d, s):
        table[np.abs(table) < UNUSED * np.maximum(1.0, np.abs(table).max())] = 0.0
    init_noise = float(Y[0][(rows == -1) & (seen.kinds == "n")].sum())
    return Table(A, b, d, s, draws, init_noise)


class _Solver:
    """Coefficients of a vector over the slots, the tiny ones exactly 0."""

    def __init__(self, C: np.ndarray) -> None:
        self.size = np.linalg.norm(C, axis=1)
        self.C = C / self.size[:, None]
        self.Q, self.R = np.linalg.qr(self.C.T)

    def __call__(self, v: np.ndarray, scale: float | np.floating) -> np.ndarray:
        a = np.linalg.solve(self.R, self.Q.T @ v)
        a[np.abs(a) < UNUSED * scale * 10] = 0.0
        return a / self.size
