"""What the tests of accelerate share: configurations, a stock loop in float64 on the same noise, and how far apart."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

import fastdiff as fd
from fastdiff.integrations.diffusers.reading import ONE_MORE_TIME
from fastdiff.probe.observe import globals_of, lifted
from tests.probe_cases import CASES, SD, Case, V, shipped

SHAPE = (2, 3, 8, 8)
STEPS = 12
TOLERANCE = 2e-6

MORE = {
    "ddpm-parallel-v": Case("ddpm_parallel", "DDPMParallelScheduler", {**SD, **V}),
    "ddpm-parallel-large": Case("ddpm_parallel", "DDPMParallelScheduler", {**SD, "variance_type": "fixed_large"}),
    "ddpm-small-log": Case("ddpm", "DDPMScheduler", {**SD, "variance_type": "fixed_small_log"}),
    "ddim-parallel-v": Case("ddim_parallel", "DDIMParallelScheduler", {**SD, **V}),
    "ddim-parallel-eta": Case("ddim_parallel", "DDIMParallelScheduler", SD, None, {"eta": 1.0}),
    "ddim-inverse-v": Case("ddim_inverse", "DDIMInverseScheduler", {**SD, **V, "clip_sample": False}),
    "ddim-inverse-clip": Case("ddim_inverse", "DDIMInverseScheduler", SD),
    "ddim-cogvideox-default": Case("ddim_cogvideox", "CogVideoXDDIMScheduler"),
    "ddim-cogvideox-trailing": Case("ddim_cogvideox", "CogVideoXDDIMScheduler", {**V, "timestep_spacing": "trailing"}),
    "dpm-cogvideox": Case("dpm_cogvideox", "CogVideoXDPMScheduler"),
    "dpm-cogvideox-trailing": Case(
        "dpm_cogvideox", "CogVideoXDPMScheduler", {**V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    ),
    "dpm-cogvideox-linspace": Case(
        "dpm_cogvideox", "CogVideoXDPMScheduler", {"timestep_spacing": "linspace", "set_alpha_to_one": False}
    ),
    "dpm-inverse-karras": Case(
        "dpmsolver_multistep_inverse", "DPMSolverMultistepInverseScheduler", {**SD, "use_karras_sigmas": True}
    ),
    "dpm-inverse-3": Case(
        "dpmsolver_multistep_inverse", "DPMSolverMultistepInverseScheduler", {**SD, "solver_order": 3}
    ),
    "ipndm-100": Case("ipndm", "IPNDMScheduler", {"num_train_timesteps": 100}),
    "ipndm-betas": Case("ipndm", "IPNDMScheduler", {"trained_betas": [0.3 + 0.01 * i for i in range(12)]}),
    "pndm-v": Case("pndm", "PNDMScheduler", {**SD, **V, "skip_prk_steps": True}),
    "lms-default": Case("lms_discrete", "LMSDiscreteScheduler"),
    "k_dpm_2_discrete-default": Case("k_dpm_2_discrete", "KDPM2DiscreteScheduler"),
    "k_dpm_2_ancestral_discrete-default": Case("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler"),
    "sa-solver-3": Case("sasolver", "SASolverScheduler", {**SD, "predictor_order": 3, "corrector_order": 3}),
    "lcm-trailing": Case("lcm", "LCMScheduler", {"timestep_spacing": "trailing", **V}),
    "lcm-clip": Case("lcm", "LCMScheduler", {"clip_sample": True}),
    "tcd-default": Case("tcd", "TCDScheduler"),
    "tcd-v": Case("tcd", "TCDScheduler", V, None, {"eta": 0.5}),
    "flow-heun-default": Case("flow_match_heun_discrete", "FlowMatchHeunDiscreteScheduler"),
    "flow-heun-shift-6": Case("flow_match_heun_discrete", "FlowMatchHeunDiscreteScheduler", {"shift": 6.0}),
    "flow-lcm-shift": Case("flow_match_lcm", "FlowMatchLCMScheduler", {"shift": 3.0}),
    "flow-lcm-factors": Case("flow_match_lcm", "FlowMatchLCMScheduler", {"use_karras_sigmas": True}),
    "ltx-rf-9": Case("ltx_euler_ancestral_rf", "LTXEulerAncestralRFScheduler"),
    "ltx-rf-eta": Case("ltx_euler_ancestral_rf", "LTXEulerAncestralRFScheduler", {"eta": 0.5, "s_noise": 1.1}),
    "edm-euler-exponential": Case("edm_euler", "EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    "consistency-32": Case(
        "consistency_models", "CMStochasticIterativeScheduler", {"sigma_max": 32.0, "s_noise": 1.01}
    ),
    "scm": Case("scm", "SCMScheduler", {}, None, {}, {"intermediate_timesteps": None}),
    "scm-sigma-1": Case("scm", "SCMScheduler", {"sigma_data": 1.0}, None, {}, {"intermediate_timesteps": None}),
    "scm-1.3": Case("scm", "SCMScheduler", {}, None, {}, {"intermediate_timesteps": None, "max_timesteps": 1.3}),
    "flow-map-3": Case("flow_map_euler_discrete", "FlowMapEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-map-500": Case("flow_map_euler_discrete", "FlowMapEulerDiscreteScheduler", {"num_train_timesteps": 500}),
    "unclip-x0": Case("unclip", "UnCLIPScheduler", {"prediction_type": "sample"}),
    "unclip-noclip": Case("unclip", "UnCLIPScheduler", {"clip_sample": False}),
    "minimax": Case("minimax_h3", "MiniMaxH3Scheduler"),
    "minimax-1": Case("minimax_h3", "MiniMaxH3Scheduler", {"shift": 1.0}),
    "minimax-5": Case("minimax_h3", "MiniMaxH3Scheduler", {"shift": 5.0}),
    "helios-euler": Case("helios", "HeliosScheduler", {"scheduler_type": "euler"}, None, {}, {"stage_index": 1}),
    "sde-exponential": Case("dpmsolver_sde", "DPMSolverSDEScheduler", {**SD, "use_exponential_sigmas": True}),
    "sde-trailing": Case(
        "dpmsolver_sde", "DPMSolverSDEScheduler", {"timestep_spacing": "trailing"}, None, {"s_noise": 1.1}
    ),
    "cosine-dpm-1": Case("cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler", {"solver_order": 1}),
    "wuerstchen": Case("ddpm_wuerstchen", "DDPMWuerstchenScheduler"),
    "wuerstchen-scaler": Case("ddpm_wuerstchen", "DDPMWuerstchenScheduler", {"scaler": 2.0}),
    "wuerstchen-s": Case("ddpm_wuerstchen", "DDPMWuerstchenScheduler", {"s": 0.02}),
}
ALL: dict[str, Case] = {**CASES, **MORE}
TREES = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
DRAWN = torch.float32  # what the stock code would draw outside


class Loop(NamedTuple):
    """What a loop went through: every x after a step, every model output, every second result."""

    x: list[torch.Tensor]
    m: list[torch.Tensor]
    second: list[torch.Tensor | None]


def make(case: Case, steps: int = STEPS, **changes: Any) -> Any:
    """A stock scheduler with its timesteps set."""
    scheduler = shipped(case)(**{**case.config, **changes})
    scheduler.set_timesteps(*arguments(case, steps), **case.setup)
    return scheduler


def arguments(case: Case, steps: int = STEPS) -> tuple[int, ...]:
    return () if "timesteps" in case.setup or "sigmas" in case.setup else (steps,)


def accelerated(case: Case, steps: int = STEPS, **options: Any) -> Any:
    """The accelerated scheduler with its timesteps set."""
    scheduler = fd.accelerate(shipped(case)(**case.config), **options)
    scheduler.set_timesteps(*arguments(case, steps), **case.setup)
    return scheduler


def start(scheduler: Any, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * float(getattr(scheduler, "init_noise_sigma", 1.0))


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.tanh(1.3 * x + float(torch.as_tensor(t).reshape(-1)[0]) / 2000).to(x.dtype)


class Spans:
    """In a Brownian tree's place: an interval's noise is told by its ends to four digits, so by float64's as well."""

    def __init__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.like = x

    def __call__(self, start: Any, end: Any) -> torch.Tensor:
        key = round(1e3 * float(start)) * 1_000_003 + round(1e3 * float(end))
        with _disable_current_modes():
            n = torch.randn(self.like.shape, generator=torch.Generator().manual_seed(key), dtype=DRAWN)
        return n.to(self.like.device, self.like.dtype)


