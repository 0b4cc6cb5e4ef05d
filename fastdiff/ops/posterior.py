"""The DDPM posterior q(x_{t-1} | x_t, x0-hat): mean, variances and x0-hat in one pass."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdiff.cpu import posterior_into
from fastdiff.ops import _dispatch, _fused, _noising
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor, spread
from fastdiff.prediction import conversion, factored
from fastdiff.schedules import Betas

POSTERIOR_PREDICTIONS = ("eps", "x0", "v", "score", "flow")


def posterior(
    x_t: Tensor,
    model_out: Tensor,
    t: int | Tensor,
    schedule: Betas,
    prediction: str = "eps",
    clip: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of x_{t-1} given x_t and the model's output.

        x0   = clamp(c_skip x_t + c_out m, *clip),  as c_skip (x_t + c_out / c_skip m)
        mean = sqrt(ab_{t-1}) beta_t / (1 - ab_t) x0 + sqrt(1 - beta_t) (1 - ab_{t-1}) / (1 - ab_t) x_t
        variance = beta_t (1 - ab_{t-1}) / (1 - ab_t)

    Args:
        x_t, model_out: [B, *sample], fp32, bf16 or fp16 (float64 in plain torch), any strides.
        t: index, one or [B].   schedule: Betas, with ab = alpha_bar and ab_{-1} = 1.
        prediction: what the model returns: eps, x0, v, score or flow.   clip: bounds of x0, or None.
    Returns: mean [B, *sample], variance [B], log_variance [B], x0 [B, *sample]; mean and x0 of x_t's dtype, variances
        fp32 (float64 for float64 data). The log-variance at t = 0, where the variance is 0, is that of t = 1.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, another schedule, an unknown prediction, clip with
        lo > hi, t out of range (on CUDA: NaN instead of an error), eps or score with zero terminal SNR.
    Numerics: coefficients in float64 without cancellation, arithmetic in fp32; a clamped NaN stays NaN.
    Source:  Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7; the clipped log-variance: Nichol and Dhariwal 2021.
    """
    at, lo, hi = _checked(x_t, model_out, t, schedule, prediction, clip)
    on_kernel, wide = _dispatch.kernels_for(x_t), torch.float64 in (x_t.dtype, model_out.dtype)
    if wide or _dispatch.graded(x_t, model_out) or not (on_kernel or _fused.wanted(x_t, model_out)):
        return posterior_ref(x_t, model_out, at, schedule, prediction, clip)
    coef = _noising.table_of(schedule, _columns, (prediction,), x_t.device)
    mean = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    x0, variance = torch.empty_like(mean), torch.empty(2, x_t.shape[0], dtype=torch.float32, device=x_t.device)
    if not on_kernel:
        if not posterior_into(x_t, model_out, coef, at, (lo, hi), mean, x0, variance):
            return posterior_ref(x_t, model_out, at, schedule, prediction, clip)
    elif x_t.numel():
        torch.ops.fastdiff.posterior(x_t, model_out, coef, at, lo, hi, clip is not None, mean, x0, variance)
    else:
        variance = coef[at, 4:6].T.expand(2, x_t.shape[0])
    value, logarithm = variance.unbind(0)
    return mean, value, logarithm, x0


def posterior_ref(
    x_t: Tensor,
    model_out: Tensor,
    t: int | Tensor,
    schedule: Betas,
    prediction: str = "eps",
    clip: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`posterior` in plain torch: computes in float64 for float64 data, else in float32; differentiable."""
    at, lo, hi = _checked(x_t, model_out, t, schedule, prediction, clip)
    dtype = _noising.wide(x_t)
    coef = _noising.table_of(schedule, _columns, (prediction,), x_t.device, dtype)[at]
    c_skip, c_ratio, k_x0, k_xt = (spread(c, x_t) for c in coef[:, :4].unbind(1))
    x, m = x_t.to(dtype), model_out.to(dtype)
    p = c_skip * (x + c_ratio * m)
    if clip is not None:
        p = p.clamp(lo, hi)
    variance, log_variance = (c.expand(x_t.shape[0]) for c in coef[:, 4:6].unbind(1))
    return (k_x0 * p + k_xt * x).to(x_t.dtype), variance, log_variance, p.to(x_t.dtype)


def _columns(schedule: Betas, prediction: str) -> tuple[Tensor, ...]:
    """c_skip, c_ratio, k_x0, k_xt, variance, log_variance, 0, 0: float64 [T] each."""
    steps = np.arange(len(schedule.betas))
    alpha, sigma = schedule.alpha_sigma(steps)
    convert = conversion(prediction, alpha, sigma)
    c_skip, c_ratio = factored(convert.c_skip, convert.c_out)
    beta = schedule.betas
    before, noise_before = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1] ** 2)
    k_x0 = before * beta / sigma**2
    k_x0[0] = 1.0  # beta_0 / (1 - ab_0) without its rounding
    k_xt = np.sqrt(1 - beta) * noise_before / sigma**2
    variance = beta * noise_before / sigma**2
    with np.errstate(divide="ignore"):
        log_variance = np.log(variance)
    if len(beta) > 1:
        log_variance[0] = log_variance[1]
    zero = 0 * beta
    columns = (c_skip, c_ratio, k_x0, k_xt, variance, log_variance, zero, zero)
    return tuple(torch.from_numpy(np.array(c, np.float64)) for c in columns)


def _checked(
    x_t: Tensor, model_out: Tensor, t: int | Tensor, schedule: Betas, prediction: str,
    clip: tuple[float, float] | None,
) -> tuple[Tensor, float, float]:  # fmt: skip
    check_tensor("x_t", x_t, dtypes=FLOATS64)
    check_batched("x_t", x_t)
    check_tensor("model_out", model_out, shape=x_t.shape, dtypes=FLOATS64, like=x_t)
    _noising.check_chain(schedule, "the posterior of a step")
    if prediction not in POSTERIOR_PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(POSTERIOR_PREDICTIONS)}")
    lo, hi = (-math.inf, math.inf) if clip is None else clip
    if not lo <= hi:
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, got {clip!r}")
    return _noising.times(t, schedule, x_t), float(lo), float(hi)


def _launch(
    x_t: Tensor, model_out: Tensor, coef: Tensor, t: Tensor, lo: float, hi: float, clip: bool, mean: Tensor,
    x0: Tensor, variance: Tensor,
) -> None:  # fmt: skip
    batch, n = x_t.shape[0], x_t.shape[1:].numel()
    args = (
        x_t.contiguous(), model_out.contiguous(), coef, t.contiguous(), mean, x0, variance, n, batch,
        _dispatch.FIRST, coef.shape[0], int(t.numel() > 1), lo, hi,
    )  # fmt: skip
    _dispatch.launch(_dispatch.kernels("posterior").posterior_kernel, args, n, batch, CLIP=clip)


_dispatch.register(
    "posterior(Tensor x_t, Tensor model_out, Tensor coef, Tensor t, float lo, float hi, bool clip, Tensor(a!) mean, "
    "Tensor(b!) x0, Tensor(c!) variance) -> ()",
    _launch,
)
