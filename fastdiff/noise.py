"""Where a sampler's normals come from: Philox (default), a torch generator, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.plan import Plan

__all__ = ["CallableNoise", "Noise", "NoiseFunction", "PhiloxNoise", "ReadoutNoise", "TorchNoise"]

NoiseFunction = Callable[[int, Tensor], Tensor]
BLOCK_ELEMENTS = 1 << 20


class Noise:
    """A source of standard normals shaped like the state.

    start(row) gives the start's noise (row 0: scaled by init_scale, row 1: by init_noise); row(k) gives row k's n, or
    None where the step kernel draws it itself.
    """

    def start(self, row: int) -> Tensor:
        raise NotImplementedError

    def begin(self, x: Tensor, scale: float) -> None:
        """x = scale start(0)."""
        torch.mul(self.start(0), scale, out=x)

    def row(self, k: int) -> Tensor | None:
        raise NotImplementedError


class _Fill(NamedTuple):
    """Rows of one stream that are drawn in one call, and where to: out [k, B, n]."""

    out: Tensor
    rows: Tensor
    stream: int


class PhiloxNoise(Noise):
    """n = normal(seed, sample, stream, row, element): in the step's kernel or loop, else some rows at a time.

    Compiled, the start rides along as the first rows of the first block.
    """

    def __init__(self, plan: Plan, like: Tensor, *, compiled: bool, in_kernel: bool) -> None:
        self.shape = like.shape
        self.seeds = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
        self.index = torch.zeros_like(self.seeds)
        self.seeded: tuple[int, int] | None = None  # (seed, first), where one seed made the keys
        noisy = [] if in_kernel else [(rng.ROWS, k) for k in range(plan.nfe) if plan.s[k].any()]
        start = [(rng.START, 0), (rng.START, 1)][: 2 if plan.init_noise else 1] if compiled else []
        self.pairs = [*start, *noisy]  # (stream, row)
        self.starts, self.rows = (
            {k: i for i, (s, k) in enumerate(self.pairs) if s == stream} for stream in (rng.START, rng.ROWS)
        )
        self.count = min(len(self.pairs), max(1, BLOCK_ELEMENTS // max(1, like.numel())))
        self.buffer = torch.empty(self.count, *like.shape, dtype=torch.float32, device=like.device)
        self.flat = self.buffer.view(self.count, *self._flat)
        self.start_rows = [self._rows([k]) for k in (0, 1)]
        self.blocks: dict[int, list[_Fill]] = {}
        self.block = -1

    @property
    def _flat(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1:].numel()

    def _rows(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.seeds.device)

    def reset(self, seeds: Tensor, index: Tensor) -> None:
        """New seeds [B] and sample indices [B], copied into the buffers a captured graph reads."""
        self.seeds.copy_(seeds)
        self.index.copy_(index)
        self.seeded = None
        self.rewind()

    def seed(self, seed: int, first: int) -> None:
        """`reset` to rng.keys(seed, first=first), which takes no work where they are the keys already."""
        if self.seeded != (seed, first):
            self.seeds.fill_(seed)
            torch.arange(first, first + self.shape[0], out=self.index, device=self.index.device)
            self.seeded = seed, first
        self.rewind()

    def rewind(self) -> None:
        """Draws again from the first row on."""
        self.block = -1

    def start(self, row: int) -> Tensor:
        if row in self.starts:
            return self._at(self.starts[row])
        n = torch.empty(self.shape, dtype=torch.float32, device=self.seeds.device)
        rng.fill(n.view(1, *self._flat), self.seeds, self.index, self.start_rows[row], rng.START)
        return n

    def begin(self, x: Tensor, scale: float) -> None:
        if 0 in self.starts or not x.is_contiguous():
            super().begin(x, scale)
            return
        rng.fill(x.view(1, *self._flat), self.seeds, self.index, self.start_rows[0], rng.START)
        if scale != 1:
            x.mul_(scale)

    def row(self, k: int) -> Tensor | None:
        position = self.rows.get(k)
        return None if position is None else self._at(position)

    def _at(self, position: int) -> Tensor:
        block, offset = divmod(position, self.count)
        if block != self.block:
            for part in self.blocks.get(block) or self._parts(block):
                rng.fill(part.out, self.seeds, self.index, part.rows, part.stream)
            self.block = block
        return self.buffer[offset]

    def _parts(self, block: int) -> list[_Fill]:
        pairs = self.pairs[block * self.count : (block + 1) * self.count]
        parts = self.blocks[block] = []
        for stream in dict.fromkeys(s for s, _ in pairs):
            at = [i for i, (s, _) in enumerate(pairs) if s == stream]
            parts.append(_Fill(self.flat[at[0] : at[-1] + 1], self._rows([pairs[i][1] for i in at]), stream))
        return parts


class TorchNoise(Noise):
    """torch's own stream: a generator (or one per sample), drawn plan.draws[k] times in row k, the last draw is n."""

    def __init__(self, plan: Plan, like: Tensor, generators: Sequence[torch.Generator]) -> None:
        self.draws, self.generators = plan.draws.tolist(), generators
        self.buffer = torch.empty_like(like)
        device = generators[0].device
        self.host = self.buffer if device.type == like.device.type else torch.empty_like(like, device=device)

    def _draw(self, fill: Callable[..., Tensor] = torch.Tensor.normal_) -> Tensor:
        if len(self.generators) == 1:
            fill(self.host, generator=self.generators[0])
        else:
            for sample, generator in zip(self.host, self.generators, strict=True):
                fill(sample, generator=generator)
        return self.host if self.host is self.buffer else self.buffer.copy_(self.host)

    def start(self, row: int) -> Tensor:
        return self._draw().clone()

    def row(self, k: int) -> Tensor | None:
        for _ in range(self.draws[k]):
            self._draw()
        return self.buffer if self.draws[k] else None


