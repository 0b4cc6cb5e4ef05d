# mypy: disable-error-code="misc, var-annotated, assignment"
"""What a row of tokens reads: windows of logits, and the least one of a nucleus."""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import begin, covered, guided, largest, spots, window, within
from fastdiff_kernels.race import GROUP, LARGEST, finite, in_groups


@triton.jit
def load_logits(ptr, mask):
    """As fp32; -inf where the mask is off."""
    x = tl.load(ptr, mask=mask, other=float("-inf"))
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def read_window(model_ptr, uncond_ptr, w, base, d, piece, chosen, K, tokens, mask_id, model_row, uncond_row,
                GUIDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr,
                VECTOR: tl.constexpr):  # fmt: skip
    """A window's classes and their logits [ROWS, COLS], -inf of the mask and outside of chosen tokens."""
    counter, k, start = window(d, piece, K, ROWS, COLS, QUADS)
    near = covered(d, k, start, tokens, K, 1, COLS, QUADS, VECTOR) & chosen[:, None]
    m = load_logits(begin(model_ptr, base, model_row, VECTOR) + spots(d, start, model_row, COLS, QUADS, VECTOR), near)
    if GUIDED:
        at = begin(uncond_ptr, base, uncond_row, VECTOR) + spots(d, start, uncond_row, COLS, QUADS, VECTOR)
        m = guided(m, load_logits(at, near), w)
    if not QUADS:  # a neighbour's numbers
        m = tl.where(within(d, k, tokens, K, QUADS), m, float("-inf"))
    if (mask_id >= piece * COLS - 3) & (mask_id < piece * COLS + COLS):
        m = tl.where(k != mask_id, m, float("-inf"))
    return k, m


@triton.jit
def nucleus(model_ptr, uncond_ptr, w, base, d, chosen, K, tokens, mask_id, model_row, uncond_row, share, heat, on,
            PIECES: tl.constexpr, GUIDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr,
            VECTOR: tl.constexpr, MATH: tl.constexpr):  # fmt: skip
    """The least logit of the smallest set of the likeliest classes that holds a share: those above it hold less.

    It halves the range between the least and the largest until no class is inside, reading the token each time.
    """
    none = tl.full([ROWS, COLS // GROUP], float("-inf"), tl.float32)
    peak = none
    for piece in range(on * PIECES):
        k, m = read_window(
            model_ptr, uncond_ptr, w, base, d, piece, chosen, K, tokens, mask_id, model_row, uncond_row, GUIDED, ROWS,
            COLS, QUADS, VECTOR,
        )  # fmt: skip
        peak = tl.maximum(peak, largest(in_groups(m, ROWS, COLS), MATH, 2), propagate_nan=tl.PropagateNan.ALL)
    high = largest(peak, MATH)
    top = finite(high)[:, None, None]
    known = (high > float("-inf")) & (high < float("inf"))
    low = tl.where(known, tl.maximum(high - 127.0 / heat, -LARGEST), high)
    held = tl.full([ROWS], float("inf"), tl.float32)
    first = on
    left = on * 512  # a row needs some 30; more only of numbers that change while they are read
    while left > 0:
        half = low + 0.5 * (high - low)
        t = tl.where(half < high, half, low)
        if first > 0:
            t = tl.full([ROWS], float("-inf"), tl.float32)  # all of it
        mass = tl.zeros_like(none)
        below = none
        above = tl.full([ROWS, COLS // GROUP], float("inf"), tl.float32)
        for piece in range(PIECES):
            k, m = read_window(
                model_ptr, uncond_ptr, w, base, d, piece, chosen, K, tokens, mask_id, model_row, uncond_row, GUIDED,
                ROWS, COLS, QUADS, VECTOR,
            )  # fmt: skip
            apart = in_groups(m, ROWS, COLS)
            over = apart > t[:, None, None]
            mass += tl.sum(tl.where(over, tl.exp2((apart - top) * heat), 0.0), axis=2)
            above = tl.minimum(above, tl.min(tl.where(over, apart, float("inf")), axis=2))
            below = tl.maximum(below, tl.max(tl.where(over, float("-inf"), apart), axis=2))
        sums = tl.sum(mass, axis=1)
        if first > 0:
            held = share * sums
            first = first * 0
        else:
            inside = low < high
            high = tl.where(inside & (sums < held), tl.max(below, axis=1), high)
            low = tl.where(inside & (sums >= held), tl.min(above, axis=1), low)
        left = tl.where(tl.max((low < high).to(tl.int32), axis=0) > 0, left - 1, 0)
    return tl.where(known, high, float("-inf"))
