"""Spacings, given noise levels and beta schedules: against their formulas and against diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.spacing import AYS, beta_quantile, ramp

CHAIN = S.Betas(S.scaled_linear_betas(1000))
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOP, LOW = (float(CHAIN.sigma(t) / CHAIN.alpha(t)) for t in (999.0, 0.0))


def levels(steps: int, schedule: S.Schedule = CHAIN, **options: Any) -> np.ndarray:
    """sigma/alpha of the evaluations."""
    plan = solvers.ddim(schedule, steps, prediction="v", **options)
    return plan.sigma / plan.alpha


def test_beta_quantiles_against_scipy() -> None:
    special = pytest.importorskip("scipy.special")
    q = np.concatenate([np.linspace(0, 1, 201), [1e-9, 1e-4, 1 - 1e-9]])
    np.testing.assert_allclose(beta_quantile(q), special.betaincinv(0.6, 0.6, q), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(special.betainc(0.9, 0.9, beta_quantile(q, 0.9)), q, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("spacing", "flag"),
    [("karras", "karras_sigmas"), ("exponential", "exponential_sigmas"), ("beta", "beta_sigmas"), ("lu", "lu_lambdas")],
)
def test_ramps_equal_diffusers(spacing: str, flag: str) -> None:
    pytest.importorskip("diffusers")
    from tests.test_parity import lifted

    torch.set_default_dtype(torch.float64)
    try:
        scheduler = lifted("dpmsolver_multistep").DPMSolverMultistepScheduler(**CONFIG, **{f"use_{flag}": True})
        scheduler.set_timesteps(17)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(levels(17, spacing=spacing), scheduler.sigmas.numpy()[:-1], rtol=1e-9)


def test_ramps_are_their_formulas() -> None:
    u = np.linspace(0, 1, 9)
    for rho in (1.0, 3.0, 7.0):
        want = (TOP ** (1 / rho) + u * (LOW ** (1 / rho) - TOP ** (1 / rho))) ** rho
        np.testing.assert_allclose(levels(9, spacing="karras", rho=rho), want, rtol=1e-10)
        want = LOW * (TOP / LOW) ** ((1 - u) ** rho)
        np.testing.assert_allclose(levels(9, spacing="polyexponential", rho=rho), want, rtol=1e-10)
    np.testing.assert_array_equal(levels(9, spacing="lu"), levels(9, spacing="logsnr"))
    np.testing.assert_allclose(levels(9, spacing="lu"), levels(9, spacing="polyexponential"), rtol=1e-14)


@pytest.mark.parametrize("name", AYS)
def test_align_your_steps(name: str) -> None:
    schedule = S.EDM(0.002, 700.0) if name == "ays_svd" else CHAIN
    np.testing.assert_allclose(levels(10, schedule, spacing=name), AYS[name][:-1], rtol=1e-4)
    plan = solvers.ddim(schedule, 10, prediction="v", spacing=name, final="min")
    assert plan.end[1] / plan.end[0] == pytest.approx(AYS[name][-1], rel=1e-2)
    twenty = ramp(name, 0, 0, 20, end=True, rho=None)
    np.testing.assert_allclose(twenty[::2], AYS[name], rtol=1e-13)
    np.testing.assert_allclose(twenty[1::2] ** 2, twenty[:-1:2] * twenty[2::2], rtol=1e-12)


def test_align_your_steps_of_diffusers() -> None:
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for name, key in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        assert list(AYS[f"ays_{name}"][:-1]) == utils.AysSchedules[f"{key}Sigmas"][:-1]


def test_given_levels() -> None:
    wanted = [10.0, 3.0, 1.0, 0.2]
    for schedule in (CHAIN, S.VP(), S.VE(0.01, 50.0), S.EDM()):
        np.testing.assert_allclose(levels(4, schedule, sigmas=wanted), wanted, rtol=1e-11)
        np.testing.assert_allclose(levels(4, schedule, sigmas=[*wanted, 0.0]), wanted, rtol=1e-11)
        plan = solvers.dpmpp_2m(schedule, 3, prediction="v", sigmas=np.array(wanted), final="min")
        assert plan.nfe == 3 and plan.end[1] / plan.end[0] == pytest.approx(0.2)
    plan = solvers.euler(S.Flow(3.0), 3, prediction="flow", sigmas=[1.0, 0.6, 0.25])
    np.testing.assert_allclose(plan.sigma, [1.0, 0.6, 0.25], rtol=1e-12)
    np.testing.assert_allclose(plan.times, [1.0, 0.6, 0.25], rtol=1e-12)


def test_steps_offset() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**CONFIG, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    plan = solvers.ddim(CHAIN, 20, spacing="leading", steps_offset=1)
    assert plan.times.tolist() == scheduler.timesteps.tolist()


def test_betas_equal_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch
    from diffusers.schedulers import scheduling_ddpm as theirs
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    def same(got: np.ndarray, want: torch.Tensor) -> None:
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-7)  # theirs: float32
        S.Betas(got)

    same(S.sigmoid_betas(1000), diffusers.DDPMScheduler(beta_schedule="sigmoid").betas)
    same(S.laplace_betas(1000), theirs.betas_for_alpha_bar(1000, alpha_transform_type="laplace"))
    same(S.exp_betas(1000), theirs.betas_for_alpha_bar(1000, alpha_transform_type="exp"))
    betas = S.scaled_linear_betas(1000)
    same(S.zero_terminal_snr(betas), rescale_zero_terminal_snr(torch.from_numpy(betas)))


def test_zero_terminal_snr_keeps_its_ends() -> None:
    before = S.Betas(S.linear_betas(100))
    after = S.Betas(S.zero_terminal_snr(before.betas))
    assert after.alpha(99.0) == 0 and after.betas[-1] == 1
    assert after.alpha(0.0) == pytest.approx(before.alpha(0.0), rel=1e-14)
    t = np.arange(100.0)
    scale = before.alpha(0.0) / (before.alpha(0.0) - before.alpha(99.0))
    np.testing.assert_allclose(after.alpha(t), (before.alpha(t) - before.alpha(99.0)) * scale, rtol=1e-9, atol=1e-15)


def test_dynamic_shift() -> None:
    assert S.dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert S.dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    mu, t = math.log(S.dynamic_shift(1024)), np.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(
        S.Flow(S.dynamic_shift(1024)).sigma(t), math.exp(mu) / (math.exp(mu) + 1 / t - 1), rtol=1e-14
    )


@pytest.mark.parametrize("name", ["karras", "exponential", "lu", "polyexponential", "beta"])
def test_ramps_need_finite_levels(name: str) -> None:
    for schedule in (S.Flow(), S.Betas(S.zero_terminal_snr(S.linear_betas(100))), S.EDM(0.0, 80.0)):
        with pytest.raises(ValueError, match="needs finite sigma/alpha > 0 at both ends"):
            solvers.euler(schedule, 5, prediction="v", spacing=name)
    assert solvers.euler(S.Flow(), 5, prediction="flow", spacing=name, t_start=0.99).nfe == 5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: solvers.ddim(CHAIN, 5, spacing="linspace", rho=3.0), "rho must be > 0 and belongs to spacing karras"),
        (lambda: solvers.ddim(CHAIN, 5, spacing="karras", rho=0.0), "rho must be > 0"),
        (lambda: solvers.ddim(CHAIN, 5, steps_offset=1), "steps_offset belongs to spacing 'leading'"),
        (lambda: solvers.ddim(CHAIN, 5, spacing="leading", steps_offset=-1), "steps_offset must be >= 0"),
        (lambda: solvers.ddim(CHAIN, 1000, spacing="leading", steps_offset=1), "beyond the chain's last, 999"),
        (lambda: solvers.ddim(CHAIN, 3, sigmas=[3.0, 1.0]), "sigmas needs 3 values"),
        (lambda: solvers.ddim(CHAIN, 2, sigmas=[3.0, 1.0], spacing="karras"), "either sigmas or spacing"),
        (lambda: solvers.ddim(CHAIN, 2, sigmas=[30.0, 1.0]), "sigma/alpha = 30 is not on the schedule"),
        (lambda: solvers.ddim(CHAIN, 2, sigmas=[1.0, math.nan]), "not on the schedule"),
        (lambda: solvers.ddim(CHAIN, 2, sigmas=[1.0, 3.0]), "noise must decrease"),
        (lambda: solvers.ddim(CHAIN, 10, spacing="ays_svd"), "spacing 'ays_svd': sigma/alpha = 700 is not on"),
        (lambda: solvers.ddim(S.VP(), 3, spacing=[0.9, 0.5, 0.1], t_start=0.6), "t_start has no meaning with an array"),
        (lambda: solvers.ddim(S.VP(), 3, spacing=[0.9, 0.5, 0.1], t_end=0.2), "t_end has no meaning with an array"),
        (lambda: solvers.ddim(S.VP(), 2, sigmas=[3.0, 1.0], t_start=0.6), "t_start has no meaning with sigmas"),
        (lambda: solvers.ddim(CHAIN, 5, spacing="ays_sd15", t_end=9.0), "t_end has no meaning with ays_sd15"),
        (lambda: solvers.ddim(S.VP(), 4, spacing="trailing", t_end=0.3), "ends at t_start/steps = 0.25, got t_end=0.3"),
        (lambda: S.zero_terminal_snr([0.1]), "at least two betas"),
        (lambda: S.laplace_betas(10, max_beta=0.0), r"max_beta must be in \(0, 1\]"),
        (lambda: S.sigmoid_betas(0), "T, the number of betas"),
        (lambda: S.dynamic_shift(4096, base_shift=math.nan), "the shift e.mu must be finite, got mu = nan"),
        (lambda: S.dynamic_shift(4096, max_shift=1e9), "the shift e.mu must be finite, got mu = 1e.09"),
        (lambda: S.dynamic_shift(0), "tokens must be a finite number > 0"),
        (lambda: S.dynamic_shift(16, base_tokens=9, max_tokens=9), "base_tokens must be < max_tokens"),
    ],
)
def test_bad_input(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_trailing_ends_where_it_is_told() -> None:
    """final="min": equal steps from t_start to t_end, 0.8 to 0.2; a chain's last times are not below t_end."""
    plan = solvers.ddim(S.VP(), 4, spacing="trailing", t_start=0.8, t_end=0.2, final="min")
    np.testing.assert_allclose(plan.t, [0.8, 0.65, 0.5, 0.35])
    assert plan.end == pytest.approx((S.VP().alpha(0.2), S.VP().sigma(0.2)), rel=1e-14)
    plan = solvers.ddim(S.Cosine(), 4, spacing="trailing", prediction="v", final="min")  # its own t_end: 1/steps
    np.testing.assert_allclose(plan.t, [1, 0.8125, 0.625, 0.4375])
    np.testing.assert_allclose(solvers.ddim(S.VP(), 4, spacing="trailing", t_start=0.8).t, [0.8, 0.6, 0.4, 0.2])
    assert solvers.ddim(CHAIN, 4, spacing="trailing", t_end=300.0).times.tolist() == [999, 749, 499, 300]
    with pytest.raises(ValueError, match="'trailing' of this chain has 6 of 10 times down to t_end=500; take linspace"):
        solvers.ddim(CHAIN, 10, t_end=500.0)
    assert solvers.ddim(CHAIN, 10, t_end=500.0, spacing="linspace").nfe == 10
    with pytest.raises(ValueError, match=r"t_end must be in \[0, 1\], got 7"):
        solvers.ddim(S.VP(), 1, t_end=7.0)
    with pytest.raises(ValueError, match="sigmas: 1.2 is not on Flow.*, whose sigma goes from 1 to 0"):
        solvers.euler(S.Flow(), 3, prediction="flow", sigmas=[1.2, 0.5, 0.1])


def test_consistency_ends_where_it_is_told() -> None:
    np.testing.assert_allclose(solvers.consistency(S.EDM(), 3, t_end=0.4).t, [1, 0.7, 0.4])
    np.testing.assert_allclose(solvers.consistency(S.EDM(), 3).t, [1, 2 / 3, 1 / 3])


def test_repeated_levels_are_merged() -> None:
    plan = solvers.lms(CHAIN, 5, sigmas=[10.0, 3.0, 3.0, 1.0, 0.2])
    assert plan.nfe == 4


@pytest.mark.parametrize("schedule", [S.Flow(), S.Cosine()])
def test_one_step_to_the_minimum_needs_an_end(schedule):
    """t_end = 1/steps is t_start for one step."""
    with pytest.raises(ValueError, match="t_end is 1/steps here by default: give t_end"):
        solvers.euler(schedule, 1, final="min", prediction="x0")
    assert solvers.euler(schedule, 1, final="min", prediction="x0", t_end=0.5).nfe == 1
