"""What the categorical kernels count in samples beyond 2^31 elements, without a sample of that size."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

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
