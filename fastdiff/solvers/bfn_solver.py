"""BFN-Solver: the Bayesian flow as a reverse SDE or a probability flow, by Euler or exponential integrators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fastdiff.grid import points
from fastdiff.plan import Plan
from fastdiff.schedules import BFNContinuous, BFNDiscrete, Schedule
from fastdiff.solvers.bfn_grid import flow_plan, flow_times, on_classes
from fastdiff.solvers.ddpm import ddim, ddpm
from fastdiff.solvers.dpmpp import dpmpp_2m
from fastdiff.solvers.multistep_sde import dpmpp_2m_sde
from fastdiff.solvers.sde import euler_maruyama, probability_flow

__all__ = ["METHODS", "bfn_solver"]

Array = np.ndarray
CONTINUOUS: dict[str, Callable[..., Plan]] = {
    "sde_euler": euler_maruyama,
    "ode_euler": probability_flow,
    "sde_bfn_solver1": ddpm,
    "sde_bfn_solver2": dpmpp_2m_sde,
    "bfn_solver1": partial(ddim, eta=0.0),
    "bfn_solver2": dpmpp_2m,
}
METHODS = tuple(CONTINUOUS)


def _rows(method: str, c: float, u: Array) -> tuple[Array, Array, Array, Array]:
    """A, b, weight of p_prev and s [n] of the rows u[k] -> u[k + 1] on logits, c = K beta_1.

        SDE:  dz = 2 c u p du + sqrt(2 c u) dW              (f z and the score's z cancel)
        ODE:  dz = (z/u + c u p) du, so d(z/u) = c p du
    Second order: p is a line through its last two values, integrated exactly.
    """
    v, w = u[:-1], u[1:]
    h = w - v
    one, none = np.ones(len(h)), np.zeros(len(h))
    before = np.append(np.inf, h[:-1])  # no history before the first row
    known = c * (w * w - v * v)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = w / v
    if method == "sde_euler":
        A, b, e, s = one, 2 * c * v * h, none, np.sqrt(2 * c * v * h)
    elif method == "ode_euler":
        A, b, e, s = ratio, c * v * h, none, none
    elif method.startswith("sde"):
        A, b, s = one, known, np.sqrt(known)
        e = c * h * h * (2 * w + v) / (3 * before) if method.endswith("2") else none
    else:
        A, b, s = ratio, c * w * h, none
        e = c * w * h * h / (2 * before) if method.endswith("2") else none
    if v[0] == 0:  # nothing is known: the first row is exact in p's place, alpha' p + sigma' n
        A, b, s = A.copy(), b.copy(), s.copy()
        A[0], b[0], s[0] = 0, known[0], np.sqrt(known[0])
    return A, b + e, e, s


def _on_logits(schedule: BFNDiscrete, steps: int, method: str, t_start: float | None, start: int) -> Plan:
    t = flow_times(schedule, steps, t_start, start)
    n, r = len(t), 1 + method.endswith("2")
    A, b, s = np.zeros((n, r, r)), np.zeros((n, r)), np.zeros((n, r))
    if n > 1:
        A[:-1, 0, 0], b[:-1, 0], e, s[:-1, 0] = _rows(method, schedule.scale, 1 - t)
        if r > 1:
            A[:-1, 0, 1], b[:, 1] = -e, 1
    b[-1, 0] = 1
    return Plan.of(f"bfn_solver({method})", points(schedule, t, prediction="x0"), A, b, s=s)


def bfn_solver(
    schedule: Schedule, steps: int, *, method: str = "sde_bfn_solver2", readout: str = "mean",
    last_readout: str = "sample", start: int = 0, t_start: float | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """BFN-Solver for continuous data (BFNContinuous) and for classes (BFNDiscrete).

        sde_euler, ode_euler          Euler of the reverse SDE, of the probability flow, in time
        sde_bfn_solver1, bfn_solver1  exact for a constant p
        sde_bfn_solver2, bfn_solver2  exact for a p that is a line through its last two values (the paper's 2++):
                                      in ln(alpha/sigma) for continuous data, in u for classes

    Time here is t = 1 - u, u the flow's own time that the model receives; it is the time of the paper, in which u runs
    backwards. On logits the SDE is dz = 2 K beta_1 u p du + sqrt(2 K beta_1 u) dW and the flow d(z/u) = K beta_1 p du.
    Args:
        method: as above. readout: of classes, mean (softmax; what the orders hold for) or sample. last_readout: sample
        or argmax, the class of the last call. start: skip this many intervals. t_start: the first time, where the state
        is N(0, sigma^2); by default the flow's start, at which the first row is alpha' p + sigma' n, exact for
        constant p, for the flow too. For continuous data also prediction, clip, final, sign, sigma_data.
    Returns: Plan of `steps` intervals, nfe = steps + 1; steps for continuous data with predictions other than x0 and v
        from the flow's start (see bfn_continuous). 1 slot; 2 for the second order. Orders 1 and 2 (weak for the SDE).
    Raises: TypeError, ValueError for another schedule, method, readout, number or option.
    Source: Xue et al. 2024, arXiv:2404.15766, sections 4 and 5. The authors' code starts at u = 1e-5 or so, and its
        SDE-Euler for text returns the logits in place of the state in all rows but the last.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; valid: {', '.join(METHODS)}")
    if isinstance(schedule, BFNDiscrete):
        if options:
            valid = "method, readout, last_readout, start, t_start"
            raise TypeError(f"unknown option {next(iter(options))!r} for classes; valid: {valid}")
        plan = _on_logits(schedule, steps, method, t_start, start)
        return on_classes(plan, schedule, readout, last_readout, plan.name)
    if not isinstance(schedule, BFNContinuous):
        raise TypeError(f"bfn_solver needs BFNContinuous or BFNDiscrete, got {type(schedule).__name__}")
    if (readout, last_readout) != ("mean", "sample"):
        raise ValueError("readout and last_readout belong to BFNDiscrete; continuous data has neither")
    if {"spacing", "sigmas", "t_end"} & options.keys():
        raise TypeError("bfn_solver has a grid of its own, u = 0, 1/n, ..., 1: no spacing, no sigmas, no t_end")
    options = {"prediction": "eps", **options}
    plan = flow_plan(CONTINUOUS[method], schedule, steps, start=start, t_start=t_start, **options)
    return replace(plan, name=f"bfn_solver({method})")
