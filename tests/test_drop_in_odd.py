"""Accelerated schedulers where few people go: short schedules, loops from the middle, public setters."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.integrations.diffusers import is_accelerated
from fastdiff.probe.observe import globals_of, lifted
from tests.accelerate_cases import TOLERANCE, exact, far, loop, make, start
from tests.probe_cases import SD, Case

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_short_warm_ups_do_not_cancel(steps):
    """PNDM's last rows need few directions of a past of many: badly chosen ones lose three digits."""
    case = Case("pndm", "PNDMScheduler", {"num_train_timesteps": 100, "beta_end": 0.012, "set_alpha_to_one": True})
    ours = fd.accelerate(make(case, steps))
    x = start(ours)
    ours.set_timesteps(steps)
    plan = fd.probe(make(case, steps), steps=steps, edits=True)
    assert abs(plan.A).max() < 10
    assert far(loop(ours, case, x).x[-1], exact(case, x, steps).x[-1]) <= TOLERANCE


STAYS = {**SD, "set_alpha_to_one": False}  # a single step goes from t = 0 to t = 0
QUANTILE = {"thresholding": True, "sample_max_value": 2.0}
REDERIVED = {"use_clipped_model_output": True}
IDLE = {
    "ddim": (Case("ddim", "DDIMScheduler", STAYS, None, REDERIVED), 1, 0),
    "ddim, a quantile": (Case("ddim", "DDIMScheduler", {**STAYS, **QUANTILE}, None, REDERIVED), 1, 0),
    "heun": (Case("heun_discrete", "HeunDiscreteScheduler", {**SD, "clip_sample": True}), 6, 5),
}


@pytest.mark.parametrize("name", IDLE)
def test_the_clamped_x0_of_a_step_that_stays_where_it_is(name):
    """From alpha to the same alpha x' = x: the clamped x0 reaches no state, but it is returned."""
    case, steps, begin = IDLE[name]
    results = []
    for scheduler in (make(case, steps), fd.accelerate(make(case, steps))):
        if begin:
            scheduler.set_begin_index(begin)
        t, x = scheduler.timesteps[begin], 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        seen = scheduler.scale_model_input(x, t)
        results.append(scheduler.step(torch.tanh(seen), t, x, **case.step))
    theirs, mine = results
    assert far(theirs.prev_sample, x) <= TOLERANCE and far(mine.prev_sample, x) <= TOLERANCE
    assert far(mine.pred_original_sample, theirs.pred_original_sample) <= TOLERANCE


INDEXED = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]
REMEMBERING = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"]


def both(name, **config):
    """The stock scheduler and the accelerated one."""
    cls = getattr(diffusers, name)
    return cls(**config), fd.accelerate(cls(**config))


def called(scheduler, k, x):
    """One call of step at the k-th timestep, the noise that of k."""
    t = scheduler.timesteps[k]
    seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": torch.Generator().manual_seed(k)} if takes_noise else {}
    return scheduler.step(torch.tanh(seen), t, x, **noise).prev_sample


@pytest.mark.parametrize("index", [lambda k: None, lambda k: k], ids=["None", "k"])
@pytest.mark.parametrize("name", INDEXED)
def test_a_step_index_set_by_hand_is_where_it_goes_on(name, index):
    """Training code visits the steps in any order in this way."""
    results = []
    for scheduler in both(name):
        scheduler.set_timesteps(6)
        x = torch.ones(2, 3, 4, 4)
        for k in (3, 1, 4, 5, 0):
            scheduler._step_index = index(k)
            x = called(scheduler, k, x)
            assert scheduler.step_index == k + 1
        results.append(x)
    assert far(results[1], results[0]) <= 5 * TOLERANCE


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_step_index_set_by_hand_where_there_is_a_past(name):
    stock, ours = both(name)
    x, results = torch.ones(2, 3, 4, 4), []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
        scheduler._step_index = 2  # before the first step it is where the loop begins
        results.append(called(scheduler, 3, called(scheduler, 2, x)))
    assert far(results[1], results[0]) <= 5 * TOLERANCE
    ours._step_index = None
    with pytest.raises(RuntimeError, match="step_index was changed by hand in the middle of a loop that remembers"):
        called(ours, 4, x)


def test_the_step_index_after_scaling_is_stocks():
    for scheduler in both("EulerDiscreteScheduler"):
        scheduler.set_timesteps(6)
        scheduler.scale_model_input(torch.ones(1, 1, 2, 2), scheduler.timesteps[2])
        assert scheduler.step_index == 2


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_pickle_without_its_past_is_refused_until_the_next_loop(name):
    ours = both(name)[1]
    ours.set_timesteps(6)
    x = torch.ones(2, 3, 4, 4)
    for k in range(3):
        x = called(ours, k, x)
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(ours))))
    with pytest.raises(RuntimeError, match="pickled in the middle of a loop that remembers"):
        called(twin, 3, x)
    twin.set_timesteps(6)
    called(twin, 0, x)


