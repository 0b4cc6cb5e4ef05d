# mypy: disable-error-code="attr-defined"
"""Dynamic thresholding without sorting: the order statistic of |x0| found digit by digit, by counting; then the clamp.

The bits of a non-negative fp32 order like the number: four passes count the next eight bits of those values that share
what is known, integers added in any order; a fifth finds the next larger value. A small sample takes one program of one
launch; of a large one every pass is a launch of many programs, which leave what they found in memory.
"""

import triton
import triton.language as tl

from fastdiff_kernels.guide import load_again
from fastdiff_kernels.tiles import load_float, piece_of, sample_size, tile

INFINITY = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(0x7FFFFFFF)
BINS = tl.constexpr(256)
EXTREMES = tl.constexpr(4)
LAST = tl.constexpr(5)
WHOLE = tl.constexpr(6)
FOUND = tl.constexpr(4 * 256 + 2)


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


@triton.jit
def coefficients(table_ptr, row_ptr, w_ptr, b, width, w_row_stride, w_batch_stride, GUIDED: tl.constexpr,
                 SCALED: tl.constexpr):  # fmt: skip
    """c_skip, c_ratio of the plan's row, and k_c, k_d, k_u of the sample's guidance."""
    row = tl.load(row_ptr).to(tl.int64)
    c_skip = tl.load(table_ptr + row * width)
    c_ratio = tl.load(table_ptr + row * width + 1)
    k_c = 1.0
    k_d = 0.0
    k_u = 1.0
    if GUIDED:
        if SCALED:
            k_c = tl.load(w_ptr + b * 3)
            k_d = tl.load(w_ptr + b * 3 + 1)
            k_u = tl.load(w_ptr + b * 3 + 2)
        else:
            k_d = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride) - 1
    return c_skip, c_ratio, k_c, k_d, k_u


@triton.jit
def counted(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, begin, end, value, DIGIT: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """How often each value of a digit comes among elements begin .. end whose bits above it are `value`."""
    low: tl.constexpr = 23 - 8 * DIGIT if DIGIT < 3 else 0  # the digits are bits 30-23, 22-15, 14-7 and 6-0
    known: tl.constexpr = 31 - 8 * DIGIT
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        bits = magnitude(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, start + lane, inside)
        if DIGIT > 0:
            inside = inside & ((bits >> known) == value)
        counts += tl.histogram((bits >> low) & ((1 << (known - low)) - 1), BINS, mask=inside)
    return counts


@triton.jit
def chosen(counts, value, k, DIGIT: tl.constexpr):
    """The bits with the digit that element k has, its rank among those that share them, and how many do."""
    bins = tl.arange(0, BINS)
    which = tl.sum((tl.cumsum(counts, 0) <= k).to(tl.int32), axis=0)
    k -= tl.sum(tl.where(bins < which, counts, 0), axis=0)
    equal = tl.sum(tl.where(bins == which, counts, 0), axis=0)
    value = (value << (8 if DIGIT < 3 else 7)) + which
    return value, k, equal


@triton.jit
def extremes(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, begin, end, value, BLOCK: tl.constexpr):
    """Bits of the smallest of elements begin .. end above `value`, and of the largest."""
    lane = tl.arange(0, BLOCK)
    above = tl.full([BLOCK], LARGEST, tl.int32)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        bits = magnitude(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, start + lane, inside)
        above = tl.where(inside & (bits > value), tl.minimum(above, bits), above)
        largest = tl.where(inside, tl.maximum(largest, bits), largest)
    return tl.min(above, axis=0), tl.max(largest, axis=0)


@triton.jit
def bounded(value, k, equal, above, most, fraction, c_skip, maximum):
    """clamp(quantile, 1, maximum) between an order statistic and the next; NaN where the sample holds one."""
    next_value = tl.where(k + 1 < equal, value, tl.minimum(above, most))
    s = value.to(tl.float32, bitcast=True)
    still = (fraction == 0.0) | (next_value == value)  # infinity less infinity is NaN
    s = tl.where(still, s, s + fraction * (next_value.to(tl.float32, bitcast=True) - s))
    s *= tl.abs(c_skip)
    s = tl.minimum(tl.maximum(s, 1.0), maximum)
    return tl.where(most > INFINITY, float("nan"), s)


@triton.jit(
    do_not_specialize=["first", "width", "w_row_stride", "w_batch_stride", "k", "fraction", "maximum", "piece"],
)
def bound_kernel(
    x_ptr,  # [batch, n]
    model_ptr,  # [batch, n] or None
    uncond_ptr,  # [batch, n] or None
    table_ptr,  # rows of a plan, or None: x0 = x
    row_ptr,  # [1]
    w_ptr,  # weight, at row * w_row_stride + sample * w_batch_stride; scales: [batch, 3]
    bound_ptr,  # [batch] fp32
    found_ptr,  # [batch, 1026] int32, at first 0: the digits' counts, LARGEST - above, largest; or None
    n,
    first,
    width,
    w_row_stride,
    w_batch_stride,
    k,
    fraction,
    maximum,
    piece,  # elements a program reads, a multiple of BLOCK
    STAGE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """s of every sample. WHOLE: grid (1, samples). Else a launch a stage: 0 .. 3 count a digit, EXTREMES, grid (pieces,
    samples) each, then LAST, grid (1, samples)."""
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
        if uncond_ptr is not None:
            uncond_ptr += b * n
        c_skip, c_ratio, k_c, k_d, k_u = coefficients(
            table_ptr, row_ptr, w_ptr, b, width, w_row_stride, w_batch_stride, uncond_ptr is not None, SCALED
        )
    begin = 0
    end = n
    if STAGE < LAST:
        begin, end = piece_of(n, piece, BLOCK, ALIGNED, WIDE)
    if found_ptr is not None:
        found_ptr += b * FOUND
    bins = tl.arange(0, BINS)
    value = 0
    equal = 0
    for digit in tl.static_range(STAGE if STAGE < EXTREMES else EXTREMES):
        if STAGE == WHOLE:
            counts = counted(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, begin, end, value, digit, BLOCK)
        else:
            counts = tl.load(found_ptr + digit * BINS + bins)
        value, k, equal = chosen(counts, value, k, digit)
    if STAGE < EXTREMES:
        counts = counted(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, begin, end, value, STAGE, BLOCK)
        tl.atomic_add(found_ptr + STAGE * BINS + bins, counts, mask=counts > 0, sem="relaxed")
    else:
        if STAGE == LAST:
            above = LARGEST - tl.load(found_ptr + EXTREMES * BINS)
            most = tl.load(found_ptr + EXTREMES * BINS + 1)
        else:
            above, most = extremes(x_ptr, model_ptr, uncond_ptr, c_ratio, k_c, k_d, k_u, begin, end, value, BLOCK)
        if STAGE == EXTREMES:
            two = tl.arange(0, 2)
            both = tl.where(two == 0, LARGEST - above, most)
            tl.atomic_max(found_ptr + EXTREMES * BINS + two, both, sem="relaxed")
        else:
            tl.store(bound_ptr + b, bounded(value, k, equal, above, most, fraction, c_skip, maximum))


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
    """Grid (tiles, samples): clamp(x / s, -1, 1)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    s = tl.load(bound_ptr + b)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        y = load_float(x_ptr + start + lane, inside) / s  # s / s may be above 1
        y = tl.clamp(y, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
