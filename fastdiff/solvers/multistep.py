"""What the deterministic multistep solvers share: one step by variation of constants, quadrature of earlier values.

One step of every method here is   x' = ratio x + gain (w_0 v + w_1 v_1 + ...),   sum of w = 1,
where v is x0, eps or a velocity and v_k is v of k rows before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastdiff.grid import Grid, GridOptions, Points
from fastdiff.phi import quadrature
from fastdiff.plan import Plan

__all__ = ["Form", "Value", "adams_plan", "check_order", "data", "data_form", "few_steps", "noise", "noise_form",
           "orders", "weights"]  # fmt: skip

Array = np.ndarray


class Value(NamedTuple):
    """v = x S[0] + p p + m m, [N] each."""

    x: Array
    p: Array
    m: Array


class Form(NamedTuple):
    """x' = ratio x + gain int_0^1 e^((1-u) z) v du / phi_1(z), [N] each."""

    ratio: Array
    gain: Array
    z: Array


def data(at: Points) -> Value:
    """v = x0 (after the clamp)."""
    zero = np.zeros(len(at.t))
    return Value(zero, zero + 1, zero)


def noise(at: Points, options: GridOptions) -> Value:
    """v = eps: from the model's own output (fewer roundings), or derived from the clamped x0."""
    if options.get("clip") is not None or options.get("prediction") == "edm":
        return Value(1 / at.sigma, -at.alpha / at.sigma, np.zeros(len(at.t)))
    return Value(at.convert.e_skip, np.zeros(len(at.t)), at.convert.e_out)


def data_form(alpha: Array, sigma: Array, alpha1: Array, sigma1: Array, h: Array) -> Form:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) x0 for constant x0; h may be infinite."""
    return Form(sigma1 / sigma, -alpha1 * np.expm1(-h), -h)


def noise_form(alpha: Array, sigma: Array, alpha1: Array, sigma1: Array, h: Array) -> Form:
    """x' = (alpha'/alpha) x - sigma' (e^h - 1) eps for constant eps; h = inf is the clean end."""
    return Form(alpha1 / alpha, alpha1 * sigma / alpha * np.expm1(-h), h)


def few_steps(grid: Grid, options: GridOptions) -> bool:
    """Are there fewer than 15 steps, those that start= skips among them?"""
    return len(grid.at.t) + options.get("start", 0) < 15


def check_order(name: str, order: int, most: int) -> int:
    if isinstance(order, bool) or not isinstance(order, int | np.integer):
        raise TypeError(f"{name}: order must be an integer, got {order!r}")
    if not 1 <= order <= most:
        raise ValueError(f"{name}: order must be in 1..{most}, got {order}")
    return int(order)


def orders(grid: Grid, order: int, *, lower_final: bool) -> Array:
    """[N] order of each row: what the history allows, falling to 1 at the end if asked; a clean end is first order.

    A start of zero signal (lam = -inf) is no node of a polynomial: it is dropped from the history.
    """
    n = len(grid.at.t)
    index = np.arange(n)
    row = np.minimum(order, np.maximum(index + 1 - (grid.alpha[0] == 0), 1))
    if lower_final:
        row = np.minimum(row, n - index)
    if grid.clean:
        row[-1] = 1
    return row


def weights(row_order: Array, x: Array, z: Array, rule: Callable[[Array, Array], Array] = quadrature) -> Array:
    """[N, k] weights of v and its history; the nodes are earlier values of x, in units of the row's own step.

    Args: row_order [N]; x [N + 1]: the coordinate in which v is a polynomial; z [N]; rule: (nodes, z) -> weights.
    """
    w = np.zeros((len(row_order), int(row_order.max())))
    for k in range(1, w.shape[1] + 1):
        rows = np.flatnonzero(row_order == k)
        if len(rows) and k == 1:
            w[rows, 0] = 1
        elif len(rows):
            nodes = (x[rows[:, None] - np.arange(k)] - x[rows, None]) / (x[rows + 1] - x[rows])[:, None]
            w[rows, :k] = rule(nodes, z[rows])
    return w


def adams_plan(name: str, grid: Grid, form: Form, value: Value, w: Array) -> Plan:
    """The plan of x' = ratio x + gain sum_k w_k v_k: slots x, v_1, v_2, ...; a first-order clean end is x' = p."""
    n, k = w.shape
    A, b, d = np.zeros((n, k, k)), np.zeros((n, k)), np.zeros((n, k))
    now = form.gain * w[:, 0]
    A[:, 0, 0], b[:, 0], d[:, 0] = form.ratio + now * value.x, now * value.p, now * value.m
    A[:, 0, 1:] = form.gain[:, None] * w[:, 1:]
    if k > 1:
        A[:, 1, 0], b[:, 1], d[:, 1] = value
    for j in range(2, k):
        A[:, j, j - 1] = 1
    if grid.clean and not w[-1, 1:].any():
        A[-1, 0], b[-1, 0], d[-1, 0] = 0, 1, 0
    return Plan.of(name, grid.at, A, b, d=d, end=grid.end)
