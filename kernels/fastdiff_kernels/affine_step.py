# mypy: disable-error-code="misc, var-annotated"
"""One row of a plan on one tile of one sample: guidance, conversion, clamp, A, b, d, s, noise, low-precision copy.

    m = uncond + w (cond - uncond), or k_c cond + k_d (cond - uncond);  p = clamp(c_skip (S0 + c_ratio m), lo, hi)
    S'_i = sum_j A_ij S_j + b_i p + d_i m + s_i n;  model_in = c_in_next S'_0

A row is [c_skip, c_ratio, lo, hi, c_in_next, has_noise, log_var_lo, log_var_hi, A, b, d, s, read, write], padded
to a multiple of 4.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import normal4, sample_key
from fastdiff_kernels.tiles import load4, load_float, row_of, sample_size, tile


@triton.jit(do_not_specialize=["row", "batch", "first", "row_stride", "w_row_stride", "w_batch_stride", "stream"])
def affine_step_kernel(
    state_ptr,  # [P, batch, n] fp32, slot 0 is the model's x
    model_ptr,  # [batch, n]
    uncond_ptr,  # [batch, n] or None
    model_in_ptr,  # [COPIES * batch, n] or None
    x0_ptr,  # [batch, n] fp32 or None
    noise_ptr,  # [batch, n] or None
    table_ptr,  # [N, WIDTH] fp32
    row,  # [1] or [batch], int32 or int64; or the number itself, which saves waiting for a load
    w_ptr,  # guidance, fp32, read at row * w_row_stride + sample * w_batch_stride, or scales [batch, 3], or None
    bound_ptr,  # dynamic threshold [batch] fp32 or None
    variance_ptr,  # v of a learned variance [batch, n] or None
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    n,
    batch,
    first,
    row_stride,
    w_row_stride,
    w_batch_stride,
    stream,
    SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    NOISE: tl.constexpr,  # 0 none, 1 Philox, 2 noise_ptr
    GUIDED: tl.constexpr,  # 0 none, 1 a weight, 2 scales
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples). All loads of an element precede its stores: a slot may be read and written."""
    b = (tl.program_id(1) + first).to(tl.int64)
    row = row_of(row, b * row_stride)
    c = ()
    for k in tl.static_range(0, WIDTH, 4):
        c = c + load4(table_ptr + row * WIDTH + k, MATH)
    # offsets of the blocks of a row
    AB: tl.constexpr = HEADER + SLOTS * SLOTS
    D: tl.constexpr = AB + SLOTS
    S: tl.constexpr = AB + 2 * SLOTS
    READ: tl.constexpr = AB + 3 * SLOTS
    WRITE: tl.constexpr = AB + 4 * SLOTS

    n = sample_size(n, ALIGNED)
    slot_stride = batch.to(tl.int64) * n
    state_ptr += b * n
    model_ptr += b * n
    if GUIDED > 0:
        uncond_ptr += b * n
    if GUIDED == 1:
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
    if GUIDED == 2:
        k_c = tl.load(w_ptr + b * 3)
        k_d = tl.load(w_ptr + b * 3 + 1)
        k_u = tl.load(w_ptr + b * 3 + 2)
    if bound_ptr is not None:
        bound = tl.load(bound_ptr + b)
    if NOISE == 1:
        key = sample_key(row, stream, tl.load(index_ptr + b), tl.load(seed_ptr + b))

    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        left = n - start
        inside = lane < left
        m = load_float(model_ptr + start + lane, inside)
        if GUIDED > 0:
            u = load_float(uncond_ptr + start + lane, inside)
        slots = (tl.load(state_ptr + start + lane, mask=inside),)
        for j in tl.static_range(1, SLOTS):
            slot = c[READ + j].to(tl.int32)
            # a mask `inside & (slot >= 0)` fails in the interpreter; an empty range predicates the whole tile off
            present = lane < tl.where(slot >= 0, left, 0)
            slots = slots + (tl.load(state_ptr + (slot * slot_stride + start) + lane, mask=present, other=0.0),)
        if NOISE == 1:
            if c[5] != 0.0:
                z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
            else:
                z = tl.zeros([BLOCK // PARTS // 4, 4], tl.float32)
        if NOISE == 2:
            drawn = lane < tl.where(c[5] != 0.0, left, 0)
            z = tl.load(noise_ptr + (b * n + start) + lane, mask=drawn, other=0.0).to(tl.float32)

        if NOISE > 0:
            if variance_ptr is not None:
                v = load_float(variance_ptr + (b * n + start) + lane, inside)
                z *= tl.exp(tl.fma(0.25 * (c[7] - c[6]), v, 0.25 * (c[6] + c[7])))

        if GUIDED == 1:
            m = tl.fma(w, m - u, u)
        if GUIDED == 2:
            m = tl.fma(k_d, tl.fma(-k_u, u, m), k_c * m)
        p = c[0] * tl.fma(c[1], m, slots[0])
        if bound_ptr is not None:
            p = tl.clamp(p / bound, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)  # s / s may be above 1
            c_out = c[0] * c[1]
            m = tl.where(c_out != 0.0, (p - c[0] * slots[0]) / c_out, m)
        p = tl.clamp(p, c[2], c[3], propagate_nan=tl.PropagateNan.ALL)
        if x0_ptr is not None:
            tl.store(x0_ptr + (b * n + start) + lane, p, mask=inside)
        for i in tl.static_range(SLOTS):
            y = c[HEADER + i * SLOTS] * slots[0]
            for j in tl.static_range(1, SLOTS):
                y = tl.fma(c[HEADER + i * SLOTS + j], slots[j], y)
            y = tl.fma(c[D + i], m, tl.fma(c[AB + i], p, y))
            if NOISE != 0:
                y = tl.fma(c[S + i], z, y)
            if i == 0:
                tl.store(state_ptr + start + lane, y, mask=inside)
                if COPIES > 0:
                    x = (c[4] * y).to(model_in_ptr.dtype.element_ty)
                    tl.store(model_in_ptr + (b * n + start) + lane, x, mask=inside)
                    if COPIES > 1:
                        tl.store(model_in_ptr + (slot_stride + b * n + start) + lane, x, mask=inside)
            else:
                slot = c[WRITE + i].to(tl.int32)
                written = lane < tl.where(slot >= 0, left, 0)
                tl.store(state_ptr + (slot * slot_stride + start) + lane, y, mask=written)


@triton.jit(do_not_specialize=["rows", "batch"])
def advance_kernel(
    row_ptr,  # [1] int32 or int64
    times_ptr,  # [rows]
    t_ptr,  # [batch]
    rows,
    batch,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program of one warp: row += 1 and t[:] = times[row] (the last time again past the end)."""
    row = tl.load(row_ptr) + 1
    time = tl.load(times_ptr + tl.minimum(row, rows - 1))
    tl.store(row_ptr, row)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + tl.arange(0, BLOCK)
        tl.store(t_ptr + at, time, mask=at < batch)
