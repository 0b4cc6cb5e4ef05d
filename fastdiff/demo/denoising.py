"""Three ways to denoise a point of the spiral: the straight line to the curve, the posterior mean, the network."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import nn

import fastdiff as fd
from fastdiff.demo.data import nearest_on_spiral

__all__ = ["denoised", "denoising_figure"]

Tensor = torch.Tensor
LEVELS = (0.03, 0.1, 0.2, 0.5)  # sigma, at alpha = 1
SHOWN = 140


def denoised(data: Tensor, net: nn.Module, sigma: float, *, count: int = SHOWN) -> tuple[Tensor, dict[str, Tensor]]:
    """Noised points y [count, 2] at alpha = 1, and where each way of denoising takes them.

    "straight line": the nearest point of the curve. "ideal": E[x0 | y] of the data set. "network": y - sigma eps(y).
    """
    schedule = fd.schedules.VE(sigma, 2 * sigma)  # sigma at t = 0
    pick = torch.linspace(0, len(data) - 1, count).long()
    at = torch.zeros(count)
    y = fd.ops.add_noise(data[pick], at, schedule, seeds=torch.arange(count))
    assert isinstance(y, Tensor)
    with torch.no_grad():
        eps = net(y, torch.ones(count), torch.full((count,), sigma))
    ideal = fd.training.ideal_model(data, schedule, "x0")(y, at)
    return y, {"straight line": nearest_on_spiral(y)[0], "ideal": ideal, "network": y - sigma * eps}


def denoising_figure(data: Tensor, net: nn.Module) -> Figure:
    """A row a way of denoising, a column a noise level: lines from the noised point to x0-hat."""
    rows = ("straight line", "ideal", "network")
    figure = Figure(figsize=(3 * len(LEVELS), 9.4), layout="constrained")
    axes = figure.subplots(len(rows), len(LEVELS), squeeze=False)
    figure.suptitle("Denoising the spiral: to the nearest point, to the mean of the data given x_t, by the network")
    for column, sigma in enumerate(LEVELS):
        y, targets = denoised(data, net, sigma)
        half = 1.15 + 1.5 * sigma
        for row, name in enumerate(rows):
            axis, x0 = axes[row][column], targets[name]
            axis.plot(data[:3000, 0], data[:3000, 1], ".", ms=0.6, color="0.8")
            lines = np.stack([y.numpy(), x0.numpy()], axis=1)
            axis.add_collection(LineCollection(list(lines), colors="C0", linewidths=0.6, alpha=0.7))
            axis.plot(x0[:, 0], x0[:, 1], ".", ms=2.5, color="crimson")
            axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
            error = (x0 - targets["ideal"]).norm(dim=1).mean().item()
            axis.set_title(f"sigma {sigma:g}, from the ideal {error:.3f}", fontsize=9)
        axes[0][column].set_xlabel("")
    for row, name in enumerate(rows):
        axes[row][0].set_ylabel(name)
    return figure
