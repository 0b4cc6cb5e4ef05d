"""Small networks that predict eps from (x, alpha, sigma), so that one of them serves every schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.plan import Plan

__all__ = ["Classifier", "DigitNet", "PlanModel", "Preconditioned", "SpiralNet"]

Tensor = torch.Tensor
FREQUENCIES = 8
NOISE_FEATURES = 1 + 2 * FREQUENCIES
LOG_RATIO_RANGE = (-5.0, 5.0)


class Preconditioned(nn.Module):
    """eps(x; alpha, sigma) = sigma/r x/r + alpha std/r F(x/r, ln(sigma/alpha)),  r^2 = sigma^2 + (alpha std)^2.

    The first term is the exact answer for Gaussian data of that std, so F learns only what is left. It depends on
    x/alpha and sigma/alpha alone: schedules differ only in the path they take through the same function.
    Args: data_std: std of the data.
    """

    frequencies: Tensor

    def __init__(self, data_std: float) -> None:
        super().__init__()
        self.data_std = data_std
        self.register_buffer("frequencies", torch.arange(1, FREQUENCIES + 1) * (math.pi / 16))

    def residual(self, x: Tensor, features: Tensor) -> Tensor:
        """F, from the scaled input [B, ...] and the noise-level features [B, NOISE_FEATURES]."""
        raise NotImplementedError

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """eps, from x [B, ...] and alpha, sigma [B]."""
        signal = alpha * self.data_std
        r = torch.hypot(sigma, signal)
        level = (sigma / alpha).log().clamp(*LOG_RATIO_RANGE)[:, None]
        phase = level * self.frequencies
        features = torch.cat([level / 3, phase.sin(), phase.cos()], dim=1)
        r, sigma, signal = (v.reshape(-1, *(1,) * (x.ndim - 1)) for v in (r, sigma, signal))
        scaled = x / r
        return sigma / r * scaled + signal / r * self.residual(scaled, features)


class SpiralNet(Preconditioned):
    """A multilayer perceptron for points of the plane."""

    def __init__(self, data_std: float, width: int = 128) -> None:
        super().__init__(data_std)
        self.body = nn.Sequential(
            nn.Linear(2 + NOISE_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def residual(self, x: Tensor, features: Tensor) -> Tensor:
        """F for points [B, 2]."""
        return self.body(torch.cat([x, features], dim=1))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * out)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class DigitNet(Preconditioned):
    """A two-level U-Net for 8x8 images of one channel."""

    def __init__(self, data_std: float, width: int = 16, embedding: int = 64) -> None:
        super().__init__(data_std)
        self.embed = nn.Sequential(
            nn.Linear(NOISE_FEATURES, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down_block = _Block(width, width, embedding)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.place = nn.Parameter(torch.zeros(1, 2 * width, 4, 4))
        self.middle = nn.ModuleList(_Block(2 * width, 2 * width, embedding) for _ in range(2))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up_block = _Block(2 * width, width, embedding)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def residual(self, x: Tensor, features: Tensor) -> Tensor:
        """F for images [B, 1, 8, 8]."""
        e = self.embed(features)
        fine = self.down_block(self.first(x), e)
        coarse = self.down(fine) + self.place
        for block in self.middle:
            coarse = block(coarse, e)
        h = self.up_block(torch.cat([fine, self.up(coarse)], dim=1), e)
        return self.last(F.silu(h))


class Classifier(nn.Module):
    """A small convolutional classifier of the ten digits; images [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10]."""
        return self.body(x)


class PlanModel(nn.Module):
    """model(x, t) for the sampler: finds (alpha, sigma) of the plan's row by its time and calls the network.

    Args: net: eps network of (x, alpha, sigma). plan: the plan it will be sampled with.
    """

    halfway: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, net: Preconditioned, plan: Plan) -> None:
        super().__init__()
        self.net = net
        times = torch.tensor(plan.times, dtype=torch.float64)
        order = times.argsort()
        times = times[order]
        # the nearest row: rounding of t on its way to the model cannot pick another one
        self.register_buffer("halfway", ((times[1:] + times[:-1]) / 2).float())
        self.register_buffer("alpha", torch.tensor(plan.alpha)[order].float())
        self.register_buffer("sigma", torch.tensor(plan.sigma)[order].float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps of x [B, ...] at model times t [B]."""
        row = torch.searchsorted(self.halfway, t.float().contiguous())
        return self.net(x, self.alpha[row], self.sigma[row])
