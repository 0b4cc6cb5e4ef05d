"""The average of a network's weights that a trainer keeps."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["Average"]

SHORT = (torch.bfloat16, torch.float16)  # too short for an average: its steps would round to nothing


class Average(AveragedModel):
    """The average of a network's weights, of 16-bit ones in fp32; buffers and integers are the network's own."""

    def __init__(self, net: nn.Module, most: float) -> None:
        super().__init__(net)
        self.n_averaged = torch.zeros((), dtype=torch.int64, device="cpu")  # read in every step
        self.most = most
        for p in self.module.parameters():
            if p.dtype in SHORT:
                p.data = p.data.float()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)
        weight = 1 - min(self.most, (1 + n) / (10 + n)) if n else 1.0
        for a, b in zip(self.module.parameters(), model.parameters(), strict=True):
            if a.is_floating_point() or a.is_complex():
                a.lerp_(b.to(a.device, a.dtype), weight)
            else:
                a.copy_(b)
        for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.n_averaged += 1

    def shown(self, net: nn.Module) -> nn.Module:
        """The network with the average, in the dtypes of `net`: itself, or a copy where those are shorter."""
        own: nn.Module = self.module
        if not any(p.dtype in SHORT for p in net.parameters()):
            return own
        copy = deepcopy(own)
        for p, like in zip(copy.parameters(), net.parameters(), strict=True):
            p.data = p.data.to(like.dtype)
        return copy
