"""diffusers' networks as the models that fd.Sampler runs: the whole denoising loop, compiled or as a CUDA graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Denoiser", "as_model", "flux_arguments"]

TIME = "timestep"


class Denoiser(nn.Module):
    """A diffusers network as model(x, t, **cond): see as_model."""

    def __init__(self, network: nn.Module, time_scale: float) -> None:
        super().__init__()
        names = [p for p in inspect.signature(network.forward).parameters if p != "self"]
        if not names or TIME not in names:
            raise TypeError(
                f"{type(network).__name__}.forward takes ({', '.join(names)}); as_model needs a network that takes a "
                f"sample first, and a {TIME}"
            )
        self.network, self.time_scale, self.sample = network, time_scale, names[0]
        self.plain = {"return_dict": False} if "return_dict" in names else {}

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's output at x, t."""
        if self.time_scale != 1:
            t = t * self.time_scale
        out = self.network(**{self.sample: x, TIME: t}, **cond, **self.plain)
        return out[0] if isinstance(out, tuple) else out


def as_model(network: nn.Module, *, time_scale: float = 1.0) -> Denoiser:
    """A diffusers UNet or transformer as the model of fd.sample and fd.Sampler.

        model(x, t, **cond) = network(x, timestep=time_scale t, **cond)[0]

    With a plan read from the pipeline's scheduler (fd.probe) the loop is the pipeline's: x carries what latents do, the
    plan scales the model's input and passes the scheduler's timesteps. Guidance is fd.sample's: cond and uncond hold
    the prompt's and the empty prompt's embeddings.
    Args: network: UNet2DModel, UNet2DConditionModel, SD3Transformer2DModel, ... : anything whose forward takes a
        sample first, and `timestep`. time_scale: 1e-3 for networks that take t in [0, 1] (Flux).
    Returns: a torch module on the network's device.   Raises: TypeError: another kind of network.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"as_model needs a torch.nn.Module, got {type(network).__name__}")
    return Denoiser(network, time_scale)


def flux_arguments(
    prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, height: int, width: int, *, guidance: float | None = 3.5
) -> dict[str, Tensor]:
    """The arguments, besides x and t, of a Flux transformer for packed latents [B, (height / 2) (width / 2), 4 C].

    Args: prompt_embeds: [B, L, D]; pooled_prompt_embeds: [B, D']; height, width: of the latents, both even; guidance:
        the distilled guidance weight, None for networks without one.
    Returns: cond for fd.Sampler.   Raises: ValueError: odd sizes.
    """
    if height % 2 or width % 2:
        raise ValueError(f"Flux packs 2 x 2 latents, so height and width must be even, got {height} and {width}")
    device, dtype = prompt_embeds.device, prompt_embeds.dtype
    rows, columns = (torch.arange(n // 2, device=device, dtype=dtype) for n in (height, width))
    image = torch.zeros(height // 2, width // 2, 3, device=device, dtype=dtype)
    image[..., 1], image[..., 2] = rows[:, None], columns
    cond = {
        "encoder_hidden_states": prompt_embeds,
        "pooled_projections": pooled_prompt_embeds,
        "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
        "img_ids": image.reshape(-1, 3),
    }
    if guidance is not None:
        cond["guidance"] = torch.full((prompt_embeds.shape[0],), guidance, device=device, dtype=torch.float32)
    return cond
