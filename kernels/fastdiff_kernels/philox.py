"""Counter-based normal noise: Philox4x32-10 and Box-Muller as device functions, and a fill kernel.

    counter = (element // 4, row, stream, sample index),  key = (seed low word, seed high word)

Element e of a sample is lane e % 4 of counter e // 4, so a value never depends on batch, block size or data type.
MATH picks the sine, cosine and square root: "cuda" (PTX, MUFU), "hip" (v_sin_f32, argument in revolutions) or "exact"
(Triton's own functions, the interpreter's path).

Source: Salmon et al. 2011 (Random123); Box-Muller with cuRAND's maps of the integers.
"""

import triton
import triton.language as tl

from fastdiff_kernels.tiles import sample_size, tile


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr):
    """Philox4x32 on uint32 words; words that are scalars stay scalars, so uniform work is done once a program."""
    for _ in tl.static_range(ROUNDS):
        # one 32 x 32 -> 64 multiply (IMAD.WIDE) a word; umulhi and mul would be two
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def sample_key(row, stream, index, seed):
    """What 10 rounds need of a sample's words, computed once a program: the first scalar products and all 20 keys."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    b = stream.to(tl.uint32).to(tl.uint64) * 0xCD9E8D57
    a = ((b >> 32).to(tl.uint32) ^ row.to(tl.uint32) ^ k0).to(tl.uint64) * 0xD2511F53
    key = (b.to(tl.uint32), index.to(tl.uint32) ^ k1, (a >> 32).to(tl.uint32), a.to(tl.uint32))
    for _ in tl.static_range(9):
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
        key = key + (k0, k1)
    return key


@triton.jit
def index_of(index_ptr, b):
    """The sample index of sample b: 0 where none are given."""
    if index_ptr is None:
        return b * 0
    else:
        return tl.load(index_ptr + b)


@triton.jit
def philox_sample(counter, key):
    """philox(counter, row, stream, index, seed words, 10) with the uniform part taken from `sample_key`."""
    a = counter.to(tl.uint64) * 0xD2511F53
    b = ((a >> 32).to(tl.uint32) ^ key[1]).to(tl.uint64) * 0xCD9E8D57
    c0 = (b >> 32).to(tl.uint32) ^ key[0] ^ key[4]
    c1 = b.to(tl.uint32)
    c2 = a.to(tl.uint32) ^ key[2] ^ key[5]
    c3 = counter * 0 + key[3]
    for r in tl.static_range(3, 11):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key[2 * r]
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key[2 * r + 1]
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(u):
    """-2 ln(u) for u in [2^-33, 1], relative error 3e-7, exact at 1: exponent plus a degree-8 polynomial.

    Shorter than a general log (no zero, infinite, NaN or denormal argument), accurate near 1 where lg2.approx is not.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608  # mantissa in [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, 0.3073139548710322, -0.3422236738767627)
    q = tl.fma(f, q, 0.3284017151204477)
    q = tl.fma(f, q, -0.39590074320003155)
    q = tl.fma(f, q, 0.5001524352084038)
    q = tl.fma(f, q, -0.666759773968394)
    q = tl.fma(f, q, 0.9999987551913087)
    q = tl.fma(f, q, -1.9999996724291205)
    return tl.fma(f, q, exponent.to(tl.float32) * -1.6525917999113494e-07)  # -2 ln(2) 2^-23


@triton.jit
def box_muller(i0, i1, MATH: tl.constexpr):
    """Two uint32 -> (r sin, r cos), with u = i0 2^-32 + 2^-33 in (0, 1] and the angle int32(i1) pi 2^-31."""
    u = tl.fma(i0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    t = minus_two_log(u)
    angle = i1.to(tl.int32, bitcast=True).to(tl.float32)
    if MATH == "cuda":
        angle = angle * 1.4629180792671596e-09
        r = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [t], tl.float32, is_pure=True, pack=1)
        s = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        c = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
    elif MATH == "hip":
        angle = angle * 2.3283064365386963e-10
        r = tl.inline_asm_elementwise("v_sqrt_f32 $0, $1", "=v,v", [t], tl.float32, is_pure=True, pack=1)
        s = tl.inline_asm_elementwise("v_sin_f32 $0, $1", "=v,v", [angle], tl.float32, is_pure=True, pack=1)
        c = tl.inline_asm_elementwise("v_cos_f32 $0, $1", "=v,v", [angle], tl.float32, is_pure=True, pack=1)
    else:
        angle = angle * 1.4629180792671596e-09
        r = tl.sqrt(t)
        s = tl.sin(angle)
        c = tl.cos(angle)
    return r * s, r * c


@triton.jit
def normal4(counter, key, N: tl.constexpr, MATH: tl.constexpr):
    """[N, 4] standard normals of the counters [N] of one sample."""
    i0, i1, i2, i3 = philox_sample(counter, key)
    n0, n1 = box_muller(i0, i1, MATH)
    n2, n3 = box_muller(i2, i3, MATH)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [N, 4])


@triton.jit(do_not_specialize=["batch", "first", "stream"])
def normal_kernel(
    out_ptr,  # [K, B, n] fp32
    seed_ptr,  # [B] int64
    index_ptr,  # [B] int64
    rows_ptr,  # [K] int64
    n,
    batch,
    first,
    stream,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Fills out[k, b] with the normals of (seed[b], stream, rows[k], index[b]); grid (tiles, batch, rows)."""
    b = (tl.program_id(1) + first).to(tl.int64)
    k = tl.program_id(2).to(tl.int64)
    key = sample_key(tl.load(rows_ptr + k), stream, tl.load(index_ptr + b), tl.load(seed_ptr + b))
    n = sample_size(n, ALIGNED)
    out_ptr += (k * batch + b) * n
    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
        tl.store(out_ptr + start + lane, z, mask=lane < n - start)
