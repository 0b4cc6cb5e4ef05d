"""Small networks of the kinds people sample, for loops beside a real model. Random weights, fixed seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "build"]


def _embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time, [B, width]."""
    rates = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(1e4) / (width // 2)))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class MLP(nn.Module):
    """Points [B, D]: three hidden layers."""

    def __init__(self, data: int = 2, width: int = 256) -> None:
        super().__init__()
        self.width = width
        sizes = [data + width, width, width, width]
        self.body = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.out = nn.Linear(width, data)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.cat([x, _embedding(t, self.width).to(x.dtype)], 1)
        for layer in self.body:
            h = F.silu(layer(h))
        return self.out(h)


class Block(nn.Module):
    """Two convolutions with group norm around a time shift, and a way past them; 1-D or 2-D."""

    def __init__(self, conv: type[nn.Module], a: int, b: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, a), nn.GroupNorm(8, b)])
        self.convs = nn.ModuleList([conv(a, b, 3, padding=1), conv(b, b, 3, padding=1)])
        self.time = nn.Linear(time, b)
        self.past = conv(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.convs[0](F.silu(self.norms[0](x)))
        h = h + self.time(e).view(*h.shape[:2], *[1] * (h.dim() - 2))
        return self.past(x) + self.convs[1](F.silu(self.norms[1](h)))


class UNet(nn.Module):
    """A U-Net of three levels over images [B, C, H, W], or with axes=1 over action chunks [B, T, C]."""

    def __init__(self, channels: int, width: int = 32, axes: int = 2) -> None:
        super().__init__()
        conv, self.axes, self.width = (nn.Conv1d, nn.Conv2d)[axes - 1], axes, width
        time, sizes = 4 * width, [width, 2 * width, 4 * width]
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.inp = conv(channels, width, 3, padding=1)
        self.down = nn.ModuleList(Block(conv, a, b, time) for a, b in zip([width, *sizes], sizes, strict=False))
        self.middle = Block(conv, sizes[-1], sizes[-1], time)
        self.up = nn.ModuleList(Block(conv, 2 * b, a, time) for a, b in zip([width, *sizes], sizes, strict=False))
        self.out = conv(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inp(x.transpose(1, 2) if self.axes == 1 else x)
        e = self.time(_embedding(t, self.width).to(x.dtype))
        kept = []
        for i, block in enumerate(self.down):
            h = block(h, e)
            kept.append(h)
            if i + 1 < len(self.down):
                h = F.avg_pool1d(h, 2) if self.axes == 1 else F.avg_pool2d(h, 2)
        h = self.middle(h, e)
        for i, block in reversed(list(enumerate(self.up))):
            h = block(torch.cat([h, kept[i]], 1), e)
            if i:
                h = F.interpolate(h, scale_factor=2.0)
        h = self.out(h)
        return h.transpose(1, 2) if self.axes == 1 else h


class DiTBlock(nn.Module):
    """Attention and an MLP, both shifted, scaled and gated by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(e)[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in self.qkv(h).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.proj(h)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer over latents [B, C, H, W] in patches of 2 x 2."""

    def __init__(self, channels: int = 4, side: int = 16, width: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.width, self.side = width, side
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        self.place = nn.Parameter(torch.randn(1, (side // 2) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.place
        e = F.silu(self.time(_embedding(t, self.width).to(x.dtype)))
        for block in self.blocks:
            h = block(h, e)
        h = self.out(F.layer_norm(h, h.shape[-1:])).transpose(1, 2)
        return F.pixel_shuffle(h.unflatten(2, (self.side // 2, self.side // 2)), 2)


class Network(NamedTuple):
    """A network, the shape it samples, and the schedule and solver it usually runs with."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    schedule: str
    solver: str
    steps: int


NETWORKS = {
    "mlp": Network(MLP, (256, 2), "vp", "dpmpp_2m", 50),
    "unet1d": Network(lambda: UNet(7, 64, axes=1), (1, 16, 7), "cosine_betas", "ddpm", 100),
    "unet": Network(lambda: UNet(3), (1, 3, 32, 32), "scaled_linear_betas", "ddim", 50),
    "dit": Network(DiT, (1, 4, 16, 16), "flow", "euler", 50),
}


def build(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network in evaluation mode, without gradients; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name].make().to(device, dtype).eval().requires_grad_(False)
