"""One class of many by few random numbers: groups of 16 classes race, a class of the winner is drawn by its share.

    S_j = sum over group j of exp((m_k - max m) / s),   e_j = -ln(1 - v_j) exponential
    group = argmax S_j / e_j,   k = the first of its classes whose running sum reaches u S_group

Group j wins with probability S_j / sum S, so k is a sample of softmax(m / s). A choice hinges on few comparisons, of
sums of 16 numbers: other hardware, whose last digits differ, makes another one but for near ties, as rare as those of
one random number a class; the running sum of a whole vocabulary has a thousand times more of them.

Class k of token d of a sample is at position k + d K % 4, and in group position // 16: where kernels read whole
vectors. Number v_j is word j of the token's, u the word after them, of Philox stream 2; a token has whole counters.

Source: exponential races: Maddison 2016, arXiv:1604.01348.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.gumbel import exponential_of

GROUP = 16


def early(width: int) -> int:
    """Positions by which a token of K classes may start early at most: a multiple of K, modulo 4."""
    return (0, 3, 2, 3)[width % 4]


def groups_of(width: int) -> int:
    """Groups of a token of K classes."""
    return -(-(width + early(width)) // GROUP)


def counters_of(width: int) -> int:
    """Philox counters of a token of K classes: a word a group and one for the class."""
    return groups_of(width) // 4 + 1


def numbers(seeds: Tensor, index: Tensor, rows: Tensor, d: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """e [T, groups] and u [T] of tokens d of samples, fp32. Args: all int64 [T]."""
    groups, each = groups_of(width), counters_of(width)
    counter = (d * each)[:, None] + torch.arange(each, device=d.device)
    stream = torch.full((), rng.CATEGORICAL, dtype=torch.int64, device=d.device)
    keys = (seeds & rng.MASK)[:, None], (seeds >> 32)[:, None]
    words = torch.stack(rng.philox(counter, rows[:, None], stream, index[:, None], *keys), -1).flatten(1)
    return exponential_of(words[:, :groups]), words[:, groups].float() * 2.0**-32 + 2.0**-33


def classes(m: Tensor, s: Tensor, d: Tensor, e: Tensor, u: Tensor) -> Tensor:
    """The classes of tokens, int64 [T]; an infinite logit is taken, the first of several.

    Args: m: logits [T, K] without NaN, one of them above -inf. s: temperatures [T], above 0. d: int64 [T], the tokens'
        places in their samples. e, u: their `numbers`.
    """
    width, size = m.shape[1], e.shape[1] * GROUP
    most = torch.finfo(m.dtype).max
    peak = m.amax(1, keepdim=True).clamp(-most, most)
    share = torch.exp((m - peak) / s[:, None])
    shift = torch.zeros_like(d)
    if early(width):
        shift = d * width & 3
        at = torch.arange(size, device=m.device) - shift[:, None]
        held = share.gather(1, at.clamp(0, width - 1))
        share = torch.where((at >= 0) & (at < width), held, 0.0)
    else:
        share = torch.nn.functional.pad(share, (0, size - width))
    share = share.view(len(m), -1, GROUP)
    ratio = share.sum(2) / e.to(m.dtype)
    group = _first(ratio == ratio.amax(1, keepdim=True))
    mine = share.gather(1, group[:, None, None].expand(-1, 1, GROUP))[:, 0]
    reached = mine.cumsum(1)
    here = (reached >= u.to(m.dtype)[:, None] * reached[:, -1:]) & (mine > 0)
    return group * GROUP + _first(here) - shift


def nucleus(m: Tensor, s: Tensor, share: Tensor) -> Tensor:
    """The least logit of the smallest set of likeliest classes that holds a share of softmax(m / s), [T].

    A class is in it where those with larger logits hold less than the share; equal logits go together.
    Args: m, s: as for `classes`. share: [T] in (0, 1]; of 1 all classes are in the set, the result is -inf.
    """
    z = m.sort(dim=1, descending=True).values
    e = torch.exp((z - z[:, :1]) / s[:, None]).cumsum(1)
    kept = torch.nn.functional.pad(e[:, :-1], (1, 0)) < (share[:, None] * e[:, -1:])
    least = z.gather(1, kept.sum(1, keepdim=True).clamp_min(1) - 1)[:, 0]
    return torch.where((share < 1) & (z[:, 0] < torch.inf), least, -torch.inf)


def _first(true: Tensor) -> Tensor:
    """The first place of each row that is true, the last where none is."""
    places = torch.arange(true.shape[1], device=true.device)
    return torch.where(true, places, true.shape[1] - 1).amin(1)
