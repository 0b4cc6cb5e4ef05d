"""PNDM: Adams-Bashforth's combination of eps in DDIM's update, behind a second-order or a Runge-Kutta start."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, Points, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Betas, Schedule
from fastdiff.solvers.multistep import Value, noise, noise_form

__all__ = ["plms"]

Array = np.ndarray
WARM_UP = 3  # pseudo Runge-Kutta
ADAMS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


class _Table:
    """The rows of a plan in the making; slots: x, e_1, e_2, e_3 and, in Runge-Kutta steps, a sum."""

    def __init__(self, at: Points, value: Value, slots: int) -> None:
        n = len(at.t)
        self.at, self.value = at, value
        self.A, self.b, self.d = np.zeros((n, slots, slots)), np.zeros((n, slots)), np.zeros((n, slots))

    def transfer(self, rows: Array, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        """(a, k) of DDIM's update x' = a x + k e from the level of these rows to (alpha, sigma)."""
        with np.errstate(divide="ignore"):
            h = np.log(alpha) - np.log(sigma) - self.at.lam[rows]
        form = noise_form(self.at.alpha[rows], self.at.sigma[rows], alpha, sigma, h)
        return form.ratio, form.gain

    def add(self, rows: Array, slot: int, c: Array | float) -> None:
        """Adds c e to what these rows write to a slot."""
        self.A[rows, slot, 0] += c * self.value.x[rows]
        self.b[rows, slot] += c * self.value.p[rows]
        self.d[rows, slot] += c * self.value.m[rows]

    def push(self, rows: Array) -> None:
        """e becomes e_1, and so on."""
        self.add(rows, 1, 1.0)
        self.A[rows, 2, 1] = self.A[rows, 3, 2] = 1

    def keep(self, rows: Array) -> None:
        self.A[rows[:, None], [1, 2, 3], [1, 2, 3]] = 1


def _runge_kutta(table: _Table, rows: Array, alpha: Array, sigma: Array) -> None:
    """Four rows an interval, to (alpha, sigma); x at its start and e_2 are solved for, not kept."""
    A, (one, two, last) = table.A, (rows + j for j in (1, 2, 3))
    half, k_half = table.transfer(rows, table.at.alpha[one], table.at.sigma[one])
    a, k = table.transfer(rows, alpha, sigma)
    A[rows, 0, 0] = half
    table.add(rows, 0, k_half)
    table.push(rows)
    A[one, 0, 0], A[one, 0, 1] = 1, -k_half  # half x of the start
    table.add(one, 0, k_half)
    A[one, 4, 1] = 1 / 6
    table.add(one, 4, 1 / 3)
    share = a / half
    for slot in (0, 4):  # a x of the start, with e_2 = 3 (sum - e_1 / 6)
        A[two, slot, 0], A[two, slot, 1], A[two, slot, 4] = share, share * k_half / 2, -3 * share * k_half
    A[two, 4, 4] += k
    table.add(two, 0, k)
    table.add(two, 4, k / 3)
    A[last, 0, 4] = 1
    table.add(last, 0, k / 6)
    for stage in (one, two, last):
        table.keep(stage)


def _middle(schedule: Schedule, t: Array) -> Array:
    """The middle of each interval; a chain stays on its indices (PNDM rounds its half step down)."""
    middle = (t[:-1] + t[1:]) / 2
    return np.ceil(middle) if isinstance(schedule, Betas) and np.all(t == np.round(t)) else middle


def plms(schedule: Schedule, steps: int, *, prk: bool = False, **options: Unpack[GridOptions]) -> Plan:
    """PNDM: DDIM's update with a fourth-order Adams-Bashforth combination of eps, in the step's index.

        x' = phi(x, e) = (alpha'/alpha) x - (alpha' sigma/alpha - sigma') e
        e = eps, (3 eps - e_1)/2, (23 eps - 16 e_1 + 5 e_2)/12, (55 eps - 59 e_1 + 37 e_2 - 9 e_3)/24

    prk=False (PLMS): the first interval is done twice, with eps and with the mean of eps and eps at its end. prk=True:
    of four or more, the first three are pseudo Runge-Kutta steps, (e_1 + 2 e_2 + 2 e_3 + e_4)/6, the middle in t.
    Args: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps + 1, 4 slots (prk: steps + 9, 5 slots), order 2. Raises: ValueError from zero signal.
    Source: Liu et al. 2022, arXiv:2202.09778, eq. 9, 12, 13 and algorithm 2.
    """
    grid = make_grid(schedule, steps, options)
    grid.require_signal("plms")
    n = len(grid.at.t)
    warm = WARM_UP if prk and n > WARM_UP else 0
    twice = int(not warm and n > 1)
    middle = _middle(schedule, grid.t[: warm + 1])
    stages = np.stack([grid.t[:warm], middle, middle, grid.t[1 : warm + 1]], axis=1).ravel()
    t = np.insert(grid.t[:n], 1, grid.t[1]) if twice else np.append(stages, grid.t[warm:n])
    at = grid.points(t)
    table = _Table(at, noise(at, options), 5 if warm else 4)
    if warm:
        _runge_kutta(table, 4 * np.arange(warm), grid.alpha[1 : warm + 1], grid.sigma[1 : warm + 1])
    interval = np.arange(warm, n)
    rows = interval + 3 * warm + twice * (interval > 0)
    a, k = table.transfer(rows, grid.alpha[interval + 1], grid.sigma[interval + 1])
    w = ADAMS[np.minimum(interval, 3)] * k[:, None]
    table.A[rows, 0, 0] = a
    table.A[rows, 0, 1:4] += w[:, 1:]
    table.add(rows, 0, w[:, 0])
    table.push(rows)
    if twice:
        again = np.array([1])
        table.A[again, 0, 0], table.A[again, 0, 1] = 1, -k[0] / 2
        table.add(again, 0, k[0] / 2)
        table.keep(again)
    if grid.clean and n == 1:
        table.A[-1, 0], table.b[-1, 0], table.d[-1, 0] = 0, 1, 0
    return Plan.of(f"plms(prk={prk})", at, table.A, table.b, d=table.d, end=grid.end)
