"""Options at the edge of what is allowed, and beyond it: a number derived, or one clear sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, solvers
from fastdiff import schedules as S

VP = S.VP()
ZERO_SNR = S.Betas(S.zero_terminal_snr(S.scaled_linear_betas(1000)))


@pytest.mark.parametrize(
    ("schedule", "start"), [(ZERO_SNR, 999), (S.Flow(), 1.0), (S.Cosine(), 1.0)], ids=["zero SNR", "flow", "cosine"]
)
@pytest.mark.parametrize("target", ["x0", "v", "flow"])
def test_the_likelihood_weight_of_pure_noise_is_its_limit(schedule: S.Schedule, start: float, target: str) -> None:
    """0, as 2 alpha sigma' / sigma^3 of a flow says (g^2 itself is infinite there); a batch's gradients stay finite."""
    t = torch.tensor(
        [start, start / 2, start / 4], dtype=torch.int64 if isinstance(schedule, S.Betas) else torch.float32
    )
    m = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = ops.denoising_loss(m, torch.zeros(3, 4), t, schedule, torch.arange(3), target=target, weighting="likelihood")
    loss.sum().backward()
    assert float(loss[0]) == 0 and bool((loss[1:] > 0).all()) and m.grad is not None
    assert not m.grad[0].any() and bool(m.grad.isfinite().all() and m.grad[1:].abs().sum() > 0)


def test_a_flows_likelihood_weight_goes_there() -> None:
    """x0 on Flow: g^2 SNR / sigma^2 = 2 alpha / sigma^3, sigma' = 1."""
    t = torch.tensor([0.9, 0.999, 0.99999], dtype=torch.float64)
    from fastdiff.weighting import WeightOptions, target_weight

    got = target_weight("likelihood", "x0", S.Flow(), t, WeightOptions())
    torch.testing.assert_close(got, 2 * (1 - t) / t**3, rtol=1e-9, atol=0)


@pytest.mark.parametrize("betas", [S.linear_betas(1000), S.scaled_linear_betas(1000), S.sigmoid_betas(1000)])
def test_a_midpoint_at_the_end_of_every_step(betas: np.ndarray) -> None:
    """dpmpp_sde(r=1): all of a step's noise is that of its first part, whatever the rounding of its end."""
    schedule = S.Betas(betas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in range(2, 60):
            plan = solvers.dpmpp_sde(schedule, steps, r=1.0)
            assert float(np.abs(plan.s[1:-1:2, 0]).max()) <= 1e-6


def ahead(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        n = torch.randn_like(x)
        x = model(x, now * x.new_ones(len(x))) + then * n
    return x


def after(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = model(x, now * x.new_ones(len(x))) + then * torch.randn_like(x)
    return x


def test_noise_that_is_drawn_ahead_of_the_models_call() -> None:
    """The plan of the loop that draws after it: one slot, one draw a row; and torch's own draws in their order."""
    sigmas = [20.0, 10.0, 4.0, 2.0]
    plans = [fd.probe(f, sigmas=sigmas) for f in (ahead, after)]
    for plan in plans:
        assert plan.slots == 1 and plan.draws.tolist() == [1, 1, 1] and plan.nfe == 3
        np.testing.assert_allclose(plan.s[:, 0], sigmas[1:], rtol=1e-12)
        np.testing.assert_array_equal(plan.b, plans[1].b)
    model, x = (
        lambda x, s: x / (1 + s.view(-1, 1) ** 2),
        20 * torch.randn(3, 2, generator=torch.Generator().manual_seed(1)),
    )
    torch.manual_seed(5)
    want = ahead(model, x, torch.tensor(sigmas))
    got = fd.sample(model, plans[0], (3, 2), x_T=x, noise="torch", generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_betas_in_half_precision() -> None:
    betas = torch.linspace(1e-4, 0.02, 10).bfloat16()
    assert np.array_equal(S.Betas(betas).betas, betas.double().numpy())


def test_numpys_integers_are_numbers() -> None:
    plan = solvers.ddim(VP, 3)
    model = lambda x, t: 0.5 * x  # noqa: E731
    want, got = (fd.predictor_corrector(model, plan, (2, 2), seed=0, corrections=c) for c in (2, np.int64(2)))
    assert torch.equal(want, got)
    assert fd.training.uniform_times(np.int64(5), VP).shape == (5,)
    assert torch.equal(rng.normal([1], (4,), row=np.int64(3)), rng.normal([1], (4,), row=3))


def model(x: Tensor, t: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: solvers.heun(S.EDM(), 5, prediction="edm", sigma_data=0.0), ValueError, "sigma_data .* got 0.0"),
        (lambda: solvers.heun(S.EDM(), 5, prediction="edm", sigma_data=-1.0), ValueError, "sigma_data .* got -1.0"),
        (lambda: solvers.ddim(VP, 5, eta="abc"), ValueError, r"eta must be in \[0, 1\], got 'abc'"),
        (lambda: solvers.ddim(VP, 5, eta=True), ValueError, r"eta must be in \[0, 1\], got True"),
        (lambda: solvers.tcd(VP, 4, gamma="a"), ValueError, r"gamma must be in \[0, 1\], got 'a'"),
        (lambda: solvers.lcm(VP, 4, timestep_scaling="a"), ValueError, "timestep_scaling must be > 0, got 'a'"),
        (lambda: solvers.dpmpp_2m(S.EDM(), 4, spacing="karras", rho="a"), ValueError, "got rho='a'"),
        (lambda: fd.predictor_corrector(model, solvers.ddim(VP, 3), (2, 2), snr=np.inf), ValueError, "snr .* got inf"),
        (lambda: fd.predictor_corrector(model, solvers.ddim(VP, 3), (2, 2), snr="a"), ValueError, "snr .* got 'a'"),
        (lambda: fd.predictor_corrector(model, solvers.ddim(VP, 3), (2, 2), corrections=0, norm="x"), ValueError,
         "unknown norm 'x'"),
        (lambda: rng.normal([1], (2,), row=1.5), ValueError, "row must be an integer .* got 1.5"),
        (lambda: rng.normal([1], (2,), row=True), ValueError, "row must be an integer .* got True"),
        (lambda: rng.normal([1], (2,), index=[-1]), ValueError, r"index must be integers .* got \[-1\]"),
        (lambda: fd.drift(model, S.Cosine(), "v")(1.0, torch.ones(1, 2)), ValueError, "at t = 1: .* t_start="),
        (lambda: fd.drift(model, VP)(0.0, torch.ones(1, 2)), ValueError, "at t = 0: begin"),
        (lambda: fd.log_likelihood(model, S.BFNDiscrete(1.0, 4), torch.ones(1, 2)), ValueError, "a flow of classes"),
    ],
)  # fmt: skip
def test_one_sentence(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=says):
            call()


def test_a_schedulers_class_is_none() -> None:
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(TypeError, match=r"probe needs a scheduler, got its class: DDIMScheduler\(\)"):
        fd.probe(diffusers.DDIMScheduler, steps=4)
