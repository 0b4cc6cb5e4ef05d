"""Every sample times a number of its own: gradients from the slopes that a loss left."""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import load_float, sample_size, tile


@triton.jit(do_not_specialize=["first", "g_stride"])
def scaled_kernel(
    x_ptr,  # [batch, n]
    g_ptr,  # fp32, read at sample * g_stride
    by_ptr,  # [batch] fp32 or None
    out_ptr,  # [batch, n]
    n,
    first,
    g_stride,
    factor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): (factor g by) x."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    g = tl.load(g_ptr + b * g_stride)
    if by_ptr is not None:
        g *= tl.load(by_ptr + b)
    g *= factor
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        y = g * load_float(x_ptr + start + lane, inside)
        tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
