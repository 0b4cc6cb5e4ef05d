"""Rows of a plan on tensors that others own: x comes in, x' goes out, the history stays here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.cpu import host_rows
from fastdiff.plan import Plan

__all__ = ["History", "HostRow", "Terms", "combine", "predict", "rows_of"]

X, M, P, N, S = 0, 1, 2, 3, 4  # where a term's tensor is found; S + place for the history
Threshold = Callable[[Tensor], Tensor]
Terms = tuple[tuple[int, float], ...]


class HostRow(NamedTuple):
    """One row in fp32 host numbers; physical slot 0 is x itself, which is read and never written.

    out: terms of x'. slots: (place, terms) of the history. prediction: x0 = clamp(c_skip x + c_out m).
    uses_p: a term reads it. cut: it is clamped.
    """

    c_skip: float
    c_out: float
    lo: float
    hi: float
    cut: bool
    uses_p: bool
    noisy: bool
    out: Terms
    slots: tuple[tuple[int, Terms], ...]


def rows_of(plan: Plan) -> list[HostRow]:
    """The plan's rows for `History`."""
    rows = []
    for row in host_rows(plan):
        out: Terms = ()
        slots = []
        for t in row.targets:
            terms = [(X if place == 0 else S + place - 1, c) for place, _, c in t.terms]
            terms += [(at, c) for at, c in ((P, t.b), (M, t.d), (N, t.s)) if c != 0]
            terms.sort(key=lambda term: term[1] != 1.0)  # a first coefficient of 1 saves a pass
            if t.place == 0:
                out = tuple(terms)
            else:
                slots.append((t.place - 1, tuple(terms)))
        if not any(t.place == 0 for t in row.targets):
            out = ((X, 1.0),)
        rows.append(
            HostRow(row.c_skip, row.c_out, row.lo, row.hi, row.clamps, row.uses_p, row.noisy, out, tuple(slots))
        )
    return rows


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
    """x0 = clamp(c_skip x + c_out m, lo, hi), a new tensor."""
    if row.c_skip == 0:
        p = m * row.c_out
    elif row.c_skip == 1:
        p = torch.add(x, m, alpha=row.c_out)
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
