"""Orders and errors of the ODE solvers on data with closed-form flows: a Gaussian and a mixture of three."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from tests.oracles import slope

SCHEDULE = S.EDM(0.05, 10.0)
GAUSS = (np.array([1.0]), np.array([0.7]), np.array([0.5]))
MIXTURE = (np.array([0.3, 0.45, 0.25]), np.array([-1.0, 0.2, 1.1]), np.array([0.25, 0.15, 0.3]))
Data = tuple[np.ndarray, np.ndarray, np.ndarray]
_erf = np.vectorize(math.erf)


def spread(data: Data, sigma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight, mean, std = data
    return weight, mean, np.sqrt(std**2 + sigma**2)


def cdf(data: Data, sigma: float, x: np.ndarray) -> np.ndarray:
    weight, mean, std = spread(data, sigma)
    return np.sum(weight * 0.5 * (1 + _erf((x[:, None] - mean) / std / math.sqrt(2))), axis=1)


def quantile(data: Data, sigma: float, q: np.ndarray) -> np.ndarray:
    low, high = np.full(len(q), -30.0 * (1 + sigma)), np.full(len(q), 30.0 * (1 + sigma))
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = cdf(data, sigma, middle) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def denoise(data: Data, sigma: float, x: np.ndarray) -> np.ndarray:
    """E[x0 | x] at alpha = 1."""
    weight, mean, std = spread(data, sigma)
    log = np.log(weight / std) - 0.5 * ((x[:, None] - mean) / std) ** 2
    part = np.exp(log - log.max(axis=1, keepdims=True))
    part /= part.sum(axis=1, keepdims=True)
    return np.sum(part * (mean + (data[2] / std) ** 2 * (x[:, None] - mean)), axis=1)


def push(plan: Plan, data: Data, x: np.ndarray, first: int = 0) -> np.ndarray:
    """The plan's rows from `first` on, in float64, with the ideal model (alpha = 1, prediction x0)."""
    slots = np.zeros((plan.slots, x.shape[-1]))
    slots[: len(x) if x.ndim > 1 else 1] = x
    for k in range(first, plan.nfe):
        p = denoise(data, plan.sigma[k], slots[0])
        slots = plan.A[k] @ slots + np.outer(plan.b[k] + plan.d[k], p)
    return slots[0]


class Case(NamedTuple):
    solver: str
    options: dict[str, Any]
    low: float  # fitted order, at least
    high: float  # and at most
    error: float  # of the mixture at 64 steps, at most
    quantile: float  # sup |F(y) - q| of the mixture at 32 steps, at most


CASES = {
    "euler": Case("euler", {}, 0.95, 1.05, 6.3e-2, 1.7e-02),
    "heun": Case("heun", {}, 1.95, 2.05, 1.6e-3, 1.4e-03),
    "dpm2": Case("dpm2", {}, 1.95, 2.05, 7.5e-4, 7.2e-04),
    "2s": Case("dpmpp_2s_ancestral", {"eta": 0.0}, 1.92, 2.08, 2.1e-3, 8.9e-04),
    "2m": Case("dpmpp_2m", {}, 1.92, 2.08, 1.1e-3, 8.4e-04),
    "3m": Case("dpmpp_3m", {}, 1.85, 3, 2.3e-4, 2.8e-04),
    "3m-exact": Case("dpmpp_3m", {"exact": True}, 1.4, 3.2, 3e-4, 1.6e-04),
    "lms2": Case("lms", {"order": 2}, 1.92, 2.08, 7.5e-3, 3.4e-03),
    "lms3": Case("lms", {"order": 3}, 2.4, 3.15, 1.6e-3, 1.2e-03),
    "lms4": Case("lms", {"order": 4}, 2.2, 4.15, 5e-4, 5.8e-04),
    "deis2": Case("deis", {"order": 2}, 1.92, 2.08, 3.7e-3, 1.7e-03),
    "deis3": Case("deis", {"order": 3}, 1.92, 5, 4.2e-4, 2.9e-04),
    "unipc1": Case("unipc", {"order": 1, "lower_order_final": False}, 1.92, 2.08, 6.5e-3, 2.6e-03),
    "unipc2": Case("unipc", {"order": 2, "lower_order_final": False}, 2.85, 3.15, 2.2e-4, 2.7e-04),
    "unipc3": Case("unipc", {"order": 3, "lower_order_final": False}, 3.7, 4.3, 2.8e-5, 4.4e-05),
    "unipc2-bh1": Case("unipc", {"order": 2, "bh": "bh1", "lower_order_final": False}, 2.85, 3.15, 2e-4, 2.5e-04),
    "unipc3-falling": Case("unipc", {"order": 3}, 1.9, 2.2, 2.6e-4, 1.7e-04),
    "unipc3-kept": Case(
        "unipc", {"order": 3, "keep_start": True, "lower_order_final": False}, 3.7, 4.3, 2.8e-5, 4.4e-5
    ),
    "unip2": Case("unipc", {"order": 2, "corrector": False, "lower_order_final": False}, 1.92, 2.08, 1.1e-3, 8.4e-04),
    "ipndm": Case("ipndm", {}, 1.92, 2.08, 7e-4, 4.2e-04),
    "plms": Case("plms", {}, 1.92, 2.08, 7.6e-4, 4.5e-04),
    "prk": Case("plms", {"prk": True}, 1.92, 2.08, 7.7e-4, 4.6e-04),
    "single2": Case("dpm_solver", {"order": 2}, 1.92, 2.08, 2.2e-3, 8.9e-04),
    "single3": Case("dpm_solver", {"order": 3}, 2.85, 3.15, 5.7e-5, 2.7e-05),
    "single2-noise": Case("dpm_solver", {"order": 2, "algorithm": "dpmsolver"}, 1.95, 2.05, 7.5e-4, 7.2e-04),
    "single3-noise": Case("dpm_solver", {"order": 3, "algorithm": "dpmsolver"}, 2.85, 3.2, 2.2e-5, 6.8e-06),
    "er3-ode": Case("er_sde", {"scaler": "ode"}, 1.95, 2.15, 2.4e-3, 1.2e-03),
    "er3-ode-exact": Case("er_sde", {"scaler": "ode", "exact": True}, 2.0, 3.1, 6e-4, 4.7e-04),
    "gradient": Case("gradient_estimation", {}, 0.88, 1.05, 4.2e-2, 1.2e-02),
    "seeds3-ode": Case("seeds", {"order": 3, "eta": 0.0}, 2.85, 3.15, 5.7e-5, 2.7e-05),
    "single3-heun": Case("dpm_solver", {"order": 3, "solver_type": "heun"}, 2.85, 3.15, 4.6e-5, 2.0e-05),
}
STEPS = [64, 128, 256, 512]
STARTS = np.linspace(0.02, 0.98, 33)
named = pytest.mark.parametrize("name", CASES)


