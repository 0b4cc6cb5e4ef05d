"""Training of the demo's networks, with the package's own noising."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import fastdiff as fd
from fastdiff.demo.data import Digits
from fastdiff.demo.nets import Classifier, Preconditioned

__all__ = ["Recipe", "fit_classifier", "fit_denoiser"]

Tensor = torch.Tensor
Say = Callable[[str], None]
# In y = x / alpha every schedule is this one, so its noise levels are all a network must know.
TRAINING = fd.schedules.VE(sigma_min=0.002, sigma_max=100.0)


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam with one warm-up and decay; `level` = (mean, std) of ln(sigma/alpha), in `focus` of the draws.

    The other draws are uniform in ln(sigma/alpha) over the whole range.
    """

    steps: int
    batch: int
    learning_rate: float
    level: tuple[float, float]
    focus: float


def _times(recipe: Recipe, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(recipe.batch, generator=generator)
    mean, std = recipe.level
    logsnr = -2 * (mean + std * torch.randn(recipe.batch, generator=generator))
    focused = torch.from_numpy(TRAINING.t_of(logsnr.double().numpy())).float().clamp(0, 1)
    return torch.where(torch.rand(recipe.batch, generator=generator) < recipe.focus, focused, uniform)


def fit_denoiser(
    make: Callable[[], Preconditioned], data: Tensor, recipe: Recipe, *, seed: int, say: Say
) -> tuple[Preconditioned, float]:
    """Train a network on the eps loss and average its weights on the way.

        loss = mean (1 + sigma^2 / (alpha std)^2) |eps - eps(x_t)|^2

    The weight is 1 at low noise; at high noise, where eps is nearly x_t itself, it asks for x0 instead.
    Args: make: builds the network. data: [N, ...] clean samples. seed: initial weights, order and noise.
    Returns: the averaged network in eval mode, and the mean loss of the last tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
    weights = list(net.parameters())
    average = [p.detach().clone() for p in weights]
    optimiser = torch.optim.Adam(weights, lr=recipe.learning_rate)
    warmup = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    recent: list[float] = []
    for step in range(recipe.steps):
        x0 = data[torch.randint(len(data), (recipe.batch,), generator=generator)]
        t = _times(recipe, generator)
        seeds = torch.randint(2**62, (recipe.batch,), generator=generator)
        x_t, eps = fd.training.add_noise(x0, t, TRAINING, seeds=seeds, target="eps")
        alpha, sigma = TRAINING.alpha(t).float(), TRAINING.sigma(t).float()
        weight = 1 + (sigma / alpha / net.data_std) ** 2
        error = (net(x_t, alpha, sigma) - eps).square().flatten(1).mean(dim=1)
        loss = (weight * error).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        warmup.step()
        keep = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - keep)
        if step >= recipe.steps - math.ceil(recipe.steps / 10):
            recent.append(loss.item())
        if (step + 1) % math.ceil(recipe.steps / 5) == 0:
            say(f"  step {step + 1}/{recipe.steps}, loss {loss.item():.3f}")
    with torch.no_grad():
        for p, mean in zip(weights, average, strict=True):
            p.copy_(mean)
    net.requires_grad_(False).eval()
    return net, sum(recent) / len(recent)


def fit_classifier(data: Digits, *, seed: int, steps: int = 400, batch: int = 128) -> tuple[nn.Module, float, float]:
    """Train a classifier on the real digits, slightly noised so that it judges shapes rather than exact pixels.

    Returns: the classifier in eval mode, and its accuracy and mean confidence on the held-out real digits.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier()
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(steps):
            pick = torch.randint(len(data.images), (batch,), generator=generator)
            images = data.images[pick]
            images = images + 0.1 * torch.randn(images.shape, generator=generator)
            loss = F.cross_entropy(net(images), data.labels[pick])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    net.requires_grad_(False).eval()
    p = net(data.held_images).softmax(dim=1)
    accuracy = (p.argmax(dim=1) == data.held_labels).float().mean().item()
    return net, accuracy, p.amax(dim=1).mean().item()
