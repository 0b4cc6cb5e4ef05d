"""The training input of a Bayesian flow network on categorical data, from integer classes in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import native, rng
from fastdiff.categorical_cpu import belief_, chunks, drawn, noise_into
from fastdiff.ops import _dispatch, _fused, _levels, _noising
from fastdiff.ops._categorical import belief, channels, check_classes, rows_of, vectors
from fastdiff.ops._dispatch import FLOATS64, spread
from fastdiff.ops._noising import Seeds
from fastdiff.schedules import BFNDiscrete
from fastdiff.transforms import readable

SQRT2 = 2.0**0.5


def categorical_noise(
    x: Tensor,
    t: float | Tensor,
    schedule: BFNDiscrete,
    *,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
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
        seeds: B ints or int64 [B]: n = rng.normal(seeds, (*D, K'), row=row, index=index), drawn in the kernel,
            K' = K (1 for K = 2).   index: int64 [B], None is 0 each.   row: changes n (a training step, say).
        noise: n itself, [B, *D, K']; not with seeds.   out_dtype: of the results.   return_logits: also z (K = 2: d).
    Returns: model_in [B, *D, K'], or (model_in, z).
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, classes outside 0..K-1 or t outside [0, 1] (on CUDA:
        NaN instead of an error), seeds and noise both or neither, another schedule.
    Numerics: coefficients in float64, arithmetic in fp32 (float64 for float64 noise).
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 185: y ~ N(beta (K e_x - 1), beta K I), its constant dropped.
    """
    wide = torch.float64 in (out_dtype, getattr(noise, "dtype", None))
    kernel = isinstance(x, Tensor) and _dispatch.kernels_for(x) and not wide
    known = not wide and _levels.usable(schedule, x)
    at, keyed, which = _checked(x, t, schedule, seeds, index, row, noise, out_dtype, fill=not kernel, raw=known)
    if kernel:
        out = torch.empty(*_numbers(x, schedule).shape, dtype=out_dtype, device=x.device)
        logits = torch.empty_like(out) if return_logits else None
        if x.numel():
            coef = _rows(schedule, at, known)
            torch.ops.fastdiff.categorical_noise(x, noise, coef, keyed, which, row, out, logits)
        return out if logits is None else (out, logits)
    if readable(x) and x.numel():
        return _on_cpu(x, at, schedule, keyed, which, row, noise, out_dtype, return_logits, known)
    return categorical_noise_ref(
        x, at, schedule, seeds=keyed, index=which, row=row, noise=noise, out_dtype=out_dtype,
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
    noise: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`categorical_noise` in plain torch: computes in float64 for float64 noise or output, else in float32."""
    at, keyed, which = _checked(x, t, schedule, seeds, index, row, noise, out_dtype)
    wide = torch.float64 in (out_dtype, None if noise is None else noise.dtype)
    dtype = torch.float64 if wide else torch.float32
    n = _noising.noise_of(_numbers(x, schedule), keyed, which, row, rng.ROWS, noise, dtype)
    alpha, sigma = (spread(c.to(dtype), n) for c in schedule.alpha_sigma(at))
    if schedule.num_classes == 2:
        e, sigma = (2 * x - 1).to(dtype)[..., None], SQRT2 * sigma
    else:
        e = (x[..., None] == torch.arange(schedule.num_classes, device=x.device)).to(dtype)
    z = alpha * e + sigma * n
    out = belief(z).to(out_dtype)
    return (out, z.to(out_dtype)) if return_logits else out


@torch.no_grad()
def _on_cpu(
    x: Tensor, at: Tensor, schedule: BFNDiscrete, seeds: Tensor | None, index: Tensor | None, row: int,
    noise: Tensor | None, out_dtype: torch.dtype, return_logits: bool, known: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A chunk at a time: no temporary of the result's size."""
    shape, batch = _numbers(x, schedule).shape, x.shape[0]
    width = shape[-1]
    out = torch.empty(*shape, dtype=out_dtype, device=x.device)
    logits = torch.empty_like(out) if return_logits else None
    wide = torch.float64 in (out_dtype, None if noise is None else noise.dtype)
    if not wide and _fused.wanted(x) and native.available():
        if noise_into(x, noise, _rows(schedule, at, known), seeds, index, row, out, logits):
            return out if logits is None else (out, logits)
    alpha, sigma = (v.to(torch.float64 if wide else torch.float32).expand(batch) for v in schedule.alpha_sigma(at))
    which = torch.full((1,), row, dtype=torch.int64, device=x.device)
    flat = [None if v is None else v.view(batch, -1, width) for v in (out, logits)]
    x, noise = x.reshape(batch, -1, 1), None if noise is None else noise.reshape(batch, -1, width)
    for part in chunks(batch, x.shape[1], width):
        some = slice(part.b0, part.b1)
        a, s = alpha[some].view(-1, 1, 1), sigma[some].view(-1, 1, 1)
        if noise is None:
            assert seeds is not None and index is not None
            z = drawn((seeds[some], index[some]), which, rng.ROWS, part.d0 * width // 4, (*part.size, width)).to(
                a.dtype
            )
        else:
            z = part.of(noise).to(a.dtype, copy=True)
        if width == 1:
            z.mul_(SQRT2 * s).add_((2 * part.of(x) - 1) * a)
        else:
            z.mul_(s).scatter_add_(-1, part.of(x), a.expand(*part.size, 1))
        for to, value in zip(flat, (belief_(z), z), strict=True):
            if to is not None:
                part.of(to).copy_(value)
    return out if logits is None else (out, logits)


def _rows(schedule: BFNDiscrete, t: Tensor, known: bool) -> Tensor:
    """alpha and sigma of the logits in rows of 16 bytes, of which the first half is used."""
    if known:
        return _levels.coefficients(schedule, t, "classes")
    sigma = schedule.sigma(t)
    columns = sigma * sigma, SQRT2 * sigma if schedule.num_classes == 2 else sigma
    return torch.stack(columns * 2, 1).float()


def _numbers(x: Tensor, schedule: BFNDiscrete) -> Tensor:
    """x with the shape [B, *D, K'] of its logits (a view)."""
    return x[..., None].expand(*x.shape, channels(schedule.num_classes))


def _checked(
    x: Tensor, t: float | Tensor, schedule: BFNDiscrete, seeds: Seeds | None, index: Tensor | None, row: int,
    noise: Tensor | None, out_dtype: torch.dtype, *, fill: bool = True, raw: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    if not isinstance(schedule, BFNDiscrete):
        raise TypeError(f"schedule must be schedules.BFNDiscrete, got {type(schedule).__name__}")
    check_classes("x", x, schedule.num_classes)
    if x.dim() == 0:
        raise ValueError("x must have a batch axis, [B, *D], got a 0-d tensor")
    if out_dtype not in FLOATS64:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    at = _noising.times(t, schedule, x, raw=raw)
    return at, *_noising.noise_arguments(_numbers(x, schedule), seeds, index, row, rng.ROWS, noise, fill=fill)


def _launch(
    x: Tensor, noise: Tensor | None, coef: Tensor, seeds: Tensor | None, index: Tensor | None, row: int, out: Tensor,
    logits: Tensor | None,
) -> None:  # fmt: skip
    batch, width = x.shape[0], out.shape[-1]
    tokens = x.shape[1:].numel()
    given = (x, noise, coef, seeds, index)
    args: tuple[object, ...] = tuple(None if v is None else v.contiguous() for v in given)
    args = (*args, out, logits)
    numbers = (_dispatch.FIRST, int(coef.shape[0] > 1), row)
    kernels = _dispatch.kernels("categorical_noise")
    if width == 1:
        _dispatch.launch(kernels.categorical_pair_noise_kernel, (*args, tokens, *numbers), tokens, batch)
        return
    rows = rows_of(width, tokens, lanes=64 if torch.version.hip else 32)
    programs = -(-tokens // rows.rows) * rows.pieces
    plane = batch * programs
    part = None if rows.pieces == 1 else torch.empty(2, plane, dtype=torch.float32, device=x.device)
    shape: dict[str, Any] = {"ROWS": rows.rows, "COLS": rows.cols, "PIECES": rows.pieces, "WIDEST": rows.widest}
    shape |= {"QUADS": width % 4 == 0, "VECTOR": vectors(width, tokens, [width]), "num_warps": rows.num_warps}
    shape["WIDE"] = rows.reach(tokens, width) >= 2**31
    for phase in (0,) if rows.pieces == 1 else (1, 2):
        args_here = (*args, part, width, tokens, *numbers, plane)
        _dispatch.run(kernels.categorical_noise_kernel, args_here, programs, batch, PHASE=phase, **shape)


_dispatch.register(
    "categorical_noise(Tensor x, Tensor? noise, Tensor coef, Tensor? seeds, Tensor? index, int row, Tensor(a!) out, "
    "Tensor(b!)? logits) -> ()",
    _launch,
)
