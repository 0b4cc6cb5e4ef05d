"""The ComfyUI node against a stub of what ComfyUI documents: KSAMPLER and how it calls a sampler function."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from fastdiff.integrations import comfyui, k_diffusion
from fastdiff.integrations.comfyui_samplers import SAMPLERS

SIGMAS = torch.tensor([14.6, 6.0, 2.0, 0.7, 0.1, 0.0])


class Inpainting:
    """The model ComfyUI hands to a sampler: a denoiser that keeps what lies outside the mask."""

    def __init__(self, latent, noise):
        self.latent, self.noise = latent, noise

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        s = sigma.reshape(-1, 1, 1, 1)
        if denoise_mask is not None:
            x = x * denoise_mask + (self.latent + self.noise * s) * (1 - denoise_mask)
        out = torch.tanh(x / (1 + s))
        return out if denoise_mask is None else out * denoise_mask + self.latent * (1 - denoise_mask)


class KSAMPLER:
    """How ComfyUI's KSAMPLER uses its function: the start, the model, the callback and the end are its own."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None):
        extra_args["denoise_mask"] = denoise_mask
        model_k = Inpainting(latent_image, noise)
        total = len(sigmas) - 1
        told = None if callback is None else lambda x: callback(x["i"], x["denoised"], x["x"], total)
        return self.sampler_function(
            model_k, noise * sigmas[0], sigmas, extra_args=extra_args, callback=told, disable=True, **self.extra_options
        )


@pytest.fixture
def comfy(monkeypatch):
    package, samplers = types.ModuleType("comfy"), types.ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    package.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


def run(node, sigmas=SIGMAS, seed=3, masked=True, batch=2):
    noise = torch.randn((batch, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    latent = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8).expand(batch, -1, -1, -1)
    mask = torch.zeros(batch, 1, 8, 8)
    mask[..., :4] = 1
    seen = []
    torch.manual_seed(0)
    extra = {"model_options": {"transformer_options": {}}, "seed": seed}
    out = node.sample(
        None, sigmas, extra, lambda i, x0, x, total: seen.append((i, total)), noise, latent, mask if masked else None
    )
    return out, seen, latent


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("noise", ["philox", "stock"])
def test_the_node_samples_as_the_function_does(comfy, name, noise):
    (node,) = comfyui.FastdiffSampler().get_sampler(name, noise, 1.0, 0.0, 1.0)
    assert isinstance(node, KSAMPLER)
    out, seen, latent = run(node)
    assert seen == [(i, 5) for i in range(5)] and torch.isfinite(out).all()
    assert torch.allclose(out[..., 4:], latent[..., 4:], atol=1e-6)  # the last step returns the masked denoised
    extra = {"denoise_mask": None, "model_options": {}, "seed": 3}
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    with k_diffusion.flow(False), k_diffusion.philox(3) if noise == "philox" else torch.no_grad():
        want = SAMPLERS[name](Inpainting(latent, x), x * SIGMAS[0], SIGMAS, extra, disable=True)
    assert torch.equal(run(node, masked=False)[0], want)


def test_one_level_or_none_returns_the_noise(comfy):
    (node,) = comfyui.FastdiffSampler().get_sampler("dpmpp_2m_sde", "stock", 1.0, 0.0, 1.0)
    for sigmas in (torch.tensor([5.0]), torch.tensor([])):
        x = torch.ones(1, 4, 8, 8)
        assert node.sampler_function(None, x, sigmas, extra_args={}, callback=None, disable=True) is x


def test_the_seed_decides_and_the_batch_does_not(comfy):
    (node,) = comfyui.FastdiffSampler().get_sampler("euler_ancestral", "philox", 1.0, 0.0, 1.0)
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    model = Inpainting(torch.zeros(1), torch.zeros(1))
    outs = [
        node.sampler_function(model, noise[:n], SIGMAS, extra_args={"seed": s}) for n, s in ((3, 7), (1, 7), (3, 8))
    ]
    assert torch.equal(outs[0][:1], outs[1]) and not torch.equal(outs[0], outs[2])


def test_what_the_node_offers(comfy):
    inputs = comfyui.FastdiffSampler.INPUT_TYPES()["required"]
    assert inputs["sampler"][0] == list(SAMPLERS)
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    assert hasattr(comfyui.FastdiffSampler, comfyui.FastdiffSampler.FUNCTION)
    (churn,) = comfyui.FastdiffSampler().get_sampler("euler", "stock", 0.5, 2.0, 1.1)
    assert churn.extra_options == {"s_churn": 2.0, "s_noise": 1.1}
    (plain,) = comfyui.FastdiffSampler().get_sampler("dpmpp_2m", "stock", 0.5, 2.0, 1.1)
    assert plain.extra_options == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown sampler 'ddim'; valid: euler, heun"):
        comfyui.sampler_function("ddim")
    with pytest.raises(ValueError, match="unknown noise"):
        comfyui.sampler_function("euler", noise="white")


def test_the_core_imports_none_of_the_libraries_it_serves():
    code = (
        "import sys, fastdiff, fastdiff.integrations.k_diffusion, fastdiff.integrations.comfyui\n"
        "bad = {'comfy', 'diffusers', 'k_diffusion', 'torchsde', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
