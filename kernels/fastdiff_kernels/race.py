"""One class of many by few random numbers, as fastdiff.race says: groups of 16 positions race.

    ratio_j = sum over group j of exp((m - top) / s) / e_j,   e_j exponential

Position w of token d is class w - d K % 4. Word j of a token's counters is for group j, the word after them for the
class in the group that won.
"""

import triton
import triton.language as tl

from fastdiff_kernels.philox import philox_sample

GROUP = tl.constexpr(16)
LARGEST = tl.constexpr(1.5e38)  # twice as much is still finite


@triton.jit
def finite(top):
    """What to subtract so that an infinite number stays infinite, and -inf what it is."""
    return tl.minimum(tl.maximum(top, -LARGEST), LARGEST)


@triton.jit
def word(counter, lane, key):
    """A word of each counter."""
    i0, i1, i2, i3 = philox_sample(counter.to(tl.uint32), key)
    return tl.where(lane == 0, i0, tl.where(lane == 1, i1, tl.where(lane == 2, i2, i3)))


@triton.jit
def uniform_of(i):
    """A number in (0, 1] of each word."""
    return tl.fma(i.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def groups_of(K):
    """Groups of a token of K classes, which may start early by 0, 3, 2, 3 positions for K % 4."""
    early = tl.where(K % 4 == 0, 0, tl.where(K % 4 == 2, 2, 3))
    return (K + early + GROUP - 1) // GROUP


@triton.jit
def counters_of(K):
    """Counters of a token: a word a group, and the class's word after them."""
    return groups_of(K) // 4 + 1


@triton.jit
def words_of_groups(first, piece, key, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The words [ROWS, COLS / GROUP] of a window's groups; first: a token's first counter [ROWS]."""
    # one call of Philox a thread, of which it takes one word: what four words share would go through shared memory
    at = tl.arange(0, COLS // GROUP) + piece * (COLS // GROUP)
    return word(first[:, None] + (at >> 2)[None, :], (at & 3)[None, :], key)


@triton.jit
def in_groups(m, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.reshape(m, [ROWS, COLS // GROUP, GROUP])


@triton.jit
def sums_of_groups(m, top, heat):
    """sum 2^((m - top) heat) of each group; top [ROWS, GROUPS]."""
    return tl.sum(tl.exp2((m - top[:, :, None]) * heat), axis=2)


@triton.jit
def first_where(true, k):
    """The smallest k [ROWS, N] of each row that is true; 2^31 - 1 where none is."""
    return tl.min(tl.where(true, k, 0x7FFFFFFF), axis=1)
