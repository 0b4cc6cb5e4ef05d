"""Which slots a row needs, and where they live: liveness, renaming, physical indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Allocation", "allocate", "liveness"]


@dataclass(frozen=True)
class Allocation:
    """Physical slots of a plan.

    read: [N, r] physical index of logical slot j where row k reads it, else -1.
    write: [N, r] physical index row k writes logical slot i to, else -1 (dead, or unchanged where it lies).
    physical: how many slots the state slab needs. copies: rows x slots moved without being changed.
    Slot 0 is physical 0 throughout: the model reads it there.
    """

    read: np.ndarray
    write: np.ndarray
    physical: int
    copies: int


def liveness(A: np.ndarray) -> list[frozenset[int]]:
    """The logical slots needed before each row, and after the last (slot 0): N + 1 sets.

    Slot 0 is always needed: the model reads it.
    """
    need = [frozenset({0})]
    for k in range(len(A) - 1, -1, -1):
        before = {0}
        for i in need[-1]:
            before.update(np.flatnonzero(A[k, i]).tolist())
        need.append(frozenset(before))
    return need[::-1]


def _unchanged(A: np.ndarray, rest: np.ndarray, i: int) -> int | None:
    """The slot j with S'_i = S_j exactly, if there is one."""
    if rest[i].any():
        return None
    nonzero = np.flatnonzero(A[i])
    return int(nonzero[0]) if len(nonzero) == 1 and A[i, nonzero[0]] == 1.0 else None


def allocate(
    A: np.ndarray, b: np.ndarray, d: np.ndarray, s: np.ndarray, c_skip: np.ndarray, need: list[frozenset[int]]
) -> Allocation:
    """Give every live slot a physical place; a shift (S'_i = S_j) keeps the place of S_j and moves nothing.

    Args: A [N, r, r]; b, d, s [N, r]; c_skip [N]; need: from liveness().
    Returns: Allocation. A write never lands on a place another live slot keeps.
    """
    rows, slots = b.shape
    read, write = (np.full((rows, slots), -1, np.int64) for _ in range(2))
    place = {0: 0}  # logical -> physical, before the row
    physical, copies = 1, 0
    for k in range(rows):
        rest = np.stack([b[k], d[k], s[k]], axis=1)
        live = sorted(need[k + 1])
        kept: dict[int, int] = {}
        for i in live:
            j = _unchanged(A[k], rest, i)
            if j is not None and j in place and (i == 0) == (place[j] == 0) and place[j] not in kept.values():
                kept[i] = place[j]
            elif j is not None:
                copies += 1
        after, used = dict(kept), set(kept.values())
        for i in live:
            if i in kept:
                continue
            free = 0 if i == 0 else next(c for c in range(1, slots + 1) if c not in used)
            after[i] = write[k, i] = free
            used.add(free)
            physical = max(physical, free + 1)
        written = [i for i in live if i not in kept]
        for j in {int(j) for i in written for j in np.flatnonzero(A[k, i])}:
            read[k, j] = place[j]
        if c_skip[k] != 0 and b[k, written].any():
            read[k, 0] = 0
        place = after
    return Allocation(read, write, physical, copies)
