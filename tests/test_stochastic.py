"""Stochastic and few-step solvers against the samplers people use: diffusers in float64 and fp32."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample
from tests.test_parity import BETAS, PREDICTIONS, SHAPE, lifted, model

CHAIN = S.Betas(S.scaled_linear_betas(1000))


def pool_of(count: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def both(plan: Plan, x_T: Tensor, noise: list[Tensor], net: Callable[..., Tensor] = model) -> tuple[Tensor, Tensor]:
    """The plan in float64 by its definition, and fd.sample in float32, with the same noise in order."""
    first, second = iter(noise), iter(noise)
    reference = reference_sample(net, plan, x_T.double(), lambda k, like: next(first).double())
    return reference, fd.sample(net, plan, SHAPE, x_T=x_T, noise=lambda k, like: next(second))


def two_sided(plan: Plan, x_T: Tensor, noise: list[Tensor], run: Callable[[bool], Tensor], tolerance: float) -> None:
    """test_parity's rule: float64 equal to 1e-12; fp32 near the exact loop and no farther from theirs than it is."""
    exact, theirs = run(True), run(False)
    reference, ours = both(plan, x_T, noise)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= tolerance
    assert far(ours, theirs) <= far(theirs, exact) + tolerance


STOCK: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Callable[[int], dict[str, Any]], str]] = {
    # name: module, class, configuration, arguments of step, native options of n steps, solver
    "dpmpp_2m_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"},
        {},
        lambda n: {},
        "dpmpp_2m_sde",
    ),
    "dpmpp_2m_sde-heun-min": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "sde-dpmsolver++",
            "timestep_spacing": "trailing",
            "solver_type": "heun",
            "final_sigmas_type": "sigma_min",
        },
        {},
        lambda n: {"kind": "heun", "final": "min"},
        "dpmpp_2m_sde",
    ),
    "sa_solver": (
        "sasolver",
        "SASolverScheduler",
        {"timestep_spacing": "trailing"},
        {},
        lambda n: {"few_steps": True, "final": "min", "tau": lambda t: float(200 <= t <= 800)},
        "sa_solver",
    ),
    "sa_solver-32": (
        "sasolver",
        "SASolverScheduler",
        {"timestep_spacing": "trailing", "predictor_order": 3, "corrector_order": 2, "tau_func": lambda t: 0.6},
        {},
        lambda n: {"few_steps": True, "final": "min", "tau": 0.6, "predictor_order": 3},
        "sa_solver",
    ),
    "sa_solver-13": (
        "sasolver",
        "SASolverScheduler",
        {"timestep_spacing": "trailing", "predictor_order": 1, "corrector_order": 3, "tau_func": lambda t: 1.0},
        {},
        lambda n: {"few_steps": True, "final": "min", "predictor_order": 1, "corrector_order": 3},
        "sa_solver",
    ),
    "lcm": ("lcm", "LCMScheduler", {"clip_sample": False}, {}, lambda n: {}, "lcm"),
    "lcm-clip": ("lcm", "LCMScheduler", {"clip_sample": True}, {}, lambda n: {"clip": (-1, 1)}, "lcm"),
    "tcd": ("tcd", "TCDScheduler", {}, {"eta": 0.3}, lambda n: {"final": "min"}, "tcd"),
    "tcd-1": ("tcd", "TCDScheduler", {}, {"eta": 1.0}, lambda n: {"final": "min", "gamma": 1.0}, "tcd"),
    "tcd-0": ("tcd", "TCDScheduler", {}, {"eta": 0.0}, lambda n: {"final": "min", "gamma": 0.0}, "tcd"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", [4, 20])
def test_equals_diffusers(name: str, betas: str, steps: int) -> None:
    file, cls, config, step, native, solver = STOCK[name]
    shipped = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    double, (beta_config, table) = lifted(file), BETAS[betas]
    noise = pool_of(steps)
    for prediction in ("eps", "v", "x0"):
        plan = getattr(solvers, solver)(S.Betas(table), steps, prediction=prediction, **native(steps))
        x_T = pool_of(1, 1)[0] * plan.init_scale

        def run(exact: bool, prediction: str = prediction, x_T: Tensor = x_T, plan: Plan = plan) -> Tensor:
            module, source = double if exact else shipped, iter(noise)
            original, dtype = module.randn_tensor, torch.float64 if exact else torch.float32
            module.randn_tensor = lambda *args, **kwargs: next(source).to(dtype)
            torch.set_default_dtype(dtype)
            try:
                scheduler = getattr(module, cls)(**beta_config, prediction_type=PREDICTIONS[prediction], **config)
                scheduler.set_timesteps(steps)
                assert scheduler.timesteps.tolist() == plan.times.tolist()
                x = x_T.to(dtype)
                for t in scheduler.timesteps:
                    x = scheduler.step(model(x, t), t, x, **step, return_dict=False)[0]
                return x
            finally:
                torch.set_default_dtype(torch.float32)
                module.randn_tensor = original

        two_sided(plan, x_T, noise, run, 1e-5)


def test_score_sde_ve_equals_diffusers() -> None:
    """ScoreSdeVe's predictor is reverse_diffusion on VE; the sample is its last mean."""
    steps, noise, x_T = 20, pool_of(20), pool_of(1, 1)[0] * 50
    plan = solvers.reverse_diffusion(S.VE(0.01, 50.0), steps, prediction="score")
    score = lambda x, t: -torch.tanh(1.3 * x)  # noqa: E731

    def run(dtype: torch.dtype) -> Tensor:
        module = lifted("sde_ve") if dtype == torch.float64 else importlib.import_module(
            "diffusers.schedulers.scheduling_sde_ve"
        )  # fmt: skip
        source, original = iter(noise), module.randn_tensor
        module.randn_tensor = lambda *args, **kwargs: next(source).to(dtype)
        torch.set_default_dtype(dtype)
        try:
            scheduler = module.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-5)
            scheduler.set_timesteps(steps)
            scheduler.set_sigmas(steps)
            x = x_T.to(dtype)
            for t in scheduler.timesteps:
                x, mean = scheduler.step_pred(score(x, t), t, x, return_dict=False)
            return mean
        finally:
            torch.set_default_dtype(torch.float32)
            module.randn_tensor = original

    exact, theirs = run(torch.float64), run(torch.float32)
    reference, ours = both(plan, x_T, noise, score)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5 and far(ours, theirs) <= far(theirs, exact) + 1e-5


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_inversion_equals_diffusers(prediction: str, clip: bool) -> None:
    steps, x_0 = 20, pool_of(1, 2)[0]
    options: dict[str, Any] = {"clip": (-1, 1)} if clip else {}
    plan = solvers.ddim_inversion(CHAIN, steps, prediction=prediction, spacing="leading", seen="next", **options)
    config = {**BETAS["scaled_linear"][0], "prediction_type": PREDICTIONS[prediction], "clip_sample": clip}

    def run(dtype: torch.dtype) -> Tensor:
        module = lifted("ddim_inverse") if dtype == torch.float64 else importlib.import_module(
            "diffusers.schedulers.scheduling_ddim_inverse"
        )  # fmt: skip
        torch.set_default_dtype(dtype)
        try:
            scheduler = module.DDIMInverseScheduler(timestep_spacing="leading", **config)
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == plan.times.tolist()
            x = x_0.to(dtype)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
            return x
        finally:
            torch.set_default_dtype(torch.float32)

    exact, theirs = run(torch.float64), run(torch.float32)
    reference, ours = both(plan, x_0, [])
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5 and far(ours, theirs) <= far(theirs, exact) + 1e-5


