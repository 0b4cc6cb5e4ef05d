# mypy: disable-error-code="misc, var-annotated"
"""One row of a plan on categorical data: readout of the logits, update of the state with noise, softmax.

    m = uncond + w (model_out - uncond);  k = argmax(m + gumbel);  p = onehot(k), or softmax(m)
    S'_i = sum_j A_ij S_j + b_i p + s_i n;  model_in = 2 softmax(S'_0) - 1

A row of the table is that of affine_step. Noise: stream 1 for n, 2 for the Gumbel numbers.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import MEAN, begin, exp_from, spots, top_and_class, window, within
from fastdiff_kernels.categorical_row import noise_of, perturbed, read_slots, table_row, updated


@triton.jit(
    do_not_specialize=[
        "tokens", "first", "row_stride", "w_row_stride", "w_batch_stride", "slot_stride", "copy_stride",
        "state_row", "model_row", "uncond_row", "in_row",
    ]
)  # fmt: skip
def categorical_rows_kernel(
    state_ptr,  # [P, batch, tokens, K] fp32
    model_ptr,  # [batch, tokens, K]
    uncond_ptr,  # like model_ptr, or None
    model_in_ptr,  # [COPIES * batch, tokens, K] or None
    classes_ptr,  # [batch, tokens] int64 or None
    noise_ptr,  # n, [batch, tokens, K] dense, or None
    gumbel_ptr,  # the same
    table_ptr,  # [N, WIDTH] fp32
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
    slot_stride,
    copy_stride,
    state_row,  # elements between the tokens of a tensor
    model_row,
    uncond_row,
    in_row,
    SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    READOUT: tl.constexpr,
    NOISE: tl.constexpr,  # 0 none, 1 Philox, 2 noise_ptr
    GUMBEL: tl.constexpr,  # the same
    GUIDED: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    QUADS: tl.constexpr,  # K is a multiple of 4
    VECTOR: tl.constexpr,  # windows start at multiples of 4 elements in every tensor
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of ROWS tokens, samples), a whole token in a window. All loads precede the stores."""
    b = tl.program_id(1).to(tl.int64) + first
    if VECTOR:
        slot_stride = slot_stride // 4 * 4
        copy_stride = copy_stride // 4 * 4
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    c = table_row(table_ptr, row, WIDTH, MATH)
    READ: tl.constexpr = HEADER + SLOTS * SLOTS + 3 * SLOTS
    WRITE: tl.constexpr = READ + SLOTS
    if QUADS:
        K = K // 4 * 4
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if WIDE:
        d = d.to(tl.int64)
    counter, k, start = window(d, 0, K, ROWS, COLS, QUADS)
    inside = within(d, k, tokens, K, QUADS)
    base = b * tokens
    w = 1.0
    if GUIDED:
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
    v = perturbed(
        model_ptr, uncond_ptr, gumbel_ptr, w, seed_ptr, index_ptr, b, row, tokens, model_row, uncond_row, K, d, k,
        start, counter, READOUT, GUMBEL, GUIDED, ROWS, COLS, QUADS, VECTOR, MATH,
    )  # fmt: skip
    if READOUT != MEAN or classes_ptr is not None:
        top, hit = top_and_class(v, k, MATH)
    else:
        top = tl.max(v, axis=1)
    if classes_ptr is not None:
        tl.store(classes_ptr + base + d, hit.to(tl.int64), mask=d < tokens)
    if READOUT == MEAN:
        p = exp_from(v, top)
        chosen = p * (1.0 / tl.sum(p, axis=1))[:, None]
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
            noise_ptr, seed_ptr, index_ptr, c[5], b, row, tokens, K, d, k, start, counter, NOISE, ROWS, COLS, QUADS,
            VECTOR, MATH,
        )  # fmt: skip

    for i in tl.static_range(SLOTS):
        y = updated(c, i, slots, chosen, cold, z, SLOTS, HEADER, READOUT, NOISE)
        if i == 0:
            tl.store(state_ptr + spot, y, mask=inside)
            if COPIES > 0:
                y = tl.where(inside, y, float("-inf"))
                e = exp_from(y, tl.max(y, axis=1))
                x = tl.fma(e, (2.0 / tl.sum(e, axis=1))[:, None], -1.0).to(model_in_ptr.dtype.element_ty)
                at = begin(model_in_ptr, base, in_row, VECTOR) + spots(d, start, in_row, COLS, QUADS, VECTOR)
                tl.store(at, x, mask=inside)
                if COPIES > 1:
                    tl.store(at + copy_stride, x, mask=inside)
        else:
            slot = c[WRITE + i].to(tl.int64)
            written = within(d, k, tokens, K * (slot >= 0).to(tl.int32), QUADS)
            tl.store(state_ptr + slot * slot_stride + spot, y, mask=written)
