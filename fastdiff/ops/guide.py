"""Guidance rules that look at a whole sample, dynamic thresholding, and guidance intervals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._dispatch import FLOATS64, INTS, check_batched, check_tensor, spread

RULES = ("cfg", "rescale", "apg", "zero_star")
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
    Numerics: sums in fp32 (float64 for float64 data, and between the CPU loop's blocks of 256) in an order that depends
        on the sample's size alone: a sample is the same in every batch. Deviations are taken about the data's own mean,
        wherever that lies. A constant g with rescale, or c = 0 with apg, divides by 0 and gives NaN.
    Source:  Ho and Salimans 2022, arXiv:2207.12598, eq. 6; Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16; Sadat et
        al. 2024, arXiv:2410.02416, section 4 (without momentum); Fan et al. 2025, arXiv:2503.18886, eq. 8.
    """
    weight = _checked(cond, uncond, w, rule, rescale, eta, norm_threshold)
    options: dict[str, Any] = {"rule": rule, "rescale": rescale, "eta": eta, "norm_threshold": norm_threshold}
    on_kernel, plain = _dispatch.kernels_for(cond), _plain(cond, uncond, weight)
    out = torch.empty_like(cond, memory_format=torch.contiguous_format)
    if plain or not (on_kernel or _scales_on_cpu(cond, uncond, weight, None, **options, out=out) is not None):
        return guide_ref(cond, uncond, weight, **options)
    if on_kernel and out.numel():
        scales = _tensor(weight, torch.float32, cond).contiguous()
        if rule != "cfg":
            scales = guidance_scales(cond, uncond, scales, **options)
        torch.ops.fastdiff.guide(cond, uncond, scales, RULES.index(rule), out)
    return out


def guidance_scales(
    cond: Tensor,
    uncond: Tensor,
    w: Weight,
    *,
    rule: str,
    rescale: float = 0.7,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    row: Tensor | None = None,
) -> Tensor:
    """The part of a guidance rule that needs the whole sample: three numbers a sample, which the step then applies.

        m = k_c c + k_d (c - k_u u),  k_u = 1 but for zero_star
        cfg:        k_c = 1,  k_d = w - 1
        rescale:    k_c = rescale std(c) / std(g) + 1 - rescale,  k_d = (w - 1) k_c
        apg:        k_d = (w - 1) k,  k = min(1, norm_threshold / |c - u|),  k_c = 1 - k_d (1 - eta) <c - u, c> / <c, c>
        zero_star:  k_c = 1,  k_d = w - 1,  k_u = s

    Args:
        cond, uncond, rule, rescale, eta, norm_threshold: as `guide`.
        w: as `guide`, or with `row` the weights of a plan, [N or 1, B or 1].
        row: int32 or int64 [1] on the device: which row of w.
    Returns: [B, 3] (k_c, k_d, k_u), float32 (float64 for float64 data), for `affine_step(scales=...)`.
    Raises, Numerics, Source: as `guide`; one kernel launch, two for a sample of more than 4096 elements.
    """
    weight = _checked(cond, uncond, w, rule, rescale, eta, norm_threshold, row)
    options: dict[str, Any] = {"rule": rule, "rescale": rescale, "eta": eta, "norm_threshold": norm_threshold}
    if rule == "cfg" or not cond.numel() or _plain(cond, uncond, weight):
        return guidance_scales_ref(cond, uncond, weight, **options, row=row)
    if not _dispatch.kernels_for(cond):
        found = _scales_on_cpu(cond, uncond, weight, row, **options)
        return guidance_scales_ref(cond, uncond, weight, **options, row=row) if found is None else found
    scales = torch.empty(cond.shape[0], 3, dtype=torch.float32, device=cond.device)
    w, a = _tensor(weight, torch.float32, cond).contiguous(), rescale if rule == "rescale" else eta
    torch.ops.fastdiff.guidance_scales(cond, uncond, w, row, RULES.index(rule), a, norm_threshold, scales)
    return scales


def _plain(cond: Tensor, uncond: Tensor, weight: Weight) -> bool:
    """Is it for plain torch: float64, or something to differentiate?"""
    return _dispatch.graded(cond, uncond, weight) or torch.float64 in (cond.dtype, uncond.dtype)


