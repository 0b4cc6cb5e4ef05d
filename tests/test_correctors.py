"""The SNR-scaled Langevin corrector and the predictor-corrector loop."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.correctors import langevin_snr

SHAPE = (5, 3, 4, 4)


def score(x: Tensor, t: Tensor) -> Tensor:
    """Of N(0.7, 0.5^2) under VE noise sigma = 0.01 .. 20."""
    sigma = S.VE(0.01, 20.0).sigma(t.double()).view(-1, *[1] * (x.ndim - 1))
    return ((0.7 - x.double()) / (0.25 + sigma**2)).to(x.dtype)


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_sample_norms_are_the_formula() -> None:
    x, g, n = tensors()
    got = langevin_snr(x, g, n, snr=0.2, alpha=0.9)
    for i in range(len(x)):
        e = 2 * 0.9 * (0.2 * float(n[i].norm()) / float(g[i].norm())) ** 2
        torch.testing.assert_close(got[i], x[i] + e * g[i] + math.sqrt(2 * e) * n[i], rtol=1e-12, atol=1e-12)
        alone = langevin_snr(x[i : i + 1], g[i : i + 1], n[i : i + 1], snr=0.2, alpha=0.9)
        assert torch.equal(alone[0], got[i])


def test_batch_norms_are_diffusers() -> None:
    pytest.importorskip("diffusers")
    module = importlib.import_module("diffusers.schedulers.scheduling_sde_ve")
    x, g, n = tensors(torch.float32)
    scheduler = module.ScoreSdeVeScheduler(snr=0.15)
    scheduler.set_timesteps(5)
    original, module.randn_tensor = module.randn_tensor, lambda *args, **kwargs: n
    try:
        want = scheduler.step_correct(g, x, return_dict=False)[0]
    finally:
        module.randn_tensor = original
    torch.testing.assert_close(langevin_snr(x, g, n, snr=0.15, norm="batch"), want, rtol=2e-6, atol=2e-6)


def test_no_score_no_step() -> None:
    x, _, n = tensors()
    assert torch.equal(langevin_snr(x, torch.zeros_like(x), n), x)


def run(
    predictor: str = "reverse_diffusion", shape: tuple[int, ...] = SHAPE, steps: int = 30, **options: Any
) -> Tensor:
    plan = getattr(solvers, predictor)(S.VE(0.01, 20.0), steps, prediction="score")
    return fd.predictor_corrector(score, plan, shape, **options)


def test_the_loop_is_the_textbook_one() -> None:
    """Song et al. 2021, algorithm 2 with 4, on the package's own noise."""
    schedule, steps, seed = S.VE(0.01, 20.0), 12, 3
    plan = solvers.reverse_diffusion(schedule, steps, prediction="score")
    draw = lambda row, stream: fd.rng.normal(torch.full((5,), seed), SHAPE[1:], row=row, stream=stream,  # noqa: E731
                                             index=torch.arange(5)).double()  # fmt: skip
    x = 20 * draw(0, 0)
    for k in range(steps):
        t = torch.full((5,), plan.times[k])
        for i in range(2):
            x = langevin_snr(x, score(x, t), draw(2 * k + i, 3), snr=0.16)
        below = plan.sigma[k + 1] if k + 1 < steps else 0.0
        gap = plan.sigma[k] ** 2 - below**2
        x = x + gap * score(x, t) + (math.sqrt(gap) * draw(k, 1) if below else 0)
    got = fd.predictor_corrector(score, plan, SHAPE, seed=seed, corrections=2)
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_in_any_batch() -> None:
    whole = run(seed=4)
    assert torch.equal(run(seed=4), whole)
    assert torch.equal(run(seed=4, first=3, shape=(2, 3, 4, 4)), whole[3:])
    assert torch.equal(run(seeds=[9, 4], shape=(2, 3, 4, 4))[1], whole[0])


def test_without_corrections_it_is_sample() -> None:
    plan = solvers.reverse_diffusion(S.VE(0.01, 20.0), 10, prediction="score")
    assert torch.equal(run(seed=1, steps=10, corrections=0), fd.sample(score, plan, SHAPE, seed=1))


