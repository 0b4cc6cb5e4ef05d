"""Runs of plans whose model returns a second plane: v, which scales the noise between two variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.plan import Plan
from fastdiff.request import Request
from fastdiff.run import Run

__all__ = ["LearnedVarianceRun"]


class LearnedVarianceRun(Run):
    """The model returns [B, 2 C, ...]: the prediction, then v. With guidance v is the conditional output's.

    n becomes exp((f log_var_hi + (1 - f) log_var_lo) / 2) n with f = (v + 1) / 2: in the step kernel, or on the CPU
    before the step.
    """

    loop_draws = False  # the noise is scaled before the step
    output_says = "two planes, the prediction and v, on axis 1"

    def __init__(self, model: Callable[..., Any], plan: Plan, request: Request, *, compiled: bool) -> None:
        if len(request.state) < 2:
            raise ValueError(f"a learned variance needs a channel axis, shape (B, C, ...), got {request.state}")
        super().__init__(model, plan, request, compiled=compiled)
        self.v = torch.zeros_like(self.x)
        self.scaled: Tensor | None = None

    def output_shape(self) -> tuple[int, ...]:
        """What the model must return."""
        batch, channels, *rest = self.model_in.shape
        return (batch, 2 * channels, *rest)

    def evaluate(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predictions; v is kept for the step."""
        m, u = super().evaluate(t)
        m, self.v = m.chunk(2, 1)
        return m, u if u is None else u.chunk(2, 1)[0]

    def step(self, k: int, row: Tensor, m: Tensor, u: Tensor | None, noise: Tensor | None) -> None:
        """Runs row k with its noise scaled."""
        if self.on_host and noise is not None:
            assert self.plan.log_var_lo is not None and self.plan.log_var_hi is not None
            low, high = float(self.plan.log_var_lo[k]), float(self.plan.log_var_hi[k])
            if self.scaled is None:
                self.scaled = torch.empty_like(self.x)
            self.scaled.copy_(self.v).mul_(0.25 * (high - low)).add_(0.25 * (high + low)).exp_().mul_(noise)
            noise = self.scaled
        super().step(k, row, m, u, noise)

    def reduce(self, row: Tensor, m: Tensor, u: Tensor | None) -> dict[str, Any]:
        """What the step kernel takes beside the outputs."""
        return super().reduce(row, m, u) | {"variance": self.v}
