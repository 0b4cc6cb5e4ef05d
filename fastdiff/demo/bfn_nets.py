"""Networks on classes: logits of every token from 2 theta - 1 of all of them and the flow's time."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["LevelNet", "TextNet"]

Tensor = torch.Tensor
FREQUENCIES = 8
LEAST = 1e-6


def prior_knowledge(x: Tensor) -> Tensor:
    """ln theta of x = 2 theta - 1: the exact logits where only the token itself is known; a network adds to it."""
    return ((x + 1) / 2).clamp_min(LEAST).log()


class _Time(nn.Module):
    """An embedding of the flow's time u in [0, 1]."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, FREQUENCIES + 1) * (math.pi / 2))
        self.body = nn.Sequential(nn.Linear(1 + 2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, u: Tensor) -> Tensor:
        phase = u[:, None] * self.frequencies
        return self.body(torch.cat([u[:, None], phase.sin(), phase.cos()], dim=1))


class _Block(nn.Module):
    """Two convolutions around a skip, modulated by the time; `dims` 1 or 2."""

    def __init__(self, dims: int, width: int, dilation: int = 1) -> None:
        super().__init__()
        conv: type[nn.Module] = nn.Conv1d if dims == 1 else nn.Conv2d
        self.norm = nn.GroupNorm(4, width)
        self.first = conv(width, width, 3, padding=dilation, dilation=dilation)
        self.second = conv(width, width, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulate(e).view(len(e), -1, *[1] * (h.dim() - 2)).chunk(2, dim=1)
        y = self.first(F.silu(self.norm(h) * (1 + scale) + shift))
        return h + self.second(F.silu(y))


class _ClassNet(nn.Module):
    """Convolutions over tokens: x [B, *D, K] -> logits [B, *D, K]."""

    def __init__(self, dims: int, classes: int, width: int, dilations: tuple[int, ...], place: tuple[int, ...]) -> None:
        super().__init__()
        conv: type[nn.Module] = nn.Conv1d if dims == 1 else nn.Conv2d
        self.time = _Time(width)
        self.read = conv(2 * classes, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, *place))
        self.blocks = nn.ModuleList(_Block(dims, width, d) for d in dilations)
        self.write = conv(width, classes, 1)
        self.prior = nn.Parameter(torch.zeros(classes))
        nn.init.zeros_(self.write.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.write.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        known = prior_knowledge(x)
        e = self.time(u)
        h = self.read(torch.cat([x, known / 4], dim=-1).movedim(-1, 1)) + self.place
        for block in self.blocks:
            h = block(h, e)
        return known + self.prior + self.write(F.silu(h)).movedim(1, -1)


class LevelNet(_ClassNet):
    """8x8 images of K grey levels: [B, 8, 8, K]."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__(2, classes, width, (1, 2, 1, 2), (8, 8))


class TextNet(_ClassNet):
    """Characters of an alphabet of K: [B, L, K]."""

    def __init__(self, classes: int, width: int = 96) -> None:
        super().__init__(1, classes, width, (1, 2, 4, 1, 2), (1,))
