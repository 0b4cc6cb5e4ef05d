"""diffusers' and k-diffusion's multistep and two-stage samplers against the native plans, whole loops."""

from __future__ import annotations

import importlib
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.reference import reference_sample

pytest.importorskip("diffusers")
from tests.test_parity import BETAS, PREDICTIONS, SHAPE, Case, lifted, model, stock  # noqa: E402
from tests.test_stochastic_kd import k_diffusion  # noqa: E402

# stock's own use of NumPy, and its farewell to "dpmsolver"
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

MULTI = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
SINGLE = ("dpmsolver_singlestep", "DPMSolverSinglestepScheduler")
UNIPC, DEIS = ("unipc_multistep", "UniPCMultistepScheduler"), ("deis_multistep", "DEISMultistepScheduler")
LMS, PNDM = ("lms_discrete", "LMSDiscreteScheduler"), ("pndm", "PNDMScheduler")
KDPM2 = ("k_dpm_2_discrete", "KDPM2DiscreteScheduler")
KDPM2A = ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler")
CLIP = {"thresholding": True, "sample_max_value": 1.0}
NATIVE_CLIP = {"clip": (-1.0, 1.0)}
CASES = {
    "3m": Case(*MULTI, "dpmpp_3m", {"solver_order": 3}, {}, {}),
    "3m-min": Case(*MULTI, "dpmpp_3m", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {}, {"final": "min"}),
    "3m-clip": Case(*MULTI, "dpmpp_3m", {"solver_order": 3, **CLIP}, {}, NATIVE_CLIP),
    # with v, stock PNDM extrapolates v itself: not the paper's eps, and not exact for a constant x0
    "plms": Case(*PNDM, "plms", {"skip_prk_steps": True, "set_alpha_to_one": True}, {}, {}, predictions=("eps",)),
    "plms-prk": Case(
        *PNDM, "plms", {"skip_prk_steps": False, "set_alpha_to_one": True}, {}, {"prk": True}, predictions=("eps",)
    ),
    "dpm2": Case(*KDPM2, "dpm2", {}, {}, {}, scaled=True, predictions=("eps", "v")),
    "dpm2_ancestral": Case(*KDPM2A, "dpm2_ancestral", {}, {}, {}, scaled=True, predictions=("eps", "v")),
}
for algorithm in ("dpmsolver++", "dpmsolver"):
    for order in (1, 2, 3):
        for kind in ("midpoint", "heun"):
            config = {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind}
            native = {"order": order, "algorithm": algorithm, "solver_type": kind}
            last: dict[str, Any] = {} if algorithm == "dpmsolver++" else {"final_sigmas_type": "sigma_min"}
            end: dict[str, Any] = {} if algorithm == "dpmsolver++" else {"final": "min"}
            multi, single = {**native, "kind": "multistep", **end}, {**native, "nodes": "grid", **end}
            CASES[f"multi-{algorithm}-{order}-{kind}"] = Case(*MULTI, "dpm_solver", {**config, **last}, {}, multi)
            CASES[f"single-{algorithm}-{order}-{kind}"] = Case(
                *SINGLE, "dpm_solver", {**config, **last, "lower_order_final": True}, {}, single
            )
for order in (1, 2, 3):
    for bh in ("bh1", "bh2"):
        native = {"order": order, "bh": bh}
        CASES[f"unipc-{order}-{bh}"] = Case(
            *UNIPC, "unipc", {"solver_order": order, "solver_type": bh, "final_sigmas_type": "sigma_min"}, {},
            {**native, "final": "min"},
        )  # fmt: skip
    CASES[f"unipc-{order}-zero"] = Case(*UNIPC, "unipc", {"solver_order": order}, {}, {"order": order})
    CASES[f"unipc-{order}-clip"] = Case(
        *UNIPC, "unipc", {"solver_order": order, **CLIP}, {}, {"order": order, **NATIVE_CLIP}
    )
    CASES[f"deis-{order}"] = Case(*DEIS, "deis", {"solver_order": order}, {}, {"order": order, "final": "min"})
