"""The demo's pictures of the two data sets."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn

import fastdiff as fd
from fastdiff.demo.data import Digits
from fastdiff.demo.denoising import denoising_figure
from fastdiff.demo.measure import Sampled
from fastdiff.files import write_atomic

__all__ = [
    "digit_pictures",
    "log_density",
    "mosaic",
    "noised",
    "save_figure",
    "save_gif",
    "spiral_pictures",
]

Tensor = torch.Tensor
COLOURS = "magma"
FORWARD_TIMES = (0.02, 0.1, 0.25, 0.45, 1.0)
GIF_FRAMES = 40
SHOWN_REVERSE = "probability_flow"  # its rows are even in log-SNR, so every stage of the way is seen


def save_figure(figure: Figure, out: Path, name: str) -> str:
    """Write a figure as PNG; returns its name."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(out / name, buffer.getvalue())
    return name


def save_gif(frames: Sequence[Image.Image], out: Path, name: str, *, milliseconds: int = 80) -> str:
    """Write frames as a looping GIF that rests on its last one; returns its name."""
    buffer = io.BytesIO()
    times = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    write_atomic(out / name, buffer.getvalue())
    return name


def noised(x0: Tensor, t: float, schedule: fd.schedules.Schedule, *, seed: int = 0) -> Tensor:
    """x_t of every x0 [B, ...] at one schedule time, by the package's own noising."""
    times = torch.full((len(x0),), t, dtype=torch.int64 if isinstance(schedule, fd.schedules.Betas) else torch.float32)
    seeds = torch.arange(len(x0)) + (seed << 32)
    return fd.training.add_noise(x0, times, schedule, seeds=seeds, target="eps")[0]


def log_density(x: Tensor, data: Tensor, alpha: float, sigma: float) -> Tensor:
    """ln q(x) of the noised data set, at points x [M, D]: an equal mixture over its points [N, D].

    q(x) = mean_i N(x; alpha x_i, sigma^2 I), summed in log space.
    """
    # in y = x / alpha every level is one of VE with sigma / alpha
    ve = fd.schedules.VE(sigma / alpha, 2 * sigma / alpha)
    return (fd.training.log_density(x / alpha, data, 0.0, ve) - x.shape[1] * math.log(alpha)).to(x.dtype)


def _levels(schedule: fd.schedules.Schedule, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def _forward_figure(data: Tensor, schedule: fd.schedules.Schedule, copies: int = 60, size: int = 120) -> Figure:
    data = data[:2000]
    figure = Figure(figsize=(3 * len(FORWARD_TIMES), 8.6), layout="constrained")
    axes = figure.subplots(3, len(FORWARD_TIMES), squeeze=False)
    figure.suptitle("Forward noising of the spiral (VP): histogram of noised points, the exact density over it")
    for column, t in enumerate(FORWARD_TIMES):
        alpha, sigma = _levels(schedule, t)
        half = 1.2 * alpha + 2.6 * sigma
        edges = np.linspace(-half, half, size + 1)
        centres = torch.tensor((edges[1:] + edges[:-1]) / 2, dtype=torch.float32)
        points = torch.cartesian_prod(centres, centres)
        exact = log_density(points, data, alpha, sigma).exp().reshape(size, size)
        x = noised(data.repeat(copies, 1), t, schedule).numpy()
        norm = PowerNorm(0.5, 0, exact.max().item())
        box = (-half, half, -half, half)
        counted = np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges], density=True)[0]
        for row, density in enumerate((counted, exact.numpy())):
            axes[row][column].imshow(density.T, origin="lower", extent=box, cmap=COLOURS, norm=norm)
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
        heights = exact.max().item() * np.array([0.03, 0.2, 0.6])
        axes[0][column].contour(centres, centres, exact.T, levels=heights, colors="cyan", linewidths=0.6)
        axes[0][column].set_title(f"t = {t:g}, alpha {alpha:.2f}, sigma {sigma:.2f}", fontsize=10)
        line = log_density(centres[:, None], data[:, :1], alpha, sigma).exp()
        axes[2][column].hist(x[:, 0], bins=edges.tolist(), density=True, color="0.75", label="histogram of x[0]")
        axes[2][column].plot(centres, line, color="crimson", lw=1.3, label="exact density")
        axes[2][column].set_yticks([])
    axes[0][0].set_ylabel("histogram, density as lines")
    axes[1][0].set_ylabel("exact density")
    axes[2][0].set_ylabel("first coordinate")
    axes[2][0].legend(fontsize=8, loc="upper left")
    return figure


