"""What the categorical kernels count in samples beyond 2^31 elements, without a sample of that size."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastdiff.ops._categorical import rows_of  # noqa: E402
from fastdiff_kernels.categorical import covered  # noqa: E402


@triton.jit
def covered_kernel(out_ptr, token, tokens, K):
    d = tl.full([1], 0, tl.int64) + token
    k = tl.arange(0, 16)[None, :]
    near = covered(d, k, tl.full([1], 0, tl.int64), tokens, K, 1, 16, False, True)
    tl.store(out_ptr + tl.arange(0, 16)[None, :], near.to(tl.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, where 32 bits overflow
@pytest.mark.parametrize(("token", "inside"), [(0, 16), (42_730, 16), (42_732, 0)])
def test_whole_windows_are_read(token, inside, kernel_device):
    """Dense rows of 50257 classes, 42732 of them: a token's number has 64 bits there, and so must the sample's end."""
    out = torch.full((16,), -1, dtype=torch.int32, device=kernel_device)
    covered_kernel[(1,)](out, token, 42_732, 50_257)
    assert out.tolist() == [1] * inside + [0] * (16 - inside)


@pytest.mark.parametrize("num_classes", [3, 27, 64, 256, 4096, 16_385, 50_257])
@pytest.mark.parametrize("padding", [0, 5])
def test_offsets_of_32_bits_are_those_that_all_lanes_fit(num_classes, padding):
    """The last lane of the last tile, a token that is not there included: below 2^31 in every sample that is not wide,
    and no sample is wide that has room for another tile and window."""
    stride = num_classes + padding
    last = 2**31 // stride
    for tokens in range(last - 200, last + 2):
        rows = rows_of(num_classes, tokens)
        end = -(-tokens // rows.rows) * rows.rows
        furthest = (end - 1) * stride + rows.pieces * rows.cols - 1
        wide = rows.reach(tokens, stride) >= 2**31
        assert wide or furthest < 2**31
        assert not wide or furthest + 2 * rows.rows * stride + 2 * rows.cols * rows.pieces >= 2**31
