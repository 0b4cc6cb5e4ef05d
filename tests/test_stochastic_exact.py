"""Stochastic and few-step solvers against exact moments and exact distributions; their endpoints and bad input."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.reference import reference_sample
from tests.oracles import exact_gaussian_flow, gaussian_map, marginals, slope

CHAIN = S.Betas(S.scaled_linear_betas(1000))


def label(value: object) -> str:
    """The same id in every process: functions by their name, not their address."""
    if isinstance(value, dict):
        return ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in value.items()) or "default"
    return str(value)


SMOOTH = [S.VP(), S.SubVP(), S.VE(0.02, 10.0), S.EDM(0.02, 10.0), S.Flow(), S.Cosine()]


def mixture_denoiser(alpha: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
    """E[x0 | x] for MIXTURE, in closed form."""
    parts, logits = [], []
    for weight, mean, std in MIXTURE:
        variance = (alpha * std) ** 2 + sigma**2
        parts.append(mean + alpha * std**2 / variance * (x - alpha * mean))
        logits.append(math.log(weight) - 0.5 * torch.log(variance) - 0.5 * (x - alpha * mean) ** 2 / variance)
    responsibility = torch.softmax(torch.stack([v.expand_as(x) for v in logits]), dim=0)
    return (responsibility * torch.stack(parts)).sum(0)


MIXTURE = ((0.3, -1.0, 0.3), (0.7, 1.0, 0.5))  # weight, mean, std


def mixture_model(schedule: S.Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    def x0(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        a, s = (torch.ones_like(t), t) if isinstance(schedule, S.EDM) else (schedule.alpha(t), schedule.sigma(t))
        a, s = (v.view(-1, *[1] * (x.ndim - 1)) for v in (a, s))
        return mixture_denoiser(a, s, x.double()).to(x.dtype)

    return x0


def mixture_cdf(x: np.ndarray, extra: float) -> np.ndarray:
    """Of the data with noise of std `extra`."""
    return sum(w * stats.norm.cdf(x, m, math.hypot(s, extra)) for w, m, s in MIXTURE)


@pytest.mark.parametrize(
    ("solver", "schedule", "steps", "options"),
    [
        ("dpmpp_2m_sde", S.VP(), 100, {}),
        ("dpmpp_2m_sde", S.EDM(), 60, {"kind": "heun"}),
        ("dpmpp_3m_sde", S.EDM(), 60, {}),
        ("dpmpp_sde", S.EDM(), 40, {}),
        ("dpmpp_sde", S.VP(), 60, {"path": "sde", "spacing": "logsnr"}),
        ("er_sde", S.EDM(), 80, {}),
        ("seeds", S.VP(), 60, {"order": 3, "spacing": "logsnr"}),
        ("sa_solver", S.VP(), 150, {"spacing": "logsnr"}),
        ("sa_solver", S.EDM(), 50, {"predictor_order": 3, "corrector_order": 3}),
        ("edm_stochastic", S.EDM(), 100, {"s_churn": 20.0, "s_max": 50.0}),
        ("restart", S.EDM(), 30, {"intervals": ((0.3, 2.0, 2, 8), (0.05, 0.2, 1, 5))}),
        ("reverse_diffusion", S.VE(0.01, 20.0), 600, {}),
        ("ancestral", S.VE(0.01, 20.0), 600, {}),
        ("ancestral", S.Betas(S.linear_betas(1000)), 1000, {}),
        ("langevin", S.VE(0.05, 20.0), 40, {"inner": 60, "denoise": False}),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_samples_a_mixture(solver: str, schedule: S.Schedule, steps: int, options: dict[str, Any]) -> None:
    """16384 samples with the closed-form score: moments within 4.5 standard errors, Kolmogorov-Smirnov at 1 %."""
    plan = getattr(solvers, solver)(schedule, steps, prediction="x0", **options)
    x = fd.sample(mixture_model(schedule), plan, (16, 1024), seed=11).double().numpy().ravel()
    extra = 0.0 if plan.end[1] == 0 else plan.end[1] / plan.end[0]
    mean = sum(w * m for w, m, _ in MIXTURE)
    variance = sum(w * (s**2 + m**2) for w, m, s in MIXTURE) - mean**2 + extra**2
    assert abs(x.mean() - mean) <= 4.5 * math.sqrt(variance / x.size)
    assert abs(x.var() / variance - 1) <= 4.5 * math.sqrt(2 / x.size)
    assert stats.kstest(x, lambda v: mixture_cdf(v, extra)).pvalue > 0.01


def error(solver: str, schedule: S.Schedule, steps: int, options: dict[str, Any]) -> float:
    """Of the end's variance (or of an ODE solver's gain) on Gaussian data N(0.7, 0.5^2), exactly."""
    plan = getattr(solvers, solver)(schedule, steps, final="min", t_end=0.02, t_start=0.95, prediction="v", **options)
    gain, _, variance = gaussian_map(plan, 0.7, 0.5)
    if not plan.stochastic:
        return abs(gain - exact_gaussian_flow(plan, 0.7, 0.5)[0])
    start = (plan.alpha[0] * 0.5) ** 2 + plan.init_scale**2 + plan.init_noise**2
    return abs(gain**2 * start + variance - (plan.end[0] * 0.5) ** 2 - plan.end[1] ** 2)


@pytest.mark.parametrize("schedule", SMOOTH, ids=label)
@pytest.mark.parametrize(
    ("solver", "options", "low", "high"),
    [
        ("dpmpp_2m_sde", {}, 1.9, 2.1),
        ("dpmpp_2m_sde", {"kind": "heun"}, 1.9, 2.1),
        ("dpmpp_2m_sde", {"eta": 0.4}, 1.9, 2.1),
        ("dpmpp_3m_sde", {}, 1.85, 2.1),
        ("dpmpp_sde", {}, 1.9, 2.15),
        ("dpmpp_sde", {"path": "sde"}, 1.9, 2.1),
        ("dpmpp_sde", {"eta": 0.0}, 1.9, 2.1),
        ("sa_solver", {"corrector_order": 0, "lower_order_final": False}, 1.9, 2.1),
        ("sa_solver", {"predictor_order": 1, "corrector_order": 0}, 0.9, 1.1),
        ("sa_solver", {"lower_order_final": False}, 1.8, 4.0),
        ("edm_stochastic", {"s_churn": 20.0, "s_max": 1.0}, 1.9, 2.1),
        ("edm_stochastic", {"s_churn": 20.0, "s_max": 1.0, "order": 1}, 0.9, 1.1),
        ("edm_stochastic", {}, 1.9, 2.1),
        ("reverse_diffusion", {}, 0.95, 1.05),
        ("ancestral", {}, 0.95, 1.05),
        ("tcd", {"gamma": 0.0}, 0.95, 1.05),
        ("er_sde", {"order": 1}, 0.95, 1.05),
        ("er_sde", {"order": 2}, 1.9, 2.1),
        ("er_sde", {}, 1.9, 2.15),
        ("er_sde", {"scaler": "ode"}, 1.9, 2.15),
        ("seeds", {"order": 1}, 0.95, 1.05),
        ("seeds", {}, 1.9, 2.1),
        ("seeds", {"kind": "heun", "eta": 0.4}, 1.9, 2.1),
    ],
    ids=label,
)
def test_weak_order(schedule: S.Schedule, solver: str, options: dict[str, Any], low: float, high: float) -> None:
    steps = [256, 512, 1024, 2048][: 4 if solver in ("dpmpp_3m_sde", "sa_solver") else 3]  # theirs settle late
    assert low <= slope(steps, [error(solver, schedule, n, options) for n in steps]) <= high


def test_third_order_is_better_than_second() -> None:
    for schedule in SMOOTH:
        for eta in (0.0, 1.0):
            assert error("dpmpp_3m_sde", schedule, 64, {"eta": eta}) <= 0.75 * error(
                "dpmpp_2m_sde", schedule, 64, {"eta": eta}
            )
        full = {"predictor_order": 3, "corrector_order": 3, "lower_order_final": False}
        assert error("sa_solver", schedule, 128, full) <= 0.75 * error("dpmpp_2m_sde", schedule, 128, {})


def test_third_order_with_the_whole_second_difference() -> None:
    """eta = 0: dpmpp_3m's exact plan, of order 3 where the first-order start does not show."""
    for schedule in (S.VP(), S.SubVP()):
        steps = [256, 512, 1024, 2048]
        errors = [error("dpmpp_3m_sde", schedule, n, {"eta": 0.0, "exact": True}) for n in steps]
        assert slope(steps, errors) == pytest.approx(3, abs=0.15)
    for schedule in (*SMOOTH, CHAIN):
        options: dict[str, Any] = {"prediction": "v", "exact": True}
        ours = solvers.dpmpp_3m_sde(schedule, 20, eta=0.0, **options)
        plain = solvers.dpmpp_3m(schedule, 20, lower_order_final=False, **options)
        np.testing.assert_allclose(gaussian_map(ours, 0.7, 0.5), gaussian_map(plain, 0.7, 0.5), rtol=1e-10, atol=1e-12)