CASES["unipc-predictor"] = Case(
    *UNIPC, "unipc", {"solver_order": 3, "disable_corrector": list(range(40))}, {}, {"order": 3, "corrector": False}
)
for order in (1, 2, 3, 4):
    CASES[f"lms-{order}"] = Case(*LMS, "lms", {}, {"order": order}, {"order": order}, scaled=True)


def singlestep(module: types.ModuleType) -> types.ModuleType:
    """The singlestep scheduler knows one spacing, and no option for it."""
    shim = types.ModuleType(module.__name__)
    shim.DPMSolverSinglestepScheduler = (  # type: ignore[attr-defined]
        lambda timestep_spacing, **config: module.DPMSolverSinglestepScheduler(**config)
    )
    return shim


def linspace(steps: int, final: str) -> np.ndarray:
    t = np.linspace(999, 0, steps + 1).round()
    return t if final == "min" else t[:-1]


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name: str, betas: str) -> None:
    case = CASES[name]
    shipped, double = importlib.import_module(f"diffusers.schedulers.scheduling_{case.module}"), lifted(case.module)
    original = getattr(shipped, "randn_tensor", None)
    alone = case.scheduler == SINGLE[1]
    modules = [singlestep(m) if alone else m for m in (shipped, double)]
    table = BETAS[betas]
    draw = torch.Generator().manual_seed(0)
    pool = [torch.randn(SHAPE, generator=draw) for _ in range(80)]
    for steps in (20, 10) if betas == "linear" else (20,):
        for prediction in case.predictions:
            config = {**table[0], "prediction_type": PREDICTIONS[prediction]}
            own = {"spacing": linspace(steps, case.native.get("final", "zero"))} if alone else {}
            plan = getattr(solvers, case.solver)(S.Betas(table[1]), steps, prediction=prediction, **case.native, **own)
            x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * plan.init_scale
            torch.set_default_dtype(torch.float64)
            try:
                exact = stock(case, modules[1], config, steps, x_T.double(), iter(pool))
            finally:
                torch.set_default_dtype(torch.float32)
            try:
                theirs = stock(case, modules[0], config, steps, x_T.clone(), iter(pool))
            finally:
                shipped.randn_tensor = original  # type: ignore[attr-defined]
            source = iter(pool)
            reference = reference_sample(model, plan, x_T.double(), lambda k, like, s=source: next(s).double())
            source = iter(pool)
            ours = fd.sample(model, plan, SHAPE, x_T=x_T, noise=lambda k, like, s=source: next(s), mode="eager")
            assert far(reference, exact) <= 1e-12, (steps, prediction)
            # ten steps of a method on eps amplify rounding: then closer than stock
            assert far(ours, exact) <= max(2e-6, far(theirs, exact)), (steps, prediction)
            assert far(ours, theirs) <= far(theirs, exact) + 2e-6, (steps, prediction)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_under_outside_edits(order: int) -> None:
    """keep_start: a callback that replaces x between the rows does to the plan what it does to the scheduler."""

    def edit(k: int, x: Tensor) -> Tensor:
        return torch.where(torch.arange(SHAPE[-1]) < 4, 0.9 * x - 0.1 * k, x)

    torch.set_default_dtype(torch.float64)
    try:
        scheduler = lifted(UNIPC[0]).UniPCMultistepScheduler(
            solver_order=order, timestep_spacing="trailing", **BETAS["linear"][0]
        )
        scheduler.set_timesteps(12)
        x = x_T = torch.randn(SHAPE)
        for k, t in enumerate(scheduler.timesteps):
            x = edit(k, scheduler.step(model(x, t), t, x, return_dict=False)[0])
    finally:
        torch.set_default_dtype(torch.float32)

    def run(keep_start: bool, edited: bool) -> Tensor:
        plan = solvers.unipc(S.Betas(BETAS["linear"][1]), 12, order=order, keep_start=keep_start)
        none = lambda k, like: torch.zeros_like(like)  # noqa: E731
        return reference_sample(model, plan, x_T, none, edit=edit if edited else None)

    assert far(run(True, True), x) <= 1e-12
    assert far(run(False, True), x) >= 1e-3
    assert far(run(True, False), run(False, False)) <= 1e-13


