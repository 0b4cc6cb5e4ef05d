"""Rows on categorical data on a CPU, in place: one C++ loop for every row, or eager chunks that fit a cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import native, rng
from fastdiff.cpu import COPIES, SLOTS, HostRow
from fastdiff.gumbel import SCALE, logistic_of
from fastdiff.native import TYPES, call, coef_rows, function, plain, run, threads, types
from fastdiff.plan import ROW_HEADER
from fastdiff.readout import CATEGORICAL as READOUTS

__all__ = ["Chunk", "CompiledStep", "chunks", "step_in_chunks"]

CHUNK = 1 << 18  # elements an eager pass: its temporaries stay in the caches
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
    out = torch.empty(size[0], quads, 4, dtype=torch.float32, device=seeds.device)
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
    return torch.where(m == u, m, u + w * (m - u))


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
                y = torch.zeros(size, dtype=torch.float32, device=state.device)
            if n is not None and target.s:
                y.add_(n, alpha=target.s)
            if target.b and readout == "mean":
                y.add_(p, alpha=target.b)
            elif target.b and width == 1:
                y.add_((2 * k - 1)[..., None], alpha=target.b)
            elif target.b:
                y.scatter_add_(
                    -1, k[..., None], torch.full((*part.size, 1), target.b, dtype=torch.float32, device=state.device)
                )
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


class Shape(ctypes.Structure):
    """What the loops there know a tensor by."""

    _fields_ = [(name, c_int64) for name in ("batch", "tokens", "width")]


class Call(ctypes.Structure):
    """A row and its operands as fastdiff_kernels/categorical_cpu.cpp reads them."""

    _fields_ = [
        ("shape", Shape),
        *((name, c_void_p) for name in ("state", "m", "uncond", "w", "noise", "gumbel", "table")),
        *((name, c_void_p) for name in ("row", "seeds", "index")),
        ("copies", c_void_p * COPIES),
        ("classes", c_void_p),
        *((name, c_int64) for name in ("slots", "header", "row_width", "row_each", "w_row", "w_each")),
        *((name, c_int32) for name in ("m_type", "uncond_type", "copy_type", "readout", "threads")),
    ]


class CompiledStep:
    """Rows of a plan on categorical data by one C++ loop that runs any row, shape and dtype: no [.., K] temporary.

    Args: state fp32 [P, B, *D, K']; model_in [B or 2B, *D, K'] of any float dtype, or None; classes int64 [B, *D] or
    None: the buffers a step writes, contiguous; table: packed plan; slots: logical.
    """

    def __init__(
        self, state: Tensor, model_in: Tensor | None, classes: Tensor | None, table: Tensor, slots: int
    ) -> None:
        self.held = state, model_in, classes, table
        written = [v for v in self.held if v is not None]
        fits = slots <= SLOTS and all(v.is_contiguous() for v in written) and plain(written)
        self.loop = function("categorical", "categorical_row", c_void_p) if fits else None
        batch, width = state.shape[1], state.shape[-1]
        tokens = state.shape[2:-1].numel()
        self.operands = Call(
            shape=Shape(batch, tokens, width), state=state.data_ptr(), table=table.data_ptr(), slots=slots,
            header=ROW_HEADER, row_width=table.shape[1], threads=threads(batch * tokens * width, heavy=True),
        )  # fmt: skip
        if classes is not None:
            self.operands.classes = classes.data_ptr()
        for i, copy in enumerate(() if model_in is None else model_in.split(batch)):
            self.operands.copies[i], self.operands.copy_type = copy.data_ptr(), TYPES[copy.dtype]
        self.reference = ctypes.byref(self.operands)

    def __call__(
        self, readout: str, row: Tensor, m: Tensor, *, uncond: Tensor | None = None, guidance: Tensor | None = None,
        seeds: Tensor | None = None, index: Tensor | None = None, noise: Tensor | None = None,
        gumbel: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Runs row `row` [1 or B], operands as in categorical_step; False, with nothing written, without a compiler."""
        if self.loop is None:
            return False
        m, row = m.contiguous(), row.long().contiguous()
        uncond, seeds, index = (None if v is None else v.contiguous() for v in (uncond, seeds, index))
        noise, gumbel, w = (None if v is None else v.float().contiguous() for v in (noise, gumbel, guidance))
        operands = self.operands
        operands.m, operands.m_type, operands.readout = m.data_ptr(), TYPES[m.dtype], READOUTS.index(readout)
        operands.row, operands.row_each = row.data_ptr(), row.numel() > 1
        operands.uncond_type = 0 if uncond is None else TYPES[uncond.dtype]
        given = {"uncond": uncond, "w": w, "noise": noise, "gumbel": gumbel, "seeds": seeds, "index": index}
        for name, value in given.items():
            setattr(operands, name, None if value is None else value.data_ptr())
        if w is not None:
            each = w.shape[-1] if w.dim() else 1
            operands.w_row, operands.w_each = each if w.numel() > each else 0, each > 1
        call(self.loop, self.reference)
        return True


def noise_into(
    x: Tensor, noise: Tensor | None, coef: Tensor, seeds: Tensor | None, index: Tensor | None, row: int, out: Tensor,
    logits: Tensor | None,
) -> bool:  # fmt: skip
    """z = coef[:, 0] onehot(x) + coef[:, 1] n, out = 2 softmax(z) - 1 by the C++ loop; False where there is none.

    Args: x int64 [B, *D]; noise [B, *D, K'] of a float dtype, or seeds and index; coef fp32 [B or 1, 4] (K = 2: of
        2 x - 1); out, logits: outputs [B, *D, K'], contiguous, of one float dtype but float64.
    """
    noise, seeds, index = (None if v is None else v.contiguous() for v in (noise, seeds, index))
    x, noise = x.contiguous(), None if noise is None else noise.float()
    rows, _table = coef_rows(coef, None)
    options = *types(out), threads(out.numel(), heavy=True)
    return run(
        "categorical", "categorical_noise", _shape(out), x, noise, rows, seeds, index, row, out, logits, *options
    )


def loss_into(logits: Tensor, x: Tensor, error: Tensor, grad: Tensor | None) -> bool:
    """The loss [B] of logits [B, *D, K'] and classes x [B, *D] by the C++ loop; False where there is none.

    grad, contiguous like logits, receives tokens times its gradient.
    """
    if logits.dtype not in TYPES:
        return False
    logits, x = logits.contiguous(), x.contiguous()
    options = *types(logits), threads(logits.numel(), heavy=True)
    return run("categorical", "categorical_loss", _shape(logits), logits, x, error, grad, *options)


def _shape(x: Tensor) -> object:
    """A reference to the shape of x [B, *D, K']."""
    return ctypes.byref(Shape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1]))