def test_given_levels_replace_the_default_grid() -> None:
    draws = [
        solvers.consistency(S.EDM(), n, floor=0.0, final=end).draws.tolist() for n in (1, 2) for end in ("zero", "min")
    ]
    assert draws == [[0], [1], [1, 1], [1, 1]]  # a single row draws what it adds
    plan = solvers.consistency(S.EDM(), 3, sigmas=[80.0, 12.0, 1.5], floor=0.1)
    np.testing.assert_allclose(plan.sigma, [80, 12, 1.5], rtol=1e-9)
    np.testing.assert_allclose(plan.s[:, 0], np.sqrt([12**2 - 0.01, 1.5**2 - 0.01, 0]), rtol=1e-9)
    for solver in (solvers.lcm, solvers.tcd):
        assert list(solver(CHAIN, 3).times) == [999, 679, 339]  # of the 50 times 999, 979, ..
        assert list(solver(CHAIN, 3, spacing=[999, 500, 100]).times) == [999, 500, 100]
        levels = solver(CHAIN, 2, sigmas=[10.0, 1.0])
        np.testing.assert_allclose(levels.sigma / levels.alpha, [10, 1], rtol=1e-9)


EXACT: list[tuple[str, dict[str, Any]]] = [
    ("sa_solver", {}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 4, "corrector_order": 4}),
    ("sa_solver", {"tau": lambda t: 2.0 * (t > 0.5), "predictor_order": 3, "corrector_order": 1}),
    ("lcm", {"timestep_scaling": math.inf}),
    ("tcd", {}),
    ("tcd", {"gamma": 0.0}),
    ("tcd", {"gamma": 1.0}),
    ("consistency", {"floor": 0.0}),
]


