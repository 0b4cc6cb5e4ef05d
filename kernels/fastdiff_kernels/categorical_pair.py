# mypy: disable-error-code="misc, var-annotated, assignment"
"""One row of a plan on data of two classes: one number a token, element-wise.

    k = [m + logistic > 0];  p = 1 or -1, or tanh(m / 2);  S'_i = sum_j A_ij S_j + b_i p + s_i n
    model_in = tanh(S'_0 / 2)

The state is z_1 - z_0, m the logit of class 1; the element of a noise number is the token.
"""

import triton
import triton.language as tl

from fastdiff_kernels.categorical import MEAN, SAMPLE, guided, key_of, lanes, logistic, tanh_half
from fastdiff_kernels.categorical_row import table_row
from fastdiff_kernels.philox import normal4, philox_sample
from fastdiff_kernels.tiles import load_float, sample_size, tile


@triton.jit(do_not_specialize=["first", "row_stride", "w_row_stride", "w_batch_stride", "slot_stride", "copy_stride"])
def categorical_pair_kernel(
    state_ptr,  # [P, batch, n] fp32
    model_ptr,  # [batch, n]
    uncond_ptr,  # [batch, n] or None
    model_in_ptr,  # [COPIES * batch, n] or None
    classes_ptr,  # [batch, n] int64 or None
    noise_ptr,  # [batch, n] or None
    gumbel_ptr,  # the same: logistic numbers
    table_ptr,  # [N, WIDTH] fp32
    row_ptr,  # [1] or [batch], int32 or int64
    w_ptr,  # guidance, fp32, read at row * w_row_stride + sample * w_batch_stride, or None
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    n,
    first,
    row_stride,
    w_row_stride,
    w_batch_stride,
    slot_stride,
    copy_stride,
    SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    READOUT: tl.constexpr,
    NOISE: tl.constexpr,  # 0 none, 1 Philox, 2 noise_ptr
    GUMBEL: tl.constexpr,  # the same
    GUIDED: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples). All loads of an element precede its stores."""
    b = tl.program_id(1).to(tl.int64) + first
    row = tl.load(row_ptr + b * row_stride).to(tl.int64)
    c = table_row(table_ptr, row, WIDTH, MATH)
    B: tl.constexpr = HEADER + SLOTS * SLOTS
    S: tl.constexpr = B + 2 * SLOTS
    READ: tl.constexpr = B + 3 * SLOTS
    WRITE: tl.constexpr = B + 4 * SLOTS
    N: tl.constexpr = BLOCK // PARTS // 4
    n = sample_size(n, ALIGNED)
    if ALIGNED:
        slot_stride = slot_stride // 4 * 4
        copy_stride = copy_stride // 4 * 4
    if GUIDED:
        w = tl.load(w_ptr + row * w_row_stride + b * w_batch_stride)
    if NOISE == 1:
        normal_key = key_of(row, 1, seed_ptr, index_ptr, b)
    if GUMBEL == 1 and READOUT == SAMPLE:
        gumbel_key = key_of(row, 2, seed_ptr, index_ptr, b)

    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        left = n - start
        inside = lane < left
        at = b * n + start
        m = load_float(model_ptr + at + lane, inside)
        if GUIDED:
            u = load_float(uncond_ptr + at + lane, inside)
            m = guided(m, u, w)
        slots = (tl.load(state_ptr + at + lane, mask=inside),)
        for j in tl.static_range(1, SLOTS):
            slot = c[READ + j].to(tl.int64)
            present = lane < left * (slot >= 0).to(tl.int32)
            slots = slots + (tl.load(state_ptr + (slot * slot_stride + at) + lane, mask=present, other=0.0),)
        z = slots[0]
        if NOISE == 1:
            if c[5] != 0.0:
                z = normal4(counter, normal_key, N, MATH)
            else:
                z = tl.zeros([N, 4], tl.float32)
        if NOISE == 2:
            drawn = lane < left * (c[5] != 0.0).to(tl.int32)
            z = tl.load(noise_ptr + at + lane, mask=drawn, other=0.0).to(tl.float32)

        v = m
        if READOUT == SAMPLE:
            if GUMBEL == 1:
                i0, i1, i2, i3 = philox_sample(counter, gumbel_key)
                v = m + logistic(lanes(i0, i1, i2, i3, N, 4), MATH)
            else:
                v = m + load_float(gumbel_ptr + at + lane, inside)
        if classes_ptr is not None:
            tl.store(classes_ptr + at + lane, (v > 0).to(tl.int64), mask=inside)
        if READOUT == MEAN:
            p = tanh_half(m)
        else:
            p = tl.where(v > 0, 1.0, tl.where(v == v, -1.0, v))
        for i in tl.static_range(SLOTS):
            y = c[HEADER + i * SLOTS] * slots[0]
            for j in tl.static_range(1, SLOTS):
                y = tl.fma(c[HEADER + i * SLOTS + j], slots[j], y)
            y = tl.fma(c[B + i], p, y)
            if NOISE != 0:
                y = tl.fma(c[S + i], z, y)
            if i == 0:
                tl.store(state_ptr + at + lane, y, mask=inside)
                if COPIES > 0:
                    x = tanh_half(y).to(model_in_ptr.dtype.element_ty)
                    tl.store(model_in_ptr + at + lane, x, mask=inside)
                    if COPIES > 1:
                        tl.store(model_in_ptr + (copy_stride + at) + lane, x, mask=inside)
            else:
                slot = c[WRITE + i].to(tl.int64)
                written = lane < left * (slot >= 0).to(tl.int32)
                tl.store(state_ptr + (slot * slot_stride + at) + lane, y, mask=written)
