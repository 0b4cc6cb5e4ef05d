"""Adams-Bashforth and its relatives on eps: LMS in sigma/alpha, DEIS in ln(sigma/alpha), iPNDM in the step's index."""

from __future__ import annotations

from numbers import Real
from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Flow, Schedule
from fastdiff.solvers.multistep import (
    Form,
    Value,
    adams_plan,
    check_order,
    few_steps,
    noise,
    noise_form,
    orders,
    weights,
)

__all__ = ["deis", "gradient_estimation", "ipndm", "lms"]


def _noise_form(grid: Grid) -> Form:
    return noise_form(grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], grid.h)


def lms(schedule: Schedule, steps: int, *, order: int = 4, **options: Unpack[GridOptions]) -> Plan:
    """Linear multistep (Adams-Bashforth with unequal steps) on d(x/alpha) / d(sigma/alpha) = eps.

        y' = y + sum_j eps_j int_r^r' L_j(s) ds,   y = x/alpha, r = sigma/alpha, L_j: Lagrange's polynomials

    On Flow: dx/dsigma = eps - x0 in place of it, with nodes in sigma. The integrals are closed forms.
    Args: order: 1..4, lower in the first rows; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, `order` slots; the order measured is 2, >= 2.4 and >= 2.2 for 2, 3 and 4 (the first
        rows are of lower order). Raises: ValueError for a start of zero signal, but on Flow.
    Source: k-diffusion's sample_lms; Hairer, Norsett, Wanner, Solving ODEs I, section III.5.
    """
    order, grid = check_order("lms", order, 4), make_grid(schedule, steps, options)
    alpha, sigma, n = grid.alpha, grid.sigma, len(grid.at.t)
    flat = np.zeros(n)
    v = noise(grid.at, options)
    if isinstance(schedule, Flow):
        v = Value(v.x, v.p - 1, v.m)  # eps - x0
        x, form = sigma, Form(flat + 1, np.diff(sigma), flat)
    else:
        grid.require_signal("lms")
        x = sigma / alpha
        form = Form(alpha[1:] / alpha[:-1], alpha[1:] * np.diff(x), flat)
    known = np.minimum(order, np.arange(n) + 1)
    return adams_plan(f"lms(order={order})", grid, form, v, weights(known, x, flat))


def deis(
    schedule: Schedule, steps: int, *, order: int = 2, lower_order_final: bool = True, **options: Unpack[GridOptions]
) -> Plan:
    """DEIS, multistep: the exact integral of eps as a polynomial in ln(rho), rho = sigma/alpha.

        x' = (alpha'/alpha) x + alpha' sum_j eps_j int_rho^rho' L_j(ln s) ds

    An exponential Adams method in lam = -ln(rho); first order in a row that ends clean.
    Args: order: 1..3; lower_order_final: fall to first order at the end with fewer than 15 steps; the rest:
        fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, `order` slots, order 1, 2 and (after the first-order start) 2 to 3.
    Raises: ValueError for a start of zero signal.
    Source: Zhang and Chen 2023, arXiv:2204.13902, eq. 15 (tAB-DEIS, here in ln(rho)).
    """
    order, grid = check_order("deis", order, 3), make_grid(schedule, steps, options)
    grid.require_signal("deis")
    few = lower_order_final and few_steps(grid, options)
    form, known = _noise_form(grid), orders(grid, order, lower_final=few)
    w = weights(known, grid.lam, form.z)
    return adams_plan(f"deis(order={order})", grid, form, noise(grid.at, options), w)


def ipndm(schedule: Schedule, steps: int, *, order: int = 4, **options: Unpack[GridOptions]) -> Plan:
    """iPNDM: DDIM's update with Adams-Bashforth's combination of eps, as if the steps were equal.

        e = eps, (3 eps - e_1)/2, (23 eps - 16 e_1 + 5 e_2)/12, (55 eps - 59 e_1 + 37 e_2 - 9 e_3)/24
        x' = (alpha'/alpha) x - (alpha' sigma/alpha - sigma') e

    Args: order: 1..4, lower in the first rows; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, `order` slots, order min(order, 2).
    Raises: ValueError for a start of zero signal.
    Source: Zhang and Chen 2023, arXiv:2204.13902, section 4 (iPNDM).
    """
    order, grid = check_order("ipndm", order, 4), make_grid(schedule, steps, options)
    grid.require_signal("ipndm")
    n = len(grid.at.t)
    known = np.minimum(order, np.arange(n) + 1)
    w = weights(known, np.arange(n + 1.0), np.zeros(n))
    return adams_plan(f"ipndm(order={order})", grid, _noise_form(grid), noise(grid.at, options), w)


def gradient_estimation(schedule: Schedule, steps: int, *, gamma: float = 2.0, **options: Unpack[GridOptions]) -> Plan:
    """Gradient estimation: DDIM's update with eps moved away from the one before, as if it erred like a projection.

        e = gamma eps + (1 - gamma) eps_prev,   x' = (alpha'/alpha) x - (alpha' sigma/alpha - sigma') e

    The first row and a row that ends clean are DDIM's. On Flow too eps is along sigma/alpha.
    Args: gamma: finite, 1 is DDIM, 1.5 iPNDM's second order; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 2 slots, order 1. Raises: ValueError for a start of zero signal.
    Source: Permenter and Yuan 2023, arXiv:2306.04848 (their second-order sampler).
    """
    if isinstance(gamma, bool) or not isinstance(gamma, Real) or not np.isfinite(gamma):
        raise ValueError(f"gamma must be a finite number, got {gamma!r}")
    gamma, grid = float(gamma), make_grid(schedule, steps, options)
    grid.require_signal("gradient_estimation")
    w = np.tile([gamma, 1.0 - gamma], (len(grid.at.t), 1))
    w[orders(grid, 2, lower_final=False) < 2] = 1, 0
    return adams_plan(f"gradient_estimation(gamma={gamma:g})", grid, _noise_form(grid), noise(grid.at, options), w)
