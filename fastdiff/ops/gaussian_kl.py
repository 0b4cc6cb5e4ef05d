"""The terms of a variational bound: KL of diagonal Gaussians, and a Gaussian's probability of a bin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.devices import has_float64
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.ops._log_ndtr import log_ndtr
from fastdiff.ops._once import once
from fastdiff.ops.denoising_loss import add_parts, loss_tile
from fastdiff.transforms import batched, transformed

SLOPE_SLOTS = 4  # tensors that the gradient's kernel reads
NARROW = 1e-3  # half a bin in std, and times its distance, below which a bin's mass is its width times the density


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of diagonal Gaussians, the mean over each sample's elements.

        kl = (expm1(d) - d + (mean1 - mean2)^2 / variance2) / 2,   d = ln variance1 - ln variance2

    Args:    mean1, mean2: [B, *sample], fp32, bf16, fp16 or float64.   log_variance1, log_variance2: of a shape that
             broadcasts to it.
    Returns: [B] float32 (float64 where an argument is), in nats; differentiable.
    Raises:  TypeError, ValueError for another dtype, shape or device.
    Numerics: exactly 0 for equal Gaussians, no cancellation near it.   Source: Ho et al. 2020, arXiv:2006.11239, eq. 5.
    """
    check_tensor("mean1", mean1, dtypes=FLOATS64)
    check_batched("mean1", mean1)
    check_tensor("mean2", mean2, shape=mean1.shape, dtypes=FLOATS64, like=mean1)
    for name, value in (("log_variance1", log_variance1), ("log_variance2", log_variance2)):
        _broadcasts(name, value, mean1)
    values = (mean1, log_variance1, mean2, log_variance2)
    graded = _dispatch.graded(mean1, log_variance1)
    wide = any(v.dtype == torch.float64 for v in values)
    on_kernel = _dispatch.kernels_for(mean1)
    if graded or wide or not mean1.numel() or not (on_kernel or native.plain(values)):
        return gaussian_kl_ref(*values)
    if on_kernel or _dispatch.graded(mean2, log_variance2):
        out: Tensor = (_KL if transformed() else _Direct).apply(*values)
        return out
    return _forward(*values)


