"""The step on a CPU: in place and allocation-free in eager torch, or one C++ loop for every row; and the posterior."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled

from fastdiff.native import TYPES, call, coef_rows, function, layout, plain, run, threads, types
from fastdiff.plan import ROW_HEADER, Plan
from fastdiff.prediction import NO_SKIP

__all__ = ["CompiledStep", "EagerStep", "HostRow", "host_rows", "posterior_into"]

SLOTS, COPIES, IN_ONE = 16, 2, 4  # as fastdiff_kernels/sums_cpu.hpp has them
TERMS = SLOTS + 3
P, M, N = -1, -2, -3  # what a term may read beside a slot


class Target(NamedTuple):
    """One slot a row writes: S[place] = sum coefficient * S[source] + b p + d m + s n."""

    place: int
    terms: tuple[tuple[int, float], ...]  # (source, coefficient)
    b: float
    d: float
    s: float

    @property
    def is_prediction(self) -> bool:
        return not self.terms and (self.b, self.d, self.s) == (1.0, 0.0, 0.0)


class HostRow(NamedTuple):
    """A packed row (fp32 values) as Python numbers, its targets in an order in which no write spoils a later read."""

    c_skip: float  # 0 where the model's output alone is the prediction
    c_out: float
    c_ratio: float
    lo: float
    hi: float
    clamps: bool
    c_in_next: float
    uses_p: bool
    noisy: bool
    targets: tuple[Target, ...]
    staged: frozenset[int]  # places that must be written after everything is computed


def host_rows(plan: Plan) -> list[HostRow]:
    """The packed table as host numbers, so that CPU and kernels use the same fp32 coefficients."""
    return [host_row(row, plan.slots) for row in plan.pack().tolist()]


def host_row(row: list[float], r: int) -> HostRow:
    """One packed row of r slots as host numbers."""
    body = row[ROW_HEADER:]
    A, (b, d, s, read, write) = body[: r * r], (body[r * r + r * i : r * r + r * (i + 1)] for i in range(5))
    targets = []
    for i in range(r):
        if write[i] >= 0:
            terms = tuple((int(read[j]), A[i * r + j]) for j in range(r) if A[i * r + j] != 0 and read[j] >= 0)
            targets.append(Target(int(write[i]), terms, b[i], d[i], s[i]))
    ordered, staged = _order(targets)
    c_skip, c_ratio, lo, hi, c_in_next, has_noise = row[:6]
    c_out, c_skip = c_skip * c_ratio, c_skip if c_skip != NO_SKIP else 0.0
    clamps = lo > -float("inf") or hi < float("inf")
    noisy = has_noise != 0 and any(t.s for t in targets)
    uses_p = any(t.b for t in targets)
    return HostRow(c_skip, c_out, c_ratio, lo, hi, clamps, c_in_next, uses_p, noisy, ordered, staged)


def _order(targets: list[Target]) -> tuple[tuple[Target, ...], frozenset[int]]:
    rest, ordered, staged = list(targets), [], set()
    while rest:
        for t in rest:
            if not any(t.place == source for other in rest if other is not t for source, _ in other.terms):
                break
        else:
            t = rest[0]
            staged.add(t.place)
        rest.remove(t)
        ordered.append(t)
    return tuple(ordered), frozenset(staged)


class EagerStep:
    """Rows of a plan on a list of slot buffers, in place: no allocation after construction.

    Args: plan; slots: [P] fp32 buffers of one shape, slot 0 first (never exchanged; others may trade places with the
    scratch, which makes storing p free).
    """

    def __init__(self, plan: Plan, slots: list[Tensor]) -> None:
        self.rows = host_rows(plan)
        self.slots = slots
        self.p = torch.empty_like(slots[0])
        self.m = torch.empty_like(slots[0])
        width = max((len(r.staged) for r in self.rows), default=0)
        self.spare = [torch.empty_like(slots[0]) for _ in range(width)]

    def __call__(
        self,
        k: int,
        m: Tensor,
        uncond: Tensor | None,
        w: float | Tensor | None,
        noise: Tensor | None,
        x0: Tensor | None,
        bound: Tensor | None = None,
    ) -> None:
        """Runs row k. m, uncond: model outputs; w: guidance weight; noise: [B, *] or None; x0: receives p.

        bound: [B] of dynamic thresholding where c_out is 0: p = clamp(p, -bound, bound) / bound.
        """
        row, S = self.rows[k], self.slots
        x = S[0]
        if uncond is not None:
            torch.sub(m, uncond, out=self.m) if m.dtype == x.dtype else self.m.copy_(m).sub_(uncond)
            m = self.m.mul_(w).add_(uncond)  # type: ignore[arg-type]
        elif m.dtype != x.dtype:
            m = self.m.copy_(m)
        p, scale = self.p, 1.0
        if row.uses_p or x0 is not None:
            if row.c_skip != 0:
                torch.add(x, m, alpha=row.c_ratio, out=p)
                if row.clamps or bound is not None or any(t.is_prediction for t in row.targets):
                    p.mul_(row.c_skip)
                else:
                    scale = row.c_skip
            else:
                torch.mul(m, row.c_out, out=p)
            if bound is not None:
                limit = bound.view(-1, *[1] * (p.dim() - 1))
                torch.minimum(torch.maximum(p, -limit, out=p), limit, out=p).div_(limit)
            if row.clamps:
                p.clamp_(row.lo, row.hi)
            if x0 is not None:
                torch.mul(p, scale, out=x0)
        spare = iter(self.spare)
        late: list[tuple[int, Tensor]] = []
        trade = None
        for t in row.targets:
            if t.is_prediction and t.place != 0 and trade is None and t.place not in row.staged:
                trade = t.place
                continue
            out = S[t.place]
            if t.place in row.staged:
                out = next(spare)
                late.append((t.place, out))
            self._combine(t, out, p, scale, m, noise)
        for place, value in late:
            S[place].copy_(value)
        if trade is not None:
            S[trade], self.p = p, S[trade]

    def _combine(self, t: Target, out: Tensor, p: Tensor, scale: float, m: Tensor, noise: Tensor | None) -> None:
        S = self.slots
        terms = [(S[source], c) for source, c in t.terms]
        terms.sort(key=lambda term: term[0] is not out)
        terms += [(v, c) for v, c in ((p, t.b * scale), (m, t.d), (noise, t.s)) if c != 0]  # type: ignore[misc]
        if not terms:
            out.zero_()
            return
        first, c = terms[0]
        if first is not out:
            torch.mul(first, c, out=out)
        elif c != 1.0:
            out.mul_(c)
        for value, c in terms[1:]:
            out.add_(value, alpha=c)


class Row(ctypes.Structure):
    """A row as fastdiff_kernels/step_cpu.cpp reads it."""

    _fields_ = [
        *((name, c_float) for name in ("c_skip", "c_ratio", "lo", "hi", "c_in_next")),
        *((name, ctypes.c_int32) for name in ("skips", "uses_p", "fused", "targets", "noisy", "number")),
        *((name, ctypes.c_int32 * SLOTS) for name in ("place", "terms", "held")),
        ("source", ctypes.c_int32 * TERMS * SLOTS),
        ("c", c_float * TERMS * SLOTS),
    ]


class Call(ctypes.Structure):
    """The operands of a row there."""

    _fields_ = [
        ("slots", c_void_p * SLOTS),
        *((name, c_void_p) for name in ("m", "uncond", "w", "noise", "x0")),
        ("copies", c_void_p * COPIES),
        *((name, ctypes.c_int32) for name in ("m_type", "uncond_type", "copy_type", "w_each")),
        *((name, c_int64) for name in ("batch", "n")),
        *((name, c_void_p) for name in ("seeds", "index")),
        ("samples", c_int64),
    ]


def _native_row(row: HostRow, number: int) -> Row:
    targets = sorted(row.targets, key=lambda t: t.is_prediction) if row.uses_p else row.targets
    terms = [_native_terms(t, row.noisy) for t in targets]
    # of use to one short sum alone, and otherwise kept as it is: then p never leaves the registers
    short = row.uses_p and len(targets) <= 2 and 0 < len(terms[0]) <= IN_ONE + (targets[0].b != 0)
    fused = short and all(t.is_prediction for t in targets[1:])
    prediction = (row.c_skip, row.c_ratio) if row.c_skip != 0 else (1.0, row.c_out)
    numbers = (row.c_skip != 0, row.uses_p, fused, len(targets), row.noisy, number)
    found = Row(*prediction, row.lo, row.hi, row.c_in_next, *numbers)
    for i, (t, kept) in enumerate(zip(targets, terms, strict=True)):
        found.place[i], found.held[i], found.terms[i] = t.place, t.place in row.staged, len(kept)
        for at, (source, c) in enumerate(kept):
            found.source[i][at], found.c[i][at] = source, c
    return found


def _native_terms(t: Target, noisy: bool) -> list[tuple[int, float]]:
    """(source, coefficient), the target's own slot first and p last, none of them 0."""
    terms = [*sorted(t.terms, key=lambda term: term[0] != t.place), (M, t.d), (N, t.s if noisy else 0.0), (P, t.b)]
    return [(source, c) for source, c in terms if c != 0]


