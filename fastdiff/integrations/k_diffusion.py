"""k-diffusion's samplers with its signatures, callbacks and noise: one row of a plan a model call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff import solvers
from fastdiff.integrations.brownian import BrownianTreeNoiseSampler
from fastdiff.integrations.flow_ancestral import flow_ancestral
from fastdiff.integrations.levels import Loop, Maker, checked, churned, philox
from fastdiff.plan import Plan
from fastdiff.schedules import EDM, Flow, Schedule

__all__ = [
    "SAMPLERS",
    "BrownianTreeNoiseSampler",
    "flow",
    "maker",
    "philox",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]

NEARLY = 1 - 1e-9
Model = Callable[..., Tensor]
Extra = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
Sampler = Callable[[Any, Any], Tensor] | None
_comfyui: ContextVar[bool | None] = ContextVar("fastdiff_k_diffusion_comfyui", default=None)  # inside: is it a flow?


@contextmanager
def flow(on: bool = True) -> Iterator[None]:
    """Inside, x = (1 - sigma) x0 + sigma n (Flux, SD3), where k-diffusion knows x = x0 + sigma n alone.

    The samplers of the ODE in sigma are the same; those with noise take alpha = 1 - sigma, as ComfyUI's do. Also with
    on=False, for its other models, noise is asked for at the sigmas themselves, as ComfyUI asks, not at exp(ln sigma).
    """
    token = _comfyui.set(on)
    try:
        yield
    finally:
        _comfyui.reset(token)


def maker(
    solver: Callable[..., Plan], s_noise: float = 1.0, *, of_alpha: bool = False, ancestral: str = "", **options: Any
) -> Maker:
    """sigmas -> the plan of a denoiser model from the first to the last of them.

    Inside `flow`: of_alpha, the solver's formula on a flow's alpha; ancestral, a kind of `flow_ancestral` in its place.
    """
    of_flow = bool(_comfyui.get())
    if of_flow and ancestral:
        eta = options["eta"]
        return lambda sigmas: flow_ancestral(ancestral, sigmas, eta, s_noise)
    on_flow = of_flow and of_alpha

    def make(sigmas: np.ndarray) -> Plan:
        clean = sigmas[-1] == 0
        levels = sigmas[:-1] if clean else sigmas
        top = float(levels[0])
        # eta > 1 takes the middle of a step below the last level
        of: Schedule = Flow() if on_flow else EDM(0.0, top)
        ends = {"final": "zero"} if clean else {"final": "min"}
        plan = solver(of, len(sigmas) - 1, prediction="x0", sigmas=levels, **ends, **options)
        return plan if s_noise == 1 else replace(plan, s=s_noise * plan.s)

    return make


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler steps, with churn (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

    Args, as for every sampler here: model: denoiser(x, sigma [B], **extra_args) -> x0; x: noise times sigmas[0];
        sigmas: [n + 1], decreasing, as a rule ending in 0; callback: called with x, i, sigma, sigma_hat, denoised;
        disable: no progress bar.
    Returns: the sample, x's shape and dtype.   Raises: ValueError: sigmas that rise, repeat or are not finite.
    """
    hat = checked(sigmas), s_churn, s_tmin, s_tmax
    return churned(maker(solvers.euler), 1, hat, s_noise, model, x, sigmas, extra_args, callback, disable)


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun steps, with churn (Karras et al. 2022, algorithm 2)."""
    hat = checked(sigmas), s_churn, s_tmin, s_tmax
    return churned(maker(solvers.heun), 2, hat, s_noise, model, x, sigmas, extra_args, callback, disable)


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 steps with a geometric midpoint, with churn."""
    hat = checked(sigmas), s_churn, s_tmin, s_tmax
    return churned(maker(solvers.dpm2), 2, hat, s_noise, model, x, sigmas, extra_args, callback, disable)


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep in sigma, up to four derivatives, their polynomial integrated exactly."""
    loop = Loop(maker(solvers.lms, order=order), 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable)


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M)."""
    make = maker(solvers.dpmpp_2m, lower_order_final=False)
    return Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args).run(callback, disable)


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """Euler steps to sigma_down, then noise up to the next sigma."""
    make = maker(solvers.euler_ancestral, s_noise, ancestral="euler_ancestral", eta=eta)
    loop = Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler))


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 steps to sigma_down, then noise up to the next sigma."""
    make = maker(solvers.dpm2_ancestral, s_noise, ancestral="dpm_2_ancestral", eta=eta)
    loop = Loop(make, 2, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler))


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) steps to sigma_down, then noise up to the next sigma."""
    make = maker(solvers.dpmpp_2s_ancestral, s_noise, ancestral="dpmpp_2s_ancestral", eta=eta)
    loop = Loop(make, 2, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler))


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
    r: float = 1 / 2,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE: two calls a step, two increments of one Brownian path."""
    # at r = 1 itself the second draw has no row of its own, and a noise_sampler need not repeat the first
    make = maker(solvers.dpmpp_sde, of_alpha=True, eta=eta, s_noise=s_noise, r=NEARLY if r == 1 else r)
    loop = Loop(make, 2, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(
        callback, disable, loop.twice(noise_sampler, r, flow=bool(_comfyui.get()), exact=_comfyui.get() is not None)
    )


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
    solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE; solver_type: "midpoint" or "heun"."""
    if solver_type not in ("heun", "midpoint"):
        raise ValueError(f"solver_type must be 'heun' or 'midpoint', got {solver_type!r}")
    options: dict[str, Any] = {"eta": eta, "kind": solver_type, "lower_order_final": False}
    make = maker(solvers.dpmpp_2m_sde, s_noise, of_alpha=True, **options)
    loop = Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler, tree=True, used=eta != 0))


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) for the SDE."""
    make = maker(solvers.dpmpp_3m_sde, of_alpha=True, eta=eta, s_noise=s_noise)
    loop = Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler, tree=True, used=eta != 0))


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    name.removeprefix("sample_"): value for name, value in list(globals().items()) if name.startswith("sample_")
}
