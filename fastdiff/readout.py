"""What turns a model's output into the prediction p of a row: an affine map, or a readout of classes, bins, tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastdiff.plan import Plan

__all__ = ["BINNED", "CATEGORICAL", "CLASSES", "DECIDED", "ORDERS", "READOUTS", "check_readout", "sentence"]

DECIDED = ("sample", "argmax")  # readouts that name one class
CATEGORICAL = (*DECIDED, "mean")
BINNED = ("binned", "binned_mean")
ORDERS = ("random", "confidence", "margin", "entropy")  # of unmasking tokens
CLASSES = (*CATEGORICAL, *ORDERS)  # plans that sample int64 classes
READOUTS = ("affine", *CATEGORICAL, *BINNED, *ORDERS)
MEANING = {
    "sample": "p = one-hot(k), k ~ Categorical(softmax(m))",
    "argmax": "p = one-hot(k), k = argmax m",
    "mean": "p = softmax(m)",
    "binned": "p = centre of the bin of x ~ N(c_skip S0 + c_out m0, (c_out exp(m1))^2)",
    "binned_mean": "p = mean bin centre of N(c_skip S0 + c_out m0, (c_out exp(m1))^2)",
}
BINARY = {
    "sample": "p = 2 k - 1, k ~ Bernoulli(sigmoid(m))",
    "argmax": "p = sign(m)",
    "mean": "p = 2 sigmoid(m) - 1",
}


def sentence(plan: Plan) -> str:
    """The readout for people, in the names of a plan."""
    if plan.readout in ORDERS:
        which = f"the surest share b of the masked tokens, by {plan.readout}, becomes k"
        if plan.readout == "random":
            which = "a masked token becomes k with probability b, another is masked again with 1 - A"
        more = "; so do tokens that are sure enough, by hi" if np.any(np.isfinite(plan.hi)) else ""
        more += ", their scores with c_skip times Gumbel noise" if np.any(plan.c_skip) else ""
        drawn = "k drawn from softmax(m / s)"
        drawn += " of its likeliest classes, which hold c_out" if np.any(plan.c_out < 1) else ""
        return f"{plan.classes} classes, mask {plan.mask}: {drawn}; in block d {which}{more}"
    if plan.readout in BINNED:
        return f"{plan.classes} bins: {MEANING[plan.readout]}"
    meaning, seen = (BINARY, "2 sigmoid(S0) - 1") if plan.classes == 2 else (MEANING, "2 softmax(S0) - 1")
    last = "" if plan.last_readout == plan.readout else f"; last row: {meaning[plan.last_readout]}"
    return f"{plan.classes} classes: {meaning[plan.readout]}{last}; the model sees {seen}"


def check_readout(plan: Plan) -> None:
    """Refuses a plan whose readout does not fit its rows.

    Raises: ValueError for an unknown readout, a number of classes that does not belong to it, or rows that read the
        model's output other than through p, clamp it or end elsewhere than at a class.
    """
    name = f"plan {plan.name!r}"
    if plan.readout not in READOUTS:
        raise ValueError(f"{name}: unknown readout {plan.readout!r}; valid: {', '.join(READOUTS)}")
    if isinstance(plan.classes, bool) or not isinstance(plan.classes, int | np.integer):
        raise TypeError(f"{name}: classes must be an integer, got {plan.classes!r}")
    if plan.readout in ORDERS:
        _check_order(plan, name)
        return
    if plan.mask != -1:
        raise ValueError(f"{name}: readout {plan.readout!r} has no mask, got {plan.mask!r}")
    if plan.readout == "affine":
        if plan.classes or plan.last_readout != "affine":
            raise ValueError(
                f"{name}: an affine plan has no classes and no readout of its last row, got classes={plan.classes}, "
                f"last_readout={plan.last_readout!r}"
            )
        return
    if plan.classes < 2:
        raise ValueError(f"{name}: readout {plan.readout!r} needs at least 2 classes, got {plan.classes}")
    if np.any(plan.d):
        raise ValueError(f"{name}: readout {plan.readout!r} gives p only; d must be 0")
    if plan.clamped:
        raise ValueError(f"{name}: readout {plan.readout!r} is not clamped; lo and hi must be infinite")
    if plan.readout in BINNED:
        if plan.last_readout != plan.readout:
            raise ValueError(f"{name}: the last row of {plan.readout!r} reads out alike, got {plan.last_readout!r}")
        return
    if plan.last_readout not in DECIDED:
        raise ValueError(f"{name}: last_readout must be {' or '.join(DECIDED)}, got {plan.last_readout!r}")
    if np.any(plan.c_skip) or np.any(plan.c_out != 1) or np.any(plan.c_in != 1):
        raise ValueError(f"{name}: the model of readout {plan.readout!r} returns logits: c_skip 0, c_out 1 and c_in 1")
    last = np.append(plan.A[-1, 0], plan.b[-1, 0])
    if plan.end != (1.0, 0.0) or np.any(last[:-1]) or last[-1] != 1:
        raise ValueError(f"{name}: the last row of readout {plan.readout!r} must be S0 = p, with end (1, 0)")


def _check_order(plan: Plan, name: str) -> None:
    """A plan of tokens: A, b and c_out are probabilities, d a block, s and c_skip temperatures, hi a score."""
    if plan.classes < 2:
        raise ValueError(f"{name}: readout {plan.readout!r} needs at least 2 classes, got {plan.classes}")
    if isinstance(plan.mask, bool) or not isinstance(plan.mask, int | np.integer) or not 0 <= plan.mask < 2**31:
        raise ValueError(f"{name}: mask must be an integer in 0..2**31 - 1, got {plan.mask!r}")
    if plan.slots != 1 or plan.last_readout != plan.readout or np.any(plan.c_in != 1) or np.any(np.isfinite(plan.lo)):
        raise ValueError(f"{name}: tokens have one slot, one readout, c_in 1 and no lo")
    if np.any((plan.c_out <= 0) | (plan.c_out > 1)):
        raise ValueError(f"{name}: c_out is the share in (0, 1] that classes are drawn from, got {plan.c_out}")
    shaken, enough = plan.c_skip != 0, plan.hi < np.inf
    if np.any(plan.c_skip < 0) or np.any(shaken & enough) or (plan.readout == "random" and np.any(shaken | enough)):
        raise ValueError(
            f"{name}: c_skip is a temperature >= 0 of scores, hi one that is enough; a row has one of them, of readout "
            f"'random' none, got {plan.c_skip}, {plan.hi}"
        )
    for what, value in (("A", plan.A), ("b", plan.b)):
        if np.any((value < 0) | (value > 1)):
            raise ValueError(f"{name}: {what} is a probability of readout {plan.readout!r}, got {value.ravel()}")
    if np.any(plan.s < 0) or np.any(plan.d < 0) or np.any(plan.d != np.round(plan.d)):
        raise ValueError(
            f"{name}: s is a temperature >= 0 and d the number of a block, got {plan.s.ravel()}, {plan.d.ravel()}"
        )
