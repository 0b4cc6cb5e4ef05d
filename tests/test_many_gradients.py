"""Many incoming gradients of a loss at once, as jacobians ask for them: each as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fastdiff import ops
from fastdiff.schedules import Flow

FLOW = Flow()
GENERATOR = torch.Generator().manual_seed(0)
X, M, T = torch.randn(4, 8, generator=GENERATOR), torch.randn(4, 8, generator=GENERATOR), torch.rand(4)
K, LOGITS = torch.randint(5, (4, 3), generator=GENERATOR), torch.randn(4, 3, 5, generator=GENERATOR)
SEEDS = torch.arange(4)
Loss = Callable[[Tensor], Tensor]


def many_at(device: torch.device) -> dict[str, tuple[Loss, Tensor]]:
    """Losses with gradients of their own, and where: the last of more classes than are kept."""
    x, zeros, k = X.to(device), torch.zeros(4, 8, device=device), K.to(device)
    wide = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(1))
    return {
        "denoising": (lambda m: ops.denoising_loss(m, x, T.to(device), FLOW, SEEDS.to(device), target="v"), M),
        "kl": (lambda m: ops.gaussian_kl(x, zeros, m, m.tanh()), M),
        "kl, one variance a sample": (lambda m: ops.gaussian_kl(x, zeros, m, m[:, :1]), M),
        "kl, one variance": (lambda m: ops.gaussian_kl(x, zeros, m, m[:1, :1]), M),
        "classes": (lambda m: ops.categorical_loss(m, k), LOGITS),
        "many classes": (lambda m: ops.categorical_loss(m, k, 2.0), wide),
    }


@pytest.mark.parametrize("of", many_at(torch.device("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_gradients_at_once(of: str, dtype: torch.dtype, device: torch.device) -> None:
    """is_grads_batched and vmap over autograd.grad: what each of the incoming gradients gives alone."""
    loss, at = many_at(device)[of]
    m = at.to(device, dtype).requires_grad_()
    out = loss(m)
    many = torch.diag(torch.tensor([1.0, -2.0, 3.0, 0.5], device=device))
    alone = torch.stack([torch.autograd.grad(out, m, g, retain_graph=True)[0] for g in many]).double()
    unit = 2.0**-7 if dtype == torch.bfloat16 else 1e-5  # of the largest: autograd adds what it has rounded
    close = {"rtol": unit, "atol": unit * float(alone.abs().max())}
    (got,) = torch.autograd.grad(out, m, many, is_grads_batched=True, retain_graph=True)
    (again,) = vmap(lambda g: torch.autograd.grad(out, m, g, retain_graph=True))(many)
    assert got.dtype == again.dtype == dtype
    assert torch.allclose(got.double(), alone, **close)
    assert torch.allclose(again.double(), alone, **close)
