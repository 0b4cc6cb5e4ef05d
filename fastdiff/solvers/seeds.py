"""SEEDS: exponential Runge-Kutta steps of the reverse SDE, whose stages share one noise path."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import Form, check_order, data
from fastdiff.solvers.multistep_sde import KINDS, nonnegative
from fastdiff.solvers.singlestep import Array, singlestep_plan

__all__ = ["seeds"]


def seeds(
    schedule: Schedule, steps: int, *, order: int = 2, eta: float = 1.0, s_noise: float = 1.0, kind: str = "midpoint",
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """SEEDS-k on x0: k evaluations a step, at lam + h/2 (k = 2) or lam + h/3 and lam + 2h/3 (k = 3).

        x' = (sigma'/sigma) e^(-eta h) x + alpha' H int_0^1 e^(-(1-u) H) x0(u) du + s_noise sigma' w,  H = (1 + eta) h
        w = e^(-eta (h - c)) w_c + sqrt(1 - e^(-2 eta (h - c))) n:  from a stage at lam + c on, with fresh n

    The noise of a stage is part of the end's: all stages see one path. A row that ends clean, or starts from zero
    signal, is first order. With k = 2 and eta = 1 it is dpmpp_sde(path="sde"), with eta = 0 dpm_solver.
    Args: order: 1..3; eta >= 0 (1: the reverse SDE); s_noise >= 0; kind: of k = 2, "midpoint" (phi_1 / 2 for phi_2) or
        "heun" (phi_2); of k = 3 "heun" also takes the second difference; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = k steps (k (steps - 1) + 1 with final="zero"), min(k, 2) slots; order k at eta = 0, else weak
        order min(k, 2).
    Source: Gonzalez et al. 2023, arXiv:2305.14267 (SEEDS-1 to 3, here on x0).
    """
    order = check_order("seeds", order, 3)
    eta, s_noise = nonnegative(eta=eta, s_noise=s_noise)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")

    def decay(h: Array) -> Array:
        return eta * h if eta > 0 else 0 * np.sign(h)  # h may be infinite

    def formula(alpha: Array, sigma: Array, alpha1: Array, sigma1: Array, h: Array) -> Form:
        H = h + decay(h)
        return Form(sigma1 / sigma * np.exp(-decay(h)), -alpha1 * np.expm1(-H), -H)

    def fresh(sigma1: Array, h: Array) -> Array:
        return s_noise * sigma1 * np.sqrt(-np.expm1(-2 * decay(h)))

    grid, exact = make_grid(schedule, steps, options), kind == "heun"
    return singlestep_plan(
        f"seeds(order={order}, eta={eta:g})", schedule, grid, order, formula, data,
        exact=exact, own=False, lower_final=False, fresh=fresh,
    )  # fmt: skip