@pytest.mark.parametrize(
    ("stock_name", "config", "solver", "native"),
    [
        (MULTI, {"solver_order": 2}, "dpmpp_2m", {}),
        (MULTI, {"solver_order": 3}, "dpmpp_3m", {}),
        (UNIPC, {"solver_order": 3}, "unipc", {"order": 3}),
        (UNIPC, {"solver_order": 2}, "unipc", {}),
        (DEIS, {"solver_order": 3}, "deis", {"order": 3, "final": "min"}),
    ],
    ids=["2m", "3m", "unipc3", "unipc2", "deis3"],
)
def test_flow_equals_diffusers(
    stock_name: tuple[str, str], config: dict[str, Any], solver: str, native: dict[str, Any]
) -> None:
    """Rectified flow at the levels diffusers says it takes; the model sees no time, as theirs is an integer."""
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = getattr(lifted(stock_name[0]), stock_name[1])(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **config
        )
        scheduler.set_timesteps(20)
        levels = scheduler.sigmas.numpy().astype(np.float64)
        levels = levels if native.get("final") == "min" else levels[:-1]
        x = x_T = torch.randn(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(1.3 * x), t, x, return_dict=False)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    plan = getattr(solvers, solver)(S.Flow(3.0), 20, prediction="flow", sigmas=levels, **native)
    got = reference_sample(lambda x, t: torch.tanh(1.3 * x), plan, x_T, lambda k, like: torch.zeros_like(like))
    np.testing.assert_allclose(plan.sigma, levels[: plan.nfe], rtol=1e-12)
    assert far(got, x) <= 1e-9


