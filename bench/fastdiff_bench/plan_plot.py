"""Pictures of a plan (noise levels, the model's times, coefficients) and of a schedule. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import fastdiff as fd
from fastdiff.readout import ORDERS
from fastdiff_bench.plots import pyplot

__all__ = ["plot_plan", "plot_schedule"]

MOST_MARKERS = 80
POINTS = 401
TOKENS = {"A": "keeps", "b": "unmasks", "d": "block", "s": "temperature", "c_skip": "noise on scores"}
LARGE = 20  # levels beyond are drawn on a logarithmic axis


def plot_plan(plan: fd.Plan, path: Path) -> Path:
    """Draws a plan into a PNG, SVG or PDF (by the name's ending).

    Four panels over the rows: alpha and sigma with the end; half the log-SNR, ln(alpha / sigma); the update of slot 0
    (A, b, d, s); what the model receives as t.
    Raises: ValueError where matplotlib is missing or does not know the ending.
    """
    plt = pyplot()
    rows = np.arange(plan.nfe)
    marker = "o" if plan.nfe <= MOST_MARKERS else None
    style = {"marker": marker, "markersize": 3, "linewidth": 1.2}
    fig, ((levels, snr), (update, times)) = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    fig.suptitle(f"{plan.name}: {plan.nfe} evaluations, {plan.slots} slot{'s' * (plan.slots > 1)}", fontsize=12)

    ends = np.append(rows, plan.nfe)
    for name, values, end in (("alpha", plan.alpha, plan.end[0]), ("sigma", plan.sigma, plan.end[1])):
        levels.plot(ends, np.append(values, end), label=name, **style)
    if np.nanmax(plan.sigma) > LARGE:
        levels.set_yscale("symlog", linthresh=1e-2)
    levels.set_title("noise level before each row, and the end", loc="left", fontsize=10)

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(plan.alpha / plan.sigma)
    finite = np.isfinite(ratio)
    snr.plot(rows[finite], ratio[finite], color="#444444", **style)
    snr.set_title("ln(alpha / sigma)", loc="left", fontsize=10)

    terms = [(f"A{0}{j}  (S{j})", plan.A[:, 0, j]) for j in range(plan.slots)]
    terms += [("b  (p)", plan.b[:, 0]), ("d  (m)", plan.d[:, 0]), ("s  (n)", plan.s[:, 0])]
    said = "S0' = A S + b p + d m + s n"
    if plan.readout in ORDERS:
        terms = [(f"{name}  ({what})", getattr(plan, name).ravel()) for name, what in TOKENS.items()]
        said = "what becomes of tokens"
    for name, values in terms:
        if np.any(values):
            update.plot(rows, values, label=name, **style)
    update.set_title(said, loc="left", fontsize=10)
    largest = max(float(np.abs(v).max()) for _, v in terms)
    if largest > 50:
        update.set_yscale("symlog", linthresh=1.0)

    times.plot(rows, plan.times, color="#1f77b4", **style)
    times.set_title("t the model receives", loc="left", fontsize=10)
    for axis in (levels, snr, update, times):
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (update, times):
        axis.set_xlabel("row")
    return _saved(fig, path, legends=(levels, update))


def plot_schedule(schedule: Any, path: Path) -> Path:  # noqa: ANN401 - a Schedule, or Masked
    """Draws a schedule over its times into a PNG, SVG or PDF: alpha and sigma, and 2 ln(alpha / sigma).

    Of tokens: how many are what they are and how many are masked, and ln of their ratio.

    Raises: ValueError where matplotlib is missing or does not know the ending.
    """
    t = np.linspace(0.0, schedule.t_max, POINTS)
    tokens = isinstance(schedule, fd.schedules.Masked)
    alpha, sigma = schedule.alpha(t), schedule.masked(t) if tokens else schedule.sigma(t)
    with np.errstate(divide="ignore"):
        logsnr = np.log(alpha) - np.log(sigma) if tokens else schedule.logsnr(t)
    fig, (levels, snr) = pyplot().subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    fig.suptitle(str(schedule), fontsize=12)
    for name, values in (("alpha", alpha), ("masked" if tokens else "sigma", sigma)):
        levels.plot(t, values, label=name)
    if max(alpha.max(), sigma.max()) > LARGE:
        levels.set_yscale("symlog", linthresh=1e-2)
    levels.set_title("noise level", loc="left", fontsize=10)
    finite = np.isfinite(logsnr)
    snr.plot(t[finite], logsnr[finite], color="#444444")
    snr.set_title("ln(alpha / masked)" if tokens else "log-SNR, 2 ln(alpha / sigma)", loc="left", fontsize=10)
    for axis in (levels, snr):
        axis.set_xlabel("t")
    return _saved(fig, path, legends=(levels,))


def _saved(fig: Any, path: Path, *, legends: tuple[Any, ...]) -> Path:  # noqa: ANN401 - matplotlib's
    """Grids, legends, and the file."""
    for axis in fig.axes:
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in legends:
        axis.legend(frameon=False, fontsize=8)
    try:
        fig.savefig(path, dpi=120)
    except ValueError as error:
        raise ValueError(f"--plot: {error}") from None
    finally:
        pyplot().close(fig)
    return path
