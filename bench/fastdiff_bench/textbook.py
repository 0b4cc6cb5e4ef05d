"""What one would write without fastdiff: the loop of a plan in plain torch operations, eager or through torch.compile.

Every row does the least work a careful person would spell out: absent terms are left out, a prediction that one slot
needs is multiplied out, histories are kept by reference, sums grow in place, noise is one torch.randn. The compiled
form fuses a row and the next model's input into one torch.compile'd function per row structure with the numbers as a
tensor, so nothing recompiles between rows; on a GPU it draws the noise too, on a CPU torch.randn does, since compiled
code takes ten times as long for it there.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.allocate import liveness
from fastdiff.native import ONE_THREAD
from fastdiff.readout import BINNED, CATEGORICAL

__all__ = ["Textbook", "compiled", "drawn"]

Model = Callable[[Tensor, Tensor], Tensor]
FIRST_TERM = 5  # of a row's numbers
MOST_FOLDED = 16.0
ROUNDING = 1e-12  # of what a difference in float64 leaves where there is none
_count = itertools.count()


class Row(NamedTuple):
    """One row without its numbers: what torch.compile specialises on."""

    skip: bool
    clamp: bool
    readout: str  # "" for the affine p
    noisy: bool
    slots: tuple[tuple[tuple[str, int], ...], ...]  # of a slot: its terms, (S | p | m | n, index)
    seen: str = ""  # what the next model sees: "" slot 0 itself, else "scaled" by c_in, "cast" or "classes"


Terms = dict[tuple[str, int], float]


def _rows(plan: fd.Plan, dtype: torch.dtype) -> tuple[list[Row], list[list[float]]]:
    """Structures and numbers: c_skip, c_out, lo, hi, the next c_in, then one number a term."""
    need = liveness(plan.A)
    rows, numbers = [], []
    for k in range(plan.nfe):
        readout = "" if plan.readout not in CATEGORICAL else plan.readout if k < plan.nfe - 1 else plan.last_readout
        clamp = plan.lo[k] > -float("inf") or plan.hi[k] < float("inf")
        slots = [_terms(plan, k, i) if i in need[k + 1] else {} for i in range(plan.slots)]
        if not readout and not clamp and any(("p", 0) in terms for terms in slots):
            slots = _folded(slots, float(plan.c_skip[k]), float(plan.c_out[k]))
        slots = [dict(sorted(terms.items(), key=lambda item: np.float32(item[1]) != 1)) for terms in slots]
        last = k == plan.nfe - 1
        c_in = 1.0 if last else float(plan.c_in[k + 1])
        seen = "" if last else "classes" if readout else "scaled" if c_in != 1 else "cast"
        if seen == "cast" and dtype == torch.float32:
            seen = ""
        noisy = any(("n", 0) in terms for terms in slots)
        rows.append(Row(bool(plan.c_skip[k] != 0), bool(clamp), readout, noisy, tuple(map(tuple, slots)), seen))
        values = [float(v[k]) for v in (plan.c_skip, plan.c_out, plan.lo, plan.hi)]
        numbers.append([*values, c_in, *(float(np.float32(c)) for terms in slots for c in terms.values())])
    return rows, numbers


def _terms(plan: fd.Plan, k: int, i: int) -> Terms:
    """What slot i is made of in row k."""
    found = {("S", j): float(plan.A[k, i, j]) for j in range(plan.slots)}
    found |= {("p", 0): float(plan.b[k, i]), ("m", 0): float(plan.d[k, i]), ("n", 0): float(plan.s[k, i])}
    return {term: c for term, c in found.items() if c != 0}


def _folded(slots: list[Terms], c_skip: float, c_out: float) -> list[Terms]:
    """The same with p = c_skip x + c_out m multiplied out, where that is fewer operations: two for four, say.

    Not where large numbers would cancel: there it costs digits.
    """
    out = []
    for terms in slots:
        new = dict(terms)
        b = new.pop(("p", 0), 0.0)
        for term, c in ((("S", 0), b * c_skip), (("m", 0), b * c_out)):
            total = new.get(term, 0.0) + c
            new[term] = total if abs(total) > ROUNDING * abs(c) else 0.0
            if b and abs(new[term]) > MOST_FOLDED:
                return slots
        out.append({term: c for term, c in new.items() if c != 0})
    prediction = 2 - (1.0 in (c_skip, c_out)) if c_skip != 0 else int(c_out != 1)
    return out if sum(map(_operations, out)) < sum(map(_operations, slots)) + prediction else slots


def _operations(terms: Terms) -> int:
    """A product to begin with, unless a term has the coefficient 1, and a sum for every other term."""
    return max(0, len(terms) - any(np.float32(c) == 1 for c in terms.values()))


def _plain(terms: tuple[tuple[str, int], ...], numbers: list[float]) -> bool:
    """Is a slot another tensor, unchanged?"""
    return len(terms) == 1 and numbers == [1.0]


def _seen(row: Row, x: Tensor, c_in: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The next model's input from slot 0."""
    if row.seen == "classes":
        return (torch.tanh(x / 2) if x.shape[-1] == 1 else 2 * x.softmax(-1) - 1).to(dtype)
    return (x * c_in if row.seen == "scaled" else x).to(dtype)