class ReadoutNoise(TorchNoise):
    """torch's own stream for rows that sample a readout: their numbers first, into `drawn`, then n.

    Args: drawn: [B, *], receives Gumbel numbers (of two classes in one channel: logistic ones) or normals.
        kind: "gumbel" | "logistic" | "normal". sampled: which rows draw them.
    """

    def __init__(
        self, plan: Plan, like: Tensor, generators: Sequence[torch.Generator], drawn: Tensor, kind: str,
        sampled: Sequence[bool],
    ) -> None:  # fmt: skip
        super().__init__(plan, like, generators)
        self.drawn, self.kind, self.sampled = drawn, kind, sampled

    def row(self, k: int) -> Tensor | None:
        if self.sampled[k]:
            if self.kind == "normal":
                self.drawn.copy_(self._draw())
            else:
                torch.neg(self._log_exponential(), out=self.drawn)
            if self.kind == "logistic":
                self.drawn.add_(self._log_exponential())
        return super().row(k)

    def _log_exponential(self) -> Tensor:
        return self._draw(torch.Tensor.exponential_).log_()


class CallableNoise(Noise):
    """A function (row, like) -> Tensor, called plan.draws[row] times a row; the start stays Philox's."""

    def __init__(self, plan: Plan, like: Tensor, function: NoiseFunction, start: PhiloxNoise) -> None:
        self.draws, self.function, self.like, self.philox = plan.draws.tolist(), function, like, start

    def start(self, row: int) -> Tensor:
        return self.philox.start(row)

    def begin(self, x: Tensor, scale: float) -> None:
        self.philox.begin(x, scale)

    def row(self, k: int) -> Tensor | None:
        n = None
        for _ in range(self.draws[k]):
            version = self.like._version
            n = self.function(k, self.like)
            if self.like._version != version:
                raise ValueError(f"noise({k}, like) changed `like` in place, which is the state: return a new tensor")
            if not isinstance(n, Tensor):
                raise TypeError(f"noise({k}, like) must return a Tensor, got {type(n).__name__}")
            if n.shape != self.like.shape:
                raise ValueError(f"noise({k}, like) must return shape {tuple(self.like.shape)}, got {tuple(n.shape)}")
            n = n.to(self.like.device, torch.float32).contiguous()
            n = n.clone() if n.data_ptr() == self.like.data_ptr() else n  # the step would overwrite what it reads
        return n
