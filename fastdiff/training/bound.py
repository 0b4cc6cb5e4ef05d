"""The variational bound of a Gaussian chain: its terms, the losses made of them, and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.devices import widest
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor, spread
from fastdiff.ops._noising import Seeds, check_chain, noise_arguments, noise_of, table_of, times, wide
from fastdiff.parameters import seen_by
from fastdiff.schedules import Betas

__all__ = [
    "BitsPerDim",
    "bits_per_dim",
    "hybrid_loss",
    "log_variance_range",
    "prior_kl",
    "vb_term",
    "vlb_loss",
]

VB_WEIGHT = 0.001  # of L_vlb in L_hybrid
Model = Callable[..., Any]


def log_variance_range(schedule: Betas, t: Tensor) -> tuple[Tensor, Tensor]:
    """(ln beta~_t, ln beta_t) [B] float64, between which a learned variance interpolates.

    beta~_0 is 0: its logarithm is taken as that of beta~_1 (guided-diffusion's choice). A respaced chain is
    Betas(respaced betas): its own.   Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    low, high = table_of(schedule, _log_variances, (), t.device, widest(t.device))[t].unbind(-1)
    return low, high


def _log_variances(schedule: Betas) -> tuple[Tensor, Tensor]:
    betas = torch.from_numpy(schedule.betas.copy())
    sigma2 = torch.from_numpy(schedule.sigma(np.arange(len(betas))) ** 2)
    small = betas[1:] * sigma2[:-1] / sigma2[1:]
    small = torch.cat([small[:1] if len(betas) > 1 else betas[:1], small])
    return small.log(), betas.log()


def vb_term(
    model_out: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    schedule: Betas,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: tuple[float, float] | None = None,
    bins: int = 256,
    stop_mean: bool = False,
) -> Tensor:
    """One term of the bound for every sample, in bits per dimension.

        t > 0: L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t));   t = 0: L_0 = -ln p(x0 | x_1), discretised

    Args:
        model_out: [B, C, ...], or [B, 2 C, ...] with variance="learned_range": the prediction, then v.
        x0, x_t: [B, C, ...].   t: index or int64 [B].   prediction: "eps", "x0", "v", "score" or "flow".
        variance: "learned_range" (ln s^2 = f ln beta + (1 - f) ln beta~, f = (v + 1) / 2), "fixed_small" or
            "fixed_large".
        clip: of x0-hat.   bins: levels of the data in [-1, 1]; 0: continuous data, whose L_0 is a density's.
        stop_mean: no gradient to the prediction (L_hybrid's).
    Returns: [B] float32 (float64 for float64 data): the mean over the sample's elements, divided by ln 2.
    Raises:  TypeError, ValueError as `fastdiff.ops.posterior`; ValueError for another variance or channel count.
    Source:  Ho et al. 2020, arXiv:2006.11239, eq. 5; Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 4-7.
    """
    _check_data(x0, clip)
    at = _chain_times(t, schedule, x0)
    mean_out, v = _planes(model_out, x0, variance)
    if stop_mean:
        mean_out = mean_out.detach()
    check_tensor("x_t", x_t, dtypes=FLOATS64)
    x_t = x_t.to(wide(x0))  # the means are of its type, and their difference is far smaller than they
    true_mean, _, true_log, _ = ops.posterior_ref(x_t, x0, at, schedule, "x0")
    mean = ops.posterior_ref(x_t, mean_out, at, schedule, prediction, clip)[0]
    low, high = (spread(c.to(wide(x0)), x0) for c in log_variance_range(schedule, at))
    if v is None:
        log_variance = (low if variance == "fixed_small" else high).expand_as(x0)
    else:
        f = (v.to(wide(x0)) + 1) / 2
        log_variance = f * high + (1 - f) * low
    first, true_log = (at == 0).expand(x0.shape[0]), spread(true_log.to(wide(x0)), x0)
    here = spread(first, x0)  # each term sees only its own samples: 0 times an infinite slope is NaN
    kl = ops.gaussian_kl(
        true_mean, true_log, torch.where(here, true_mean, mean), torch.where(here, true_log, log_variance)
    )
    nll = ops.decoder_nll(
        x0, torch.where(here, mean, x0.to(mean.dtype)), torch.where(here, 0.5 * log_variance, 0.0), bins=bins
    )
    return torch.where(first, nll, kl) / math.log(2)


def vlb_loss(
    model_out: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: Betas,
    seeds: Seeds,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: tuple[float, float] | None = None,
    bins: int = 256,
    stop_mean: bool = False,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
) -> Tensor:
    """L_vlb: T times the term of a random t, an unbiased estimate of the sum over t, in bits per dimension.

    x_t is made again from seeds.   Args, Returns, Raises: as `vb_term` and `add_noise`; without the prior's L_T.
    """
    _check_data(x0, clip)
    x_t = ops.add_noise(x0, t, schedule, seeds=seeds, index=index, row=row, stream=stream)
    assert isinstance(x_t, Tensor)
    term = vb_term(
        model_out, x0, x_t, t, schedule, prediction=prediction, variance=variance, clip=clip, bins=bins,
        stop_mean=stop_mean,
    )  # fmt: skip
    return len(schedule.betas) * term


def hybrid_loss(
    model_out: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: Betas,
    seeds: Seeds,
    *,
    prediction: str = "eps",
    weight: float = VB_WEIGHT,
    bins: int = 256,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    **options: Any,  # noqa: ANN401 - those of denoising_loss
) -> Tensor:
    """L_hybrid = L_simple + weight L_vlb, the bound's gradient going to the variance alone.

    Args:    model_out: [B, 2 C, ...]: the prediction, then v.   weight: of L_vlb.   bins: as `vb_term`.
             options: of `fastdiff.ops.denoising_loss` (weighting, loss, ...).   The rest: as `denoising_loss`.
    Returns: [B].   Raises: as `denoising_loss` and `vlb_loss`; TypeError for target, which is `prediction` here.
    Source:  Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16.
    """
    if "target" in options:
        raise TypeError(f"the target is what the model predicts: give prediction={options['target']!r}, not target")
    m, _ = _planes(model_out, x0, "learned_range")
    noise: dict[str, Any] = {"index": index, "row": row, "stream": stream}
    simple = ops.denoising_loss(m, x0, t, schedule, seeds, target=prediction, **noise, **options)
    bound = vlb_loss(model_out, x0, t, schedule, seeds, prediction=prediction, bins=bins, stop_mean=True, **noise)
    return simple + weight * bound


def prior_kl(x0: Tensor, schedule: Betas) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, I)) of every sample, in bits per dimension: [B].

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 5.
    """
    _check_data(x0)
    check_chain(schedule, "the bound")
    x = x0.to(wide(x0))
    end = table_of(schedule, _end, (), x.device, widest(x.device))[0].to(x.dtype)
    alpha, log_variance = end[0], end[1].view((1,) * x.dim())
    return ops.gaussian_kl(alpha * x, log_variance, torch.zeros_like(x), torch.zeros_like(log_variance)) / math.log(2)


def _end(schedule: Betas) -> tuple[Tensor, Tensor]:
    """alpha and ln sigma^2 [1] of the chain's last index."""
    last = np.array([len(schedule.betas) - 1])
    return torch.from_numpy(schedule.alpha(last)), 2 * torch.from_numpy(schedule.sigma(last)).log()


