"""What one would write without fastdiff: the loop of a plan in plain torch operations, eager or through torch.compile.

Every row does the least work a careful person would spell out: absent terms are left out, histories are kept by
reference, predictions are shared, noise is one torch.randn. The compiled form fuses a row into one torch.compile'd
function per row structure with the numbers as a tensor, so nothing recompiles between rows; on a GPU it draws the noise
too, on a CPU torch.randn does, since compiled code takes ten times as long for it there.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.allocate import liveness
from fastdiff.native import ONE_THREAD
from fastdiff.readout import CATEGORICAL

__all__ = ["Textbook", "compiled"]

Model = Callable[[Tensor, Tensor], Tensor]
_count = itertools.count()


class Row(NamedTuple):
    """One row without its numbers: what torch.compile specialises on."""

    skip: bool
    clamp: bool
    readout: str  # "" for the affine p
    noisy: bool
    slots: tuple[tuple[tuple[str, int], ...], ...]  # of a slot: its terms, (S | p | m | n, index)


def _rows(plan: fd.Plan) -> tuple[list[Row], list[list[float]]]:
    """Structures and numbers: c_skip, c_out, lo, hi, then one number a term."""
    need = liveness(plan.A)
    rows, numbers = [], []
    for k in range(plan.nfe):
        slots, values = [], [float(v[k]) for v in (plan.c_skip, plan.c_out, plan.lo, plan.hi)]
        for i in range(plan.slots):
            found = [(("S", j), plan.A[k, i, j]) for j in range(plan.slots)]
            found += [(("p", 0), plan.b[k, i]), (("m", 0), plan.d[k, i]), (("n", 0), plan.s[k, i])]
            found = [(term, c) for term, c in found if c != 0] if i in need[k + 1] else []
            slots.append(tuple(term for term, _ in found))
            values += [float(c) for _, c in found]
        readout = "" if plan.readout not in CATEGORICAL else plan.readout if k < plan.nfe - 1 else plan.last_readout
        bounded = values[2] > -float("inf") or values[3] < float("inf")
        noisy = any(("n", 0) in terms for terms in slots)
        rows.append(Row(values[0] != 0, bounded, readout, noisy, tuple(slots)))
        numbers.append(values)
    return rows, numbers


def _plain(terms: tuple[tuple[str, int], ...], numbers: list[float]) -> bool:
    """Is a slot another tensor, unchanged?"""
    return len(terms) == 1 and numbers == [1.0]


def _present(row: Row) -> list[int]:
    """The slots a row reads."""
    return sorted({j for terms in row.slots for name, j in terms if name == "S"} | {0})


def _classes(m: Tensor, readout: str) -> tuple[Tensor, Tensor]:
    """The class and p = onehot or softmax; drawn as argmax(softmax / Exponential), without a host sync."""
    theta = m.softmax(-1)
    drawn = theta / torch.empty_like(theta).exponential_() if readout == "sample" else theta
    k = drawn.argmax(-1)
    return k, theta if readout == "mean" else torch.nn.functional.one_hot(k, m.shape[-1]).to(m.dtype)


class Textbook:
    """A plan's loop in plain torch.

    Args: plan, model: as for fd.Sampler. compiled: each row through torch.compile. dtype: of the model's input.
    """

    cache: dict[tuple[Any, ...], Callable[..., Any]] = {}  # compiled rows, shared by plans of equal structure

    def __init__(self, plan: fd.Plan, model: Model, *, compiled: bool = False, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        self.plan, self.model, self.dtype, self.device = plan, model, dtype, torch.device(device)
        self.rows, self.numbers = _rows(plan)
        times = torch.from_numpy(plan.times.copy())
        self.times = (times if times.dtype == torch.int64 else times.float()).to(self.device)
        self.c_in = plan.c_in.tolist()
        self.compiled = compiled
        self.table = [torch.tensor(n, dtype=torch.float32, device=self.device) for n in self.numbers]
        self.alias = [self._aliases(k) for k in range(plan.nfe)]

    def _aliases(self, k: int) -> list[tuple[str, int] | None]:
        at, found = 4, []
        for terms in self.rows[k].slots:
            found.append(terms[0] if _plain(terms, self.numbers[k][at : at + len(terms)]) else None)
            at += len(terms)
        return found

    def __call__(self, x_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The final state from x_T, [B, *]; of a plan of classes the classes."""
        S: list[Tensor | None] = [x_T] + [None] * (self.plan.slots - 1)
        k = x_T
        draw = partial(torch.randn, x_T.shape, generator=generator, device=x_T.device)
        for i in range(self.plan.nfe):
            x = S[0]
            assert x is not None
            row = self.rows[i]
            seen = 2 * x.softmax(-1) - 1 if row.readout else x if self.c_in[i] == 1 else x * self.c_in[i]
            m = self.model(seen.to(self.dtype), self.times[i].expand(len(x)))
            fused = self.compiled and self.device.type == "cuda"
            n = draw() if row.noisy and not fused else None
            k, S = self._compiled_row(i, S, m, n) if self.compiled else self._row(i, S, m.float(), n)
        return k if self.rows[-1].readout else S[0]  # type: ignore[return-value]

    def _row(self, i: int, S: list[Tensor | None], m: Tensor, n: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        row, (c_skip, c_out, lo, hi, *numbers) = self.rows[i], self.numbers[i]
        k = p = m
        if row.readout:
            k, p = _classes(m, row.readout)
        elif any(("p", 0) in terms for terms in row.slots):
            p = m * c_out if c_out != 1 else m
            if row.skip:
                p = torch.add(p, S[0], alpha=c_skip)  # type: ignore[arg-type]
            if row.clamp:
                p = p.clamp(lo, hi)
        values = {"p": p, "m": m, "n": n}
        new: list[Tensor | None] = []
        at = 0
        for terms in row.slots:
            total: Tensor | None = None
            for name, j in terms:
                v, c = S[j] if name == "S" else values[name], numbers[at]
                at += 1
                assert v is not None
                if total is None:
                    total = v if c == 1 else v * c
                else:
                    total = torch.add(total, v, alpha=c)
            new.append(total)
        return k, new

    def _compiled_row(
        self, i: int, S: list[Tensor | None], m: Tensor, n: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """n: the row's noise; None draws it inside the compiled function."""
        row, alias = self.rows[i], self.alias[i]
        kept = {j: a[1] for j, a in enumerate(alias) if a is not None and a[0] == "S"}  # slots that only move
        computed = tuple(j for j, terms in enumerate(row.slots) if terms and j not in kept)
        key = (row, computed, n is None, m.shape, m.dtype, m.device)
        fn = self.cache.get(key)
        if fn is None:
            fn = self.cache[key] = _compiled(row, computed, m.numel(), inside=n is None)
        k, *out = fn(self.table[i], m, *[S[j] for j in _present(row)], *([] if n is None else [n]))
        fresh = dict(zip(computed, out, strict=True))
        new = [S[kept[j]] if j in kept else fresh.get(j) for j in range(len(alias))]
        return k, new


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


def _compiled(row: Row, computed: tuple[int, ...], elements: int, *, inside: bool) -> Callable[..., Any]:
    """torch.compile of one row."""
    present = _present(row)
    offsets, at = [], 4
    for terms in row.slots:
        offsets.append(at)
        at += len(terms)

    def step(c: Tensor, m: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        m = m.float()
        k = p = m
        if row.readout:
            k, p = _classes(m, row.readout)
        else:
            p = c[1] * m + c[0] * state[0] if row.skip else c[1] * m
            if row.clamp:
                p = torch.minimum(torch.maximum(p, c[2]), c[3])
        n = m if not row.noisy else torch.randn_like(state[0]) if inside else state[-1]
        out = []
        for slot in computed:
            total: Tensor | None = None
            for at, (name, j) in enumerate(row.slots[slot], offsets[slot]):
                v = state[present.index(j)] if name == "S" else p if name == "p" else m if name == "m" else n
                total = c[at] * v if total is None else total + c[at] * v
            assert total is not None
            out.append(total)
        return (k, *out)

    return compiled(step, elements)
