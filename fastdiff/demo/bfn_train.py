"""Training of the demo's Bayesian flow networks on the package's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.demo.train import Say

__all__ = ["fit", "spread_times"]

Tensor = torch.Tensor
Loss = Callable[[nn.Module, torch.Generator], Tensor]


def spread_times(batch: int, generator: torch.Generator, *, longest: float = 1.0) -> Tensor:
    """Schedule times of a batch, one in each of `batch` equal parts of [0, longest], in random order."""
    places = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    return longest * places / batch


def fit(
    make: Callable[[], nn.Module], loss: Loss, *, steps: int, learning_rate: float, seed: int, say: Say
) -> tuple[nn.Module, float]:
    """Adam with one warm-up and decay; the weights are averaged on the way.

    Args: make: builds the network. loss: (network, generator) -> the mean loss of a fresh batch.
    Returns: the averaged network in eval mode, and the mean loss of the last tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
    weights = list(net.parameters())
    average = [p.detach().clone() for p in weights]
    optimiser = torch.optim.Adam(weights, lr=learning_rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    recent: list[float] = []
    for step in range(steps):
        value = loss(net, generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        rate.step()
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(0.998, (step + 1) / (step + 10)))
        if step >= steps - math.ceil(steps / 10):
            recent.append(value.item())
        if (step + 1) % math.ceil(steps / 5) == 0:
            say(f"  step {step + 1}/{steps}, loss {value.item():.3f}")
    with torch.no_grad():
        for p, mean in zip(weights, average, strict=True):
            p.copy_(mean)
    net.requires_grad_(False).eval()
    return net, sum(recent) / len(recent)