class Sine(S.Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the schedule of diffusers' IPNDM."""

    def alpha(self, t: Any) -> Any:
        return np.cos(0.5 * math.pi * self._time(t))

    def sigma(self, t: Any) -> Any:
        return np.sin(0.5 * math.pi * self._time(t))

    def drift(self, t: Any) -> Any:
        raise NotImplementedError

    def diffusion2(self, t: Any) -> Any:
        raise NotImplementedError

    def t_of(self, logsnr: Any) -> Any:
        return np.arctan2(1.0, np.exp(0.5 * np.asarray(logsnr))) * 2 / math.pi


def test_ipndm_equals_diffusers() -> None:
    """From t = 0.98: at its own start, t = 1, stock IPNDM loses the x0 of the first prediction (0 / 1e-8 = 0)."""
    module, t = lifted("ipndm"), np.linspace(0.98, 0, 21)
    torch.set_default_dtype(torch.float64)
    try:
        # its state is float32 betas; "trained_betas" is read as the sigma of every point
        scheduler = module.IPNDMScheduler(trained_betas=list(np.sin(0.5 * math.pi * t)))
        scheduler.set_timesteps(20)
        plan = solvers.ipndm(Sine(), 20, prediction="v", spacing=t[:-1])
        x = x_T = torch.randn(SHAPE) * plan.init_scale
        for now in scheduler.timesteps:
            x = scheduler.step(model(x, now), now, x, return_dict=False)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    got = reference_sample(model, plan, x_T, lambda k, like: torch.zeros_like(like))
    assert far(got, x) <= 1e-12


K_CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "dpm2": ("sample_dpm_2", "dpm2", {}, {}),
    "dpm2_ancestral": ("sample_dpm_2_ancestral", "dpm2_ancestral", {"eta": 0.8, "s_noise": 1.1}, {"eta": 0.8}),
    "2s": ("sample_dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 1.0}, {"eta": 1.0}),
    "2s-ode": ("sample_dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.0}, {"eta": 0.0}),
    # its second row integrates the line exactly
    "3m": (
        "sample_dpmpp_3m_sde",
        "dpm_solver",
        {"eta": 0.0},
        {"order": 3, "kind": "multistep", "solver_type": "heun", "lower_order_final": False},
    ),
    **{f"lms-{k}": ("sample_lms", "lms", {"order": k}, {"order": k}) for k in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", K_CASES)
def test_equals_k_diffusion(name: str) -> None:
    sampling = k_diffusion()
    theirs, ours, config, native = K_CASES[name]
    if "s_noise" in config:
        native = {**native, "s_noise": config["s_noise"]}
    schedule = S.EDM(0.02, 20.0)
    sigmas = torch.tensor(np.append(schedule.sigma(np.linspace(1, 0, 12)), 0.0))
    plan = getattr(solvers, ours)(schedule, 12, prediction="x0", **native)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 20
    pool = torch.randn(30, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if "eta" in config:
        draws = iter(pool)
        config = {**config, "noise_sampler": lambda *between: next(draws)}
    want = getattr(sampling, theirs)(model, x, sigmas, disable=True, **config)
    draws = iter(pool)
    got = reference_sample(model, plan, x, lambda k, like: next(draws))
    assert far(got, want) <= 1e-12


def constant(x0: float, prediction: str, scheduler: Any) -> Any:
    """The model whose x0 is a constant, for a stock scheduler of betas."""

    def model(x: Tensor, t: Any) -> Tensor:
        bar = scheduler.alphas_cumprod[int(t)].double()
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        return eps if prediction == "eps" else bar.sqrt() * eps - (1 - bar).sqrt() * x0

    return model


def stock_end(module: str, scheduler: str, prediction: str, steps: int, **config: Any) -> Tensor:
    made = getattr(lifted(module), scheduler)(
        timestep_spacing="trailing", prediction_type=PREDICTIONS[prediction], **BETAS["linear"][0], **config
    )
    made.set_timesteps(steps)
    x, says = torch.ones(SHAPE, dtype=torch.float64), constant(0.4, prediction, made)
    for t in made.timesteps:
        x = made.step(says(x, t), t, x, return_dict=False)[0]
    return x


def test_where_stock_is_wrong() -> None:
    """What docs/differences.md says of diffusers, for a model whose x0 is 0.4: these ends should all be 0.4."""
    torch.set_default_dtype(torch.float64)
    try:
        pndm = {"skip_prk_steps": True, "set_alpha_to_one": True}
        assert float((stock_end(*PNDM, "eps", 20, **pndm) - 0.4).abs().max()) <= 1e-9
        assert float((stock_end(*PNDM, "v", 20, **pndm) - 0.4).abs().max()) >= 1e-3
        assert float((stock_end(*PNDM, "eps", 30, **pndm) - 0.4).abs().max()) >= 1e-4
        assert stock_end(*UNIPC, "eps", 20, solver_type="bh1").isnan().any()
        module = lifted("ipndm").IPNDMScheduler()
        module.set_timesteps(20)
        x = torch.ones(SHAPE)
        first = module.step(x * 0 - 0.4, module.timesteps[0], x, return_dict=False)[0]  # v = -x0 without signal
        s = math.sin(math.pi / 2 * 0.95) ** 2
        assert float((first - s).abs().max()) <= 1e-9  # it should be s + 0.4 sqrt(1 - s^2): 0.04 more
    finally:
        torch.set_default_dtype(torch.float32)
    for solver, own in (("plms", {}), ("unipc", {"bh": "bh1"}), ("ipndm", {})):
        for steps in (20, 30):
            plan = getattr(solvers, solver)(S.Betas(BETAS["linear"][1]), steps, prediction="v", **own)
            mean = torch.ones(SHAPE, dtype=torch.float64)
            rows = iter(range(plan.nfe))

            def says(x: Tensor, t: Tensor, plan: fd.Plan = plan, rows: Any = rows) -> Tensor:
                k = next(rows)
                return (0.4 - plan.c_skip[k] * x) / plan.c_out[k]

            end = reference_sample(says, plan, mean, lambda k, like: torch.zeros_like(like))
            assert float((end - 0.4).abs().max()) <= 1e-9
