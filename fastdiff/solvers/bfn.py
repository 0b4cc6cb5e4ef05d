"""Bayesian flow networks' own samplers: the ddpm posterior on their schedules, with a readout of classes or bins."""

from __future__ import annotations

from dataclasses import replace

from fastdiff.plan import Plan
from fastdiff.prediction import Prediction
from fastdiff.readout import BINNED
from fastdiff.schedules import BFNContinuous, BFNDiscrete, Schedule
from fastdiff.solvers.bfn_grid import count, flow_plan, on_classes, require
from fastdiff.solvers.ddpm import ddpm

__all__ = ["bfn_continuous", "bfn_discrete", "bfn_discretised"]


def bfn_continuous(
    schedule: Schedule, steps: int, *, prediction: Prediction = "eps", clip: tuple[float, float] | None = None,
    start: int = 0, sign: int = 1,
) -> Plan:  # fmt: skip
    """Bayesian flow sampling of continuous data: the ddpm posterior on gamma.

        mu' = (rho mu + a y) / (rho + a),   y ~ N(p, 1/a),   a = accuracy(i, n),   rho = 1 / (1 - gamma)
            = (sigma'/sigma) e^-h mu + gamma' (1 - e^-2h) p + sigma' sqrt(1 - e^-2h) n

    The model is called at u = (i - 1)/n, i = 1..n, and at u = 1, whose p is the sample.
    Args: schedule: BFNContinuous. prediction: eps (the network of the paper: p = mu/gamma - sqrt((1-gamma)/gamma) m),
        x0, v, score, flow or a function. clip: None or (lo, hi), the clamp of p. start: skip this many intervals.
    Returns: Plan, 1 slot, weak order 1; nfe = steps + 1 with x0 and v. Others have no meaning at u = 0, where the paper
        takes p = 0: that row is the start N(0, sigma^2), and nfe = steps. It pulls the samples towards 0 by what one
        interval knows; docs/bfn.md.
    Raises: TypeError, ValueError for another schedule, steps < 1, start > steps.
    Source: Graves et al. 2023, arXiv:2308.07037, algorithm 3; sender: eq. 91-95.
    """
    require("bfn_continuous", schedule, BFNContinuous)
    plan = flow_plan(ddpm, schedule, steps, prediction=prediction, start=start, clip=clip, sign=sign)
    return replace(plan, name="bfn_continuous")


def bfn_discrete(schedule: Schedule, steps: int, *, readout: str = "sample", start: int = 0) -> Plan:
    """Bayesian flow sampling of K classes, on logits: the ddpm posterior for one-hot data.

        z' = z + a K onehot(k) + sqrt(a K) n,   k ~ Categorical(softmax(m)),   a = accuracy(i, n)

    theta = softmax(z); the model gets 2 theta - 1 at u = (i - 1)/n, i = 1..n, and at u = 1, whose k is the sample. With
    the exact posterior as model, samples have the data's distribution for every n.
    Args: schedule: BFNDiscrete. readout: sample (the paper), argmax or mean (SDE-BFN-Solver1; the last row samples).
        start: skip this many intervals.
    Returns: Plan, nfe = steps + 1, 1 slot. Raises: TypeError, ValueError for another schedule, readout or number.
    Source: Graves et al. 2023, arXiv:2308.07037, algorithm 9.
    """
    require("bfn_discrete", schedule, BFNDiscrete)
    assert isinstance(schedule, BFNDiscrete)
    plan = flow_plan(ddpm, schedule, steps, prediction="x0", start=start)
    last = "argmax" if readout == "argmax" else "sample"
    return on_classes(plan, schedule, readout, last, f"bfn_discrete({readout})")


def bfn_discretised(
    schedule: Schedule, steps: int, *, bins: int = 256, readout: str = "binned", prediction: Prediction = "eps",
    start: int = 0,
) -> Plan:  # fmt: skip
    """Bayesian flow sampling of data quantised to bins of [-1, 1]: the posterior row on what the bins make of m.

        x ~ N(c_skip mu + c_out m0, (c_out exp(m1))^2),   p = centre of x's bin   or the mean of that

    Bin j of K has centre (2j + 1)/K - 1 and width 2/K; the outer ones take the tails. The model returns two planes in
    its first sample axis, [B, 2 C, *]: the mean m0 and the logarithm of the std m1, of eps (or x0).
    Args: schedule: BFNContinuous. bins: K >= 2. readout: binned (a sampled bin, the paper) or binned_mean.
        prediction: of both planes, eps or x0. start: skip this many intervals.
    Returns: Plan, 1 slot, nfe = steps + 1 with x0, steps with eps: at u = 0 the paper takes x ~ N(0, 1), and the start
        is its bin, alpha p + sigma n (p = 0 for binned_mean).
    Raises: TypeError, ValueError for another schedule, readout, prediction or number.
    Source: Graves et al. 2023, arXiv:2308.07037, algorithms 5 and 6.
    """
    require("bfn_discretised", schedule, BFNContinuous)
    if readout not in BINNED:
        raise ValueError(f"unknown readout {readout!r}; valid: {', '.join(BINNED)}")
    if prediction not in ("eps", "x0"):
        raise ValueError(f"prediction of a binned output must be eps or x0, got {prediction!r}")
    plan = flow_plan(ddpm, schedule, steps, prediction=prediction, start=start)
    known = plan.alpha[0] if readout == "binned" and prediction == "eps" and start == 0 else 0.0
    return replace(
        plan, name=f"bfn_discretised({readout})", readout=readout, last_readout=readout,
        classes=count("bins", bins, 2), init_noise=float(known),
    )  # fmt: skip
