"""ER-SDE, SEEDS and gradient estimation against their formulas, integrated and written out another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.solvers.er_sde import SCALERS as OURS
from fastdiff.solvers.er_sde import _tails
from tests.oracles import slope
from tests.probe_cases import response
from tests.test_stochastic_exact import SMOOTH, error

SCALERS: dict[str, Any] = {
    "er": lambda r: math.exp(r**0.3) + 10,
    "sde": lambda r: r,
    "ode": lambda r: 1.0,
    "own": lambda r: 2 + np.tanh(r),
}

PUBLISHED = OURS["er"]


def written_out(plan: Plan, g: Callable[[float], float], order: int) -> np.ndarray:
    """x after the rows, for p = c x + e and noise z, by quad of the published Taylor terms."""
    rng = np.random.default_rng(3)
    c, e, z = (rng.normal(size=plan.nfe) for _ in range(3))
    alpha, sigma = np.append(plan.alpha, plan.end[0]), np.append(plan.sigma, plan.end[1])
    rho = sigma / alpha

    def phi(r: float) -> float:
        return r * g(r)

    def walk(of: Callable[[int, float, float, float], float]) -> float:
        x, history = 1.3, []
        for i in range(plan.nfe):
            p = 0.3 * c[i] * x + e[i]
            history.append((rho[i], p))
            x = of(i, x, p, z[i]) if i + 1 < plan.nfe else p
            states.append(x)
        return x

    def textbook(i: int, x: float, p: float, n: float) -> float:
        low, high, ratio = rho[i + 1], rho[i], phi(rho[i + 1]) / phi(rho[i])
        out = alpha[i + 1] * (ratio * x / alpha[i] + (1 - ratio) * p)
        left = 1 - (alpha[i + 1] * high * ratio / sigma[i + 1]) ** 2
        out += sigma[i + 1] * (math.sqrt(left) if left > 1e-14 else 0) * n  # below is rounding
        if i and order > 1:
            first = (p - seen[-1]) / (high - rho[i - 1])
            out += alpha[i + 1] * first * (low - high + phi(low) * quad(lambda u: 1 / phi(u), low, high)[0])
            if i > 1 and order > 2:
                second = 2 * (first - slopes[-1]) / (high - rho[i - 2])
                tail = phi(low) * quad(lambda u: (u - high) / phi(u), low, high)[0]
                out += alpha[i + 1] * second * ((low - high) ** 2 / 2 + tail)
            slopes.append(first)
        seen.append(p)
        return out

    states: list[float] = []
    seen: list[float] = []
    slopes: list[float] = []
    walk(textbook)
    wanted, slots, got = list(states), np.zeros(plan.slots), []
    slots[0] = 1.3
    for i in range(plan.nfe):
        slots = plan.A[i] @ slots + (plan.b[i] + plan.d[i]) * (0.3 * c[i] * slots[0] + e[i]) + plan.s[i] * z[i]
        got.append(slots[0])
    return np.array([wanted, got])


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", [S.VP(), S.EDM(0.02, 10.0), S.Flow(2.0)], ids=str)
def test_er_sde_is_the_published_update(schedule: S.Schedule, order: int, scaler: str) -> None:
    given = SCALERS[scaler] if scaler == "own" else scaler
    plan = solvers.er_sde(schedule, 9, order=order, scaler=given, prediction="x0", t_start=0.99)
    wanted, got = written_out(plan, SCALERS[scaler], order)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_er_sde_at_order_one_is_known_under_other_names() -> None:
    for schedule in SMOOTH:
        for scaler, other in (("ode", solvers.ddim), ("sde", solvers.ddpm)):
            ours, theirs = (f(schedule, 12, prediction="v") for f in (
                lambda *a, scaler=scaler, **o: solvers.er_sde(*a, order=1, scaler=scaler, **o), other))  # fmt: skip
            for name in ("A", "b", "s"):
                np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)


def test_the_parabolas_slope_is_of_third_order() -> None:
    for schedule in (S.VP(), S.SubVP()):
        steps = [256, 512, 1024, 2048]
        options: dict[str, Any] = {"scaler": "ode", "exact": True}
        assert slope(steps, [error("er_sde", schedule, n, options) for n in steps]) == pytest.approx(3, abs=0.15)


def test_how_far_sums_of_rectangles_are_off() -> None:
    """The published sums, 100 or 200 terms from the low end: what docs/differences.md says of them."""
    off: dict[int, list[float]] = {1: [], 2: []}
    for schedule, options in ((S.VP(), {}), (S.VP(), {"spacing": "logsnr"}), (S.EDM(), {})):
        for steps in (10, 20, 50):
            at = solvers.ddim(schedule, steps, prediction="x0", **options)  # type: ignore[arg-type]
            rho = at.sigma / at.alpha
            low, high = rho[1:, None], rho[:-1, None]
            for count in (100, 200):
                u = low + np.arange(count) / count * (high - low)
                share = 1 - low * PUBLISHED(low) / (u * PUBLISHED(u))
                width = (high - low)[:, 0] / count
                # in the second one the published code has half of the square in closed form
                closed = 0.5 * (high - low)[:, 0] ** 2 - (high - u).sum(1) * width
                sums = {1: -share.sum(1) * width, 2: ((high - u) * share).sum(1) * width + closed}
                for k, exact in zip((1, 2), _tails(PUBLISHED, rho[1:], rho[:-1]), strict=True):
                    off[k].append(float(np.abs(sums[k] / exact - 1).max()))
    assert 0.0035 <= min(off[1]) and max(off[1]) <= 0.0105
    assert 0.01 <= min(off[2]) and max(off[2]) <= 0.285 and max(off[2]) > 0.25


@pytest.mark.parametrize("schedule", SMOOTH, ids=str)
def test_seeds_without_noise_and_at_eta_one_are_known(schedule: S.Schedule) -> None:
    for order in (1, 2, 3):
        for kind in ("midpoint", "heun"):
            ours = solvers.seeds(schedule, 9, order=order, eta=0.0, kind=kind, prediction="v")
            plain = solvers.dpm_solver(schedule, 9, order=order, solver_type=kind, prediction="v")
            np.testing.assert_array_equal(ours.times, plain.times)
            for name in ("A", "b", "s"):
                np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), rtol=1e-13, atol=1e-15)
    options: dict[str, Any] = {"prediction": "v", "t_start": 0.99}
    ours, path = solvers.seeds(schedule, 9, **options), solvers.dpmpp_sde(schedule, 9, path="sde", **options)
    np.testing.assert_allclose(response(ours), response(path), rtol=1e-11, atol=1e-13)
    one, first = solvers.seeds(schedule, 9, order=1, eta=0.7, **options), solvers.er_sde(
        schedule, 9, order=1, scaler=lambda rho: rho**0.7, **options)  # fmt: skip
    np.testing.assert_allclose(response(one), response(first), rtol=1e-9, atol=1e-12)


def test_seeds_three_shares_one_path() -> None:
    """The noise of the stages and of the end: std and correlation of an Ornstein-Uhlenbeck path in lam."""
    eta, plan = 0.8, solvers.seeds(S.VP(), 4, order=3, eta=0.8, prediction="x0", final="min")
    effect = response(plan)[:, 1 + plan.nfe :]  # of each noise on each state, with p = 0
    lam = np.log(np.append(plan.alpha, plan.end[0]) / np.append(plan.sigma, plan.end[1]))
    sigma = np.append(plan.sigma, plan.end[1])
    for i in range(1, 13):
        for j in range(i, 13):
            shared = (
                sigma[i] * sigma[j] * math.exp(-eta * (lam[j] - lam[i])) * -math.expm1(-2 * eta * (lam[i] - lam[0]))
            )
            found = effect[i] @ effect[j]
            assert found == pytest.approx(shared, rel=1e-9, abs=1e-13), (i, j)


def test_seeds_three_has_a_tenth_of_two() -> None:
    for schedule in SMOOTH:
        third, second = (error("seeds", schedule, 64, {"order": k}) for k in (3, 2))
        assert third <= 0.12 * second


def test_gradient_estimation() -> None:
    """e = gamma eps + (1 - gamma) eps_prev on EDM: y' = y + (s' - s) e, by hand; gamma = 1 is Euler."""
    plan = solvers.gradient_estimation(S.EDM(0.1, 10.0), 6, gamma=2.3, prediction="x0", final="min")
    sigma, x, eps_prev = np.append(plan.sigma, plan.end[1]), 4.0, None
    slots = np.array([x, 0.0])
    for i in range(6):
        p = 0.4 * x + 0.1 * i
        eps = (x - p) / sigma[i]
        e = eps if eps_prev is None else 2.3 * eps - 1.3 * eps_prev
        x, eps_prev = x + (sigma[i + 1] - sigma[i]) * e, eps
        slots = plan.A[i] @ slots + (plan.b[i] + plan.d[i]) * (0.4 * slots[0] + 0.1 * i)
        assert slots[0] == pytest.approx(x, rel=1e-12)
    clean = solvers.gradient_estimation(S.VP(), 6)
    assert clean.A[-1, 0].tolist() == [0, 0] and clean.b[-1, 0] == 1 and clean.d[-1, 0] == 0
    plain, euler = (f(S.VP(), 8, prediction="v") for f in (
        lambda *a, **o: solvers.gradient_estimation(*a, gamma=1.0, **o), solvers.euler))  # fmt: skip
    np.testing.assert_allclose(response(plain), response(euler), rtol=1e-11, atol=1e-13)


def test_res_multistep_is_the_exact_two_step_rule() -> None:
    """x' = e^-h x + h (b_1 p + b_2 p_prev), b_2 = -phi_2(-h) h / h_prev, b_1 = phi_1(-h) - b_2, on EDM."""
    plan = solvers.dpmpp_2m_sde(S.EDM(0.02, 10.0), 18, eta=0.0, kind="heun", prediction="x0", final="min")
    lam = -np.log(np.append(plan.sigma, plan.end[1]))
    h = np.diff(lam)
    phi_1 = -np.expm1(-h) / h
    b_2 = np.append(0.0, -((1 - phi_1) / h)[1:] * h[1:] / h[:-1])
    np.testing.assert_allclose(plan.A[:, 0, 0], np.exp(-h), rtol=1e-12)
    np.testing.assert_allclose(plan.A[:, 0, 1], h * b_2, rtol=1e-9)
    np.testing.assert_allclose(plan.b[:, 0], h * (phi_1 - b_2), rtol=1e-9)
    assert not plan.stochastic
