"""What the categorical kernels share: windows of a token's classes, Gumbel and logistic numbers, row reductions.

Element (d, k) of a sample is lane (d K + k) % 4 of counter (d K + k) // 4. A row of a tile is a window of whole
counters that covers the classes of one token: position w of token d is class w - d K % 4. Dense rows of any K are then
read in vectors of four, and every Philox word is used once.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import box_muller, philox_sample, sample_key

SAMPLE = tl.constexpr(0)  # readouts
ARGMAX = tl.constexpr(1)
MEAN = tl.constexpr(2)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log2(x, MATH: tl.constexpr):
    """log2 of a normal positive number: MUFU.LG2 on CUDA, v_log_f32 on AMD."""
    if MATH == "cuda":
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    elif MATH == "hip":
        return tl.inline_asm_elementwise("v_log_f32 $0, $1", "=v,v", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def guided(m, u, w):
    """u + w (m - u); a class that both forbid by -inf stays forbidden."""
    return tl.where(m == u, m, tl.fma(w, m - u, u))


@triton.jit
def exponential(i, MATH: tl.constexpr):
    """-log2(1 - v), an exponential number over ln 2, with v = i (2^-32 - 2^-56) + 2^-33 in (0, 1).

    Small ones, of which the smallest of many is one, have all their digits.
    """
    v = tl.fma(i.to(tl.float32), 2.3283062977608182e-10, 1.1641532182693481e-10)
    # -log2(1 - v): minimax below 1/8 (1.5e-8), else the hardware's logarithm, whose error is absolute
    e = tl.fma(v, 0.37667128997131727, 0.3508596790481143)
    e = tl.fma(v, e, 0.4813164446090067)
    e = tl.fma(v, e, 0.7213420501866868)
    e = v * tl.fma(v, e, LOG2E)
    return tl.where(v < 0.125, e, -log2(1.0 - v, MATH))


@triton.jit
def add_gumbel(m, i, MATH: tl.constexpr):
    """m plus a Gumbel number plus a constant: its upper tail is that of small exponential numbers."""
    return tl.fma(log2(exponential(i, MATH), MATH), -LN2, m)


@triton.jit
def logistic(i, MATH: tl.constexpr):
    """ln(u) - ln(1 - u) of a uniform number, folded at 1/2 so that both tails have all their digits."""
    signed = i.to(tl.int32, bitcast=True)
    folded = tl.where(signed < 0, ~signed, signed)
    v = tl.fma(folded.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    x = LN2 * (log2(1.0 - v, MATH) - log2(v, MATH))
    return tl.where(signed < 0, x, -x)


@triton.jit
def key_of(row, STREAM: tl.constexpr, seed_ptr, index_ptr, b):
    """The Philox key of sample b in a stream: 1 for normals, 2 for Gumbel numbers."""
    row = row.to(tl.int64)
    index = tl.full((), 0, tl.int64)
    if index_ptr is not None:
        index = tl.load(index_ptr + b)
    return sample_key(row, tl.full((), STREAM, tl.int32), index, tl.load(seed_ptr + b))


@triton.jit
def lanes(a, b, c, d, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Four tiles [ROWS, COLS / 4], one a lane, as [ROWS, COLS]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, COLS])


@triton.jit
def window_normal(counter, key, ROWS: tl.constexpr, COLS: tl.constexpr, MATH: tl.constexpr):
    i0, i1, i2, i3 = philox_sample(counter, key)
    n0, n1 = box_muller(i0, i1, MATH)
    n2, n3 = box_muller(i2, i3, MATH)
    return lanes(n0, n1, n2, n3, ROWS, COLS)


@triton.jit
def window_gumbel(m, counter, key, ROWS: tl.constexpr, COLS: tl.constexpr, MATH: tl.constexpr):
    """m plus Gumbel numbers, up to one constant."""
    i0, i1, i2, i3 = philox_sample(counter, key)
    return add_gumbel(m, lanes(i0, i1, i2, i3, ROWS, COLS), MATH)


@triton.jit
def window(d, piece, K, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr):
    """Window `piece` of tokens d [ROWS]: counters [ROWS, COLS / 4], classes [ROWS, COLS] (outside a token: negative,
    or K and more) and the class at position 0, [ROWS]."""
    quad = tl.arange(0, COLS // 4)
    at = piece * COLS + tl.arange(0, COLS)
    if QUADS:
        counter = (d * (K // 4))[:, None] + (piece * (COLS // 4) + quad)[None, :]
        return counter.to(tl.uint32), at[None, :], d * 0 + piece * COLS
    else:
        counter = (d * K >> 2)[:, None] + (piece * (COLS // 4) + quad)[None, :]
        shift = d * K & 3
        return counter.to(tl.uint32), (at[None, :] - shift[:, None]).to(tl.int32), piece * COLS - shift


@triton.jit
def within(d, k, tokens, K, QUADS: tl.constexpr):
    """Which positions are classes of a token."""
    if QUADS:
        return (k < K) & (d < tokens)[:, None]
    else:
        return (k.to(tl.uint32) < K.to(tl.uint32)) & (d < tokens)[:, None]


@triton.jit
def spots(d, first, stride, COLS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets [ROWS, COLS] of the windows in a tensor whose tokens are `stride` elements apart."""
    if VECTOR and QUADS:
        row = d * (stride // 4 * 4) + first  # the hint below would go with a folded sum
    elif VECTOR:
        row = tl.multiple_of(d * stride + first, 4)
    else:
        row = d * stride + first
    return row[:, None] + tl.arange(0, COLS)[None, :]


@triton.jit
def begin(ptr, base, stride, VECTOR: tl.constexpr):
    """A tensor's pointer at token `base` of the batch."""
    at = base * stride
    if VECTOR:
        at = tl.multiple_of(at, 4)
    return ptr + at


@triton.jit
def covered(d, k, first, tokens, K, on, COLS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr):
    """Which positions to read: whole vectors, a neighbour's numbers included; nothing where `on` is 0 (it may be 1)."""
    # `& (on)` fails in the interpreter; an empty range predicates all off
    if VECTOR and not QUADS:
        end = tokens.to(d.dtype) * K  # of 64 bits where d is
        return spots(d, first, K, COLS, QUADS, VECTOR) < end // 4 * on * 4
    else:
        return within(d, k, tokens, K * on, QUADS)


@triton.jit
def exp_from(z, top):
    """exp(z - top); z is -inf outside a token."""
    return tl.exp2(tl.fma(z, LOG2E, (top * -LOG2E)[:, None]))


@triton.jit
def tanh_half(x):
    """tanh(x / 2), without overflow."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(v, MATH: tl.constexpr, AXIS: tl.constexpr = 1):
    """The largest v along an axis, of each row [ROWS] or of each group [ROWS, GROUPS]; NaN if there is one."""
    if MATH == "exact":  # the interpreter runs a reduction of one's own element by element
        lost = tl.max((v != v).to(tl.int32), axis=AXIS)
        return tl.where(lost > 0, float("nan"), tl.max(v, axis=AXIS))
    else:
        return tl.reduce(v, AXIS, _larger)


@triton.jit
def top_and_class(v, k, MATH: tl.constexpr):
    """The largest v of each row [ROWS] (NaN if there is one) and the smallest class that has it."""
    top = largest(v, MATH)
    # positions before a token are negative, as unsigned numbers large: they never win, even where every v is -inf
    return top, tl.min(tl.where(v < top[:, None], 0xFFFFFFFF, k.to(tl.uint32)), axis=1).to(tl.int32)
