"""Losses and noise inside torch.func's transforms: the gradients of autograd, a sample's own, and forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from fastdiff import ops, training
from fastdiff import schedules as C

FLOW, VP, CLASSES = C.Flow(), C.VP(), C.BFNDiscrete(1.0, 5)
CHAIN = C.Betas(C.linear_betas(100, 1e-3, 0.1))
GENERATOR = torch.Generator().manual_seed(0)
X, M, T = torch.randn(4, 8, generator=GENERATOR), torch.randn(4, 8, generator=GENERATOR), torch.rand(4)
K, LOGITS = torch.randint(5, (4, 3), generator=GENERATOR), torch.randn(4, 3, 5, generator=GENERATOR)
SEEDS = torch.arange(4)
Loss = Callable[[Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "flow": (lambda m: ops.denoising_loss(m, X, T, FLOW, SEEDS, target="v", weighting="snr"), M),
    "vp, huber": (lambda m: ops.denoising_loss(m, X, T, VP, SEEDS, loss="huber", delta=0.5), M),
    "ref": (lambda m: ops.denoising_loss_ref(m, X, T, VP, SEEDS), M),
    "chain": (lambda m: ops.denoising_loss(m, X, 10 * SEEDS, CHAIN, SEEDS, weighting="min_snr"), M),
    "noised in it": (lambda m: ops.add_noise(X + m, T, FLOW, seeds=SEEDS).square().sum(1), M),  # type: ignore
    "classes": (lambda m: ops.categorical_loss(m, K), LOGITS),
    "bfn, n steps": (
        lambda m: training.bfn_discrete_loss(m, K, torch.full((4,), 0.5), CLASSES, steps=2, seeds=SEEDS), LOGITS
    ),
    "noised classes": (lambda m: (m * ops.categorical_noise(K, T, CLASSES, seeds=SEEDS)).sum((1, 2)), LOGITS),  # type: ignore
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_autograds(name: str) -> None:
    """With seeds: the noise is drawn inside the transform."""
    loss, at = LOSSES[name]
    m = at.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(m).sum(), m)
    assert torch.allclose(grad(lambda m: loss(m).sum())(at), expected, rtol=1e-5, atol=1e-7)


def test_a_network_of_functions() -> None:
    """functional_call in a step that noises its data."""
    net = torch.nn.Linear(8, 8)

    def step(p: dict[str, Tensor]) -> Tensor:
        x_t = ops.add_noise(X, T, FLOW, seeds=SEEDS)
        return ops.denoising_loss(functional_call(net, p, (x_t,)), X, T, FLOW, SEEDS, target="v").mean()

    step(dict(net.named_parameters())).backward()
    got = grad(step)({k: v.detach() for k, v in net.named_parameters()})
    assert net.weight.grad is not None
    assert torch.allclose(got["weight"], net.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_samples_own_gradient() -> None:
    """vmap over samples, times and seeds: what each sample has alone."""

    def one(m: Tensor, x: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        return ops.denoising_loss(m[None], x[None], t[None], FLOW, seed[None]).sum()

    def classes(m: Tensor, k: Tensor) -> Tensor:
        return ops.categorical_loss(m[None], k[None]).sum()

    alone = [grad(one)(M[i], X[i], T[i], SEEDS[i]) for i in range(4)]
    assert torch.allclose(vmap(grad(one))(M, X, T, SEEDS), torch.stack(alone), rtol=1e-5, atol=1e-7)
    own = [grad(classes)(LOGITS[i], K[i]) for i in range(4)]
    assert torch.allclose(vmap(grad(classes))(LOGITS, K), torch.stack(own), rtol=1e-5, atol=1e-7)


def test_forward_mode_of_a_gradient() -> None:
    """A Hessian's product: of mean (m - n)^2 over 8 elements it is 2 v / 8."""
    v = torch.randn(4, 8, generator=GENERATOR)
    _, got = jvp(grad(lambda m: ops.denoising_loss(m, X, T, VP, SEEDS).sum()), (M,), (v,))
    assert torch.allclose(got, v / 4, rtol=1e-5)


def test_p2_without_k_is_its_limit_at_zero_snr() -> None:
    """k = 0, p = 1 is w = 1: 1 / (SNR + 1) on v, 1 at t = 1 of a flow."""
    last, near = (
        ops.denoising_loss(X, X, torch.full((4,), t), FLOW, SEEDS, target="v", weighting="p2", p2=(0, 1))
        for t in (1.0, 0.99999)
    )
    assert torch.allclose(last, near, rtol=1e-3) and bool(last.isfinite().all())


def test_tokens_that_are_neither_the_data_nor_the_mask() -> None:
    """A tokeniser's own mask id, say: a loss of 0 would look like a perfect one."""
    schedule = C.Masked(30)
    with pytest.raises(ValueError, match="tokens must be x or the mask, 30, got 7 for another class"):
        training.masked_loss(torch.zeros(4, 3, 30), K, torch.full_like(K, 7), 0.5, schedule)
