"""The demo's pictures of Bayesian flow networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fastdiff.demo.data import Digits
from fastdiff.demo.measure import Sampled
from fastdiff.demo.plots import mosaic, save_figure

__all__ = ["continuous_pictures", "level_pictures"]

Tensor = torch.Tensor
COLUMNS = 8


def _rows(count: int) -> list[int]:
    return sorted({round(v) for v in np.linspace(0, count - 1, COLUMNS)})


def _points(axis: object, x: Tensor, title: str, colour: str) -> None:
    axis.plot(x[:, 0], x[:, 1], ".", ms=1.2, color=colour)  # type: ignore[attr-defined]
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), xticks=[], yticks=[], aspect="equal")  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=9)  # type: ignore[attr-defined]


def _spiral_figure(data: Tensor, sampled: Mapping[str, Sampled]) -> Figure:
    """What is known (mu, x0-hat) along the flow, a line of pictures a case, and the samples."""
    figure = Figure(figsize=(2.1 * (COLUMNS + 1), 4.6 * len(sampled)), layout="constrained")
    axes = figure.subplots(2 * len(sampled), COLUMNS + 1, squeeze=False)
    for i, (label, got) in enumerate(sampled.items()):
        for column, row in enumerate(_rows(got.plan.nfe)):
            u = got.plan.times[row]
            _points(axes[2 * i][column], got.trajectory.x[row], f"mu, u = {u:.2f}", "C0")
            _points(axes[2 * i + 1][column], got.trajectory.x0[row], f"x0-hat, u = {u:.2f}", "C3")
        axes[2 * i][0].set_ylabel(label.replace(", ", "\n"), fontsize=9)
        _points(axes[2 * i][COLUMNS], got.x, "samples", "C0")
        _points(axes[2 * i + 1][COLUMNS], data[:2000], "data", "0.3")
    return figure


def _images(axis: object, x: Tensor, columns: int, title: str) -> None:
    axis.imshow(mosaic(x, columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=10)  # type: ignore[attr-defined]
    axis.set_axis_off()  # type: ignore[attr-defined]


def _digits_figure(real: Tensor, shown: Mapping[str, tuple[Tensor, Tensor, list[float]]]) -> Figure:
    """Real images, samples, and what is known along the flow: label -> (samples, stages [rows, 4, ...], times)."""
    figure = Figure(figsize=(10.5, 3.6 * (len(shown) + 1)), layout="constrained")
    axes = figure.subplots(len(shown) + 1, 2, squeeze=False)
    _images(axes[0][0], real[:64], 8, "held-out real digits")
    axes[0][1].set_axis_off()
    for pair, (label, (x, stages, times)) in zip(axes[1:], shown.items(), strict=True):
        _images(pair[0], x[:64], 8, label)
        _images(
            pair[1], stages.transpose(0, 1).flatten(0, 1), len(times), f"known at u = {times[0]:.2f} .. {times[-1]:.2f}"
        )
    return figure


def continuous_pictures(
    out: Path, points: Tensor, curves: Mapping[str, Sampled], images: Digits, written: Mapping[str, Sampled]
) -> list[str]:
    """bfn_spiral.png and bfn_digits.png; returns their names."""
    shown = {}
    for label, got in written.items():
        rows = _rows(got.plan.nfe)
        shown[label] = (got.x, got.trajectory.x0[rows][:, :8], got.plan.times[rows].tolist())
    return [
        save_figure(_spiral_figure(points, curves), out, "bfn_spiral.png"),
        save_figure(_digits_figure(images.held_images, shown), out, "bfn_digits.png"),
    ]


def level_pictures(out: Path, real: Tensor, shown: Mapping[str, tuple[Tensor, Tensor, list[float]]]) -> list[str]:
    """bfn_levels.png: images of classes; returns its name."""
    return [save_figure(_digits_figure(real, shown), out, "bfn_levels.png")]
