"""Every native solver's table against the one probed out of diffusers or k-diffusion, coefficient by coefficient.

What is compared does not depend on the choice of slots: how much of the start, of every model output and of every noise
each state holds. 1e-9 of a state's largest coefficient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from tests import test_parity, test_parity_multistep, test_stochastic
from tests.probe_cases import TOLERANCE, increments, response, shipped
from tests.test_parity import BETAS, PREDICTIONS, Case
from tests.test_parity_multistep import SINGLE, linspace
from tests.test_stochastic_kd import k_diffusion

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 20  # divides 1000: elsewhere stock DDIM and PNDM step past their own next time
CASES = {**test_parity.CASES, **test_parity_multistep.CASES}


def compare(ours: fd.Plan, theirs: fd.Plan, *, scaled: bool = False) -> None:
    """scaled: they carry x / alpha. Noise columns may differ in sign, their draw being what it is."""
    a, b = response(ours), response(theirs)
    assert a.shape == b.shape
    if scaled:
        a = a / np.append(ours.alpha, ours.end[0])[:, None]
        a[:, 0] *= ours.alpha[0]
    noise = a[:, 1 + ours.nfe :]
    noise *= np.where(np.sum(noise * b[:, 1 + ours.nfe :], axis=0) < 0, -1, 1)
    size = np.abs(a).max(axis=1, keepdims=True)
    assert np.abs((a - b) / size).max() <= TOLERANCE
    assert np.allclose(ours.lo, theirs.lo, rtol=1e-9) and np.allclose(ours.hi, theirs.hi, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name: str) -> None:
    case: Case = CASES[name]
    alone = case.scheduler == SINGLE[1]
    for prediction in case.predictions[:2]:
        config = {**BETAS["linear"][0], "prediction_type": PREDICTIONS[prediction], **case.stock}
        if not alone:
            config["timestep_spacing"] = case.spacing
        own = {"spacing": linspace(STEPS, case.native.get("final", "zero"))} if alone else {"spacing": case.spacing}
        schedule = S.Betas(BETAS["linear"][1])
        ours = getattr(solvers, case.solver)(schedule, STEPS, prediction=prediction, **{**own, **case.native})
        theirs = fd.probe(shipped(case)(**config), steps=STEPS, step_options=case.step)  # type: ignore[arg-type]
        compare(ours, theirs, scaled=case.scaled)


@pytest.mark.parametrize("name", test_stochastic.STOCK)
def test_stochastic_equals_diffusers(name: str) -> None:
    module, cls, config, step, native, solver = test_stochastic.STOCK[name]
    case = Case(module, cls, solver, config, step, {})
    ours = getattr(solvers, solver)(S.Betas(BETAS["linear"][1]), STEPS, **native(STEPS))
    theirs = fd.probe(shipped(case)(**BETAS["linear"][0], **config), steps=STEPS, step_options=step)  # type: ignore[arg-type]
    compare(ours, theirs)


def shared_path(sampler: Any) -> Any:
    """dpmpp_sde with what a Brownian tree gives it: the second increment of a step contains the first."""

    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, noise_sampler: Any = None, **options: Any) -> Any:
        times = iter(range(2 * len(sigmas)))
        draw = increments(lambda: noise_sampler(next(times), 0))
        return sampler(model, x, sigmas, noise_sampler=draw, **options)

    return sample


@pytest.mark.parametrize(
    ("solver", "sampler", "native", "theirs"),
    [
        ("euler", "euler", {}, {}),
        ("heun", "heun", {}, {}),
        ("dpm2", "dpm_2", {}, {}),
        ("lms", "lms", {}, {}),
        ("dpmpp_2m", "dpmpp_2m", {}, {}),
        ("euler_ancestral", "euler_ancestral", {}, {}),
        ("euler_ancestral", "euler_ancestral", {"eta": 0.6}, {"eta": 0.6}),
        ("dpm2_ancestral", "dpm_2_ancestral", {}, {}),
        ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {}, {}),
        ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.4}, {"eta": 0.4}),
        ("dpmpp_sde", "dpmpp_sde", {}, {}),
        ("dpmpp_sde", "dpmpp_sde", {"eta": 0.5}, {"eta": 0.5}),
        ("dpmpp_2m_sde", "dpmpp_2m_sde", {"lower_order_final": False}, {}),
        ("dpmpp_3m_sde", "dpmpp_3m_sde", {}, {}),
        ("edm_stochastic", "heun", {"s_churn": 4.0, "s_noise": 1.003}, {"s_churn": 4.0, "s_noise": 1.003}),
        ("edm_stochastic", "euler", {"order": 1, "s_churn": 4.0}, {"s_churn": 4.0}),
    ],
)
def test_equals_k_diffusion(solver: str, sampler: str, native: dict[str, Any], theirs: dict[str, Any]) -> None:
    function = getattr(k_diffusion(), f"sample_{sampler}")
    function = shared_path(function) if solver == "dpmpp_sde" else function
    sigmas = torch.from_numpy(np.append(S.EDM().sigma(np.linspace(1, 0, STEPS)), 0.0))
    plan = getattr(solvers, solver)(S.EDM(), STEPS, prediction="x0", **native)
    compare(plan, fd.probe(function, sigmas=sigmas, **theirs))


def test_every_solver_someone_else_has_is_here() -> None:
    """The rest has no counterpart that can be probed: its tables are held to closed forms and orders."""
    held = {c.solver for c in CASES.values()} | {row[-1] for row in test_stochastic.STOCK.values()}
    mark = next(m for m in test_equals_k_diffusion.pytestmark if m.name == "parametrize")
    held |= {row[0] for row in mark.args[1]}
    alone = {"ancestral", "consistency", "ddim_inversion", "er_sde", "euler_maruyama", "gradient_estimation", "ipndm",
             "langevin", "probability_flow", "restart", "reverse_diffusion", "seeds"}  # fmt: skip
    assert {n for n in solvers.__all__ if not n.startswith(("bfn", "unmask"))} - held == alone
