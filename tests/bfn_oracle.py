"""Bayesian flow networks as the paper writes them, in theta and float64: the tests' own implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.gumbel import gumbels


def one_hot(k: Tensor, K: int) -> Tensor:
    return (k[..., None] == torch.arange(K)).double()


def discrete_sample(
    network: Callable[[Tensor, float], Tensor], shape: tuple[int, ...], K: int, beta_1: float, n: int,
    gumbel: Callable[[int], Tensor], noise: Callable[[int], Tensor],
) -> Tensor:  # fmt: skip
    """Algorithm 9 of Graves et al. 2023: theta' = e^y theta / sum, y ~ N(a (K e_k - 1), a K I). For small K beta_1.

    network(2 theta - 1, t) -> logits [*, K]; gumbel(i), noise(i): the random numbers [*, K] of call i = 0..n.
    """
    theta = torch.full((*shape, K), 1 / K, dtype=torch.float64)
    for i in range(1, n + 1):
        k = (network(2 * theta - 1, (i - 1) / n) + gumbel(i - 1)).argmax(-1)
        a = beta_1 * (2 * i - 1) / n**2
        y = a * (K * one_hot(k, K) - 1) + math.sqrt(a * K) * noise(i - 1)
        theta = torch.exp(y) * theta
        theta = theta / theta.sum(-1, keepdim=True)
    return (network(2 * theta - 1, 1.0) + gumbel(n)).argmax(-1)


def philox_numbers(seed: int, shape: tuple[int, ...], K: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What the sampler draws for seed, [B, *D, K] float64: Gumbel numbers and normals of a row."""
    seeds, index = torch.full((shape[0],), seed), torch.arange(shape[0])
    size = math.prod(shape[1:]) * K

    def gumbel(row: int) -> Tensor:
        return gumbels(seeds, index, torch.tensor([row]), size).view(*shape, K).double()

    def noise(row: int) -> Tensor:
        return rng.normal(seeds, (*shape[1:], K), row=row, index=index).double()

    return gumbel, noise


def posterior_logits(pi: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact network for independent tokens of distribution pi [K]: p_k ~ pi_k exp(z_k) = pi_k theta_k.

    For K = 2 it sees 2 theta_1 - 1 alone and returns ln(p_1 / p_0).
    """

    def network(x: Tensor, t: object) -> Tensor:
        theta = ((x.double() + 1) / 2).clamp_min(1e-300)
        if x.shape[-1] == 1:
            odds = (pi[1] * theta).log() - (pi[0] * (1 - theta).clamp_min(1e-300)).log()
            return odds.to(x.dtype if x.dtype != torch.float64 else torch.float64)
        return (pi * theta).log().to(x.dtype)

    return network


def chi_square(classes: Tensor, pi: np.ndarray) -> float:
    """The statistic of counts against pi in units of its standard deviation: (X - (K - 1)) / sqrt(2 (K - 1))."""
    counts = np.bincount(classes.flatten().numpy(), minlength=len(pi))
    expected = classes.numel() * pi
    df = len(pi) - 1
    return float((np.sum((counts - expected) ** 2 / expected) - df) / math.sqrt(2 * df))
