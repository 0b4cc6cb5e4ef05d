"""Rows on categorical data on a CPU: in place over chunks that fit a cache, eagerly or as one Inductor loop a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import native, rng
from fastdiff.cpu import HostRow
from fastdiff.gumbel import SCALE, logistic_of
from fastdiff.inductor import compile_static

__all__ = ["Chunk", "CompiledStep", "chunks", "step_in_chunks"]

CHUNK = 1 << 18  # elements a pass: its temporaries stay in the caches
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
    """Cuts [batch, tokens, width] into chunks of about CHUNK elements, in one size or two.

    A chunk holds whole samples, or tokens of one sample from a whole Philox counter on. `single`: one sample a chunk.
    """
    if tokens * width <= CHUNK:
        many = 1 if single else _even(batch, max(1, CHUNK // max(1, tokens * width)))
        return [Chunk(b, min(batch, b + many), 0, tokens) for b in range(0, batch, many)]
    step = 1 if width % 4 == 0 else 4
    many = step * _even(-(-tokens // step), max(1, CHUNK // (step * width)))
    return [Chunk(b, b + 1, d, min(tokens, d + many)) for b in range(batch) for d in range(0, tokens, many)]


def _even(n: int, most: int) -> int:
    """The part of n, `most` at most, that leaves no rest, unless only one below half of that does."""
    return next((k for k in range(most, most // 2, -1) if n % k == 0), min(n, most)) if n > most else max(1, n)


def drawn(draws: Draws, row: Tensor, stream: int, first: int, size: Sequence[int]) -> Tensor:
    """Normals (stream 1) or Gumbel numbers (stream 2; logistic for one channel) of some tokens, shaped like `size`.

    `first` is the first counter. By the native loop, or in buffers that are kept.
    """
    kind = "normal" if stream == rng.ROWS else _kind(size[2])
    made = native.draw(*draws, row, stream, size[1] * size[2], kind=kind, first=first)
    if made is not None:
        return made.view(*size)
    seeds, index = (v.view(-1, 1) for v in draws)
    n = size[1] * size[2]
    quads = (n + 3) // 4
    out = torch.empty(size[0], quads, 4)
    key = (first, quads, row.view(1, 1), stream, index, seeds & rng.MASK, seeds >> 32)
    if stream == rng.ROWS:
        rng.fill_chunk(out.flatten(1), *key)
    else:
        for lane, i in enumerate(word.bitwise_and_(rng.MASK) for word in rng.words_chunk(*key)):
            out[..., lane] = logistic_of(i) if size[2] == 1 else i
        if size[2] > 1:
            out.mul_(SCALE).add_(2.0**-33).neg_().log1p_().neg_().log_().neg_()
    return out.flatten(1)[:, :n].view(*size)


def _kind(width: int) -> str:
    """What a class is drawn by."""
    return "logistic" if width == 1 else "gumbel"


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
            v = logits + (cut(gumbel) if gumbel is not None else drawn(mine, at, rng.CATEGORICAL, first, size))  # type: ignore[arg-type]
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
            n = cut(noise) if noise is not None else drawn(mine, at, rng.ROWS, first, size)  # type: ignore[arg-type]
        values = []
        for target in row.targets:
            if target.terms:
                source, c = target.terms[0]
                y = cut(state[source]) * c
                for source, c in target.terms[1:]:
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


class CompiledStep:
    """Rows of a plan on categorical data as Inductor's loops, a chunk at a time: no [.., K] temporary.

    Args: state [P, B, D, K'] fp32; model_in [B or 2B, D, K'] of any float dtype; classes int64 [B, D] or None: the
    buffers a step writes; table: packed plan; slots: logical. Coefficients are read from the table, so one function
    serves all rows of a readout.
    """

    def __init__(self, state: Tensor, model_in: Tensor, classes: Tensor | None, table: Tensor, slots: int) -> None:
        batch, tokens, width = state.shape[1:]
        self.state, self.table, self.slots, self.classes = state, table, slots, classes
        self.copies = model_in.split(batch)
        self.parts = chunks(batch, tokens, width)
        self.drawn = state.new_empty(
            2, max((math.prod(p.size) for p in self.parts), default=0) * width
        )  # normals, Gumbel numbers
        self.functions: dict[tuple[object, ...], Callable[..., object] | None] = {}

    def __call__(self, readout: str, row: Tensor, m: Tensor, **given: Tensor | None) -> bool:
        """Runs the row of number `row` [1] on logits m [B, D, K']; False, with nothing written, if nothing compiles.

        given: uncond like m, guidance as in categorical_step, seeds and index int64 [B], noise and gumbel like m.
        """
        present = {name: value for name, value in given.items() if value is not None}
        if not native.available():
            return False
        for part in self.parts:
            args = [part.of(self.state), *map(part.of, self.copies), part.of(m)]
            if self.classes is not None:
                args.append(self.classes[part.b0 : part.b1, part.d0 : part.d1])
            options = {name: self._cut(part, name, value) for name, value in present.items()}
            self._draw(readout, row, part, options)
            args += [self.table, row, *options.values()]
            key = (readout, part.size, m.dtype, m.stride(), tuple(options))
            if key not in self.functions:
                fn = self._function(readout, tuple(options))
                kept = [v.clone() for v in args]
                self.functions[key] = compile_static(fn, args, elements=part.of(m).numel())
                for v, before in zip(args, kept, strict=True):
                    v.copy_(before)
            compiled = self.functions[key]
            if compiled is None:
                return False
            compiled(*args)
        return True

    def _draw(self, readout: str, row: Tensor, part: Chunk, options: dict[str, Tensor]) -> None:
        """Puts the noise that seeds stand for in their place."""
        if "seeds" not in options:
            return
        seeds = options.pop("seeds")
        index = options.pop("index", None)
        index = torch.zeros_like(seeds) if index is None else index
        width = self.state.shape[-1]
        size = (*part.size, width)
        for name, out in zip(("noise", "gumbel"), self.drawn, strict=True):
            if name in options or (name == "gumbel" and readout != "sample"):
                continue
            kind, stream = ("normal", rng.ROWS) if name == "noise" else (_kind(width), rng.CATEGORICAL)
            options[name] = out[: math.prod(size)].view(size)
            which = torch.full((1,), stream, dtype=torch.int64)
            native.fill(options[name][None], seeds, index, which, row.long(), kind=kind, first=part.d0 * width // 4)

    def _cut(self, part: Chunk, name: str, value: Tensor) -> Tensor:
        if name in ("seeds", "index"):
            return value[part.b0 : part.b1]
        if name == "guidance":
            return value[..., part.b0 : part.b1] if value.dim() and value.shape[-1] > 1 else value
        return part.of(value)

    def _function(self, readout: str, names: tuple[str, ...]) -> Callable[..., None]:
        from fastdiff.ops.categorical_step import categorical_step_ref

        copies, slots, classes = len(self.copies), self.slots, self.classes is not None

        def step(state: Tensor, *args: Tensor) -> None:
            out, (m, *more) = args[:copies], args[copies:]
            hits = more.pop(0) if classes else None
            table, row, *rest = more
            options = dict(zip(names, rest, strict=True))
            new, x, k = categorical_step_ref(state, m, table, row, slots=slots, readout=readout, **options)
            state.copy_(new)
            for copy in out:
                copy.copy_(x)
            if hits is not None:
                hits.copy_(k)

        return step
