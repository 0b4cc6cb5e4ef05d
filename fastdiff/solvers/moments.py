"""Weights of exponential multistep methods: integrals of polynomials against an exponential on [0, 1]."""

from __future__ import annotations

import math

import numpy as np

from fastdiff.phi import phi

__all__ = ["moments", "polynomial_weights"]


def moments(H: np.ndarray, count: int) -> np.ndarray:
    """[count, N] moments of the exponential weight; H [N] >= 0 may be infinite (all weight at s = 1).

    mu_k = H int_0^1 exp(-H (1 - s)) s^k ds = k! H phi_{k+1}(-H);   mu_0 = 1 - e^-H,   mu_k = 1 - k mu_{k-1} / H
    """
    finite = np.isfinite(H)
    H = np.where(finite, H, 0.0)
    return np.stack([np.where(finite, math.factorial(k) * H * phi(k + 1, -H), 1.0) for k in range(count)])


def polynomial_weights(nodes: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Weights [N, o] with sum_j w_j q(nodes_j) = sum_k q_k mu_k for every polynomial q of degree < o.

    Args: nodes [N, o], distinct in a row; mu [o, N].
    """
    order = nodes.shape[1]
    powers = nodes[:, None, :] ** np.arange(order)[None, :, None]
    weights: np.ndarray = np.linalg.solve(powers, mu.T[:, :, None])[:, :, 0]
    return weights