def drawn(theta: Tensor) -> Tensor:
    """A class of each of the distributions [..., K], without a host sync: argmax(theta / Exponential).

    On a CPU, where K exponentials cost more than all else of a step, the first partial sum beyond one uniform number.
    """
    if theta.is_cuda:
        return (theta / torch.empty_like(theta).exponential_()).argmax(-1)
    sums = theta.cumsum(-1)
    return (sums < torch.rand_like(sums[..., :1]) * sums[..., -1:]).sum(-1)


def _classes(m: Tensor, readout: str) -> tuple[Tensor, Tensor]:
    """The class and p = onehot or softmax; of two classes, one channel of logits, 2 k - 1 or 2 sigmoid - 1."""
    if m.shape[-1] == 1:
        theta = m.sigmoid()
        one = torch.rand_like(m) < theta if readout == "sample" else m > 0
        return one[..., 0].long(), 2 * theta - 1 if readout == "mean" else 2 * one.to(m.dtype) - 1
    theta = m if readout == "argmax" else m.softmax(-1)
    k = drawn(theta) if readout == "sample" else theta.argmax(-1)
    return k, theta if readout == "mean" else torch.nn.functional.one_hot(k, m.shape[-1]).to(m.dtype)


class _Layout(NamedTuple):
    """How a row's compiled function is called."""

    kept: dict[int, tuple[str, int]]  # slots that only move, and where from
    computed: tuple[int, ...]
    present: list[int]  # the slots it reads


