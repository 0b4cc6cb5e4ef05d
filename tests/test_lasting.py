"""What outlives a call: tables made inside transforms and modes, and gradients that are not to be differentiated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff as fd
from fastdiff import ops, rng
from fastdiff import schedules as S
from fastdiff.ops._noising import table_of
from fastdiff.ops.posterior import _columns

T, SEEDS = torch.tensor([1, 20, 50, 99]), torch.arange(4)
M = 2.0 + torch.arange(5) + torch.zeros(4, 5)
Z, CLASSES = torch.zeros(4, 5), torch.zeros(4, 1, dtype=torch.long)


def functions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each of a chain of its own, so that its table is made in the first call."""
    chain = S.Betas(S.linear_betas(100))
    return {
        "loss": lambda m: ops.denoising_loss(m, None, T, chain, SEEDS).sum(),
        "weighted": lambda m: ops.denoising_loss(m, m, T, chain, SEEDS, target="v", weighting="min_snr").sum(),
        "add_noise": lambda x: ops.add_noise(x, T, chain, seeds=SEEDS).pow(2).sum(),
        "posterior": lambda x: ops.posterior(x, 2 * x, T, chain, "eps", (-1.0, 1.0))[0].pow(2).sum(),
        "alpha": lambda x: (chain.alpha(T)[:, None] * x).sum(),
        "hybrid": lambda x: fd.training.hybrid_loss(torch.cat([x, x], 1)[..., None], 0 * x[..., None], T, chain, SEEDS),
    }


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(M),
    "vmap": lambda f: torch.func.vmap(f)(M[None]),
    "inference": lambda f: _inside(torch.inference_mode(), f),
    "fake": lambda f: _inside(FakeTensorMode(allow_non_fake_inputs=True), f),
}


def _inside(mode: Any, f: Callable[[Tensor], Tensor]) -> None:  # noqa: ANN401 - a context manager
    with mode:
        f(M)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", functions())
def test_a_table_made_inside_serves_later_calls(name: str, around: str) -> None:
    want, function = functions()[name](M), functions()[name]
    try:
        AROUND[around](function)
    except (RuntimeError, NotImplementedError):
        pass  # some are refused inside; what they leave is what counts
    m = M.clone().requires_grad_()
    got = function(m)
    got.sum().backward()
    assert torch.allclose(got, want, rtol=1e-5) and torch.isfinite(m.grad).all()


def test_what_inference_mode_made_can_be_saved_for_a_backward() -> None:
    chain, plan = S.Betas(S.linear_betas(100)), fd.solvers.ddim(S.VP(), 3)
    with torch.inference_mode():
        made = [table_of(chain, _columns, ("eps",), torch.device("cpu")), plan.pack()]
    for table in made:
        assert not table.is_inference()
        (torch.ones(1, requires_grad=True) * table).sum().backward()  # an inference tensor cannot be saved


CHAIN, OTHER = S.Betas(S.linear_betas(100)), S.Betas(S.cosine_betas(100))
CLEAN = torch.linspace(-1, 1, 60).reshape(4, 3, 5)
TWO: dict[str, Callable[[Tensor], Tensor]] = {
    "hybrid": lambda m: fd.training.hybrid_loss(m, CLEAN, T, CHAIN, SEEDS),
    "predictions": lambda m: ops.posterior(m, m, T, CHAIN, "eps")[0] + ops.posterior(m, m, T, CHAIN, "v")[0],
    "chains": lambda m: ops.add_noise(m, T, CHAIN, seeds=SEEDS) + ops.add_noise(m, T, OTHER, seeds=SEEDS),  # type: ignore[operator]
}


@pytest.mark.parametrize("name", TWO)
def test_two_tables_in_one_compiled_graph(name: str) -> None:
    m = torch.linspace(-1, 1, 4 * 6 * 5).reshape(4, 6, 5).requires_grad_()
    torch._dynamo.reset()
    got, want = torch.compile(TWO[name], backend="aot_eager", fullgraph=True)(m), TWO[name](m)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "denoising_loss": lambda m: ops.denoising_loss(m, None, T, CHAIN, SEEDS),
    "gaussian_kl": lambda m: ops.gaussian_kl(Z, Z, m, Z),
    "categorical_loss": lambda m: ops.categorical_loss(m[:, None], CLASSES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_whatever_asks_for_it(name: str, dtype: torch.dtype) -> None:
    m = M.clone().to(dtype).requires_grad_()
    for reduce in (Tensor.sum, Tensor.mean, lambda v: (torch.ones(4, requires_grad=True) * v).sum()):
        (gradient,) = torch.autograd.grad(reduce(LOSSES[name](m)), m, create_graph=True)
        (again,) = torch.autograd.grad(reduce(LOSSES[name](m)), m)
        assert torch.equal(gradient, again)
        if name == "gaussian_kl" and dtype == torch.float64:  # plain torch: mean(m^2 / 2), whose gradient is m / 5
            (second,) = torch.autograd.grad(gradient.pow(2).sum(), m)
            assert torch.allclose(second, 2 * gradient**2 / m)
            continue
        with pytest.raises(RuntimeError, match="differentiate twice: this loss keeps its gradient"):
            (reduce(LOSSES[name](m)) + gradient.pow(2).sum()).backward()


def test_a_transform_has_it_right() -> None:
    def penalty(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: torch.func.grad(lambda u: f(u).sum())(v).pow(2).sum()

    # sum of mean(m^2 / 2) over 5: the gradient is m / 5, its square's 2 m / 25
    assert torch.allclose(torch.func.grad(penalty(LOSSES["gaussian_kl"]))(M), 2 * M / 25)
    weights = torch.func.grad(lambda u: LOSSES["denoising_loss"](u).sum())(M)
    m = M.clone().requires_grad_()
    (want,) = torch.autograd.grad(LOSSES["denoising_loss"](m).sum(), m)
    assert torch.allclose(weights, want)
    # of mean((m - n)^2) over 5 the gradient g is 2 (m - n) / 5, its square's 2 g 2 / 5
    assert torch.allclose(torch.func.grad(penalty(LOSSES["denoising_loss"]))(M), 0.8 * weights)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_noise_without_a_compiler_drawn_inside_serves_later_calls(
    around: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporaries are a thread's, not those of the mode that made them."""
    want = rng.normal([1, 2], (5,))
    monkeypatch.setattr(rng.native, "usable", lambda *tensors: False)
    monkeypatch.setattr(rng, "_scratch", threading.local())
    try:
        _inside(around(), lambda m: rng.normal([1, 2], (5,)))
    except (RuntimeError, NotImplementedError):
        pass
    torch.testing.assert_close(rng.normal([1, 2], (5,)), want, rtol=0, atol=2e-6)
