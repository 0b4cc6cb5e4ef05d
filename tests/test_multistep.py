"""What all multistep and two-stage solvers share: phi functions, quadrature, options, limits, clamp, entry points."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.phi import phi, quadrature
from fastdiff.reference import reference_sample
from tests.oracles import gaussian_map, marginals

CHAIN = S.Betas(S.scaled_linear_betas(1000))
ALL: list[tuple[str, dict[str, Any]]] = [
    ("deis", {"order": 3}),
    ("dpm2", {}),
    ("dpm2_ancestral", {"eta": 0.5}),
    ("dpm_solver", {"order": 2}),
    ("dpm_solver", {"order": 3, "solver_type": "heun"}),
    ("dpm_solver", {"order": 3, "algorithm": "dpmsolver"}),
    ("dpm_solver", {"order": 3, "nodes": "grid"}),
    ("dpm_solver", {"order": 3, "kind": "multistep", "algorithm": "dpmsolver"}),
    ("dpmpp_2s_ancestral", {"eta": 0.5}),
    ("dpmpp_3m", {}),
    ("ipndm", {}),
    ("lms", {}),
    ("plms", {}),
    ("plms", {"prk": True}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3, "bh": "bh1"}),
    ("unipc", {"order": 3, "corrector": False}),
]
each = pytest.mark.parametrize(("name", "own"), ALL, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in ALL])


def build(name: str, own: dict[str, Any], schedule: S.Schedule, steps: int, **options: Any) -> Plan:
    plan: Plan = getattr(solvers, name)(schedule, steps, **own, **options)
    return plan


def exact_phi(k: int, z: Fraction) -> float:
    """The defining series in rational arithmetic."""
    total, term = Fraction(0), Fraction(1, math.factorial(k))
    for j in range(120):
        total += term
        term *= z / (k + j + 1)
    return float(total)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_keeps_its_digits(k: int) -> None:
    z = np.array([-12.0, -3.0, -1.0, -0.5, -0.499, -0.1, -1e-2, -1e-4, -1e-9, 0.0, 1e-9, 1e-3, 0.3, 0.6, 2.0, 9.0])
    want = [exact_phi(k, Fraction(v)) for v in z]
    np.testing.assert_allclose(phi(k, z), want, rtol=2e-14)
    assert phi(k, np.array([-np.inf]))[0] == 0


def test_quadrature_is_exact_for_polynomials() -> None:
    """Against 40 Gauss-Legendre nodes, on unequal nodes of both sides; and Adams-Bashforth's textbook weights."""
    x, w = np.polynomial.legendre.leggauss(40)
    u, w = 0.5 * (x + 1), 0.5 * w
    nodes = np.array([[0.0, -0.7, -2.1, 1.0]])
    for z in (-30.0, -2.0, -1e-3, 0.0, 0.4, 5.0):
        got = quadrature(nodes, np.array([z]))[0]
        for j in range(4):
            kernel = np.exp((1 - u) * z) * w
            want = np.sum(kernel * u**j) / np.sum(kernel)
            assert np.sum(got * nodes[0] ** j) == pytest.approx(want, rel=1e-11)
    table = quadrature(-np.arange(4.0)[None], np.zeros(1))[0]
    np.testing.assert_allclose(table, np.array([55, -59, 37, -9]) / 24, rtol=1e-14)


@each
def test_predictions_agree(name: str, own: dict[str, Any]) -> None:
    for prediction in ("eps", "v", "score", "flow", "edm"):
        for schedule in (S.EDM(), S.VP()) if prediction != "edm" else (S.EDM(),):
            plan, ref = (build(name, own, schedule, 8, prediction=p) for p in (prediction, "x0"))
            np.testing.assert_allclose(gaussian_map(plan, 0.3, 0.5), gaussian_map(ref, 0.3, 0.5), rtol=1e-8, atol=1e-12)


