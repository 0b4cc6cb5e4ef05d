"""diffusers networks through fd.Sampler: the latents of the stock pipeline, from one loop of this library."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
from fastdiff.integrations.diffusers import as_model, flux_arguments
from tests import pipelines
from tests.pipelines import SD

diffusers = pytest.importorskip("diffusers")
MODES = ["eager", pytest.param("compile", marks=[pytest.mark.compiled, pytest.mark.slow])]


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_an_unconditional_unet_with_ddpm_noise_of_one_generator():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=40)
    pipe = diffusers.DDPMPipeline(pipelines.unet2d(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    want = pipe(batch_size=2, num_inference_steps=10, generator=generator, output_type="np").images
    plan = fd.probe(scheduler, steps=10)
    generator = torch.Generator().manual_seed(3)
    sampler = fd.Sampler(as_model(pipe.unet), plan, mode="eager", noise="torch")
    x = sampler((2, 3, 16, 16), generator=generator)
    got = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(got - want).max() <= 5e-5


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"])
def test_stable_diffusion_with_guidance(name):
    pytest.importorskip("transformers")
    pipe = pipelines.stable_diffusion(getattr(diffusers, f"{name}Scheduler")(**SD))
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog"]
    with torch.no_grad():
        want = pipe(prompts, num_inference_steps=7, guidance_scale=4.0, latents=latents, output_type="latent",
                    height=32, width=32).images  # fmt: skip
        text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
    plan = fd.probe(pipe.scheduler, steps=7)
    sampler = fd.Sampler(as_model(pipe.unet), plan, guidance=4.0, mode="eager")
    got = sampler(
        latents.shape, x_T=latents * plan.init_scale, cond={"encoder_hidden_states": text},
        uncond={"encoder_hidden_states": empty},
    )  # fmt: skip
    assert far(got, want) <= 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_stable_diffusion_3_transformer(mode):
    pytest.importorskip("transformers")
    pipe = pipelines.stable_diffusion_3()
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = pipe("a cat", num_inference_steps=6, guidance_scale=3.0, latents=latents, output_type="latent",
                    height=16, width=16).images  # fmt: skip
        text, empty, pooled, empty_pooled = pipe.encode_prompt("a cat", None, None)
    sampler = fd.Sampler(as_model(pipe.transformer), fd.probe(pipe.scheduler, steps=6), guidance=3.0, mode=mode)
    cond = {"encoder_hidden_states": text, "pooled_projections": pooled}
    uncond = {"encoder_hidden_states": empty, "pooled_projections": empty_pooled}
    got = sampler(latents.shape, x_T=latents, cond=cond, uncond=uncond)
    assert far(got, want) <= 2e-5


def test_a_flux_transformer_on_packed_latents():
    pytest.importorskip("transformers")
    pipe = pipelines.flux()
    latents = torch.randn((1, 16, 4), generator=torch.Generator().manual_seed(0))
    text, pooled = torch.randn(1, 8, 16), torch.randn(1, 16)
    with torch.no_grad():
        want = pipe(
            num_inference_steps=4, guidance_scale=3.5, latents=latents, output_type="latent", height=16, width=16,
            prompt_embeds=text, pooled_prompt_embeds=pooled,
        ).images  # fmt: skip
    mu = _shift(pipe, 16)
    plan = fd.probe(pipe.scheduler, steps=4, mu=mu, sigmas=[1.0, 0.75, 0.5, 0.25])
    model = as_model(pipe.transformer, time_scale=1e-3)
    got = fd.sample(model, plan, latents.shape, x_T=latents, cond=flux_arguments(text, pooled, 8, 8))
    assert far(got, want) <= 2e-5


def _shift(pipe, length):
    c = pipe.scheduler.config
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    return c.base_shift + slope * (length - c.base_image_seq_len)


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="needs a torch.nn.Module, got function"):
        as_model(far)
    with pytest.raises(TypeError, match="takes a sample first, and a timestep"):
        as_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be even"):
        flux_arguments(torch.ones(1, 2, 4), torch.ones(1, 4), 7, 8)
