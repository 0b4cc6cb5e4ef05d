"""DPM-Solver and DPM-Solver++ of orders 1 to 3, single- and multistep, on eps or on x0."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.phi import quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.dpmpp import published
from fastdiff.solvers.multistep import (
    adams_plan,
    check_order,
    data,
    data_form,
    few_steps,
    noise,
    noise_form,
    orders,
    weights,
)
from fastdiff.solvers.singlestep import singlestep_plan

__all__ = ["dpm_solver"]

KINDS, ALGORITHMS = ("singlestep", "multistep"), ("dpmsolver++", "dpmsolver")
TYPES, NODES = ("midpoint", "heun"), ("lambda", "grid")


def _heun(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    return quadrature(nodes, z) if nodes.shape[1] == 2 else published(nodes, z)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise ValueError(f"dpm_solver: unknown {name} {value!r}; valid: {', '.join(valid)}")
    return value


def dpm_solver(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    kind: str = "singlestep",
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    nodes: str = "lambda",
    lower_order_final: bool = True,
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver-k: exponential integrators in lam = ln(alpha/sigma), on x0 (dpmsolver++) or on eps (dpmsolver).

        dpmsolver++: x' = (sigma'/sigma) x + alpha' h int_0^1 e^(-(1-u) h) x0(u) du
        dpmsolver:   x' = (alpha'/alpha) x - sigma' h int_0^1 e^((1-u) h) eps(u) du

    singlestep: k evaluations an interval, at lam + h/2 (k = 2) or lam + h/3 and lam + 2h/3 (k = 3); multistep: one,
    and the values of the rows before. A row that ends clean, or starts from zero signal, is first order.
    Args:
        order: 1..3. kind: "singlestep" | "multistep". algorithm: "dpmsolver++" | "dpmsolver".
        solver_type: "midpoint" (phi_1/2 for phi_2 in second order; singlestep third order without second difference) or
        "heun" (the polynomial's exact integral).
        nodes: singlestep only. "lambda": steps are intervals. "grid": steps are evaluations, in groups of k; the inner
        points are the grid's own, and the last groups may be shorter (diffusers).
        lower_order_final: multistep with fewer than 15 steps falls to first order at the end; nodes="grid": no group of
        k at the end. The rest: fastdiff.grid.GridOptions.
    Returns: Plan. singlestep: nfe = k steps (k (steps - 1) + 1 with final="zero"), min(k, 2) slots, order k.
        multistep: nfe = steps, k slots, order min(k, 2).
    Raises: ValueError for dpmsolver from zero signal.
    Source: Lu et al. 2022, arXiv:2206.00927, algorithms 1, 2 (dpmsolver); arXiv:2211.01095, algorithms 1, 2.
    """
    order, kind = check_order("dpm_solver", order, 3), _one_of("kind", kind, KINDS)
    algorithm, solver_type = _one_of("algorithm", algorithm, ALGORITHMS), _one_of("solver_type", solver_type, TYPES)
    if _one_of("nodes", nodes, NODES) != "lambda" and kind != "singlestep":
        raise ValueError(f"nodes={nodes!r} goes with kind='singlestep', got {kind!r}")
    name = f"dpm_solver({algorithm}, order={order}, {kind})"
    grid = make_grid(schedule, steps, options)
    on_noise = algorithm == "dpmsolver"
    if on_noise:
        grid.require_signal(name)
    formula = noise_form if on_noise else data_form
    exact = solver_type == "heun"
    if kind == "singlestep":
        own = nodes == "grid"
        value = (lambda at: noise(at, options)) if on_noise else data
        return singlestep_plan(
            name, schedule, grid, order, formula, value, exact=exact, own=own, lower_final=lower_order_final
        )
    form = formula(grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], grid.h)
    few = lower_order_final and few_steps(grid, options)
    known = orders(grid, order, lower_final=few)
    w = weights(known, grid.lam, form.z, _heun if exact else published)
    return adams_plan(name, grid, form, noise(grid.at, options) if on_noise else data(grid.at), w)
