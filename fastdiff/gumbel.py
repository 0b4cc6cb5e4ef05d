"""Reproducible Gumbel and logistic noise for categorical draws: Philox integers of stream 2, one a class.

Element e of a sample is word e % 4 of Philox(key = seed, counter = (e // 4, row, 2, sample index)), so a draw never
depends on batch, block size or device: the largest of logits + Gumbel noise is a categorical sample.

Source: Gumbel-max: Yellott 1977; Maddison et al. 2014, arXiv:1411.0030.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import native, rng

SCALE = 2.0**-32 - 2.0**-56  # one rounding less than 2^-32: the largest word stays below 1


def exponential_of(i: Tensor) -> Tensor:
    """A standard exponential number of a uint32 word.

        e = -ln(1 - v),  v = i (2^-32 - 2^-56) + 2^-33 in (0, 1)

    The small ones, of which the smallest of many is one, have full precision.
    Args:    i: int64 tensor of uint32 values.
    Returns: fp32 tensor.
    """
    return -torch.log1p(-(i.to(torch.float32) * SCALE + 2.0**-33))


def gumbel_of(i: Tensor) -> Tensor:
    """A standard Gumbel number of a uint32 word.

        g = -ln(e),  e its exponential number

    The upper tail, which decides the largest of many, is that of small e: full precision up to 22.9.
    Args:    i: int64 tensor of uint32 values.
    Returns: fp32 tensor.
    """
    return -torch.log(exponential_of(i))


def logistic_of(i: Tensor) -> Tensor:
    """A standard logistic number of a uint32 word, the difference of two Gumbel numbers: ln(u) - ln(1 - u).

    Both tails have full precision: u is folded at 1/2, where the word's top bit is.
    Args:    i: int64 tensor of uint32 values.
    Returns: fp32 tensor.
    """
    upper = i >= 2**31
    v = torch.where(upper, rng.MASK - i, i).to(torch.float32) * 2.0**-32 + 2.0**-33  # (0, 1/2]
    x = torch.log1p(-v) - torch.log(v)
    return torch.where(upper, x, -x)


def gumbels(seeds: Tensor, index: Tensor, rows: Tensor, n: int, *, logistic: bool = False) -> Tensor:
    """The draws of a batch, traceable: seeds, index int64 [B], rows int64 [1 or B] -> fp32 [B, n]."""
    kind = "logistic" if logistic else "gumbel"
    drawn = native.draw(seeds, index, rows, rng.CATEGORICAL, n, kind=kind)
    if drawn is not None:
        return drawn
    counter = torch.arange((n + 3) // 4, device=seeds.device)
    return gumbels_at(counter, seeds.view(-1, 1), index.view(-1, 1), rows.view(-1, 1), n, logistic=logistic)


def gumbels_at(counter: Tensor, seeds: Tensor, index: Tensor, rows: Tensor, n: int, *, logistic: bool) -> Tensor:
    """The draws of given counters [q]; seeds, index, rows broadcast against them -> fp32 [..., n], n <= 4 q."""
    stream = torch.full((), rng.CATEGORICAL, dtype=torch.int64, device=seeds.device)
    words = torch.stack(rng.philox(counter, rows, stream, index, seeds & rng.MASK, seeds >> 32), -1)
    words = words.flatten(-2)[..., :n]
    return logistic_of(words) if logistic else gumbel_of(words)
