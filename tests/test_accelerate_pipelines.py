"""Accelerated pipelines against stock ones: the same pictures from the same seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.integrations.diffusers import is_accelerated
from tests import pipelines
from tests.pipelines import SD

diffusers = pytest.importorskip("diffusers")
PIXEL = 5e-5  # of pictures in [0, 1], through a decoder
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", SD),
    "euler-a": ("EulerAncestralDiscreteScheduler", SD),
    "heun": ("HeunDiscreteScheduler", SD),
    "dpm++": ("DPMSolverMultistepScheduler", SD),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", SD),
    "lcm": ("LCMScheduler", SD),
    "ddpm": ("DDPMScheduler", {**SD, "clip_sample": False}),
}


def scheduler_of(name):
    cls, config = SCHEDULERS[name]
    return getattr(diffusers, cls)(**config)


def differ(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def pictures(pipe, seed=0, **options):
    given = {"generator": torch.Generator().manual_seed(seed), "output_type": "np", **options}
    if callable(given["generator"]):
        given["generator"] = given["generator"]()
    with torch.no_grad():
        return pipe(**given).images


def compare(pipe, bound=PIXEL, **options):
    """Stock against accelerated, then restored; returns the pictures."""
    want = pictures(pipe, **options)
    assert fd.accelerate(pipe) is pipe and is_accelerated(pipe.scheduler)
    got = pictures(pipe, **options)
    assert pipe.scheduler._fastdiff.stock is None and pipe.scheduler._fastdiff.run is not None
    assert differ(got, want) <= bound and np.std(want) > 1e-3
    assert fd.restore(pipe) is pipe and not is_accelerated(pipe.scheduler)
    assert np.array_equal(pictures(pipe, **options), want)
    return want


def test_ddpm_pipeline():
    pipe = diffusers.DDPMPipeline(pipelines.unet2d(), diffusers.DDPMScheduler(num_train_timesteps=40))
    pipe.set_progress_bar_config(disable=True)
    compare(pipe, batch_size=2, num_inference_steps=12)


def test_ddim_pipeline_replaces_the_scheduler_it_is_given():
    given = fd.accelerate(diffusers.DDIMScheduler())
    pipe = diffusers.DDIMPipeline(pipelines.unet2d(), given)
    pipe.set_progress_bar_config(disable=True)
    assert not is_accelerated(pipe.scheduler)  # its constructor makes a stock one from the configuration
    for eta in (0.0, 0.7):
        compare(pipe, batch_size=2, num_inference_steps=8, eta=eta)
    compare(pipe, batch_size=2, num_inference_steps=8, generator=_several, eta=0.3)


def _several():
    return [torch.Generator().manual_seed(s) for s in (3, 4)]


@pytest.fixture(scope="module")
def sd():
    pytest.importorskip("transformers")
    return pipelines.stable_diffusion(scheduler_of("ddim"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(sd, name):
    sd.scheduler = scheduler_of(name)
    compare(sd, prompt="a cat", num_inference_steps=6, guidance_scale=5.0)


@pytest.mark.parametrize("name", ["euler-a", "unipc"])
def test_without_guidance_with_a_list_of_generators(sd, name):
    sd.scheduler = scheduler_of(name)
    compare(sd, prompt=["a cat", "a dog"], num_inference_steps=5, guidance_scale=1.0)
    results = []
    for change in (fd.restore, fd.accelerate):
        change(sd)
        results.append(pictures(sd, prompt=["a", "b"], num_inference_steps=5, generator=_several))
    fd.restore(sd)
    assert differ(*results) <= PIXEL


@pytest.mark.parametrize("name", ["unipc", "dpm++", "heun", "ddim", "pndm"])
def test_callbacks_that_edit_latents(sd, name):
    sd.scheduler = scheduler_of(name)

    def edit(pipe, i, t, kwargs):
        latents = kwargs["latents"].clone()
        latents[:, :, :4] = 0.1 * i
        return {"latents": latents}

    plain = pictures(sd, prompt="a cat", num_inference_steps=6)
    edited = compare(sd, prompt="a cat", num_inference_steps=6, callback_on_step_end=edit)
    assert differ(plain, edited) > 1e-2


@pytest.mark.parametrize("name", ["euler", "dpm++", "unipc", "heun", "ddim", "lcm"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(sd, name, strength):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd, scheduler=scheduler_of(name))
    pipe.set_progress_bar_config(disable=True)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    compare(pipe, prompt="a cat", image=image, strength=strength, num_inference_steps=8)


@pytest.mark.parametrize("name", ["euler", "unipc", "ddim"])
def test_inpainting(sd, name):
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(sd, scheduler=scheduler_of(name))
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:24] = 1
    options = {"image": image, "mask_image": mask, "height": 32, "width": 32}
    compare(pipe, prompt="a cat", num_inference_steps=6, strength=0.9, **options)


def test_stable_diffusion_3():
    pytest.importorskip("transformers")
    pipe = pipelines.stable_diffusion_3()
    for guidance in (4.0, 1.0):
        compare(pipe, prompt="a cat", num_inference_steps=5, guidance_scale=guidance, height=16, width=16)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    compare(pipe, prompt="a cat", num_inference_steps=5, height=16, width=16)


def test_flux_with_a_dynamic_shift():
    pytest.importorskip("transformers")
    pipe = pipelines.flux()
    torch.manual_seed(0)
    prompt = {"prompt_embeds": torch.randn(1, 8, 16), "pooled_prompt_embeds": torch.randn(1, 16)}
    for sigmas in (None, [1.0, 0.6, 0.3]):
        compare(pipe, num_inference_steps=3, sigmas=sigmas, height=16, width=16, **prompt)


@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"])
def test_cogvideox(name):
    """Its DPM scheduler is handed the last x0 and the time before by the pipeline."""
    pytest.importorskip("transformers")
    trained = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipe = pipelines.cogvideox(getattr(diffusers, name)(**trained))
    text = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    videos = []
    for change in (fd.restore, fd.accelerate):
        change(pipe)
        with torch.no_grad():
            made = pipe(
                prompt_embeds=text, negative_prompt_embeds=0 * text, height=32, width=32, num_frames=9,
                num_inference_steps=6, guidance_scale=3.0, use_dynamic_cfg=True, output_type="np",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        videos.append(made.frames)
    assert is_accelerated(pipe.scheduler) and pipe.scheduler._fastdiff.stock is None
    assert videos[0].shape == (1, 9, 32, 32, 3) and np.std(videos[0]) > 1e-3 and differ(*videos) <= PIXEL


@pytest.mark.parametrize("accelerated", [True, False])
def test_saved_and_loaded(sd, tmp_path, accelerated):
    sd.scheduler = scheduler_of("dpm++")
    want = pictures(sd, prompt="a cat", num_inference_steps=4)
    if accelerated:
        fd.accelerate(sd)
    sd.save_pretrained(tmp_path)
    fd.restore(sd)
    assert '"diffusers",\n    "DPMSolverMultistepScheduler"' in (tmp_path / "model_index.json").read_text()
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert differ(pictures(again, prompt="a cat", num_inference_steps=4), want) <= PIXEL
    compare(again, prompt="a cat", num_inference_steps=4)
    fd.accelerate(again)
    again.scheduler = type(again.scheduler).from_config(again.scheduler.config, use_karras_sigmas=True)
    karras = pictures(again, prompt="a cat", num_inference_steps=4)
    assert is_accelerated(again.scheduler) and differ(karras, want) > 1e-3
