"""Dynamic thresholding: every sample clamped to a quantile of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._dispatch import FLOATS64, INTS, check_batched, check_tensor, spread
from fastdiff.ops.guide import guidance_scales

ONE_PROGRAM = 8192  # elements of a sample
Weight = Tensor | None


def threshold(x0: Tensor, quantile: float = 0.995, maximum: float = math.inf) -> Tensor:
    """Dynamic thresholding: clamps every sample to its own quantile of |x0| and scales it back to [-1, 1].

        s = clamp(quantile of |x0|, 1, maximum);   y = clamp(x0, -s, s) / s

    Args:
        x0: [B, *sample], fp32, bf16 or fp16 (float64 too), any strides.   quantile: in 0..1, linear between neighbours.
        maximum: of s, at least 1; 1 is a plain clamp to [-1, 1].
    Returns: y [B, *sample] of x0's dtype; a sample that holds a NaN becomes NaN.
    Raises:  TypeError, ValueError: a wrong dtype, no batch axis, a quantile outside 0..1, a maximum below 1.
    Numerics: exact order statistics, found by counting digits (integers: no order of summation), interpolated in fp32
        (float64 for float64 data, by sorting). No host sync.
    Source:  Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """
    _checked(x0, quantile, maximum)
    on_kernel = _dispatch.kernels_for(x0)
    if _dispatch.graded(x0) or x0.dtype == torch.float64 or not x0.numel() or not (on_kernel or _fused.wanted(x0)):
        return threshold_ref(x0, quantile, maximum)
    out = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    x0 = x0.contiguous()
    bound = threshold_bound(x0, quantile, maximum)
    if on_kernel:
        torch.ops.fastdiff.threshold(x0, bound, out)
    elif not native.run("threshold", "threshold", x0, bound, out, *native.types(x0), *native.layout(x0)):
        return threshold_ref(x0, quantile, maximum)
    return out


def threshold_ref(x0: Tensor, quantile: float = 0.995, maximum: float = math.inf) -> Tensor:
    """`threshold` in plain torch, by sorting; differentiable."""
    s = threshold_bound_ref(x0, quantile, maximum)
    x, s = x0.to(s.dtype), spread(s, x0)
    return (torch.minimum(torch.maximum(x, -s), s) / s).to(x0.dtype)


def threshold_bound(
    x: Tensor,
    quantile: float = 0.995,
    maximum: float = math.inf,
    *,
    model_out: Tensor | None = None,
    table: Tensor | None = None,
    row: Tensor | None = None,
    uncond: Weight = None,
    guidance: Weight = None,
    scales: Weight = None,
) -> Tensor:
    """The part of dynamic thresholding that needs the whole sample: its bound s, which the step then applies.

        x0 = c_skip (x + c_ratio m),  m = model_out guided as in `affine_step`;   without model_out x0 = x
        s  = clamp(quantile of |x0|, 1, maximum)

    Args:
        x: [B, *sample], the state (slot 0), or x0 itself.   quantile, maximum: as `threshold`.
        model_out, table, row [1], uncond, guidance, scales: as `affine_step`; model_out, table and row go together.
    Returns: s [B], float32 (float64 for float64 x), for `affine_step(bound=...)`; NaN for a sample that holds one.
    Raises:  TypeError, ValueError: as `threshold`; a tensor of another shape, dtype or device.
    Numerics, Source: as `threshold`; one kernel launch, six and a fill for a sample of more than 8192 elements.
    """
    _checked(x, quantile, maximum)
    _check_model(x, model_out, table, row, uncond, guidance, scales)
    model = {"model_out": model_out, "table": table, "row": row, "uncond": uncond}
    data = [v for v in (x, model_out, uncond) if v is not None]
    plain = _dispatch.graded(*data, guidance, scales) or not x.numel() or any(v.dtype == torch.float64 for v in data)
    rank = float(quantile) * (x.shape[1:].numel() - 1)
    at = math.floor(rank), rank - math.floor(rank), float(maximum)
    bound = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if not plain and _dispatch.kernels_for(x):
        w = guidance if scales is None else scales
        torch.ops.fastdiff.threshold_bound(x, model_out, table, row, uncond, w, scales is not None, *at, bound)
    elif plain or not _bound_on_cpu(x, model_out, table, row, uncond, guidance, scales, at, bound):
        return threshold_bound_ref(x, quantile, maximum, **model, guidance=guidance, scales=scales)
    return bound


def _bound_on_cpu(
    x: Tensor, model_out: Tensor | None, table: Tensor | None, row: Tensor | None, uncond: Tensor | None,
    guidance: Tensor | None, scales: Tensor | None, at: tuple[int, float, float], bound: Tensor,
) -> bool:  # fmt: skip
    """Writes the bound by the C++ loop; False where it cannot run."""
    if not _fused.wanted(x, *(v for v in (model_out, table, row, uncond, guidance, scales) if v is not None)):
        return False
    if guidance is not None:
        scales = guidance_scales(x, x, guidance, rule="cfg", row=row)
    numbers = None if table is None or row is None else table.index_select(0, row)[0].float().contiguous()
    given = [None if v is None else v.contiguous() for v in (x, model_out, uncond)]
    k_c = None if scales is None else scales.float().contiguous()
    dtypes = (native.TYPES[x.dtype if v is None else v.dtype] for v in given)
    return native.run(
        "threshold", "threshold_bound", given[0], given[1], numbers, given[2], k_c, bound, *dtypes, *at,
        *native.layout(x),
    )  # fmt: skip


def threshold_bound_ref(
    x: Tensor,
    quantile: float = 0.995,
    maximum: float = math.inf,
    *,
    model_out: Tensor | None = None,
    table: Tensor | None = None,
    row: Tensor | None = None,
    uncond: Weight = None,
    guidance: Weight = None,
    scales: Weight = None,
) -> Tensor:
    """`threshold_bound` in plain torch, by sorting, in float64 for float64 x, else in float32; differentiable."""
    _checked(x, quantile, maximum)
    x0 = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if model_out is not None and table is not None and row is not None:
        m = model_out.to(x0.dtype)
        if uncond is not None:
            if scales is not None:
                k_c, k_d, k_u = (spread(k, m) for k in scales.to(m.dtype).unbind(1))
            elif guidance is not None:
                w = guidance.to(m.dtype)
                if w.dim() == 2:
                    w = w.index_select(0, row)[0] if w.shape[0] > 1 else w[0]
                k_c = k_u = torch.ones((), dtype=m.dtype, device=m.device)
                k_d = spread(w.reshape(-1) - 1, m)
            m = k_c * m + k_d * (m - k_u * uncond.to(m.dtype))
        c = table.index_select(0, row)[0].to(m.dtype)
        x0 = c[0] * (x0 + c[1] * m)
    if not x.numel():
        return torch.ones(x.shape[0], dtype=x0.dtype, device=x.device)
    flat = x0.abs().reshape(len(x), -1)
    rank = quantile * (flat.shape[1] - 1)
    below, above = math.floor(rank), math.ceil(rank)
    ordered = flat.sort(dim=1).values  # NaN comes last: it reaches the largest value
    low, high, last = ordered[:, below], ordered[:, above], ordered[:, -1]
    s = torch.where(low == high, low, low + (rank - below) * (high - low)).clamp(1.0, maximum)  # inf - inf is NaN
    return torch.where(last.isnan(), last, s)


def _checked(x0: Tensor, quantile: float, maximum: float) -> None:
    check_tensor("x0", x0, dtypes=FLOATS64)
    check_batched("x0", x0)
    check_threshold(quantile, maximum)


def check_threshold(quantile: float, maximum: float) -> None:
    """Refuses what is no quantile and no largest bound."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in 0..1, got {quantile!r}")
    if not maximum >= 1:
        raise ValueError(f"maximum must be at least 1, got {maximum!r}")