class Textbook:
    """A plan's loop in plain torch.

    Args: plan, model: as for fd.Sampler. compiled: each row through torch.compile. dtype: of the model's input.
    """

    cache: dict[tuple[Any, ...], Callable[..., Any]] = {}  # compiled rows, shared by plans of equal structure

    def __init__(self, plan: fd.Plan, model: Model, *, compiled: bool = False, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        if plan.readout in BINNED or plan.learned_variance:
            raise ValueError(f"models of two planes are not written out: {plan.name!r}")
        self.plan, self.model, self.dtype, self.device = plan, model, dtype, torch.device(device)
        self.rows, self.numbers = _rows(plan, dtype)
        times = torch.from_numpy(plan.times.copy())
        self.times = (times if times.dtype == torch.int64 else times.float()).to(self.device)
        self.t: list[Tensor] = []
        self.compiled = compiled
        self.table = [torch.tensor(n, dtype=torch.float32, device=self.device) for n in self.numbers]
        self.layouts = [self._layout(k) for k in range(plan.nfe)]
        self.functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
        seen = "classes" if plan.readout in CATEGORICAL else "scaled" if plan.c_in[0] != 1 else "cast"
        self.first = self.rows[0]._replace(seen=seen)

    def _layout(self, k: int) -> _Layout:
        row, at, kept = self.rows[k], FIRST_TERM, {}
        sources = ("S", "m") if self.dtype == torch.float32 and not row.readout else ("S",)
        for i, terms in enumerate(row.slots):
            if _plain(terms, self.numbers[k][at : at + len(terms)]) and terms[0][0] in sources:
                kept[i] = terms[0]
            at += len(terms)
        computed = tuple(i for i, terms in enumerate(row.slots) if terms and i not in kept)
        read = {j for i in computed for name, j in row.slots[i] if name == "S"}
        uses_p = any(("p", 0) in row.slots[i] for i in computed)
        moved = {j for name, j in [kept.get(0, ("", 0))] if row.seen and name == "S"}
        return _Layout(kept, computed, sorted(read | moved | ({0} if row.skip and uses_p else set())))

    def __call__(self, x_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The final state from x_T, [B, *]; of a plan of classes the classes."""
        S: list[Tensor | None] = [x_T] + [None] * (self.plan.slots - 1)
        k = x_T
        draw = partial(torch.randn, x_T.shape, generator=generator, device=x_T.device)
        fused = self.compiled and self.device.type == "cuda"
        if not self.t or len(self.t[0]) != len(x_T):
            self.t = list(self.times[:, None].expand(-1, len(x_T)).contiguous().unbind(0))
        seen = _seen(self.first, x_T, float(self.plan.c_in[0]), self.dtype)
        for i in range(self.plan.nfe):
            row = self.rows[i]
            m = self.model(seen, self.t[i])
            n = draw() if row.noisy and not fused else None
            k, S, seen = self.compiled_row(i, S, m, n) if self.compiled else self.row(i, S, m, n)
        return k if self.rows[-1].readout else S[0]  # type: ignore[return-value]

    def row(self, i: int, S: list[Tensor | None], m: Tensor, n: Tensor | None) -> tuple[Tensor, list[Any], Any]:
        """Row i by eager operations: the class (or m), the slots, the next model's input."""
        row, (c_skip, c_out, lo, hi, c_in, *numbers) = self.rows[i], self.numbers[i]
        k = p = m = m.float()
        if row.readout:
            k, p = _classes(m, row.readout)
        elif any(("p", 0) in terms for terms in row.slots):
            if row.skip and c_skip == 1:
                p = _plus(S[0], m, c_out, own=False)
            else:
                p = m * c_out if c_out != 1 else m
                p = _plus(p, S[0], c_skip, own=p is not m) if row.skip else p
            if row.clamp:
                p = p.clamp(lo, hi) if p is m else p.clamp_(lo, hi)
        values = {"p": p, "m": m, "n": n}
        new: list[Tensor | None] = []
        at = 0
        for terms in row.slots:
            total: Tensor | None = None
            own = False
            for name, j in terms:
                v, c = S[j] if name == "S" else values[name], numbers[at]
                at += 1
                assert v is not None
                if total is None:
                    total, own = (v, False) if c == 1 else (v * c, True)
                else:
                    total, own = _plus(total, v, c, own), True
            new.append(total)
        x = new[0]
        return k, new, _seen(row, x, c_in, self.dtype) if row.seen else x  # type: ignore[arg-type]

    def compiled_row(
        self, i: int, S: list[Tensor | None], m: Tensor, n: Tensor | None = None
    ) -> tuple[Tensor, list[Any], Any]:
        """The same by one compiled function. n: the row's noise; None draws it inside."""
        row, layout = self.rows[i], self.layouts[i]
        key = (i, n is None, m.shape, m.dtype)
        fn = self.functions.get(key)
        if fn is None:
            shared = (row, layout.computed, n is None, m.shape, m.dtype, m.device, self.dtype)
            fn = self.cache.get(shared)
            if fn is None:
                fn = self.cache[shared] = _compiled(row, layout, m.numel(), self.dtype, inside=n is None)
            self.functions[key] = fn
        state = [S[j] for j in layout.present]
        out = list(fn(self.table[i], m, *state) if n is None else fn(self.table[i], m, *state, n))
        k = out.pop(0) if row.readout else m
        seen = out.pop() if row.seen else None
        new: list[Any] = [None] * len(S)
        for j, value in zip(layout.computed, out, strict=True):
            new[j] = value
        for j, (name, origin) in layout.kept.items():
            new[j] = S[origin] if name == "S" else m.float()
        return k, new, new[0] if seen is None else seen


def _plus(total: Tensor | None, v: Tensor | None, c: float, own: bool) -> Tensor:
    """total + c v, in place where total is this row's own tensor."""
    assert total is not None and v is not None
    return total.add_(v, alpha=c) if own else torch.add(total, v, alpha=c)


def compiled(function: Callable[..., Any], elements: int) -> Callable[..., Any]:
    """torch.compile for fixed shapes; little work stays on one CPU thread, as fastdiff's own loops do.

    By default torch wakes a second thread for 2^14 elements, which costs more than it gains, and milliseconds on a busy
    machine: the comparison is with the better setting. Each gets a code object of its own: Dynamo counts recompilations
    per code object, and past eight of them, all sizes and dtypes together, it runs the function eagerly.
    """
    options: dict[str, Any] | None = {"cpp.threads": 1} if elements < ONE_THREAD else None
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_count)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=False, options=options)


def _compiled(row: Row, layout: _Layout, elements: int, dtype: torch.dtype, *, inside: bool) -> Callable[..., Any]:
    """torch.compile of one row; returns the class of a readout, the computed slots and what the next model sees."""
    present = layout.present
    offsets, at = [], FIRST_TERM
    for terms in row.slots:
        offsets.append(at)
        at += len(terms)

    def step(c: Tensor, m: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        out = []
        m = m.float()
        p = m
        if row.readout:
            k, p = _classes(m, row.readout)
            out.append(k)
        elif any(("p", 0) in row.slots[i] for i in layout.computed):
            p = c[1] * m + c[0] * state[present.index(0)] if row.skip else c[1] * m
            if row.clamp:
                p = torch.minimum(torch.maximum(p, c[2]), c[3])
        n = m if not row.noisy else torch.randn_like(m) if inside else state[-1]
        new = {i: m if name == "m" else state[present.index(j)] for i, (name, j) in layout.kept.items()
               if name == "m" or j in present}  # fmt: skip
        for slot in layout.computed:
            total: Tensor | None = None
            for at, (name, j) in enumerate(row.slots[slot], offsets[slot]):
                v = state[present.index(j)] if name == "S" else p if name == "p" else m if name == "m" else n
                total = c[at] * v if total is None else total + c[at] * v
            assert total is not None
            new[slot] = total
            out.append(total)
        if row.seen:
            out.append(_seen(row, new[0], c[4], dtype))
        return tuple(out)

    return compiled(step, elements)
