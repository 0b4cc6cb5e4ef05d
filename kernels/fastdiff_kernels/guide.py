"""Guidance that looks at the whole sample: sums over it, their meaning, and the combination; a quantile by counting.

    m = k_c c + k_d d,  d = c - u:  k_c and k_d from the sums of c, d, c^2, d^2, c d, u^2, c u over one sample

One warp a program: sums need no shared memory. A sample's tiles do not depend on the batch, so neither do its sums.
"""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import load_float, sample_size, tile

CFG = tl.constexpr(0)
RESCALE = tl.constexpr(1)
APG = tl.constexpr(2)
ZERO_STAR = tl.constexpr(3)


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit(do_not_specialize=["first", "tiles"])
def sums_kernel(
    c_ptr,  # [batch, n]
    u_ptr,  # [batch, n]
    sums_ptr,  # [batch, tiles, 8] fp32
    n,
    first,
    tiles,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): the seven sums of one tile."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    c_ptr += b * n
    u_ptr += b * n
    zero = tl.zeros([BLOCK // PARTS // 4, 4], tl.float32)
    sc, sd, scc, sdd, scd, suu, scu = zero, zero, zero, zero, zero, zero, zero
    for four in range(PARTS // 4):
        for part in tl.static_range(4):
            _, start, lane = tile(four * 4 + part, BLOCK, PARTS, WIDE)
            inside = lane < n - start
            c = tl.where(inside, load_float(c_ptr + start + lane, inside), 0.0)
            u = tl.where(inside, load_float(u_ptr + start + lane, inside), 0.0)
            d = c - u
            sc += c
            sd += d
            scc = tl.fma(c, c, scc)
            sdd = tl.fma(d, d, sdd)
            scd = tl.fma(c, d, scd)
            suu = tl.fma(u, u, suu)
            scu = tl.fma(c, u, scu)
    sums_ptr += (b * tiles + tl.program_id(0)) * 8
    tl.store(sums_ptr, total(sc))
    tl.store(sums_ptr + 1, total(sd))
    tl.store(sums_ptr + 2, total(scc))
    tl.store(sums_ptr + 3, total(sdd))
    tl.store(sums_ptr + 4, total(scd))
    tl.store(sums_ptr + 5, total(suu))
    tl.store(sums_ptr + 6, total(scu))


@triton.jit
def column(sums_ptr, tiles, k, TILES: tl.constexpr):
    i = tl.arange(0, TILES)
    return tl.sum(tl.load(sums_ptr + i * 8 + k, mask=i < tiles, other=0.0), axis=0)


@triton.jit(do_not_specialize=["n", "tiles", "w_stride", "a", "r"])
def coefficients_kernel(
    sums_ptr,  # [batch, tiles, 8] fp32
    w_ptr,  # fp32, weight of sample b at b * w_stride
    coef_ptr,  # [batch, 2] fp32
    n,
    tiles,
    w_stride,
    a,  # rescale: phi; apg: eta
    r,  # apg: the largest norm of d, 0: none
    RULE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (samples): k_c and k_d of one sample."""
    b = tl.program_id(0).to(tl.int64)
    sums_ptr += b * tiles * 8
    w = tl.load(w_ptr + b * w_stride)
    scc = column(sums_ptr, tiles, 2, TILES)
    scd = column(sums_ptr, tiles, 4, TILES)
    if RULE == RESCALE:
        sc = column(sums_ptr, tiles, 0, TILES)
        sd = column(sums_ptr, tiles, 1, TILES)
        sdd = column(sums_ptr, tiles, 3, TILES)
        size = n.to(tl.float32)
        vc = scc - sc * sc / size
        vg = vc + (w - 1) * (2 * (scd - sc * sd / size) + (w - 1) * (sdd - sd * sd / size))
        k_c = a * tl.sqrt(vc / vg) + (1 - a)
        k_d = k_c * (w - 1)
    elif RULE == APG:
        sdd = column(sums_ptr, tiles, 3, TILES)
        k = tl.where(r > 0, tl.minimum(1.0, r / tl.sqrt(sdd), propagate_nan=tl.PropagateNan.ALL), 1.0)
        k_c = 1 - (w - 1) * (1 - a) * k * scd / scc
        k_d = (w - 1) * k
    else:
        s = column(sums_ptr, tiles, 6, TILES) / (column(sums_ptr, tiles, 5, TILES) + 1e-8)
        k_c = w + (1 - w) * s
        k_d = (w - 1) * s
    tl.store(coef_ptr + b * 2, k_c)
    tl.store(coef_ptr + b * 2 + 1, k_d)


@triton.jit(do_not_specialize=["first", "stride"])
def combine_kernel(
    c_ptr,  # [batch, n]
    u_ptr,  # [batch, n]
    coef_ptr,  # [batch, 2] fp32; plain guidance: the weight, at b * stride
    out_ptr,  # [batch, n]
    n,
    first,
    stride,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): k_c c + k_d (c - u)."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    c_ptr += b * n
    u_ptr += b * n
    out_ptr += b * n
    if RULE == CFG:
        k_c = 1.0
        k_d = tl.load(coef_ptr + b * stride) - 1
    else:
        k_c = tl.load(coef_ptr + b * 2)
        k_d = tl.load(coef_ptr + b * 2 + 1)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        c = load_float(c_ptr + start + lane, inside)
        u = load_float(u_ptr + start + lane, inside)
        tl.store(out_ptr + start + lane, tl.fma(k_d, c - u, k_c * c).to(out_ptr.dtype.element_ty), mask=inside)
