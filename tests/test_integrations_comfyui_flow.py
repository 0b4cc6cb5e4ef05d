"""ComfyUI's samplers of flow models and its own names, against their updates written out in float64."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from fastdiff.integrations import comfyui, k_diffusion
from fastdiff.integrations.brownian import BrownianTreeNoiseSampler
from fastdiff.integrations.comfyui_samplers import SAMPLERS
from fastdiff.integrations.flow_ancestral import KINDS, flow_ancestral
from tests.oracles import marginals

LEVELS = [0.97, 0.9, 0.75, 0.5, 0.2, 0.0]
QUIET = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "gradient_estimation", "ipndm", "res_multistep")
COEFFICIENTS = 1e-12  # in a step of fp64 tensors they are fp64 numbers


class CONST:
    """ComfyUI's mark of a flow model."""

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Model:
    """A denoiser wrapped as ComfyUI wraps it: by a patcher, and in older versions without."""

    def __init__(self, sampling, patched=True):
        self.inner_model, self.seen = types.SimpleNamespace(), []
        if patched:
            self.inner_model.model_patcher = types.SimpleNamespace(get_model_object={"model_sampling": sampling}.get)
        else:
            self.inner_model.inner_model = types.SimpleNamespace(model_sampling=sampling)

    def __call__(self, x, sigma, **extra):
        self.seen.append(float(sigma[0]))
        s = sigma.reshape(-1, 1, 1, 1)
        return torch.tanh(x * (1 - s) + 0.2) * (1 - 0.3 * s)


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    names = ("comfy", "comfy.model_sampling", "comfy.k_diffusion", "comfy.k_diffusion.sampling")
    modules = {name: types.ModuleType(name) for name in names}
    modules["comfy.model_sampling"].CONST = CONST
    modules["comfy.k_diffusion"].sampling = sampling = modules["comfy.k_diffusion.sampling"]

    def default_noise_sampler(x, seed=None):
        generator = None if seed is None else torch.Generator(x.device).manual_seed(seed + (x.device.type == "cpu"))
        return lambda a, b: torch.randn(x.size(), dtype=x.dtype, device=x.device, generator=generator)

    class Tree(BrownianTreeNoiseSampler):
        def __init__(self, x, sigma_min, sigma_max, seed=None, cpu=False):
            assert cpu and seed is not None
            super().__init__(x, sigma_min, sigma_max, seed)

    sampling.default_noise_sampler, sampling.BrownianTreeNoiseSampler = default_noise_sampler, Tree
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return sampling


def start(levels=LEVELS, dtype=torch.float64):
    x = torch.linspace(-2, 2, 48, dtype=dtype).reshape(3, 4, 2, 2)
    return x, torch.tensor(levels, dtype=dtype)


def noise(a, b):
    """Of the two levels, so that asking for others is seen."""
    return torch.sin(37 * torch.as_tensor(a).double() + 91 * torch.as_tensor(b).double())