def _scatter(axis: object, x: Tensor, half: float = 1.25, colour: str = "C0") -> None:
    axis.plot(x[:, 0], x[:, 1], ".", ms=1.2, color=colour)  # type: ignore[attr-defined]
    axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")  # type: ignore[attr-defined]


def _samples_figure(data: Tensor, sampled: Mapping[str, Sampled]) -> Figure:
    columns = 4
    rows = -(-(len(sampled) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, x) in zip(axes, [("data", data[:2000]), *((k, v.x) for k, v in sampled.items())], strict=False):
        axis.set_axis_on()
        _scatter(axis, x, colour="0.3" if label == "data" else "C0")
        axis.set_title(label.replace(", ", "\n"), fontsize=9)
    return figure


def _rows_shown(count: int, columns: int) -> list[int]:
    return sorted({round(v) for v in np.linspace(0, count - 1, columns)})


def _reverse_figure(label: str, got: Sampled, columns: int = 8) -> Figure:
    figure = Figure(figsize=(2.1 * columns, 4.7), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    figure.suptitle(f"Reverse: {label}")
    for column, row in enumerate(_rows_shown(got.plan.nfe, columns)):
        alpha, sigma = got.plan.alpha[row], got.plan.sigma[row]
        _scatter(axes[0][column], got.trajectory.x[row], half=_window(alpha, sigma))
        _scatter(axes[1][column], got.trajectory.x0[row], colour="C3")
        axes[0][column].set_title(f"row {row}, sigma/alpha {sigma / alpha:.2g}", fontsize=9)
    axes[0][0].set_ylabel("x_t")
    axes[1][0].set_ylabel("x0-hat")
    return figure


def _over_time(
    sampled: Mapping[str, Sampled], judge: Callable[[Tensor], Tensor], title: str, *, log: bool
) -> Figure:  # fmt: skip
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axis = figure.subplots()
    for index, (label, got) in enumerate(sampled.items()):
        rows = _rows_shown(got.plan.nfe, 50)
        ratio = got.plan.sigma[rows] / got.plan.alpha[rows]
        values = judge(got.trajectory.x0[rows]).mean(dim=1)
        axis.plot(ratio, values, "--" if got.plan.stochastic else "-", color=f"C{index}", lw=1.4, label=label)
    axis.set(xscale="log", xlabel="sigma / alpha (sampling goes to the right)", ylabel=title)
    if log:
        axis.set_yscale("log")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _cloud(x: Tensor, caption: str, half: float, size: int = 280) -> Image.Image:
    bins = np.linspace(-half, half, size // 2 + 1)
    counts = np.histogram2d(x[:, 1].numpy(), x[:, 0].numpy(), bins=[bins, bins])[0][::-1]
    shown = np.minimum(counts / 3.0, 1.0) ** 0.5
    picture = Image.fromarray((255 * colormaps[COLOURS](shown)[..., :3]).astype(np.uint8)).resize((size, size))
    ImageDraw.Draw(picture).text((6, 4), caption, fill="white")
    return picture


def _window(alpha: float, sigma: float) -> float:
    return 1.25 * alpha + 2.5 * sigma


def spiral_pictures(
    out: Path, data: Tensor, sampled: Mapping[str, Sampled], judge: Callable[[Tensor], Tensor], net: nn.Module
) -> list[str]:
    """Forward density, denoising, samples, reverse trajectory, distances, two GIFs; returns the files' names."""
    schedule = fd.schedules.VP()
    label, got = next((k, v) for k, v in sampled.items() if k.startswith(SHOWN_REVERSE))
    title = "mean distance of x0-hat to the spiral"
    names = [
        save_figure(_forward_figure(data, schedule), out, "spiral_forward.png"),
        save_figure(denoising_figure(data, net), out, "spiral_denoising.png"),
        save_figure(_samples_figure(data, sampled), out, "spiral_samples.png"),
        save_figure(_reverse_figure(label, got), out, "spiral_reverse.png"),
        save_figure(_over_time(sampled, judge, title, log=True), out, "spiral_distance.png"),
    ]
    frames = [_cloud(data[:4000], "forward, VP, t = 0", _window(1, 0))]
    for t in np.linspace(0, 1, GIF_FRAMES)[1:] ** 2:
        x = noised(data[:4000], float(t), schedule)
        frames.append(_cloud(x, f"forward, VP, t = {t:.3f}", _window(*_levels(schedule, t))))
    names.append(save_gif(frames, out, "spiral_forward.gif"))
    levels = [*zip(got.plan.alpha, got.plan.sigma, strict=True), got.plan.end]
    frames = [
        _cloud(x, f"reverse, {label.split(',')[0]}, row {k}", _window(*level))
        for k, (x, level) in enumerate(zip(got.trajectory.x, levels, strict=True))
    ]
    names.append(save_gif(frames, out, "spiral_reverse.gif"))
    return names


def mosaic(images: Tensor, columns: int, *, zoom: int = 4, gap: int = 1) -> np.ndarray:
    """Images [B, 1, H, W] in [-1, 1] as one gray picture, uint8, dark ink on light ground."""
    gray = ((1 - images.clamp(-1, 1)) * 127.5).round().to(torch.uint8)[:, 0].numpy()
    rows = -(-len(gray) // columns)
    cell = gray.shape[1] + gap
    page = np.full((rows * cell + gap, columns * cell + gap), 160, np.uint8)
    for i, image in enumerate(gray):
        top, left = gap + i // columns * cell, gap + i % columns * cell
        page[top : top + cell - gap, left : left + cell - gap] = image
    return page.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _digit_samples(data: Digits, sampled: Mapping[str, Sampled]) -> Figure:
    shown = [("held-out real digits", data.held_images), *((k, v.x) for k, v in sampled.items())]
    columns = 4
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, x) in zip(axes, shown, strict=False):
        axis.imshow(mosaic(x[:64], 8), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(label.replace(", ", "\n"), fontsize=10)
    return figure


def _digit_reverse(sampled: Mapping[str, Sampled], count: int = 4, columns: int = 10) -> Figure:
    figure = Figure(figsize=(13, 2.85 * len(sampled)), layout="constrained")
    axes = figure.subplots(len(sampled), 2, squeeze=False)
    for pair, (label, got) in zip(axes, sampled.items(), strict=True):
        rows = _rows_shown(got.plan.nfe, columns)
        states = got.trajectory.x[rows][:, :count]
        scale = np.hypot(got.plan.alpha[rows], got.plan.sigma[rows])
        states = states / torch.tensor(scale, dtype=states.dtype).reshape(-1, 1, 1, 1, 1)
        for axis, name, x in zip(pair, ("x_t", "x0-hat"), (states, got.trajectory.x0[rows][:, :count]), strict=True):
            # a column is a row of the plan, a line is one sample
            page = mosaic(x.transpose(0, 1).flatten(0, 1), len(rows))
            axis.imshow(page, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(f"{label}: {name}", fontsize=10)
            axis.set_axis_off()
    return figure


def digit_pictures(out: Path, data: Digits, sampled: Mapping[str, Sampled], classifier: nn.Module) -> list[str]:
    """Samples, reverse x_t beside x0-hat, confidence over time, and two GIFs; returns the files' names."""

    def confidence(x: Tensor) -> Tensor:
        return classifier(x.flatten(0, 1)).softmax(dim=1).amax(dim=1).reshape(x.shape[:2])

    names = [
        save_figure(_digit_samples(data, sampled), out, "digits_samples.png"),
        save_figure(_digit_reverse(sampled), out, "digits_reverse.png"),
        save_figure(
            _over_time(sampled, confidence, "mean confidence of the judge in x0-hat", log=False),
            out, "digits_confidence.png",
        ),
    ]  # fmt: skip
    schedule, images = fd.schedules.VP(), data.images[:64]
    forward = [images if t == 0 else noised(images, float(t), schedule) for t in np.linspace(0, 1, GIF_FRAMES)]
    names.append(save_gif([Image.fromarray(mosaic(x, 8)) for x in forward], out, "digits_forward.gif"))
    got = next(v for k, v in sampled.items() if k.startswith(SHOWN_REVERSE))
    frames = [
        Image.fromarray(np.concatenate([mosaic(x[:64], 8), mosaic(x0[:64], 8)], axis=1))
        for x, x0 in zip(got.trajectory.x, [*got.trajectory.x0, got.trajectory.x[-1]], strict=True)
    ]
    names.append(save_gif(frames, out, "digits_reverse.gif"))
    return names
