"""The ComfyUI node against a stub of what ComfyUI documents: KSAMPLER and how it calls a sampler function."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from fastdiff.integrations import comfyui, k_diffusion

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


@pytest.mark.parametrize("name", k_diffusion.SAMPLERS)
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
    with k_diffusion.philox(3) if noise == "philox" else torch.no_grad():
        want = k_diffusion.SAMPLERS[name](Inpainting(latent, x), x * SIGMAS[0], SIGMAS, extra, disable=True)
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
    assert inputs["sampler"][0] == list(k_diffusion.SAMPLERS)
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    assert hasattr(comfyui.FastdiffSampler, comfyui.FastdiffSampler.FUNCTION)
    (churn,) = comfyui.FastdiffSampler().get_sampler("euler", "stock", 0.5, 2.0, 1.1)
    assert churn.extra_options == {"s_churn": 2.0, "s_noise": 1.1}
    (plain,) = comfyui.FastdiffSampler().get_sampler("dpmpp_2m", "stock", 0.5, 2.0, 1.1)
    assert plain.extra_options == {}


class CONST:
    """ComfyUI's mark of a flow model."""


class FlowModel:
    """x = (1 - sigma) x0 + sigma n, wrapped as ComfyUI wraps it: by a patcher, and in older versions without."""

    def __init__(self, sampling, patched):
        self.inner_model = types.SimpleNamespace()
        if patched:
            self.inner_model.model_patcher = types.SimpleNamespace(
                get_model_object=lambda name: {"model_sampling": sampling}[name]
            )
        else:
            self.inner_model.inner_model = types.SimpleNamespace(model_sampling=sampling)

    def __call__(self, x, sigma, **extra):
        s = sigma.reshape(-1, 1, 1, 1)
        return torch.tanh(x * (1 - s) + 0.2) * (1 - 0.3 * s)


FLOW_SIGMAS = torch.tensor([0.97, 0.9, 0.75, 0.5, 0.2, 0.0], dtype=torch.float64)


def textbook(model, x, sigmas, eta, draw, order):
    """The SDE multistep samplers with alpha = 1 - sigma, lam = ln(alpha / sigma), written out."""
    alpha, lam = 1 - sigmas, torch.log((1 - sigmas) / sigmas)
    seen = []
    for i in range(len(sigmas) - 1):
        d = model(x, sigmas[i].expand(len(x)))
        if sigmas[i + 1] == 0:
            return d
        h = lam[i + 1] - lam[i]
        H = h * (1 + eta)
        x = sigmas[i + 1] / sigmas[i] * torch.exp(-eta * h) * x - alpha[i + 1] * torch.expm1(-H) * d
        if seen:
            last = lam[i] - lam[i - 1]
            slope = (d - seen[-1]) * h / last
            if order == 2:
                x = x - 0.5 * alpha[i + 1] * torch.expm1(-H) * slope
            else:
                phi_2 = torch.expm1(-H) / H + 1
                if len(seen) > 1:
                    older = lam[i - 1] - lam[i - 2]
                    before = (seen[-1] - seen[-2]) * h / older
                    bend = (slope - before) * h / (last + older)
                    slope = slope + (slope - before) * last / (last + older)
                    x = x - alpha[i + 1] * (phi_2 / H - 0.5) * bend
                x = x + alpha[i + 1] * phi_2 * slope
        x = x + sigmas[i + 1] * torch.sqrt(-torch.expm1(-2 * eta * h)) * draw(i)
        seen.append(d)
    return x


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize(("name", "order"), [("dpmpp_2m_sde", 2), ("dpmpp_3m_sde", 3)])
def test_a_flow_model_has_its_own_alpha(comfy, monkeypatch, name, order, patched):
    sampling = types.ModuleType("comfy.model_sampling")
    sampling.CONST = CONST
    monkeypatch.setitem(sys.modules, "comfy.model_sampling", sampling)
    model, x = FlowModel(CONST(), patched), torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(3, 4, 2, 2)
    normals = [torch.full_like(x, 0.3 * (-1) ** i) for i in range(5)]
    want = textbook(model, x, FLOW_SIGMAS, 0.8, lambda i: normals[i], order)
    draws = iter(normals)
    sample = comfyui.sampler_function(name, noise="stock")
    got = sample(model, x, FLOW_SIGMAS, {}, disable=True, eta=0.8, noise_sampler=lambda a, b: next(draws))
    assert torch.allclose(got, want, rtol=0, atol=2e-7)  # coefficients are fp32 numbers in a step
    again = sample(FlowModel(object(), patched), x, FLOW_SIGMAS, {}, disable=True, eta=0.8,
                   noise_sampler=lambda a, b: normals[0])  # fmt: skip
    assert (again - got).abs().max() > 1e-3  # another kind of model, another table


@pytest.mark.parametrize("name", k_diffusion.SAMPLERS)
def test_noise_that_is_wrong_for_a_flow_is_refused(comfy, monkeypatch, name):
    sampling = types.ModuleType("comfy.model_sampling")
    sampling.CONST = CONST
    monkeypatch.setitem(sys.modules, "comfy.model_sampling", sampling)
    model, x = FlowModel(CONST(), True), torch.linspace(-2, 2, 16).reshape(1, 4, 2, 2)
    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.0])
    sample = comfyui.sampler_function(name)
    if name in k_diffusion.NOT_OF_A_FLOW:
        with pytest.raises(
            ValueError, match=f"{name} adds the noise of x = x0 \\+ sigma n, wrong for a flow model; use"
        ):
            sample(model, x, sigmas, {}, disable=True)
        return
    got = sample(model, x, sigmas, {"seed": 1}, disable=True)
    assert torch.isfinite(got).all()
    if not name.endswith("sde"):  # an ODE in sigma: the same as outside
        assert torch.equal(got, k_diffusion.SAMPLERS[name](model, x, sigmas, {}, disable=True))


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
