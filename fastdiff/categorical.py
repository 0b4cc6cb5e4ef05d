"""A sampling run on logits of classes: the same loop around another step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.binned import BinnedRun, seeds_of
from fastdiff.categorical_cpu import CompiledStep
from fastdiff.learned import LearnedVarianceRun
from fastdiff.masked import MaskedRun
from fastdiff.noise import Noise, ReadoutNoise
from fastdiff.plan import Plan
from fastdiff.readout import BINNED, CATEGORICAL, ORDERS
from fastdiff.request import Request
from fastdiff.run import Run

__all__ = ["CategoricalRun", "make_run"]

REFRESHED = 1 << 20  # logits that are turned into a model's input at once: what temporaries hold


def make_run(model: Callable[..., Any], plan: Plan, request: Request, *, compiled: bool) -> Run:
    """The run of a plan: its readout decides which."""
    if plan.learned_variance:
        return LearnedVarianceRun(model, plan, request, compiled=compiled)
    return KINDS.get(plan.readout, Run)(model, plan, request, compiled=compiled)


class CategoricalRun(Run):
    """State slab of logits z [P, B, *D, K'] (dense rows), the model's input 2 softmax(z) - 1, classes int64 [B, *D].

    K' is K, or 1 for K = 2: z_1 - z_0. x is slot 0; x0 holds the classes the last row decided for.
    """

    input_is_state = False
    draws_on_host = False
    x0: Tensor

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return ops.categorical_buffer(shape, dtype, self.device)

    def _watched(self, asked: bool) -> Tensor:
        return torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device)

    def _noise(self, request: Request, compiled: bool) -> Noise:
        self.torch_gumbel = None
        if request.options.noise == "torch":
            self.noise_in_kernel, self.torch_gumbel = (
                False,
                torch.zeros(self.shape, dtype=torch.float32, device=self.device),
            )
            sampled = [self.readout(k) == "sample" for k in range(self.plan.nfe)]
            kind = "logistic" if self.shape[-1] == 1 else "gumbel"
            return ReadoutNoise(self.plan, self.x, request.generators, self.torch_gumbel, kind, sampled)
        return super()._noise(request, False)

    def outside(self) -> bool:
        sampled = self.torch_gumbel is not None and "sample" in (self.plan.readout, self.plan.last_readout)
        return sampled or super().outside()

    def _prepare(self, compiled: bool) -> None:
        self.table = self.plan.pack(self.device)
        held = self.slab, self.model_in, self.x0, self.table, self.plan.slots
        self.compiled = CompiledStep(*held) if compiled and self.on_host else None

    def _add_data(self, x_init: Tensor, alpha: float) -> None:
        if self.shape[-1] == 1:
            self.x.add_(2 * x_init[..., None] - 1, alpha=alpha)
        else:
            self.x.scatter_add_(-1, x_init[..., None], torch.full_like(x_init, alpha, dtype=self.x.dtype)[..., None])

    def result(self, dtype: torch.dtype) -> Tensor:
        return self.x0.clone()

    def refresh(self, k: int) -> None:
        many = max(1, REFRESHED // max(1, self.x[:1].numel()))
        for half in self.halves:
            for into, z in zip(half.split(many), self.x.split(many), strict=True):
                into.copy_(torch.tanh(0.5 * z) if z.shape[-1] == 1 else 2 * torch.softmax(z, -1) - 1)

    def _finite(self, m: Tensor) -> Tensor:
        return ~(m.isnan() | m.isposinf()).any()  # -inf forbids a class

    def readout(self, k: int) -> str:
        """The readout of row k."""
        return self.plan.readout if k < self.plan.nfe - 1 else self.plan.last_readout

    def captured(self, k: int) -> bool:
        return self.readout(k) == self.readout(0)

    def step(self, k: int, row: Tensor, m: Tensor, u: Tensor | None, noise: Tensor | None) -> None:
        readout, gumbel = self.readout(k), None
        if readout == "sample" and self.torch_gumbel is not None:
            gumbel = self.torch_gumbel
        if m.data_ptr() == self.model_in.data_ptr():
            m = m.clone()  # a model that returns its input, which the step writes
        seeded = seeds_of(self.noise) if (readout == "sample" and gumbel is None) or self.noise_in_kernel else None
        w = None if u is None else self.weight

        seeds, index = (None, None) if seeded is None else (seeded.seeds, seeded.index)
        given = {"uncond": u, "guidance": w, "seeds": seeds, "index": index, "noise": noise, "gumbel": gumbel}

        def run() -> None:
            ops.categorical_step(
                self.slab, m, self.table, row, slots=self.plan.slots, readout=readout, model_in=self.model_in,
                classes=self.x0, **given,
            )  # fmt: skip

        if not self.on_host:
            self.relaunch(f"fastdiff::categorical_step {readout}", run, (m, u, row, noise, gumbel, w))
        elif self.compiled is None or not self.compiled(readout, row, m, **given):
            run()
        if self.bad is not None:
            self.watch(row, m)


KINDS: dict[str, type[Run]] = dict.fromkeys(CATEGORICAL, CategoricalRun)
KINDS |= dict.fromkeys(BINNED, BinnedRun) | dict.fromkeys(ORDERS, MaskedRun)
