"""Losses of Bayesian flow networks on continuous data and on classes, in nats or bits per dimension."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.devices import widest
from fastdiff.ops import _noising
from fastdiff.ops._categorical import channels, check_classes, check_logits
from fastdiff.ops._dispatch import FLOATS64, check_tensor, spread
from fastdiff.ops._noising import Seeds
from fastdiff.ops.binned import bin_log_probability, bin_mean
from fastdiff.ops.denoising_loss import ordered_sum
from fastdiff.schedules import BFNContinuous, BFNDiscrete
from fastdiff.transforms import readable

__all__ = [
    "bfn_continuous_loss",
    "bfn_continuous_reconstruction",
    "bfn_discrete_loss",
    "bfn_discrete_reconstruction",
    "bfn_discretised_loss",
    "bfn_discretised_reconstruction",
    "data_prediction",
    "flow_weight",
    "interval",
    "scaled",
]

UNITS = ("nats", "bits_per_dim")
T_MIN = 1e-6  # flow time below which nothing is known and an eps prediction has no x0: it is taken as 0
PREDICTIONS = ("eps", "x0", "v")


def scaled(loss: Tensor, dimensions: int, units: str) -> Tensor:
    """A loss in nats [B] in the units asked for."""
    if units not in UNITS:
        raise ValueError(f"unknown units {units!r}; valid: {', '.join(UNITS)}")
    return loss if units == "nats" else loss / (max(dimensions, 1) * math.log(2.0))


def _total(values: Tensor) -> Tensor:
    """The sum over each sample's elements, also of samples without axes: [B, *] -> [B]."""
    return ordered_sum(values.reshape(len(values), values.shape[1:].numel()))


def interval(t: Tensor, schedule: BFNContinuous | BFNDiscrete, steps: int) -> tuple[Tensor, Tensor]:
    """The step i = 1..n that begins at flow time u = 1 - t = (i - 1)/n, and its accuracy; float64 [B or 1].

    Raises: ValueError where t is not the beginning of a step (on the CPU).
    """
    steps = _whole(steps)
    exact = (1.0 - t.to(widest(t.device))) * steps + 1.0
    i = exact.round()
    if readable(i) and i.numel():
        held = 1e-3 + steps * 2.0**-24  # how far fp32 may have rounded t
        if bool(((exact - i).abs() > held).any()) or not 1 <= int(i.min()) <= int(i.max()) <= steps:
            raise ValueError(f"t must be 1 - (i - 1)/{steps}, i = 1..{steps}, the beginning of a step; got {t}")
    if isinstance(schedule, BFNDiscrete):
        return i, schedule.beta_1 * (2 * i - 1) / steps**2
    return i, torch.exp(schedule.rate * i / steps) * -math.expm1(-schedule.rate / steps)


def _whole(steps: object) -> int:
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    return int(steps)


def _without_steps(seeds: object, index: object, row: object, noise: object) -> None:
    """Raises: ValueError where something of the n-step loss's noise is given without steps."""
    if seeds is not None or index is not None or noise is not None or row != 0:
        raise ValueError("seeds, index, row and noise belong to the loss of n steps; give steps")


def flow_weight(t: Tensor, schedule: BFNContinuous, steps: int | None) -> Tensor:
    """What multiplies ||x - p||^2 in nats: -ln(sigma_1) sigma_1^(-2u), or n accuracy(i)/2; float64 [B or 1]."""
    if steps is None:
        return 0.5 * schedule.rate * torch.exp(schedule.rate * (1.0 - t.to(widest(t.device))))
    return 0.5 * steps * interval(t, schedule, steps)[1]


