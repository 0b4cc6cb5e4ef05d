# mypy: disable-error-code="misc, var-annotated, assignment"
"""||e_x - softmax(m)||^2 summed over the tokens of a tile, and its gradient to m, from one pass over the logits.

    r = p - e_x;  error = sum_k r_k^2;  gradient_k = 2 p_k (r_k - sum_j p_j r_j)

A row longer than a window takes two launches: sums of every window, then errors and gradient.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import LOG2E, begin, covered, exp_from, spots, window, within
from fastdiff_kernels.tiles import load_float, sample_size, tile

WHOLE = tl.constexpr(0)
SUMS = tl.constexpr(1)
WRITE = tl.constexpr(2)


@triton.jit(do_not_specialize=["tokens", "first", "programs", "plane", "logits_row"])
def categorical_loss_kernel(
    logits_ptr,  # [batch, tokens, K]
    x_ptr,  # [batch, tokens] int64
    error_ptr,  # [batch, programs] fp32, one a program
    grad_ptr,  # [batch, tokens, K] or None
    part_ptr,  # [3, batch * tokens, PIECES] fp32: largest, sum and sum of squares of every window, or None
    K,
    tokens,
    first,
    programs,
    plane,
    logits_row,  # elements between the tokens of the logits
    one_over_tokens,
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
    _, k, start = window(d, piece, K, ROWS, COLS, QUADS)
    inside = within(d, k, tokens, K, QUADS)
    base = b * tokens
    near = covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR)
    m_ptr = begin(logits_ptr, base, logits_row, VECTOR)
    m = load_float(m_ptr + spots(d, start, logits_row, COLS, QUADS, VECTOR), near)
    m = tl.where(inside, m, float("-inf"))
    top = tl.max(m, axis=1)
    if PIECES > 1:
        top = tl.where(top == float("-inf"), 0.0, top)  # a window of forbidden classes sums to 0
    if PHASE == SUMS:
        e = exp_from(m, top)
        at = part_ptr + (base + d) * PIECES + piece
        tl.store(at, top)
        tl.store(at + plane, tl.sum(e, axis=1))
        tl.store(at + 2 * plane, tl.sum(e * e, axis=1))
    else:
        x = tl.load(x_ptr + base + d, mask=d < tokens, other=0)
        valid = (x >= 0) & (x < K)
        if PHASE == WRITE:
            i = tl.arange(0, WIDEST)
            parts = part_ptr + (base + tl.program_id(0) // PIECES) * PIECES + i
            tops = tl.load(parts, mask=i < PIECES, other=float("-inf"))
            sums = tl.load(parts + plane, mask=i < PIECES, other=0.0)
            squares = tl.load(parts + 2 * plane, mask=i < PIECES, other=0.0)
            high = tl.max(tops, axis=0)
            scale = tl.exp(tops - high)
            total = tl.sum(sums * scale, axis=0)
            p = exp_from(m, high + tl.zeros([ROWS], tl.float32)) * (1.0 / total)
            m_x = tl.load(m_ptr + d * logits_row + x, mask=valid, other=0.0).to(tl.float32)
            p_x = tl.exp2((m_x - high) * LOG2E) / total
            s = tl.sum(squares * scale * scale, axis=0) / (total * total) - p_x
            r = tl.where(k == x.to(tl.int32)[:, None], p - 1.0, p)
        else:
            p = exp_from(m, top)
            p = p * (1.0 / tl.sum(p, axis=1))[:, None]
            r = tl.where(k == x.to(tl.int32)[:, None], p - 1.0, p)
            s = tl.sum(p * r, axis=1)
        error = tl.sum(r * r, axis=1)
        error = tl.where(valid, error, float("nan"))
        error = one_over_tokens * tl.sum(tl.where(d < tokens, error, 0.0), axis=0)
        tl.store(error_ptr + b * programs + tl.program_id(0), error)
        if grad_ptr is not None:
            g = 2.0 * p * (r - s[:, None])
            at = begin(grad_ptr, base, K, VECTOR) + spots(d, start, K, COLS, QUADS, VECTOR)
            tl.store(at, g.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "programs"])
def categorical_pair_loss_kernel(
    logits_ptr,  # [batch, n]: of class 1
    x_ptr,  # [batch, n] int64
    error_ptr,  # [batch, programs] fp32
    grad_ptr,  # [batch, n] or None
    n,
    first,
    programs,
    one_over_n,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples): two classes, error = 2 (p - x)^2."""
    b = tl.program_id(1).to(tl.int64) + first
    n = sample_size(n, ALIGNED)
    total = tl.zeros([BLOCK // PARTS // 4, 4], tl.float32)
    for part in tl.static_range(PARTS):
        _, start, lane = tile(part, BLOCK, PARTS, WIDE)
        inside = lane < n - start
        at = b * n + start
        m = load_float(logits_ptr + at + lane, inside)
        x = tl.load(x_ptr + at + lane, mask=inside, other=0)
        p = 1.0 / (1.0 + tl.exp2(m * -LOG2E))
        r = tl.where((x == 0) | (x == 1), p - x.to(tl.float32), float("nan"))
        total += tl.where(inside, 2.0 * r * r, 0.0)
        if grad_ptr is not None:
            g = 4.0 * r * p * (1.0 - p)
            tl.store(grad_ptr + at + lane, g.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(error_ptr + b * programs + tl.program_id(0), one_over_n * tl.sum(tl.sum(total, axis=1), axis=0))
