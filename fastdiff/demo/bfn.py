"""Continuous Bayesian flow networks on the spiral and on real digits, judged like the diffusion models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastdiff as fd
from fastdiff.demo import bfn_plots, digits, spiral
from fastdiff.demo.bfn_train import fit, spread_times
from fastdiff.demo.data import DATA_STD
from fastdiff.demo.data import digits as load_digits
from fastdiff.demo.data import spiral as load_spiral
from fastdiff.demo.measure import Case, Sampled, sample_case
from fastdiff.demo.nets import DigitNet, Preconditioned, SpiralNet
from fastdiff.demo.report import Part, Row
from fastdiff.demo.train import Say, fit_classifier

__all__ = ["cases", "run"]

SCHEDULES = {"spiral": fd.schedules.BFNContinuous(0.005), "digits": fd.schedules.BFNContinuous(0.02)}
STEPS = {"spiral": 2500, "digits": 900}
BATCH = {"spiral": 512, "digits": 128}
LONGEST = 0.9995  # eps has no meaning at u = 1 - t = 0


def cases(name: str) -> list[Case]:
    """What is sampled: the paper's sampler, and BFN-Solver's flow at 40 evaluations."""
    schedule = SCHEDULES[name]
    return [
        Case("bfn_continuous", "BFN", schedule, 1000 if name == "spiral" else 200),
        Case("bfn_solver", "BFN", schedule, 40, {"method": "bfn_solver2"}),
    ]


def _loss(data: torch.Tensor, name: str, net: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """The continuous-time loss of a fresh batch, in bits per dimension."""
    schedule, batch = SCHEDULES[name], BATCH[name]
    x = data[torch.randint(len(data), (batch,), generator=generator)]
    t = spread_times(batch, generator, longest=LONGEST)
    mu, _ = fd.training.add_noise(x, t, schedule, seeds=torch.randint(2**62, (batch,), generator=generator))
    out = net(mu, schedule.alpha(t).float(), schedule.sigma(t).float())
    return fd.training.bfn_continuous_loss(out, x, mu, t, schedule, units="bits_per_dim").mean()


def _train(make: Callable[[], nn.Module], data: torch.Tensor, name: str, seed: int, say: Say) -> Preconditioned:
    net, _ = fit(make, partial(_loss, data, name), steps=STEPS[name], learning_rate=3e-3, seed=seed, say=say)
    assert isinstance(net, Preconditioned)
    return net


def _sample(
    net: Preconditioned, name: str, shape: tuple[int, ...], judge: Callable[[Case, Sampled], Row], shown: str, *,
    part: Part, seed: int, say: Say,
) -> dict[str, Sampled]:  # fmt: skip
    sampled: dict[str, Sampled] = {}
    for case in cases(name):
        got = sample_case(net, case, shape, seed=seed)
        row = judge(case, got)
        part.rows.append(row)
        label = f"{case.label}, {got.plan.nfe} evaluations"
        sampled[label] = got
        say(f"  {label}: {shown} {row.metrics[shown]:.4f}, {got.us:.0f} us a step")
    return sampled


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Train, sample, judge and draw both."""
    part = Part()
    points = load_spiral(20_000, torch.Generator().manual_seed(seed))
    say("bfn: training on the spiral")
    net = _train(partial(SpiralNet, DATA_STD["spiral"]), points, "spiral", seed, say)
    curves = _sample(net, "spiral", (spiral.SAMPLES, 2), spiral._judge, "distance", part=part, seed=seed, say=say)
    images = load_digits(seed)
    classifier, _, real = fit_classifier(images, seed=seed)
    say("bfn: training on the digits")
    net = _train(partial(DigitNet, DATA_STD["digits"]), images.images, "digits", seed, say)
    judge = partial(digits._judge, data=images, classifier=classifier, real=real)
    written = _sample(net, "digits", (digits.SAMPLES, 1, 8, 8), judge, "confidence", part=part, seed=seed, say=say)
    part.pictures += bfn_plots.continuous_pictures(out, points, curves, images, written)
    return part