def test_corrections_help_a_coarse_predictor() -> None:
    """20 reverse-diffusion steps from sigma = 20 leave too wide a sample; Langevin steps bring it nearer to 0.5."""
    plain, corrected = (run(shape=(16, 256), steps=20, corrections=c, snr=0.1).std() for c in (0, 4))
    assert abs(float(corrected) - 0.5) < 0.5 * abs(float(plain) - 0.5)


def test_options_pass_through() -> None:
    x, path = run(steps=6, trajectory=True)
    assert path.x.shape == (7, *SHAPE) and torch.equal(path.x[-1], x)
    start = torch.randn(SHAPE)
    assert torch.equal(run(steps=6, x_T=start), run(steps=6, x_T=start))
    clipped = solvers.ddpm(S.VE(0.01, 20.0), 6, prediction="score", clip=(-1, 1))
    assert float(fd.predictor_corrector(score, clipped, SHAPE).abs().max()) <= 1


def shifted(x: Tensor, t: Tensor, by: Tensor) -> Tensor:
    return score(x, t) + by.view(-1, 1, 1, 1).to(x.dtype)


def test_guidance_reaches_the_corrector() -> None:
    """score + u + w (c - u) by guidance, and the same score handed over directly."""
    plan = solvers.reverse_diffusion(S.VE(0.01, 20.0), 8, prediction="score")
    cond, uncond, w = torch.linspace(0, 0.4, 5), torch.linspace(0.1, -0.2, 5), torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0])
    got = fd.predictor_corrector(
        shifted, plan, SHAPE, seed=2, cond={"by": cond}, uncond={"by": uncond}, guidance=w, corrections=2
    )
    want = fd.predictor_corrector(
        shifted, plan, SHAPE, seed=2, cond={"by": uncond + w * (cond - uncond)}, corrections=2
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    plain = fd.predictor_corrector(shifted, plan, SHAPE, seed=2, cond={"by": cond}, corrections=2)
    assert float((plain - got).abs().max()) > 0.01


@pytest.mark.parametrize("batched", [True, False])
def test_a_condition_of_batch_1_is_everyones(batched: bool) -> None:
    def model(x: Tensor, t: Tensor, by: Tensor) -> Tensor:
        assert len(by) == len(x) or not batched
        return score(x, t) + by.view(-1, 1, 1, 1)

    plan = solvers.reverse_diffusion(S.VE(0.01, 20.0), 4, prediction="score")
    one, many = (
        fd.predictor_corrector(
            model, plan, SHAPE, seed=2, cond={"by": torch.full((n,), 0.3)}, uncond={"by": torch.full((n,), -0.1)},
            guidance=2.0, batched_guidance=batched,
        )
        for n in (1, 5)
    )  # fmt: skip
    assert torch.equal(one, many)


def test_the_score_of_a_learned_variance_is_its_means() -> None:
    """v = 1 is the larger fixed variance, whatever its plane holds for the score."""
    chain = S.Betas(S.linear_betas(100))
    learned, fixed = (solvers.ddpm(chain, 6, variance=v) for v in ("learned_range", "fixed_large"))
    got = fd.predictor_corrector(lambda x, t: torch.cat([0.3 * x, torch.ones_like(x)], 1), learned, SHAPE, seed=1)
    want = fd.predictor_corrector(lambda x, t: 0.3 * x, fixed, SHAPE, seed=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, fd.sample(lambda x, t: 0.3 * x, fixed, SHAPE, seed=1), atol=1e-2)


def test_no_correction_where_nothing_is_noise() -> None:
    """A Bayesian flow starts from 0 for certain: its first row is evaluated once, the others twice."""
    plan, seen = solvers.bfn_continuous(S.BFNContinuous(0.05), 3, prediction="x0"), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((float(t[0]), bool(x.any())))
        return torch.full_like(x, 0.25)

    assert plan.sigma[0] == 0
    assert torch.equal(fd.predictor_corrector(model, plan, SHAPE), torch.full(SHAPE, 0.25))
    assert [t for t, _ in seen] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [x for _, x in seen] == [False] + 6 * [True]


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        got = run(steps=4, seed=1)
    assert torch.equal(got, run(steps=4, seed=1))


def test_torch_noise_in_the_reference_order() -> None:
    """The start; for every row the correction's draws, then the row's: a generator's stream, in algorithm 2's order."""
    plan = solvers.reverse_diffusion(S.VE(0.01, 20.0), 6, prediction="score")
    generator = torch.Generator().manual_seed(11)
    x = 20 * torch.randn(SHAPE, generator=generator).double()
    for k in range(6):
        t = torch.full((5,), plan.times[k])
        for _ in range(2):
            x = langevin_snr(x, score(x, t), torch.randn(SHAPE, generator=generator).double(), snr=0.16)
        gap = plan.sigma[k] ** 2 - (plan.sigma[k + 1] ** 2 if k < 5 else 0)
        x = x + gap * score(x, t)
        if k < 5:
            x = x + math.sqrt(gap) * torch.randn(SHAPE, generator=generator).double()
    for given in ({"generator": torch.Generator().manual_seed(11)}, {"seed": 11}):
        got = fd.predictor_corrector(score, plan, SHAPE, noise="torch", corrections=2, **given)
        torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)


