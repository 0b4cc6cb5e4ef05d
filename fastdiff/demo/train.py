"""Training of the demo's networks, with the package's own noising."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fastdiff as fd
from fastdiff import training
from fastdiff.demo.data import Digits
from fastdiff.demo.nets import Classifier, Preconditioned

__all__ = ["Recipe", "fit_classifier", "fit_denoiser"]

Tensor = torch.Tensor
Say = Callable[[str], None]
# In y = x / alpha every schedule is this one, so its noise levels are all a network must know.
TRAINING = fd.schedules.VE(sigma_min=0.002, sigma_max=100.0)


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW with a warm-up and cosine decay, in whole epochs of `steps` altogether.

    `level` = (mean, std) of ln(sigma/alpha), in `focus` of the draws; the others are uniform over the whole range.
    """

    steps: int
    batch: int
    learning_rate: float
    level: tuple[float, float]
    focus: float


def _times(recipe: Recipe, batch: int, generator: torch.Generator) -> Tensor:
    mean, std = recipe.level
    focused = training.log_normal_times(batch, TRAINING, mean=mean, std=std, generator=generator)
    uniform = training.low_discrepancy_times(batch, TRAINING, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < recipe.focus, focused, uniform)


def fit_denoiser(
    make: Callable[[], Preconditioned],
    data: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    say: Say,
    held_out: Tensor | None = None,
    folder: Path | None = None,
) -> tuple[Preconditioned, float]:
    """Train a network on the eps loss and average its weights on the way.

        loss = mean (1 + sigma^2 / (alpha std)^2) |eps - eps(x_t)|^2,   EDM's weight of x0 as one of eps

    The weight is 1 at low noise; at high noise, where eps is nearly x_t itself, it asks for x0 instead.
    Args: make: builds the network. data: [N, ...] clean samples. seed: initial weights, order and noise. held_out: for
        the validation loss. folder: for checkpoints and history.json.
    Returns: the averaged network in eval mode, and the mean loss of the last tenth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()

    def loss(net: Preconditioned, x0: Tensor, seeds: Tensor, generator: torch.Generator) -> Tensor:
        t = _times(recipe, len(x0), generator)
        x_t = fd.ops.add_noise(x0, t, TRAINING, seeds=seeds)
        assert isinstance(x_t, Tensor)
        eps = net(x_t, TRAINING.alpha(t).float(), TRAINING.sigma(t).float())
        return fd.ops.denoising_loss(
            eps, None, t, TRAINING, seeds, target="eps", weighting="edm", sigma_data=net.data_std
        )

    batch = min(recipe.batch, len(data))
    epochs = math.ceil(recipe.steps / max(1, len(data) // batch))
    trainer = training.Trainer(
        net, loss, data, epochs=epochs, batch=batch, learning_rate=recipe.learning_rate, ema=0.998, seed=seed,
        held_out=held_out, validate_every=math.ceil(epochs / 5), folder=folder,
    )  # fmt: skip
    for part in range(1, 6):
        last = trainer.run(until=math.ceil(part * epochs / 5))[-1]
        validation = "" if last["validation"] is None else f", validation {last['validation']:.3f}"
        say(f"  epoch {last['epoch']}/{epochs}, loss {last['train']:.3f}{validation}")
    recent = trainer.history[-math.ceil(epochs / 10) :]
    averaged = trainer.averaged()
    assert isinstance(averaged, Preconditioned)
    return averaged, sum(entry["train"] for entry in recent) / len(recent)


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
