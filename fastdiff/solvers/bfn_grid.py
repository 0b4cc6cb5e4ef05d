"""The grid of a Bayesian flow: from u = 0, where nothing is known, and the plan of a flow over classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fastdiff.plan import Plan
from fastdiff.prediction import Prediction
from fastdiff.readout import CATEGORICAL, DECIDED
from fastdiff.schedules import BFNDiscrete, Schedule

__all__ = ["count", "flow_plan", "flow_times", "on_classes", "require"]

FROM_NOTHING = ("x0", "v")  # predictions that mean something at alpha = sigma = 0, where they give x0 itself: +m, -m


def require(name: str, schedule: object, kind: type[Schedule]) -> None:
    """Refuses another schedule than the one a solver is made for."""
    if not isinstance(schedule, kind):
        raise TypeError(f"{name} needs a schedule of type {kind.__name__}, got {type(schedule).__name__}")


def count(name: str, value: object, low: int) -> int:
    """An integer option, at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return int(value)


def flow_times(schedule: Schedule, steps: int, t_start: float | None, start: int) -> np.ndarray:
    """The evaluation times 1, (n - 1)/n, ..., 0 from the start-th on, or those from t_start in as many intervals."""
    steps, start = count("steps", steps, 1), count("start", start, 0)
    if start > steps:
        raise ValueError(f"start must be <= {steps}, the number of intervals, got {start}")
    top = schedule.t_max if t_start is None else float(t_start)
    if not 0 < top <= schedule.t_max:
        raise ValueError(f"t_start must be in (0, {schedule.t_max:g}], got {t_start!r}")
    return top * np.arange(steps - start, -1, -1) / steps


def flow_plan(
    solver: Callable[..., Plan], schedule: Schedule, steps: int, *, prediction: Prediction, start: int = 0,
    t_start: float | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """A solver on the flow's own grid, u = 0, 1/n, ..., 1 and the clean end, whatever knows how to leave u = 0.

    At u = 0 the state is 0 for certain, so a first row from there is x' = alpha' p + sigma' n, whichever the solver. It
    is kept where the prediction has a meaning there; else p = 0 (Graves et al. 2023, algorithm 3, t < t_min) and the
    row is the start of the next one, N(0, sigma'^2).
    Args: solver(schedule, count, spacing=times, ...). start, t_start: see flow_times.
    """
    times = flow_times(schedule, steps, t_start, start)
    leaves = times[0] == schedule.t_max
    times = times[int(leaves) :]
    n = len(times) - (options.get("final", "zero") == "min")
    plan = solver(schedule, n, prediction=prediction, spacing=times, **options)
    return _from_nothing(plan, schedule, prediction) if leaves and prediction in FROM_NOTHING else plan


def _from_nothing(plan: Plan, schedule: Schedule, prediction: Prediction) -> Plan:
    """The plan with the row from alpha = sigma = 0 before it."""
    n, r = plan.nfe + 1, plan.slots

    def before(value: float, column: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((1, *column.shape[1:]), value), column])

    columns = {"t": schedule.t_max, "alpha": 0, "sigma": 0, "c_in": plan.c_in[0], "c_skip": 0, "lo": plan.lo[0]}
    columns |= {"hi": plan.hi[0], "c_out": float(np.sign(plan.c_out[0])), "A": 0, "b": 0, "s": 0, "d": 0}
    made: dict[str, Any] = {name: before(value, getattr(plan, name)) for name, value in columns.items()}
    made["times"] = before(float(schedule.model_time(schedule.t_max)), plan.times)
    made["b"][0, 0], made["s"][0, 0] = plan.alpha[0], plan.sigma[0]
    assert made["A"].shape == (n, r, r)
    return replace(plan, **made, init_scale=0.0, draws=np.append(plan.sigma[0] > 0, plan.draws))


def on_classes(plan: Plan, schedule: BFNDiscrete, readout: str, last_readout: str, name: str) -> Plan:
    """A plan of logits z as a plan of classes; K = 2 carries z_1 - z_0, whose noise is sqrt(2) larger."""
    if readout not in CATEGORICAL:
        raise ValueError(f"unknown readout {readout!r}; valid: {', '.join(CATEGORICAL)}")
    if last_readout not in DECIDED:
        raise ValueError(f"unknown last_readout {last_readout!r}; valid: {', '.join(DECIDED)}")
    wide = np.sqrt(2.0) if schedule.num_classes == 2 else 1.0
    return replace(
        plan, name=name, s=wide * plan.s, init_scale=float(wide * plan.init_scale), readout=readout,
        classes=int(schedule.num_classes), last_readout=last_readout,
    )  # fmt: skip
