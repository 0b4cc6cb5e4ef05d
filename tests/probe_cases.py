"""What the tests of probe share: diffusers configurations, a random scheduler, a sampler, and how plans are run."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.reference import reference_sample

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
NOCLIP = {"clip_sample": False}


class Case(NamedTuple):
    """A scheduler, the slots its plan should have, and the arguments of set_timesteps and step."""

    module: str
    scheduler: str
    config: dict[str, Any] = {}
    slots: int | None = None
    step: dict[str, Any] = {}
    setup: dict[str, Any] = {}


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, *args: Any, **kwargs: Any) -> None:
        assert name not in cases
        cases[name] = Case(*args, **kwargs)

    ddpm, ddim = ("ddpm", "DDPMScheduler"), ("ddim", "DDIMScheduler")
    for label, config in {
        "clip": LINEAR, "noclip": {**LINEAR, **NOCLIP}, "v": {**SD, **V}, "x0": {**SD, **X0},
        "large": {**LINEAR, "variance_type": "fixed_large"}, "cosine": {**COSINE, **V, **NOCLIP},
        "trailing": {**SD, "timestep_spacing": "trailing"}, "linspace": {**SD, "timestep_spacing": "linspace"},
        "zero-snr": {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "range-2": {**SD, "clip_sample_range": 2.0}, "sigmoid": {"beta_schedule": "sigmoid"},
        "clamp-by-threshold": {**SD, **NOCLIP, "thresholding": True, "sample_max_value": 1.0},
    }.items():  # fmt: skip
        add(f"ddpm-{label}", *ddpm, config, 1)
    add("ddpm-parallel", "ddpm_parallel", "DDPMParallelScheduler", SD, 1)
    add("ddpm-timesteps", *ddpm, SD, 1, {}, {"timesteps": [900, 700, 444, 100, 7]})
    for label, config, step in (
        ("clip", SD, {}),
        ("noclip", {**SD, **NOCLIP}, {}),
        ("eta", {**SD, **NOCLIP}, {"eta": 0.6}),
        ("clip-eta", SD, {"eta": 0.6}),
        ("rederived", SD, {"eta": 0.6, "use_clipped_model_output": True}),
        ("v", {**SD, **V, **NOCLIP}, {}),
        ("x0", {**SD, **X0}, {"eta": 1.0}),
        ("not-one", {**SD, **NOCLIP, "set_alpha_to_one": False, "steps_offset": 1}, {}),
        ("trailing", {**COSINE, **NOCLIP, "timestep_spacing": "trailing"}, {}),
        ("zero-snr", {**SD, **V, **NOCLIP, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    ):
        add(f"ddim-{label}", *ddim, config, 1, step)
    add("ddim-parallel", "ddim_parallel", "DDIMParallelScheduler", SD, 1)
    add("ddim-inverse", "ddim_inverse", "DDIMInverseScheduler", {**SD, **NOCLIP}, 1)
    add("ddim-cogvideox", "ddim_cogvideox", "CogVideoXDDIMScheduler", {**V, **NOCLIP}, 1)
    euler = ("euler_discrete", "EulerDiscreteScheduler")
    for label, config, step in (
        ("eps", SD, {}),
        ("churn", SD, {"s_churn": 4.0, "s_noise": 1.003}),
        ("v", {**SD, **V}, {}),
        ("x0", {**SD, **X0}, {}),
        ("karras", {**SD, "use_karras_sigmas": True}, {}),
        ("exponential", {**SD, "use_exponential_sigmas": True}, {}),
        ("beta", {**SD, "use_beta_sigmas": True}, {}),
        ("leading", {**SD, "timestep_spacing": "leading", "steps_offset": 1}, {}),
        ("trailing-min", {**SD, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, {}),
        ("continuous", {**SD, **V, "timestep_type": "continuous", "use_karras_sigmas": True}, {}),
        ("zero-snr", {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
        ("log-linear", {**SD, "interpolation_type": "log_linear"}, {}),
    ):
        add(f"euler-{label}", *euler, config, 1, step)
    add("euler-sigmas", *euler, SD, 1, {}, {"sigmas": [14.0, 6.0, 3.0, 1.2, 0.4]})
    for label, config in {"eps": SD, "v": {**SD, **V}, "trailing": {**SD, "timestep_spacing": "trailing"}}.items():
        add(f"euler-a-{label}", "euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", config, 1)
    for label, config in {
        "eps": SD, "v": {**SD, **V}, "karras": {**SD, "use_karras_sigmas": True}, "clip": {**SD, "clip_sample": True},
        "beta": {**SD, "use_beta_sigmas": True},
    }.items():  # fmt: skip
        add(f"heun-{label}", "heun_discrete", "HeunDiscreteScheduler", config, 2)
    multi = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
            kind = {"solver_order": order, "algorithm_type": algorithm}
            add(f"{algorithm}-{order}m", *multi, {**SD, **kind}, order)
    for label, config, slots in (
        ("heun", {"solver_type": "heun"}, 2),
        ("karras", {"use_karras_sigmas": True}, 2),
        ("exponential", {"use_exponential_sigmas": True}, 2),
        ("lu", {"use_lu_lambdas": True}, 2),
        ("min", {"final_sigmas_type": "sigma_min"}, 2),
        ("v-euler-last", {**V, "euler_at_final": True}, 2),
        ("x0-trailing", {**X0, "timestep_spacing": "trailing"}, 2),
        ("flow", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, 2),
        ("clamp", {"thresholding": True, "sample_max_value": 1.0}, 2),
        ("dpmsolver", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 2),
        ("sde-dpmsolver", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, 2),
    ):
        add(f"dpm-{label}", *multi, {**SD, **config}, slots)
    inverse = ("dpmsolver_multistep_inverse", "DPMSolverMultistepInverseScheduler")
    add("dpm-inverse", *inverse, SD, None)
    for order in (1, 2, 3):
        config = {**SD, "solver_order": order}
        add(f"dpm-singlestep-{order}", "dpmsolver_singlestep", "DPMSolverSinglestepScheduler", config, None)
        add(f"deis-{order}", "deis_multistep", "DEISMultistepScheduler", config, order)
        for kind in ("bh1", "bh2"):
            config = {**SD, "solver_order": order, "solver_type": kind, "final_sigmas_type": "sigma_min"}
            add(f"unipc-{order}-{kind}", "unipc_multistep", "UniPCMultistepScheduler", config, order + 1)
    add("unipc-2-zero", "unipc_multistep", "UniPCMultistepScheduler", SD, 3)
    config = {**SD, "disable_corrector": list(range(50))}
    add("unipc-2-predictor", "unipc_multistep", "UniPCMultistepScheduler", config, 2)
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    add("unipc-flow", "unipc_multistep", "UniPCMultistepScheduler", config, 3)
    config = {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"}
    add("unipc-eps", "unipc_multistep", "UniPCMultistepScheduler", config, 3)
    add("lms", "lms_discrete", "LMSDiscreteScheduler", SD, 4)
    add(
        "lms-2-v-karras",
        "lms_discrete",
        "LMSDiscreteScheduler",
        {**SD, **V, "use_karras_sigmas": True},
        2,
        {"order": 2},
    )
    add("plms", "pndm", "PNDMScheduler", {**SD, "skip_prk_steps": True}, 4)
    add("pndm", "pndm", "PNDMScheduler", SD, 5)
    add("ipndm", "ipndm", "IPNDMScheduler", {}, None)
    for name in ("KDPM2Discrete", "KDPM2AncestralDiscrete"):
        module = {"K": "k_dpm_2_discrete", "A": "k_dpm_2_ancestral_discrete"}["A" if "Ancestral" in name else "K"]
        short = {**SD, "num_train_timesteps": 200}  # these two take half a second to be made with 1000
        add(f"{module}-eps", module, f"{name}Scheduler", short, 2)
        add(f"{module}-v", module, f"{name}Scheduler", {**short, **V, "use_karras_sigmas": True}, 2)
    add("sa-solver", "sasolver", "SASolverScheduler", SD, None)
    add("sa-solver-1-1", "sasolver", "SASolverScheduler", {**SD, "predictor_order": 1, "corrector_order": 1}, None)
    add("lcm", "lcm", "LCMScheduler", {}, 1)
    add("tcd", "tcd", "TCDScheduler", {}, 1, {"eta": 0.3})
    flow = ("flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler")
    add("flow-euler", *flow, {"shift": 3.0}, 1)
    add("flow-euler-mu", *flow, {"use_dynamic_shifting": True}, 1, {}, {"mu": 0.8})
    add("flow-euler-stochastic", *flow, {"stochastic_sampling": True}, 1)
    add("flow-euler-karras", *flow, {"use_karras_sigmas": True}, 1)
    add("flow-heun", "flow_match_heun_discrete", "FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, 2)
    add("flow-lcm", "flow_match_lcm", "FlowMatchLCMScheduler", {}, 1)
    add(
        "ltx-rf",
        "ltx_euler_ancestral_rf",
        "LTXEulerAncestralRFScheduler",
        {},
        1,
        {},
        {"sigmas": [1.0, 0.8, 0.5, 0.2, 0.0]},
    )
    add("edm-euler", "edm_euler", "EDMEulerScheduler", {}, 1)
    add("edm-euler-churn", "edm_euler", "EDMEulerScheduler", {"prediction_type": "v_prediction"}, 1, {"s_churn": 3.0})
    add("edm-dpmpp-2m", "edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler", {}, 2)
    config = {"algorithm_type": "sde-dpmsolver++", "sigma_schedule": "exponential"}
    add("edm-sde-2m", "edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler", config, 2)
    add("edm-dpmpp-3m", "edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler", {"solver_order": 3}, 3)
    add("sde", "dpmsolver_sde", "DPMSolverSDEScheduler", SD, 2)
    add("sde-v-karras", "dpmsolver_sde", "DPMSolverSDEScheduler", {**SD, **V, "use_karras_sigmas": True}, 2)
    add("cosine-dpm", "cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler", {}, 2)
    add("cosine-dpm-eps", "cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler",
        {"solver_order": 1, "prediction_type": "epsilon"}, 1)  # fmt: skip
    add("wuerstchen", "ddpm_wuerstchen", "DDPMWuerstchenScheduler", {}, 1)
    add("wuerstchen-scaled", "ddpm_wuerstchen", "DDPMWuerstchenScheduler", {"scaler": 2.0, "s": 0.01}, 1)
    add("scm", "scm", "SCMScheduler", {}, 1, {}, {"intermediate_timesteps": None})
    add("unclip", "unclip", "UnCLIPScheduler", {}, 1)
    add("flow-map", "flow_map_euler_discrete", "FlowMapEulerDiscreteScheduler", {}, 1)
    add("consistency", "consistency_models", "CMStochasticIterativeScheduler", {"clip_denoised": False}, 1)
    add("consistency-clip", "consistency_models", "CMStochasticIterativeScheduler", {}, 1)
    return cases


CASES = _cases()

SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-9


def normals(count=90, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(count)]


def model(x, t):
    time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(1.3 * x + time / 1000)


def run(plan, x_T, pool, edit=None):
    source = iter(pool)
    return reference_sample(model, plan, x_T, lambda k, like: next(source), edit=edit)


def far(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def increments(draw):
    """A noise sampler over one Brownian path: of two draws that begin together the second contains the first."""
    last = []

    def noise(start, end):
        start, length = float(start), abs(float(start) - float(end))
        if last and last[0] == start:
            _, first, n = last
            share = first / length
            last.clear()
            return math.sqrt(share) * n + math.sqrt(1 - share) * draw()
        last[:] = start, length, draw()
        return last[2]

    return noise


def response(plan):
    """The states' coefficients on (x_T, the model's outputs, the noise): [N + 1, 1 + 2 N], whatever the slots are."""
    n = plan.nfe
    state, out = np.zeros((plan.slots, 1 + 2 * n)), []
    state[0, 0] = 1
    for k in range(n):
        out.append(state[0])
        m, z = np.eye(1, 1 + 2 * n, 1 + k)[0], np.eye(1, 1 + 2 * n, 1 + n + k)[0]
        p = plan.c_skip[k] * state[0] + plan.c_out[k] * m
        state = plan.A[k] @ state + np.outer(plan.b[k], p) + np.outer(plan.d[k], m) + np.outer(plan.s[k], z)
    return np.array([*out, state[0]])


class Table:
    """A scheduler that is a random table: r slots, noise in two of them, draws without effect before and after."""

    def __init__(self, r, steps, seed, unused=(0, 0)):
        draw = np.random.default_rng(seed)
        self.A, self.d = draw.normal(size=(steps, r, r)) * 0.6, draw.normal(size=(steps, r))
        self.s = draw.normal(size=(steps, r)) * (np.arange(r) < 2)
        self.A[0, :, 1:] = 0
        self.unused, self.timesteps, self.init_noise_sigma = unused, torch.arange(steps, 0, -1), 3.0

    def set_timesteps(self, steps):
        assert steps == len(self.A)
        self.k, self.kept = 0, []

    def scale_model_input(self, x, t):
        return x / (1 + 0.1 * float(t))

    def step(self, m, t, x):
        A, d, s = self.A[self.k], self.d[self.k], self.s[self.k]
        for _ in range(self.unused[0]):
            torch.randn_like(x)
        n = torch.randn(x.shape)
        for _ in range(self.unused[1]):
            torch.empty_like(x).normal_()
        slots = [x, *(self.kept or [torch.zeros_like(x)] * (len(A) - 1))]
        new = [
            sum(a * y for a, y in zip(row, slots, strict=True)) + c * m + e * n
            for row, c, e in zip(A, d, s, strict=True)
        ]
        self.k, self.kept = self.k + 1, new[1:]
        return (new[0],)


def tuple_sampler(model, x, sigmas, **kwargs):
    """Noise before the first call, one slot, torch's own draws."""
    for sigma in sigmas[:-1]:
        x = x + torch.randn_like(x) * sigma * 0.1
        x = 0.3 * x + 0.6 * model(x, sigma * x.new_ones([x.shape[0]]), **kwargs)
    return x, "done"


def shipped(case):
    return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{case.module}"), case.scheduler)
