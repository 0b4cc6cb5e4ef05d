"""The step on a CPU: in place and allocation-free in eager torch, or one fused loop per row shape by Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.inductor import compile_static
from fastdiff.plan import ROW_HEADER, Plan

__all__ = ["CompiledStep", "EagerStep", "HostRow", "host_rows"]


class Target(NamedTuple):
    """One slot a row writes: S[place] = sum coefficient * S[source] + b p + d m + s n."""

    place: int
    logical: int
    terms: tuple[tuple[int, int, float], ...]  # (physical source, logical source, coefficient)
    b: float
    d: float
    s: float

    @property
    def is_prediction(self) -> bool:
        return not self.terms and (self.b, self.d, self.s) == (1.0, 0.0, 0.0)


class HostRow(NamedTuple):
    """A packed row (fp32 values) as Python numbers, its targets in an order in which no write spoils a later read."""

    c_skip: float
    c_out: float
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
    return [host_row(row, plan.slots) for row in plan.packed().tolist()]


def host_row(row: list[float], r: int) -> HostRow:
    """One packed row of r slots as host numbers."""
    body = row[ROW_HEADER:]
    A, (b, d, s, read, write) = body[: r * r], (body[r * r + r * i : r * r + r * (i + 1)] for i in range(5))
    targets = []
    for i in range(r):
        if write[i] >= 0:
            terms = tuple((int(read[j]), j, A[i * r + j]) for j in range(r) if A[i * r + j] != 0 and read[j] >= 0)
            targets.append(Target(int(write[i]), i, terms, b[i], d[i], s[i]))
    ordered, staged = _order(targets)
    c_skip, c_out, lo, hi, c_in_next, has_noise = row[:6]
    clamps = lo > -float("inf") or hi < float("inf")
    noisy = has_noise != 0 and any(t.s for t in targets)
    return HostRow(c_skip, c_out, lo, hi, clamps, c_in_next, any(t.b for t in targets), noisy, ordered, staged)


def _order(targets: list[Target]) -> tuple[tuple[Target, ...], frozenset[int]]:
    rest, ordered, staged = list(targets), [], set()
    while rest:
        for t in rest:
            if not any(t.place == source for other in rest if other is not t for source, _, _ in other.terms):
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
    ) -> None:
        """Runs row k. m, uncond: model outputs; w: guidance weight; noise: [B, *] or None; x0: receives p."""
        row, S = self.rows[k], self.slots
        x = S[0]
        if uncond is not None:
            torch.sub(m, uncond, out=self.m) if m.dtype == x.dtype else self.m.copy_(m).sub_(uncond)
            m = self.m.mul_(w).add_(uncond)  # type: ignore[arg-type]
        elif m.dtype != x.dtype:
            m = self.m.copy_(m)
        p, scale = self.p, 1.0
        if row.uses_p or x0 is not None:
            stored = any(t.is_prediction for t in row.targets)
            if row.c_skip != 0 and not row.clamps and not stored:
                torch.add(x, m, alpha=row.c_out / row.c_skip, out=p)
                scale = row.c_skip
            elif row.c_skip != 0:
                torch.mul(x, row.c_skip, out=p)
                p.add_(m, alpha=row.c_out)
            else:
                torch.mul(m, row.c_out, out=p)
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
        terms = [(S[source], c) for source, _, c in t.terms]
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


class _Structure(NamedTuple):
    """What Inductor compiles for: everything about a row but its numbers."""

    clamps: bool
    skip: bool
    uses_p: bool
    guided: bool
    noisy: bool
    x0: bool
    reads: tuple[tuple[int, int], ...]  # (logical, physical)
    targets: tuple[tuple[int, int, tuple[int, ...], bool, bool, bool], ...]  # place, logical, sources, b, d, s


class CompiledStep:
    """Rows of a plan as fused loops: one compiled function per row structure, coefficients read from the packed row."""

    def __init__(self, plan: Plan, slots: list[Tensor], *, copies: list[Tensor]) -> None:
        """copies: buffers that receive c_in_next * S'[0] in their own dtype (the model's next input)."""
        self.plan, self.slots, self.copies = plan, slots, copies  # the list is shared with EagerStep, which may trade
        self.rows = host_rows(plan)
        self.table = list(plan.pack("cpu").unbind(0))
        self.functions: dict[tuple[int, torch.dtype], Callable[..., object]] = {}
        self.shared: dict[tuple[_Structure, torch.dtype], Callable[..., object]] = {}

    def _structure(self, row: HostRow, guided: bool, x0: bool) -> _Structure:
        reads = {j: source for t in row.targets for source, j, _ in t.terms} | {0: 0}
        targets = tuple(
            (t.place, t.logical, tuple(j for _, j, _ in t.terms), t.b != 0, t.d != 0, t.s != 0) for t in row.targets
        )
        needs_p = row.uses_p or x0
        return _Structure(row.clamps, row.c_skip != 0, needs_p, guided, row.noisy, x0, tuple(reads.items()), targets)

    def __call__(
        self, k: int, m: Tensor, uncond: Tensor | None, w: Tensor | None, noise: Tensor | None, x0: Tensor | None
    ) -> bool:
        """Runs row k; False if the compiler is not usable. w: fp32 tensor that broadcasts against m."""
        row = self.rows[k]
        args = [*self.slots, *self.copies, self.table[k], m]
        if uncond is not None:
            args += (uncond, w)  # type: ignore[arg-type]
        if row.noisy:
            args.append(noise)  # type: ignore[arg-type]
        if x0 is not None:
            args.append(x0)
        fn = self.functions.get((k, m.dtype)) or self._compile(k, m.dtype, uncond is not None, x0 is not None, args)
        if fn is None:
            return False
        fn(*args)
        return True

    def _compile(
        self, k: int, dtype: torch.dtype, guided: bool, x0: bool, args: list[Tensor]
    ) -> Callable[..., object] | None:
        """The function of row k, shared by rows of one structure."""
        structure = self._structure(self.rows[k], guided, x0)
        fn = self.shared.get((structure, dtype))
        if fn is None:
            kept = [v.clone() for v in self.slots]
            fn = compile_static(self._function(structure), args, elements=self.slots[0].numel())
            for slot, value in zip(self.slots, kept, strict=True):
                slot.copy_(value)
            if fn is None:
                return None
            self.shared[structure, dtype] = fn
        self.functions[k, dtype] = fn
        return fn

    def _function(self, it: _Structure) -> Callable[..., None]:
        r, places, copies = self.plan.slots, len(self.slots), len(self.copies)
        at_b, at_d, at_s = (ROW_HEADER + r * r + r * i for i in range(3))

        def step(*args: Tensor) -> None:
            slots, out = args[:places], args[places : places + copies]
            c, m, *extra = args[places + copies :]
            rest = iter(extra)
            m = m.float()
            if it.guided:
                u, w = next(rest).float(), next(rest)
                m = u + w * (m - u)
            n = next(rest) if it.noisy else m
            S = {j: slots[source] for j, source in it.reads}
            p = m
            if it.uses_p:
                p = c[1] * m + c[0] * S[0] if it.skip else c[1] * m
                if it.clamps:
                    p = torch.minimum(torch.maximum(p, c[2]), c[3])
            values = []
            for _, i, sources, has_b, has_d, has_s in it.targets:
                terms = [c[ROW_HEADER + i * r + j] * S[j] for j in sources]
                terms += [c[at_b + i] * p] if has_b else []
                terms += [c[at_d + i] * m] if has_d else []
                terms += [c[at_s + i] * n] if has_s else []
                values.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(S[0]))
            for (place, *_), value in zip(it.targets, values, strict=True):
                slots[place].copy_(value)
                if place == 0:
                    for copy in out:
                        copy.copy_(c[4] * value)
            if it.x0:
                next(rest).copy_(p)

        return step