def ancestral(kind, model, x, sigmas, eta, s_noise):
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        p = model(x, a.expand(len(x)))
        if b == 0:
            return p
        down = b * (1 + (b / a - 1) * eta)
        if kind == "euler_ancestral":
            y = x + (x - p) / a * (down - a)
        elif kind == "dpm_2_ancestral":
            m = torch.sqrt(a * down)
            z = x + (x - p) / a * (m - a)
            y = x + (z - model(z, m.expand(len(x)))) / m * (down - a)
        else:
            middle = 0.5 * (torch.log((1 - a) / a) + torch.log((1 - down) / down))
            m = torch.as_tensor(0.9999, dtype=a.dtype) if a == 1 else 1 / (1 + torch.exp(middle))
            y = down / a * x + (1 - down / a) * model(m / a * x + (1 - m / a) * p, m.expand(len(x)))
        ratio = (1 - b) / (1 - down)
        x = ratio * y + s_noise * torch.sqrt((b**2 - (down * ratio) ** 2).clamp_min(0)) * noise(a, b)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("levels", [LEVELS, [1.0, *LEVELS[1:]], LEVELS[:-1]], ids=["below one", "from one", "to noise"])
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.1), (0.0, 1.0)])
def test_ancestral_samplers_of_a_flow(kind, patched, levels, eta, s_noise):
    x, sigmas = start(levels)
    model = Model(CONST(), patched)
    want = ancestral(kind, model, x, sigmas, eta, s_noise)
    asked, model.seen = model.seen, []
    got = comfyui.sampler_function(kind)(
        model, x, sigmas, {}, disable=True, eta=eta, s_noise=s_noise, noise_sampler=noise
    )
    assert torch.allclose(got, want, rtol=0, atol=COEFFICIENTS)
    assert np.allclose(model.seen, asked, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_rows_keep_the_marginals_of_a_flow(kind):
    for levels in (LEVELS, LEVELS[:-1], [1.0, 0.7, 0.3, 0.0]):
        mean, variance, alpha, sigma2 = marginals(flow_ancestral(kind, np.array(levels), 0.8, 1.0))
        np.testing.assert_allclose(mean, alpha, atol=1e-12)
        np.testing.assert_allclose(variance, sigma2, atol=1e-12)


def test_too_much_eta_is_refused():
    with pytest.raises(ValueError, match=r"eta must be below 1\.66667 for these sigmas, got 1\.7"):
        flow_ancestral("euler_ancestral", np.array([0.9, 0.75, 0.3, 0.0]), 1.7, 1.0)


def test_bad_ancestral_options_are_refused():
    for options, text in (
        ({"eta": -0.5}, "eta must be a finite number >= 0, got -0.5"),
        ({"s_noise": -1.0}, "s_noise must be"),
    ):
        given = {"eta": 1.0, "s_noise": 1.0, **options}
        with pytest.raises(ValueError, match=text):
            flow_ancestral("euler_ancestral", np.array([0.9, 0.75, 0.3, 0.0]), **given)


def test_a_scaler_that_is_an_object_may_change():
    class Power:
        p = 2.0

        def __call__(self, rho):
            return rho**self.p

    x, sigmas = start()
    scaler, sample = Power(), comfyui.sampler_function("er_sde")
    options = {"disable": True, "noise_sampler": noise}
    first = sample(Model(None), x, sigmas, {}, noise_scaler=scaler, **options)
    scaler.p = 1.5
    second = sample(Model(None), x, sigmas, {}, noise_scaler=scaler, **options)
    assert torch.equal(second, sample(Model(None), x, sigmas, {}, noise_scaler=lambda r: r**1.5, **options))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["seeds_2", "seeds_3", "er_sde", "dpmpp_2m_sde"])
@pytest.mark.parametrize("levels", [[1.0, 0.5], [1.0, 0.5, 0.0]], ids=["to noise", "clean"])
def test_from_pure_noise_a_step_is_one_call(name, levels):
    """sigma = 1 itself, where the node would begin a little below: x' = (1 - sigma') p + sigma' n."""
    x, sigmas = start(levels)
    model = Model(CONST())
    with k_diffusion.flow():
        got = SAMPLERS[name](model, x, sigmas, {}, disable=True, noise_sampler=noise)
    first = (1 - sigmas[1]) * model(x, sigmas[:1].expand(3)) + sigmas[1] * noise(sigmas[0], sigmas[1])
    want = first if len(levels) == 2 else model(first, sigmas[1:2].expand(3))
    assert torch.allclose(got, want, rtol=0, atol=COEFFICIENTS)


def multistep(model, x, sigmas, eta, order):
    """The SDE multistep samplers with alpha = 1 - sigma, lam = ln(alpha / sigma)."""
    alpha, lam = 1 - sigmas, torch.log((1 - sigmas) / sigmas)
    seen = []
    for i in range(len(sigmas) - 1):
        d = model(x, sigmas[i].expand(len(x)))
        if sigmas[i + 1] == 0:
            return d
        h = lam[i + 1] - lam[i]
        total = h * (1 + eta)
        x = sigmas[i + 1] / sigmas[i] * torch.exp(-eta * h) * x - alpha[i + 1] * torch.expm1(-total) * d
        if seen:
            last = lam[i] - lam[i - 1]
            slope = (d - seen[-1]) * h / last
            if order == 2:
                x = x - 0.5 * alpha[i + 1] * torch.expm1(-total) * slope
            else:
                phi_2 = torch.expm1(-total) / total + 1
                if len(seen) > 1:
                    older = lam[i - 1] - lam[i - 2]
                    before = (seen[-1] - seen[-2]) * h / older
                    bend = (slope - before) * h / (last + older)
                    slope = slope + (slope - before) * last / (last + older)
                    x = x - alpha[i + 1] * (phi_2 / total - 0.5) * bend
                x = x + alpha[i + 1] * phi_2 * slope
        x = x + sigmas[i + 1] * torch.sqrt(-torch.expm1(-2 * eta * h)) * noise(sigmas[i], sigmas[i + 1])
        seen.append(d)
    return x


