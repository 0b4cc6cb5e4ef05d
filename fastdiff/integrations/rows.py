"""Rows of a plan on tensors that others own: x comes in, x' goes out, the history stays here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.plan import Plan, stays_small

__all__ = ["History", "HostRow", "Terms", "combine", "predict", "reads_p", "rows_of"]

X, M, P, N, S = 0, 1, 2, 3, 4  # where a term's tensor is found; S + place for the history
ONE = 1e-12  # as near to 1 as a probe's solution of it
Threshold = Callable[[Tensor], Tensor]
Terms = tuple[tuple[int, float], ...]


class HostRow(NamedTuple):
    """One row in host numbers; physical slot 0 is x itself, which is read and never written.

    out: terms of x'. slots: (place, terms) of the history. prediction: x0 = clamp(c_skip x + c_out m).
    uses_p: a term reads it. cut: it is clamped.
    """

    c_skip: float
    c_out: float
    ratio: float  # c_out / c_skip
    lo: float
    hi: float
    cut: bool
    uses_p: bool
    noisy: bool
    out: Terms
    slots: tuple[tuple[int, Terms], ...]


def rows_of(plan: Plan) -> list[HostRow]:
    """The plan's rows for `History`.

    Where x0 is neither clamped nor kept, it is folded into x and m: (A + b c_skip) x + (d + b c_out) m, summed in
    float64, which saves passes; but not where x would be taken many times (see Plan.sums).
    """
    a, rows = plan.allocate(), []
    for k in range(plan.nfe):
        cut = bool(np.isfinite(plan.lo[k]) or np.isfinite(plan.hi[k]))
        targets = [i for i in range(plan.slots) if a.write[k, i] >= 0]
        keeps = any(_is_p(plan, k, i) for i in targets if a.write[k, i] > 0)
        made = {int(a.write[k, i]): _terms(plan, k, i, cut, keeps) for i in targets}
        slots = tuple((place - 1, terms) for place, terms in sorted(made.items()) if place)
        uses_p = any(reads_p(terms) for terms in made.values())
        noisy = any(at == N for terms in made.values() for at, _ in terms)
        c_skip, c_out, lo, hi = (float(v[k]) for v in (plan.c_skip, plan.c_out, plan.lo, plan.hi))
        ratio = float(plan.c_out[k] / plan.c_skip[k]) if plan.c_skip[k] else 0.0
        rows.append(HostRow(c_skip, c_out, ratio, lo, hi, cut, uses_p, noisy, made.get(0, ((X, 1.0),)), slots))
    return rows


def reads_p(terms: Terms) -> bool:
    """Is x0 among the terms?"""
    return any(at == P for at, _ in terms)


def _is_p(plan: Plan, k: int, i: int) -> bool:
    return bool(plan.b[k, i] == 1 and not plan.A[k, i].any() and plan.d[k, i] == 0 and plan.s[k, i] == 0)


def _terms(plan: Plan, k: int, i: int, cut: bool, keeps: bool) -> Terms:
    """What slot i becomes in row k."""
    A, b, d = plan.A[k, i].copy(), float(plan.b[k, i]), float(plan.d[k, i])
    x = b * plan.c_skip[k]
    folds = not cut and (i == 0 or not _is_p(plan, k, i)) and (not keeps or (A[0] and d))
    if b and folds and stays_small(A[0], x):
        A[0] += x
        d += b * plan.c_out[k]
        b = 0.0
    read = plan.allocate().read[k]
    terms = [(X if j == 0 else S + int(read[j]) - 1, _number(c)) for j, c in enumerate(A) if c]
    terms += [(at, _number(c)) for at, c in ((P, b), (M, d), (N, plan.s[k, i])) if c]
    terms.sort(key=lambda term: term[1] != 1.0)  # a first coefficient of 1 saves a pass
    return tuple(terms)


def _number(c: float) -> float:
    return 1.0 if abs(c - 1) <= ONE else float(c)


def combine(terms: Terms, tensors: list[Tensor | None], out: Tensor | None = None) -> Tensor:
    """sum c * tensor, in a new tensor or in `out`, which must not be among them."""
    if not terms:
        like = tensors[X]
        assert like is not None
        return torch.zeros_like(like) if out is None else out.zero_()
    at, c = terms[0]
    v: Tensor = tensors[at]  # type: ignore[assignment]
    if len(terms) == 1:
        if out is None:
            return v * c if c != 1.0 else v.clone()
        return torch.mul(v, c, out=out) if c != 1.0 else out.copy_(v)
    if c == 1.0:
        at, c = terms[1]
        y = torch.add(v, tensors[at], alpha=c) if out is None else torch.add(v, tensors[at], alpha=c, out=out)  # type: ignore[arg-type]
        rest = terms[2:]
    else:
        y = v * c if out is None else torch.mul(v, c, out=out)
        rest = terms[1:]
    for at, c in rest:
        y.add_(tensors[at], alpha=c)  # type: ignore[arg-type]
    return y


def predict(row: HostRow, x: Tensor, m: Tensor) -> Tensor:
    """x0 = clamp(c_skip x + c_out m, lo, hi), a new tensor.

    At low alpha, c_skip (x + c_out / c_skip m): there both terms are large, and nearly equal where x0 is not cut.
    """
    if row.c_skip == 0:
        p = m * row.c_out
    elif abs(row.c_skip) >= 1:
        p = torch.add(x, m, alpha=row.ratio)
        if row.c_skip != 1:
            p.mul_(row.c_skip)
    else:
        p = (x * row.c_skip).add_(m, alpha=row.c_out)
    return p.clamp_(row.lo, row.hi) if row.cut else p


class History:
    """What a plan carries besides x: one tensor a place, in buffers that are reused from step to step.

    x and m are only read. A prediction that is kept is the very tensor `step` returns: it is never written again. With
    gradients every tensor is a new one, so that autograd sees ordinary torch.
    """

    def __init__(self, places: int) -> None:
        self.slots: list[Tensor | None] = [None] * places
        self.own = [False] * places  # made here, so that nobody else can hold it
        self.free: list[Tensor] = []

    def clone(self) -> History:
        """The same history in buffers of its own."""
        new = History(len(self.slots))
        new.slots = [None if s is None else s.clone() for s in self.slots]
        return new

    def step(
        self, row: HostRow, x: Tensor, m: Tensor, n: Tensor | None, *, graded: bool = False,
        threshold: Threshold | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x' of one row, and x0 where the row computes it. x, m, n: of one shape and dtype, fp32 or fp64."""
        p = None
        if row.uses_p:
            p = predict(row, x, m)
            if threshold is not None and row.cut:
                p = threshold(predict(row._replace(cut=False), x, m))
        if not row.slots:
            return combine(row.out, [x, m, p, n, *self.slots]), p
        tensors: list[Tensor | None] = [x, m, p, n, *self.slots]
        y = combine(row.out, tensors)
        old, own = self.slots, self.own
        self.slots, self.own = list(old), list(own)
        for place, terms in row.slots:
            if terms == KEEPS_P:
                self.slots[place], self.own[place] = p, False
                continue
            spare = self.free.pop() if self.free and not graded else None
            self.slots[place], self.own[place] = combine(terms, tensors, spare), not graded
        for place, _ in row.slots:
            v = old[place]
            if v is not None and own[place] and not graded:
                self.free.append(v)
        return y, p


KEEPS_P: Terms = ((P, 1.0),)
