"""A Gaussian per element read out as one of K bins of [-1, 1], or as their mean, in one pass.

mean = c_skip x + c_out m0,  std = |c_out| exp(m1),  bin j: [2j/K - 1, 2(j+1)/K - 1], the outer ones with the tails
sampled: the centre of the bin of mean + std n;   mean: sum_j centre_j P(bin j) = 1 - (1 + 2 T) / K,  T the sum of Phi
over the K - 1 inner edges. Of many bins T is not added up: where a step between edges is h > 1 std, all Phi but those
of the nearest edges are 0 or 1; elsewhere Euler and Maclaurin's formula gives the sum from its ends, to 1e-7 of p.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import normal4, sample_key
from fastdiff_kernels.tiles import load_float, sample_size, tile

FEW = tl.constexpr(20)  # edges that are added up
NEAREST = tl.constexpr(5)  # edges on either side of the mean, each more than a std from the next


@triton.jit
def normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def end_of_sum(z, h):
    """Of an end z: Phi, E max(0, n - |z|), and Euler and Maclaurin's sum of the odd derivatives of Phi."""
    z = tl.clamp(z, -20.0, 20.0)
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    size = tl.abs(z)
    tail = 0.5 - 0.5 * tl.erf(size * 0.7071067811865476)
    beyond = density - size * tail
    q, h2 = z * z, h * h
    he2 = q - 1.0
    he4 = tl.fma(q - 6.0, q, 3.0)
    he6 = tl.fma(tl.fma(q - 15.0, q, 45.0), q, -15.0)
    bend = tl.fma(h2, tl.fma(h2, he6 / -1209600, he4 / 30240), he2 / -720)
    bend = h * tl.fma(h2, bend, 1.0 / 12)
    return tl.where(z > 0, 1.0 - tail, tail), beyond, density * bend


@triton.jit
def sum_of_many(mean, std, bins, width):
    """The sum of Phi((e - mean) / std) over the inner edges e = j width - 1."""
    last = bins - 1.0
    one_over_std = 1.0 / std
    h = width * one_over_std
    at = (mean + 1.0) / width
    nearest = tl.floor(at + 0.5)
    near = tl.clamp(last - NEAREST - nearest, 0.0, last)
    for i in range(2 * NEAREST + 1):
        j = nearest + (i - NEAREST)
        near += tl.where((j >= 1) & (j <= last), normal_cdf((j * width - 1.0 - mean) * one_over_std), 0.0)
    low, low_beyond, low_bend = end_of_sum((width - 1.0 - mean) * one_over_std, h)
    high, high_beyond, high_bend = end_of_sum((1.0 - width - mean) * one_over_std, h)
    # h times it is the integral of Phi between the ends
    between = tl.clamp(last - at, 0.0, last - 1.0) + (high_beyond - low_beyond) * std / width
    # a std beyond 1 would lose digits in that difference; there Phi is smooth: Gauss and Legendre's six points
    reach = (1.0 - width) * one_over_std
    middle = -mean * one_over_std
    smooth = tl.zeros_like(mean)
    for i in range(3):
        point = reach * tl.where(i == 0, 0.2386191860831969, tl.where(i == 1, 0.6612093864662645, 0.9324695142031521))
        weight = tl.where(i == 0, 0.2339569672863455, tl.where(i == 1, 0.1803807865240693, 0.0856622461895852))
        smooth += weight * (normal_cdf(middle - point) + normal_cdf(middle + point))
    between = tl.where(std >= 1.0, smooth * (last - 1.0), between)
    total = tl.where(h <= 1.0, between + 0.5 * (low + high) + (high_bend - low_bend), near)
    return tl.where((mean == mean) & (std == std), total, float("nan"))


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
        std = tl.abs(c_out) * tl.exp(load_float((model_ptr + n) + start + lane, inside))
        if SAMPLED:
            if noise_ptr is None:
                z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
            else:
                z = tl.load(noise_ptr + b * n + start + lane, mask=inside, other=0.0).to(tl.float32)
            v = tl.fma(std, z, mean)
            j = tl.clamp(tl.floor((v + 1.0) / width), 0.0, bins - 1.0, propagate_nan=tl.PropagateNan.ALL)
            p = tl.fma(j, width, 0.5 * width - 1.0)
        else:
            total = tl.zeros_like(mean)
            if bins <= FEW + 1:
                one_over_std = 1.0 / std
                for j in range(1, bins):
                    total += normal_cdf((j * width - 1.0 - mean) * one_over_std)
            else:
                total = sum_of_many(mean, std, bins, width)
            p = 1.0 - 0.5 * width - width * total
        tl.store(out_ptr + start + lane, p, mask=inside)
