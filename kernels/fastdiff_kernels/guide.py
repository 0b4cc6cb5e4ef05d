"""Guidance that looks at the whole sample: three numbers a sample from its sums, in one pass; and the combination.

    m = k_c c + k_d (c - k_u u):  from sums over one sample of c^2, d^2, c d, u^2, c u, d = c - u

A small sample takes one program of one launch. A large one is cut into pieces, which depend on its size alone, as its
sums do: a program sums a piece, and a second launch the pieces.
"""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import load_float, piece_of, sample_size, tile

CFG = tl.constexpr(0)
RESCALE = tl.constexpr(1)
APG = tl.constexpr(2)
ZERO_STAR = tl.constexpr(3)
WHOLE = tl.constexpr(0)
SUMS = tl.constexpr(1)
FINISH = tl.constexpr(2)


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def load_again(ptr, mask):
    """A tile that other passes or kernels read as well, as fp32; 0 outside."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sums(c_ptr, u_ptr, begin, end, lane, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Over elements begin .. end, with d = c - u: of c^2, d^2, c d in the last three; zero_star: of u^2 and c u in the
    last two; rescale: means of c and d, and sums of the products of what differs from them."""
    zero = tl.zeros([BLOCK // 4, 4], tl.float32)
    sc, sd, scc, sdd, scd = zero, zero, zero, zero, zero
    near_c = 0.0
    near_d = 0.0
    if RULE == RESCALE:  # squares far from 0 would cancel: they are taken about the means of 128 elements
        first = tl.arange(0, 128)
        held = first < end - begin
        count = tl.minimum(end - begin, 128).to(tl.float32)
        some = load_again(c_ptr + begin + first, held)
        near_c = tl.sum(some, axis=0) / count
        near_d = tl.sum(some - load_again(u_ptr + begin + first, held), axis=0) / count
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        c = load_again(c_ptr + start + lane, inside)
        u = load_again(u_ptr + start + lane, inside)
        if RULE == ZERO_STAR:
            sdd = tl.fma(u, u, sdd)
            scd = tl.fma(c, u, scd)
        else:
            d = c - u
            if RULE == RESCALE:
                c = tl.where(inside, c - near_c, 0.0)
                d = tl.where(inside, d - near_d, 0.0)
                sc += c
                sd += d
            scc = tl.fma(c, c, scc)
            sdd = tl.fma(d, d, sdd)
            scd = tl.fma(c, d, scd)
    c, d, cc, dd, cd = total(sc), total(sd), total(scc), total(sdd), total(scd)
    if RULE == RESCALE:
        size = (end - begin).to(tl.float32)
        cc -= c * c / size
        dd -= d * d / size
        cd -= c * d / size
        c = near_c + c / size
        d = near_d + d / size
    return c, d, cc, dd, cd


@triton.jit
def joined(part_ptr, n, piece, pieces, RULE: tl.constexpr, WIDEST: tl.constexpr):
    """The five numbers of a sample from those of its pieces, [5, pieces]."""
    i = tl.arange(0, WIDEST)
    inside = i < pieces
    c = tl.load(part_ptr + i, mask=inside, other=0.0)
    d = tl.load(part_ptr + pieces + i, mask=inside, other=0.0)
    cc = tl.sum(tl.load(part_ptr + 2 * pieces + i, mask=inside, other=0.0), axis=0)
    dd = tl.sum(tl.load(part_ptr + 3 * pieces + i, mask=inside, other=0.0), axis=0)
    cd = tl.sum(tl.load(part_ptr + 4 * pieces + i, mask=inside, other=0.0), axis=0)
    mean_c = 0.0
    mean_d = 0.0
    if RULE == RESCALE:
        size = n.to(tl.float32)
        count = tl.where(inside, tl.minimum(n - i.to(tl.int64) * piece, piece), 0).to(tl.float32)
        mean_c = tl.sum(count * c, axis=0) / size
        mean_d = tl.sum(count * d, axis=0) / size
        c -= mean_c
        d -= mean_d
        cc += tl.sum(count * c * c, axis=0)
        dd += tl.sum(count * d * d, axis=0)
        cd += tl.sum(count * c * d, axis=0)
    return mean_c, mean_d, cc, dd, cd


@triton.jit
def numbers(cc, dd, cd, w, a, r, RULE: tl.constexpr):
    """k_c, k_d, k_u from a sample's sums."""
    k_u = 1.0
    if RULE == RESCALE:
        guided = cc + (w - 1) * (2 * cd + (w - 1) * dd)
        k_c = a * tl.sqrt(cc / guided) + (1 - a)
        k_d = k_c * (w - 1)
    elif RULE == APG:
        k = tl.where(r > 0, tl.minimum(1.0, r / tl.sqrt(dd), propagate_nan=tl.PropagateNan.ALL), 1.0)
        k_c = 1 - (w - 1) * (1 - a) * k * cd / cc
        k_d = (w - 1) * k
    else:
        k_u = cd / (dd + 1e-8)
        k_c = 1.0
        k_d = w - 1
    return k_c, k_d, k_u


@triton.jit(do_not_specialize=["first", "pieces", "piece", "w_row_stride", "w_batch_stride", "a", "r"])
def scales_kernel(
    c_ptr,  # [batch, n]
    u_ptr,  # [batch, n]
    row_ptr,  # [1] or None: row 0
    w_ptr,  # fp32 weight, at row * w_row_stride + sample * w_batch_stride
    scales_ptr,  # [batch, 3] fp32
    part_ptr,  # [batch, 5, pieces] fp32, or None
    n,
    first,
    pieces,
    piece,  # elements of one, a multiple of BLOCK
    w_row_stride,
    w_batch_stride,
    a,  # rescale: phi; apg: eta
    r,  # apg: the largest norm of d, 0: none
    RULE: tl.constexpr,
    PHASE: tl.constexpr,
    WIDEST: tl.constexpr,  # the power of 2 from pieces on
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (1, samples): k_c, k_d and k_u of one sample; SUMS: grid (pieces, samples), a piece's five numbers."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    c_ptr += b * n
    u_ptr += b * n
    lane = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    begin = 0
    end = n
    if PHASE == SUMS:
        begin, end = piece_of(n, piece, BLOCK, ALIGNED, WIDE)
    if PHASE == FINISH:
        c, d, cc, dd, cd = joined(part_ptr + b * 5 * pieces, n, piece, pieces, RULE, WIDEST)
    else:
        c, d, cc, dd, cd = sums(c_ptr, u_ptr, begin, end, lane, RULE, BLOCK)
    if PHASE == SUMS:
        at = part_ptr + b * 5 * pieces + tl.program_id(0)
        tl.store(at, c)
        tl.store(at + pieces, d)
        tl.store(at + 2 * pieces, cc)
        tl.store(at + 3 * pieces, dd)
        tl.store(at + 4 * pieces, cd)
    else:
        row = 0
        if row_ptr is not None:
            row = tl.load(row_ptr)
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
        k_c, k_d, k_u = numbers(cc, dd, cd, w, a, r, RULE)
        tl.store(scales_ptr + b * 3, k_c)
        tl.store(scales_ptr + b * 3 + 1, k_d)
        tl.store(scales_ptr + b * 3 + 2, k_u)


@triton.jit(do_not_specialize=["first", "stride"])
def combine_kernel(
    c_ptr,  # [batch, n]
    u_ptr,  # [batch, n]
    scales_ptr,  # [batch, 3] fp32; plain guidance: the weight, at b * stride
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
    """Grid (tiles, samples): k_c c + k_d (c - k_u u)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    c_ptr += b * n
    u_ptr += b * n
    out_ptr += b * n
    if RULE == CFG:
        k_c = 1.0
        k_d = tl.load(scales_ptr + b * stride) - 1
        k_u = 1.0
    else:
        k_c = tl.load(scales_ptr + b * 3)
        k_d = tl.load(scales_ptr + b * 3 + 1)
        k_u = tl.load(scales_ptr + b * 3 + 2)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        c = load_float(c_ptr + start + lane, inside)
        u = load_float(u_ptr + start + lane, inside)
        m = tl.fma(k_d, tl.fma(-k_u, u, c), k_c * c)
        tl.store(out_ptr + start + lane, m.to(out_ptr.dtype.element_ty), mask=inside)
