"""The loss where numbers end: fp16's smallest, rows outside a table, no signal and no noise, samples of no axes."""

import pytest
import torch

from fastdiff import ops
from fastdiff.schedules import BFNContinuous, BFNDiscrete
from fastdiff.weighting import WeightOptions, target_weight
from tests.test_denoising_loss import CHAIN, SEEDS, TOLERANCE, data, textbook, times


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


@pytest.mark.parametrize("transformed", [False, True])
def test_a_loss_scale_keeps_fp16_gradients(transformed, device):
    """w / n = 1.2e-7 at t = 0: the gradient is rounded to fp16 after the loss scale; by 2^-11, as its slope."""
    n, by = 4100, 65536.0
    m, x0, t = data((n,), torch.float16), data((n,), torch.float16, 1), torch.zeros(3, dtype=torch.int64)
    leaves = m.double().requires_grad_(), x0.double().requires_grad_()
    options = {"target": "v", "weighting": "min_snr"}
    want = torch.autograd.grad(by * ops.denoising_loss_ref(*leaves, t, CHAIN, SEEDS, **options).sum(), leaves)

    def loss(m, x0):
        return by * ops.denoising_loss(m, x0, t.to(device), CHAIN, SEEDS.to(device), **options).sum()

    given = [v.to(device).requires_grad_() for v in (m, x0)]
    got = torch.func.grad(loss, (0, 1))(*given) if transformed else torch.autograd.grad(loss(*given), given)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float16 and (want[0] / by).abs().median() < 2.0**-22
        assert ((a.cpu() - b).abs() <= 2.0**-10 * b.abs() + 2.0**-23).all()


def test_a_row_outside_the_table_has_no_gradient(kernel_device):
    """What a GPU, which cannot raise, answers: NaN in the sample's loss and in the factor of its slopes."""
    d, x = kernel_device, data((5,)).to(kernel_device)
    loss, slope, scale = torch.zeros(3, device=d), torch.zeros_like(x), torch.zeros(3, device=d)
    given = x, None, torch.rand(10, 4, device=d), torch.tensor([1, 10, -1], device=d), SEEDS.to(d), None
    torch.ops.fastdiff.denoising_loss(*given, 0, 1, 2, 0.5, loss, slope, scale)
    assert loss.isnan().tolist() == scale.isnan().tolist() == [False, True, True]


def test_samples_without_axes_are_samples_of_one_element(device):
    m, x0, t = data(()).to(device), data((), seed=1).to(device), times(CHAIN).to(device)
    for loss in (ops.denoising_loss, ops.denoising_loss_ref):
        got = loss(m, x0, t, CHAIN, SEEDS.to(device), target="v")
        assert torch.equal(got, loss(m[:, None], x0[:, None], t, CHAIN, SEEDS.to(device), target="v"))
        want = textbook(m[:, None].cpu(), x0[:, None].cpu(), t.cpu(), CHAIN, "v", place=device)
        torch.testing.assert_close(got.cpu().double(), want, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("schedule", [BFNContinuous(0.03), BFNDiscrete(2.0, 5)], ids=repr)
def test_nothing_is_known_at_the_start_of_a_bayesian_flow(schedule, device):
    """alpha = sigma = 0, alpha / sigma -> 0, alpha / sigma^2 -> 1: v is -x0, SNR 0, and likelihood's weight g^2."""
    g2 = schedule.rate if isinstance(schedule, BFNContinuous) else 0.0
    limits = {"snr": 0, "min_snr": 0, "truncated_snr": 1, "edm": 4, "sigma2": 0, "likelihood": g2, "p2": 0}
    m, x0 = data((37,)).to(device), data((37,), seed=1).to(device)
    x_t, v = ops.add_noise(x0, 1.0, schedule, seeds=SEEDS.to(device), target="v")
    assert torch.equal(v, -x0) and not x_t.any()
    for weighting, weight in {None: 1, **limits}.items():
        given = [a.clone().requires_grad_() for a in (m, x0)]
        got = ops.denoising_loss(*given, 1.0, schedule, SEEDS.to(device), target="v", weighting=weighting)
        want = weight * (m.double() + x0.double()).square().mean(1)
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=1e-12)
        for grad in torch.autograd.grad(got.sum(), given):
            torch.testing.assert_close(grad.double(), weight * 2 / 37 * (m + x0).double(), rtol=TOLERANCE, atol=1e-12)
    one = torch.ones(1)
    for target in ("x0", "flow"):
        for name, weight in limits.items():
            got = target_weight(name, target, schedule, one, WeightOptions()).item()
            assert got == pytest.approx(weight, rel=2e-7, abs=1e-12)
