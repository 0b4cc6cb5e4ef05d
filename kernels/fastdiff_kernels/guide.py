"""Guidance that looks at the whole sample: three numbers a sample from its sums, in one pass; and the combination.

    m = k_c c + k_d (c - k_u u):  from sums over one sample of c, d = c - u, c^2, d^2, c d, u^2, c u

One program a sample: one launch, no memory between programs, and sums that do not depend on the batch.
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


@triton.jit
def load_again(ptr, mask):
    """A tile that other passes or kernels read as well, as fp32; 0 outside."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first", "w_row_stride", "w_batch_stride", "a", "r"])
def scales_kernel(
    c_ptr,  # [batch, n]
    u_ptr,  # [batch, n]
    row_ptr,  # [1] or None: row 0
    w_ptr,  # fp32 weight, at row * w_row_stride + sample * w_batch_stride
    scales_ptr,  # [batch, 3] fp32
    n,
    first,
    w_row_stride,
    w_batch_stride,
    a,  # rescale: phi; apg: eta
    r,  # apg: the largest norm of d, 0: none
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (1, samples): k_c, k_d and k_u of one sample."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    c_ptr += b * n
    u_ptr += b * n
    lane = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    zero = tl.zeros([BLOCK // 4, 4], tl.float32)
    sc, sd, scc, sdd, scd = zero, zero, zero, zero, zero
    for start in range(0, n, BLOCK):
        inside = lane < n - start
        c = load_again(c_ptr + start + lane, inside)
        u = load_again(u_ptr + start + lane, inside)
        if RULE == ZERO_STAR:
            sdd = tl.fma(u, u, sdd)
            scd = tl.fma(c, u, scd)
        else:
            d = c - u
            scc = tl.fma(c, c, scc)
            sdd = tl.fma(d, d, sdd)
            scd = tl.fma(c, d, scd)
            if RULE == RESCALE:
                sc += c
                sd += d
    row = 0
    if row_ptr is not None:
        row = tl.load(row_ptr)
    w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
    dd = total(sdd)
    cd = total(scd)
    k_u = 1.0
    if RULE == RESCALE:
        size = n.to(tl.float32)
        c = total(sc)
        d = total(sd)
        vc = total(scc) - c * c / size
        vg = vc + (w - 1) * (2 * (cd - c * d / size) + (w - 1) * (dd - d * d / size))
        k_c = a * tl.sqrt(vc / vg) + (1 - a)
        k_d = k_c * (w - 1)
    elif RULE == APG:
        k = tl.where(r > 0, tl.minimum(1.0, r / tl.sqrt(dd), propagate_nan=tl.PropagateNan.ALL), 1.0)
        k_c = 1 - (w - 1) * (1 - a) * k * cd / total(scc)
        k_d = (w - 1) * k
    else:
        k_u = cd / (dd + 1e-8)
        k_c = 1.0
        k_d = w - 1
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
