"""Dynamic thresholding without sorting: the order statistic of |x0| found digit by digit, by counting.

The bits of a non-negative fp32 order like the number: eight passes count the samples' next four bits among those that
share what is known, integers added in any order. A ninth finds the next larger value, the tenth clamps and scales.
"""

import triton
import triton.language as tl

from fastdiff_kernels.guide import total
from fastdiff_kernels.tiles import load_float, sample_size, tile

DIGITS = tl.constexpr(8)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def magnitude(x):
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def found(counts_ptr, k, PASSES: tl.constexpr):
    """The leading digits of the k-th smallest value, its place among equals, and how many those are."""
    value = 0
    equal = 0
    i = tl.arange(0, 16)
    for digit in tl.static_range(PASSES):
        count = tl.load(counts_ptr + digit * 16 + i)
        which = tl.sum((tl.cumsum(count, 0) <= k).to(tl.int32), axis=0)
        k -= tl.sum(tl.where(i < which, count, 0), axis=0)
        equal = tl.sum(tl.where(i == which, count, 0), axis=0)
        value = value * 16 + which
    return value, k, equal


@triton.jit(do_not_specialize=["first", "k"])
def digit_kernel(
    x_ptr,  # [batch, n]
    counts_ptr,  # [batch, 8, 16] int32, zero at first
    n,
    first,
    k,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): counts digit PASS of the values that begin like the one searched."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    counts_ptr += b * 128
    value, place, equal = found(counts_ptr, k, PASS)
    for part in range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        bits = magnitude(load_float(x_ptr + start + lane, inside))
        if PASS > 0:
            inside = inside & ((bits >> (32 - 4 * PASS)) == value)
        digit = tl.where(inside, (bits >> (28 - 4 * PASS)) & 15, 16)
        for d in tl.static_range(16):
            tl.atomic_add(counts_ptr + PASS * 16 + d, total((digit == d).to(tl.int32)), sem="relaxed")


@triton.jit(do_not_specialize=["first", "k"])
def next_kernel(
    x_ptr,  # [batch, n]
    counts_ptr,  # [batch, 8, 16] int32
    ends_ptr,  # [batch, 2] int32: the next larger value (at first the largest integer), the largest value (0)
    n,
    first,
    k,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): the smallest value above the one found, and the largest, which a NaN would be."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    value, place, equal = found(counts_ptr + b * 128, k, DIGITS)
    for part in range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        bits = magnitude(load_float(x_ptr + start + lane, inside))
        above = tl.where(inside & (bits > value), bits, 0x7FFFFFFF)
        tl.atomic_min(ends_ptr + b * 2, tl.min(tl.min(above, axis=1), axis=0), sem="relaxed")
        largest = tl.where(inside, bits, 0)
        tl.atomic_max(ends_ptr + b * 2 + 1, tl.max(tl.max(largest, axis=1), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["first", "k", "fraction", "maximum"])
def threshold_kernel(
    x_ptr,  # [batch, n]
    counts_ptr,  # [batch, 8, 16] int32
    ends_ptr,  # [batch, 2] int32
    out_ptr,  # [batch, n]
    n,
    first,
    k,
    fraction,
    maximum,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): clamp(x, -s, s) / s."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    value, place, equal = found(counts_ptr + b * 128, k, DIGITS)
    largest = tl.load(ends_ptr + b * 2 + 1)
    above = tl.minimum(tl.load(ends_ptr + b * 2), largest)
    above = tl.where(place + 1 < equal, value, above)
    low = value.to(tl.float32, bitcast=True)
    s = low + fraction * (above.to(tl.float32, bitcast=True) - low)
    s = tl.where(fraction == 0.0, low, s)
    s = tl.minimum(tl.maximum(s, 1.0), maximum)
    s = tl.where(largest > INFINITY, float("nan"), s)
    for four in range(PARTS // 4):
        for part in tl.static_range(4):
            _, start, lane = tile(four * 4 + part, BLOCK, PARTS, WIDE)
            inside = lane < n - start
            y = tl.clamp(load_float(x_ptr + start + lane, inside), -s, s, propagate_nan=tl.PropagateNan.ALL) / s
            tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
