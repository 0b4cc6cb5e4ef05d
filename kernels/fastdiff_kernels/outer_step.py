# mypy: disable-error-code="misc, var-annotated"
"""One row of a plan between tensors of somebody else: x is read, x' is a new tensor, the other slots are a slab.

    p = clamp(c_skip (x + c_ratio m), lo, hi);   x' = A_0 (x, S) + b_0 p + d_0 m + s_0 n;   S'_i likewise

The row is that of affine_step; physical slot j > 0 lies in the slab at j - 1, physical 0 is x itself.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import normal4, sample_key
from fastdiff_kernels.tiles import load4, load_float, sample_size, tile


@triton.jit(do_not_specialize=["row", "batch", "first", "stream"])
def outer_step_kernel(
    x_ptr,  # [batch, n]
    model_ptr,  # [batch, n]
    out_ptr,  # [batch, n]
    slab_ptr,  # [P - 1, batch, n] fp32, or None
    x0_ptr,  # [batch, n] fp32 or None
    noise_ptr,  # [batch, n] or None
    table_ptr,  # [N, WIDTH] fp32
    seed_ptr,  # [batch] int64 or None
    index_ptr,  # [batch] int64 or None
    n,
    batch,
    first,
    row,
    stream,
    SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
    WIDTH: tl.constexpr,
    NOISE: tl.constexpr,  # 0 none, 1 Philox, 2 noise_ptr
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Grid (tiles of a sample, samples). All loads of an element precede its stores."""
    b = (tl.program_id(1) + first).to(tl.int64)
    c = ()
    for k in tl.static_range(0, WIDTH, 4):
        c = c + load4(table_ptr + row.to(tl.int64) * WIDTH + k, MATH)
    AB: tl.constexpr = HEADER + SLOTS * SLOTS
    D: tl.constexpr = AB + SLOTS
    S: tl.constexpr = AB + 2 * SLOTS
    READ: tl.constexpr = AB + 3 * SLOTS
    WRITE: tl.constexpr = AB + 4 * SLOTS
    n = sample_size(n, ALIGNED)
    slot_stride = batch.to(tl.int64) * n
    base = b * n
    if NOISE == 1:
        key = sample_key(row.to(tl.int64), stream, tl.load(index_ptr + b), tl.load(seed_ptr + b))
    for part in tl.static_range(PARTS):
        counter, start, lane = tile(part, BLOCK, PARTS, WIDE)
        left = n - start
        inside = lane < left
        m = load_float(model_ptr + (base + start) + lane, inside)
        slots = (load_float(x_ptr + (base + start) + lane, inside),)
        for j in tl.static_range(1, SLOTS):
            slot = c[READ + j].to(tl.int32)
            if slab_ptr is not None:
                present = lane < tl.where(slot > 0, left, 0)
                kept = tl.load(slab_ptr + ((slot - 1) * slot_stride + base + start) + lane, mask=present, other=0.0)
                slots = slots + (tl.where(slot == 0, slots[0], kept),)
            else:
                slots = slots + (tl.where(slot == 0, slots[0], 0.0),)
        if NOISE == 1:
            if c[5] != 0.0:
                z = normal4(counter, key, BLOCK // PARTS // 4, MATH)
            else:
                z = tl.zeros([BLOCK // PARTS // 4, 4], tl.float32)
        if NOISE == 2:
            drawn = lane < tl.where(c[5] != 0.0, left, 0)
            z = tl.load(noise_ptr + (base + start) + lane, mask=drawn, other=0.0).to(tl.float32)
        p = c[0] * tl.fma(c[1], m, slots[0])
        p = tl.clamp(p, c[2], c[3], propagate_nan=tl.PropagateNan.ALL)
        if x0_ptr is not None:
            tl.store(x0_ptr + (base + start) + lane, p, mask=inside)
        for i in tl.static_range(SLOTS):
            y = c[HEADER + i * SLOTS] * slots[0]
            for j in tl.static_range(1, SLOTS):
                y = tl.fma(c[HEADER + i * SLOTS + j], slots[j], y)
            y = tl.fma(c[D + i], m, tl.fma(c[AB + i], p, y))
            if NOISE != 0:
                y = tl.fma(c[S + i], z, y)
            if i == 0:
                tl.store(out_ptr + (base + start) + lane, y.to(out_ptr.dtype.element_ty), mask=inside)
            elif slab_ptr is not None:
                slot = c[WRITE + i].to(tl.int32)
                written = lane < tl.where(slot > 0, left, 0)
                tl.store(slab_ptr + ((slot - 1) * slot_stride + base + start) + lane, y, mask=written)
