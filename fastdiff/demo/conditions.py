"""Digits on a condition: real ones whose lower half is sampled anew, and the ten classes asked for by a gradient."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import fastdiff as fd
from fastdiff.demo.data import Digits
from fastdiff.demo.nets import PlanModel, Preconditioned
from fastdiff.demo.plots import mosaic, save_figure
from fastdiff.demo.report import Part

__all__ = ["run"]

Tensor = torch.Tensor
STEPS = 30
REAL, EACH = 100, 3  # held-out digits, completions of one
ROWS = 4  # of 8, known
PULL = 2.0  # scale of the gradient that draws the rest towards what is known
PER_CLASS = 30
MIN_KEPT, MIN_ASKED = 0.65, 0.95  # shares of the judge's classes: of the real digit's, of the one asked for
MAX_ERROR = 1e-5  # of a known pixel
SCHEDULE = fd.schedules.VP()


def run(out: Path, net: Preconditioned, data: Digits, judge: nn.Module, guide: nn.Module, *, seed: int) -> Part:
    """Complete and ask; `judge` and `guide` are classifiers that were trained apart."""
    part = Part()
    plan = fd.solvers.dpmpp_2m(SCHEDULE, STEPS, spacing="logsnr")
    model = PlanModel(net, plan)
    real = data.held_images[:REAL].repeat_interleave(EACH, dim=0)
    label = data.held_labels[:REAL].repeat_interleave(EACH)
    known = real.clone()
    known[..., ROWS:, :] = torch.nan
    completed = {}
    for name, scale in (("replacement", 0.0), ("with a pull", PULL)):
        pulled = fd.classifier_guidance(model, plan, _agreement, of="x0", scale=scale, given=("target",))
        completed[name] = fd.sample(
            fd.inpaint(pulled, plan), plan, tuple(real.shape), seed=seed, cond={"known": known, "target": real}
        )
    error = max(float((x - real)[..., :ROWS, :].abs().max()) for x in completed.values())
    kept = {name: _share(judge, x, label) for name, x in completed.items()}

    asked = torch.arange(10).repeat_interleave(PER_CLASS)
    guided = fd.classifier_guidance(model, plan, lambda x0, t, y: _log_class(guide, x0, y), of="x0", given=("y",))
    x = fd.sample(guided, plan, (len(asked), *real.shape[1:]), seed=seed, cond={"y": asked})
    share = _share(judge, x, asked)
    part.facts |= {"known_pixel_error": error, "asked_class": share}
    part.facts |= {"completed_class_replacement": kept["replacement"], "completed_class_pull": kept["with a pull"]}
    if not error <= MAX_ERROR:
        part.missed.append(f"digits: a known pixel moved by {error:.1e} > {MAX_ERROR:g}")
    if not kept["with a pull"] >= MIN_KEPT:
        part.missed.append(f"digits: completed ones keep their class in {kept['with a pull']:.1%} < {MIN_KEPT:.0%}")
    if not share >= MIN_ASKED:
        part.missed.append(f"digits: the class asked for in {share:.1%} < {MIN_ASKED:.0%}")
    part.pictures.append(save_figure(_figure(real, completed, kept, x, share), out, "digits_conditions.png"))
    return part


def _agreement(x0: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """log p of what is known, x0 being off by what the noise level leaves open; [B]."""
    alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    off = (x0 - target)[..., :ROWS, :] ** 2 * (alpha**2 + sigma**2) / (2 * sigma**2)
    return -off.sum(dim=(1, 2, 3))


def _log_class(guide: nn.Module, x0: Tensor, y: Tensor) -> Tensor:
    return F.log_softmax(guide(x0), dim=1).gather(1, y[:, None])[:, 0]


def _share(judge: nn.Module, x: Tensor, label: Tensor) -> float:
    """Of samples that the judge sees as their label."""
    with torch.no_grad():
        return (judge(x).argmax(dim=1) == label).float().mean().item()


def _figure(real: Tensor, completed: dict[str, Tensor], kept: dict[str, float], asked: Tensor, share: float) -> Figure:
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    masked = real[::EACH].clone()
    masked[..., ROWS:, :] = -0.6
    for axis, (name, x) in zip(axes, completed.items(), strict=False):
        lines = torch.stack([real[::EACH], masked, *(x[i::EACH] for i in range(EACH))], dim=1)[:10]
        axis.imshow(mosaic(lines.flatten(0, 1), 2 + EACH), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(
            f"real, its upper half, {EACH} completions\n{name}: {kept[name]:.0%} keep the class", fontsize=10
        )
    grid = asked.view(10, PER_CLASS, *asked.shape[1:])[:, :12]
    axes[2].imshow(mosaic(grid.flatten(0, 1), 12), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes[2].set_title(f"a class asked for, a line each, by a gradient\n{share:.0%} are seen as it", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    return figure