def test_no_samples() -> None:
    assert run(shape=(0, 3)).shape == (0, 3)


def test_samples_without_axes() -> None:
    plan = solvers.reverse_diffusion(S.VP(), 3, prediction="score")
    got = [fd.predictor_corrector(lambda x, t: -x, plan, shape, seed=1) for shape in ((4,), (4, 1))]
    assert torch.equal(got[0], got[1][:, 0]) and got[0].shape == (4,)


def test_a_callback_sees_and_replaces_the_state() -> None:
    """After the row, before the next row's corrections."""
    seen = []

    def callback(k: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        seen.append((k, float(t[0]), x.clone()))
        return torch.zeros_like(x) if k in (2, 5) else None

    got = run(steps=6, callback=callback)
    assert [k for k, *_ in seen] == list(range(6)) and not got.any()
    plain = []
    run(steps=6, callback=lambda k, t, x, x0: plain.append(x.clone()))
    assert torch.equal(seen[2][2], plain[2]) and not torch.equal(seen[3][2], plain[3])


def test_dynamic_thresholding_reaches_the_corrector() -> None:
    """A bound of 1 is a clamp to [-1, 1]."""
    clamped = solvers.ddpm(S.VE(0.01, 20.0), 6, prediction="score", clip=(-1, 1))
    free = solvers.ddpm(S.VE(0.01, 20.0), 6, prediction="score")
    got = fd.predictor_corrector(score, free, SHAPE, threshold=(0.9, 1.0))
    torch.testing.assert_close(got, fd.predictor_corrector(score, clamped, SHAPE), rtol=1e-4, atol=1e-5)


def outputs(model: Any) -> Tensor:
    return fd.predictor_corrector(model, solvers.reverse_diffusion(S.VP(), 3, prediction="score"), SHAPE)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: langevin_snr(*tensors(), snr=0), ValueError, "snr must be a finite number > 0, got 0"),
        (lambda: langevin_snr(*tensors(), norm="all"), ValueError, "valid: sample, batch"),
        (lambda: langevin_snr(*tensors()[:2], torch.zeros(2)), ValueError, "must have one shape"),
        (lambda: run("dpmpp_2m"), ValueError, "must have one slot"),
        (lambda: run(corrections=-1), ValueError, "corrections must be an integer >= 0"),
        (lambda: run(guidance=2.0), ValueError, "uncond"),
        (lambda: outputs(lambda x, t: (x,)), TypeError, "the model must return a Tensor, got tuple; wrap it"),
        (lambda: outputs(lambda x, t: x[:1]), ValueError, r"must return the shape of its input, .* got \(1, 3, 4, 4\)"),
        (lambda: outputs(lambda x, t: x.double()), TypeError, "got torch.float64"),
        (lambda: outputs(lambda x, t: x.mul_(2)), ValueError, "changed its input x or t in place"),
        (lambda: run(sed=1), TypeError, "unknown option 'sed'"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_plan_without_levels_has_no_score() -> None:
    plan = solvers.ddpm(S.VP(), 4)
    unknown = dataclasses.replace(plan, alpha=plan.alpha * math.nan, sigma=plan.sigma * math.nan)
    with pytest.raises(ValueError, match="does not record its alpha and sigma: no score"):
        fd.predictor_corrector(lambda x, t: 0.1 * x, unknown, (1, 3))
