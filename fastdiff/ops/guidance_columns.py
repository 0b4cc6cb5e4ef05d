"""Guidance that is a column of a plan, a weight of its own for every row: intervals and CFG++."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real

import numpy as np

from fastdiff.plan import Plan

__all__ = ["cfg_plus_plus", "guidance_interval"]

FORM = 1e-9  # how far, relatively, a row may be from a first-order step that keeps the mean


def guidance_interval(plan: Plan, w: float, start: float, end: float) -> Plan:
    """The plan with guidance w where its schedule time lies in an interval, and none (w = 1) elsewhere.

        w_i = w where min(start, end) <= t_i <= max(start, end), else 1

    Args: plan: any. w: the weight. start, end: schedule times (plan.t), in either order.
    Returns: Plan whose column `guidance` is [N]; sampling uses it where guidance is not given.
    Raises: TypeError: no plan. ValueError: w, start or end not a finite number.
    Source: Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5.
    """
    _plan(plan)
    for name, value in (("w", w), ("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    inside = (plan.t >= min(start, end)) & (plan.t <= max(start, end))
    return replace(plan, guidance=np.where(inside, float(w), 1.0))


def cfg_plus_plus(plan: Plan, scale: float) -> Plan:
    """The plan with CFG++'s weights: the guided x0 goes on with the noise that the unconditional model saw.

        x' = alpha' (p_u + scale (p_c - p_u)) + sigma_down eps_u + s n
           = the row itself with guidance w = scale alpha' / b,   b = alpha' - alpha sigma_down / sigma, of x0

    So it costs nothing beside guidance: sampling takes the weights where it is given none. They are CFG++'s for plain
    guidance alone: a threshold or another rule would act on the row's weight, not on scale.
    Args: plan: one slot, of a solver whose rows are x' = (sigma_down / sigma) x + b x0 + s n (ddim, ddpm, euler,
        euler_ancestral), without a clamp. scale: the paper's lambda, finite, in [0, 1] as a rule.
    Returns: the plan with its column `guidance`, [nfe].
    Raises: TypeError, ValueError: a scale that is no finite number, another kind of plan.
    Source: Chung et al. 2024, arXiv:2406.08070, algorithm 2.
    """
    _plan(plan)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if plan.readout != "affine":
        raise ValueError(f"CFG++ is defined for predictions of numbers, plan {plan.name!r} predicts classes or bins")
    if plan.slots > 1:
        raise ValueError(f"CFG++ needs rows that see one prediction, plan {plan.name!r} has {plan.slots} slots")
    if plan.clamped:
        raise ValueError(f"CFG++ has no weights for a clamped x0; build plan {plan.name!r} with clip=None")
    alpha = np.append(plan.alpha, plan.end[0])
    of_m = np.divide(plan.d[:, 0], plan.c_out, out=np.zeros(plan.nfe), where=plan.d[:, 0] != 0)
    of_x, b = plan.A[:, 0, 0] - of_m * plan.c_skip, plan.b[:, 0] + of_m
    off = np.abs(of_x * alpha[:-1] + b - alpha[1:])
    if not np.all(off <= FORM * (alpha[1:] + np.abs(b))) or np.any(b == 0):
        raise ValueError(
            f"CFG++ needs rows (sigma_down / sigma) x + b x0 + s n that keep the mean, not those of {plan.name!r}: "
            f"use ddim, ddpm, euler or euler_ancestral"
        )
    return replace(plan, guidance=float(scale) * alpha[1:] / b)


def _plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a fastdiff.Plan, got {type(plan).__name__}")
