"""Classes of one's own, and every class saved, loaded and accelerated again."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
from tests.accelerate_cases import ALL, accelerated, arguments, far, loop, start
from tests.probe_cases import SD, shipped

diffusers = pytest.importorskip("diffusers")
ONE_EACH = list({case.scheduler: name for name, case in reversed(ALL.items())}.values())


@pytest.mark.parametrize("name", ONE_EACH)
def test_saved_loaded_and_accelerated_again_it_samples_the_same(name, tmp_path):
    case = ALL[name]
    ours = accelerated(case, 5)
    x = start(ours, (1, 3, 4, 6))
    want = loop(ours, case, x)
    ours.save_pretrained(tmp_path)
    again = fd.accelerate(shipped(case).from_pretrained(tmp_path))
    again.set_timesteps(*arguments(case, 5), **case.setup)
    got = loop(again, case, x)
    assert len(got.x) == len(want.x) and all(torch.equal(a, b) for a, b in zip(got.x, want.x, strict=True))
    assert all(v.shape == x.shape and v.dtype == x.dtype for v in got.x)


@pytest.mark.parametrize("name", ONE_EACH)
def test_shapes_of_any_rank(name):
    """[B, L, D] tokens and [B, C, F, H, W] video: what a step does, it does element by element."""
    case = ALL[name]
    flat = torch.randn((2, 60), generator=torch.Generator().manual_seed(0))
    results = []
    for shape in ((2, 3, 4, 5), (2, 12, 5), (2, 3, 2, 2, 5)):
        ours = accelerated(case, 4)
        results.append(loop(ours, case, start(ours, shape) * 0 + flat.reshape(shape)).x[-1].reshape(2, 60))
    assert all(torch.equal(r, results[0]) for r in results[1:])


class Halved(diffusers.EulerDiscreteScheduler):
    """A subclass with a step of its own, still linear."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        out = super().step(0.5 * model_output, timestep, sample)
        moved = out.prev_sample + 0.01 * torch.randn(sample.shape, generator=generator)
        return diffusers.schedulers.scheduling_euler_discrete.EulerDiscreteSchedulerOutput(
            prev_sample=moved, pred_original_sample=out.pred_original_sample
        )


class Normalised(diffusers.DDIMScheduler):
    """A subclass whose step divides by a norm."""

    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output / model_output.norm() * 10, timestep, sample, return_dict=return_dict)


def run(scheduler):
    scheduler.set_timesteps(6)
    x = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator} if isinstance(scheduler, Halved) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, **options).prev_sample
    return x


def test_a_linear_step_of_ones_own_is_accelerated():
    ours = fd.accelerate(Halved(**SD))
    assert far(run(ours), run(Halved(**SD))) <= 5e-6
    assert ours._fastdiff.stock is None and ours._fastdiff.run.reading.draws == [1] * 6
    assert type(fd.restore(ours)) is Halved


def test_any_other_step_runs_as_it_is_and_says_so_once():
    ours = fd.accelerate(Normalised(**SD))
    with pytest.warns(RuntimeWarning, match="Normalised runs its stock step: Normalised is not a plan") as seen:
        first, second = run(ours), run(ours)
    assert torch.equal(first, run(Normalised(**SD))) and torch.equal(first, second)
    assert len([w for w in seen if "stock step" in str(w.message)]) == 1
