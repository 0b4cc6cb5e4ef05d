"""What stochastic and few-step solvers take and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fastdiff import Plan, solvers
from fastdiff import schedules as S

CHAIN = S.Betas(S.scaled_linear_betas(1000))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("seeds", {"eta": 0.7, "s_noise": 0.9}), ("dpmpp_sde", {"eta": 0.7}), ("dpmpp_2m_sde", {"eta": 0.7}),
        ("dpmpp_3m_sde", {"s_noise": 0.9}), ("er_sde", {"s_noise": 0.9}), ("edm_stochastic", {"s_churn": 0.7}),
        ("gradient_estimation", {"gamma": 1.7}),
    ],
)  # fmt: skip
def test_numpy_numbers_are_numbers(solver: str, options: dict[str, float]) -> None:
    """Of a narrow type too, and then computed with in float64."""
    make = getattr(solvers, solver)
    got = make(CHAIN, 4, spacing="linspace", t_start=900.0, **{k: np.float32(v) for k, v in options.items()})
    want = make(CHAIN, 4, spacing="linspace", t_start=900.0, **{k: float(np.float32(v)) for k, v in options.items()})
    assert got.name == want.name
    for name in ("A", "b", "s"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: solvers.dpmpp_2m_sde(CHAIN, 10, eta=-1), ValueError, "eta must be a finite number >= 0, got -1"),
        (lambda: solvers.dpmpp_2m_sde(CHAIN, 10, s_noise=math.nan), ValueError, "s_noise must be a finite number"),
        (lambda: solvers.dpmpp_2m_sde(CHAIN, 10, kind="rk4"), ValueError, "valid: midpoint, heun"),
        (lambda: solvers.dpmpp_3m_sde(CHAIN, 10, eta=math.inf), ValueError, "eta must be a finite number >= 0"),
        (lambda: solvers.dpmpp_sde(CHAIN, 10, r=0), ValueError, r"r must be in \(0, 1\], got 0"),
        (lambda: solvers.dpmpp_sde(CHAIN, 10, path="x"), ValueError, "valid: sigma, sde"),
        (
            lambda: solvers.sa_solver(CHAIN, 10, predictor_order=0),
            ValueError,
            r"predictor_order must be an integer in 1",
        ),
        (
            lambda: solvers.sa_solver(CHAIN, 10, corrector_order=5),
            ValueError,
            r"corrector_order must be an integer in 0",
        ),
        (lambda: solvers.sa_solver(CHAIN, 10, tau=-0.5), ValueError, "tau must be finite and >= 0"),
        (lambda: solvers.sa_solver(CHAIN, 10, tau=lambda t: math.nan), ValueError, "tau must be finite and >= 0"),
        (lambda: solvers.edm_stochastic(S.EDM(), 10, s_churn=-1), ValueError, "s_churn must be a finite number >= 0"),
        (lambda: solvers.edm_stochastic(S.EDM(), 10, order=3), ValueError, "order must be 1 or 2"),
        (lambda: solvers.edm_stochastic(S.VP(), 10, s_churn=5), ValueError, "above the top of VP"),
        (lambda: solvers.langevin(S.VE(), 10, inner=0), ValueError, "inner must be an integer >= 1"),
        (lambda: solvers.langevin(S.VE(), 10, eps=0.0), ValueError, "eps must be a finite number > 0"),
        (lambda: solvers.langevin(S.VE(), 10, final="min"), TypeError, "denoise=True | False in place of final"),
        (lambda: solvers.langevin(S.EDM(0.0, 80.0), 10, spacing=[1, 0] * 5), ValueError, "noise must decrease"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=[(2, 1, 1, 1)]), ValueError, "0 < low < high"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=[(1, 2, 0, 1)]), ValueError, "repeats, inner >= 1"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=[(1, 2, 1.5, 1)]), ValueError, r"got \(1, 2, 1.5, 1\)"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=[(1, 2, 3)]), ValueError, r"low < high .* got \(1, 2, 3\)"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=(0.06, 0.2, 5, 3)), ValueError, "low < high .* got 0.06"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=3), ValueError, "low < high .* got 3"),
        (lambda: solvers.restart(S.EDM(), 10, intervals=[(1, 200, 1, 1)]), ValueError, "must lie inside the grid"),
        (lambda: solvers.lcm(CHAIN, 60), ValueError, "steps must be <= 50"),
        (lambda: solvers.lcm(CHAIN, 4, original_steps=0), ValueError, "original_steps must be an integer >= 1"),
        (lambda: solvers.lcm(CHAIN, 4, timestep_scaling=0.0), ValueError, "timestep_scaling must be > 0"),
        (lambda: solvers.lcm(CHAIN, 0), ValueError, "steps must be >= 1, got 0"),
        (lambda: solvers.tcd(CHAIN, 4, gamma=1.5), ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        (lambda: solvers.consistency(S.EDM(), 4, floor=-1.0), ValueError, "floor must be a finite number >= 0"),
        (lambda: solvers.ddim_inversion(CHAIN, 4, seen="both"), ValueError, "valid: current, next"),
        (lambda: solvers.ddim_inversion(CHAIN, 4, prediction="x0"), ValueError, "has no eps on clean data"),
        (lambda: solvers.tcd(CHAIN, 4, eta=0.3), TypeError, "unknown option 'eta'"),
        (lambda: solvers.er_sde(CHAIN, 4, order=4), ValueError, r"er_sde: order must be in 1..3, got 4"),
        (lambda: solvers.er_sde(CHAIN, 4, scaler="sde2"), ValueError, "valid: er, sde, ode, or a function"),
        (lambda: solvers.er_sde(CHAIN, 4, scaler=lambda r: 1 / r), ValueError, "that do not fall as sigma/alpha grows"),
        (lambda: solvers.er_sde(CHAIN, 4, scaler=lambda r: -1.0), ValueError, "finite numbers > 0"),
        (lambda: solvers.er_sde(CHAIN, 4, scaler=lambda r: r * math.nan), ValueError, "finite numbers > 0"),
        (lambda: solvers.seeds(CHAIN, 4, order=0), ValueError, r"seeds: order must be in 1..3, got 0"),
        (lambda: solvers.seeds(CHAIN, 4, kind="phi_2"), ValueError, "valid: midpoint, heun"),
        (lambda: solvers.seeds(CHAIN, 4, eta=-1.0), ValueError, "eta must be a finite number >= 0"),
        (
            lambda: solvers.seeds(CHAIN, 4, eta=np.float32(-1)),
            ValueError,
            "eta must be a finite number >= 0, got .*-1.0",
        ),
        (lambda: solvers.seeds(CHAIN, 4, eta=True), ValueError, "eta must be a finite number >= 0, got True"),
        (
            lambda: solvers.gradient_estimation(CHAIN, 4, gamma="2"),
            ValueError,
            "gamma must be a finite number, got '2'",
        ),
        (lambda: solvers.gradient_estimation(CHAIN, 4, gamma=math.inf), ValueError, "gamma must be a finite number"),
    ],
)
def test_bad_input(call: Callable[[], Plan], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
