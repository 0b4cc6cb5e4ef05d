"""Where a solver evaluates the model: spacings, and the points of a grid with everything known about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TypedDict, get_type_hints

import numpy as np

from fastdiff.prediction import Conversion, Prediction, conversion
from fastdiff.schedules import Betas, Flow, Schedule
from fastdiff.spacing import AYS, RAMPS, RHO, ramp

__all__ = ["SPACINGS", "Grid", "GridOptions", "Points", "make_grid", "points"]

Array = np.ndarray
SPACINGS = ("linspace", "leading", "trailing", *RAMPS, *AYS)
OUTSIDE = 1e-2  # how far, relatively, a given noise level may lie beyond a schedule's ends and is moved onto them


class GridOptions(TypedDict, total=False):
    """The options every solver takes.

    prediction: eps | x0 | v | score | flow | edm, or a function (alpha, sigma) -> (c_skip, c_out); default eps.
    clip: None or (lo, hi), the clamp of the predicted x0.
    spacing: linspace | leading | trailing (times), karras | exponential | logsnr | lu | polyexponential | beta |
        ays_sd15 | ays_sdxl | ays_svd (noise levels: fastdiff.spacing.ramp), or a decreasing array of schedule times.
    rho: the exponent of karras (7) or polyexponential (1). steps_offset: added to the times of leading.
    sigmas: in place of spacing, the noise levels themselves, sigma/alpha (Flow: sigma), decreasing; a final 0 is the
        clean end of final="zero".
    final: "zero" (the last row returns x0-hat) or "min" (the last point is the schedule's t_end).
    start: skip the first `start` intervals (image-to-image).
    t_start, t_end: override the schedule's first and last time; not with sigmas, ays_* or an array, which say both.
    sign: -1 for models that return minus the prediction. sigma_data: std of the data (prediction="edm", whose model
        receives ln(sigma / alpha) / 4 as t, not the schedule's model_time).
    """

    prediction: Prediction
    clip: tuple[float, float] | None
    spacing: str | Sequence[float] | Array | None
    rho: float | None
    steps_offset: int
    sigmas: Sequence[float] | Array | None
    final: str
    start: int
    t_start: float | None
    t_end: float | None
    sign: int
    sigma_data: float | None


@dataclass(frozen=True)
class Points:
    """Points of a schedule: [N] float64 arrays, and what the model needs there."""

    t: Array
    alpha: Array
    sigma: Array
    lam: Array  # ln(alpha / sigma)
    times: Array  # what the model receives: int64 or float64
    convert: Conversion
    clip: tuple[float, float]

    def take(self, index: Array) -> Points:
        """The same points in another order or number (two-evaluation methods)."""
        convert = Conversion(*(c[index] for c in self.convert))
        arrays = {name: getattr(self, name)[index] for name in ("t", "alpha", "sigma", "lam", "times")}
        return replace(self, convert=convert, **arrays)


@dataclass(frozen=True)
class Grid:
    """The evaluation points of a plan and, as entry N of alpha, sigma, lam and t, the end of its last interval."""

    at: Points  # [N]
    t: Array  # [N + 1]; nan where the end is not a time of the schedule
    alpha: Array  # [N + 1]
    sigma: Array  # [N + 1]
    lam: Array  # [N + 1]
    points: Callable[[Array], Points]  # the schedule at other times, with the same options

    def require_signal(self, name: str) -> None:
        """Refuses a grid that starts from zero signal, where sigma/alpha is infinite."""
        if np.any(self.alpha == 0):
            raise ValueError(
                f"{name} integrates in sigma/alpha and cannot start from zero signal (alpha = 0 at "
                f"t = {self.t[self.alpha == 0][0]:g}); use ddim, ddpm or dpmpp_2m, or an earlier start"
            )

    @property
    def h(self) -> Array:
        """[N] steps in lam = ln(alpha / sigma); inf from zero signal or to zero noise."""
        with np.errstate(invalid="ignore"):
            return np.diff(self.lam)

    @property
    def end(self) -> tuple[float, float]:
        """(alpha, sigma) after the last row."""
        return float(self.alpha[-1]), float(self.sigma[-1])

    @property
    def clean(self) -> bool:
        """Does the last interval end without noise?"""
        return self.sigma[-1] == 0


def _log_ratio(alpha: Array, sigma: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(alpha == 0, -np.inf, np.log(alpha) - np.log(sigma))


def points(
    schedule: Schedule,
    t: Array,
    *,
    prediction: Prediction = "eps",
    clip: tuple[float, float] | None = None,
    sign: int = 1,
    sigma_data: float | None = None,
) -> Points:
    """The schedule at times t [N], with the conversion of `prediction` there."""
    alpha, sigma = schedule.alpha_sigma(t)
    data: object = sigma_data if sigma_data is not None else getattr(schedule, "sigma_data", 0.5)
    if isinstance(data, bool) or not isinstance(data, Real) or not 0 < float(data) < np.inf:
        raise ValueError(f"sigma_data must be a finite number > 0, got {data!r}")
    convert = conversion(prediction, alpha, sigma, sigma_data=float(data), sign=sign)
    times = np.log(sigma / alpha) / 4 if prediction == "edm" else schedule.model_time(t)
    return Points(t, alpha, sigma, _log_ratio(alpha, sigma), times, convert, _clip(clip))


def _clip(clip: tuple[float, float] | None) -> tuple[float, float]:
    if clip is None:
        return -np.inf, np.inf
    try:
        lo, hi = map(float, clip)
    except (TypeError, ValueError):
        raise TypeError(f"clip must be None or (lo, hi), got {clip!r}") from None
    if not lo < hi:
        raise ValueError(f"clip must be (lo, hi) with lo < hi, got {clip!r}")
    return lo, hi


def _integer(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return int(value)


def _betas_times(spacing: str, steps: int, top: float, low: float, final: str, offset: int) -> Array:
    """Evaluation times of a chain of T betas, as integers; final="min" appends t_end."""
    for name, value in (("t_start", top), ("t_end", low)):
        if value != round(value):
            raise ValueError(f"{name} must be one of the chain's times, an integer, with {spacing!r}, got {value:g}")
    T = round(top) + 1
    if steps > T - round(low):
        raise ValueError(f"steps must be <= {T - round(low)}, the number of times of this chain, got {steps}")
    if spacing == "trailing":
        t = np.round(np.arange(steps, 0, -1) * (T / steps)) - 1
    elif spacing == "leading":
        t = np.arange(steps)[::-1] * float(T // steps) + offset
        if t[0] > top:
            raise ValueError(f"steps_offset={offset} puts the first time, {t[0]:g}, beyond the chain's last, {top:g}")
    else:
        t = np.round(np.linspace(top, low, steps + (final == "min")))
    t = np.maximum(t, low)
    if (left := len(np.unique(t))) < len(t):
        raise ValueError(
            f"spacing {spacing!r} of this chain has {left} of {steps} times down to t_end={low:g}; take linspace"
        )
    return np.append(t, low) if final == "min" and spacing != "linspace" else t


def _ratio(schedule: Schedule, t: Array) -> Array:
    alpha, sigma = schedule.alpha_sigma(t)
    with np.errstate(divide="ignore", invalid="ignore"):  # inf also where a Bayesian flow knows nothing, sigma = 0
        return np.where(alpha == 0, np.inf, sigma / alpha)


def _times_of(what: str, schedule: Schedule, ratio: Array) -> Array:
    """The times of given sigma/alpha; levels a little beyond the schedule's ends move onto them."""
    low, high = _ratio(schedule, np.array([0.0, schedule.t_max]))
    bad = (ratio < low * (1 - OUTSIDE)) | (ratio > high * (1 + OUTSIDE)) | np.isnan(ratio)
    with np.errstate(divide="ignore"):
        t = np.clip(schedule.t_of(-2 * np.log(np.clip(ratio, low, high))), 0, schedule.t_max)
    # between a chain's last two times, where the last has no signal, there is nothing
    bad[~bad] = ~np.isclose(_ratio(schedule, t[~bad]), ratio[~bad], rtol=2 * OUTSIDE, atol=0)
    if np.any(bad):
        raise ValueError(
            f"{what}: sigma/alpha = {ratio[bad][0]:g} is not on the schedule, which goes from {high:g} to {low:g}"
        )
    return t


def _sigmas_times(schedule: Schedule, sigmas: Sequence[float] | Array, steps: int, final: str) -> Array:
    levels = np.asarray(sigmas, np.float64)
    if final == "zero" and levels.ndim == 1 and len(levels) == steps + 1 and levels[-1] == 0:
        levels = levels[:-1]
    count = steps + (final == "min")
    if levels.ndim != 1 or len(levels) != count:
        raise ValueError(f"sigmas needs {count} values for steps={steps}, final={final!r}, got shape {levels.shape}")
    if isinstance(schedule, Flow):
        if np.any(levels > 1):
            raise ValueError(f"sigmas: {levels[levels > 1][0]:g} is not on {schedule}, whose sigma goes from 1 to 0")
        with np.errstate(divide="ignore"):
            levels = levels / (1 - levels)
    return _times_of("sigmas", schedule, levels)


def _spaced(
    schedule: Schedule, spacing: str, steps: int, top: float, low: float, final: str, options: GridOptions
) -> Array:
    count, rho = steps + (final == "min"), options.get("rho")
    if spacing in AYS:
        return _times_of(f"spacing {spacing!r}", schedule, ramp(spacing, 0, 0, steps, end=final == "min", rho=None))
    if spacing in RAMPS:
        high, least = _ratio(schedule, np.array([top, low]))
        if not np.isfinite(high) or least == 0:
            raise ValueError(
                f"spacing {spacing!r} needs finite sigma/alpha > 0 at both ends, got {high:g} and {least:g}; "
                f"give t_start or t_end, or take spacing='linspace'"
            )
        ratio = ramp(spacing, float(high), float(least), steps, end=final == "min", rho=rho)
        t = np.clip(schedule.t_of(-2 * np.log(ratio)), low, top)
        t[[0, -1]] = (top, low) if count > 1 else (top, top)
        return t
    if isinstance(schedule, Betas):
        return _betas_times(spacing, steps, top, low, final, options.get("steps_offset", 0))
    if spacing == "trailing":
        if final == "zero" and options.get("t_end") is not None:
            raise ValueError(
                f"spacing 'trailing' with final='zero' ends at t_start/steps = {top / steps:g}, got "
                f"t_end={options['t_end']!r}; give final='min', or take spacing='linspace'"
            )
        return top - (top - (low if final == "min" else 0.0)) * np.arange(count) / steps
    if spacing == "leading":
        raise ValueError(
            f"spacing 'leading' is defined on a chain of betas only; valid here: "
            f"{', '.join(s for s in SPACINGS if s != 'leading')}"
        )
    return np.linspace(top, low, count) if count > 1 else np.array([top])


def _check_spacing_options(spacing: object, options: GridOptions) -> None:
    rho = options.get("rho")
    if rho is not None and (spacing not in RHO or not isinstance(rho, Real) or not 0 < rho < np.inf):
        raise ValueError(f"rho must be > 0 and belongs to spacing {' and '.join(RHO)}, got rho={rho!r}, {spacing!r}")
    if _integer("steps_offset", options.get("steps_offset", 0), 0) and spacing != "leading":
        raise ValueError(f"steps_offset belongs to spacing 'leading', got spacing={spacing!r}")
    if options.get("sigmas") is not None and spacing is not None:
        raise ValueError("give either sigmas or spacing, got both")
    fixed = "sigmas" if options.get("sigmas") is not None else spacing
    if fixed in ("sigmas", "an array", *AYS):
        for name in ("t_start", "t_end"):
            if (value := options.get(name)) is not None:
                raise ValueError(
                    f"{name} has no meaning with {fixed}, whose ends are given: leave out {name}={value!r}"
                )


def _times(schedule: Schedule, steps: int, final: str, options: GridOptions) -> Array:
    """Evaluation times, and with final="min" the end point behind them."""
    spacing, sigmas = options.get("spacing"), options.get("sigmas")
    t_start, t_end = options.get("t_start"), options.get("t_end")
    _check_spacing_options(spacing if isinstance(spacing, str | None) else "an array", options)
    if sigmas is not None:
        return _sigmas_times(schedule, sigmas, steps, final)
    if spacing is not None and not isinstance(spacing, str):
        t = np.asarray(spacing, np.float64)
        if t.ndim != 1 or len(t) != steps + (final == "min"):
            raise ValueError(
                f"spacing as an array needs {steps + (final == 'min')} times for steps={steps}, final={final!r}, "
                f"got shape {t.shape}"
            )
        return t
    spacing = spacing or ("trailing" if isinstance(schedule, Betas) else "linspace")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; valid: {', '.join(SPACINGS)}, or an array of times")
    top = schedule.t_start(options.get("prediction", "eps")) if t_start is None else float(t_start)
    low = schedule.t_end(steps) if t_end is None else float(t_end)
    if (steps > 1 or final == "min") and not low < top:
        hint = "; t_end is 1/steps here by default: give t_end, or final='zero'" if t_end is None else ""
        raise ValueError(f"t_end must be < t_start, got t_start={top:g}, t_end={low:g}{hint}")
    for name, value in (("t_start", top), ("t_end", low)):
        if options.get(name) is not None and not 0 <= value <= schedule.t_max:
            raise ValueError(f"{name} must be in [0, {schedule.t_max:g}], got {value:g}")
    if isinstance(schedule, Betas) and t_start is not None and spacing in ("trailing", "leading"):
        raise ValueError(
            f"spacing {spacing!r} of a chain starts at its last time; use linspace with t_start, or start=k"
        )
    return _spaced(schedule, spacing, steps, top, min(low, top), final, options)


def make_grid(schedule: Schedule, steps: int, options: GridOptions) -> Grid:
    """The grid of a solver: `steps` intervals of the schedule.

    final="zero": `steps` evaluation times t_start..t_end, then the clean end (1, 0). final="min": steps + 1 points,
    the last is t_end and is not evaluated. Repeated noise levels are merged (fewer evaluations).
    Args: schedule; steps >= 1; options: see GridOptions.
    Returns: Grid. Raises: TypeError / ValueError for anything outside what is described.
    """
    valid = tuple(get_type_hints(GridOptions))
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; valid: {', '.join(valid)}")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastdiff.schedules.Schedule, got {type(schedule).__name__}")
    steps, start = _integer("steps", steps, 1), _integer("start", options.get("start", 0), 0)
    final = options.get("final", "zero")
    if final not in ("zero", "min"):
        raise ValueError(f"unknown final {final!r}; valid: zero, min")
    t = _times(schedule, steps, final, options)
    alpha, sigma = schedule.alpha_sigma(t)
    if not (np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma))):
        raise ValueError(f"the schedule {schedule} is not finite on the grid t = {t}")
    if final == "zero":
        t, alpha, sigma = np.append(t, np.nan), np.append(alpha, 1.0), np.append(sigma, 0.0)
    lam = _log_ratio(alpha, sigma)
    with np.errstate(invalid="ignore"):
        step = np.diff(lam)
    if np.any(step < 0):
        i = int(np.flatnonzero(step < 0)[0])
        raise ValueError(f"noise must decrease along the grid, but it grows from t={t[i]:g} to t={t[i + 1]:g}")
    keep = np.append(True, step > 0)
    if final == "zero":  # the end must stay (1, 0) even where the last time already has no noise
        keep[-1], keep[:-1] = True, keep[:-1] & (sigma[:-1] > 0)
    keep &= (alpha > 0) | (sigma > 0)  # where nothing is known no step starts
    if keep.sum() < 2:
        raise ValueError(f"no interval is left of the grid t = {t}: nothing is known there, or there is no noise")
    t, alpha, sigma, lam = (v[keep] for v in (t, alpha, sigma, lam))
    if start >= len(t) - 1:
        raise ValueError(f"start must be < {len(t) - 1}, the number of intervals, got {start}")
    t, alpha, sigma, lam = (v[start:] for v in (t, alpha, sigma, lam))
    at = partial(
        points, schedule, prediction=options.get("prediction", "eps"), clip=options.get("clip"),
        sign=options.get("sign", 1), sigma_data=options.get("sigma_data"),
    )  # fmt: skip
    return Grid(at(t[:-1]), t, alpha, sigma, lam, at)
