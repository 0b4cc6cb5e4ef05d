# mypy: disable-error-code="misc, var-annotated, assignment"
"""The training input of a Bayesian flow network from integer classes: z = alpha e_x + sigma n, 2 softmax(z) - 1.

A row of coefficients is [alpha, sigma, 0, 0]; for two classes d = (2x - 1) alpha + sigma n and tanh(d / 2). A row
longer than a window takes two launches, which draw the same noise: sums of every window, then the results.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import begin, exp_from, key_of, spots, tanh_half, window, window_normal, within
from fastdiff_kernels.categorical_row import combined
from fastdiff_kernels.philox import normal4
from fastdiff_kernels.tiles import load4, load_float, sample_size, tile

WHOLE = tl.constexpr(0)
SUMS = tl.constexpr(1)
WRITE = tl.constexpr(2)


@triton.jit(do_not_specialize=["tokens", "first", "coef_stride", "row", "plane"])
def categorical_noise_kernel(
    x_ptr,  # [batch, tokens] int64
    noise_ptr,  # [batch, tokens, K] or None
    coef_ptr,  # [batch or 1, 4] fp32, read at sample * coef_stride
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    out_ptr,  # [batch, tokens, K]
    logits_ptr,  # the same, or None
    part_ptr,  # [2, batch * tokens, PIECES] fp32: largest and sum of every window, or None
    K,
    tokens,
    first,
    coef_stride,
    row,
    plane,
    PHASE: tl.constexpr,
    PIECES: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens times PIECES, samples); ROWS is 1 where PIECES is more."""
    b = tl.program_id(1).to(tl.int64) + first
    piece = tl.program_id(0) % PIECES
    if QUADS:
        K = K // 4 * 4
    d = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    if WIDE:
        d = d.to(tl.int64)
    counter, k, start = window(d, piece, K, ROWS, COLS, QUADS)
    inside = within(d, k, tokens, K, QUADS)
    base = b * tokens
    spot = spots(d, start, K, COLS, QUADS, VECTOR)

    alpha, sigma, _, _ = load4(coef_ptr + b * coef_stride * 4, MATH)
    x = tl.load(x_ptr + base + d, mask=d < tokens, other=0)
    lost = tl.where((x >= 0) & (x < K), 0.0, float("nan"))
    if noise_ptr is None:
        z = window_normal(counter, key_of(row, 1, seed_ptr, index_ptr, b), ROWS, COLS, MATH)
        if ROWS == 1:
            # read nowhere: a load of this shape keeps the tile in the stores' layout, out of shared memory
            z += tl.load(begin(out_ptr, base, K, VECTOR) + spot, mask=inside & (k < 0), other=0.0).to(tl.float32)
    else:
        z = load_float(begin(noise_ptr, base, K, VECTOR) + spot, inside)
    z = tl.fma(sigma, z, lost[:, None])
    z = tl.where(k == x.to(tl.int32)[:, None], z + alpha, z)
    if logits_ptr is not None and PHASE != SUMS:
        tl.store(begin(logits_ptr, base, K, VECTOR) + spot, z.to(logits_ptr.dtype.element_ty), mask=inside)
    z = tl.where(inside, z, float("-inf"))
    if PHASE == WRITE:
        parts = part_ptr + (base + tl.program_id(0) // PIECES) * PIECES
        high, total = combined(parts, parts + plane, PIECES, WIDEST)
        e = exp_from(z, high + tl.zeros([ROWS], tl.float32))
        tl.store(
            begin(out_ptr, base, K, VECTOR) + spot,
            tl.fma(e, 2.0 / total, -1.0).to(out_ptr.dtype.element_ty),
            mask=inside,
        )
    else:
        top = tl.max(z, axis=1)
        e = exp_from(z, top)
        total = tl.sum(e, axis=1)
        if PHASE == SUMS:
            at = part_ptr + (base + d) * PIECES + piece
            tl.store(at, top)
            tl.store(at + plane, total)
        else:
            y = tl.fma(e, (2.0 / total)[:, None], -1.0)
            tl.store(begin(out_ptr, base, K, VECTOR) + spot, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "coef_stride", "row"])
def categorical_pair_noise_kernel(
    x_ptr,  # [batch, n] int64
    noise_ptr,  # [batch, n] or None
    coef_ptr,  # [batch or 1, 4] fp32, read at sample * coef_stride
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    out_ptr,  # [batch, n]
    logits_ptr,  # the same, or None
    n,
    first,
    coef_stride,
    row,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples): two classes."""
    b = tl.program_id(1).to(tl.int64) + first
    alpha, sigma, _, _ = load4(coef_ptr + b * coef_stride * 4, MATH)
    if noise_ptr is None:
        key = key_of(row, 1, seed_ptr, index_ptr, b)
    n = sample_size(n, ALIGNED)
    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        at = b * n + start
        x = tl.load(x_ptr + at + lane, mask=inside, other=0)
        mean = tl.where((x == 0) | (x == 1), (2 * x - 1).to(tl.float32) * alpha, float("nan"))
        if noise_ptr is None:
            z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
        else:
            z = load_float(noise_ptr + at + lane, inside)
        z = tl.fma(sigma, z, mean)
        if logits_ptr is not None:
            tl.store(logits_ptr + at + lane, z.to(logits_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + at + lane, tanh_half(z).to(out_ptr.dtype.element_ty), mask=inside)
