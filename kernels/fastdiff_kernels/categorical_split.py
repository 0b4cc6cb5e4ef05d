# mypy: disable-error-code="misc, var-annotated, assignment"
"""One row of a plan on data of more classes than a program holds: three launches over windows of a token's classes.

    read: the largest m + gumbel of every window;  update: the state, and the largest number and the sum of every window
    write: 2 softmax(S'_0) - 1

16 bytes an element for bf16 logits: logits 2, state 4 + 4 + 4, next input 2. Noise is drawn once; no window waits for
another within a launch: the next launch combines what the windows of a token left behind, in planes of part_ptr
[4, batch * tokens, PIECES]: largest and sum (or class) of the readout, largest and sum of the new state.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import MEAN, begin, covered, exp_from, largest, spots, top_and_class, window, within
from fastdiff_kernels.categorical_row import combined, finite_top, noise_of, perturbed, read_slots, table_row, updated


@triton.jit(
    do_not_specialize=[
        "tokens", "first", "row_stride", "w_row_stride", "w_batch_stride", "plane", "model_row", "uncond_row",
    ]
)  # fmt: skip
def categorical_read_kernel(
    model_ptr,  # [batch, tokens, K]
    uncond_ptr,  # like model_ptr, or None
    gumbel_ptr,  # [batch, tokens, K] dense, or None
    part_ptr,  # [4, batch * tokens, PIECES] fp32
    hits_ptr,  # [batch * tokens, PIECES] int32
    row_ptr,  # [1] or [batch], int32 or int64
    w_ptr,  # guidance, fp32, read at row * w_row_stride + sample * w_batch_stride, or None
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    K,
    tokens,
    first,
    row_stride,
    w_row_stride,
    w_batch_stride,
    plane,
    model_row,  # elements between the tokens of a tensor
    uncond_row,
    READOUT: tl.constexpr,
    GUMBEL: tl.constexpr,  # 0 none, 1 Philox, 2 gumbel_ptr
    GUIDED: tl.constexpr,
    PIECES: tl.constexpr,  # windows of a token
    COLS: tl.constexpr,
    QUADS: tl.constexpr,  # K is a multiple of 4
    VECTOR: tl.constexpr,  # windows start at multiples of 4 elements in every tensor
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tokens * PIECES, samples): what the readout needs of one window."""
    b = tl.program_id(1).to(tl.int64) + first
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    piece = tl.program_id(0) % PIECES
    if QUADS:
        K = K // 4 * 4
    d = tl.program_id(0) // PIECES + tl.arange(0, 1)
    if WIDE:
        d = d.to(tl.int64)
    counter, k, start = window(d, piece, K, 1, COLS, QUADS)
    w = 1.0
    if GUIDED:
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
    v = perturbed(
        model_ptr, uncond_ptr, gumbel_ptr, w, seed_ptr, index_ptr, b, row, tokens, model_row, uncond_row, K, d, k,
        start, counter, READOUT, GUMBEL, GUIDED, 1, COLS, QUADS, VECTOR, MATH,
    )  # fmt: skip
    at = (b * tokens + d) * PIECES + piece
    top, hit = top_and_class(v, k, MATH)
    tl.store(part_ptr + at, top)
    tl.store(hits_ptr + at, hit)
    if READOUT == MEAN:
        tl.store(part_ptr + plane + at, tl.sum(exp_from(v, finite_top(v)), axis=1))


