"""Samplers that ComfyUI has beside k-diffusion's, by its names and signatures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import isfunction

import numpy as np
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion import Callback, Extra, Model, Sampler, maker
from fastdiff.integrations.levels import Loop, checked

__all__ = ["SAMPLERS", "sample_er_sde", "sample_gradient_estimation", "sample_ipndm", "sample_lcm",
           "sample_res_multistep", "sample_seeds_2", "sample_seeds_3"]  # fmt: skip

KINDS = {"phi_1": "midpoint", "phi_2": "heun"}


def sample_er_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: Sampler = None,
    noise_scaler: Callable[[Tensor], Tensor] | None = None, max_stage: int = 3,
) -> Tensor:  # fmt: skip
    """ER-SDE-Solver; noise_scaler: phi of a tensor of sigma / alpha; the integrals are exact, not sums of 200 terms."""
    given = "er" if noise_scaler is None else _scaler(noise_scaler) if isfunction(noise_scaler) else _g(noise_scaler)
    make = maker(solvers.er_sde, of_alpha=True, order=max_stage, scaler=given, s_noise=s_noise)
    loop = Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler, used=s_noise != 0))


def _g(phi: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """g = phi / rho of an array."""
    return lambda rho: phi(torch.from_numpy(np.array(rho))).double().numpy() / rho


_scaler = functools.lru_cache(16)(_g)  # one for one function, so that its plans are found again; an object may change


def sample_seeds_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
    solver_type: str = "phi_1",
) -> Tensor:  # fmt: skip
    """SEEDS-2 with its middle at r = 1/2; solver_type: "phi_1" or "phi_2"."""
    if solver_type not in KINDS:
        raise ValueError(f"solver_type must be 'phi_1' or 'phi_2', got {solver_type!r}")
    make = maker(solvers.seeds, of_alpha=True, order=2, eta=eta, s_noise=s_noise, kind=KINDS[solver_type])
    loop = Loop(make, 2, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.each(noise_sampler, used=eta > 0 and s_noise != 0))


def sample_seeds_3(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """SEEDS-3 with its stages at a third and two thirds of a step."""
    make = maker(solvers.seeds, of_alpha=True, order=3, eta=eta, s_noise=s_noise)
    loop = Loop(make, 3, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.each(noise_sampler, used=eta > 0 and s_noise != 0))


def sample_gradient_estimation(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, ge_gamma: float = 2.0,
) -> Tensor:  # fmt: skip
    """Euler's step with its derivative moved away from the one before."""
    make = maker(solvers.gradient_estimation, gamma=ge_gamma)
    return Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args).run(callback, disable)


def sample_ipndm(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, max_order: int = 4,
) -> Tensor:  # fmt: skip
    """iPNDM: Euler's step with Adams-Bashforth's derivative of equal steps."""
    make = maker(solvers.ipndm, order=max_order)
    return Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args).run(callback, disable)


def sample_lcm(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, noise_sampler: Sampler = None, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Latent consistency sampling: x0, noised again to the next level."""
    loop = Loop(maker(solvers.lcm, s_noise, of_alpha=True), 1, checked(sigmas), model, x, sigmas, extra_args)
    return loop.run(callback, disable, loop.once(noise_sampler))


def sample_res_multistep(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: Sampler = None,
) -> Tensor:  # fmt: skip
    """The exponential two-step method with the exact phi_2; it draws no noise."""
    make = maker(solvers.dpmpp_2m_sde, eta=0.0, kind="heun", lower_order_final=False)
    return Loop(make, 1, checked(sigmas), model, x, sigmas, extra_args).run(callback, disable)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    **k_diffusion.SAMPLERS,
    **{name.removeprefix("sample_"): value for name, value in list(globals().items()) if name.startswith("sample_")},
}
