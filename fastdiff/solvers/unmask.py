"""Masked diffusion: rows that unmask some tokens, at random or the surest first, and may mask others again."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from fastdiff.plan import Plan
from fastdiff.readout import ORDERS
from fastdiff.schedules.masked import Masked
from fastdiff.solvers.bfn_grid import count
from fastdiff.solvers.token_grid import each, score, times

__all__ = ["unmask"]


def unmask(
    schedule: Masked, steps: int, *, order: str = "random", temperature: float | Sequence[float] | np.ndarray = 1.0,
    remask: float = 0.0, remask_most: float = 1.0, threshold: float | None = None,
    choice_temperature: float | Sequence[float] | np.ndarray = 0.0,
    top_p: float | Sequence[float] | np.ndarray = 1.0, blocks: int = 1,
    spacing: Sequence[float] | np.ndarray | None = None, start: int = 0,
) -> Plan:  # fmt: skip
    """Ancestral sampling of masked diffusion: a masked token becomes a sampled class, others stay what they are.

        k drawn from softmax(m / temperature), with top_p of its likeliest classes; at temperature 0 its largest
        from t to s:  mask -> k with b = (alpha_s - (1 - r) alpha_t) / (1 - alpha_t);   k -> mask with r
        r = min(remask r_max, remask_most),  r_max = min(1, (1 - alpha_s) / alpha_t)

    At order "random" each token is drawn for itself: the exact posterior for the predicted class. The others unmask
    the surest tokens first, all but floor(M (1 - b)) of M masked ones: by the probability of k ("confidence"), by that
    of the first above the second ("margin") or by the least entropy ("entropy").
    Args: schedule: schedules.Masked. steps: rows, one model evaluation each. order: above. temperature: of all rows,
            or one a row.
        remask: 0 is none, ReMDM's rescale 0 < remask <= 1; with remask=1 remask_most is its cap. For order "random".
        threshold: tokens with p_k, or margin, above it are unmasked too, and before others of their row; of order
            "entropy" those before which the entropies sum to at most so many nats. A row that finds nothing to unmask
            is skipped, its model not called: steps is the most.
        choice_temperature: scale of Gumbel noise on ln p_k, ln margin or minus the entropy before tokens are ordered,
            of all rows, or one a row.
        top_p: classes are drawn from the smallest set of the likeliest that holds this share (nucleus), of all rows, or
            one a row. Scores, and what holds a threshold, are those of softmax(m) whatever is drawn.
        blocks: the masked tokens are unmasked in so many groups from left to right (semi-autoregressive), each in
            steps / blocks rows. spacing: decreasing times [steps] of a block's rows, default 1, (n - 1)/n, ..., 1/n.
        start: skip this many rows of one block: x_init is masked as the first row expects.
    Returns: Plan, nfe = steps - start, int64 tokens; the model gets ids [B, *D], schedule.mask where masked, and
        returns logits [B, *D, K].
    Raises: TypeError, ValueError: no Masked schedule; an unknown order; a number outside its range.
    Source: Sahoo et al. 2024, arXiv:2406.07524, eq. 7; Wang et al. 2025, arXiv:2503.00307 (remasking); Chang et al.
        2022, arXiv:2202.04200 and Nie et al. 2025, arXiv:2502.09992 (confidence, blocks); Wu et al. 2025,
        arXiv:2505.22618 and Ben-Hamu et al. 2025, arXiv:2505.24857 (thresholds of a probability and of entropies);
        Holtzman et al. 2019, arXiv:1904.09751 (nucleus).
    """
    if not isinstance(schedule, Masked):
        raise TypeError(f"unmask needs a schedule of type Masked, got {type(schedule).__name__}")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; valid: {', '.join(ORDERS)}")
    steps, blocks, start = count("steps", steps, 1), count("blocks", blocks, 1), count("start", start, 0)
    for name, value in (("remask", remask), ("remask_most", remask_most)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    if remask and order != "random":
        raise ValueError(f"remask goes with order 'random', got order={order!r}")
    if steps % blocks:
        raise ValueError(f"steps must be a multiple of blocks, got {steps} and {blocks}")
    if start and (blocks > 1 or start >= steps):
        raise ValueError(f"start must be < steps, {steps}, and goes with one block, got start={start}, blocks={blocks}")
    t = times(spacing, steps // blocks)[start:]
    gone = schedule.masked(t)  # 1 - alpha_t
    left = np.append(gone[1:], 0.0)  # 1 - alpha_s
    alpha = 1.0 - gone
    largest = np.minimum(1.0, np.divide(left, alpha, out=np.ones_like(left), where=alpha > 0))
    r = np.minimum(remask * largest, remask_most)
    # (alpha_s - (1 - r) alpha_t) / (1 - alpha_t), without cancellation
    b = np.clip(1.0 - (left - r * alpha) / gone, 0.0, 1.0)
    b[-1] = 1.0
    n = len(t) * blocks
    heat, choice = each("temperature", temperature, n), each("choice_temperature", choice_temperature, n)
    held = each("top_p", top_p, n)
    if not np.all((held > 0) & (held <= 1)):
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    hi = np.full(n, np.inf if threshold is None else score(threshold, order))
    if order == "random" and (choice.any() or threshold is not None):
        raise ValueError("threshold and choice_temperature go with an order of sure tokens, got order='random'")
    if choice.any() and threshold is not None:
        raise ValueError("a score with noise has no threshold: give threshold or choice_temperature")
    block = np.repeat(np.arange(blocks), len(t))
    known = (block + np.tile(alpha, blocks)) / blocks
    told = (blocks - 1 - block + np.tile(t, blocks)) / blocks
    one = np.ones(n)
    return Plan(
        f"unmask({order})", told, told, known, 1.0 - known, one, choice, held, np.full(n, -np.inf), hi,
        np.tile(1.0 - r, blocks).reshape(n, 1, 1), np.tile(b, blocks)[:, None], block[:, None], heat[:, None],
        init_scale=0.0, readout=order, classes=schedule.num_classes, mask=schedule.mask,
    )  # fmt: skip
