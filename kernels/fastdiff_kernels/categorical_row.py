# mypy: disable-error-code="misc, var-annotated, assignment"
"""The parts of a plan's row on a window of a token's classes: readout, slots, noise, update, and sums over windows."""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import (
    MEAN,
    SAMPLE,
    begin,
    covered,
    guided,
    key_of,
    spots,
    window_gumbel,
    window_normal,
    within,
)
from fastdiff_kernels.tiles import load4, load_float


@triton.jit
def perturbed(
    model_ptr, uncond_ptr, gumbel_ptr, w, seed_ptr, index_ptr, b, row, tokens, model_row, uncond_row, K, d, k, start,
    counter, READOUT: tl.constexpr, GUMBEL: tl.constexpr, GUIDED: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The guided logits of a window, with Gumbel noise for SAMPLE; -inf outside a token."""
    near = covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR)
    base = b * tokens
    at = spots(d, start, model_row, COLS, QUADS, VECTOR)
    m = load_float(begin(model_ptr, base, model_row, VECTOR) + at, near)
    if GUIDED:
        at = spots(d, start, uncond_row, COLS, QUADS, VECTOR)
        u = load_float(begin(uncond_ptr, base, uncond_row, VECTOR) + at, near)
        m = guided(m, u, w)
    if READOUT == SAMPLE:
        if GUMBEL == 1:
            m = window_gumbel(m, counter, key_of(row, 2, seed_ptr, index_ptr, b), ROWS, COLS, MATH)
        else:
            at = spots(d, start, K, COLS, QUADS, VECTOR)
            m += load_float(begin(gumbel_ptr, base, K, VECTOR) + at, near)
    return tl.where(within(d, k, tokens, K, QUADS), m, float("-inf"))


@triton.jit
def table_row(table_ptr, row, WIDTH: tl.constexpr, MATH: tl.constexpr):
    """A row of a plan's table as scalars."""
    c = ()
    for k in tl.static_range(0, WIDTH, 4):
        c = c + load4(table_ptr + row * WIDTH + k, MATH)
    return c


@triton.jit
def noise_of(
    noise_ptr, seed_ptr, index_ptr, has_noise, b, row, tokens, K, d, k, start, counter, NOISE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """n of a window: Philox's, or noise_ptr's; 0 where the row has none."""
    if NOISE == 1:
        z = tl.zeros([ROWS, COLS], tl.float32)
        if has_noise != 0.0:
            z = window_normal(counter, key_of(row, 1, seed_ptr, index_ptr, b), ROWS, COLS, MATH)
    else:
        drawn = covered(d, k, start, tokens, K, (has_noise != 0.0).to(tl.int32), COLS, QUADS, VECTOR)
        at = spots(d, start, K, COLS, QUADS, VECTOR)
        z = tl.load(begin(noise_ptr, b * tokens, K, VECTOR) + at, mask=drawn, other=0.0).to(tl.float32)
    return z


@triton.jit
def read_slots(
    state_ptr, c, slot_stride, spot, tokens, K, d, k, start, SLOTS: tl.constexpr, READ: tl.constexpr,
    COLS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The logical slots of a window, 0 where one is absent."""
    slots = (tl.load(state_ptr + spot, mask=covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR), other=0.0),)
    for j in tl.static_range(1, SLOTS):
        slot = c[READ + j].to(tl.int64)
        present = covered(d, k, start, tokens, K, (slot >= 0).to(tl.int32), COLS, QUADS, VECTOR)
        slots = slots + (tl.load(state_ptr + slot * slot_stride + spot, mask=present, other=0.0),)
    return slots


@triton.jit
def updated(
    c, i: tl.constexpr, slots, chosen, cold, z, SLOTS: tl.constexpr, HEADER: tl.constexpr, READOUT: tl.constexpr,
    NOISE: tl.constexpr,
):  # fmt: skip
    """S'_i of the slots read, the prediction (`cold` off the chosen class, 1 more at it, or `chosen` itself), noise."""
    y = tl.fma(c[HEADER + i * SLOTS], slots[0], cold)
    for j in tl.static_range(1, SLOTS):
        y = tl.fma(c[HEADER + i * SLOTS + j], slots[j], y)
    if NOISE != 0:
        y = tl.fma(c[HEADER + SLOTS * SLOTS + 2 * SLOTS + i], z, y)
    b = c[HEADER + SLOTS * SLOTS + i]
    if READOUT == MEAN:
        return tl.fma(b, chosen, y)
    else:
        return tl.where(chosen, y + b, y)


@triton.jit
def finite_top(v):
    """The largest of each row, but 0 where all are -inf, so that exp(v - top) is 0 there."""
    top = tl.max(v, axis=1)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def combined(top_ptr, sum_ptr, PIECES: tl.constexpr, WIDEST: tl.constexpr):
    """The largest number of a token and the sum of exp(v - largest), of its windows' ones."""
    i = tl.arange(0, WIDEST)
    tops = tl.load(top_ptr + i, mask=i < PIECES, other=float("-inf"))
    sums = tl.load(sum_ptr + i, mask=i < PIECES, other=0.0)
    top = tl.max(tops, axis=0)
    return top, tl.sum(sums * tl.exp(tops - top), axis=0)
