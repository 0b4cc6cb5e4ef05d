"""Where a sampler's normals come from: Philox (default), a torch generator, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.inductor import compile_static
from fastdiff.plan import Plan

__all__ = ["CallableNoise", "Noise", "NoiseFunction", "PhiloxNoise", "TorchNoise"]

NoiseFunction = Callable[[int, Tensor], Tensor]
START_STREAM, ROW_STREAM = 0, 1
BLOCK_ELEMENTS = 1 << 20


class Noise:
    """A source of standard normals shaped like the state.

    start(row) gives the start's noise (row 0: scaled by init_scale, row 1: by init_noise); row(k) gives row k's n, or
    None where the step kernel draws it itself.
    """

    def start(self, row: int) -> Tensor:
        raise NotImplementedError

    def row(self, k: int) -> Tensor | None:
        raise NotImplementedError


class PhiloxNoise(Noise):
    """n = normal(seed, sample, stream, row, element): on CUDA in the step kernel, on the CPU some rows at a time."""

    def __init__(self, plan: Plan, like: Tensor, *, compiled: bool, in_kernel: bool) -> None:
        self.shape, self.in_kernel = like.shape, in_kernel
        self.seeds = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
        self.index = torch.zeros_like(self.seeds)
        self.noisy = [] if in_kernel else [k for k in range(plan.nfe) if plan.s[k].any()]
        self.position = {k: i for i, k in enumerate(self.noisy)}
        self.count = min(len(self.noisy), max(1, BLOCK_ELEMENTS // max(1, like.numel())))
        self.buffer = torch.empty(self.count, *like.shape) if self.noisy else None
        self.rows = torch.zeros(max(1, self.count), dtype=torch.int64)
        self.block = -1
        self.fill = self._compiled() if compiled and self.buffer is not None and like.numel() else None

    def _compiled(self) -> Callable[..., object] | None:
        batch, n = self.shape[0], self.shape[1:].numel()

        def fill(seeds: Tensor, index: Tensor, rows: Tensor, out: Tensor) -> None:
            out.view(self.count, batch, n).copy_(rng.normals(seeds, index, rows, ROW_STREAM, n))

        return compile_static(fill, [self.seeds, self.index, self.rows, self.buffer])  # type: ignore[list-item]

    def reset(self, seeds: Tensor, index: Tensor) -> None:
        """New seeds [B] and sample indices [B], copied into the buffers a captured graph reads."""
        self.seeds.copy_(seeds)
        self.index.copy_(index)
        self.block = -1

    def start(self, row: int) -> Tensor:
        return rng.normal(self.seeds, self.shape[1:], row=row, stream=START_STREAM, index=self.index)

    def row(self, k: int) -> Tensor | None:
        if self.buffer is None:
            return None
        position = self.position.get(k)
        if position is None:
            return None
        block, offset = divmod(position, self.count)
        if block != self.block:
            self._draw(block)
        return self.buffer[offset]

    def _draw(self, block: int) -> None:
        rows = self.noisy[block * self.count : (block + 1) * self.count]
        self.rows[: len(rows)] = torch.tensor(rows)
        if self.fill is not None:
            self.fill(self.seeds, self.index, self.rows, self.buffer)
        else:
            rng.normal(self.seeds, self.shape[1:], row=self.rows, stream=ROW_STREAM, index=self.index, out=self.buffer)
        self.block = block


class TorchNoise(Noise):
    """torch's own stream: a generator (or one per sample), drawn plan.draws[k] times in row k, the last draw is n."""

    def __init__(self, plan: Plan, like: Tensor, generators: Sequence[torch.Generator]) -> None:
        self.draws, self.generators = plan.draws.tolist(), generators
        self.buffer = torch.empty_like(like)
        device = generators[0].device
        self.host = self.buffer if device.type == like.device.type else torch.empty_like(like, device=device)

    def _draw(self) -> Tensor:
        if len(self.generators) == 1:
            self.host.normal_(generator=self.generators[0])
        else:
            for sample, generator in zip(self.host, self.generators, strict=True):
                sample.normal_(generator=generator)
        return self.host if self.host is self.buffer else self.buffer.copy_(self.host)

    def start(self, row: int) -> Tensor:
        return self._draw().clone()

    def row(self, k: int) -> Tensor | None:
        for _ in range(self.draws[k]):
            self._draw()
        return self.buffer if self.draws[k] else None


class CallableNoise(Noise):
    """A function (row, like) -> Tensor, called plan.draws[row] times a row; the start stays Philox's."""

    def __init__(self, plan: Plan, like: Tensor, function: NoiseFunction, start: PhiloxNoise) -> None:
        self.draws, self.function, self.like, self.philox = plan.draws.tolist(), function, like, start

    def start(self, row: int) -> Tensor:
        return self.philox.start(row)

    def row(self, k: int) -> Tensor | None:
        n = None
        for _ in range(self.draws[k]):
            n = self.function(k, self.like)
            if not isinstance(n, Tensor):
                raise TypeError(f"noise({k}, like) must return a Tensor, got {type(n).__name__}")
            if n.shape != self.like.shape:
                raise ValueError(f"noise({k}, like) must return shape {tuple(self.like.shape)}, got {tuple(n.shape)}")
            n = n.to(self.like.device, torch.float32).contiguous()
        return n