def stepping(scheduler: Any) -> Any:
    """step(m, t, x), of a class that wants its past as well (CogVideoX) with what a pipeline hands on."""
    if "timestep_back" not in inspect.signature(scheduler.step).parameters:
        return scheduler.step
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    past: list[Any] = [None, None]

    def step(m: torch.Tensor, t: Any, x: torch.Tensor, **options: Any) -> Any:
        return_dict = options.pop("return_dict", True)
        made = scheduler.step(m, past[0], t, past[1], x, **options, return_dict=False)
        past[:] = made[1], t
        return DDIMSchedulerOutput(*made) if return_dict else made

    return step


@contextlib.contextmanager
def without_trees(case: Case) -> Any:
    """Inside, a class with a Brownian tree has Spans: a tree answers the last digit, which float64 changes."""
    module = sys.modules[shipped(case).__module__]
    if case.scheduler not in TREES:
        yield
        return
    tree, module.BrownianTreeNoiseSampler = module.BrownianTreeNoiseSampler, Spans
    try:
        yield
    finally:
        module.BrownianTreeNoiseSampler = tree


def loop(scheduler: Any, case: Case, x: torch.Tensor, **options: Any) -> Loop:
    """Runs a scheduler as a pipeline does. follow: take x and m from another loop (its values in x's dtype)."""
    with without_trees(case):
        return _loop(scheduler, case, x, **options)


