"""DPM-Solver++ (stochastic): a midpoint evaluation between two noisy steps that share one Brownian path."""

from __future__ import annotations

from numbers import Real
from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["dpmpp_sde"]

PATHS = ("sigma", "sde")


def _ancestral(h: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """down, up in units of the new sigma: up = min(1, eta sqrt(1 - e^-2h)), down^2 = 1 - up^2."""
    up = np.minimum(1.0, eta * np.sqrt(-np.expm1(-2 * h)))
    return np.sqrt(1 - up * up), up


def dpmpp_sde(
    schedule: Schedule, steps: int, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, path: str = "sigma",
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """DPM-Solver++ SDE: two evaluations a step, at lam and at lam + r h.

        z  = (sigma_r down_r / sigma) x + alpha_r (1 - down_r e^(-r h)) p + s_noise sigma_r up_r w
        x' = (sigma' down' / sigma) x + alpha' (1 - down' e^-h) ((1 - 1/2r) p + p_z / 2r) + s_noise sigma' up' w'
        up = min(1, eta sqrt(1 - e^-2h)),  down^2 = 1 - up^2   (each over its own interval)
        w = n,  w' = q n + sqrt(1 - q^2) n':  both are increments of one Brownian path that starts at lam

    Slots: z, and all of x' that is known before p_z; the noise of the first row goes into both. A step that ends clean
    is one row (x' = p).
    Args: eta, s_noise >= 0; r in (0, 1]; path: what q^2 is the share of, of a path in sigma/alpha (k-diffusion's
        Brownian tree) or of the reverse SDE's own noise ((e^(2 r h) - 1) / (e^(2 h) - 1)); the rest: GridOptions.
    Returns: Plan, nfe = 2 steps - 1 (2 steps with final="min"), 2 slots, order 2 at eta = 0, weak order 1 or better.
    Source: k-diffusion's sample_dpmpp_sde; Lu et al. 2022, arXiv:2211.01095.
    """
    eta, s_noise = nonnegative(eta=eta, s_noise=s_noise)
    if isinstance(r, bool) or not isinstance(r, Real) or not 0 < r <= 1:
        raise ValueError(f"r must be in (0, 1], got {r!r}")
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; valid: {', '.join(PATHS)}")
    grid = make_grid(schedule, steps, options)
    grid.require_signal("dpmpp_sde")
    n = len(grid.at.t)
    two = n - grid.clean  # steps with a midpoint
    now, then = slice(0, two), slice(1, two + 1)
    h = grid.h[:two]
    mid = grid.points(np.clip(schedule.t_of(2 * (grid.lam[now] + r * h)), grid.t[then], grid.t[now]))
    part = mid.lam - grid.lam[now]
    (down_r, up_r), (down, up) = _ancestral(part, eta), _ancestral(h, eta)
    share = np.expm1(-part) / np.expm1(-h) if path == "sigma" else np.expm1(2 * part) / np.expm1(2 * h)
    share = np.minimum(share, 1.0)  # of r = 1 it is, to rounding
    gain = -grid.alpha[then] * np.expm1(np.log(np.where(down > 0, down, 1)) - h)
    gain = np.where(down > 0, gain, grid.alpha[then])
    A, b, s = np.zeros((n + two, 2, 2)), np.zeros((n + two, 2)), np.zeros((n + two, 2))
    first, second = np.arange(0, 2 * two, 2), np.arange(1, 2 * two, 2)
    A[first, 0, 0], A[first, 1, 0] = mid.sigma * down_r / grid.sigma[now], grid.sigma[then] * down / grid.sigma[now]
    b[first, 0], b[first, 1] = mid.alpha * (1 - down_r * np.exp(-part)), gain * (1 - 0.5 / r)
    s[first, 0] = s_noise * mid.sigma * up_r
    s[first, 1] = s_noise * grid.sigma[then] * up * np.sqrt(share)
    A[second, 0, 1], b[second, 0] = 1.0, gain * 0.5 / r
    s[second, 0] = s_noise * grid.sigma[then] * up * np.sqrt(1 - share)
    if grid.clean:
        b[-1, 0] = 1.0
    t = np.empty(n + two)
    t[first], t[second] = grid.t[now], mid.t
    if grid.clean:
        t[-1] = grid.at.t[-1]
    return Plan.of(f"dpmpp_sde(eta={eta:g})", grid.points(t), A, b, s=s, end=grid.end)