def raw(x: Tensor, t: Any) -> Tensor:
    """A raw network F(c_in x, ln(sigma) / 4)."""
    time = (t if isinstance(t, Tensor) else torch.tensor(t)).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(1.3 * x + time)


@pytest.mark.parametrize("order", [0, 1])
def test_edm_euler_equals_diffusers(order: int) -> None:
    """EDMEuler with the raw network; without churn it is euler and edm_stochastic of order 1."""
    steps, x_T = 15, 80 * pool_of(1, 1)[0]
    native = solvers.edm_stochastic if order else solvers.euler
    plan = native(S.EDM(), steps, prediction="edm", **({"order": 1} if order else {}))

    def run(exact: bool) -> Tensor:
        name = "edm_euler"
        module = lifted(name) if exact else importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        torch.set_default_dtype(torch.float64 if exact else torch.float32)
        try:
            scheduler = module.EDMEulerScheduler()
            scheduler.set_timesteps(steps)
            x = x_T.to(torch.get_default_dtype())
            for t in scheduler.timesteps:
                x = scheduler.step(raw(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
            return x
        finally:
            torch.set_default_dtype(torch.float32)

    exact, theirs = run(True), run(False)
    reference, ours = both(plan, x_T, pool_of(steps), raw)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5 and far(ours, theirs) <= far(theirs, exact) + 1e-5


@pytest.mark.parametrize("chosen", [[39], [39, 20], [39, 25, 12, 3]], ids=len)
@pytest.mark.parametrize("clip", [False, True])
def test_consistency_equals_diffusers(chosen: list[int], clip: bool) -> None:
    """CMStochasticIterative: 40 training levels, the raw network behind the boundary at sigma_min."""
    steps, x_T, noise = len(chosen), 80 * pool_of(1, 1)[0], pool_of(4)
    schedule = S.EDM()
    options: dict[str, Any] = {"clip": (-1, 1)} if clip else {}
    times = np.array([k / 39 for k in chosen])
    plan = solvers.consistency(schedule, steps, prediction="edm", spacing=times, **options)

    def run(exact: bool) -> Tensor:
        name = "consistency_models"
        module = lifted(name) if exact else importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        source, original = iter(noise), module.randn_tensor
        dtype = torch.float64 if exact else torch.float32
        module.randn_tensor = lambda *args, **kwargs: next(source).to(dtype)
        torch.set_default_dtype(dtype)
        try:
            scheduler = module.CMStochasticIterativeScheduler(clip_denoised=clip)
            scheduler.set_timesteps(timesteps=[39 - k for k in reversed(chosen)])
            x = x_T.to(dtype)
            for t in scheduler.timesteps:
                x = scheduler.step(raw(scheduler.scale_model_input(x, t), t / 1000), t, x, return_dict=False)[0]
            return x
        finally:
            torch.set_default_dtype(torch.float32)
            module.randn_tensor = original

    exact, theirs = run(True), run(False)
    reference, ours = both(plan, x_T, noise, raw)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5 and far(ours, theirs) <= far(theirs, exact) + 1e-5
