"""KL of two diagonal Gaussians, summed over a sample, in one pass; and its gradient to the second one in another.

kl = (e^d - 1 - d + (m1 - m2)^2 / v2) / 2,  d = ln v1 - ln v2
"""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import load_float, sample_size, tile

LOG2E = tl.constexpr(1.4426950216293335)  # fp32
LOG2E_REST = tl.constexpr(1.92596298909109e-8)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def precise_exp(x, MATH: tl.constexpr):
    """e^x; a GPU's own loses what rounding x log2(e) loses, 3e-6 at e^80: it is put back."""
    if MATH == "exact":
        e = tl.exp(x)
    else:
        y = x * LOG2E
        rest = tl.fma(x, LOG2E_REST, tl.fma(x, LOG2E, -y))
        e = tl.exp2(y)
        e = tl.where(tl.abs(y) < 127, tl.fma(e, rest * LN2, e), e)  # infinity times 0 is NaN
    return e


@triton.jit
def exp_minus_line(d, MATH: tl.constexpr):
    """(e^d - 1 - d, e^d - 1), by the series where they cancel."""
    e = precise_exp(d, MATH)
    near = tl.fma(d, tl.fma(d, tl.fma(d, 1.0 / 40320, 1.0 / 5040), 1.0 / 720), 1.0 / 120)
    near = tl.fma(d, tl.fma(d, tl.fma(d, near, 1.0 / 24), 1.0 / 6), 0.5) * d
    small = tl.abs(d) < 0.5  # where a unit in the last place of e^d is 8e-7 of the difference
    return tl.where(small, near * d, e - 1.0 - d), tl.where(small, tl.fma(near, 1.0, 1.0) * d, e - 1.0)


@triton.jit
def sample_log(ptr, b, FULL: tl.constexpr):
    """A sample's one log-variance, where it has one."""
    if FULL:
        value = 0.0
    else:
        value = tl.load(ptr + b)
    return value


@triton.jit
def load_log(ptr, one, inside, FULL: tl.constexpr):
    """A tile of log-variances, or the sample's one."""
    if FULL:
        value = load_float(ptr, inside)
    else:
        value = one
    return value


@triton.jit(do_not_specialize=["first", "tiles"])
def gaussian_kl_kernel(
    mean1_ptr,  # [batch, n]
    log1_ptr,  # [batch, n] with FULL1, else [batch] fp32
    mean2_ptr,  # [batch, n]
    log2_ptr,  # [batch, n] with FULL2, else [batch] fp32
    kl_ptr,  # [batch, tiles] fp32
    n,
    first,
    tiles,
    one_over_n,
    FULL1: tl.constexpr,
    FULL2: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (programs of a sample, samples); the pieces depend on the sample's size alone."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    PIECE: tl.constexpr = BLOCK // PARTS
    lane = tl.arange(0, PIECE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    one1 = sample_log(log1_ptr, b, FULL1)
    one2 = sample_log(log2_ptr, b, FULL2)
    total = tl.zeros([PIECE // 4, 4], tl.float32)
    for part in range(tl.minimum(PARTS, tl.cdiv(n - pid * BLOCK, PIECE)).to(tl.int32)):
        start = pid * BLOCK + part * PIECE
        inside = lane < n - start
        at = b * n + start + lane
        m1 = load_float(mean1_ptr + at, inside)
        m2 = load_float(mean2_ptr + at, inside)
        l1 = load_log(log1_ptr + at, one1, inside, FULL1)
        l2 = load_log(log2_ptr + at, one2, inside, FULL2)
        bend, _ = exp_minus_line(l1 - l2, MATH)
        apart = m2 - m1
        total += tl.where(inside, 0.5 * (bend + apart * precise_exp(-l2, MATH) * apart), 0.0)
    tl.store(kl_ptr + b * tiles + pid, one_over_n * tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["first"])
def gaussian_kl_slopes_kernel(
    mean1_ptr,  # [batch, n]
    log1_ptr,  # [batch, n] with FULL1, else [batch] fp32
    mean2_ptr,  # [batch, n]
    log2_ptr,  # [batch, n] with FULL2, else [batch] fp32
    g_ptr,  # [batch] fp32
    of_mean_ptr,  # [batch, n] or None: g d / d mean2
    of_log_ptr,  # [batch, n] or None: g d / d log_variance2
    n,
    first,
    one_over_n,
    FULL1: tl.constexpr,
    FULL2: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    one1 = sample_log(log1_ptr, b, FULL1)
    one2 = sample_log(log2_ptr, b, FULL2)
    scale = tl.load(g_ptr + b) * one_over_n
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        at = b * n + start + lane
        m1 = load_float(mean1_ptr + at, inside)
        m2 = load_float(mean2_ptr + at, inside)
        l1 = load_log(log1_ptr + at, one1, inside, FULL1)
        l2 = load_log(log2_ptr + at, one2, inside, FULL2)
        apart = m2 - m1
        pull = apart * precise_exp(-l2, MATH)
        if of_mean_ptr is not None:
            tl.store(of_mean_ptr + at, (scale * pull).to(of_mean_ptr.dtype.element_ty), mask=inside)
        if of_log_ptr is not None:
            _, grown = exp_minus_line(l1 - l2, MATH)
            slope = (-0.5 * scale) * (grown + pull * apart)
            tl.store(of_log_ptr + at, slope.to(of_log_ptr.dtype.element_ty), mask=inside)
