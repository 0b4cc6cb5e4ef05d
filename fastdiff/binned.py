"""A sampling run on discretised data: a readout of bins before the affine step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.noise import Noise, PhiloxNoise, ReadoutNoise
from fastdiff.ops.binned import bin_of
from fastdiff.request import Request
from fastdiff.run import Run

__all__ = ["BinnedRun", "seeds_of"]


def seeds_of(noise: Noise) -> PhiloxNoise:
    """The seeds and indices of a run that does not draw from torch's generators."""
    source = getattr(noise, "philox", noise)
    assert isinstance(source, PhiloxNoise)
    return source


class BinnedRun(Run):
    """A run whose model returns a mean and a log-std, [B, 2 C, *]; the step then runs on the bins' p."""

    output_says = "a mean and a log-std for every channel of its input"

    def output_shape(self) -> tuple[int, ...]:
        batch, channels, *rest = self.model_in.shape
        return (batch, 2 * channels, *rest)

    def _prepare(self, compiled: bool) -> None:
        super()._prepare(compiled)
        columns = np.stack([self.plan.c_skip, self.plan.c_out], 1)
        self.coef = torch.from_numpy(columns.astype(np.float32)).to(self.device)
        self.mode = "sample" if self.plan.readout == "binned" else "mean"

    def _noise(self, request: Request, compiled: bool) -> Noise:
        self.drawn: Tensor | None = None
        if request.options.noise == "torch" and self.plan.readout == "binned":
            self.noise_in_kernel, self.drawn = False, torch.zeros(self.shape, dtype=torch.float32, device=self.device)
            every = [True] * self.plan.nfe
            return ReadoutNoise(self.plan, self.x, request.generators, self.drawn, "normal", every)
        return super()._noise(request, compiled)

    def outside(self) -> bool:
        return self.drawn is not None or super().outside()

    def _second(self, n: Tensor) -> Tensor:
        return bin_of(n, self.plan.classes)

    def step(self, k: int, row: Tensor, m: Tensor, u: Tensor | None, noise: Tensor | None) -> None:
        if u is not None:
            assert self.weight is not None
            w = self.weight[0] if self.weight.shape[0] == 1 else self.weight.index_select(0, row)[0]
            m = ops.guide(m, u, w.expand(self.shape[0]))
        seeded = seeds_of(self.noise) if self.mode == "sample" and self.drawn is None else None
        p = ops.binned_readout(
            self.x, m, self.coef, row, bins=self.plan.classes, readout=self.mode,
            seeds=None if seeded is None else seeded.seeds, index=None if seeded is None else seeded.index,
            noise=self.drawn,
        )  # fmt: skip
        super().step(k, row, p, None, noise)
