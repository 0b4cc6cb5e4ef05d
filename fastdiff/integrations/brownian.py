"""Noise from a Brownian tree, as k-diffusion's SDE samplers draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["BrownianTreeNoiseSampler"]


class BrownianTreeNoiseSampler:
    """noise(sigma, sigma'): the increment of one Brownian path between two levels, scaled to unit variance.

        n = (W(sigma') - W(sigma)) / sqrt|sigma' - sigma|

    Args: x: whose shape, device and dtype the noise has; sigma_min, sigma_max: the ends of the path; seed: of the tree
        (one a sample where it is a sequence); None takes one from torch's global generator; transform: of the levels.
    Raises: ModuleNotFoundError: torchsde is not installed.
    """

    def __init__(
        self, x: Tensor, sigma_min: Any, sigma_max: Any, seed: int | Sequence[int] | None = None,
        transform: Any = lambda v: v,
    ) -> None:  # fmt: skip
        try:
            from torchsde import BrownianTree  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "the SDE samplers draw from a Brownian tree: pip install torchsde, give noise_sampler=, "
                "or sample inside fastdiff.integrations.k_diffusion.philox(seed)"
            ) from None
        self.transform = transform
        a, b = (transform(torch.as_tensor(v)) for v in (sigma_min, sigma_max))
        low, high = (a, b) if a < b else (b, a)
        self.sign = 1 if a < b else -1
        start = torch.zeros_like(x)
        if seed is not None and not isinstance(seed, Sequence):  # arrays and tensors too
            seed = np.asarray(seed).tolist()
        self.batched = isinstance(seed, Sequence)
        if isinstance(seed, Sequence):
            seeds = [int(s) for s in seed]
            if len(seeds) != x.shape[0]:
                raise ValueError(f"seed must be one number or {x.shape[0]}, got {len(seeds)}")
            start = start[0]
        else:
            seeds = [int(torch.randint(0, 2**63 - 1, []) if seed is None else seed)]
        self.trees = [BrownianTree(low, start, high, entropy=s) for s in seeds]

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        a, b = (self.transform(torch.as_tensor(v)) for v in (sigma, sigma_next))
        low, high, sign = (a, b, self.sign) if a < b else (b, a, -self.sign)
        increments = [tree(low, high) * sign for tree in self.trees]
        w = torch.stack(increments) if self.batched else increments[0]
        return w / (b - a).abs().sqrt()
