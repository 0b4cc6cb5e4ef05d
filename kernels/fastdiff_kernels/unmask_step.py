# mypy: disable-error-code="misc, var-annotated, assignment"
"""One row of a plan of tokens: which masked ones become which class, and which are masked again.

    k drawn from softmax(m / s) by a race, or argmax m,  m = uncond + w (model_out - uncond) without the mask

A token is read in windows, one after the other, and only where the row can change it; the group of 16 classes that wins
is read once more. Random numbers: stream 2 for k, 5 for the choice of tokens. Of a row's header c_skip is the scale of
the noise on a score, c_out the share that a nucleus holds, hi the score that is enough.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import LOG2E, add_gumbel, exponential, guided, key_of, largest, top_and_class
from fastdiff_kernels.nucleus import load_logits, nucleus, read_window
from fastdiff_kernels.race import (
    GROUP,
    counters_of,
    finite,
    first_where,
    groups_of,
    in_groups,
    sums_of_groups,
    uniform_of,
    word,
    words_of_groups,
)

RANDOM = tl.constexpr(0)  # orders
CONFIDENCE = tl.constexpr(1)
MARGIN = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
LOWEST = tl.constexpr(-3.0e38)  # the score of a token that cannot be read out
HIGHEST = tl.constexpr(3.0e38)  # and of one with an infinite logit
ROUNDING = tl.constexpr(4.76837158203125e-07)  # 2^-21: what fp32 may take from 1 - b
LNLN2 = tl.constexpr(0.36651292058166435)  # -ln(ln 2), the constant that add_gumbel lacks
C_SKIP = tl.constexpr(0)  # places in a row's header
C_OUT = tl.constexpr(1)
HI = tl.constexpr(3)


@triton.jit
def shaken(score, heat, d, key, ORDER: tl.constexpr, MATH: tl.constexpr):
    """Scores with noise: those that are ln(p / (1 - p)) as ln p. The surest and the least sure are what they are."""
    plain = score
    if ORDER != ENTROPY:
        plain = tl.minimum(score, 0.0) - tl.log(1.0 + tl.exp2(-tl.abs(score) * LOG2E))
    plain += heat * (add_gumbel(tl.zeros_like(score), word(d >> 2, d & 3, key), MATH) + LNLN2)
    fixed = (score == HIGHEST) | (score == LOWEST)
    return tl.where(fixed, score, tl.minimum(tl.maximum(plain, LOWEST), HIGHEST))


@triton.jit
def place(tokens_ptr, model_in_ptr, at, copy_stride, value, inside, COPIES: tl.constexpr):
    """Writes tokens and the copies of them that the model sees."""
    tl.store(tokens_ptr + at, value, mask=inside)
    for i in tl.static_range(COPIES):
        tl.store(model_in_ptr + at + i * copy_stride, value, mask=inside)


@triton.jit
def merged(m, k, rest, weighted, own, high, take, hit, WEIGHTED: tl.constexpr):
    """Sums over the classes but `hit`, of the windows so far and this one: sum exp(m - high), with (m - high) if asked.

    The class that was `hit` before joins them where this window takes its place: nothing cancels.
    """
    top = tl.maximum(high, tl.max(m, axis=1))
    shift = tl.where(high == float("-inf"), 0.0, high - top)  # before the first class the sums are 0
    e = tl.exp2(tl.where(m == float("-inf"), float("-inf"), (m - top[:, None]) * LOG2E))
    out = (k == hit[:, None]) & take[:, None]
    e = tl.where(out, 0.0, e)
    scale = tl.exp2(shift * LOG2E)
    gone = tl.where(take & (own > float("-inf")), tl.exp2((own - top) * LOG2E), 0.0)
    if WEIGHTED:
        weighted = scale * tl.fma(shift, rest, weighted) + tl.sum(
            tl.where(e > 0.0, e * (m - top[:, None]), 0.0), axis=1
        )
        weighted += tl.where(gone > 0.0, gone * (own - top), 0.0)
    rest = tl.fma(scale, rest, gone) + tl.sum(e, axis=1)
    own = tl.where(take, tl.sum(tl.where(out, m, 0.0), axis=1), own)
    return rest, weighted, own, top


@triton.jit(
    do_not_specialize=[
        "tokens", "first", "mask_id", "row_stride", "w_row_stride", "w_batch_stride", "copy_stride", "model_row",
        "uncond_row",
    ]
)  # fmt: skip
def unmask_read_kernel(
    tokens_ptr,  # [batch, tokens] int64
    group_ptr,  # [batch, tokens] int32: the block of a token, -1 where it is given
    model_ptr,  # [batch, tokens, K]
    uncond_ptr,  # like model_ptr, or None
    model_in_ptr,  # [COPIES * batch, tokens] int64 or None
    class_ptr,  # [batch, tokens] int32 or None at order RANDOM
    score_ptr,  # [batch, tokens] fp32 or None: -inf where the row cannot unmask
    table_ptr,  # [N, WIDTH] fp32
    row_ptr,  # [1] or [batch], int32 or int64
    w_ptr,  # guidance, fp32, read at row * w_row_stride + sample * w_batch_stride, or None
    seed_ptr,  # [batch] int64
    index_ptr,  # [batch] int64
    K,
    tokens,
    first,
    mask_id,
    row_stride,
    w_row_stride,
    w_batch_stride,
    copy_stride,
    model_row,  # elements between the tokens of a tensor
    uncond_row,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    ORDER: tl.constexpr,
    GUIDED: tl.constexpr,
    NUCLEUS: tl.constexpr,  # c_out is looked at
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIECES: tl.constexpr,
    QUADS: tl.constexpr,  # K is a multiple of 4
    VECTOR: tl.constexpr,  # windows start at multiples of 4 elements in every tensor
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens, samples). At order RANDOM it is the whole row."""
    b = tl.program_id(1).to(tl.int64) + first
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    if QUADS:
        K = K // 4 * 4
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if WIDE:
        d = d.to(tl.int64)
    base = b * tokens
    c = table_ptr + row * WIDTH + HEADER
    there = d < tokens
    token = tl.load(tokens_ptr + base + d, mask=there, other=-1)
    block = tl.load(group_ptr + base + d, mask=there, other=-1)
    free = block == tl.load(c + 2).to(tl.int32)
    chosen = free & (token == mask_id)
    if ORDER == RANDOM:
        u = uniform_of(word(d >> 2, d & 3, key_of(row, 5, seed_ptr, index_ptr, b)))
        again = free & (token != mask_id) & (u > tl.load(c))
        chosen = chosen & (u <= tl.load(c + 1))
    temperature = tl.load(c + 3)
    w = 1.0
    if GUIDED:
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)

    heat = tl.minimum(LOG2E / temperature, 1e30)  # of no temperature it is not used
    on = tl.max(chosen.to(tl.int32), axis=0)
    least, cut = tl.full([ROWS], float("-inf"), tl.float32), 0
    if NUCLEUS:
        share = tl.load(table_ptr + row * WIDTH + C_OUT)
        cut = ((temperature != 0.0) & (share < 1.0)).to(tl.int32)
        if cut > 0:
            least = nucleus(
                model_ptr, uncond_ptr, w, base, d, chosen, K, tokens, mask_id, model_row, uncond_row, share, heat, on,
                PIECES, GUIDED, ROWS, COLS, QUADS, VECTOR, MATH,
            )  # fmt: skip
    key = key_of(row, 2, seed_ptr, index_ptr, b)
    first_counter = d * counters_of(K)
    GROUPS: tl.constexpr = COLS // GROUP
    lane = tl.arange(0, GROUPS)[None, :]
    none = tl.full([ROWS], float("-inf"), tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    second, own, high, over, weighted = none, none, none, zero, zero
    # of groups in the same place of all windows: the largest logit, the best ratio and its window, sums but for its own
    best = tl.zeros([ROWS, GROUPS], tl.float32)
    peak = best + float("-inf")
    if temperature == 0.0:
        best += float("-inf")
    hit = tl.zeros([ROWS, GROUPS], tl.int32) - 1
    rest, mine = tl.zeros_like(best), tl.zeros_like(best)
    for piece in range(on * PIECES):
        k, m = read_window(
            model_ptr, uncond_ptr, w, base, d, piece, chosen, K, tokens, mask_id, model_row, uncond_row, GUIDED, ROWS,
            COLS, QUADS, VECTOR,
        )  # fmt: skip
        apart = in_groups(m, ROWS, COLS)
        most = largest(apart, MATH, 2)
        before = peak
        peak = tl.maximum(peak, most, propagate_nan=tl.PropagateNan.ALL)
        sums = rest
        if temperature != 0.0:
            drawn = apart
            if NUCLEUS:
                drawn = tl.where(apart < least[:, None, None], float("-inf"), apart)
            sums = sums_of_groups(drawn, finite(peak), heat)
            most = sums / exponential(words_of_groups(first_counter, piece, key, ROWS, COLS), MATH)
            best *= tl.exp2((finite(before) - finite(peak)) * heat)
        take = most > best
        best = tl.where(take, most, best)
        hit = tl.where(take, piece, hit)
        if ORDER == CONFIDENCE:
            if (temperature != 1.0) | (cut > 0):
                sums = sums_of_groups(apart, finite(peak), LOG2E)
            scale = tl.exp2((finite(before) - finite(peak)) * LOG2E)
            rest = scale * (rest + tl.where(take, mine, 0.0)) + tl.where(take, 0.0, sums)
            mine = tl.where(take, sums, scale * mine)
        elif ORDER == MARGIN or ORDER == ENTROPY:
            most, which = top_and_class(m, k, MATH)
            take = most > high
            other = tl.max(tl.where(k == which[:, None], float("-inf"), m), axis=1)
            second = tl.maximum(tl.minimum(high, most), tl.maximum(second, other))
            over, weighted, own, high = merged(m, k, over, weighted, own, high, take, which, ORDER == ENTROPY)
    top = largest(peak, MATH)
    below = finite(peak) - finite(top)[:, None]
    if temperature != 0.0:
        best *= tl.exp2(below * heat)
    hit = hit * GROUPS + lane
    most, group = top_and_class(best, hit, MATH)
    known = top > float("-inf")  # a NaN among a token's logits: it stays masked
    k = tl.where(known, group, 0)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if not QUADS:
        k -= (d * K & 3).to(tl.int32)[:, None]
    near = known[:, None] & (k >= 0) & (k < K) & (k != mask_id)
    m = load_logits(model_ptr + base * model_row + (d * model_row)[:, None] + k, near)
    if GUIDED:
        m = guided(m, load_logits(uncond_ptr + base * uncond_row + (d * uncond_row)[:, None] + k, near), w)
    if temperature != 0.0:
        e = tl.exp2((m - finite(top)[:, None]) * heat)
        if NUCLEUS:
            e = tl.where(m < least[:, None], 0.0, e)
        so_far = tl.where(e > 0.0, tl.cumsum(e, axis=1), 0.0)
        groups = groups_of(K)
        u = uniform_of(word(first_counter + groups // 4, groups % 4, key))
        one = first_where((e > 0.0) & (so_far >= (u * tl.max(so_far, axis=1))[:, None]), k)
    else:
        one = first_where(m == tl.max(m, axis=1)[:, None], k)
    one = tl.where(known, one, mask_id)
    if ORDER == RANDOM:
        new = tl.where(chosen, one.to(tl.int64), token)
        place(tokens_ptr, model_in_ptr, base + d, copy_stride, tl.where(again, mask_id, new), there, COPIES)
    else:
        if ORDER == CONFIDENCE:
            rest += tl.where(hit == group[:, None], 0.0, mine)
            e = tl.where(k == one[:, None], 0.0, tl.exp2((m - finite(top)[:, None]) * LOG2E))
            over = tl.sum(rest * tl.exp2(below * LOG2E), axis=1) + tl.sum(e, axis=1)
            own = tl.max(tl.where(k == one[:, None], m, float("-inf")), axis=1)
            score = own - top - tl.log(over)  # of p / (1 - p)
        elif ORDER == MARGIN:
            gap = tl.exp2((second - high) * LOG2E)
            score = tl.log((1.0 - gap) / (over + gap))  # of q / (1 - q), q = p_1 - p_2
        else:
            u = 1.0 + over  # ln(1 + over) with what rounding u loses; minus the entropy
            score = weighted / u - (tl.log(u) + (over - (u - 1.0)) / u)
        score = tl.where(top == float("inf"), HIGHEST, score)
        known = known & (score >= LOWEST)
        score = tl.where(known, tl.minimum(score, HIGHEST), LOWEST)
        noise = tl.load(table_ptr + row * WIDTH + C_SKIP)
        if noise != 0.0:
            score = shaken(score, noise, d, key_of(row, 5, seed_ptr, index_ptr, b), ORDER, MATH)
        tl.store(class_ptr + base + d, one, mask=there)
        tl.store(score_ptr + base + d, tl.where(chosen, score, float("-inf")), mask=there)


@triton.jit(do_not_specialize=["tokens", "first", "row_stride", "copy_stride"])
def unmask_place_kernel(
    tokens_ptr,  # [batch, tokens] int64
    model_in_ptr,  # [COPIES * batch, tokens] int64 or None
    class_ptr,  # [batch, tokens] int32
    score_ptr,  # [batch, tokens] fp32
    table_ptr,  # [N, WIDTH] fp32
    row_ptr,  # [1] or [batch], int32 or int64
    tokens,
    first,
    row_stride,
    copy_stride,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    ORDER: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens, samples): the tokens that fewer than n are surer than, the first of equals first.

    And those that are sure enough: by their own score, at order ENTROPY by the sum of those before.
    """
    b = tl.program_id(1).to(tl.int64) + first
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = b * tokens
    there = d < tokens
    own = tl.load(score_ptr + base + d, mask=there, other=float("-inf"))
    mine = own[:, None]
    before = tl.zeros([ROWS], tl.int32)
    spent = tl.zeros([ROWS], tl.float32)
    hi = tl.load(table_ptr + row * WIDTH + HI)
    masked = tl.full((), 0, tl.int32)
    for start in range(0, tokens, COLS):
        j = start + tl.arange(0, COLS)
        score = tl.load(score_ptr + base + j, mask=j < tokens, other=float("-inf"))
        masked += tl.sum((score > float("-inf")).to(tl.int32), axis=0)
        ahead = (score[None, :] > mine) | ((score[None, :] == mine) & (j[None, :] < d[:, None]))
        before += tl.sum(ahead.to(tl.int32), axis=1)
        if ORDER == ENTROPY:
            if hi < HIGHEST:
                spent += tl.sum(tl.where(ahead, tl.minimum(score, 0.0)[None, :], 0.0), axis=1)
    kept = tl.floor(masked.to(tl.float32) * (1.0 - tl.load(table_ptr + row * WIDTH + HEADER + 1) + ROUNDING))
    if ORDER == ENTROPY:
        sure = spent >= hi
    else:
        sure = own > hi
    chosen = (own > float("-inf")) & ((before < masked - kept.to(tl.int32)) | sure)
    hit = tl.load(class_ptr + base + d, mask=chosen, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + base + d, mask=there, other=0)
    place(tokens_ptr, model_in_ptr, base + d, copy_stride, tl.where(chosen, hit, token), there, COPIES)
