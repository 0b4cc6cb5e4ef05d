"""What probe refuses, how it counts draws and caches, and k-diffusion's samplers."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.reference import reference_sample
from tests.probe_cases import (
    CASES,
    SD,
    TOLERANCE,
    Table,
    far,
    model,
    normals,
    response,
    run,
    shipped,
    tuple_sampler,
)
from tests.test_stochastic_kd import k_diffusion


class Poor(Table):
    """A scheduler whose step does something that no table can."""

    def __init__(self, what):
        super().__init__(1, 6, seed=0)
        self.what = what

    def step(self, m, t, x):
        return (self.what(0.9 * x + 0.2 * m, m),)


def branching(y, m):
    return y if float(y.abs().max()) > 0 else m


NOT_LINEAR = {
    "thresholding": (lambda y, m: y.clamp(-torch.quantile(y.abs(), 0.9), 1e9), "quantile|values|reduction"),
    "norm": (lambda y, m: y + m * (y.norm() / m.norm()), "reduction over the sample"),
    "branch": (branching, "branches on the sample's values"),
    "numpy": (lambda y, m: y * float(y.numpy().max()), "reads the sample's values"),
    "tanh": (lambda y, m: torch.tanh(y), "superposition"),
    "abs": (lambda y, m: y.abs(), "superposition"),
    "square": (lambda y, m: y + y * y, "superposition"),
    "softmax": (lambda y, m: torch.softmax(y, -1), "constant|superposition"),
    "constant": (lambda y, m: y + 1e-3, "constant part"),
    "state": (lambda y, m: y.clamp(-1, 1) + (y + y).clamp(-3, 3), "clamps"),
    "uniform": (lambda y, m: y + torch.rand_like(y), "not normal"),
    "shape": (lambda y, m: y[..., :3], "shape"),
    "nan": (lambda y, m: y / 0, "not finite"),
    "error": (lambda y, m: y + undefined, "NameError"),  # noqa: F821
    "scalar noise": (lambda y, m: y * torch.randn(1), "another shape"),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_refused(name):
    what, text = NOT_LINEAR[name]
    with pytest.raises(ValueError, match=text):
        fd.probe(Poor(what), steps=6)
    assert torch.get_default_dtype() == torch.float32 and torch.tensor([0.1]).numpy().dtype == np.float32
    assert torch.tensor(0.1, dtype=torch.float32).dtype == torch.float32


def test_stock_controls_are_refused():
    """Dynamic thresholding and the SNR-scaled Langevin corrector."""
    diffusers = pytest.importorskip("diffusers")
    for case in ("ddpm-clip", "dpmsolver++-2m"):
        scheduler = shipped(CASES[case])(**SD, thresholding=True, sample_max_value=3.0)
        with pytest.raises(ValueError, match="depend on the sample's values"):
            fd.probe(scheduler, steps=8)

    def corrected(model, x, sigmas):
        scheduler = diffusers.ScoreSdeVeScheduler()
        scheduler.set_timesteps(len(sigmas))
        scheduler.set_sigmas(len(sigmas))
        for sigma in sigmas:
            x = scheduler.step_correct(model(x, sigma), x).prev_sample
        return x

    with pytest.raises(ValueError, match="reduction over the sample"):
        fd.probe(corrected, sigmas=[3.0, 2.0, 1.0])


def test_more_draws_than_a_row_holds():
    """Two draws that count after one evaluation: the first waits in a slot from a row that has none, or is refused."""

    def two(model, x, sigmas, noise_sampler, first):
        for i, sigma in enumerate(sigmas[:-1]):
            x = 0.6 * x + 0.3 * model(x, sigma)
            if i >= first:
                x = x + 0.1 * noise_sampler(sigma, 0) if i % 2 else x
                x = x + 0.2 * noise_sampler(0, sigma) if i % 2 else x
        return x

    sigmas = np.linspace(5, 0, 7)
    plan = fd.probe(two, sigmas=sigmas, first=0)
    pool, x = normals(), normals(1, seed=5)[0]
    source = iter(pool)
    want = two(model, x, torch.from_numpy(sigmas), lambda a, b: next(source), 0)
    assert plan.slots == 2 and plan.draws.tolist() == [1] * 6 and far(run(plan, x, pool), want) <= TOLERANCE

    def always(model, x, sigmas, noise_sampler):
        for sigma in sigmas:
            x = model(x, sigma) + noise_sampler(1, 0) + 2 * noise_sampler(1, 0)
        return x

    with pytest.raises(ValueError, match="more normal draws"):
        fd.probe(always, sigmas=sigmas)


def test_brownian_draws_are_correlated():
    """Increments over [3, 2] and [3, 1] overlap: the second is sqrt(1/2) of the first and a fresh normal."""

    def sampler(model, x, sigmas, noise_sampler):
        x = model(x, sigmas[0]) + 0 * x + 2.0 * noise_sampler(sigmas[0], sigmas[1])
        return model(x, sigmas[1]) + 3.0 * noise_sampler(sigmas[0], sigmas[2])

    plain = fd.probe(sampler, sigmas=[3.0, 2.0, 1.0])
    joined = fd.probe(sampler, sigmas=[3.0, 2.0, 1.0], brownian=True)
    assert plain.slots == 1 and plain.s[:, 0].tolist() == [2.0, 3.0]
    assert joined.slots == 2
    assert response(joined)[-1, 3:] == pytest.approx([3 * 0.5**0.5, 3 * 0.5**0.5])
    assert response(joined)[1, 3:] == pytest.approx([2.0, 0.0])


def test_cache_and_errors():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**SD)
    plan = fd.probe(scheduler, steps=9)
    assert fd.probe(diffusers.DDIMScheduler(**SD), steps=9) is plan and scheduler.num_inference_steps is None
    others = [fd.probe(scheduler, steps=8), fd.probe(scheduler, steps=9, step_options={"eta": 1.0})]
    others.append(fd.probe(diffusers.DDIMScheduler(**SD, clip_sample=False), steps=9))
    assert all(p is not plan for p in others) and others[1].stochastic and not others[2].clamped
    assert fd.probe(tuple_sampler, sigmas=[2.0, 1.0, 0.0]) is fd.probe(tuple_sampler, sigmas=(2.0, 1.0, 0.0))
    assert fd.probe(Table(1, 3, 0), steps=3) is not fd.probe(Table(1, 3, 0), steps=3)
    for args, kwargs, error, text in (
        ((3,), {"steps": 4}, TypeError, "scheduler"),
        ((scheduler,), {}, ValueError, "steps=N"),
        ((scheduler,), {"steps": 0}, ValueError, ">= 1"),
        ((scheduler,), {"steps": 2.5}, ValueError, ">= 1"),
        ((scheduler,), {"steps": 2000}, ValueError, "cannot be larger"),
        ((scheduler,), {"steps": 5, "mu": 1}, ValueError, "mu"),
        ((tuple_sampler,), {}, ValueError, "sigmas"),
        ((tuple_sampler,), {"sigmas": [1.0, 0.0], "edits": True}, ValueError, "schedulers"),
        ((tuple_sampler,), {"sigmas": [1.0, math.nan]}, ValueError, "finite"),
        ((tuple_sampler,), {"sigmas": [[1.0], [0.0]]}, ValueError, "finite"),
        ((lambda model, x, sigmas: x,), {"sigmas": [1.0, 0.0]}, ValueError, "never calls the model"),
    ):
        with pytest.raises(error, match=text):
            fd.probe(*args, **kwargs)


CHURN = {"s_churn": 4.0, "s_noise": 1.01}


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("euler", {}, 1), ("euler", CHURN, 1), ("euler_ancestral", {}, 1), ("euler_ancestral", {"eta": 0.4}, 1),
        ("heun", {}, 2), ("heun", CHURN, 2), ("dpm_2", {}, 2), ("dpm_2", CHURN, 2), ("dpm_2_ancestral", {}, 2),
        ("lms", {}, 4), ("lms", {"order": 2}, 2), ("dpmpp_2s_ancestral", {}, 2), ("dpmpp_sde", {}, 2),
        ("dpmpp_2m", {}, 2), ("dpmpp_2m_sde", {}, 2), ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
        ("dpmpp_3m_sde", {}, 3), ("dpm_fast", {}, 2), ("dpm_adaptive", {}, None),
    ],
)  # fmt: skip
def test_k_diffusion(monkeypatch, name, options, slots):
    sampling = k_diffusion()
    sampler = getattr(sampling, f"sample_{name}")
    sigmas = sampling.get_sigmas_karras(10, 0.03, 14.6).double()
    if name in ("dpm_fast", "dpm_adaptive"):
        original, count = sampler, (9,) if name == "dpm_fast" else ()

        def sampler(model, x, sigmas, noise_sampler=None):
            ends = float(sigmas[-2]), float(sigmas[0])
            return original(model, x, *ends, *count, disable=True, noise_sampler=noise_sampler, eta=0.5)

    if slots is None:
        with pytest.raises(ValueError, match="branches on the sample's values"):
            fd.probe(sampler, sigmas=sigmas)
        return
    plan = fd.probe(sampler, sigmas=sigmas, **options)
    pool, x = normals(), 14.6 * normals(1, seed=6)[0]
    drawn = []

    def draw(*args, **kwargs):
        drawn.append(0)
        return pool[len(drawn) - 1]

    def denoiser(x, sigma):
        return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)) + 0.1 * sigma.reshape(-1, 1, 1, 1))

    given = {"noise_sampler": draw} if "noise_sampler" in inspect.signature(sampler).parameters else {}
    given |= {"disable": True} if "disable" in inspect.signature(sampler).parameters else {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", draw)
            want = sampler(denoiser, x, sigmas, **options, **given)
    finally:
        torch.set_default_dtype(before)
    source = iter(pool)
    start = x + plan.init_noise * next(source) if plan.init_noise else x
    got = reference_sample(lambda x, t: denoiser(x, t), plan, start, lambda k, like: next(source))
    assert far(got, want) <= TOLERANCE and plan.slots == slots
    assert plan.draws.sum() + (plan.init_noise != 0) == len(drawn)
    assert plan.end == (1.0, 0.0) or name == "dpm_fast"