@pytest.mark.parametrize(("solver", "options"), EXACT, ids=label)
@pytest.mark.parametrize("schedule", [*SMOOTH, CHAIN], ids=label)
@pytest.mark.parametrize("final", ["zero", "min"])
def test_marginals_are_exact(solver: str, options: dict[str, Any], schedule: S.Schedule, final: str) -> None:
    for steps in (1, 2, 3, 20):
        if steps == 1 and final == "min" and isinstance(schedule, S.Flow | S.Cosine):
            continue  # t_end = 1 / steps is the start itself
        plan = getattr(solvers, solver)(schedule, steps, prediction="v", final=final, **options)
        mean, variance, alpha, sigma2 = marginals(plan)
        np.testing.assert_allclose(mean, alpha, rtol=0, atol=1e-12)
        np.testing.assert_allclose(variance, sigma2, rtol=1e-12, atol=1e-12)


ALL: list[tuple[str, dict[str, Any]]] = [
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"kind": "heun", "eta": 0.3}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_sde", {}),
    ("sa_solver", {}),
    ("sa_solver", {"predictor_order": 4, "corrector_order": 4}),
    ("edm_stochastic", {"s_churn": 10.0, "s_max": 1.0}),
    ("edm_stochastic", {"s_churn": 10.0, "s_max": 1.0, "order": 1}),
    ("reverse_diffusion", {}),
    ("ancestral", {}),
    ("lcm", {"timestep_scaling": math.inf, "original_steps": 1000}),
    ("tcd", {"original_steps": 1000}),
    ("consistency", {}),
    ("langevin", {"inner": 1}),
    ("er_sde", {}),
    ("seeds", {"order": 3}),
]


@pytest.mark.parametrize(("solver", "options"), ALL, ids=label)
def test_one_two_three_and_a_thousand_steps(solver: str, options: dict[str, Any]) -> None:
    """Clean data at the end; nothing blows up on Gaussian data."""
    for schedule in (S.VP(), S.EDM(), CHAIN):
        for steps in (1, 2, 3, 1000):
            plan = getattr(solvers, solver)(schedule, steps, **{"prediction": "v", **options})
            assert plan.end == (1.0, 0.0) and plan.s[-1, 0] == 0
            mean, variance, *_ = marginals(plan)
            assert mean[-1] == pytest.approx(1, abs=1e-9) and variance[-1] <= 1e-18
            if steps == 1000 and solver not in ("langevin", "lcm", "consistency"):
                gain, shift, noise = gaussian_map(plan, 0.7, 0.5)
                spread = gain**2 * (plan.alpha[0] ** 2 * 0.25 + plan.init_scale**2 + plan.init_noise**2) + noise
                assert spread == pytest.approx(0.25, rel=0.3 if solver == "tcd" else 0.05)
                assert gain * plan.alpha[0] * 0.7 + shift == pytest.approx(0.7, abs=0.02)


