"""ER-SDE-Solver: multistep on x0 for a reverse SDE whose noise at each level is a free function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import check_order, orders
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["er_sde"]

Array = np.ndarray
SCALERS: dict[str, Callable[[Array], Array]] = {
    "er": lambda rho: np.exp(rho**0.3) + 10,
    "sde": lambda rho: rho,
    "ode": np.ones_like,
}
NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)


def _tails(scaler: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """J1 = -int_low^high (1 - phi(low)/phi(u)) du, J2 = int (high - u) (1 - phi(low)/phi(u)) du, over ln u."""
    half = 0.5 * np.log(high / low)
    log = np.log(low)[:, None] + half[:, None] * (NODES + 1)
    u = np.exp(log)
    share = 1 - np.exp(np.log(low)[:, None] - log) * scaler(low)[:, None] / scaler(u)
    mass = half[:, None] * WEIGHTS * u * share
    return -mass.sum(1), (mass * (high[:, None] - u)).sum(1)


def er_sde(
    schedule: Schedule, steps: int, *, order: int = 3, scaler: str | Callable[[Array], Array] = "er",
    s_noise: float = 1.0, exact: bool = False, **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """ER-SDE-Solver-k: the extended reverse-time SDE in rho = sigma/alpha, x0 as a polynomial in rho.

        x' = alpha' (q x / alpha + (1 - q) p + J1 D1 + J2 D2) + s_noise sigma' sqrt(1 - (g'/g)^2) n
        q = phi(rho')/phi(rho),  phi(rho) = rho g(rho),  J1 = -int (1 - phi(rho')/phi(u)) du,
        J2 = int (rho - u) (1 - phi(rho')/phi(u)) du from rho' to rho;  D1, D2: divided differences of x0, D2 twice

    First order in the first row, second in the second; first into a clean end.
    Args:
        order: 1..3. scaler: g, how noise is scaled, which must not fall as rho grows: "er" (e^(rho^0.3) + 10, the
        paper's ER-SDE 5), "sde" (rho: the reverse SDE), "ode" (1: no noise), or a function of a float64 array.
        s_noise >= 0. exact: D1 as the parabola's slope at rho; published is the first difference. The rest:
        fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, `order` slots. Without noise order 2, 3 from an exact start with exact=True: the
        solver's own low-order first rows dominate where the first steps are not noise-dominated.
    Raises: ValueError for a scaler that falls or is not finite and > 0 inside the schedule.
    Numerics: the integrals by 48 Gauss-Legendre nodes in ln rho; published codes sum 100 or 200 rectangles.
    Source: Cui et al. 2023, arXiv:2309.06169 (ER-SDE-Solver-1 to 3), and the authors' code (vp_3_order_taylor).
    """
    order, grid = check_order("er_sde", order, 3), make_grid(schedule, steps, options)
    (s_noise,) = nonnegative(s_noise=s_noise)
    if not callable(scaler) and scaler not in SCALERS:
        raise ValueError(f"unknown scaler {scaler!r}; valid: {', '.join(SCALERS)}, or a function")
    n, given = len(grid.at.t), scaler if callable(scaler) else SCALERS[scaler]

    def scale(rho: Array) -> Array:
        return np.broadcast_to(np.asarray(given(rho), np.float64), rho.shape)

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rho = grid.sigma / grid.alpha
        g, to = scale(rho[:-1]), scale(np.where(rho[1:] > 0, rho[1:], rho[:-1]))
        kept = np.where(np.isinf(rho[:-1]) & np.isinf(g), 0.0, to / g)  # g'/g
    if not np.all((kept >= 0) & (kept <= 1 + 1e-12)) or not np.all(to > 0):
        raise ValueError("scaler must give finite numbers > 0 that do not fall as sigma/alpha grows")
    kept = np.minimum(kept, 1.0)
    A, b, s = np.zeros((n, order, order)), np.zeros((n, order)), np.zeros((n, order))
    A[:, 0, 0] = grid.sigma[1:] / grid.sigma[:-1] * kept
    b[:, 0] = grid.alpha[1:] - A[:, 0, 0] * grid.alpha[:-1]
    s[:, 0] = s_noise * grid.sigma[1:] * np.sqrt(1 - kept**2)
    row = orders(grid, order, lower_final=False)
    some = np.flatnonzero(row > 1)
    if len(some):
        slope, bend = np.zeros(n), np.zeros(n)
        slope[some], bend[some] = (grid.alpha[some + 1] * j for j in _tails(scale, rho[some + 1], rho[some]))
        third = np.flatnonzero(row > 2)
        step, last = rho[third] - rho[third - 1], rho[third - 1] - rho[third - 2]
        twice = 2 * bend[third] + (step * slope[third] if exact else 0)  # of the second divided difference
        newer, older = (twice / (step + last) / v for v in (step, last))
        first = slope[some] / (rho[some] - rho[some - 1])
        b[some, 0] += first
        A[some, 0, 1] -= first
        b[third, 0] += newer
        A[third, 0, 1] -= newer + older
        if order > 2:
            A[third, 0, 2] += older
    if order > 1:
        b[:, 1] = 1
    if order > 2:
        A[:, 2, 1] = 1
    return Plan.of(f"er_sde(order={order}, {scaler if isinstance(scaler, str) else 'scaler'})",
                   grid.at, A, b, s=s, end=grid.end)  # fmt: skip
