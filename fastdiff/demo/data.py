"""The two data sets of the demo: a planar spiral and real 8x8 digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DATA_STD", "Digits", "digits", "distance_to_spiral", "spiral", "spiral_coverage"]

Tensor = torch.Tensor
T_LOW, T_HIGH = 1.5 * math.pi, 4.5 * math.pi
DATA_STD = {"spiral": 0.45, "digits": 0.75}
GRAY_LEVELS = 16
HELD_OUT = 360


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


def distance_to_spiral(x: Tensor) -> Tensor:
    """Distance of each point x [..., 2] to the curve, [...]."""
    return _nearest(x.reshape(-1, 2), _curve(8000)).reshape(x.shape[:-1])


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
