"""Guidance rules that look at a whole sample, dynamic thresholding, and guidance intervals."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops import _dispatch
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor, spread
from fastdiff.plan import Plan

RULES = ("cfg", "rescale", "apg", "zero_star")
MOST_TILES = 1024  # of a sample in a reduction
PIECE = 256  # elements a warp holds seven sums of without spilling
ZERO_STAR_EPS = 1e-8
Weight = float | Tensor


def guide(
    cond: Tensor,
    uncond: Tensor,
    w: Weight,
    *,
    rule: str = "cfg",
    rescale: float = 0.7,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
) -> Tensor:
    """Combines a conditional and an unconditional model output; sums run over one sample at a time.

        cfg:        m = u + w (c - u)
        rescale:    g = u + w (c - u);  m = (rescale std(c) / std(g) + 1 - rescale) g
        apg:        d = min(1, norm_threshold / |d|) (c - u);  p = <d, c> / <c, c> c;  m = c + (w - 1) (d - p + eta p)
        zero_star:  s = <c, u> / (<u, u> + 1e-8);  m = s u + w (c - s u)

    Args:
        cond, uncond: [B, *sample] of one shape, fp32, bf16 or fp16 (float64 in plain torch), any strides.
        w: the weight, a number or [B] on the device of cond (never read by the host); 1 is no guidance.
        rule: cfg, rescale, apg or zero_star.   rescale: 0 is cfg, 1 keeps the std of c.   eta: the share of the
            parallel part.   norm_threshold: the largest |c - u|, 0 for none.
    Returns: m [B, *sample] of cond's dtype.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, an unknown rule, rescale outside 0..1, a negative
        norm_threshold.
    Numerics: sums in fp32 (float64 for float64 data) in an order that depends on the sample's size alone: a sample is
        the same in every batch. A constant g with rescale, or c = 0 with apg, divides by 0 and gives NaN.
    Source:  Ho and Salimans 2022, arXiv:2207.12598, eq. 6; Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16; Sadat et
        al. 2024, arXiv:2410.02416, section 4 (without momentum); Fan et al. 2025, arXiv:2503.18886, eq. 8.
    """
    weight = _checked(cond, uncond, w, rule, rescale, eta, norm_threshold)
    graded = torch.is_grad_enabled() and any(v.requires_grad for v in (cond, uncond, weight))
    if not _dispatch.kernels_for(cond) or graded or torch.float64 in (cond.dtype, uncond.dtype):
        return guide_ref(cond, uncond, weight, rule=rule, rescale=rescale, eta=eta, norm_threshold=norm_threshold)
    out = torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)
    if out.numel():
        a = rescale if rule == "rescale" else eta
        weight = weight.to(torch.float32).contiguous()
        torch.ops.fastdiff.guide(cond, uncond, weight, RULES.index(rule), a, norm_threshold, out)
    return out


def guide_ref(
    cond: Tensor,
    uncond: Tensor,
    w: Weight,
    *,
    rule: str = "cfg",
    rescale: float = 0.7,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
) -> Tensor:
    """`guide` in plain torch: computes in float64 for float64 data, else in float32; differentiable."""
    weight = _checked(cond, uncond, w, rule, rescale, eta, norm_threshold)
    dtype = torch.float64 if torch.float64 in (cond.dtype, uncond.dtype) else torch.float32
    c, u, weight = cond.to(dtype), uncond.to(dtype), spread(weight.to(dtype), cond)
    axes = tuple(range(1, cond.dim()))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(axes, keepdim=True) if axes else a * b

    d = c - u
    if rule == "cfg":
        m = c + (weight - 1) * d
    elif rule == "rescale":
        g = c + (weight - 1) * d
        centred_c, centred_g = (v - v.mean(axes, keepdim=True) if axes else 0 * v for v in (c, g))
        ratio = torch.sqrt(dot(centred_c, centred_c) / dot(centred_g, centred_g))
        m = (rescale * ratio + (1 - rescale)) * g
    elif rule == "apg":
        if norm_threshold > 0:
            d = d * torch.clamp(norm_threshold / torch.sqrt(dot(d, d)), max=1.0)
        m = c + (weight - 1) * (d - (1 - eta) * dot(d, c) / dot(c, c) * c)
    else:
        s = dot(c, u) / (dot(u, u) + ZERO_STAR_EPS)
        m = s * u + weight * (c - s * u)
    return m.to(cond.dtype)


def guidance_interval(plan: Plan, w: float, start: float, end: float) -> Plan:
    """The plan with guidance w where its schedule time lies in an interval, and none (w = 1) elsewhere.

        w_i = w where min(start, end) <= t_i <= max(start, end), else 1

    Args: plan: any. w: the weight. start, end: schedule times (plan.t), in either order.
    Returns: Plan whose column `guidance` is [N]; sampling uses it where guidance is not given.
    Raises: ValueError: w, start or end not a finite number.
    Source: Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5.
    """
    for name, value in (("w", w), ("start", start), ("end", end)):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    inside = (plan.t >= min(start, end)) & (plan.t <= max(start, end))
    return dataclasses.replace(plan, guidance=np.where(inside, float(w), 1.0), _device_tables={})


def _checked(
    cond: Tensor, uncond: Tensor, w: Weight, rule: str, rescale: float, eta: float, norm_threshold: float
) -> Tensor:
    check_tensor("cond", cond, dtypes=FLOATS64)
    batch, _ = check_batched("cond", cond)
    check_tensor("uncond", uncond, shape=cond.shape, dtypes=FLOATS64, like=cond)
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; valid: {', '.join(RULES)}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in 0..1, got {rescale!r}")
    if not math.isfinite(eta):
        raise ValueError(f"eta must be finite, got {eta!r}")
    if not 0 <= norm_threshold < math.inf:
        raise ValueError(f"norm_threshold must be finite and >= 0, got {norm_threshold!r}")
    if isinstance(w, Tensor):
        check_tensor("w", w, dtypes=FLOATS64, like=cond)
        if tuple(w.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"w must be a number or [B] = [{batch}], got shape {tuple(w.shape)}")
        return w.reshape(-1)
    if not isinstance(w, (int, float)) or not math.isfinite(w):
        raise ValueError(f"w must be a finite number or a tensor, got {w!r}")
    return torch.full((1,), float(w), dtype=torch.float64 if cond.dtype == torch.float64 else torch.float32,
                      device=cond.device)  # fmt: skip


def sum_tile(n: int) -> dict[str, int]:
    """The tile of a reduction over n elements: one warp, at most MOST_TILES tiles, whatever the batch."""
    parts = 4
    while -(-n // (PIECE * parts)) > MOST_TILES:
        parts *= 2
    return {"BLOCK": PIECE * parts, "PARTS": parts, "num_warps": 1}


def _launch(cond: Tensor, uncond: Tensor, w: Tensor, rule: int, a: float, norm_threshold: float, out: Tensor) -> None:
    batch, n = cond.shape[0], cond.shape[1:].numel()
    kernels = _dispatch.kernels("guide")
    cond, uncond, stride = cond.contiguous(), uncond.contiguous(), int(w.numel() > 1)
    coef = w
    if RULES[rule] != "cfg":
        tile = sum_tile(n)
        tiles = -(-n // tile["BLOCK"])
        sums = torch.empty(batch, tiles, 8, dtype=torch.float32, device=cond.device)
        coef = torch.empty(batch, 2, dtype=torch.float32, device=cond.device)
        _dispatch.launch(kernels.sums_kernel, (cond, uncond, sums, n, _dispatch.FIRST, tiles), n, batch, tile=tile)
        grid, width = (batch,), 1 << max(0, tiles - 1).bit_length()
        with torch.cuda.device(cond.device) if cond.is_cuda else nullcontext():
            kernels.coefficients_kernel[grid](
                sums, w, coef, n, tiles, stride, a, norm_threshold, RULE=rule, TILES=width, num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
    args = (cond, uncond, coef, out, n, _dispatch.FIRST, stride)
    _dispatch.launch(kernels.combine_kernel, args, n, batch, RULE=rule)


_dispatch.register(
    "guide(Tensor cond, Tensor uncond, Tensor w, int rule, float a, float norm_threshold, Tensor(a!) out) -> ()",
    _launch,
)
