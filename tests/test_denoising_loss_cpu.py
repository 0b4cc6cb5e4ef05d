"""The C++ loop of a CPU's loss: against plain torch, its noise, its bits on any number of threads."""

import pytest
import torch

from fastdiff import ops
from fastdiff.schedules import Flow
from tests.test_denoising_loss import CHAIN, GRADIENT

pytestmark = pytest.mark.usefixtures("cpp_loops")


@pytest.mark.parametrize("loss", ("l2", "l1", "huber"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 255, 4100])
def test_the_loop_of_a_cpu_against_eager(n: int, dtype: torch.dtype, loss: str):
    """One block, a part of one, many and a rest; with and without clean data; and the same on any thread count."""
    x0, m = (torch.randn(16, n, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    t, seeds, index = torch.arange(16) * 60, torch.arange(16) + 4, torch.arange(16) % 3

    def both(target="v"):
        leaf, clean = m.to(dtype).requires_grad_(), x0.clone().requires_grad_()
        value = ops.denoising_loss(leaf, clean, t, CHAIN, seeds, index=index, target=target, loss=loss, row=2)
        value.sum().backward()
        return value.detach(), leaf.grad, *([] if target == "eps" else [clean.grad])

    # where two fp32 numbers lie on both sides of a rounding, theirs differ by one step, in fp16 at least 2^-24
    step, least = {torch.float32: (0, 0), torch.bfloat16: (2.0**-7, 0), torch.float16: (2.0**-10, 2.0**-24)}[dtype]
    for target in ("v", "eps"):
        got = both(target)
        with ops.cpu_compiler(False):
            want = both(target)
        for a, b in zip(got, want, strict=True):
            # a gradient of l1 is a sign: of a difference near 0 rounding decides
            bad = (a - b).abs() > GRADIENT * b.abs().max() + step * b.abs() + least
            assert not bad.any() if loss != "l1" else bad.double().mean() <= 1e-4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(torch.equal(a, b) for a, b in zip(both("eps"), got, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_loops_of_a_cpu_share_their_noise():
    """Bit for bit, in both operations; strides of seeds and data do not matter; a sample of no elements has no mean."""
    ones, zero, seeds = torch.ones(16), torch.zeros(16, 4096), torch.arange(16) + 4
    x_t = ops.add_noise(zero, ones, Flow(), seeds=seeds)
    leaf = zero.clone().requires_grad_()
    ops.denoising_loss(leaf, None, ones, Flow(), seeds).sum().backward()
    assert torch.equal(leaf.grad * -2048, x_t)
    x0, t = torch.randn(16, 4100, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 60
    spread = torch.arange(32)[::2] + 4
    strided = ops.add_noise(x0.t().contiguous().t(), t, CHAIN, seeds=spread)
    assert torch.equal(strided, ops.add_noise(x0, t, CHAIN, seeds=spread.contiguous()))
    assert ops.denoising_loss(zero[:, :0], None, ones, Flow(), seeds).isnan().all()
