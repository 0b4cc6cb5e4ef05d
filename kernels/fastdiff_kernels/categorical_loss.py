# mypy: disable-error-code="misc, var-annotated, assignment"
"""||e_x - softmax(m)||^2 summed over the tokens of a tile, and its gradient to m, each from one pass over the logits.

    q = sum_{k != x} p_k = 1 - p_x,  s2 = sum_{k != x} p_k^2,  error = q^2 + s2,  s = s2 - p_x q
    gradient_k = 2 p_k (p_k - s);  gradient_x = -2 p_x error

Sums leave the class x out, so that a confident network's error and gradient have all their digits. What the gradient
needs of a token is kept, four numbers: largest logit, 1 / sum_k exp(m_k - largest), s and error. A row longer than a
window leaves its windows' sums in part_ptr first. Of few classes in half precision, and of two, the gradient itself is
kept: there a second pass costs more in instructions, or in int64 classes, than it saves in bytes.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import LOG2E, begin, covered, spots, window, within
from fastdiff_kernels.categorical_row import finite_top
from fastdiff_kernels.tiles import load_float, sample_size, tile


@triton.jit
def window_of(
    logits_ptr, x_ptr, first, K, tokens, logits_row, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    QUADS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a program reads: sample, tokens, K, classes, the window's first class, logits, true classes."""
    b = tl.program_id(1).to(tl.int64) + first
    if QUADS:
        K = K // 4 * 4
    d = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    if WIDE:
        d = d.to(tl.int64)
    _, k, start = window(d, tl.program_id(0) % PIECES, K, ROWS, COLS, QUADS)
    near = covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR)
    x = tl.load(x_ptr + b * tokens + d, mask=d < tokens, other=0)
    at = begin(logits_ptr, b * tokens, logits_row, VECTOR) + spots(d, start, logits_row, COLS, QUADS, VECTOR)
    return b, d, K, k, start, load_float(at, near), x


@triton.jit
def errors_of(others, squares, top, m_x, x, K):
    """Of tokens, from their sums without x: 1 / sum_k exp(m_k - top), s and the error."""
    e_x = tl.exp2((m_x - top) * LOG2E)
    one_over = 1.0 / (others + e_x)
    q = others * one_over
    s2 = squares * one_over * one_over
    lost = tl.where((x >= 0) & (x < K), 0.0, float("nan"))
    return one_over, tl.fma(e_x * -one_over, q, s2) + lost, tl.fma(q, q, s2) + lost


