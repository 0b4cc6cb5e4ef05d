"""SDE-DPM-Solver++ multistep: exponential integrators of the reverse SDE, earlier predictions kept as slots."""

from __future__ import annotations

import math
from numbers import Real
from typing import Unpack

import numpy as np

from fastdiff.grid import Grid, GridOptions, make_grid
from fastdiff.phi import phi
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep import few_steps

__all__ = ["dpmpp_2m_sde", "dpmpp_3m_sde"]

KINDS = ("midpoint", "heun")


def nonnegative(**values: float) -> tuple[float, ...]:
    """The options as Python's floats; refuses what are no finite numbers >= 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < np.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return tuple(float(value) for value in values.values())


def fraction(name: str, value: float) -> float:
    """The option as Python's float; refuses what is no number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def _moments(H: np.ndarray, count: int) -> np.ndarray:
    """[count, N] mu_k = H int_0^1 exp(-H (1 - s)) s^k ds = k! H phi_{k+1}(-H); 1 for infinite H."""
    finite = np.isfinite(H)
    H = np.where(finite, H, 0.0)
    return np.stack([np.where(finite, math.factorial(k) * H * phi(k + 1, -H), 1.0) for k in range(count)])


def _first_order(grid: Grid, eta: float, s_noise: float) -> tuple[np.ndarray, ...]:
    """keep, H, noise [N] of x' = keep x + alpha' (1 - e^-H) p + noise n, H = (1 + eta) h; h may be infinite."""
    h = grid.h
    eta_h = eta * h if eta > 0 else 0 * grid.alpha[1:]
    keep = grid.sigma[1:] / grid.sigma[:-1] * np.exp(-eta_h)
    return keep, h + eta_h, s_noise * grid.sigma[1:] * np.sqrt(-np.expm1(-2 * eta_h))


def _ratio(h: np.ndarray) -> np.ndarray:
    """[N - 1] h_i / h_{i-1}: 0 where the step ends clean or the one before came from zero signal."""
    return np.where(np.isfinite(h[1:]), h[1:], 0) / h[:-1]


def dpmpp_2m_sde(
    schedule: Schedule, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, kind: str = "midpoint",
    lower_order_final: bool = True, **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """SDE-DPM-Solver++(2M): second-order multistep on x0 for the reverse SDE with noise eta.

        x' = (sigma'/sigma) e^(-eta h) x + alpha' (1 - e^-H) p + c (p - p_prev) h / h_prev
             + s_noise sigma' sqrt(1 - e^(-2 eta h)) n,        H = (1 + eta) h
        c = alpha' (1 - e^-H) / 2  (midpoint)   or   alpha' (1 - (1 - e^-H) / H)  (heun)

    First order in the first row, after zero signal and into a clean end.
    Args: eta >= 0 (0: dpmpp_2m's ODE; 1: the reverse SDE); s_noise >= 0; kind: "midpoint" or "heun";
        lower_order_final: see dpmpp_2m; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 2 slots (x, p_prev), order 2 as an ODE solver, weak order 2 on Gaussian data.
    Source: Lu et al. 2022, arXiv:2211.01095, section 5 and appendix; heun and eta: k-diffusion's sample_dpmpp_2m_sde.
    """
    eta, s_noise = nonnegative(eta=eta, s_noise=s_noise)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    grid = make_grid(schedule, steps, options)
    n = len(grid.at.t)
    keep, H, noise = _first_order(grid, eta, s_noise)
    gain, slope = grid.alpha[1:] * _moments(H, 2)
    weight = np.zeros(n)
    weight[1:] = _ratio(grid.h) * (slope if kind == "heun" else 0.5 * gain)[1:]
    if lower_order_final and few_steps(grid, options):
        weight[-1] = 0
    A, b, s = np.zeros((n, 2, 2)), np.zeros((n, 2)), np.zeros((n, 2))
    A[:, 0, 0], A[:, 0, 1] = keep, -weight
    b[:, 0], b[:, 1], s[:, 0] = gain + weight, 1.0, noise
    return Plan.of(f"dpmpp_2m_sde(eta={eta:g}, {kind})", grid.at, A, b, s=s, end=grid.end)


def dpmpp_3m_sde(
    schedule: Schedule, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, exact: bool = False,
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """SDE-DPM-Solver++(3M): third-order multistep on x0 for the reverse SDE with noise eta.

        x' = (sigma'/sigma) e^(-eta h) x + alpha' (mu_0 p + mu_1 D1 + mu_2 D2 / 2) + noise as in dpmpp_2m_sde
        mu_0 = 1 - e^-H,  mu_1 = 1 - mu_0 / H,  mu_2 / 2 = 1/2 - mu_1 / H,  H = (1 + eta) h
        p + D1 s + D2 s^2: the parabola through p, p_1, p_2 at s = (lam - lam_i) / h

    First order in the first row, second in the second; first into a clean end. D2 has half the weight the parabola
    asks for, as in every published code.
    Args: eta, s_noise >= 0; exact: D2's whole weight, mu_2; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 3 slots (x, p_1, p_2), order 2 after its first-order start.
    Source: k-diffusion's sample_dpmpp_3m_sde; Lu et al. 2022, arXiv:2211.01095, for the expansion.
    """
    eta, s_noise = nonnegative(eta=eta, s_noise=s_noise)
    grid = make_grid(schedule, steps, options)
    n = len(grid.at.t)
    keep, H, noise = _first_order(grid, eta, s_noise)
    gain, first, second = grid.alpha[1:] * _moments(H, 3)
    second = second if exact else 0.5 * second
    weights = np.zeros((n, 3))  # of p, p_1, p_2
    weights[:, 0] = gain
    u = np.append(0.0, _ratio(grid.h))  # 1 / r0; 0: no history
    v = np.zeros(n)  # 1 / r1 in units of this h
    v[2:] = u[2:] * u[1:-1]
    has = v > 0
    r0, r1 = (np.divide(1.0, w, out=np.ones(n), where=has) for w in (u, v))
    slope = np.where(has, first * (1 + r0 / (r0 + r1)) + second / (r0 + r1), first) * u  # of (p - p_1)
    older = np.where(has, (first * r0 + second) / (r0 + r1), 0) * v  # of -(p_1 - p_2)
    weights += np.stack([slope, -slope - older, older], axis=1)
    A, b, s = np.zeros((n, 3, 3)), np.zeros((n, 3)), np.zeros((n, 3))
    A[:, 0, 0], A[:, 0, 1:], A[:, 2, 1] = keep, weights[:, 1:], 1.0
    b[:, 0], b[:, 1], s[:, 0] = weights[:, 0], 1.0, noise
    return Plan.of(f"dpmpp_3m_sde(eta={eta:g})", grid.at, A, b, s=s, end=grid.end)