def build(case: Case, steps: int, spacing: str) -> Plan:
    solver = getattr(solvers, case.solver)
    return solver(SCHEDULE, steps, prediction="x0", spacing=spacing, final="min", **case.options)


def errors(case: Case, data: Data, spacing: str) -> list[float]:
    start, end = (quantile(data, s, STARTS) for s in (10.0, 0.05))
    return [float(np.abs(push(build(case, n, spacing), data, start) - end).max()) for n in STEPS]


@named
def test_order_and_error(name: str) -> None:
    case = CASES[name]
    for data in (GAUSS, MIXTURE):
        for spacing in ("exponential", "karras"):
            found = errors(case, data, spacing)
            assert case.low <= slope(STEPS, found) <= case.high, (data is GAUSS, spacing)
            if data is MIXTURE:
                assert found[0] <= case.error, spacing


def test_3m_has_less_than_half_the_error_of_2m() -> None:
    for data in (GAUSS, MIXTURE):
        for spacing in ("exponential", "karras"):
            third, second = (errors(CASES[n], data, spacing)[0] for n in ("3m", "2m"))
            assert third <= 0.4 * second


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("3m", 2),
        ("3m-exact", 3),
        ("deis2", 2),
        ("deis3", 3),
        ("er3-ode", 2),
        ("er3-ode-exact", 3),
        ("lms3", 3),
        ("lms4", 4),
    ],
)
def test_order_from_an_exact_start(name: str, order: int) -> None:
    """History and state of the first full row taken from the exact flow: what the rows themselves are worth.

    The published 3M stays at 2: its second difference has half of the parabola's weight.
    """
    case, found = CASES[name], []
    for n in STEPS:
        plan = build(case, n, "exponential")
        first = plan.slots - 1
        exact = [quantile(MIXTURE, plan.sigma[k], STARTS) for k in range(plan.slots)]
        value = [denoise(MIXTURE, plan.sigma[k], exact[k]) for k in range(plan.slots)]
        if case.solver in ("lms", "deis"):
            value = [(x - p) / plan.sigma[k] for k, (x, p) in enumerate(zip(exact, value, strict=True))]
        slots = np.stack([exact[first], *value[:first][::-1]])
        got = push(plan, MIXTURE, slots, first)
        found.append(float(np.abs(got - quantile(MIXTURE, 0.05, STARTS)).max()))
    assert slope(STEPS, found) == pytest.approx(order, abs=0.2)


@named
def test_quantiles_land_on_quantiles(name: str) -> None:
    """257 exact quantiles at sigma_max end on those at sigma_min, in order: no sampling noise."""
    q = np.linspace(1 / 258, 257 / 258, 257)
    got = push(build(CASES[name], 32, "exponential"), MIXTURE, quantile(MIXTURE, 10.0, q))
    assert np.all(np.diff(got) > 0)
    assert np.abs(cdf(MIXTURE, 0.05, got) - q).max() <= CASES[name].quantile


BYTES = {
    **{"2m": 20, "3m": 24, "lms4": 28, "deis3": 24, "ipndm": 28, "plms": 28, "prk": 28},
    **{"unipc1": 20, "unipc2": 24, "unipc3": 28, "unipc3-kept": 32},
    **{"er3-ode": 24, "er3-ode-exact": 24, "gradient": 20, "seeds3-ode": 20},
    **{"dpm2": 16, "2s": 16, "single2": 16, "single3": 20},
}


@named
def test_bytes_and_building_time(name: str) -> None:
    case, chain, best = CASES[name], S.Betas(S.scaled_linear_betas(1000)), math.inf
    for _ in range(5):
        begin = time.perf_counter()
        plan = getattr(solvers, case.solver)(chain, 50, **case.options)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.05  # ten times what it may take
    if name in BYTES:
        assert plan.bytes_per_element()[-8:-3].max() <= BYTES[name]
