# mypy: disable-error-code="attr-defined"
"""Dynamic thresholding without sorting: the order statistic of |x0| found digit by digit, by counting; then the clamp.

The bits of a non-negative fp32 order like the number: four passes count the next eight bits of those values that share
what is known, integers added in any order; a fifth finds the next larger value. One program a sample: one launch.
"""

import triton
import triton.language as tl

from fastdiff_kernels.guide import load_again
from fastdiff_kernels.tiles import load_float, sample_size, tile

INFINITY = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(0x7FFFFFFF)
BINS = tl.constexpr(256)


@triton.jit
def magnitude(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, at, inside):
    """The bits of |x0 / c_skip|; x itself without a model's output."""
    x = load_again(x_ptr + at, inside)
    if model_ptr is not None:
        m = load_again(model_ptr + at, inside)
        if uncond_ptr is not None:
            m = tl.fma(k_d, tl.fma(-k_u, load_again(uncond_ptr + at, inside), m), k_c * m)
        x = tl.fma(c_ratio, m, x)
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit(
    do_not_specialize=["first", "width", "w_row_stride", "w_batch_stride", "k", "fraction", "maximum"],
)
def bound_kernel(
    x_ptr,  # [batch, n]
    model_ptr,  # [batch, n] or None
    uncond_ptr,  # [batch, n] or None
    table_ptr,  # rows of a plan, or None: x0 = x
    row_ptr,  # [1]
    w_ptr,  # weight, at row * w_row_stride + sample * w_batch_stride; scales: [batch, 3]
    bound_ptr,  # [batch] fp32
    n,
    first,
    width,
    w_row_stride,
    w_batch_stride,
    k,
    fraction,
    maximum,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (1, samples): s = clamp(quantile of |x0|, 1, maximum); NaN where the sample holds one."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    c_skip = 1.0
    c_ratio = 0.0
    k_c = 1.0
    k_d = 0.0
    k_u = 1.0
    if model_ptr is not None:
        model_ptr += b * n
        row = tl.load(row_ptr).to(tl.int64)
        c_skip = tl.load(table_ptr + row * width)
        c_ratio = tl.load(table_ptr + row * width + 1)
        if uncond_ptr is not None:
            uncond_ptr += b * n
            if SCALED:
                k_c = tl.load(w_ptr + b * 3)
                k_d = tl.load(w_ptr + b * 3 + 1)
                k_u = tl.load(w_ptr + b * 3 + 2)
            else:
                k_d = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride) - 1
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    value = 0
    equal = 0
    for digit in tl.static_range(4):
        low = 23 - 8 * digit if digit < 3 else 0  # the digits are bits 30-23, 22-15, 14-7 and 6-0
        known = 31 - 8 * digit
        counts = tl.zeros([BINS], tl.int32)
        for start in range(0, n, BLOCK):
            inside = lane < n - start
            bits = magnitude(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, start + lane, inside)
            if digit > 0:
                inside = inside & ((bits >> known) == value)
            counts += tl.histogram((bits >> low) & ((1 << (known - low)) - 1), BINS, mask=inside)
        which = tl.sum((tl.cumsum(counts, 0) <= k).to(tl.int32), axis=0)
        k -= tl.sum(tl.where(bins < which, counts, 0), axis=0)
        equal = tl.sum(tl.where(bins == which, counts, 0), axis=0)
        value = (value << (known - low)) + which
    above = tl.full([BLOCK], LARGEST, tl.int32)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        inside = lane < n - start
        bits = magnitude(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, start + lane, inside)
        above = tl.where(inside & (bits > value), tl.minimum(above, bits), above)
        largest = tl.where(inside, tl.maximum(largest, bits), largest)
    most = tl.max(largest, axis=0)
    next_value = tl.where(k + 1 < equal, value, tl.minimum(tl.min(above, axis=0), most))
    s = value.to(tl.float32, bitcast=True)
    still = (fraction == 0.0) | (next_value == value)  # infinity less infinity is NaN
    s = tl.where(still, s, s + fraction * (next_value.to(tl.float32, bitcast=True) - s))
    s *= tl.abs(c_skip)
    s = tl.minimum(tl.maximum(s, 1.0), maximum)
    tl.store(bound_ptr + b, tl.where(most > INFINITY, float("nan"), s))


@triton.jit(do_not_specialize=["first"])
def threshold_kernel(
    x_ptr,  # [batch, n]
    bound_ptr,  # [batch] fp32
    out_ptr,  # [batch, n]
    n,
    first,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): clamp(x, -s, s) / s."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    s = tl.load(bound_ptr + b)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        y = tl.clamp(load_float(x_ptr + start + lane, inside), -s, s, propagate_nan=tl.PropagateNan.ALL) / s
        tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