def gaussian_kl_ref(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """`gaussian_kl` in plain torch: float64 where an argument is, else float32; differentiable in everything."""
    values = (mean1, log_variance1, mean2, log_variance2)
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    mean1, log_variance1, mean2, log_variance2 = (v.to(dtype) for v in values)
    d = log_variance1 - log_variance2
    kl = 0.5 * (_exp_minus_line(d) + (mean1 - mean2).square() * torch.exp(-log_variance2))
    return kl.expand_as(mean1).reshape(len(mean1), mean1.shape[1:].numel()).mean(1)


def _exp_minus_line(d: Tensor) -> Tensor:
    """e^d - 1 - d, by its series where the terms cancel."""
    near, terms = d.clamp(-0.25, 0.25), 13 if d.dtype == torch.float64 else 7
    series = torch.full_like(d, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = torch.addcmul(d.new_full((), 1 / math.factorial(k)), series, near)
    return torch.where(d.abs() < 0.25, series * near * near, torch.expm1(d) - d)


def _forward(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """kl [B] by the kernel, the C++ loop or plain torch, without its own gradient."""
    values = mean1, log_variance1, mean2, log_variance2
    on_kernel = _dispatch.kernels_for(mean1)
    if not (on_kernel or (_fused.wanted(*values) and native.available())):
        return gaussian_kl_ref(*(v.detach() for v in values))
    kl = torch.empty(mean1.shape[0], dtype=torch.float32, device=mean1.device)
    logs = [_per_sample_or_full(v, mean1) for v in (log_variance1, log_variance2)]
    if on_kernel:
        torch.ops.fastdiff.gaussian_kl(mean1, logs[0], mean2, logs[1], kl)
    else:
        given, about = _for_loops(mean1, logs[0], mean2, logs[1])
        native.run("gaussian_kl", "gaussian_kl", *given, kl, *about, *native.layout(mean1, heavy=True))
    return kl


class _KL(torch.autograd.Function):
    """Saves what it was given: backward makes the slopes from it, so that nothing more of full size is kept."""

    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return _backward(ctx, g)


class _Direct(torch.autograd.Function):
    """The same, called sooner: see `denoising_loss`."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensor:  # noqa: ANN401
        _KL.setup_context(ctx, values, values[0])
        return _forward(*values)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return _backward(ctx, g)


def _backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gradients of mean2 and log_variance2, where they are needed, from that of kl [B]."""
    if g is None:
        return (None,) * 4
    values, make = ctx.saved_tensors, _many if batched(g) else _gradients
    return None, None, *once(lambda: make(values, g, ctx.needs_input_grad[2:]), (*values[2:], g))


def _many(values: tuple[Tensor, ...], g: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients of many g at once, from the slopes, in fp32 until g is in them."""
    mean = values[0]
    whole = tuple(v.float().expand_as(mean) for v in values)
    slopes = _gradients(whole, torch.ones(len(mean), device=mean.device), wanted)
    return [
        None if slope is None else (slope * _dispatch.spread(g, slope)).sum_to_size(v.shape).to(v.dtype)
        for slope, v in zip(slopes, values[2:], strict=True)
    ]


def _gradients(values: tuple[Tensor, ...], g: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    mean1, log_variance1, mean2, log_variance2 = values
    full = log_variance2.shape == mean1.shape
    dtypes = mean2.dtype, log_variance2.dtype if full else torch.float32
    outs = [
        torch.empty(mean1.shape, dtype=dtype, device=mean1.device) if needed else None
        for dtype, needed in zip(dtypes, wanted, strict=True)
    ]
    logs = [_per_sample_or_full(v, mean1) for v in (log_variance1, log_variance2)]
    if _dispatch.kernels_for(mean1):
        torch.ops.fastdiff.gaussian_kl_slopes(mean1, logs[0], mean2, logs[1], g, *outs)
    elif not (_fused.wanted(*values, g) and native.available()):
        _slopes(mean1, log_variance1, mean2, log_variance2, g, *outs)
    else:
        given, about = _for_loops(mean1, logs[0], mean2, logs[1])
        options = *about, native.TYPES[dtypes[1]], *native.layout(mean1, heavy=True)
        native.run("gaussian_kl", "gaussian_kl_slopes", *given, g.contiguous(), *outs, *options)
    if outs[1] is not None and not full:
        outs[1] = outs[1].sum_to_size(log_variance2.shape).to(log_variance2.dtype)
    return outs


def _slopes(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor, g: Tensor, of_mean: Tensor | None,
    of_log: Tensor | None,
) -> None:  # fmt: skip
    """Writes g d kl / d mean2 and g d kl / d log_variance2, in plain torch."""
    apart, scale = mean2.float() - mean1.float(), _dispatch.spread(g / mean1.shape[1:].numel(), mean1)
    pull = apart * torch.exp(-log_variance2.float())
    if of_mean is not None:
        of_mean.copy_(scale * pull)
    if of_log is not None:
        d = log_variance1.float() - log_variance2.float()
        of_log.copy_(-0.5 * scale * (torch.expm1(d) + pull * apart))


def _for_loops(mean1: Tensor, log1: Tensor, mean2: Tensor, log2: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The contiguous tensors, and their types and whether a log-variance is of full size."""
    given = mean1, log1, mean2, log2 = tuple(v.contiguous() for v in (mean1, log1, mean2, log2))
    full = log1.shape == mean1.shape, log2.shape == mean1.shape
    return given, (*native.types(mean1, log1), full[0], *native.types(mean2, log2), full[1])


def _per_sample_or_full(value: Tensor, x: Tensor) -> Tensor:
    """[B] where one number a sample (or one for all) is enough, else [B, *sample]."""
    rest = value.shape[1:] if value.dim() == x.dim() else value.shape
    if rest.numel() == 1 and value.dim() in (0, x.dim()):
        return value.reshape(-1).expand(x.shape[0]).float().contiguous()
    return value.expand_as(x)


def decoder_nll(x: Tensor, mean: Tensor, log_scale: Tensor, *, bins: int = 256) -> Tensor:
    """-ln p of data on a grid of bins under a Gaussian, the mean over each sample's elements.

        p(x) = Phi((x + w - mean) / s) - Phi((x - w - mean) / s),   w = 1 / (bins - 1),  s = e^log_scale

    The lowest bin reaches to -inf, the highest to +inf, so p sums to 1 over the bins -1, -1 + 2 w, ..., 1.
    Args:    x: [B, *sample] in [-1, 1].   mean: like x.   log_scale: ln of the std, of a shape that broadcasts to x.
             bins: >= 2, or 0 for continuous data: -ln of the density.
    Returns: [B] float32 (float64 where an argument is), in nats; differentiable in mean and log_scale.
    Raises:  TypeError, ValueError for another dtype, shape, device or number of bins.
    Numerics: in float64 by ln Phi on the side of the smaller tail: finite, with a gradient, however far x lies; of a
        wide Gaussian by its density, whose two Phi would be equal.
    Source:  Ho et al. 2020, arXiv:2006.11239, eq. 13.
    """
    check_tensor("x", x, dtypes=FLOATS64)
    check_batched("x", x)
    check_tensor("mean", mean, shape=x.shape, dtypes=FLOATS64, like=x)
    _broadcasts("log_scale", log_scale, x)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 0 or bins == 1:
        raise ValueError(f"bins must be an int >= 2, or 0 for continuous data, got {bins!r}")
    dtype = torch.float64 if torch.float64 in (x.dtype, mean.dtype, log_scale.dtype) else torch.float32
    there, home = x.device, x.device if has_float64(x.device) else torch.device("cpu")
    x, mean, log_scale = (v.to(home).double() for v in (x, mean, log_scale))
    z = (x - mean) * torch.exp(-log_scale)
    if bins == 0:
        nll = 0.5 * z.square() + log_scale + 0.5 * math.log(2 * math.pi)
    else:
        nll = -_log_bin(x, z, log_scale, 1.0 / (bins - 1))
    return nll.expand_as(x).reshape(len(x), x.shape[1:].numel()).mean(1).to(dtype).to(there)


def _log_bin(x: Tensor, z: Tensor, log_scale: Tensor, width: float) -> Tensor:
    """ln of the normal's mass between (x - mean -+ width) / s, z = (x - mean) / s, or beyond at the grid's two ends."""
    half, far = torch.exp(-log_scale) * width, z.abs()
    lowest, highest = x < -1 + width, x > 1 - width
    end, narrow = lowest | highest, half * far.clamp(min=1) < NARROW
    # the mass is symmetric: on the left neither ln Phi is near 0; an end's is one Phi, of the edge seen from its side
    upper = log_ndtr(torch.where(lowest, z, torch.where(highest, -z, -far)) + half)
    gap = torch.where(end | narrow, -1.0, log_ndtr(-far - half) - upper)
    inside = upper + torch.log(-torch.expm1(gap))
    bend = torch.where(narrow, half.square() * (z.square() - 1) / 6, 0.0)  # of the density within the bin
    density = math.log(2 * width) - log_scale - 0.5 * z.square() - 0.5 * math.log(2 * math.pi) + torch.log1p(bend)
    return torch.where(end, upper, torch.where(narrow, density, inside))


def _broadcasts(name: str, value: object, x: Tensor) -> None:
    check_tensor(name, value, dtypes=FLOATS64, like=x)
    assert isinstance(value, Tensor)
    try:
        fits = value.shape == x.shape or torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {tuple(x.shape)}, got {tuple(value.shape)}")


def _launch(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor, kl: Tensor) -> None:
    batch, n = mean1.shape[0], mean1.shape[1:].numel()
    tile = loss_tile(n)
    tiles = -(-n // tile["BLOCK"])
    parts = kl if tiles == 1 else torch.empty(batch, tiles, dtype=torch.float32, device=kl.device)
    values, full = _for_kernels(mean1, log_variance1, mean2, log_variance2)
    args = (*values, parts, n, _dispatch.FIRST, tiles, 1.0 / n)
    _dispatch.launch(_dispatch.kernels("gaussian_kl").gaussian_kl_kernel, args, n, batch, tile=tile, **full)
    add_parts(parts, kl)


def _launch_slopes(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor, g: Tensor, of_mean: Tensor | None,
    of_log: Tensor | None,
) -> None:  # fmt: skip
    batch, n = mean1.shape[0], mean1.shape[1:].numel()
    values, full = _for_kernels(mean1, log_variance1, mean2, log_variance2)
    args = (*values, g.contiguous(), of_mean, of_log, n, _dispatch.FIRST, 1.0 / n)
    kernel = _dispatch.kernels("gaussian_kl").gaussian_kl_slopes_kernel
    _dispatch.launch(kernel, args, n, batch, slots=SLOPE_SLOTS, **full)


def _for_kernels(mean1: Tensor, log1: Tensor, mean2: Tensor, log2: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    full = {"FULL1": log1.shape == mean1.shape, "FULL2": log2.shape == mean1.shape}
    return [v.contiguous() for v in (mean1, log1, mean2, log2)], full


_GIVEN = "Tensor mean1, Tensor log_variance1, Tensor mean2, Tensor log_variance2"
_dispatch.register(f"gaussian_kl({_GIVEN}, Tensor(a!) kl) -> ()", _launch)
_dispatch.register(
    f"gaussian_kl_slopes({_GIVEN}, Tensor g, Tensor(a!)? of_mean, Tensor(b!)? of_log_variance) -> ()", _launch_slopes
)