class BitsPerDim(NamedTuple):
    """total [B] = prior [B] + the sum of terms [T, B] (index t); mse [T, B] of x0-hat. Bits per dimension."""

    total: Tensor
    prior: Tensor
    terms: Tensor
    mse: Tensor


@torch.no_grad()
def bits_per_dim(
    model: Model,
    x0: Tensor,
    schedule: Betas,
    *,
    seeds: Seeds | None = None,
    prediction: str = "eps",
    variance: str = "learned_range",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    bins: int = 256,
    cond: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> BitsPerDim:
    """The whole bound -ln p(x0) <= L_T + sum_t L_t, one model evaluation an index t.

    Args:
        model: model(x_t, t, **cond), t int64 [B]; a module sees x_t in the dtype of its parameters.   x0:
        [B, C, ...] in [-1, 1].   seeds: B ints or int64 [B], default 0 .. B - 1; index t uses rng.normal(..., row=t).
        progress: a bar over t.   The rest: as `vb_term`.
    Returns: BitsPerDim; nothing is read back from the device.
    Source:  Ho et al. 2020, arXiv:2006.11239, section 4; Nichol and Dhariwal 2021, arXiv:2102.09672.
    """
    _check_data(x0, clip)
    check_chain(schedule, "the bound")
    batch, length = x0.shape[0], len(schedule.betas)
    keyed: Sequence[int] | Tensor = torch.arange(batch, device=x0.device) if seeds is None else seeds
    found, _ = noise_arguments(x0, keyed, None, 0, rng.ROWS, None)
    steps: Any = range(length - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps, desc="bits per dimension", unit="t")
    terms, errors = [], []
    for k in steps:
        t = torch.full((batch,), k, dtype=torch.int64, device=x0.device)
        if x0.dtype == torch.float64:
            n = noise_of(x0, found, torch.zeros_like(t), k, rng.ROWS, None, torch.float64)
            x_t = ops.add_noise(x0, t, schedule, noise=n)
        else:
            x_t = ops.add_noise(x0, t, schedule, seeds=found, row=k)
        assert isinstance(x_t, Tensor)
        out = model(seen_by(model, x_t), t, **dict(cond or {}))
        term = vb_term(out, x0, x_t, t, schedule, prediction=prediction, variance=variance, clip=clip, bins=bins)
        terms.append(term)
        m, _ = _planes(out, x0, variance)
        hat = ops.posterior_ref(x_t.to(wide(x0)), m, t, schedule, prediction, clip)[3]
        errors.append((hat - x0).square().reshape(batch, x0.shape[1:].numel()).mean(1))
    stacked, prior = torch.stack(terms[::-1]), prior_kl(x0, schedule)
    return BitsPerDim(prior + stacked.sum(0), prior, stacked, torch.stack(errors[::-1]))


def _check_data(x0: Tensor, clip: object = None) -> None:
    check_tensor("x0", x0, dtypes=FLOATS64)
    check_batched("x0", x0)
    if clip is not None and not (isinstance(clip, tuple | list) and len(clip) == 2):
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, or None, got {clip!r}")


def _chain_times(t: int | Tensor, schedule: Betas, x0: Tensor) -> Tensor:
    check_chain(schedule, "the bound")
    return times(t, schedule, x0)


def _planes(model_out: Tensor, x0: Tensor, variance: str) -> tuple[Tensor, Tensor | None]:
    """The prediction and v."""
    check_tensor("x0", x0, dtypes=FLOATS64)
    if variance not in ("learned_range", "fixed_small", "fixed_large"):
        raise ValueError(f"unknown variance {variance!r}; valid: learned_range, fixed_small, fixed_large")
    learned = variance == "learned_range"
    shape = tuple(x0.shape)
    if learned and x0.dim() > 1:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    check_tensor("model_out", model_out, shape=shape, dtypes=FLOATS64, like=x0)
    if not learned:
        return model_out, None
    if x0.dim() < 2:
        raise ValueError(f"a learned variance needs a channel axis, x0 [B, C, ...], got {tuple(x0.shape)}")
    m, v = model_out.chunk(2, 1)
    return m, v
