"""The training input of a Bayesian flow network on categorical data, from integer classes in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.ops import _noising
from fastdiff.ops._categorical import belief, channels, check_classes
from fastdiff.ops._dispatch import FLOATS64, spread
from fastdiff.ops._noising import Seeds
from fastdiff.schedules import BFNDiscrete

SQRT2 = 2.0**0.5


def categorical_noise(
    x: Tensor,
    t: float | Tensor,
    schedule: BFNDiscrete,
    *,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noises integer classes to time t: the network's input, without a one-hot or noisy tensor in between.

        z = alpha(t) e_x + sigma(t) n;  model_in = 2 softmax(z) - 1          alpha = sigma^2 = K beta(1 - t)
        K = 2:  d = (2x - 1) alpha + sqrt(2) sigma n;  model_in = tanh(d / 2)

    Args:
        x: int64 classes [B, *D], 0..K-1, any strides.   t: one time, or [B], floating point in [0, 1], noise at 1.
        schedule: BFNDiscrete(beta_1, num_classes).
        seeds: B ints or int64 [B]: n = rng.normal(seeds, (*D, K'), row=row, stream=stream, index=index), drawn in the
            kernel, K' = K (1 for K = 2).   index: int64 [B], None is 0 each.   row: changes n (a training step, say).
        noise: n itself, [B, *D, K']; not with seeds.   out_dtype: of the results.   return_logits: also z (K = 2: d).
    Returns: model_in [B, *D, K'], or (model_in, z).
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, classes outside 0..K-1 or t outside [0, 1] (on CUDA:
        NaN instead of an error), seeds and noise both or neither, another schedule.
    Numerics: coefficients in float64, arithmetic in fp32 (float64 for float64 noise).
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 185: y ~ N(beta (K e_x - 1), beta K I), its constant dropped.
    """
    at, keyed, which = _checked(x, t, schedule, seeds, index, row, stream, noise, out_dtype)
    return categorical_noise_ref(
        x, at, schedule, seeds=keyed, index=which, row=row, stream=stream, noise=noise, out_dtype=out_dtype,
        return_logits=return_logits,
    )  # fmt: skip


def categorical_noise_ref(
    x: Tensor,
    t: float | Tensor,
    schedule: BFNDiscrete,
    *,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`categorical_noise` in plain torch: computes in float64 for float64 noise or output, else in float32."""
    at, keyed, which = _checked(x, t, schedule, seeds, index, row, stream, noise, out_dtype)
    wide = torch.float64 in (out_dtype, None if noise is None else noise.dtype)
    dtype = torch.float64 if wide else torch.float32
    n = _noising.noise_of(_numbers(x, schedule), keyed, which, row, stream, noise, dtype)
    alpha, sigma = (spread(c.to(dtype), n) for c in (schedule.alpha(at), schedule.sigma(at)))
    if schedule.num_classes == 2:
        e, sigma = (2 * x - 1).to(dtype)[..., None], SQRT2 * sigma
    else:
        e = (x[..., None] == torch.arange(schedule.num_classes, device=x.device)).to(dtype)
    z = alpha * e + sigma * n
    out = belief(z).to(out_dtype)
    return (out, z.to(out_dtype)) if return_logits else out


def _numbers(x: Tensor, schedule: BFNDiscrete) -> Tensor:
    """x with the shape [B, *D, K'] of its logits (a view)."""
    return x[..., None].expand(*x.shape, channels(schedule.num_classes))


def _checked(
    x: Tensor, t: float | Tensor, schedule: BFNDiscrete, seeds: Seeds | None, index: Tensor | None, row: int,
    stream: int, noise: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    if not isinstance(schedule, BFNDiscrete):
        raise TypeError(f"schedule must be schedules.BFNDiscrete, got {type(schedule).__name__}")
    check_classes("x", x, schedule.num_classes)
    if x.dim() == 0:
        raise ValueError("x must have a batch axis, [B, *D], got a 0-d tensor")
    if out_dtype not in FLOATS64:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    at = _noising.times(t, schedule, x)
    return at, *_noising.noise_arguments(_numbers(x, schedule), seeds, index, row, stream, noise)