def _loop(slots: int) -> Callable[..., None] | None:
    # two references and an int need no conversion, which would take as long as a small row
    return function("step", "affine_row") if slots <= SLOTS else None


class CompiledStep:
    """Rows of a plan by one C++ loop that runs any row, shape and dtype: built once a machine, nothing a plan."""

    def __init__(
        self, plan: Plan, slots: list[Tensor], *, copies: list[Tensor], keys: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """copies: buffers that receive c_in_next * S'[0] in their own dtype (the model's next input).

        keys: seeds and sample indices, int64 [B], of which rows that are given no noise draw it.
        """
        self.slots = slots  # the list is shared with EagerStep, which may trade
        self.loop = _loop(len(slots))
        self.rows = [_native_row(row, k) for k, row in enumerate(host_rows(plan))] if self.loop else []
        self.noisy = [bool(row.noisy) for row in self.rows]
        self.keys, x = keys, slots[0]
        self.threads, self.drawing = threads(x.numel()), threads(x.numel(), heavy=True)
        self.w: Tensor | None = None
        self.x0: Tensor | None = None
        self.m_dtype: torch.dtype | None = None
        self.operands = Call(batch=1, n=x.numel(), samples=max(1, x.shape[0]))
        if self.loop:
            self.bind()
        if keys is not None:
            self.operands.seeds, self.operands.index = (v.data_ptr() for v in keys)
        for i, copy in enumerate(copies):
            self.operands.copies[i], self.operands.copy_type = copy.data_ptr(), TYPES[copy.dtype]
        self.references = [ctypes.byref(row) for row in self.rows], ctypes.byref(self.operands)

    @staticmethod
    def usable(slots: int) -> bool:
        """Is there a loop for that many slots?"""
        return _loop(slots) is not None

    def __call__(
        self, k: int, m: Tensor, uncond: Tensor | None, w: Tensor | None, noise: Tensor | None, x0: Tensor | None
    ) -> bool:
        """Runs row k on contiguous operands; False if there is no C++ compiler. w: fp32, one number or one a sample."""
        if self.loop is None:
            return False
        operands = self.operands
        operands.m = m.data_ptr()
        if m.dtype is not self.m_dtype:
            self.m_dtype, operands.m_type = m.dtype, TYPES[m.dtype]
        if w is not self.w:
            self._weigh(w)
        if uncond is None:
            operands.uncond = None
        else:
            operands.uncond, operands.uncond_type = uncond.data_ptr(), TYPES[uncond.dtype]
        operands.noise = None if noise is None else noise.data_ptr()
        if x0 is not self.x0:
            self.x0, operands.x0 = x0, None if x0 is None else x0.data_ptr()
        rows, reference = self.references
        drawing = noise is None and self.noisy[k]
        assert not drawing or self.keys is not None, f"row {k} has noise and got none"
        count = self.drawing if drawing else self.threads
        if _profiler_enabled():
            call(self.loop, rows[k], reference, count)
        else:
            self.loop(rows[k], reference, count)
        return True

    def bind(self) -> None:
        """Takes over where the slots are."""
        for i, slot in enumerate(self.slots):
            self.operands.slots[i] = slot.data_ptr()

    def _weigh(self, w: Tensor | None) -> None:
        operands, x = self.operands, self.slots[0]
        self.w, operands.w = w, None if w is None else w.data_ptr()
        operands.w_each = w is not None and w.numel() > 1
        operands.batch = x.shape[0] if operands.w_each else 1
        operands.n = x.numel() // max(1, operands.batch)


def posterior_into(
    x: Tensor, m: Tensor, coef: Tensor, t: Tensor | None, bounds: tuple[float, float], mean: Tensor, x0: Tensor,
    variance: Tensor,
) -> bool:  # fmt: skip
    """x0 = clamp(c_skip (x + c_ratio m)), mean = k_x0 x0 + k_xt x by the C++ loop; False where it cannot run.

    Args: x, m: [B, *sample] of any float dtypes but float64. coef: fp32 [T, 8], t int64 [B] or [1]; or [B or 1, 8] and
        None: c_skip, c_ratio, k_x0, k_xt, variance, log-variance, ... mean, x0: outputs like x; variance: [2, B] fp32;
        contiguous.
    """
    if not plain((x, m)):
        return False
    x, m = x.contiguous(), m.contiguous()
    rows, _held = coef_rows(coef, t)
    return run("step", "posterior", rows, x, m, mean, x0, variance, *types(x, m), *bounds, *layout(x))
