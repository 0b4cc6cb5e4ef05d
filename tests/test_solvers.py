"""Every solver by one case line: exact marginals, fitted orders, endpoints, textbook coefficients, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from tests.oracles import exact_gaussian_flow, gaussian_map, marginals, slope


class Case(NamedTuple):
    solver: str
    options: dict[str, Any]
    exact: bool  # marginals exact for a constant x0 (else to first order)
    order: float  # ODE order by slope, or weak order of a stochastic solver
    nfe: Callable[[int], int] = lambda steps: steps
    rough: bool = False  # errors of both signs cross on one Gaussian: fitted in tests/test_orders.py


def twice(steps: int) -> int:
    return 2 * steps - 1


CASES = [
    Case("ddpm", {}, True, 1),
    Case("ddpm", {"variance": "fixed_large"}, False, 1),
    Case("ddim", {}, True, 1),
    Case("ddim", {"eta": 0.5}, True, 1),
    Case("ddim", {"eta": 1.0}, True, 1),
    Case("euler", {}, True, 1),
    Case("euler_ancestral", {}, True, 1),
    Case("euler_ancestral", {"eta": 0.3}, True, 1),
    Case("heun", {}, True, 2, lambda steps: 2 * steps - 1),
    Case("dpmpp_2m", {}, True, 2),
    Case("euler_maruyama", {}, False, 1),
    Case("euler_maruyama", {"eta": 0.5}, False, 1),
    Case("probability_flow", {}, False, 1),
    Case("deis", {"order": 1}, True, 1),
    Case("deis", {"order": 2}, True, 2, rough=True),
    Case("deis", {"order": 3}, True, 3, rough=True),
    Case("dpm2", {}, True, 2, twice),
    Case("dpm2_ancestral", {}, True, 2, twice),
    Case("dpm2_ancestral", {"eta": 0.0}, True, 2, twice),
    Case("dpm_solver", {"order": 1, "algorithm": "dpmsolver"}, True, 1),
    Case("dpm_solver", {"order": 2}, True, 2, twice),
    Case("dpm_solver", {"order": 2, "solver_type": "heun"}, True, 2, twice),
    Case("dpm_solver", {"order": 2, "algorithm": "dpmsolver"}, True, 2, twice),
    Case("dpm_solver", {"order": 3}, True, 3, lambda steps: 3 * steps - 2, True),
    Case("dpm_solver", {"order": 3, "solver_type": "heun"}, True, 3, lambda steps: 3 * steps - 2, True),
    Case("dpm_solver", {"order": 3, "algorithm": "dpmsolver"}, True, 3, lambda steps: 3 * steps - 2, True),
    Case("dpm_solver", {"order": 3, "nodes": "grid"}, True, 3, rough=True),
    Case("dpm_solver", {"order": 2, "kind": "multistep"}, True, 2, rough=True),
    Case("dpm_solver", {"order": 3, "kind": "multistep", "algorithm": "dpmsolver"}, True, 2, rough=True),
    Case("dpmpp_2s_ancestral", {}, True, 2, twice),
    Case("dpmpp_2s_ancestral", {"eta": 0.0}, True, 2, twice),
    Case("dpmpp_3m", {}, True, 2, rough=True),
    Case("dpmpp_3m", {"exact": True}, True, 3, rough=True),
    Case("ipndm", {}, True, 2, rough=True),
    Case("lms", {"order": 1}, True, 1),
    Case("lms", {"order": 2}, True, 2),
    Case("lms", {"order": 3}, True, 3, rough=True),
    Case("lms", {"order": 4}, True, 4, rough=True),
    Case("plms", {}, True, 2, lambda steps: steps + (steps > 1)),
    Case("plms", {"prk": True}, True, 2, lambda steps: steps + (9 if steps > 3 else steps > 1)),
    Case("unipc", {"order": 1}, True, 2),
    Case("unipc", {"order": 2}, True, 2, rough=True),
    Case("unipc", {"order": 3}, True, 2, rough=True),
    Case("unipc", {"order": 3, "bh": "bh1", "lower_order_final": False}, True, 4, rough=True),
    Case("unipc", {"order": 3, "corrector": False}, True, 2, rough=True),
    Case("unipc", {"order": 3, "keep_start": True}, True, 2, rough=True),
    Case("ancestral", {}, False, 1, rough=True),
    Case("dpmpp_2m_sde", {}, True, 2),
    Case("dpmpp_2m_sde", {"kind": "heun"}, True, 2, rough=True),
    Case("dpmpp_3m_sde", {}, True, 2, rough=True),
    Case("dpmpp_3m_sde", {"exact": True}, True, 3, rough=True),
    Case("dpmpp_sde", {}, True, 2, twice, True),
    Case("edm_stochastic", {}, True, 2, twice),
    Case("reverse_diffusion", {}, False, 1),
    Case("sa_solver", {"corrector_order": 0}, True, 2, rough=True),
    Case("tcd", {"gamma": 0.0}, True, 1),
    Case("er_sde", {"order": 1}, True, 1),
    Case("er_sde", {"order": 2}, True, 2, rough=True),
    Case("er_sde", {}, True, 2, rough=True),
    Case("er_sde", {"scaler": "ode", "exact": True}, True, 3, rough=True),
    Case("gradient_estimation", {}, True, 1),
    Case("seeds", {"order": 1}, True, 1),
    Case("seeds", {}, True, 2, twice),
    Case("seeds", {"order": 3}, True, 2, lambda steps: 3 * steps - 2, True),
]
CHAIN = S.Betas(S.scaled_linear_betas(1000))
SCHEDULES = [S.VP(), S.SubVP(), S.VE(0.02, 10.0), S.EDM(0.02, 10.0), S.Flow(2.0), S.Cosine(), CHAIN]
ids = [f"{c.solver}-{'-'.join(map(str, c.options.values()))}" for c in CASES]
parametrize = pytest.mark.parametrize("case", CASES, ids=ids)


def build(case: Case, schedule: S.Schedule, steps: int, **options: Any) -> Plan:
    options.setdefault("prediction", "v")
    if isinstance(schedule, S.Flow | S.Cosine) and case.solver not in ("ddpm", "ddim", "euler", "dpmpp_2m"):
        options.setdefault("t_start", 0.99)
    return getattr(solvers, case.solver)(schedule, steps, **case.options, **options)


EXACT, FITTED = [c for c in CASES if c.exact], [c for c in CASES if not c.rough]


@pytest.mark.parametrize("case", EXACT, ids=[i for i, c in zip(ids, CASES, strict=True) if c.exact])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("final", ["zero", "min"])
def test_marginals_are_exact(case: Case, schedule: S.Schedule, final: str) -> None:
    for prediction in ("v", "x0"):
        plan = build(case, schedule, 30, final=final, prediction=prediction)
        mean, variance, alpha, sigma2 = marginals(plan)
        np.testing.assert_allclose(mean, alpha, rtol=0, atol=1e-12)
        np.testing.assert_allclose(variance, sigma2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["euler_maruyama", "probability_flow"])
@pytest.mark.parametrize("schedule", [S.VP(), S.SubVP(), S.VE(0.02, 10.0), S.EDM(0.02, 10.0), S.Cosine()], ids=str)
def test_marginals_to_first_order(name: str, schedule: S.Schedule) -> None:
    """Euler in t keeps q(x_t | x0) to O(h), measured from t = 0.9 to t = 0.1."""
    steps, worst = [400, 800, 1600], []
    for n in steps:
        plan = getattr(solvers, name)(schedule, n, final="min", t_end=0.1, t_start=0.9, prediction="v")
        mean, variance, alpha, sigma2 = marginals(plan)
        worst.append(max(np.abs(mean - alpha).max(), np.abs(variance / sigma2 - 1).max()))
    assert slope(steps, worst) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("final", ["zero", "min"])
def test_fixed_large_keeps_its_own_variance_recursion(schedule: S.Schedule, final: str) -> None:
    """V' = (sigma'^2 alpha / (sigma^2 alpha'))^2 V + beta, beta = sigma^2 - (alpha / alpha')^2 sigma'^2."""
    plan = solvers.ddpm(schedule, 30, variance="fixed_large", prediction="v", final=final)
    mean, variance, alpha, sigma2 = marginals(plan)
    sigma, a = np.append(plan.sigma, plan.end[1]), np.append(plan.alpha, plan.end[0])
    expected, wanted = plan.sigma[0] ** 2, []
    for k in range(plan.nfe):
        shrink = sigma[k + 1] ** 2 * a[k] / (sigma[k] ** 2 * a[k + 1])
        beta = sigma[k] ** 2 - (a[k] / a[k + 1]) ** 2 * sigma[k + 1] ** 2
        noisy = k < plan.nfe - 1 or final == "min"
        expected = shrink**2 * expected + noisy * beta
        wanted.append(expected)
    np.testing.assert_allclose(mean, alpha, rtol=0, atol=1e-12)
    np.testing.assert_allclose(variance, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", FITTED, ids=[i for i, c in zip(ids, CASES, strict=True) if not c.rough])
@pytest.mark.parametrize(
    "schedule", [S.VP(), S.SubVP(), S.VE(0.02, 10.0), S.EDM(0.02, 10.0), S.Flow(), S.Cosine()], ids=str
)
def test_convergence_order(case: Case, schedule: S.Schedule) -> None:
    """Gaussian data N(0.7, 0.5^2), ideal model: the end's mean and variance (or its gain) against the exact ones."""
    if "variance" in case.options:
        steps = [512, 1024, 2048]
    else:
        steps = [64, 128, 256, 512]
    errors = []
    for n in steps:
        plan = build(case, schedule, n, final="min", t_end=0.02, t_start=0.95)
        gain, shift, variance = gaussian_map(plan, 0.7, 0.5)
        if plan.stochastic:
            a, s = plan.alpha[0], plan.sigma[0]
            end = gain**2 * (a * a * 0.25 + s * s) + variance
            errors.append(abs(end - (plan.end[0] ** 2 * 0.25 + plan.end[1] ** 2)))
        else:
            exact, _ = exact_gaussian_flow(plan, 0.7, 0.5)
            errors.append(abs(gain - exact))
    got = slope(steps, errors)
    if case.solver == "euler_maruyama" and not isinstance(schedule, S.VP):
        assert got >= 0.7  # first order in t; errors of both signs cross on steep schedules
    else:
        assert got == pytest.approx(case.order, abs=0.15)


@parametrize
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_endpoints(case: Case, steps: int) -> None:
    for schedule in (S.VP(), S.EDM(0.0, 80.0), CHAIN):
        plan = build(case, schedule, steps)
        assert plan.nfe <= case.nfe(steps) and plan.end == (1.0, 0.0)
        mean, variance, *_ = marginals(plan)
        # PLMS takes eps at the end of its first step, which amplifies rounding by (sigma/alpha) / (2 sigma')
        tolerance = 1e-10 if case.solver == "plms" else 1e-12
        assert mean[-1] == pytest.approx(1, abs=tolerance) and variance[-1] <= tolerance**2


@parametrize
def test_counts(case: Case) -> None:
    for schedule in SCHEDULES:
        plan = build(case, schedule, 12)
        assert plan.nfe == case.nfe(12)
        assert plan.init_scale == plan.sigma[0]
        if case.solver not in ("edm_stochastic", "sa_solver"):  # these draw as their reference code does
            assert np.array_equal(plan.draws, np.any(plan.s != 0, axis=1))


def test_euler_is_ddim_and_ancestral_is_ddpm() -> None:
    for schedule in SCHEDULES:
        a, b = (f(schedule, 17, prediction="v") for f in (solvers.euler, solvers.ddim))
        np.testing.assert_array_equal(a.A, b.A)
        np.testing.assert_array_equal(a.b, b.b)
        a, b = (f(schedule, 17, prediction="v") for f in (solvers.euler_ancestral, solvers.ddpm))
        np.testing.assert_allclose(a.A, b.A, rtol=1e-14)
        np.testing.assert_allclose(a.s, b.s, rtol=1e-14)


def test_ddpm_is_the_textbook_posterior() -> None:
    """Ho et al. eq. 7 in their own symbols, every step of the chain."""
    betas = S.linear_betas(50)
    plan = solvers.ddpm(S.Betas(betas), 50, prediction="x0")
    ab = np.cumprod(1 - betas)[::-1]
    ab_prev, beta = np.append(ab[1:], 1.0), betas[::-1]
    np.testing.assert_allclose(plan.b[:, 0], np.sqrt(ab_prev) * beta / (1 - ab), rtol=1e-12)
    np.testing.assert_allclose(plan.A[:, 0, 0], np.sqrt(1 - beta) * (1 - ab_prev) / (1 - ab), rtol=1e-12, atol=1e-15)
    small = np.sqrt(beta * (1 - ab_prev) / (1 - ab))
    np.testing.assert_allclose(plan.s[:, 0], small, rtol=1e-10, atol=1e-15)
    large = solvers.ddpm(S.Betas(betas), 50, prediction="x0", variance="fixed_large").s[:, 0]
    np.testing.assert_allclose(large[:-1], np.sqrt(beta[:-1]), rtol=1e-10)
    assert large[-1] == 0


def test_euler_maruyama_is_the_textbook_step() -> None:
    schedule = S.VP()
    plan = solvers.euler_maruyama(schedule, 10, prediction="score")
    t = np.linspace(1, 1e-3, 10)
    h, beta = np.append(-np.diff(t), 0), 0.1 + 19.9 * t
    np.testing.assert_allclose(plan.A[:-1, 0, 0], (1 + 0.5 * beta * h)[:-1], rtol=1e-13)
    np.testing.assert_allclose(plan.d[:-1, 0], (beta * h)[:-1], rtol=1e-13)
    np.testing.assert_allclose(plan.s[:-1, 0], np.sqrt(beta * h)[:-1], rtol=1e-13)
    assert plan.b[-1, 0] == 1 and plan.A[-1, 0, 0] == 0 and plan.s[-1, 0] == 0


def test_both_clip_dialects() -> None:
    kept = solvers.ddim(CHAIN, 10, clip=(-1, 1), use_clipped_model_output=False)
    assert np.all(kept.d[:-1] != 0) and kept.clamped
    plain = solvers.ddim(CHAIN, 10)
    # without saturation both dialects are the same map of (x, m)
    of_x = [q.A[:, 0, 0] + q.b[:, 0] * q.c_skip for q in (kept, plain)]
    of_m = [q.d[:, 0] + q.b[:, 0] * q.c_out for q in (kept, plain)]
    np.testing.assert_allclose(of_x[0], of_x[1], rtol=1e-12)
    np.testing.assert_allclose(of_m[0], of_m[1], rtol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "flow", "edm"])