def test_zero_terminal_snr() -> None:
    betas = S.linear_betas(100)
    betas[-1] = 1.0
    for solver in ("dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "seeds", "ancestral", "lcm", "tcd",
                   "consistency"):  # fmt: skip
        options = {"timestep_scaling": math.inf} if solver == "lcm" else {}
        for steps in (1, 2, 3, 10):
            plan = getattr(solvers, solver)(S.Betas(betas), steps, prediction="v", **options)
            mean, _, alpha, _ = marginals(plan)
            np.testing.assert_allclose(mean, alpha, atol=1e-12)
    for solver in ("dpmpp_sde", "edm_stochastic", "reverse_diffusion", "langevin", "restart"):
        with pytest.raises(ValueError, match="cannot start from zero signal"):
            getattr(solvers, solver)(S.Betas(betas), 10, prediction="v")


def test_restart_needs_a_point_to_restart_from() -> None:
    for steps in (2, 3):
        plan = solvers.restart(S.VP(), steps)
        assert plan.nfe == 2 * steps + 29 and np.count_nonzero(plan.s[:, 0]) == 5
        assert marginals(plan)[0][-1] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="must lie inside the grid"):
        solvers.restart(S.VP(), 1)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential"])
@pytest.mark.parametrize("final", ["zero", "min"])
def test_tcd_without_noise_is_ddim_on_fractional_times_too(spacing: str, final: str) -> None:
    plan = solvers.tcd(CHAIN, 6, gamma=0.0, spacing=spacing, final=final)
    want = solvers.ddim(CHAIN, 6, spacing=spacing, final=final)
    assert not plan.stochastic and plan.end == want.end
    for name in ("times", "A", "b", "s"):
        np.testing.assert_allclose(getattr(plan, name), getattr(want, name), rtol=1e-13)


def test_tcd_rounds_whole_times_only() -> None:
    """t_s = 0.7 t', down to a whole time of the chain where t' is one; its noise is what sigma' lacks."""
    for spacing, rounded in (([900.0, 505.0, 101.0], [353.0, 70.0]), ([900.0, 505.5, 101.5], [353.85, 71.05])):
        plan = solvers.tcd(CHAIN, 3, gamma=0.3, spacing=spacing)
        alpha, sigma = CHAIN.alpha_sigma(np.array(rounded))
        want = plan.sigma[1:] ** 2 - (plan.alpha[1:] / alpha * sigma) ** 2
        np.testing.assert_allclose(plan.s[:2, 0] ** 2, want, rtol=1e-9)


NEW = ("ancestral consistency ddim_inversion dpmpp_2m_sde dpmpp_3m_sde dpmpp_sde edm_stochastic er_sde langevin lcm "
       "restart reverse_diffusion sa_solver seeds tcd").split()  # fmt: skip


@pytest.mark.parametrize("solver", NEW)
def test_fifty_rows_build_fast(solver: str) -> None:
    build = getattr(solvers, solver)
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        build(CHAIN, 50)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.05


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("seen", ["current", "next"])
def test_ddim_returns_what_ddim_inversion_took_away(final: str, seen: str) -> None:
    """x -> noise -> x: the error falls at order 1 and is below 0.03 at 512 steps."""
    schedule = S.VP()
    eps = mixture_eps(schedule)
    x = torch.linspace(-2, 2, 65, dtype=torch.float64).reshape(65, 1)
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        options: dict[str, Any] = {"final": final, "t_end": 0.01}
        up = solvers.ddim_inversion(schedule, n, seen=seen, **options)
        down = solvers.ddim(schedule, n, **options)
        assert up.end == (down.alpha[0], down.sigma[0]) and up.nfe == n
        middle = reference_sample(eps, up, x * up.alpha[0], lambda k, like: like)
        back = reference_sample(eps, down, middle, lambda k, like: like)
        errors.append(float((back - x * down.end[0]).abs().max()))
    assert slope(steps, errors) == pytest.approx(1, abs=0.15)
    assert errors[-1] <= 0.03
    ours = fd.sample(eps, up, (65, 1), x_init=x.float())
    assert float((ours - middle).abs().max()) <= 1e-3


def mixture_eps(schedule: S.Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    x0 = mixture_model(schedule)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a, s = (v.view(-1, 1) for v in (schedule.alpha(t.double()), schedule.sigma(t.double())))
        return ((x.double() - a * x0(x.double(), t)) / s).to(x.dtype)

    return eps
