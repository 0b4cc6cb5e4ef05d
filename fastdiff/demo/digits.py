"""Real 8x8 digits: a small U-Net, judged by a classifier that saw only real ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastdiff as fd
from fastdiff.demo import conditions, plots
from fastdiff.demo.data import DATA_STD, GRAY_LEVELS, Digits, digits
from fastdiff.demo.measure import Case, Sampled, sample_case
from fastdiff.demo.nets import DigitNet
from fastdiff.demo.report import Part, Row, make_row
from fastdiff.demo.train import Recipe, Say, fit_classifier, fit_denoiser

__all__ = ["cases", "judged", "run"]

SAMPLES = 500
RECIPE = Recipe(steps=1000, batch=128, learning_rate=3e-3, level=(-0.4, 1.2), focus=0.8)
MIN_CONFIDENCE = 0.85  # of the confidence on held-out real digits
CLASS_SHARE = (0.04, 0.18)
HALF_GRAY_LEVEL = 1 / GRAY_LEVELS  # in [-1, 1] a level is 2/16: closer than half of one is the same picture


def cases() -> list[Case]:
    """What is sampled."""
    vp = fd.schedules.VP()
    chain = fd.schedules.Betas(fd.schedules.cosine_betas(1000))
    return [
        Case("ddpm", "cosine betas", chain, 200),
        Case("euler_maruyama", "VP", vp, 200),
        Case("euler_maruyama", "SubVP", fd.schedules.SubVP(), 200),
        Case("euler_maruyama", "VE", fd.schedules.VE(), 200),
        Case("ddim", "cosine betas", chain, 40),
        Case("probability_flow", "VP", vp, 40, {"spacing": "logsnr"}),
        Case("heun", "EDM", fd.schedules.EDM(sigma_min=0.005, sigma_max=80.0), 20),
        Case("dpmpp_2m", "VP", vp, 20, {"spacing": "logsnr"}),
    ]


def judged(
    label: str, x: torch.Tensor, data: Digits, classifier: nn.Module, real: float
) -> tuple[dict[str, float], list[str]]:
    """What the judge makes of images [B, 1, 8, 8], and the targets they miss."""
    p = classifier(x).softmax(dim=1)
    share = torch.bincount(p.argmax(dim=1), minlength=10) / len(p)
    low, high = share.min().item(), share.max().item()
    confidence, nearest = p.amax(dim=1).mean().item(), data.nearest(x).min().item()
    missed = []
    if not confidence >= MIN_CONFIDENCE * real:
        missed.append(f"digits: {label}: confidence {confidence:.3f} < {MIN_CONFIDENCE} x {real:.3f}")
    if not (CLASS_SHARE[0] <= low and high <= CLASS_SHARE[1]):
        missed.append(f"digits: {label}: class shares {low:.1%} to {high:.1%} leave 4 % to 18 %")
    if not nearest > HALF_GRAY_LEVEL:
        missed.append(f"digits: {label}: a sample copies a training image (distance {nearest:.3f})")
    metrics = {
        "confidence": confidence, "rarest_class": low, "commonest_class": high, "nearest_training_image": nearest,
    }  # fmt: skip
    return metrics, missed


def _judge(case: Case, got: Sampled, data: Digits, classifier: nn.Module, real: float) -> Row:
    return make_row("digits", case, got, *judged(case.label, got.x, data, classifier, real))


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Train, sample every case, judge it, draw the pictures into `out`."""
    part = Part()
    data = digits(seed)
    say(f"digits: training the judge on {len(data.images)} real images")
    classifier, accuracy, real = fit_classifier(data, seed=seed)
    say(f"  accuracy {accuracy:.3f}, confidence {real:.3f} on {len(data.held_images)} held-out images")
    say("digits: training the denoiser")
    net, loss = fit_denoiser(
        partial(DigitNet, DATA_STD["digits"]), data.images, RECIPE, seed=seed, say=say, held_out=data.held_images
    )
    part.facts |= {"digits_loss": loss, "classifier_accuracy": accuracy, "real_confidence": real}
    part.facts["held_out_nearest_training_image"] = data.nearest(data.held_images).min().item()
    sampled: dict[str, Sampled] = {}
    for case in cases():
        got = sample_case(net, case, (SAMPLES, 1, 8, 8), seed=seed)
        row = _judge(case, got, data, classifier, real)
        part.rows.append(row)
        label = f"{case.label}, {got.plan.nfe} evaluations"
        sampled[label] = got
        say(f"  {label}: confidence {row.metrics['confidence']:.3f}, {got.us:.0f} us a step")
    say("digits: drawing")
    part.pictures += plots.digit_pictures(out, data, sampled, classifier)
    say("digits: completing real ones, asking for classes")
    guide, _, _ = fit_classifier(data, seed=seed + 1)
    asked = conditions.run(out, net, data, classifier, guide, seed=seed)
    for name, value in asked.facts.items():
        say(f"  {name}: {value:.3g}")
    part.facts |= asked.facts
    part.missed += asked.missed
    part.pictures += asked.pictures
    return part