def test_predictions_agree(prediction: str) -> None:
    """Every prediction type is the same map once its model says the same x0."""
    schedule = S.EDM()
    for name in ("ddim", "heun", "dpmpp_2m", "euler_maruyama"):
        solver = getattr(solvers, name)
        plan, ref = solver(schedule, 8, prediction=prediction), solver(schedule, 8, prediction="x0")
        np.testing.assert_allclose(gaussian_map(plan, 0.3, 0.5), gaussian_map(ref, 0.3, 0.5), rtol=1e-9)
        sigma = plan.sigma
        scale = 1 / np.sqrt(sigma**2 + 0.25) if prediction == "edm" else np.ones(plan.nfe)
        np.testing.assert_allclose(plan.c_in, scale, rtol=1e-13)
        expected = np.log(sigma) / 4 if prediction == "edm" else sigma
        np.testing.assert_allclose(plan.times, expected, rtol=1e-13)


def test_prediction_may_be_a_function_and_signed() -> None:
    pair = solvers.ddim(S.VP(), 8, prediction=lambda a, s: (1 / a, -s / a))
    np.testing.assert_allclose(pair.packed(), solvers.ddim(S.VP(), 8).packed(), rtol=1e-6)
    plus, minus = (solvers.euler(S.Flow(), 8, prediction="flow", sign=sign) for sign in (1, -1))
    np.testing.assert_array_equal(plus.c_out, -minus.c_out)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras", "exponential", "logsnr"])
