"""Closed forms the tests compare with: moments of a plan, exact flows of Gaussian data, textbook loops."""

from __future__ import annotations

import math

import numpy as np

from fastdiff import Plan
from fastdiff.schedules import Schedule


def marginals(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """State of every row under a constant-x0 model, started from q(x_T | x0).

    The state is linear in (x0, n_start, n_0, .., n_{N-1}): row by row its coefficients are exact.
    Returns: coefficient of x0 and variance after each row [N], and the alpha and variance they should have [N].
    """
    n, r = plan.nfe, plan.slots
    S = np.zeros((r, 2 + n))
    S[0, 0], S[0, 1] = plan.alpha[0], plan.init_scale
    x0 = np.eye(1, 2 + n)[0]
    mean, variance = np.zeros(n), np.zeros(n)
    for k in range(n):
        m = (x0 - plan.c_skip[k] * S[0]) / plan.c_out[k]
        S = plan.A[k] @ S + np.outer(plan.b[k], x0) + np.outer(plan.d[k], m)
        S[:, 2 + k] += plan.s[k]
        mean[k], variance[k] = S[0, 0], np.sum(S[0, 1:] ** 2)
    alpha, sigma = np.append(plan.alpha[1:], plan.end[0]), np.append(plan.sigma[1:], plan.end[1])
    return mean, variance, alpha, sigma**2


def gaussian_denoiser(plan: Plan, k: int, mean: float, std: float) -> tuple[float, float]:
    """E[x0 | x_k] = u x + v for data N(mean, std^2): the ideal model, as coefficients."""
    a, s = plan.alpha[k], plan.sigma[k]
    if a == s == 0:  # a Bayesian flow's start: the state is 0 and says nothing
        return 0.0, mean
    u = a * std * std / (a * a * std * std + s * s)
    return u, mean * (1 - u * a)


def gaussian_map(plan: Plan, mean: float, std: float) -> tuple[float, float, float]:
    """The plan's map of the start x on Gaussian data: x_end = gain x + shift + N(0, variance), exactly.

    The state is affine in (x, 1, n_0 ..): the ideal model is affine too.
    """
    n, r = plan.nfe, plan.slots
    S = np.zeros((r, 2 + n))
    S[0, 0] = 1
    one = np.eye(2 + n)[1]
    for k in range(n):
        u, v = gaussian_denoiser(plan, k, mean, std)
        p = u * S[0] + v * one
        m = (p - plan.c_skip[k] * S[0]) / plan.c_out[k]
        S = plan.A[k] @ S + np.outer(plan.b[k], p) + np.outer(plan.d[k], m)
        S[:, 2 + k] += plan.s[k]
    return S[0, 0], S[0, 1], float(np.sum(S[0, 2:] ** 2))


def exact_gaussian_flow(plan: Plan, mean: float, std: float) -> tuple[float, float]:
    """The probability flow of Gaussian data from the plan's start to its end: x -> gain x + shift.

    (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) is constant along it.
    """
    a, s, (a1, s1) = plan.alpha[0], plan.sigma[0], plan.end
    gain = math.sqrt(a1 * a1 * std * std + s1 * s1) / math.sqrt(a * a * std * std + s * s)
    return gain, (a1 - gain * a) * mean


def slope(steps: list[int], errors: list[float]) -> float:
    """Fitted order: minus the slope of ln(error) over ln(steps)."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def exact_moments(schedule: Schedule, t: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of q(x_t) for data N(mean, std^2)."""
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    return a * mean, a * a * std * std + s * s