def midpoint(model, x, sigmas, eta, order):
    """dpmpp_sde: both stages from the interval's start, in rho = sigma / alpha."""
    rho = sigmas / (1 - sigmas)
    for i in range(len(sigmas) - 1):
        d = model(x, sigmas[i].expand(len(x)))
        if sigmas[i + 1] == 0:
            return d
        m = torch.sqrt(rho[i] * rho[i + 1])
        for level, share in ((m, 0.0), (rho[i + 1], 1.0)):
            up = torch.minimum(level, eta * level * torch.sqrt(1 - (level / rho[i]) ** 2))
            down, s = torch.sqrt(level**2 - up**2), level / (1 + level)
            mixed = d if share == 0 else model(z, (m / (1 + m)).expand(len(x)))  # noqa: F821 - of the first turn
            z = x / (1 - sigmas[i]) * (down / rho[i]) + (1 - down / rho[i]) * mixed + up * noise(sigmas[i], s)
            z = z * (1 - s)
        x = z
    return x


def stages(model, x, sigmas, eta, order):
    """SEEDS of two and three stages."""
    lam = torch.log((1 - sigmas) / sigmas)
    for i in range(len(sigmas) - 1):
        d = model(x, sigmas[i].expand(len(x)))
        if sigmas[i + 1] == 0:
            return d
        h, path, before, outs = lam[i + 1] - lam[i], 0.0, sigmas[i], [d]
        for k in range(1, order + 1):
            c = k / order
            s = torch.sigmoid(-(lam[i] + c * h)) if k < order else sigmas[i + 1]
            step = eta * h / order
            path = path * torch.exp(-step) + torch.sqrt(-torch.expm1(-2 * step)) * noise(before, s)
            z = c * h * (1 + eta)
            late = torch.expm1(-z) / z + 1  # z phi_2(-z)
            weight = {(1, 2): 0.0, (2, 2): -torch.expm1(-z), (1, 3): 0.0, (2, 3): 2 * late, (3, 3): 1.5 * late}[
                k, order
            ]
            mixed = -torch.expm1(-z) * outs[0] + weight * (outs[-1] - outs[0])
            y = s / sigmas[i] * torch.exp(-eta * c * h) * x + (1 - s) * mixed + s * path
            if k < order:
                outs.append(model(y, s.expand(len(x))))
            before = s
        x = y
    return x


@pytest.mark.parametrize(
    ("name", "textbook", "order"),
    [("dpmpp_2m_sde", multistep, 2), ("dpmpp_3m_sde", multistep, 3), ("dpmpp_sde", midpoint, 2),
     ("seeds_2", stages, 2), ("seeds_3", stages, 3)],
)  # fmt: skip
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_sde_samplers_take_a_flows_alpha(name, textbook, order, eta):
    x, sigmas = start()
    model, other = Model(CONST()), Model(object())
    want = textbook(model, x, sigmas, eta, order)
    options = {"disable": True, "eta": eta, "noise_sampler": noise}
    assert torch.allclose(
        comfyui.sampler_function(name)(model, x, sigmas, {}, **options), want, rtol=0, atol=COEFFICIENTS
    )
    elsewhere = comfyui.sampler_function(name)(other, x, sigmas, {}, **options)
    assert (elsewhere - want).abs().max() > 1e-3