@triton.jit(
    do_not_specialize=[
        "tokens", "first", "row_stride", "w_row_stride", "w_batch_stride", "slot_stride", "plane", "state_row",
        "model_row", "uncond_row",
    ]
)  # fmt: skip
def categorical_update_kernel(
    state_ptr,  # [P, batch, tokens, K] fp32
    model_ptr,  # [batch, tokens, K]: MEAN reads it again
    uncond_ptr,  # like model_ptr, or None
    classes_ptr,  # [batch, tokens] int64 or None
    noise_ptr,  # n, [batch, tokens, K] dense, or None
    part_ptr,  # [4, batch * tokens, PIECES] fp32
    hits_ptr,  # [batch * tokens, PIECES] int32
    table_ptr,  # [N, WIDTH] fp32
    row_ptr,  # [1] or [batch], int32 or int64
    w_ptr,  # guidance, or None
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    K,
    tokens,
    first,
    row_stride,
    w_row_stride,
    w_batch_stride,
    slot_stride,
    plane,
    state_row,
    model_row,
    uncond_row,
    SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    READOUT: tl.constexpr,
    NOISE: tl.constexpr,  # 0 none, 1 Philox, 2 noise_ptr
    GUIDED: tl.constexpr,
    PIECES: tl.constexpr,
    WIDEST: tl.constexpr,  # PIECES rounded up to a power of two
    COLS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tokens * PIECES, samples): the update of one window. All loads precede the stores."""
    b = tl.program_id(1).to(tl.int64) + first
    if VECTOR:
        slot_stride = slot_stride // 4 * 4
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    c = table_row(table_ptr, row, WIDTH, MATH)
    READ: tl.constexpr = HEADER + SLOTS * SLOTS + 3 * SLOTS
    WRITE: tl.constexpr = READ + SLOTS
    piece = tl.program_id(0) % PIECES
    if QUADS:
        K = K // 4 * 4
    token = tl.program_id(0) // PIECES
    d = token + tl.arange(0, 1)
    if WIDE:
        d = d.to(tl.int64)
    counter, k, start = window(d, piece, K, 1, COLS, QUADS)
    inside = within(d, k, tokens, K, QUADS)
    base = b * tokens
    parts = (base + token) * PIECES
    i = tl.arange(0, WIDEST)
    tops = tl.load(part_ptr + parts + i, mask=i < PIECES, other=float("-inf"))[None, :]
    hits = tl.load(hits_ptr + parts + i, mask=i < PIECES, other=-1)[None, :]
    top, hit = top_and_class(tops, hits, MATH)
    hit = tl.where(top == top, hit, 0)
    if classes_ptr is not None:
        tl.store(classes_ptr + base + d, hit.to(tl.int64), mask=(d * 0 + piece) == 0)
    if READOUT == MEAN:
        high, total = combined(part_ptr + parts, part_ptr + plane + parts, PIECES, WIDEST)
        w = 1.0
        if GUIDED:
            w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
        v = perturbed(
            model_ptr, uncond_ptr, None, w, seed_ptr, index_ptr, b, row, tokens, model_row, uncond_row, K, d, k, start,
            counter, READOUT, 0, GUIDED, 1, COLS, QUADS, VECTOR, MATH,
        )  # fmt: skip
        chosen = exp_from(v, top) * (1.0 / total)
        cold = 0.0
    else:
        chosen = k == hit[:, None]
        cold = tl.where(top == top, 0.0, float("nan"))[:, None]

    state_ptr = begin(state_ptr, base, state_row, VECTOR)
    spot = spots(d, start, state_row, COLS, QUADS, VECTOR)
    slots = read_slots(state_ptr, c, slot_stride, spot, tokens, K, d, k, start, SLOTS, READ, COLS, QUADS, VECTOR)
    z = slots[0]
    if NOISE != 0:
        z = noise_of(
            noise_ptr, seed_ptr, index_ptr, c[5], b, row, tokens, K, d, k, start, counter, NOISE, 1, COLS, QUADS,
            VECTOR, MATH,
        )  # fmt: skip
    for j in tl.static_range(SLOTS):
        y = updated(c, j, slots, chosen, cold, z, SLOTS, HEADER, READOUT, NOISE)
        if j == 0:
            tl.store(state_ptr + spot, y, mask=inside)
            y = tl.where(inside, y, float("-inf"))
            high = largest(y, MATH)
            tl.store(part_ptr + 2 * plane + parts + piece + d * 0, high)
            tl.store(part_ptr + 3 * plane + parts + piece + d * 0, tl.sum(exp_from(y, high), axis=1))
        else:
            slot = c[WRITE + j].to(tl.int64)
            written = within(d, k, tokens, K * (slot >= 0).to(tl.int32), QUADS)
            tl.store(state_ptr + slot * slot_stride + spot, y, mask=written)


@triton.jit(do_not_specialize=["tokens", "first", "copy_stride", "plane", "state_row", "in_row"])
def categorical_write_kernel(
    state_ptr,  # [batch, tokens, K] fp32: slot 0
    model_in_ptr,  # [COPIES * batch, tokens, K]
    part_ptr,  # [4, batch * tokens, PIECES] fp32
    K,
    tokens,
    first,
    copy_stride,
    plane,
    state_row,
    in_row,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDEST: tl.constexpr,
    COLS: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tokens * PIECES, samples): the next input of one window."""
    b = tl.program_id(1).to(tl.int64) + first
    if VECTOR:
        copy_stride = copy_stride // 4 * 4
    piece = tl.program_id(0) % PIECES
    if QUADS:
        K = K // 4 * 4
    token = tl.program_id(0) // PIECES
    d = token + tl.arange(0, 1)
    if WIDE:
        d = d.to(tl.int64)
    counter, k, start = window(d, piece, K, 1, COLS, QUADS)
    inside = within(d, k, tokens, K, QUADS)
    base = b * tokens
    parts = part_ptr + 2 * plane + (base + token) * PIECES
    top, total = combined(parts, parts + plane, PIECES, WIDEST)
    near = covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR)
    at = spots(d, start, state_row, COLS, QUADS, VECTOR)
    y = tl.load(begin(state_ptr, base, state_row, VECTOR) + at, mask=near, other=0.0)
    x = tl.fma(exp_from(y, top + tl.zeros([1], tl.float32)), 2.0 / total, -1.0).to(model_in_ptr.dtype.element_ty)
    at = begin(model_in_ptr, base, in_row, VECTOR) + spots(d, start, in_row, COLS, QUADS, VECTOR)
    tl.store(at, x, mask=inside)
    if COPIES > 1:
        tl.store(at + copy_stride, x, mask=inside)
