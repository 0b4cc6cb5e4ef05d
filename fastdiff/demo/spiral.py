"""The spiral: one network, every schedule, every solver."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

import fastdiff as fd
from fastdiff.demo import plots
from fastdiff.demo.data import DATA_STD, distance_to_spiral, spiral, spiral_coverage
from fastdiff.demo.measure import Case, Sampled, sample_case
from fastdiff.demo.nets import SpiralNet
from fastdiff.demo.report import Part, Row, make_row
from fastdiff.demo.train import Recipe, Say, fit_denoiser

__all__ = ["cases", "run"]

SAMPLES = 2000
RECIPE = Recipe(steps=3000, batch=512, learning_rate=3e-3, level=(-2.2, 1.3), focus=0.7)
MAX_DISTANCE = {False: 0.012, True: 0.02}  # by plan.stochastic
MAX_COVERAGE = 0.015


def cases() -> list[Case]:
    """What is sampled: ODE solvers at 40 evaluations or fewer, stochastic ones at 1000."""
    chain = fd.schedules.Betas(fd.schedules.linear_betas(1000))
    vp, ve, subvp = fd.schedules.VP(), fd.schedules.VE(), fd.schedules.SubVP()
    edm = fd.schedules.EDM(sigma_min=0.005, sigma_max=80.0)
    near = {"spacing": "logsnr"}
    return [
        Case("ddpm", "linear betas", chain, 1000),
        Case("euler_maruyama", "VP", vp, 1000),
        Case("euler_maruyama", "SubVP", subvp, 1000),
        Case("euler_maruyama", "VE", ve, 1000),
        Case("ddim", "linear betas", chain, 40, near),
        Case("probability_flow", "VP", vp, 40, near),
        Case("euler", "Flow", fd.schedules.Flow(), 40, {"t_start": 0.99}),  # eps is undefined at alpha = 0
        Case("heun", "EDM", edm, 20),
        Case("dpmpp_2m", "VP", vp, 20, near),
        Case("dpmpp_2m", "Cosine", fd.schedules.Cosine(), 40, near),
    ]


def _judge(case: Case, got: Sampled) -> Row:
    distance, coverage = distance_to_spiral(got.x).mean().item(), spiral_coverage(got.x)
    most = MAX_DISTANCE[got.plan.stochastic]
    missed = []
    if not distance <= most:
        missed.append(f"spiral: {case.label}: distance {distance:.4f} > {most}")
    if not coverage <= MAX_COVERAGE:
        missed.append(f"spiral: {case.label}: coverage {coverage:.4f} > {MAX_COVERAGE}")
    metrics = {"distance": distance, "coverage": coverage}
    return make_row("spiral", case, got, metrics, missed)


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Train, sample every case, judge it, draw the pictures into `out`."""
    part = Part()
    data = spiral(20_000, torch.Generator().manual_seed(seed))
    held_out = spiral(2000, torch.Generator().manual_seed(seed + 1))
    say(f"spiral: training on {len(data)} points")
    net, loss = fit_denoiser(
        partial(SpiralNet, DATA_STD["spiral"]), data, RECIPE, seed=seed, say=say, held_out=held_out
    )
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed))
    part.facts |= {"spiral_loss": loss, "spiral_noise_distance": distance_to_spiral(noise).mean().item()}
    sampled: dict[str, Sampled] = {}
    for case in cases():
        got = sample_case(net, case, (SAMPLES, 2), seed=seed)
        row = _judge(case, got)
        part.rows.append(row)
        label = f"{case.label}, {got.plan.nfe} evaluations"
        sampled[label] = got
        say(f"  {label}: distance {row.metrics['distance']:.4f}, {got.us:.0f} us a step")
    say("spiral: drawing")
    part.pictures += plots.spiral_pictures(out, data, sampled, distance_to_spiral, net)
    return part