@pytest.mark.parametrize("name", [*REMEMBERING, "EulerDiscreteScheduler"])
def test_a_shallow_copy_runs_a_loop_of_its_own(name):
    ours = both(name)[1]
    ours.set_timesteps(6)
    twin = copy.copy(ours)
    twin.set_timesteps(4)
    a = b = torch.ones(2, 3, 4, 4)
    for k in range(6):
        a = called(ours, k, a)
        b = called(twin, k, b) if k < 4 else b
    for steps, mine in ((6, a), (4, b)):
        alone = both(name)[0]
        alone.set_timesteps(steps)
        x = torch.ones(2, 3, 4, 4)
        for k in range(steps):
            x = called(alone, k, x)
        assert far(mine, x) <= 5 * TOLERANCE


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "MiniMaxH3Scheduler"])
def test_a_shift_set_later_counts_where_tables_cannot_be_looked_at(name):
    """On a device its tables are not read; the number is."""
    ours = both(name)[1]
    ours.set_shift(5.0)
    ours.set_timesteps(6)
    for table in ("timesteps", "sigmas"):
        setattr(ours, table, getattr(ours, table).to("meta"))
    ours._step_index = 0
    assert ours._fastdiff_setup(ours.timesteps[0]).own
    ours.set_shift(ours.config.shift)
    assert not ours._fastdiff_setup(ours.timesteps[0]).own


def test_scale_factors_set_later_run_the_stock_step():
    results = []
    for scheduler in both("FlowMatchLCMScheduler"):
        scheduler.set_scale_factors([0.5], "bicubic")
        scheduler.set_timesteps(2)
        x = torch.ones(1, 3, 8, 8)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for k in range(2):
                x = called(scheduler, k, x)
        results.append(x)
    assert any("runs its stock step" in str(w.message) for w in said)
    assert torch.equal(*results)


def combined():
    """A pipeline made of two, its networks left out."""
    names = ("tokenizer", "text_encoder", "decoder", "vqgan", "prior_prior", "prior_text_encoder", "prior_tokenizer")
    schedulers = {name: diffusers.DDPMWuerstchenScheduler() for name in ("scheduler", "prior_scheduler")}
    return diffusers.StableCascadeCombinedPipeline(**dict.fromkeys(names), **schedulers)


def test_pipelines_inside_a_pipeline_share_its_schedulers():
    pipe = combined()
    fd.accelerate(pipe)
    assert is_accelerated(pipe.scheduler) and is_accelerated(pipe.prior_scheduler)
    assert pipe.decoder_pipe.scheduler is pipe.scheduler and pipe.prior_pipe.scheduler is pipe.prior_scheduler
    fd.restore(pipe)
    assert type(pipe.scheduler) is type(pipe.prior_scheduler) is diffusers.DDPMWuerstchenScheduler
    assert pipe.decoder_pipe.scheduler is pipe.scheduler and pipe.prior_pipe.scheduler is pipe.prior_scheduler


def test_a_refused_restore_changes_nothing():
    pipe = combined()
    pipe.register_modules(prior_scheduler=diffusers.UniPCMultistepScheduler())
    fd.accelerate(pipe)
    pipe.prior_scheduler.set_timesteps(6)
    called(pipe.prior_scheduler, 0, torch.ones(1, 1, 2, 2))
    with pytest.raises(RuntimeError, match="in the middle of a loop"):
        fd.restore(pipe)
    assert is_accelerated(pipe.scheduler) and is_accelerated(pipe.decoder_pipe.scheduler)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_threads_first_loop_waits_for_a_reading(name):
    """While one is read, torch's default dtype is float64: no other schedule and no other result may take it on."""
    ours, x = both(name)[1], torch.ones(1, 1, 2, 2)
    ours.register_to_config(of_this_test=name)  # a configuration that nobody has read
    dtypes = []

    def first_loop():
        ours.set_timesteps(6)
        dtypes.extend(v.dtype for v in (ours.timesteps, ours.sigmas, called(ours, 0, x)))

    other = threading.Thread(target=first_loop)
    with lifted(None, globals_of(ours)):
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join()
    assert len(dtypes) == 3 and torch.float64 not in dtypes


def test_numpy_is_lifted_in_its_own_thread_alone():
    module = {"np": np}
    dtypes = []
    with lifted(None, [module]):
        dtypes.append(module["np"].float32)
        other = threading.Thread(target=lambda: dtypes.append(module["np"].float32))
        other.start()
        other.join()
    assert dtypes == [np.float64, np.float32] and module["np"] is np
