"""Stochastic and few-step solvers against the samplers people use, textbook loops and exact distributions."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import fastdiff as fd
from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample
from tests.oracles import exact_gaussian_flow, gaussian_map, marginals, slope
from tests.test_parity import BETAS, PREDICTIONS, SHAPE, diffusers, lifted, model

CHAIN = S.Betas(S.scaled_linear_betas(1000))
SMOOTH = [S.VP(), S.SubVP(), S.VE(0.02, 10.0), S.EDM(0.02, 10.0), S.Flow(), S.Cosine()]


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

        def run(exact: bool, prediction: str = prediction, x_T: Tensor = x_T) -> Tensor:
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