def test_spacings(spacing: str) -> None:
    plan = solvers.ddim(CHAIN, 10, spacing=spacing)
    expected = {
        "linspace": np.round(np.linspace(999, 0, 10)),
        "leading": np.arange(10)[::-1] * 100.0,
        "trailing": np.round(np.arange(1000, 0, -100.0)) - 1,
    }
    lam = np.log(plan.sigma / plan.alpha)
    if spacing in expected:
        np.testing.assert_array_equal(plan.times, expected[spacing])
        assert plan.times.dtype == np.int64
    elif spacing == "karras":
        root = np.exp(lam / 7)
        np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=1e-9)
    else:
        np.testing.assert_allclose(np.diff(lam), np.diff(lam)[0], rtol=1e-9)


def test_times() -> None:
    np.testing.assert_allclose(solvers.ddim(S.VP(), 4).times, np.linspace(1, 1e-3, 4))
    np.testing.assert_allclose(solvers.euler(S.Flow(), 4, prediction="flow").times, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(solvers.euler(S.EDM(), 4).times, S.EDM().sigma(np.linspace(1, 0, 4)))
    np.testing.assert_allclose(solvers.ddim(S.Cosine(), 4).t, np.linspace(0.9946, 0.25, 4))
    np.testing.assert_allclose(solvers.ddim(S.Cosine(), 4, prediction="v").t, [1, 0.75, 0.5, 0.25])
    final = solvers.ddim(CHAIN, 4, final="min")
    assert final.nfe == 4 and final.end == (CHAIN.alpha(0), CHAIN.sigma(0))


def test_start_in_the_middle_rebuilds_the_plan() -> None:
    whole, part = solvers.dpmpp_2m(CHAIN, 20), solvers.dpmpp_2m(CHAIN, 20, start=8)
    assert part.nfe == 12 and part.init_scale == whole.sigma[8]
    np.testing.assert_array_equal(part.times, whole.times[8:])
    assert part.A[0, 0, 1] == 0 != whole.A[8, 0, 1]
    mean, variance, alpha, sigma2 = marginals(part)
    np.testing.assert_allclose(mean, alpha, atol=1e-12)


def test_repeated_noise_levels_are_merged() -> None:
    plan = solvers.ddim(CHAIN, 5, spacing=[900, 600, 600, 300, 0])
    assert plan.nfe == 4 and list(plan.times) == [900, 600, 300, 0]
    assert solvers.dpmpp_2m(S.EDM(0.0, 80.0), 5).nfe == 4  # the point without noise needs no evaluation


def test_zero_terminal_snr() -> None:
    betas = S.linear_betas(100)
    betas[-1] = 1.0
    chain = S.Betas(betas)
    for name in (
        "ddpm",
        "ddim",
        "dpmpp_2m",
        "dpmpp_2s_ancestral",
        "dpmpp_3m",
        "dpm_solver",
        "euler_ancestral",
        "er_sde",
        "seeds",
        "unipc",
    ):
        plan = getattr(solvers, name)(chain, 10, prediction="v")
        mean, variance, alpha, sigma2 = marginals(plan)
        np.testing.assert_allclose(mean, alpha, atol=1e-12)
        np.testing.assert_allclose(variance, sigma2, atol=1e-12)
        with pytest.raises(ValueError, match="zero terminal SNR"):
            getattr(solvers, name)(chain, 10, prediction="eps")
    for name in ("deis", "dpm2", "dpm2_ancestral", "gradient_estimation", "heun", "ipndm", "lms", "plms"):
        with pytest.raises(ValueError, match="cannot start from zero signal"):
            getattr(solvers, name)(chain, 10, prediction="v")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: solvers.ddim(CHAIN, 0), ValueError, "steps must be >= 1, got 0"),
        (lambda: solvers.ddim(CHAIN, -3), ValueError, "steps must be >= 1, got -3"),
        (lambda: solvers.ddim(CHAIN, 2.5), TypeError, "steps must be an integer, got 2.5"),
        (lambda: solvers.ddim(CHAIN, 2000), ValueError, "steps must be <= 1000"),
        (lambda: solvers.ddim("vp", 10), TypeError, "schedule must be a fastdiff.schedules.Schedule, got str"),
        (lambda: solvers.ddim(CHAIN, 10, prediction="epsilon"), ValueError, "valid: eps, x0, v, score, flow, edm"),
        (lambda: solvers.ddim(CHAIN, 10, spacing="uniform"), ValueError, "valid: linspace, leading, trailing, karras"),
        (lambda: solvers.ddim(CHAIN, 10, final="end"), ValueError, "valid: zero, min"),
        (lambda: solvers.ddim(CHAIN, 10, predicton="v"), TypeError, "unknown option 'predicton'; valid: prediction"),
        (lambda: solvers.ddim(CHAIN, 10, clip=1.0), TypeError, "clip must be None or"),
        (lambda: solvers.ddim(CHAIN, 10, clip=(1, -1)), ValueError, "lo < hi"),
        (lambda: solvers.ddim(CHAIN, 10, clip=(math.nan, 1)), ValueError, "lo < hi"),
        (lambda: solvers.ddim(CHAIN, 10, start=10), ValueError, "start must be < 10"),
        (lambda: solvers.ddim(CHAIN, 10, start=-1), ValueError, "start must be >= 0"),
        (lambda: solvers.ddim(CHAIN, 10, eta=1.5), ValueError, r"eta must be in \[0, 1\], got 1.5"),
        (lambda: solvers.ddim(CHAIN, 10, sign=2), ValueError, "sign must be 1 or -1"),
        (
            lambda: solvers.unipc(CHAIN, 5, corrector=False, keep_start=True),
            ValueError,
            "keep_start is of the corrector",
        ),
        (lambda: solvers.dpm_solver(CHAIN, 5, kind="multistep", nodes="b"), ValueError, "unknown nodes 'b'"),
        (
            lambda: solvers.dpm_solver(CHAIN, 5, kind="multistep", nodes="grid"),
            ValueError,
            "goes with kind='singlestep'",
        ),
        (lambda: solvers.euler_ancestral(CHAIN, 10, eta=-1), ValueError, "eta must be"),
        (lambda: solvers.ddpm(CHAIN, 10, variance="learned"), ValueError, "valid: fixed_small, fixed_large"),
        (lambda: solvers.ddim(S.VP(), 10, spacing="leading"), ValueError, "chain of betas only"),
        (lambda: solvers.ddim(S.VP(), 3, spacing=[0.1, 0.5, 0.9]), ValueError, "noise must decrease"),
        (lambda: solvers.ddim(S.VP(), 3, spacing=[0.9, 0.5]), ValueError, "needs 3 times"),
        (lambda: solvers.ddim(S.VP(), 3, spacing=[1.5, 0.5, 0.1]), ValueError, r"t must be in \[0, 1\]"),
        (lambda: solvers.ddim(S.VP(), 3, t_start=0.1, t_end=0.5), ValueError, "t_end must be < t_start"),
        (lambda: solvers.ddim(S.Flow(), 3, prediction="flow", spacing="karras"), ValueError, "finite sigma/alpha"),
        (lambda: solvers.ddim(S.Flow(), 3), ValueError, "zero terminal SNR"),
        (lambda: solvers.euler_maruyama(S.Flow(), 3, prediction="flow"), ValueError, "finite drift and diffusion"),
        (lambda: solvers.euler_maruyama(S.VP(), 3, eta=-1.0), ValueError, "eta must be a finite number >= 0, got -1.0"),
        (lambda: solvers.euler_maruyama(S.VP(), 3, eta=True), ValueError, "got True"),
        (lambda: solvers.euler_maruyama(S.VP(), 3, eta=float("inf")), ValueError, "got inf"),
    ],
)
def test_bad_input(call: Callable[[], Plan], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_capped_ancestral_noise() -> None:
    plan = solvers.euler_ancestral(S.VE(0.1, 10.0), 6, eta=4.0)
    mean, variance, alpha, sigma2 = marginals(plan)
    np.testing.assert_allclose(variance, sigma2, rtol=1e-12, atol=1e-15)
    assert np.all(plan.A[:-1, 0, 0] >= 0) and np.any(plan.A[:-1, 0, 0] == 0)