def data_prediction(
    model_out: Tensor, x_t: Tensor, t: Tensor, schedule: BFNContinuous, prediction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """p of a network on continuous data, and c_out and whether anything is known, [B or 1, 1, ..]; p = 0 for u < 1e-6.

    eps: p = mu/gamma - sqrt((1 - gamma)/gamma) m;   x0: p = m;   v: p = mu - sqrt(1 - gamma) m
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}")
    gamma = spread(schedule.gamma(t), model_out)
    known = gamma > -math.expm1(-schedule.rate * T_MIN)
    if prediction == "x0":
        skip, out = 0 * gamma, 1 + 0 * gamma
    elif prediction == "v":
        skip, out = 1 + 0 * gamma, -torch.sqrt(1 - gamma)
    else:
        safe = torch.where(known, gamma, 1.0)
        skip, out = 1 / safe, -torch.sqrt((1 - safe) / safe)
    dtype = torch.float64 if model_out.dtype == torch.float64 else torch.float32
    skip, out = skip.to(dtype), out.to(dtype)
    p = skip * x_t.to(dtype) + out * model_out.to(dtype)
    return torch.where(known | (prediction != "eps"), p, 0.0), out, known


def _continuous(
    model_out: Tensor, x: Tensor, x_t: Tensor, t: float | Tensor, schedule: BFNContinuous, prediction: str
) -> tuple[Tensor, Tensor]:
    """||x - p||^2 [B] and t [B or 1]."""
    if not isinstance(schedule, BFNContinuous):
        raise TypeError(f"schedule must be schedules.BFNContinuous, got {type(schedule).__name__}")
    check_tensor("model_out", model_out, dtypes=FLOATS64)
    for name, value in (("x", x), ("x_t", x_t)):
        check_tensor(name, value, shape=model_out.shape, dtypes=FLOATS64, like=model_out)
    at = _noising.times(t, schedule, model_out)
    p, _, _ = data_prediction(model_out, x_t, at, schedule, prediction)
    return _total((x.to(p.dtype) - p) ** 2), at


def bfn_continuous_loss(
    model_out: Tensor,
    x: Tensor,
    x_t: Tensor,
    t: float | Tensor,
    schedule: BFNContinuous,
    *,
    prediction: str = "eps",
    steps: int | None = None,
    units: str = "nats",
) -> Tensor:
    """The loss of a Bayesian flow network on continuous data, a number a sample.

        -ln(sigma_1) ||x - p||^2 / sigma_1^(2u)        of infinitely many steps, u = 1 - t uniform in [0, 1]
        n accuracy(i, n) / 2 ||x - p||^2               of n steps, u = (i - 1)/n, i uniform in 1..n

    Args:
        model_out: [B, *sample], what the network makes of x_t and u = schedule.model_time(t).   x: the data.
        x_t: fd.training.add_noise(x, t, schedule, ...)[0], the input distribution's mean mu.
        t: schedule time, one or [B].   prediction: of the network, "eps", "x0" or "v".
        steps: None, or n.   units: "nats" (a sum over the sample) or "bits_per_dim".
    Returns: [B] fp32 (float64 for float64), differentiable in model_out; its expectation over t is the loss.
    Raises:  TypeError, ValueError: a wrong shape, dtype or schedule, t outside [0, 1] or, with steps, within a step.
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 101 and 96; p = 0 for eps prediction where u < 1e-6.
    """
    error, at = _continuous(model_out, x, x_t, t, schedule, prediction)
    loss = flow_weight(at, schedule, steps).to(error.dtype) * error
    return scaled(loss, model_out.shape[1:].numel(), units)


def bfn_continuous_reconstruction(
    model_out: Tensor,
    x: Tensor,
    x_t: Tensor,
    schedule: BFNContinuous,
    *,
    prediction: str = "eps",
    units: str = "nats",
) -> Tensor:
    """What is left to send after the last step, for data of the precision sigma_1: -ln N(x | p, sigma_1^2), at t = 0.

    Args, Returns, Raises: as bfn_continuous_loss; a density, so it may be negative.
    Source: Graves et al. 2023, arXiv:2308.07037, section 4.10: of order sigma_1 and left out in training.
    """
    error, _ = _continuous(model_out, x, x_t, 0.0, schedule, prediction)
    constant = math.log(schedule.sigma_1) + 0.5 * math.log(2 * math.pi)
    size = model_out.shape[1:].numel()
    return scaled(0.5 * error / schedule.sigma_1**2 + size * constant, size, units)


def _logits(logits: Tensor, x: Tensor, schedule: BFNDiscrete) -> None:
    if not isinstance(schedule, BFNDiscrete):
        raise TypeError(f"schedule must be schedules.BFNDiscrete, got {type(schedule).__name__}")
    check_logits("logits", logits, dtypes=FLOATS64)
    if logits.shape[-1] != channels(schedule.num_classes):
        raise ValueError(
            f"logits must end in {channels(schedule.num_classes)} for {schedule.num_classes} classes, "
            f"got {tuple(logits.shape)}"
        )
    check_classes("x", x, schedule.num_classes, logits.shape[:-1], logits)


def bfn_discrete_loss(
    logits: Tensor,
    x: Tensor,
    t: float | Tensor,
    schedule: BFNDiscrete,
    *,
    steps: int | None = None,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    noise: Tensor | None = None,
    units: str = "nats",
) -> Tensor:
    """The loss of a Bayesian flow network on classes, a number a sample.

        K beta_1 u ||e_x - softmax(m)||^2                            of infinitely many steps, u = 1 - t uniform
        n (y_x - ln sum_k exp(ln p_k + y_k)),  y = a K e_x + sqrt(a K) n_k    of n steps, u = (i - 1)/n, a = accuracy(i)

    The second is one draw of n KL(sender | receiver): y is the sent message on logits, p = softmax(m).
    Args:
        logits: [B, *D, K'], what the network makes of ops.categorical_noise(x, t, schedule, ...) and 1 - t.
        x: int64 classes [B, *D].   t: schedule time, one or [B].   steps: None, or n, with seeds or noise:
        seeds, index, row: rng.normal(seeds, (*D, K'), row=row, stream=2, index=index).   noise: n_k itself (K = 2: the
            true class's less the other's, over sqrt(2)).   units: "nats" (a sum over the sample) or "bits_per_dim" (a
            token).
    Returns: [B] fp32 (float64 for float64 logits), differentiable in logits; its expectation is the loss.
    Raises:  TypeError, ValueError: a wrong shape, dtype or schedule, classes outside 0..K-1, t outside [0, 1] or, with
        steps, within a step; steps without noise, or what draws it without steps.
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 205 and 189.
    """
    _logits(logits, x, schedule)
    at, tokens = _noising.times(t, schedule, logits), x.shape[1:].numel()
    if steps is None:
        _without_steps(seeds, index, row, noise)
        if not tokens:  # a sum over none, not a mean
            return scaled(_total(logits.to(_noising.wide(logits))), tokens, units)
        loss = ops.categorical_loss(logits, x, schedule.scale * tokens * (1.0 - at))
        return scaled(loss, tokens, units)
    steps = _whole(steps)
    keyed, which = _noising.noise_arguments(logits, seeds, index, row, rng.CATEGORICAL, noise)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n = _noising.noise_of(logits, keyed, which, row, rng.CATEGORICAL, noise, dtype)
    known = spread(interval(at, schedule, steps)[1] * schedule.num_classes, logits).to(dtype)  # a K
    m = logits.to(dtype)
    if schedule.num_classes == 2:  # relative to the true class: only the other one's log-odds matter
        sign = (2 * x - 1)[..., None].to(dtype)
        other = -(known + torch.sqrt(2 * known) * n)
        loss = -torch.logaddexp(
            torch.nn.functional.logsigmoid(sign * m), torch.nn.functional.logsigmoid(-sign * m) + other
        )
        return scaled(steps * _total(loss), tokens, units)
    y = torch.sqrt(known) * n
    y = y.scatter_add(-1, x[..., None], known.expand(x[..., None].shape))
    y = y - y.gather(-1, x[..., None])  # the sent message is 0: a large a K does not swallow ln p
    loss = -torch.logsumexp(torch.log_softmax(m, -1) + y, -1)
    return scaled(steps * _total(loss), tokens, units)


def bfn_discrete_reconstruction(logits: Tensor, x: Tensor, schedule: BFNDiscrete, *, units: str = "nats") -> Tensor:
    """What is left to send after the last step: -ln softmax(m)_x, m the network's logits at t = 0.

    Args, Returns, Raises: as bfn_discrete_loss. Source: Graves et al. 2023, arXiv:2308.07037, eq. 21.
    """
    _logits(logits, x, schedule)
    m = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if schedule.num_classes == 2:
        loss = -torch.nn.functional.logsigmoid((2 * x - 1)[..., None].to(m.dtype) * m)[..., 0]
    else:
        loss = -torch.log_softmax(m, -1).gather(-1, x[..., None])[..., 0]
    return scaled(_total(loss), x.shape[1:].numel(), units)


def _bins(
    model_out: Tensor, x: Tensor, x_t: Tensor, t: float | Tensor, schedule: BFNContinuous, bins: int, prediction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and std of the network's Gaussian, x, all [B, *sample] of the dtype computed in, and t [B or 1]."""
    if not isinstance(schedule, BFNContinuous):
        raise TypeError(f"schedule must be schedules.BFNContinuous, got {type(schedule).__name__}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be an integer >= 2, got {bins!r}")
    if prediction == "v":
        raise ValueError("prediction of a binned output must be eps or x0, got 'v'")
    check_tensor("x", x, dtypes=FLOATS64)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *], got {tuple(x.shape)}")
    check_tensor("model_out", model_out, shape=(len(x), 2 * x.shape[1], *x.shape[2:]), dtypes=FLOATS64, like=x)
    check_tensor("x_t", x_t, shape=x.shape, dtypes=FLOATS64, like=x)
    at = _noising.times(t, schedule, x)
    m0, m1 = model_out.chunk(2, 1)
    mean, out, known = data_prediction(m0, x_t, at, schedule, prediction)
    largest = 0.9 * math.log(torch.finfo(mean.dtype).max)  # of a log-std: an infinite std has no gradient
    std = out.abs() * torch.exp(m1.to(mean.dtype).clamp(max=largest))
    return mean, torch.where(known | (prediction != "eps"), std, 1.0), x.to(mean.dtype), at


def bfn_discretised_loss(
    model_out: Tensor,
    x: Tensor,
    x_t: Tensor,
    t: float | Tensor,
    schedule: BFNContinuous,
    *,
    bins: int,
    prediction: str = "eps",
    steps: int | None = None,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    noise: Tensor | None = None,
    units: str = "nats",
) -> Tensor:
    """The loss of a Bayesian flow network on data quantised to bins of [-1, 1], a number a sample.

        -ln(sigma_1) ||x - sum_j c_j P_j||^2 / sigma_1^(2u)                   of infinitely many steps
        n (ln N(y | x, 1/a) - ln sum_j P_j N(y | c_j, 1/a)),  y = x + n/sqrt(a)    of n steps, a = accuracy(i, n)

    P_j is the mass of N(mean, std^2) in bin j (ops.binned_readout), c_j its centre. The second is one draw of n KL.
    Args:
        model_out: [B, 2 C, *] for x [B, C, *]: mean and log-std of eps (or x0).   x: bin centres, (2 k + 1) / K - 1,
        unchecked.   x_t, t, schedule: as bfn_continuous_loss.   bins: K.   prediction: "eps" or "x0".   steps, seeds,
        index, row, noise, units: as bfn_discrete_loss, noise [B, C, *]. The loss of n steps holds [B, C, *, K] numbers,
        the other twice as many until backward.
    Returns: [B] fp32 (float64 for float64), differentiable in model_out.
    Raises:  TypeError, ValueError: a wrong shape, dtype or schedule, bins < 2, t as bfn_continuous_loss; steps without
        noise, or what draws it without steps.
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 112-117; mean 0 and std 1 for eps where u < 1e-6.
    """
    mean, std, data, at = _bins(model_out, x, x_t, t, schedule, bins, prediction)
    size = x.shape[1:].numel()
    if steps is None:
        _without_steps(seeds, index, row, noise)
        error = _total((data - bin_mean(mean, std, bins)) ** 2)
        return scaled(flow_weight(at, schedule, None).to(error.dtype) * error, size, units)
    steps = _whole(steps)
    keyed, which = _noising.noise_arguments(x, seeds, index, row, rng.CATEGORICAL, noise)
    n = _noising.noise_of(x, keyed, which, row, rng.CATEGORICAL, noise, data.dtype)
    a = spread(interval(at, schedule, steps)[1], x).to(data.dtype)
    j = torch.arange(bins, device=x.device).expand(*x.shape, bins)
    centres = (2 * j.to(data.dtype) + 1) / bins - 1
    received = bin_log_probability(mean[..., None], std[..., None], j, bins)
    gap = torch.sqrt(a)[..., None] * (data[..., None] - centres) + n[..., None]
    loss = -0.5 * n * n - torch.logsumexp(received - 0.5 * gap * gap, -1)
    return scaled(steps * _total(loss), size, units)


def bfn_discretised_reconstruction(
    model_out: Tensor,
    x: Tensor,
    x_t: Tensor,
    schedule: BFNContinuous,
    *,
    bins: int,
    prediction: str = "eps",
    units: str = "nats",
) -> Tensor:
    """What is left to send after the last step: -ln P_k of x's bin k, at t = 0.

    Args, Returns, Raises: as bfn_discretised_loss. Source: Graves et al. 2023, arXiv:2308.07037, eq. 21 and 109.
    """
    mean, std, data, _ = _bins(model_out, x, x_t, 0.0, schedule, bins, prediction)
    k = torch.floor((data + 1) * (bins / 2)).clamp(0, bins - 1).long()
    loss = torch.where(data.isnan(), data, -bin_log_probability(mean, std, k.clamp(0, bins - 1), bins))
    return scaled(_total(loss), x.shape[1:].numel(), units)
