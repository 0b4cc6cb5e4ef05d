"""A sampling run on tokens: the same loop around a step that unmasks them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.unmask_step import uniforms
from fastdiff.request import Request
from fastdiff.run import Run

__all__ = ["MaskedRun"]


class MaskedRun(Run):
    """Tokens int64 [B, *D], the block of each (int32, -1 where it is given), and the copies of them the model sees.

    x is the tokens; x0 is them too.
    """

    draws_on_host = False
    output_says = "logits [B, *D, K]"

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, self.plan.mask, dtype=torch.int64, device=self.device)

    def _watched(self, asked: bool) -> Tensor | None:
        return self.x if asked else None

    def _noise(self, request: Request, compiled: bool) -> Noise:
        self.noise_in_kernel = True
        self.keys = PhiloxNoise(self.plan, self.x, compiled=False, in_kernel=True)
        return self.keys

    def outside(self) -> bool:
        return False

    def _prepare(self, compiled: bool) -> None:
        self.table = self.plan.pack(self.device)
        self.blocks = int(self.plan.d.max()) + 1
        self.group = torch.zeros(self.shape, dtype=torch.int32, device=self.device)
        self.block = self.plan.d[:, 0].astype(int).tolist()
        self.may_idle = (self.plan.A[:, 0, 0] == 1).tolist()
        self.enough = bool(np.isfinite(self.plan.hi).any())
        self.nucleus = bool((self.plan.c_out < 1).any())
        self.seen = (self.x.numpy(), self.group.numpy()) if self.on_host and self.x.is_cpu else (self.x, self.group)

    def output_shape(self) -> tuple[int, ...]:
        return (*self.model_in.shape, self.plan.classes)

    def draw(self, x_T: Tensor | None, x_init: Tensor | None) -> None:
        mask = self.plan.mask
        if x_T is not None:
            self.x.copy_(x_T)
        elif x_init is not None:
            n = self.x[:1].numel()
            u = uniforms(self.keys.seeds, self.keys.index, torch.zeros_like(self.keys.seeds), rng.START, n)
            self.x.copy_(torch.where(u.view(self.shape) <= float(self.plan.sigma[0]), mask, x_init))
        else:
            self.x.fill_(mask)
        masked = (self.x == mask).view(len(self.x), -1)
        place, count = masked.cumsum(1) - 1, masked.sum(1, keepdim=True).clamp_min(1)
        self.group.copy_(torch.where(masked, place * self.blocks // count, -1).view(self.shape))
        # a look at the tokens takes a while, and on a device waits for them: where rows will have nothing to do
        self.looks = self.enough or (self.on_host and int(count.max()) < self.plan.nfe)
        if self.bad is not None:
            self.bad.fill_(self.plan.nfe)
        self.refresh(0)

    def edited(self, k: int) -> None:
        """After an edit of the tokens behind row k - 1: what was masked again belongs to the block at hand."""
        if self.x.is_cpu:
            wrong = self.x[(self.x != self.plan.mask) & ((self.x < 0) | (self.x >= self.plan.classes))]
            if wrong.numel():
                raise ValueError(
                    f"a callback left {int(wrong[0])} among the tokens, which are 0..{self.plan.classes - 1} or the "
                    f"mask, {self.plan.mask}"
                )
        block = self.block[min(k, self.plan.nfe - 1)]
        self.group.masked_fill_((self.x == self.plan.mask) & (self.group < block), block)
        self.refresh(k)

    def idle(self, k: int) -> bool:
        if not self.looks or not self.may_idle[k] or self.numbered:
            return False
        tokens, group = self.seen
        masked = tokens == self.plan.mask
        return not (masked if self.blocks == 1 else masked & (group == self.block[k])).any()

    def failed(self) -> int:
        left = bool((self.x == self.plan.mask).any())
        return min(super().failed(), self.plan.nfe - 1) if left else super().failed()

    def result(self, dtype: torch.dtype) -> Tensor:
        return self.x.clone()

    def refresh(self, k: int) -> None:
        for half in self.halves:
            half.copy_(self.x)

    def _finite(self, m: Tensor) -> Tensor:
        return ~(m.isnan() | m.isposinf()).any()  # -inf forbids a class

    def step(self, k: int, row: Tensor, m: Tensor, u: Tensor | None, noise: Tensor | None) -> None:
        plan, w = self.plan, None if u is None else self.weight

        def run() -> None:
            ops.unmask_step(
                self.x, m, self.table, row, mask=int(plan.mask), order=plan.readout, group=self.group, uncond=u,
                guidance=w, seeds=self.keys.seeds, index=self.keys.index,
                model_in=None if self.aliased else self.model_in, nucleus=self.nucleus,
            )  # fmt: skip

        if self.on_host:
            run()
        else:
            self.relaunch("fastdiff::unmask_step", run, (m, u, row, w))
        if self.bad is not None:
            self.watch(row, m)
            if u is not None:
                self.bad.copy_(torch.minimum(self.bad, torch.where(self._finite(u), plan.nfe, row[0])))
