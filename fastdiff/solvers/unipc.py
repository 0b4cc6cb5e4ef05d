"""UniPC: a multistep predictor whose result the next evaluation corrects, in the same row."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.phi import quadrature
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import check_order, data_form, orders

__all__ = ["unipc"]

KINDS = ("bh1", "bh2")


def _shortcut(grid: Grid, bh: str) -> np.ndarray:
    """[N] B(h) / (e^-h - 1): the weight 1/2 of a single difference counts in units of B, -h (bh1) or e^-h - 1 (bh2)."""
    h = grid.h
    if bh == "bh2":
        return np.ones(len(h))
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(h), h / -np.expm1(-h), 0.0)


def _predictor(nodes: np.ndarray, z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Weights of v, v_1, .. over a step; two nodes: rho = 1/2 for the exact phi_2 / B."""
    if nodes.shape[1] != 2:
        return quadrature(nodes, z)
    slope = b / (2 * nodes[:, 1])
    return np.stack([1 - slope, slope], axis=1)


def _corrector(nodes: np.ndarray, z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Weights of v, v_1, .. and, last, of v at the step's end; one node before it: rho = 1/2."""
    if nodes.shape[1] == 1:
        return np.stack([1 - b / 2, b / 2], axis=1)
    return quadrature(np.append(nodes, np.ones((len(nodes), 1)), axis=1), z)


def unipc(
    schedule: Schedule, steps: int, *, order: int = 2, bh: str = "bh2", corrector: bool = True,
    lower_order_final: bool = True, keep_start: bool = False, **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """UniPC-k on x0: predictor UniP-k and corrector UniC-k in lam = ln(alpha/sigma).

        UniP: x' = (sigma'/sigma) x_c + alpha' (1 - e^-h) sum_j w_j p_j       exact for polynomials through p, p_1, ..
        UniC: x_c' = x' + alpha' (1 - e^-h) (sum_j (u_j - w_j) p_j + u p')     u: the same with the new p' as a node

    A single difference (UniP-2, UniC-1) has the weight B(h)/2. Row i corrects its state with the p it has just
    evaluated, then predicts: no evaluation more. A row that ends clean is first order and needs no correction.
    Args:
        order: 1..3. bh: "bh1" (B = -h) | "bh2" (B = e^-h - 1). corrector: False for UniP alone.
        lower_order_final: fall to first order at the end. keep_start: correct the last step from its start (a slot
        holds what is known of the result) and not x': the same, but that an outside edit of x (a callback, inpainting)
        counts through p alone, as in diffusers. The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, order + 1 slots (x', p_1, .., p_k); UniP: `order`. Order k + 1 (UniP: k) from an
        exact start with lower_order_final=False: the solver's own low-order first rows dominate where the first steps
        are not noise-dominated. Else 2, as the first-order last row is not corrected.
    Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 to 4; B(h): section 3.4.
    """
    order = check_order("unipc", order, 3)
    if bh not in KINDS:
        raise ValueError(f"unknown bh {bh!r}; valid: {', '.join(KINDS)}")
    if keep_start and not corrector:
        raise ValueError("keep_start is of the corrector, which corrector=False leaves out")
    grid = make_grid(schedule, steps, options)
    n, lam, h = len(grid.at.t), grid.lam, grid.h
    form = data_form(grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], h)
    row_order, unit = orders(grid, order, lower_final=lower_order_final), _shortcut(grid, bh)
    most = int(row_order.max())
    corrector, keep_start = corrector and n > 1, corrector and n > 1 and keep_start
    r = most + corrector
    # of p, p_1, ..: w of the row's own step, and u; of the new p, as the next row sees it
    predict, known, new = np.zeros((n, most)), np.zeros((n, most)), np.zeros(n)
    corrected = np.zeros(n, bool)
    for k in range(1, most + 1):
        rows = np.flatnonzero(row_order == k)
        nodes = np.zeros((len(rows), k))
        if k > 1:
            nodes = (lam[rows[:, None] - np.arange(k)] - lam[rows, None]) / h[rows, None]
        predict[rows, :k] = _predictor(nodes, form.z[rows], unit[rows])
        after = rows[(rows < n - 1) & np.isfinite(h[rows])]
        if corrector and len(after):
            here = np.isin(rows, after)
            u = _corrector(nodes[here], form.z[after], unit[after])
            known[after, :k], new[after + 1], corrected[after + 1] = u[:, :-1], u[:, -1], True
    predict, known = form.gain[:, None] * predict, form.gain[:, None] * known
    new[1:] *= form.gain[:-1]
    A, b = np.zeros((n, r, r)), np.zeros((n, r))
    kept = most - 1 if keep_start else r - 1  # earlier p
    if kept:
        b[:, 1] = 1
    for j in range(2, kept + 1):
        A[:, j, j - 1] = 1
    # the corrected state is the source and new p; in the history form also (u - w) p_1, ..
    source = np.where(corrected, r - 1, 0) if keep_start else np.zeros(n, int)
    A[np.arange(n), 0, source] = form.ratio
    if keep_start:
        A[np.arange(n), -1, source] = form.ratio
        A[:, -1, 1:most] += known[:, 1:]
        b[:, -1] = form.ratio * new + known[:, 0]
    elif corrector:
        A[1:, 0, 1:] = form.ratio[1:, None] * np.where(corrected[1:, None], (known - predict)[:-1], 0)
    A[:, 0, 1:most] += predict[:, 1:]
    b[:, 0] = form.ratio * new + predict[:, 0]
    return Plan.of(f"unipc(order={order}, {bh})", grid.at, A, b, end=grid.end)