@triton.jit
def keep(token_ptr, at, d, tokens, top, one_over, s, error, ROWS: tl.constexpr):
    """What the gradient of tokens needs, where asked for."""
    if token_ptr is not None:
        four = tl.reshape(tl.join(tl.join(top, s), tl.join(one_over, error)), [ROWS, 4])
        to = token_ptr + (at * 4)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(to, four, mask=(d < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens", "first", "programs", "plane", "logits_row"])
def categorical_loss_kernel(
    logits_ptr,  # [batch, tokens, K]
    x_ptr,  # [batch, tokens] int64
    error_ptr,  # [batch, programs] fp32, one a program
    grad_ptr,  # [batch, tokens, K], tokens times the gradient, or None; whole tokens only
    token_ptr,  # [batch * tokens, 4] fp32 or None
    part_ptr,  # [3, batch * tokens, PIECES] fp32: largest, sum and sum of squares of every window; None: whole tokens
    K,
    tokens,
    first,
    programs,
    plane,  # batch * tokens
    logits_row,  # elements between the tokens of the logits
    one_over_tokens,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens times PIECES, samples); ROWS is 1 where PIECES is more."""
    b, d, K, k, start, m, x = window_of(
        logits_ptr, x_ptr, first, K, tokens, logits_row, PIECES, ROWS, COLS, QUADS, VECTOR, WIDE
    )
    base = b * tokens
    plane = plane.to(tl.int64)
    inside = within(d, k, tokens, K, QUADS)
    m = tl.where(inside, m, float("-inf"))
    top = finite_top(m) if PIECES > 1 else tl.max(m, axis=1)
    e = tl.exp2((m - top[:, None]) * LOG2E)
    short = x.to(tl.int32)
    at_x = k == short[:, None]
    other = tl.where(at_x, 0.0, e)
    others, squares = tl.sum(other, axis=1), tl.sum(other * other, axis=1)
    if PIECES > 1:
        at = part_ptr + (base + d) * PIECES + tl.program_id(0) % PIECES
        tl.store(at, tl.max(m, axis=1))
        tl.store(at + plane * PIECES, others)
        tl.store(at + 2 * plane * PIECES, squares)
    else:
        valid = (x >= 0) & (x < K) & (d < tokens)
        m_x = tl.load(begin(logits_ptr, base, logits_row, VECTOR) + (d * logits_row + short), mask=valid, other=0.0).to(
            tl.float32
        )
        one_over, s, error = errors_of(others, squares, top, m_x, x, K)
        keep(token_ptr, base + d, d, tokens, top, one_over, s, error, ROWS)
        total = one_over_tokens * tl.sum(tl.where(d < tokens, error, 0.0), axis=0)
        tl.store(error_ptr + b * programs + tl.program_id(0), total)
        if grad_ptr is not None:
            p = e * one_over[:, None]
            g = 2.0 * p * tl.where(at_x, -error[:, None], p - s[:, None])
            at = begin(grad_ptr, base, K, VECTOR) + spots(d, start, K, COLS, QUADS, VECTOR)
            tl.store(at, g.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "first", "programs", "plane", "logits_row"])
def categorical_error_kernel(
    logits_ptr,  # [batch, tokens, K]
    x_ptr,  # [batch, tokens] int64
    error_ptr,  # [batch, programs] fp32, one a program
    token_ptr,  # [batch * tokens, 4] fp32 or None
    part_ptr,  # [3, batch * tokens, PIECES] fp32
    K,
    tokens,
    first,
    programs,
    plane,
    logits_row,
    one_over_tokens,
    PIECES: tl.constexpr,
    WIDEST: tl.constexpr,  # PIECES rounded up to a power of two
    ROWS: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens, samples): what `categorical_loss_kernel` does of whole tokens, from their windows."""
    b = tl.program_id(1).to(tl.int64) + first
    plane = plane.to(tl.int64)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = b * tokens + d.to(tl.int64)
    i = tl.arange(0, WIDEST)
    there = (d < tokens)[:, None] & (i < PIECES)[None, :]
    parts = part_ptr + (at * PIECES)[:, None] + i[None, :]
    x = tl.load(x_ptr + at, mask=d < tokens, other=0)
    tops = tl.load(parts, mask=there, other=float("-inf"))
    sums = tl.load(parts + plane * PIECES, mask=there, other=0.0)
    squares = tl.load(parts + 2 * plane * PIECES, mask=there, other=0.0)
    top = tl.max(tops, axis=1)
    scale = tl.exp2((tops - top[:, None]) * LOG2E)
    others, squares = tl.sum(sums * scale, axis=1), tl.sum(squares * scale * scale, axis=1)
    valid = (x >= 0) & (x < K) & (d < tokens)
    m_x = tl.load(logits_ptr + at * logits_row + x, mask=valid, other=0.0).to(tl.float32)
    one_over, s, error = errors_of(others, squares, top, m_x, x, K)
    keep(token_ptr, at, d, tokens, top, one_over, s, error, ROWS)
    total = one_over_tokens * tl.sum(tl.where(d < tokens, error, 0.0), axis=0)
    tl.store(error_ptr + b * programs + tl.program_id(0), total)


@triton.jit(do_not_specialize=["tokens", "first", "logits_row", "scale_stride"])
def categorical_gradient_kernel(
    logits_ptr,  # [batch, tokens, K]
    x_ptr,  # [batch, tokens] int64
    token_ptr,  # [batch * tokens, 4] fp32
    scale_ptr,  # [batch] fp32, read at sample * scale_stride
    grad_ptr,  # [batch, tokens, K]
    K,
    tokens,
    first,
    logits_row,
    scale_stride,
    one_over_tokens,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens times PIECES, samples): scale / tokens times the gradient."""
    b, d, K, k, start, m, x = window_of(
        logits_ptr, x_ptr, first, K, tokens, logits_row, PIECES, ROWS, COLS, QUADS, VECTOR, WIDE
    )
    base = b * tokens
    kept = token_ptr + (base + d) * 4
    top = tl.load(kept, mask=d < tokens, other=0.0)
    one_over = tl.load(kept + 1, mask=d < tokens, other=0.0)
    s = tl.load(kept + 2, mask=d < tokens, other=0.0)
    error = tl.load(kept + 3, mask=d < tokens, other=0.0)
    scale = 2.0 * one_over_tokens * tl.load(scale_ptr + b * scale_stride)
    p = tl.exp2((m - top[:, None]) * LOG2E) * one_over[:, None]
    r = tl.where(k == x.to(tl.int32)[:, None], -error[:, None], p - s[:, None])
    at = begin(grad_ptr, base, K, VECTOR) + spots(d, start, K, COLS, QUADS, VECTOR)
    tl.store(at, (scale * p * r).to(grad_ptr.dtype.element_ty), mask=within(d, k, tokens, K, QUADS))


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
        e = tl.exp2(tl.abs(m) * -LOG2E)
        high = 1.0 / (1.0 + e)
        low = e * high
        q = tl.where((m < 0) == (x == 0), low, high)  # the probability of the class that is not x
        q = tl.where((x == 0) | (x == 1), q, float("nan"))
        total += tl.where(inside, 2.0 * q * q, 0.0)
        if grad_ptr is not None:
            g = tl.where(x == 0, 4.0, -4.0) * q * (high * low)
            tl.store(grad_ptr + at + lane, g.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(error_ptr + b * programs + tl.program_id(0), one_over_n * tl.sum(tl.sum(total, axis=1), axis=0))