def test_er_sde_of_a_flow_and_of_another_scale():
    """First order for the reverse SDE's own scale: dpmpp_2m_sde's first row, in every row."""
    x, sigmas = start(LEVELS[:2])
    options = {"disable": True, "noise_sampler": noise}
    for sampling in (CONST(), object()):
        model = Model(sampling)
        got = comfyui.sampler_function("er_sde")(model, x, sigmas, {}, noise_scaler=torch.square, **options)
        want = comfyui.sampler_function("dpmpp_2m_sde")(model, x, sigmas, {}, **options)
        assert torch.allclose(got, want, rtol=0, atol=COEFFICIENTS)
    x, sigmas = start()
    default, given = (
        comfyui.sampler_function("er_sde")(Model(CONST()), x, sigmas, {}, **options, **more)
        for more in ({}, {"noise_scaler": lambda r: r * (torch.exp(r**0.3) + 10)})
    )
    assert torch.allclose(default, given, rtol=0, atol=COEFFICIENTS)


def test_odes_are_the_same_for_a_flow():
    x, sigmas = start([1.0, *LEVELS[1:]])
    for name in QUIET:
        outs = [
            comfyui.sampler_function(name)(Model(kind), x, sigmas, {}, disable=True) for kind in (CONST(), object())
        ]
        assert torch.equal(*outs) and torch.isfinite(outs[0]).all()


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:-1]], ids=["clean", "to noise"])
def test_gradient_estimation_and_res_multistep(levels):
    x, sigmas = start(levels)
    for name in ("gradient_estimation", "res_multistep"):
        y, before = x, None
        for i in range(len(sigmas) - 1):
            d = Model(None)(y, sigmas[i].expand(3))
            if sigmas[i + 1] == 0:
                y = d
            elif name == "gradient_estimation":
                slope = (y - d) / sigmas[i]
                mixed = slope if before is None else 2 * slope - before
                y, before = y + (sigmas[i + 1] - sigmas[i]) * mixed, slope
            else:
                h = torch.log(sigmas[i] / sigmas[i + 1])
                phi_1 = -torch.expm1(-h) / h
                ratio = 0.0 if before is None else h / torch.log(sigmas[i - 1] / sigmas[i])
                late = (1 - phi_1) * ratio
                y = torch.exp(-h) * y + (h * phi_1 + late) * d - (late * before if before is not None else 0)
                before = d
        got = comfyui.sampler_function(name)(Model(None), x, sigmas, {}, disable=True)
        assert torch.allclose(got, y, rtol=0, atol=COEFFICIENTS)


def test_the_functions_have_the_samplers_names():
    assert [comfyui.sampler_function(name).__name__ for name in SAMPLERS] == [f"sample_{name}" for name in SAMPLERS]


@pytest.mark.parametrize("flow", [True, False])
def test_lcm_noises_x0_again(flow):
    x, sigmas = start()
    model, y = Model(CONST() if flow else object()), x
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = model(y, a.expand(3))
        y = (1 - b if flow else 1) * d + b * 1.1 * noise(a, b) if b else d
    got = comfyui.sampler_function("lcm")(model, x, sigmas, {}, disable=True, noise_sampler=noise, s_noise=1.1)
    assert torch.allclose(got, y, rtol=0, atol=COEFFICIENTS)


def test_ipndm():
    x, sigmas = start()
    weights = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    y, slopes = x, []
    for i, (a, b) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slopes.insert(0, (y - Model(None)(y, a.expand(3))) / a)
        y = y + (b - a) * sum(w * s for w, s in zip(weights[min(i + 1, 4)], slopes, strict=False))
    got = comfyui.sampler_function("ipndm")(Model(None), x, sigmas, {}, disable=True)
    assert torch.allclose(got, y, rtol=0, atol=COEFFICIENTS)


def test_solver_types():
    x, sigmas = start()
    results = [comfyui.sampler_function("seeds_2")(Model(None), x, sigmas, {}, disable=True, noise_sampler=noise,
                                                   solver_type=kind) for kind in ("phi_1", "phi_2")]  # fmt: skip
    assert (results[0] - results[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="solver_type must be 'phi_1' or 'phi_2', got 'heun'"):
        comfyui.sampler_function("seeds_2")(Model(None), x, sigmas, {}, disable=True, solver_type="heun")