def says(x0: float, plan: Plan) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A model whose every prediction is x0."""
    rows = iter(zip(plan.c_skip, plan.c_out, strict=True))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        skip, out = next(rows)
        return (x0 - skip * x) / out

    return model


@each
def test_the_clamp_is_on_x0(name: str, own: dict[str, Any]) -> None:
    """A saturated model is a constant x0: the end is the bound; without saturation the clamp changes nothing."""
    for prediction in ("eps", "v", "x0"):
        plan = build(name, own, S.EDM(0.02, 20.0), 9, prediction=prediction, clip=(-1.0, 1.0))
        free = build(name, own, S.EDM(0.02, 20.0), 9, prediction=prediction)
        assert plan.clamped and not np.any(plan.d)
        x = torch.full((1, 3), 3.0, dtype=torch.float64)
        none = lambda k, like: torch.zeros_like(like)  # noqa: E731
        torch.testing.assert_close(
            reference_sample(says(7.0, plan), plan, x, none), torch.ones_like(x), rtol=0, atol=1e-9
        )
        inside = [reference_sample(says(0.4, q), q, x, none) for q in (plan, free)]
        torch.testing.assert_close(inside[0], inside[1], rtol=0, atol=1e-10)


@each
@pytest.mark.parametrize("schedule", [S.VP(), S.EDM(), CHAIN], ids=str)
def test_a_thousand_steps(name: str, own: dict[str, Any], schedule: S.Schedule) -> None:
    plan = build(name, own, schedule, 1000, prediction="v")
    mean, variance, alpha, sigma2 = marginals(plan)
    assert mean[-1] == pytest.approx(1, abs=1e-9) and variance[-1] <= 1e-18
    assert np.abs(mean - alpha).max() <= 1e-9 and np.abs(variance - sigma2).max() <= 1e-8 * sigma2.max()
    gain, shift, noise = gaussian_map(plan, 0.7, 0.5)
    scale = plan.alpha[0] ** 2 * 0.25 + plan.sigma[0] ** 2
    assert gain**2 * scale + noise == pytest.approx(0.25, rel=2e-2)
    assert gain * plan.alpha[0] * 0.7 + shift == pytest.approx(0.7, rel=1e-2)


@each
def test_starting_in_the_middle_is_a_plan_of_the_rest(name: str, own: dict[str, Any]) -> None:
    """start=k has the coefficients of a grid that begins there, not those of rows cut from a longer plan."""
    own = {k: v for k, v in own.items() if k != "lower_order_final"}
    late = build(name, own, S.VP(), 12, start=5, prediction="v")
    times = np.linspace(1.0, 1e-3, 12)[5:]
    fresh = build(name, own, S.VP(), 7, spacing=times, prediction="v")
    np.testing.assert_allclose(late.packed(), fresh.packed(), rtol=1e-6)
    assert late.entry_rows[0] == 0 and late.init_scale == late.sigma[0]


@each
def test_prefix_of_the_order(name: str, own: dict[str, Any]) -> None:
    """An order higher than the steps allow is lowered: one and two steps are what lower orders give."""
    for steps in (1, 2):
        plan = build(name, own, S.EDM(0.02, 10.0), steps)
        assert plan.nfe >= 1 and np.all(np.isfinite(plan.packed()[:, 4:]))
    one = build(name, own, S.EDM(0.02, 10.0), 1)
    assert one.nfe == 1 and gaussian_map(one, 0.3, 0.5) == pytest.approx(
        gaussian_map(solvers.ddim(S.EDM(0.02, 10.0), 1), 0.3, 0.5)
    )


@pytest.mark.parametrize("name", ["lms", "dpm2", "unipc", "dpmpp_3m", "dpm_solver"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_from_pure_noise(name: str, shift: float) -> None:
    """The whole range of rectified flow, alpha = 0 included: lms and dpm2 integrate in sigma there."""
    for prediction in ("flow", "v", "x0"):
        for final in ("zero", "min"):
            plan = getattr(solvers, name)(S.Flow(shift), 11, prediction=prediction, final=final)
            mean, variance, alpha, sigma2 = marginals(plan)
            np.testing.assert_allclose(mean, alpha, rtol=0, atol=1e-13)
            np.testing.assert_allclose(variance, sigma2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc", "dpm_solver", "dpmpp_2s_ancestral"])
def test_zero_terminal_snr(name: str) -> None:
    """The row from zero signal is first order, its node in no history: the moments of the data come out."""
    betas = S.scaled_linear_betas(1000)
    plan = getattr(solvers, name)(S.Betas(S.zero_terminal_snr(betas)), 500, prediction="v")
    mean, variance, alpha, sigma2 = marginals(plan)
    np.testing.assert_allclose(mean, alpha, atol=1e-12)
    gain, shift, noise = gaussian_map(plan, 0.7, 0.5)
    assert shift == pytest.approx(0.7, rel=0.01)
    assert gain**2 + noise == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: solvers.lms(CHAIN, 9, order=5), ValueError, r"lms: order must be in 1\.\.4, got 5"),
        (lambda: solvers.lms(CHAIN, 9, order=0), ValueError, r"order must be in 1\.\.4, got 0"),
        (lambda: solvers.deis(CHAIN, 9, order=2.0), TypeError, "order must be an integer, got 2.0"),
        (lambda: solvers.unipc(CHAIN, 9, order=4), ValueError, r"order must be in 1\.\.3, got 4"),
        (lambda: solvers.unipc(CHAIN, 9, bh="bh3"), ValueError, "unknown bh 'bh3'; valid: bh1, bh2"),
        (lambda: solvers.ipndm(CHAIN, 9, order=True), TypeError, "order must be an integer, got True"),
        (lambda: solvers.dpm_solver(CHAIN, 9, order=4), ValueError, r"order must be in 1\.\.3"),
        (lambda: solvers.dpm_solver(CHAIN, 9, kind="multi"), ValueError, "unknown kind 'multi'; valid: singlestep"),
        (lambda: solvers.dpm_solver(CHAIN, 9, algorithm="sde"), ValueError, "valid: dpmsolver"),
        (lambda: solvers.dpm_solver(CHAIN, 9, solver_type="rk"), ValueError, "valid: midpoint, heun"),
        (lambda: solvers.dpm_solver(CHAIN, 9, nodes="own"), ValueError, "unknown nodes 'own'; valid: lambda, grid"),
        (lambda: solvers.dpm2_ancestral(CHAIN, 9, eta=-1), ValueError, "eta must be a finite number >= 0, got -1"),
        (lambda: solvers.dpmpp_2s_ancestral(CHAIN, 9, s_noise=math.nan), ValueError, "s_noise must be"),
    ],
)
def test_bad_input(call: Callable[[], Plan], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_capped_noise_ends_a_step_in_one_row() -> None:
    """With eta > 1 the noise is capped at the new level: nothing is left of the old one, and no middle is needed."""
    for name in ("dpm2_ancestral", "dpmpp_2s_ancestral"):
        plan = getattr(solvers, name)(S.VE(0.1, 10.0), 6, eta=4.0)
        mean, variance, alpha, sigma2 = marginals(plan)
        np.testing.assert_allclose(variance, sigma2, rtol=1e-12, atol=1e-15)
        assert plan.nfe < 11


def test_one_method_by_two_names() -> None:
    schedule = S.VP()
    pairs = [
        (solvers.dpmpp_2m(schedule, 20), solvers.dpm_solver(schedule, 20, kind="multistep")),
        (solvers.dpmpp_3m(schedule, 20), solvers.dpm_solver(schedule, 20, order=3, kind="multistep")),
        (solvers.dpmpp_2s_ancestral(schedule, 9, eta=0.0), solvers.dpm_solver(schedule, 9)),
        (solvers.deis(schedule, 20, order=1), solvers.euler(schedule, 20)),
        (solvers.lms(schedule, 20, order=1), solvers.euler(schedule, 20)),
        (
            solvers.unipc(schedule, 20, corrector=False, lower_order_final=False),
            solvers.dpmpp_2m(schedule, 20),
        ),
        (
            solvers.deis(schedule, 20, order=2),
            solvers.dpm_solver(schedule, 20, kind="multistep", algorithm="dpmsolver", solver_type="heun"),
        ),
    ]
    for a, b in pairs:
        assert a.nfe == b.nfe
        np.testing.assert_allclose(gaussian_map(a, 0.7, 0.5), gaussian_map(b, 0.7, 0.5), rtol=1e-10, atol=1e-13)
