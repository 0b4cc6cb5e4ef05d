"""A ComfyUI custom node: this library's samplers for SamplerCustom.

Put a file into ComfyUI/custom_nodes with the line

    from fastdiff.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

and a node "fastdiff sampler" appears under sampling/custom_sampling/samplers. comfy is imported when a node runs.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import Tensor

from fastdiff.integrations.comfyui_samplers import SAMPLERS
from fastdiff.integrations.k_diffusion import flow, philox

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "FastdiffSampler", "sampler_function"]

SEED = 1 << 63
ON_A_TREE = ("dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde")  # whose noise ComfyUI draws from a Brownian tree
IN_LOGSNR = (*ON_A_TREE, "er_sde", "seeds_2", "seeds_3")  # which need a finite logSNR where they start
FIRST = 1e-4  # of the way down: where they start in place of sigma = 1


def sampler_function(name: str, *, noise: str = "philox") -> Any:
    """A function as comfy.samplers.KSAMPLER calls it: (model, noise, sigmas, extra_args, callback, disable, **options).

    Args: name: one of SAMPLERS. noise: "philox" (seeded by extra_args["seed"]; a picture does not depend on its batch)
        or "stock" (what the ComfyUI that runs draws itself, seeded as its own samplers).
    Returns: the function. Options that the sampler does not know are refused by it; sigmas of one level or none return
        the noise as it came.
    Raises: ValueError: an unknown name or noise.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; valid: {', '.join(SAMPLERS)}")
    if noise not in ("philox", "stock"):
        raise ValueError(f"unknown noise {noise!r}; valid: philox, stock")
    sampler = SAMPLERS[name]
    takes_noise = "noise_sampler" in inspect.signature(sampler).parameters

    def sample(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None, callback: Any = None,
        disable: bool | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        if len(sigmas) <= 1:
            return x
        seed, sampling = (extra_args or {}).get("seed"), _sampling(model)
        of_flow = _is_flow(sampling)
        if noise == "stock" and takes_noise and options.get("noise_sampler") is None:
            options["noise_sampler"] = _stock(name, x, sigmas, seed)
        if takes_noise and (name in IN_LOGSNR or of_flow) and hasattr(sampling, "noise_scale"):
            options["s_noise"] = options.get("s_noise", 1.0) * sampling.noise_scale
        if of_flow and name in IN_LOGSNR and sigmas[0] >= 1:
            sigmas = sigmas.clone()
            sigmas[0] = sampling.percent_to_sigma(FIRST)
        with contextlib.ExitStack() as inside:
            inside.enter_context(flow(of_flow))
            if noise == "philox" and options.get("noise_sampler") is None:
                inside.enter_context(philox(int(seed or 0) % SEED))
            return sampler(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    sample.__name__ = f"sample_{name}"
    return sample


def _sampling(model: Any) -> Any:
    """ComfyUI's object that says what its model predicts; None elsewhere."""
    guider = getattr(model, "inner_model", None)
    patcher = getattr(guider, "model_patcher", None)
    if patcher is not None:
        return patcher.get_model_object("model_sampling")
    return getattr(getattr(guider, "inner_model", None), "model_sampling", None)


def _is_flow(sampling: object) -> bool:
    """Is x = (1 - sigma) x0 + sigma n? ComfyUI says so by a class, CONST."""
    try:
        from comfy.model_sampling import CONST  # type: ignore[import-not-found]
    except ImportError:
        return False
    return isinstance(sampling, CONST)


def _stock(name: str, x: Tensor, sigmas: Tensor, seed: int | None) -> Any:
    """What the ComfyUI that runs would draw from; None, which is k-diffusion's, where there is no such module."""
    try:
        from comfy.k_diffusion import sampling  # type: ignore[import-not-found]
    except ImportError:
        return None
    if name in ON_A_TREE:
        return sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seed, cpu=True)
    default = sampling.default_noise_sampler
    return default(x, seed=seed) if "seed" in inspect.signature(default).parameters else default(x)


class FastdiffSampler:
    """The node: a sampler by name, its noise, and what the stochastic ones take."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        number = {"min": 0.0, "max": 100.0, "step": 0.01, "round": False}
        return {
            "required": {
                "sampler": (list(SAMPLERS),),
                "noise": (["philox", "stock"],),
                "eta": ("FLOAT", {"default": 1.0, **number}),
                "s_churn": ("FLOAT", {"default": 0.0, **number}),
                "s_noise": ("FLOAT", {"default": 1.0, **number}),
            }
        }

    def get_sampler(self, sampler: str, noise: str, eta: float, s_churn: float, s_noise: float) -> tuple[Any]:
        """(KSAMPLER,): options that the sampler does not take are left out."""
        import comfy.samplers  # type: ignore[import-not-found]

        given = {"eta": eta, "s_churn": s_churn, "s_noise": s_noise}
        taken = inspect.signature(SAMPLERS[sampler]).parameters if sampler in SAMPLERS else {}
        options = {name: value for name, value in given.items() if name in taken}
        return (comfy.samplers.KSAMPLER(sampler_function(sampler, noise=noise), extra_options=options),)


NODE_CLASS_MAPPINGS = {"FastdiffSampler": FastdiffSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"FastdiffSampler": "fastdiff sampler"}