def _scales_on_cpu(
    cond: Tensor, uncond: Tensor, weight: Weight, row: Tensor | None, *, rule: str, rescale: float, eta: float,
    norm_threshold: float, out: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The scales by the C++ loop, which also combines into out; None where it cannot run."""
    if not _fused.wanted(cond, uncond, *((weight,) if isinstance(weight, Tensor) else ())):
        return None
    scales = torch.empty(cond.shape[0], 3, dtype=torch.float32, device=cond.device)
    w = _of_row(_tensor(weight, torch.float32, cond), row).contiguous()
    given, a = (cond.contiguous(), uncond.contiguous()), rescale if rule == "rescale" else eta
    options = RULES.index(rule), float(a), float(norm_threshold), *native.layout(cond)
    done = native.run("guide", "guide", *given, w, scales, out, int(len(w) > 1), *native.types(*given), *options)
    return scales if done else None


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
    scales = guidance_scales_ref(cond, uncond, w, rule=rule, rescale=rescale, eta=eta, norm_threshold=norm_threshold)
    c = cond.to(scales.dtype)
    k_c, k_d, k_u = (spread(k, c) for k in scales.unbind(1))
    return (k_c * c + k_d * (c - k_u * uncond.to(c.dtype))).to(cond.dtype)


def guidance_scales_ref(
    cond: Tensor,
    uncond: Tensor,
    w: Weight,
    *,
    rule: str,
    rescale: float = 0.7,
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    row: Tensor | None = None,
) -> Tensor:
    """`guidance_scales` in plain torch: computes in float64 for float64 data, else in float32; differentiable."""
    weight = _checked(cond, uncond, w, rule, rescale, eta, norm_threshold, row)
    dtype = torch.float64 if torch.float64 in (cond.dtype, uncond.dtype) else torch.float32
    lift = _of_row(_tensor(weight, dtype, cond), row).expand(cond.shape[0]) - 1
    c, u = (v.to(dtype).reshape(v.shape[0], v.shape[1:].numel()) for v in (cond, uncond))
    d, one = c - u, torch.ones_like(lift)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)

    if rule == "cfg":
        return torch.stack([one, lift, one], 1)
    if rule == "rescale":
        centred_c, centred_g = (v - v.mean(1, keepdim=True) for v in (c, c + lift[:, None] * d))
        ratio = torch.sqrt(dot(centred_c, centred_c) / dot(centred_g, centred_g))
        k_c = rescale * ratio + (1 - rescale)
        return torch.stack([k_c, lift * k_c, one], 1)
    if rule == "apg":
        k = torch.clamp(norm_threshold / torch.sqrt(dot(d, d)), max=1.0) if norm_threshold > 0 else one
        return torch.stack([1 - lift * (1 - eta) * k * dot(d, c) / dot(c, c), lift * k, one], 1)
    return torch.stack([one, lift, dot(c, u) / (dot(u, u) + ZERO_STAR_EPS)], 1)


def _tensor(weight: Weight, dtype: torch.dtype, like: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return torch.full((1,), float(weight), dtype=dtype, device=like.device)


def _of_row(weight: Tensor, row: Tensor | None) -> Tensor:
    """The weight, or one a sample, of one row."""
    if weight.dim() < 2:
        return weight
    return weight[0] if row is None or weight.shape[0] == 1 else weight.index_select(0, row)[0]


def check_rule(rescale: float = 0.7, eta: float = 0.0, norm_threshold: float = 0.0) -> None:
    """Refuses numbers that a rule has no meaning for."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in 0..1, got {rescale!r}")
    if not math.isfinite(eta):
        raise ValueError(f"eta must be finite, got {eta!r}")
    if not 0 <= norm_threshold < math.inf:
        raise ValueError(f"norm_threshold must be finite and >= 0, got {norm_threshold!r}")


def _checked(
    cond: Tensor, uncond: Tensor, w: Weight, rule: str, rescale: float, eta: float, norm_threshold: float,
    row: Tensor | None = None,
) -> Weight:  # fmt: skip
    check_tensor("cond", cond, dtypes=FLOATS64)
    batch, _ = check_batched("cond", cond)
    check_tensor("uncond", uncond, shape=cond.shape, dtypes=FLOATS64, like=cond)
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; valid: {', '.join(RULES)}")
    check_rule(rescale, eta, norm_threshold)
    if row is not None:
        check_tensor("row", row, shape=(1,), dtypes=INTS, like=cond)
    if isinstance(w, Tensor):
        check_tensor("w", w, dtypes=FLOATS64, like=cond)
        if row is not None and w.dim() == 2 and w.shape[1] in (1, batch):
            return w
        if tuple(w.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"w must be a number or [B] = [{batch}], got shape {tuple(w.shape)}")
        return w.reshape(-1)
    if not isinstance(w, (int, float)) or not math.isfinite(w):
        raise ValueError(f"w must be a finite number or a tensor, got {w!r}")
    return w


def _launch_scales(
    cond: Tensor, uncond: Tensor, w: Tensor, row: Tensor | None, rule: int, a: float, norm_threshold: float,
    scales: Tensor,
) -> None:  # fmt: skip
    batch, n = cond.shape[0], cond.shape[1:].numel()
    piece, pieces = _dispatch.pieces(n)
    part = None if pieces == 1 else torch.empty(batch, 5, pieces, dtype=torch.float32, device=cond.device)
    given = cond.contiguous(), uncond.contiguous(), row, w, scales, part
    args = (*given, n, _dispatch.FIRST, pieces, piece, *_dispatch.weight_strides(w), a, norm_threshold)
    kernel, widest = _dispatch.kernels("guide").scales_kernel, 1 << (pieces - 1).bit_length()
    for phase, tiles in ((0, 1),) if pieces == 1 else ((1, pieces), (2, 1)):
        options = {"RULE": rule, "PHASE": phase, "WIDEST": widest}
        _dispatch.launch(kernel, args, n, batch, tile=_dispatch.whole_sample(n), tiles=tiles, **options)


def _launch(cond: Tensor, uncond: Tensor, scales: Tensor, rule: int, out: Tensor) -> None:
    batch, n = cond.shape[0], cond.shape[1:].numel()
    args = (cond.contiguous(), uncond.contiguous(), scales, out, n, _dispatch.FIRST, int(scales.numel() > 1))
    _dispatch.launch(_dispatch.kernels("guide").combine_kernel, args, n, batch, RULE=rule)


_dispatch.register(
    "guidance_scales(Tensor cond, Tensor uncond, Tensor w, Tensor? row, int rule, float a, float norm_threshold, "
    "Tensor(a!) scales) -> ()",
    _launch_scales,
)
_dispatch.register("guide(Tensor cond, Tensor uncond, Tensor scales, int rule, Tensor(a!) out) -> ()", _launch)
