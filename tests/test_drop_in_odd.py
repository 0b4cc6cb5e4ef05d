"""Accelerated schedulers where few people go: short schedules, loops from the middle, public setters."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
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
