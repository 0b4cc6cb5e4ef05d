"""Rows on categorical data on a CPU: in place over chunks that fit a cache, eagerly or as one Inductor loop a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.cpu import HostRow, host_rows
from fastdiff.gumbel import gumbel_of, logistic_of
from fastdiff.inductor import compile_static
from fastdiff.plan import ROW_HEADER, Plan

__all__ = ["CategoricalStep", "Chunk", "chunks", "step_in_chunks"]

CHUNK = 1 << 17  # elements a pass: its temporaries stay in the caches
Draws = tuple[Tensor, Tensor]  # seeds and sample indices, int64 [b]


class Chunk(NamedTuple):
    """Samples b0 .. b1 - 1, of each the tokens d0 .. d1 - 1."""

    b0: int
    b1: int
    d0: int
    d1: int

    def of(self, x: Tensor) -> Tensor:
        """That part of x [..., B, D, K']."""
        return x[..., self.b0 : self.b1, self.d0 : self.d1, :]

    @property
    def size(self) -> tuple[int, int]:
        return self.b1 - self.b0, self.d1 - self.d0


def chunks(batch: int, tokens: int, width: int, *, single: bool = False) -> list[Chunk]:
    """Cuts [batch, tokens, width] into chunks of about CHUNK elements, in at most three sizes.

    A chunk holds whole samples, or tokens of one sample from a whole Philox counter on. `single`: one sample a chunk.
    """
    if tokens * width <= CHUNK:
        many = 1 if single else max(1, CHUNK // max(1, tokens * width))
        return [Chunk(b, min(batch, b + many), 0, tokens) for b in range(0, batch, many)]
    step = 1 if width % 4 == 0 else 4
    pieces = max(1, -(-tokens * width // CHUNK))
    many = max(step, -(-tokens // pieces // step) * step)
    return [Chunk(b, b + 1, d, min(tokens, d + many)) for b in range(batch) for d in range(0, tokens, many)]


def words(draws: Draws, row: Tensor, stream: int, first: int | Tensor, n: int) -> tuple[Tensor, ...]:
    """Philox words of the elements 4 first .. 4 first + n - 1 of some samples: four int64 [b, ceil(n / 4)]."""
    seeds, index = (v.view(-1, 1) for v in draws)
    counter = torch.arange((n + 3) // 4) + first
    which = torch.full((), stream, dtype=torch.int64)
    return rng.philox(counter, row, which, index, seeds & rng.MASK, seeds >> 32)


def normals(draws: Draws, row: Tensor, first: int | Tensor, size: Sequence[int]) -> Tensor:
    """n of some tokens, shaped like `size` [b, d, K']; `first` is the first counter."""
    n = size[1] * size[2]
    i = words(draws, row, rng.ROWS, first, n)
    lanes = torch.stack((*rng.box_muller(i[0], i[1]), *rng.box_muller(i[2], i[3])), -1)
    return lanes.flatten(-2)[..., :n].view(*size)


def gumbels(draws: Draws, row: Tensor, first: int | Tensor, size: Sequence[int]) -> Tensor:
    """Gumbel numbers of some tokens (logistic ones for one channel), shaped like `size` [b, d, K']."""
    n = size[1] * size[2]
    of = logistic_of if size[2] == 1 else gumbel_of
    lanes = torch.stack([of(i) for i in words(draws, row, rng.CATEGORICAL, first, n)], -1)
    return lanes.flatten(-2)[..., :n].view(*size)


def weighted(m: Tensor, uncond: Tensor | None, w: Tensor | None) -> Tensor:
    """Guided logits in fp32."""
    m = m.float()
    if uncond is None or w is None:
        return m
    u = uncond.float()
    return u + w * (m - u)


def belief_(z: Tensor) -> Tensor:
    """2 softmax(z) - 1, or tanh(z / 2), into a temporary."""
    if z.shape[-1] == 1:
        return torch.tanh(0.5 * z)
    return torch.softmax(z, -1).mul_(2).sub_(1)


def step_in_chunks(
    row: HostRow,
    at: Tensor,
    state: Tensor,
    m: Tensor,
    readout: str,
    *,
    uncond: Tensor | None = None,
    w: Tensor | None = None,
    draws: Draws | None = None,
    noise: Tensor | None = None,
    gumbel: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    classes: Tensor | None = None,
    parts: Sequence[Chunk] | None = None,
) -> None:
    """One row in place: state [P, B, D, K'], the others [B, D, K'] (classes [B, D]), w fp32 [1 or B, 1, 1].

    Every temporary has the size of a chunk. at: int64 [1], the row's number for the noise.
    """
    batch, tokens, width = state.shape[1:]
    for part in parts if parts is not None else chunks(batch, tokens, width):
        cut, size = part.of, (*part.size, width)
        mine = None if draws is None else (draws[0][part.b0 : part.b1], draws[1][part.b0 : part.b1])
        first = part.d0 * width // 4
        u = None if uncond is None else cut(uncond)
        weight = w if w is None or w.shape[0] == 1 else w[part.b0 : part.b1]
        logits = weighted(cut(m), u, weight)
        v = logits
        if readout == "sample":
            assert gumbel is not None or mine is not None
            v = logits + (cut(gumbel) if gumbel is not None else gumbels(mine, at, first, size))  # type: ignore[arg-type]
        if width == 1:
            top, k = v, (v > 0)[..., 0].long()
        else:
            top, k = v.max(-1, keepdim=True)
            k = k[..., 0]
        lost = top.isnan()
        if bool(lost.any()):
            k = torch.where(lost[..., 0], 0, k)
        if readout == "mean":
            p = torch.tanh(0.5 * logits) if width == 1 else torch.softmax(logits, -1)
        n = None
        if row.noisy and (noise is not None or mine is not None):
            n = cut(noise) if noise is not None else normals(mine, at, first, size)  # type: ignore[arg-type]
        values = []
        for target in row.targets:
            if target.terms:
                source, _, c = target.terms[0]
                y = cut(state[source]) * c
                for source, _, c in target.terms[1:]:
                    y.add_(cut(state[source]), alpha=c)
            else:
                y = torch.zeros(size)
            if n is not None and target.s:
                y.add_(n, alpha=target.s)
            if target.b and readout == "mean":
                y.add_(p, alpha=target.b)
            elif target.b and width == 1:
                y.add_((2 * k - 1)[..., None], alpha=target.b)
            elif target.b:
                y.scatter_add_(-1, k[..., None], torch.full((*part.size, 1), target.b))
            values.append(y)
        if bool(lost.any()):
            for y in values:
                y.masked_fill_(lost, torch.nan)
        for target, y in zip(row.targets, values, strict=True):
            cut(state[target.place]).copy_(y)
            if target.place == 0 and copies:
                x = belief_(y)
                for copy in copies:
                    cut(copy).copy_(x)
        if classes is not None:
            classes[part.b0 : part.b1, part.d0 : part.d1].copy_(k)


class _Structure(NamedTuple):
    """What Inductor compiles for: everything about a row and its chunk but the numbers."""

    size: tuple[int, int]
    dtype: torch.dtype
    guided: bool
    noisy: bool
    classes: bool
    targets: tuple[tuple[int, int, tuple[tuple[int, int], ...], bool, bool], ...]  # place, logical, (from, j), b, s


class CategoricalStep:
    """Rows of a plan on categorical data, on a CPU: compiled a chunk at a time, else eager, in place either way.

    Args: plan; state: [P, B, D, K'] fp32, slot 0 first; copies: [B, D, K'] buffers for the network's next input, in
    their own dtypes; readout: "sample", "argmax" or "mean"; compiled: use Inductor for structures of two rows or more
    (compiled once, kept; where it does not work: eager).
    """

    def __init__(
        self, plan: Plan, state: Tensor, copies: Sequence[Tensor], *, readout: str = "sample", compiled: bool = True
    ) -> None:
        self.state, self.copies, self.readout, self.compiled = state, list(copies), readout, compiled
        self.slots, self.rows = plan.slots, host_rows(plan)
        self.table = list(plan.pack("cpu").unbind(0))
        self.numbers = [torch.tensor([k]) for k in range(plan.nfe)]
        batch, self.tokens, self.width = state.shape[1:]
        self.parts = chunks(batch, self.tokens, self.width)
        self.firsts = [torch.tensor(p.d0 * self.width // 4) for p in self.parts]
        self.functions: dict[_Structure, Callable[..., object] | None] = {}

    def __call__(
        self,
        k: int,
        m: Tensor,
        *,
        uncond: Tensor | None = None,
        w: Tensor | None = None,
        draws: Draws | None = None,
        noise: Tensor | None = None,
        gumbel: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        """Runs row k on logits m [B, D, K'].

        Args: uncond like m, with w fp32 [1 or B, 1, 1]; draws: (seeds, index) int64 [B]; noise, gumbel: those numbers
        themselves, [B, D, K'] (then eager); classes: int64 [B, D], receives k.
        """
        row, alike = self.rows[k], self._structure(k, m, uncond, classes, (0, 0))
        common = sum(self._structure(j, m, uncond, classes, (0, 0)) == alike for j in range(len(self.rows)))
        eager = not self.compiled or noise is not None or gumbel is not None or common < 2
        if not eager and draws is not None:
            for part, first in zip(self.parts, self.firsts, strict=True):
                if not self._run(k, part, first, m, uncond, w, draws, classes):
                    break
            else:
                return
            self.compiled = False  # the first chunk says it: nothing has been written
        step_in_chunks(
            row, self.numbers[k], self.state, m, self.readout, uncond=uncond, w=w, draws=draws, noise=noise,
            gumbel=gumbel, copies=self.copies, classes=classes, parts=self.parts,
        )  # fmt: skip

    def _structure(
        self, k: int, m: Tensor, uncond: Tensor | None, classes: Tensor | None, size: tuple[int, int]
    ) -> _Structure:
        row = self.rows[k]
        targets = tuple(
            (t.place, t.logical, tuple((source, j) for source, j, _ in t.terms), t.b != 0, t.s != 0 and row.noisy)
            for t in row.targets
        )
        return _Structure(size, m.dtype, uncond is not None, row.noisy, classes is not None, targets)

    def _run(
        self, k: int, part: Chunk, first: Tensor, m: Tensor, uncond: Tensor | None, w: Tensor | None, draws: Draws,
        classes: Tensor | None,
    ) -> bool:  # fmt: skip
        cut = part.of
        args = [part.of(self.state), *map(cut, self.copies), self.table[k], self.numbers[k], first]
        args += [v[part.b0 : part.b1] for v in draws] + [cut(m)]
        if uncond is not None and w is not None:
            args += [cut(uncond), w if w.shape[0] == 1 else w[part.b0 : part.b1]]
        if classes is not None:
            args.append(classes[part.b0 : part.b1, part.d0 : part.d1])
        it = self._structure(k, m, uncond, classes, part.size)
        if it not in self.functions:
            kept = [v.clone() for v in args]
            self.functions[it] = compile_static(self._function(it), args, elements=args[0][0].numel())
            for v, before in zip(args, kept, strict=True):
                v.copy_(before)
        fn = self.functions[it]
        if fn is None:
            return False
        fn(*args)
        return True

    def _function(self, it: _Structure) -> Callable[..., None]:
        r, copies, readout, size = self.slots, len(self.copies), self.readout, (*it.size, self.width)
        at_b, at_s = ROW_HEADER + r * r, ROW_HEADER + r * r + 2 * r

        def step(state: Tensor, *args: Tensor) -> None:
            out, (c, at, first, seeds, index, m, *extra) = args[:copies], args[copies:]
            rest = iter(extra)
            m = weighted(m, next(rest), next(rest)) if it.guided else m.float()
            v = m + gumbels((seeds, index), at, first, size) if readout == "sample" else m
            each = torch.arange(size[2])
            if size[2] == 1:
                top, k = v, (v > 0).long()
            else:
                top = v.amax(-1, keepdim=True)
                k = torch.where(v < top, size[2], each).amin(-1, keepdim=True)
            if readout == "mean":
                p = torch.tanh(0.5 * m) if size[2] == 1 else torch.softmax(m, -1)
            elif size[2] == 1:
                p = torch.where(v > 0, 1.0, torch.where(v.isnan(), v, -1.0))
            else:
                p = torch.where(each == k, 1.0, 0.0) + torch.where(top.isnan(), top, 0.0)
            n = normals((seeds, index), at, first, size) if it.noisy else None
            values = []
            for _, i, sources, has_b, has_s in it.targets:
                terms = [c[ROW_HEADER + i * r + j] * state[source] for source, j in sources]
                terms += [c[at_b + i] * p] if has_b else []
                terms += [c[at_s + i] * n] if has_s and n is not None else []
                values.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(m))
            for (place, *_), value in zip(it.targets, values, strict=True):
                state[place].copy_(value)
                if place == 0 and out:
                    x = torch.tanh(0.5 * value) if size[2] == 1 else 2 * torch.softmax(value, -1) - 1
                    for copy in out:
                        copy.copy_(x)
            if it.classes:
                next(rest).copy_(k[..., 0])

        return step
