"""Noising in one pass: x_t = alpha x0 + sigma n and, if asked for, a training target linear in x0 and n.

A row of coefficients is [alpha, sigma, target_x0, target_eps]; of a forward step [sqrt(1 - beta), sqrt(beta), 0, 0].
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import index_of, normal4, sample_key
from fastdiff_kernels.tiles import coef_row, load4, load_float, sample_size, tile


@triton.jit(do_not_specialize=["first", "rows", "t_stride", "row", "stream"])
def add_noise_kernel(
    x_ptr,  # [batch, n]
    noise_ptr,  # [batch, n] or None
    coef_ptr,  # [T or batch, 4] fp32
    t_ptr,  # row of coef, int64, read at sample * t_stride; None: the row is sample * t_stride itself
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None: 0 each
    out_ptr,  # [batch, n]
    target_ptr,  # [batch, n] or None
    n,
    first,
    rows,
    t_stride,
    row,
    stream,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples); noise is noise_ptr's or Philox's of (seed, stream, row, index)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    t, valid = coef_row(t_ptr, b * t_stride, rows)
    alpha, sigma, target_x0, target_eps = load4(coef_ptr + t * 4, MATH)
    alpha = tl.where(valid, alpha, float("nan"))
    target_eps = tl.where(valid, target_eps, float("nan"))
    if noise_ptr is None:
        key = sample_key(row.to(tl.uint32), stream, index_of(index_ptr, b), tl.load(seed_ptr + b))
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        x = load_float(x_ptr + start + lane, inside)
        if noise_ptr is None:
            z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
        else:
            z = load_float(noise_ptr + (b * n + start) + lane, inside)
        y = tl.fma(sigma, z, alpha * x)
        tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
        if target_ptr is not None:
            y = tl.fma(target_eps, z, target_x0 * x)
            tl.store(target_ptr + (b * n + start) + lane, y.to(target_ptr.dtype.element_ty), mask=inside)
