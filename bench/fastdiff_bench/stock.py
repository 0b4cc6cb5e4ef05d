"""The loops people run today for the same plan: diffusers' schedulers and k-diffusion's samplers, as installed."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff_bench.cases import Case
from fastdiff_bench.peers import k_diffusion_sampling

__all__ = ["INSTALL", "Stock", "diffusers_loop", "installed", "k_diffusion_loop", "offers"]

INSTALL = {"diffusers": "pip install diffusers", "k-diffusion": "pip install --no-deps k-diffusion scipy"}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "flow_shift": 1.0}
OVER_ALPHA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
              "KDPM2DiscreteScheduler", "LMSDiscreteScheduler")  # fmt: skip
PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# (schedule, solver) -> class and its configuration; a function in it is called with the plan
DIFFUSERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("scaled_linear_betas", "ddim"): ("DDIMScheduler", {"clip_sample": False}),
    ("scaled_linear_betas", "ddpm"): ("DDPMScheduler", {}),
    ("scaled_linear_betas", "euler"): ("EulerDiscreteScheduler", {}),
    ("scaled_linear_betas", "euler_ancestral"): ("EulerAncestralDiscreteScheduler", {}),
    ("scaled_linear_betas", "heun"): ("HeunDiscreteScheduler", {}),
    ("scaled_linear_betas", "dpm2"): ("KDPM2DiscreteScheduler", {}),
    ("scaled_linear_betas", "dpmpp_2m"): ("DPMSolverMultistepScheduler", {}),
    ("scaled_linear_betas", "dpmpp_3m"): ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("scaled_linear_betas", "dpmpp_2m_sde"): ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("scaled_linear_betas", "unipc"): ("UniPCMultistepScheduler", {}),
    ("scaled_linear_betas", "deis"): ("DEISMultistepScheduler", {}),
    ("scaled_linear_betas", "lms"): ("LMSDiscreteScheduler", {}),
    ("scaled_linear_betas", "plms"): ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("scaled_linear_betas", "sa_solver"): ("SASolverScheduler", {"tau_func": lambda plan: lambda t: 1.0}),
    ("scaled_linear_betas", "lcm"): ("LCMScheduler", {"clip_sample": False}),
    ("cosine_betas", "ddpm"): ("DDPMScheduler", {}),
    ("cosine_betas", "ddim"): ("DDIMScheduler", {"clip_sample": False}),
    ("flow", "euler"): ("FlowMatchEulerDiscreteScheduler", {}),
    ("flow", "heun"): ("FlowMatchHeunDiscreteScheduler", {}),
    ("flow", "dpmpp_2m"): ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, **FLOW}),
    ("edm_network", "euler"): ("EDMEulerScheduler", {}),
    ("edm_network", "dpmpp_2m"): ("EDMDPMSolverMultistepScheduler", {}),
    # it reads trained_betas as the sigmas of its grid, the end included
    ("cosine_v", "ipndm"): ("IPNDMScheduler", {"trained_betas": lambda plan: [*plan.sigma.tolist(), 0.0]}),
}
K_DIFFUSION = {
    "euler": "sample_euler",
    "euler_ancestral": "sample_euler_ancestral",
    "heun": "sample_heun",
    "dpm2": "sample_dpm_2",
    "dpmpp_2s_ancestral": "sample_dpmpp_2s_ancestral",
    "dpmpp_2m": "sample_dpmpp_2m",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
    "lms": "sample_lms",
}

Model = Callable[[Tensor, Tensor], Tensor]


class Stock(NamedTuple):
    """A loop of another library: loop(x_T, generator) -> the end; prepare is what it does before a run, not timed."""

    name: str
    prepare: Callable[[], object]
    loop: Callable[[Tensor, torch.Generator | None], Tensor]


def offers(name: str, case: Case) -> bool:
    """Has this library a loop that does the same as the case?"""
    if name == "diffusers":
        return case.schedule == case.kind and (case.kind, case.solver) in DIFFUSERS
    return case.kind == "edm" and case.solver in K_DIFFUSION


def installed(name: str) -> bool:
    """Can this library's samplers be imported?"""
    return importlib.util.find_spec("diffusers") is not None if name == "diffusers" else bool(k_diffusion_sampling())


def diffusers_loop(case: Case, plan: fd.Plan, model: Model, dtype: torch.dtype, device: torch.device) -> Stock | None:
    """diffusers' loop as its pipelines write it, or None where it has none.

    Raises: ModuleNotFoundError with the line that installs it.
    """
    if not offers("diffusers", case):
        return None
    if not installed("diffusers"):
        raise ModuleNotFoundError(f"diffusers is not installed: {INSTALL['diffusers']}")
    import diffusers

    name, config = DIFFUSERS[case.kind, case.solver]
    chain = BETAS if case.kind == "scaled_linear_betas" else COSINE
    if case.kind.endswith("_betas"):
        config = {**chain, "timestep_spacing": "trailing", **config}
    scheduler: Any = getattr(diffusers, name)(**{k: v(plan) if callable(v) else v for k, v in config.items()})
    draws = "generator" in _parameters(scheduler.step)
    scaled = name in (*OVER_ALPHA, *PRECONDITIONED)
    start = 1.0 / float(plan.alpha[0]) if name in OVER_ALPHA else 1.0  # their state is x / alpha

    def loop(x: Tensor, generator: torch.Generator | None) -> Tensor:
        extra: dict[str, Any] = {"generator": generator} if draws else {}
        x = x * start if start != 1 else x
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if scaled else x
            m = model(seen.to(dtype), t.expand(len(x)))
            x = scheduler.step(m, t, x, return_dict=False, **extra)[0]
        return x

    return Stock(name, partial(scheduler.set_timesteps, case.steps, device=device), loop)


def k_diffusion_loop(case: Case, plan: fd.Plan, model: Model, dtype: torch.dtype, device: torch.device) -> Stock | None:
    """k-diffusion's loop on the same sigmas, or None where it has none. The model is a denoiser, as there.

    Raises: ModuleNotFoundError with the line that installs it.
    """
    if not offers("k-diffusion", case):
        return None
    sampling = k_diffusion_sampling()
    if sampling is None:
        raise ModuleNotFoundError(f"k-diffusion is not installed: {INSTALL['k-diffusion']}")
    name = K_DIFFUSION[case.solver]
    ramp = np.append(Case(case.schedule, "euler", case.steps).plan().sigma, 0.0)
    sigmas = torch.from_numpy(ramp).float().to(device)
    sample = getattr(sampling, name)
    draws = "noise_sampler" in _parameters(sample)

    def loop(x: Tensor, generator: torch.Generator | None) -> Tensor:
        def draw(*_: Any) -> Tensor:
            return torch.randn(x.shape, generator=generator, device=x.device)

        extra = {"noise_sampler": draw} if draws else {}
        return sample(lambda x, sigma: model(x.to(dtype), sigma).float(), x, sigmas, disable=True, **extra)

    return Stock(name, lambda: None, loop)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)
