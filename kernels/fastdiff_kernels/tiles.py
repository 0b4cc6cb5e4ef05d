"""What the element-wise kernels share: the tile of a sample, 16-byte coefficient loads, low-precision loads.

A program handles BLOCK elements of one sample as PARTS pieces [BLOCK // PARTS // 4, 4], one after the other: 4 elements
a vector in every data type (16 bytes for fp32, 8 for bf16), few registers, uniform work done once for all pieces.
"""

import triton
import triton.language as tl


@triton.jit
def sample_size(n, ALIGNED: tl.constexpr):
    """n, with its divisibility by 4 made known to the compiler: vectors are then inside or outside as a whole."""
    if ALIGNED:
        return n // 4 * 4
    else:
        return n


@triton.jit
def piece_of(n, piece, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Begin and end of the program's piece of a sample, `piece` elements, a multiple of BLOCK."""
    piece = piece // BLOCK * BLOCK
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    begin = pid * piece
    return begin, begin + sample_size(tl.minimum(n - begin, piece), ALIGNED)


@triton.jit
def tile(part, BLOCK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """Piece `part`: Philox counters [N] uint32, its first element (scalar) and the elements from there [N, 4]."""
    N: tl.constexpr = BLOCK // PARTS // 4
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    quad = tl.arange(0, N)
    counter = (pid * (BLOCK // 4) + part * N + quad).to(tl.uint32)
    lane = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    return counter, pid * BLOCK + part * (N * 4), lane


@triton.jit
def load4(ptr, MATH: tl.constexpr):
    """Four neighbouring fp32 scalars of a 16-byte aligned, read-only row: one access on CUDA, four elsewhere."""
    if MATH == "cuda":
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            [ptr],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def load_float(ptr, mask):
    """A tile as fp32; bf16 by a shift (one instruction an element fewer than the conversion).

    No eviction hint: evict_first costs 3 % of the bandwidth on an H200.
    """
    x = tl.load(ptr, mask=mask)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def row_of(row, at):
    """The row to run, int64: element `at` of a tensor, or the number itself."""
    if row.dtype.is_ptr():
        return tl.load(row + at).to(tl.int64)
    else:
        return row.to(tl.int64)


@triton.jit
def coef_row(t_ptr, at, rows):
    """The coefficient row of a sample and whether it is inside the table (outside: row 0, to be answered with NaN)."""
    if t_ptr is None:
        t = at
    else:
        t = tl.load(t_ptr + at).to(tl.int64)
    valid = (t >= 0) & (t < rows)
    return tl.where(valid, t, 0), valid
