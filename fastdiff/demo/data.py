"""The two data sets of the demo: a planar spiral and real 8x8 digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DATA_STD", "Digits", "digits", "distance_to_spiral", "nearest_on_spiral", "spiral", "spiral_coverage"]

Tensor = torch.Tensor
T_LOW, T_HIGH = 1.5 * math.pi, 4.5 * math.pi
DATA_STD = {"spiral": 0.45, "digits": 0.75}
GRAY_LEVELS = 16
HELD_OUT = 360
BRACKETS, NEWTON_STEPS = 256, 24


def _spiral_at(t: Tensor) -> Tensor:
    return torch.stack([t * t.cos(), t * t.sin()], dim=-1) / (4 * math.pi) - 1 / 8


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """Points (t cos t, t sin t) / (4 pi) - 1/8 with t uniform in [1.5 pi, 4.5 pi], [count, 2], |x| <= 1.004."""
    return _spiral_at(T_LOW + (T_HIGH - T_LOW) * torch.rand(count, generator=generator))


def _curve(count: int) -> Tensor:
    """Points of the curve, evenly spaced along it (arc length grows like t^2)."""
    return _spiral_at(torch.linspace(T_LOW**2, T_HIGH**2, count).sqrt())


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, y).amin(dim=1) for part in x.split(512)])


def nearest_on_spiral(x: Tensor) -> tuple[Tensor, Tensor]:
    """The point of the curve nearest to each x [M, 2], and its distance: [M, 2], [M].

    A grid of the curve's parameter brackets the minimum of |c(t) - x|^2; Newton's method on its derivative finishes,
    bisecting where a step would leave the bracket.
    """
    grid = torch.linspace(T_LOW, T_HIGH, BRACKETS, dtype=torch.float64)
    curve = _spiral_at(grid)
    parts = [_newton(q, grid, torch.cdist(q, curve).argmin(dim=1)) for q in x.double().split(8192)]
    points = torch.cat([_spiral_at(t) for t in parts] or [x.double()])
    return points.to(x.dtype), (points - x).norm(dim=1).to(x.dtype)


def _newton(x: Tensor, grid: Tensor, k: Tensor) -> Tensor:
    t, low, high = grid[k], grid[(k - 1).clamp(min=0)], grid[(k + 1).clamp(max=BRACKETS - 1)]
    for _ in range(NEWTON_STEPS):
        away = _spiral_at(t) - x
        cos, sin = t.cos(), t.sin()
        first = torch.stack([cos - t * sin, sin + t * cos], dim=1) / (4 * math.pi)
        second = torch.stack([-2 * sin - t * cos, 2 * cos - t * sin], dim=1) / (4 * math.pi)
        slope = (away * first).sum(dim=1)
        curvature = (first.square() + away * second).sum(dim=1)
        low, high = torch.where(slope < 0, t, low), torch.where(slope > 0, t, high)
        step = t - slope / curvature
        inside = (curvature > 0) & (step >= low) & (step <= high)
        t = torch.where(inside, step, (low + high) / 2)
    return t


def distance_to_spiral(x: Tensor) -> Tensor:
    """Distance of each point x [..., 2] to the curve, [...]."""
    return nearest_on_spiral(x.reshape(-1, 2))[1].reshape(x.shape[:-1])


def spiral_coverage(x: Tensor) -> float:
    """Mean distance of the curve's points to the nearest of the samples x [N, 2]: large when a part is missing."""
    return _nearest(_curve(4000), x).mean().item()


@dataclass(frozen=True)
class Digits:
    """Images in [-1, 1], [N, 1, 8, 8] float32, and labels [N]; `held_*` are never trained on."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Root-mean-square pixel distance of images x [B, 1, 8, 8] to their nearest training image, [B]."""
        return _nearest(x.flatten(1), self.images.flatten(1)) / math.sqrt(x[0].numel())


def digits(seed: int = 0) -> Digits:
    """scikit-learn's 1797 bundled images of handwritten digits, split by `seed` into training and held-out ones."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / (GRAY_LEVELS / 2) - 1
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[kept], labels[kept], images[held], labels[held])
