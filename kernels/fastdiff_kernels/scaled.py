"""Every sample times a number of its own: gradients from the slopes that a loss left."""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import load_float, sample_size, tile


@triton.jit(do_not_specialize=["first"])
def scaled_kernel(
    x_ptr,  # [batch, n]
    g_ptr,  # [batch] fp32
    out_ptr,  # [batch, n]
    n,
    first,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles, samples): g x."""
    b = (tl.program_id(1) + first).to(tl.int64)
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    out_ptr += b * n
    g = tl.load(g_ptr + b)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        y = g * load_float(x_ptr + start + lane, inside)
        tl.store(out_ptr + start + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