def _loop(
    scheduler: Any, case: Case, x: torch.Tensor, *, seed: int = 7, follow: Loop | None = None, edit: Any = None
) -> Loop:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(scheduler.step).parameters
    options = {**case.step, **({"generator": generator} if "generator" in parameters else {})}
    out, call = Loop([], [], []), stepping(scheduler)
    times = list(scheduler.timesteps)
    for k, t in enumerate(times[:-1] if case.scheduler in ONE_MORE_TIME else times):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(seen, t) if follow is None else follow.m[k].to(x.dtype)
        step = call(m, t.reshape(1) if "Wuerstchen" in case.scheduler else t, x, **options)
        second = list(step.keys())[1:2]
        out.x.append(step.prev_sample)
        out.m.append(m)
        out.second.append(step[second[0]].clone() if second else None)
        x = step.prev_sample if follow is None else follow.x[k].to(x.dtype)
        if edit is not None:
            x = edit(k, x)
    return out


@contextlib.contextmanager
def float64(scheduler: Any) -> Any:
    """Inside, a scheduler's code computes in float64, and draws the float32 normals it draws outside."""

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Any:
        with _disable_current_modes():
            return torch.randn(tuple(shape), generator=generator, dtype=DRAWN).double()

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("diffusers.schedulers.scheduling_")]
    kept = [(m, m.randn_tensor) for m in modules if hasattr(m, "randn_tensor")]
    try:
        for m, _ in kept:
            m.randn_tensor = drawn
        with lifted(None, globals_of(scheduler)):
            yield
    finally:
        for m, function in kept:
            m.randn_tensor = function


def exact(case: Case, x: torch.Tensor, steps: int = STEPS, **options: Any) -> Loop:
    """The stock loop in float64, on the same start and noise."""
    with float64(shipped(case)()):
        return loop(make(case, steps), case, x.double(), **options)


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
