"""Stochastic and few-step solvers against the samplers people use: diffusers in float64 and fp32, k-diffusion."""

from __future__ import annotations

import functools
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


@functools.cache
def k_diffusion() -> types.ModuleType:
    """k-diffusion's sampling module alone: the package's other requirements are not needed here."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        pytest.skip("k-diffusion is not installed")
    root = Path(spec.origin).parent
    package, utils = types.ModuleType("kd_only"), types.ModuleType("kd_only.utils")
    package.__path__, package.utils = [str(root)], utils
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    for name in ("torchsde", "torchdiffeq"):  # imported there, not used by the samplers compared
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].odeint = None
    sys.modules.update({"kd_only": package, "kd_only.utils": utils})
    at = importlib.util.spec_from_file_location("kd_only.sampling", root / "sampling.py")
    module = importlib.util.module_from_spec(at)
    sys.modules["kd_only.sampling"] = module
    at.loader.exec_module(module)
    return module


def net(x: Tensor, t: Any) -> Tensor:
    """A denoiser for sigma up to 80."""
    sigma = (t if isinstance(t, Tensor) else torch.tensor(t)).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x / (1 + sigma) + 0.2 * torch.log(sigma))


def against_k_diffusion(
    plan: Plan, sampler: str, noise: list[Tensor], options: dict[str, Any], draw: Callable[..., Tensor] | None = None
) -> None:
    kd, sigmas = k_diffusion(), torch.from_numpy(np.append(S.EDM().sigma(np.linspace(1, 0, 12)), 0.0))
    x_T = pool_of(1, 1)[0] * 80

    def run(dtype: torch.dtype) -> Tensor:
        source = iter(noise)
        pick = (lambda a, b: next(source).to(dtype)) if draw is None else draw(source, dtype)
        return getattr(kd, sampler)(net, x_T.to(dtype), sigmas.to(dtype), noise_sampler=pick, disable=True, **options)

    exact, theirs = run(torch.float64), run(torch.float32)
    reference, ours = both(plan, x_T, noise, net)
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5
    assert far(ours, theirs) <= far(theirs, exact) + 1e-5


@pytest.mark.parametrize(
    ("solver", "sampler", "native", "theirs"),
    [
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"kind": "heun", "eta": 0.5}, {"solver_type": "heun", "eta": 0.5}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"eta": 0.0}, {"eta": 0.0}),
        ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"s_noise": 1.1, "eta": 1.3}, {"s_noise": 1.1, "eta": 1.3}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}, {}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.0}, {"eta": 0.0}),
        ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.6, "s_noise": 0.9}),
    ],
)
def test_equals_k_diffusion(solver: str, sampler: str, native: dict[str, Any], theirs: dict[str, Any]) -> None:
    if solver == "dpmpp_2m_sde":
        native = {"lower_order_final": False, **native}
    plan = getattr(solvers, solver)(S.EDM(), 12, prediction="x0", **native)
    against_k_diffusion(plan, sampler, pool_of(12), theirs)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 1.2}, {"eta": 0.0}, {"eta": 2.0}, {"r": 0.3}])
def test_dpmpp_sde_equals_k_diffusion(options: dict[str, Any]) -> None:
    """Their tree gives increments of one path in sigma: w over the step shares w over its first part."""
    plan = solvers.dpmpp_sde(S.EDM(), 12, prediction="x0", **options)

    def tree(source: Iterator[Tensor], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        part: list[tuple[float, Tensor]] = []

        def noise(start: Tensor, end: Tensor) -> Tensor:
            length = float(start.double() - end.double())
            if not part:
                part.append((length, next(source).to(dtype)))
                return part[0][1]
            first, n = part.pop()
            share = first / length
            return math.sqrt(share) * n + math.sqrt(1 - share) * next(source).to(dtype)

        return noise

    noise = pool_of(24) if plan.stochastic else []
    if not plan.stochastic:
        tree = lambda source, dtype: lambda a, b: torch.zeros(SHAPE, dtype=dtype)  # noqa: E731
    against_k_diffusion(plan, "sample_dpmpp_sde", noise, options, tree)


CHURN = [
    {},
    {"s_churn": 20.0},
    {"s_churn": 20.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
    {"s_churn": 1e3, "s_max": 10.0},
]


@pytest.mark.parametrize("options", CHURN, ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_churn_equals_k_diffusion(options: dict[str, float], order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws in the same order, the first step's included: noise given, and torch's own stream."""
    kd, steps = k_diffusion(), 12
    sampler = kd.sample_heun if order == 2 else kd.sample_euler
    keys = {"s_min": "s_tmin", "s_max": "s_tmax"}
    theirs = {keys.get(k, k): v for k, v in options.items()}
    sigmas = torch.from_numpy(np.append(S.EDM().sigma(np.linspace(1, 0, steps)), 0.0))
    plan = solvers.edm_stochastic(S.EDM(), steps, prediction="x0", order=order, **options)
    noise, start = pool_of(steps), pool_of(1, 1)[0]
    assert int(plan.draws.sum()) + (plan.init_noise > 0) == steps

    def run(dtype: torch.dtype) -> Tensor:
        source = iter(noise)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: next(source).to(x.dtype))
            return sampler(net, 80 * start.to(dtype), sigmas.to(dtype), disable=True, **theirs)

    exact, stock = run(torch.float64), run(torch.float32)
    x_T, rest = 80 * start.double(), noise
    if plan.init_noise:
        x_T, rest = x_T + plan.init_noise * noise[0].double(), noise[1:]
    first, second = iter(rest), iter(rest)
    reference = reference_sample(net, plan, x_T, lambda k, like: next(first).double())
    ours = fd.sample(net, plan, SHAPE, x_T=x_T.float(), noise=lambda k, like: next(second))
    assert far(reference, exact) <= 1e-12
    assert far(ours, exact) <= 1e-5
    assert far(ours, stock) <= far(stock, exact) + 1e-5

    torch.manual_seed(7)
    stock = sampler(net, 80 * torch.randn(SHAPE), sigmas.float(), disable=True, **theirs)
    ours = fd.sample(net, plan, SHAPE, noise="torch", generator=torch.Generator().manual_seed(7))
    assert far(ours, stock) <= 2e-5


def test_churn_without_churn_is_heun_and_euler() -> None:
    for schedule in (S.VP(), S.EDM(), CHAIN):
        for order, name in ((2, "heun"), (1, "euler")):
            ours, plain = (f(schedule, 9, **o) for f, o in
                           ((solvers.edm_stochastic, {"order": order}), (getattr(solvers, name), {})))  # fmt: skip
            for v in ("A", "b", "times", "c_out"):
                np.testing.assert_allclose(getattr(ours, v), getattr(plain, v), rtol=1e-11, atol=1e-12)


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
