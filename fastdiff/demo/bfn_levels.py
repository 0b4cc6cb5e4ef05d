"""Discrete Bayesian flow: real digits as classes, 17 grey levels a pixel."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastdiff as fd
from fastdiff.demo import digits
from fastdiff.demo.bfn_classes import ClassCase, ClassSampled, class_loss, sample_classes, total_bits
from fastdiff.demo.bfn_nets import LevelNet
from fastdiff.demo.bfn_plots import level_pictures
from fastdiff.demo.bfn_train import fit, spread_times
from fastdiff.demo.data import GRAY_LEVELS, Digits
from fastdiff.demo.data import digits as load_digits
from fastdiff.demo.report import Part, Row
from fastdiff.demo.train import Say, fit_classifier

__all__ = ["cases", "run"]

LEVELS = GRAY_LEVELS + 1
SCHEDULE = fd.schedules.BFNDiscrete(1.0, LEVELS)
TRAINING_STEPS = 600
BATCH = 64


def cases() -> list[ClassCase]:
    """What is sampled: the paper's sampler, BFN-Solver's SDE with half of the steps."""
    return [
        ClassCase("bfn_discrete", SCHEDULE, 60),
        ClassCase("bfn_solver", SCHEDULE, 30, {"method": "sde_bfn_solver2"}),
    ]


def levels_of(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 1, 8, 8] in [-1, 1] as levels 0..16, int64 [B, 8, 8]."""
    return ((images[:, 0] + 1) * (GRAY_LEVELS / 2)).round().long()


def images_of(levels: torch.Tensor) -> torch.Tensor:
    """Levels [..., 8, 8] as images [..., 1, 8, 8] in [-1, 1]."""
    return (levels.float() / (GRAY_LEVELS / 2) - 1).unsqueeze(-3)


def _loss(levels: torch.Tensor, net: nn.Module, generator: torch.Generator) -> torch.Tensor:
    x = levels[torch.randint(len(levels), (BATCH,), generator=generator)]
    seeds = torch.randint(2**62, (BATCH,), generator=generator)
    return class_loss(net, x, spread_times(BATCH, generator), SCHEDULE, seeds).mean()


def _judge(case: ClassCase, got: ClassSampled, data: Digits, classifier: nn.Module, real: float) -> Row:
    """The diffusion models' targets, except that a copy is a picture equal in every pixel's level or nearly so."""
    metrics, missed = digits.judged(case.label, images_of(got.x), data, classifier, real)
    return got.row("digits", case, metrics, missed)


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Train, sample every case, judge it, draw the picture into `out`."""
    part, data = Part(), load_digits(seed)
    classifier, _, real = fit_classifier(data, seed=seed)
    say(f"bfn_levels: training on {len(data.images)} images of {LEVELS} levels")
    net, loss = fit(
        partial(LevelNet, LEVELS), partial(_loss, levels_of(data.images)), steps=TRAINING_STEPS, learning_rate=3e-3,
        seed=seed, say=say,
    )  # fmt: skip
    held = levels_of(data.held_images)
    bits = total_bits(net, held, SCHEDULE, times=20, seed=seed)
    share = torch.bincount(levels_of(data.images).flatten(), minlength=LEVELS).double()
    share /= share.sum()
    entropy = -(share * share.clamp_min(1e-12).log2()).sum().item()
    say(f"  held-out digits: {bits:.2f} bits a pixel; order-0 entropy {entropy:.2f}")
    part.facts |= {"levels_loss": loss, "levels_bits_per_pixel": bits, "levels_order_0_entropy": entropy}
    if not bits < entropy:
        part.missed.append(f"bfn_levels: {bits:.3f} bits a pixel is not below the order-0 entropy {entropy:.3f}")
    shown = {}
    for case in cases():
        got = sample_classes(net, case, (digits.SAMPLES, 8, 8), seed=seed)
        row = _judge(case, got, data, classifier, real)
        part.rows.append(row)
        label = f"{case.label}, {got.plan.nfe} evaluations"
        say(f"  {label}: confidence {row.metrics['confidence']:.3f}, {got.us:.0f} us a step")
        rows = sorted({round(v) for v in np.linspace(0, got.plan.nfe - 1, 8)})
        shown[label] = (images_of(got.x), images_of(got.trajectory.x0[rows]), got.plan.times[rows].tolist())
    part.pictures += level_pictures(out, images_of(held), shown)
    return part
