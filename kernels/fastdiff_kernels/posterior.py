"""The reverse posterior of a Gaussian chain: x0, its mean and its two variances, in one pass.

    x0 = clamp(c_skip (x_t + c_ratio m), lo, hi);  mean = k_x0 x0 + k_xt x_t

A row of coefficients is [c_skip, c_ratio, k_x0, k_xt, variance, log_variance, 0, 0].
"""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import coef_row, load4, load_float, sample_size, tile


@triton.jit(do_not_specialize=["batch", "first", "rows", "t_stride"])
def posterior_kernel(
    x_ptr,  # [batch, n]
    model_ptr,  # [batch, n]
    coef_ptr,  # [T or batch, 8] fp32
    t_ptr,  # row of coef, int64, read at sample * t_stride; None: the row is sample * t_stride itself
    mean_ptr,  # [batch, n]
    x0_ptr,  # [batch, n]
    variance_ptr,  # [2, batch] fp32: variance, log variance
    n,
    batch,
    first,
    rows,
    t_stride,
    lo,
    hi,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples); the first tile writes the sample's variances."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    model_ptr += b * n
    mean_ptr += b * n
    x0_ptr += b * n
    # in flight before the row of coefficients is waited for
    _, start, lane = tile(0, BLOCK, PARTS, WIDE)
    x = load_float(x_ptr + start + lane, lane < n - start)
    m = load_float(model_ptr + start + lane, lane < n - start)
    t, valid = coef_row(t_ptr, b * t_stride, rows)
    coef_ptr += t * 8
    c_skip, c_ratio, k_x0, k_xt = load4(coef_ptr, MATH)
    first_tile = tl.program_id(0) == 0
    variance = tl.load(coef_ptr + 4, mask=first_tile)
    log_variance = tl.load(coef_ptr + 5, mask=first_tile)
    c_skip = tl.where(valid, c_skip, float("nan"))
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        if part > 0:
            x = load_float(x_ptr + start + lane, inside)
            m = load_float(model_ptr + start + lane, inside)
        p = c_skip * tl.fma(c_ratio, m, x)
        if CLIP:
            p = tl.clamp(p, lo, hi, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x0_ptr + start + lane, p.to(x0_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + start + lane, tl.fma(k_x0, p, k_xt * x).to(mean_ptr.dtype.element_ty), mask=inside)
    if first_tile:
        tl.store(variance_ptr + b, tl.where(valid, variance, float("nan")))
        tl.store(variance_ptr + batch + b, tl.where(valid, log_variance, float("nan")))
