"""Schedules side by side: what linear and cosine betas do to the same digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import fastdiff as fd
from fastdiff.demo.data import digits
from fastdiff.demo.plots import mosaic, noised, save_figure
from fastdiff.demo.report import Part
from fastdiff.demo.train import Say

__all__ = ["run"]

STEPS = 1000
COLUMNS = 12
CHAINS = {"linear": fd.schedules.linear_betas, "cosine": fd.schedules.cosine_betas}
CONTINUOUS: dict[str, fd.schedules.Schedule] = {
    "VP": fd.schedules.VP(),
    "SubVP": fd.schedules.SubVP(),
    "VE": fd.schedules.VE(),
    "Flow": fd.schedules.Flow(),
    "EDM": fd.schedules.EDM(sigma_min=0.002, sigma_max=80.0),
    "Cosine": fd.schedules.Cosine(),
}


def _figure(images: torch.Tensor) -> Figure:
    figure = Figure(figsize=(14, 11.5), layout="constrained")
    chains = {name: fd.schedules.Betas(make(STEPS)) for name, make in CHAINS.items()}
    grid = figure.add_gridspec(3, 3, height_ratios=[1.2, 1, 1])
    left, middle, right = (figure.add_subplot(grid[0, i]) for i in range(3))
    shown = np.linspace(0, STEPS - 1, COLUMNS).round().astype(int)
    for row, (name, chain) in enumerate(chains.items(), start=1):
        left.semilogy(chain.betas, label=name)
        middle.plot(chain.alpha(np.arange(STEPS)) ** 2, label=name)
        axis = figure.add_subplot(grid[row, :])
        x = torch.stack([noised(images, int(t), chain) for t in shown], dim=1)
        axis.imshow(mosaic(x.flatten(0, 1), COLUMNS), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(f"{name} betas: the same digits, noised at t = {', '.join(map(str, shown))}")
        axis.set_axis_off()
    t = np.linspace(0.002, 0.998, 400)
    for name, schedule in CONTINUOUS.items():
        right.plot(t, schedule.logsnr(t), label=name)
    left.set(title="beta_t", xlabel="t")
    middle.set(title="alpha_bar_t", xlabel="t")
    right.set(title="log-SNR of the continuous schedules", xlabel="t")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Draw `out`/schedules.png; trains nothing."""
    say("schedules: drawing")
    data = digits(seed)
    first = [int((data.labels == k).nonzero()[0, 0]) for k in (0, 3, 5, 8)]
    return Part(pictures=[save_figure(_figure(data.images[first]), out, "schedules.png")])
