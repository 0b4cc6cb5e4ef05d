"""The training loss of one sample and its slopes, the noise drawn again from the counter.

    d = m - (target_x0 x0 + target_eps n),  loss = w mean rho(d),  slope = rho'(d),  scale = w / n

The gradient is scale slope, and w / n is kept out of an fp16 slope, which it takes below the smallest fp16 number.
A row of coefficients is [target_x0, target_eps, w, 0]. A program sums BLOCK elements, in pieces that depend on the
sample's size alone; larger samples leave one number a program, added up by `sum_kernel`.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import index_of, normal4, sample_key
from fastdiff_kernels.tiles import coef_row, load4, load_float, sample_size

L2 = tl.constexpr(0)
L1 = tl.constexpr(1)


@triton.jit(do_not_specialize=["first", "rows", "t_stride", "row", "stream", "tiles"])
def denoising_loss_kernel(
    model_ptr,  # [batch, n]
    x0_ptr,  # [batch, n] or None
    coef_ptr,  # [T or batch, 4] fp32
    t_ptr,  # row of coef, int64, read at sample * t_stride; None: the row is sample * t_stride itself
    seed_ptr,  # [batch] int64
    index_ptr,  # [batch] int64 or None: 0 each
    loss_ptr,  # [batch, tiles] fp32
    slope_ptr,  # [batch, n]
    scale_ptr,  # [batch] fp32
    n,
    first,
    rows,
    t_stride,
    row,
    stream,
    tiles,
    one_over_n,
    delta,
    KIND: tl.constexpr,  # 0 l2, 1 l1, 2 huber
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (programs of a sample, samples)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    t, valid = coef_row(t_ptr, b * t_stride, rows)
    target_x0, target_eps, weight, _ = load4(coef_ptr + t * 4, MATH)
    scale = tl.where(valid, weight, float("nan")) * one_over_n
    key = sample_key(row.to(tl.uint32), stream, index_of(index_ptr, b), tl.load(seed_ptr + b))
    n = sample_size(n, ALIGNED)
    model_ptr += b * n
    slope_ptr += b * n
    PIECE: tl.constexpr = BLOCK // PARTS
    quad = tl.arange(0, PIECE // 4)
    lane = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    total = tl.zeros([PIECE // 4, 4], tl.float32)
    for part in range(tl.minimum(PARTS, tl.cdiv(n - pid * BLOCK, PIECE)).to(tl.int32)):
        start = pid * BLOCK + part * PIECE
        counter = (pid * (BLOCK // 4) + part * (PIECE // 4) + quad).to(tl.uint32)
        inside = lane < n - start
        m = load_float(model_ptr + start + lane, inside)
        z = normal4(counter, key, PIECE // 4, MATH)
        d = tl.fma(-target_eps, z, m)
        if x0_ptr is not None:
            d = tl.fma(-target_x0, load_float(x0_ptr + (b * n + start) + lane, inside), d)
        if KIND == L2:
            value = d * d
            slope = d + d
        elif KIND == L1:
            value = tl.abs(d)
            slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        else:
            slope = tl.clamp(d, -delta, delta, propagate_nan=tl.PropagateNan.ALL)
            value = slope * tl.fma(-0.5, slope, d)
        total += tl.where(inside, value, 0.0)
        tl.store(slope_ptr + start + lane, slope.to(slope_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + b * tiles + pid, scale * tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(scale_ptr + b, scale, mask=pid == 0)


@triton.jit(do_not_specialize=["tiles", "first"])
def sum_kernel(
    parts_ptr,  # [batch, tiles] fp32
    loss_ptr,  # [batch] fp32
    tiles,
    first,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (1, samples): a sample's parts added in the order of their lanes."""
    b = (tl.program_id(1) + first).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        total += tl.load(parts_ptr + b * tiles + start + lane, mask=lane < tiles - start, other=0.0)
    tl.store(loss_ptr + b, tl.sum(total, axis=0))
