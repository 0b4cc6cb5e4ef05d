"""A Gaussian per element read out as one of K bins of [-1, 1], or as their mean, in one pass.

mean = c_skip x + c_out m0,  std = |c_out| exp(m1),  bin j: [2j/K - 1, 2(j+1)/K - 1], the outer ones with the tails
sampled: the centre of the bin of mean + std n;   mean: sum_j centre_j P(bin j)
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import normal4, sample_key
from fastdiff_kernels.tiles import load_float, sample_size, tile


@triton.jit(do_not_specialize=["first", "row_stride", "stream", "bins"])
def binned_kernel(
    x_ptr,  # [batch, n] fp32
    model_ptr,  # [batch, 2 n]: means, then logarithms of stds
    coef_ptr,  # [N, 2] fp32: c_skip, c_out
    row_ptr,  # [1] or [batch], int32 or int64
    noise_ptr,  # [batch, n] or None
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    out_ptr,  # [batch, n] fp32
    n,
    first,
    row_stride,
    stream,
    bins,
    width,  # 2 / bins
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    c_skip = tl.load(coef_ptr + 2 * row)
    c_out = tl.load(coef_ptr + 2 * row + 1)
    if SAMPLED and noise_ptr is None:
        key = sample_key(row, stream, tl.load(index_ptr + b), tl.load(seed_ptr + b))
    n = sample_size(n, ALIGNED)
    x_ptr += b * n
    model_ptr += 2 * b * n
    out_ptr += b * n
    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        x = load_float(x_ptr + start + lane, inside)
        mean = tl.fma(c_skip, x, c_out * load_float(model_ptr + start + lane, inside))
        std = tl.abs(c_out) * tl.exp(load_float(model_ptr + (start + n) + lane, inside))
        if SAMPLED:
            if noise_ptr is None:
                z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
            else:
                z = tl.load(noise_ptr + b * n + start + lane, mask=inside, other=0.0).to(tl.float32)
            v = tl.fma(std, z, mean)
            j = tl.clamp(tl.floor((v + 1.0) / width), 0.0, bins - 1.0, propagate_nan=tl.PropagateNan.ALL)
            p = tl.fma(j, width, 0.5 * width - 1.0)
        else:
            # sum_j centre_j P(bin j) = 1 - width/2 - width/2 sum over inner edges of 1 + erf
            scale = 0.7071067811865476 / std
            total = tl.zeros_like(mean)
            for j in range(1, bins):
                total += 1.0 + tl.erf((j * width - 1.0 - mean) * scale)
            p = 1.0 - 0.5 * width - 0.5 * width * total
        tl.store(out_ptr + start + lane, p, mask=inside)
