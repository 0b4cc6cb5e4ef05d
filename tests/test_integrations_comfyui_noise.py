"""Whose noise ComfyUI's samplers draw, how much of it, when, and at which levels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdiff.integrations import comfyui, k_diffusion
from fastdiff.integrations.comfyui_samplers import SAMPLERS
from tests.test_integrations_comfyui_flow import CONST, LEVELS, QUIET, Model, noise, start
from tests.test_integrations_comfyui_flow import comfy as comfy  # a fixture


@pytest.mark.parametrize("name", comfyui.IN_LOGSNR)
def test_they_start_a_little_below_one(name):
    x, sigmas = start([1.0, *LEVELS[1:]])
    model = Model(CONST())
    comfyui.sampler_function(name)(model, x, sigmas, {"seed": 1}, disable=True)
    assert model.seen[0] == pytest.approx(0.9999, abs=1e-12) and sigmas[0] == 1


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in QUIET])
@pytest.mark.parametrize("flow", [True, False])
def test_stock_noise_is_comfyuis_own(name, flow, comfy):
    x, sigmas = start(dtype=torch.float32)
    model = Model(CONST() if flow else object())
    got = comfyui.sampler_function(name, noise="stock")(model, x, sigmas, {"seed": 5}, disable=True)
    if name in comfyui.ON_A_TREE:
        own = comfy.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=5, cpu=True)
    else:
        own = comfy.default_noise_sampler(x, seed=5)
    with k_diffusion.flow(flow):
        want = SAMPLERS[name](model, x, sigmas, {}, disable=True, noise_sampler=own)
    assert torch.equal(got, want)
    comfy.default_noise_sampler = lambda x: lambda a, b: torch.zeros_like(x)  # an older one, without a seed
    if name not in comfyui.ON_A_TREE:
        quiet = comfyui.sampler_function(name, noise="stock")(model, x, sigmas, {"seed": 5}, disable=True)
        assert (quiet - got).abs().max() > 1e-3


@pytest.mark.parametrize("flow", [True, False])
def test_the_tree_is_asked_at_the_sigmas_themselves(flow):
    """A Brownian tree answers the last digit; exp(ln sigma) is another number than sigma."""
    x, sigmas = start([0.97, 0.9, 0.77, 0.5, 0.2, 0.0], torch.float32)
    assert not torch.equal(sigmas[:-1].log().exp(), sigmas[:-1])
    asked = []

    def counted(a, b):
        asked.append((float(a), float(b)))
        return noise(a, b)

    sample = comfyui.sampler_function("dpmpp_sde")
    sample(Model(CONST() if flow else object()), x, sigmas, {}, disable=True, noise_sampler=counted)
    assert asked[1::2] == list(zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True))
    assert [a for a, _ in asked[::2]] == sigmas[:-2].tolist()


def test_noise_scale():
    x, sigmas = start()
    plain, loud = CONST(), CONST()
    loud.noise_scale = 1.5
    options = {"disable": True, "noise_sampler": noise}
    for name in ("euler_ancestral", "dpmpp_2m_sde", "er_sde", "seeds_2"):
        sample = comfyui.sampler_function(name)
        got = sample(Model(loud), x, sigmas, {}, **options)
        assert torch.equal(got, sample(Model(plain), x, sigmas, {}, s_noise=1.5, **options))
    other = SimpleNamespace(noise_scale=1.5)  # ComfyUI's k-diffusion ancestral step does not look at it
    sample = comfyui.sampler_function("euler_ancestral")
    assert torch.equal(sample(Model(other), x, sigmas, {}, **options), sample(Model(None), x, sigmas, {}, **options))


@pytest.mark.parametrize("name", ["er_sde", "seeds_2", "seeds_3"])
def test_noise_is_asked_for_where_it_is_used(name):
    x, sigmas = start()
    asked = []

    def counted(a, b):
        asked.append((float(a), float(b)))
        return noise(a, b)

    sample = comfyui.sampler_function(name)
    sample(Model(None), x, sigmas, {}, disable=True, noise_sampler=counted)
    stages = {"er_sde": 1, "seeds_2": 2, "seeds_3": 3}[name]
    assert len(asked) == 4 * stages and all(a > b > 0 for a, b in asked)
    assert [b for _, b in asked[:-1]] == [a for a, _ in asked[1:]] and asked[-1][1] == pytest.approx(0.2)
    asked.clear()
    sample(Model(None), x, sigmas, {}, disable=True, noise_sampler=counted, s_noise=0.0)
    assert not asked