def _check_model(
    x: Tensor, model_out: Tensor | None, table: Tensor | None, row: Tensor | None, uncond: Tensor | None,
    guidance: Tensor | None, scales: Tensor | None,
) -> None:  # fmt: skip
    if len({model_out is None, table is None, row is None}) > 1:
        raise ValueError("model_out, table and row go together")
    if (uncond is None) != (guidance is None and scales is None) or (guidance is not None and scales is not None):
        raise ValueError("uncond goes with guidance or with scales")
    for name, v in (("model_out", model_out), ("uncond", uncond)):
        if v is not None:
            check_tensor(name, v, shape=x.shape, dtypes=FLOATS64, like=x)
    if row is not None:
        check_tensor("row", row, shape=(1,), dtypes=INTS, like=x)
    if scales is not None:
        check_tensor("scales", scales, shape=(x.shape[0], 3), dtypes=FLOATS64, like=x)


def _launch_bound(
    x: Tensor, model_out: Tensor | None, table: Tensor | None, row: Tensor | None, uncond: Tensor | None,
    w: Tensor | None, scaled: bool, k: int, fraction: float, maximum: float, bound: Tensor,
) -> None:  # fmt: skip
    batch, n = x.shape[0], x.shape[1:].numel()
    if n >= 1 << 31:
        raise ValueError(f"a threshold's kernel counts at most 2^31 - 1 elements of a sample, got {n}")
    strides = (0, 0) if w is None else _dispatch.weight_strides(w)
    dense = [None if v is None else v.contiguous() for v in (x, model_out, uncond, table, row, w)]
    width = 0 if table is None else table.shape[1]
    kernels, (piece, pieces) = _dispatch.kernels("threshold"), _dispatch.pieces(n)
    stages, found = [(kernels.WHOLE.value, 1)], None
    if n > ONE_PROGRAM:
        last = kernels.LAST.value
        stages = [*((stage, pieces) for stage in range(last)), (last, 1)]
        found = torch.zeros(batch, kernels.FOUND.value, dtype=torch.int32, device=x.device)
    args = (*dense, bound, found, n, _dispatch.FIRST, width, *strides, k, fraction, maximum, piece)
    for stage, tiles in stages:
        tile = _dispatch.whole_sample(n)
        _dispatch.launch(kernels.bound_kernel, args, n, batch, tile=tile, tiles=tiles, STAGE=stage, SCALED=scaled)


def _launch(x0: Tensor, bound: Tensor, out: Tensor) -> None:
    n = x0.shape[1:].numel()
    args = (x0, bound, out, n, _dispatch.FIRST)
    _dispatch.launch(_dispatch.kernels("threshold").threshold_kernel, args, n, x0.shape[0])


_dispatch.register(
    "threshold_bound(Tensor x, Tensor? model_out, Tensor? table, Tensor? row, Tensor? uncond, Tensor? w, bool scaled, "
    "int k, float fraction, float maximum, Tensor(a!) bound) -> ()",
    _launch_bound,
)
_dispatch.register("threshold(Tensor x0, Tensor bound, Tensor(a!) out) -> ()", _launch)
