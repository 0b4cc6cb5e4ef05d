"""The phi functions of exponential integrators without cancellation, and quadrature against their weight."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["phi", "quadrature"]

SERIES_BELOW = 0.5
SERIES_TERMS = 16


def phi(k: int, z: np.ndarray) -> np.ndarray:
    """phi_k(z) for real z; -inf gives the limit 0.

        phi_0 = e^z,   phi_k(z) = (phi_{k-1}(z) - 1/(k-1)!) / z = sum_j z^j / (j + k)!
        phi_k(z) = int_0^1 e^((1 - u) z) u^(k-1) / (k-1)! du

    The recursion cancels like |z|^-k, so |z| < 1/2 takes the series.
    Args: k >= 0; z: array.
    Returns: float64 array of z's shape.
    Source: Hochbruck and Ostermann 2010, Acta Numerica 19, eq. 2.10.
    """
    z = np.asarray(z, np.float64)
    small = np.abs(z) < SERIES_BELOW
    with np.errstate(over="ignore"):
        if k == 0:
            return np.exp(z)
        safe = np.where(small, 1.0, z)
        value = np.expm1(safe) / safe
        for j in range(1, k):
            value = (value - 1 / math.factorial(j)) / safe
    near, series = np.where(small, z, 0.0), np.zeros_like(z)
    for j in range(SERIES_TERMS, -1, -1):
        series = series * near + 1 / math.factorial(j + k)
    return np.where(small, series, value)


def quadrature(nodes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """w with sum_j w_j f(nodes_j) = int_0^1 e^((1-u) z) f(u) du / phi_1(z), exact for polynomials of degree < k.

    Lagrange's polynomials, expanded; the moments are j! phi_{j+1}(z) / phi_1(z).
    Args: nodes [N, k], distinct in a row; z [N]. Returns: [N, k].
    """
    n, k = nodes.shape
    w = np.ones((n, k))
    if k == 1:
        return w
    base = phi(1, z)
    moments = np.stack([math.factorial(j) * phi(j + 1, z) / base for j in range(k)], axis=1)
    for j in range(k):
        poly = np.zeros((n, k))
        poly[:, 0] = 1
        for i in range(k):
            if i != j:
                raised = -nodes[:, i, None] * poly
                raised[:, 1:] += poly[:, :-1]
                poly = raised / (nodes[:, j] - nodes[:, i])[:, None]
        w[:, j] = np.sum(poly * moments, axis=1)
    return w
