"""Dynamic thresholding in accelerated schedulers: fused in, equal to stock's, and refused nowhere."""

from __future__ import annotations

import pytest
import torch

import fastdiff as fd
from tests.accelerate_cases import far, model
from tests.probe_cases import SD

diffusers = pytest.importorskip("diffusers")
DYNAMIC = {**SD, "thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5}
SCHEDULERS = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "DDIMParallelScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "LCMScheduler": {},
}


def run(scheduler, noise=None, edit=False):
    import inspect

    scheduler.set_timesteps(8)
    x = 2 * torch.randn((2, 3, 9, 7), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    states, seconds = [], []
    for t in scheduler.timesteps:
        out = scheduler.step(1.4 * model(x, t), t, x, **options)
        x = out.prev_sample
        states.append(x)
        seconds.append(out.to_tuple()[-1].clone())
        if edit:
            x = x.clone()
            x[:, 0] *= 0.5
    return states, seconds


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_equal_to_stock(name, edit):
    cls = getattr(diffusers, name)
    config = {**DYNAMIC, **SCHEDULERS[name]}
    ours = fd.accelerate(cls(**config))
    (mine, second), (theirs, want) = run(ours, edit=edit), run(cls(**config), edit=edit)
    assert ours._fastdiff.stock is None and ours._fastdiff.run.threshold is not None
    for a, b in zip([*mine, *second], [*theirs, *want], strict=True):
        assert far(a, b) <= 3e-5
    plain = run(fd.accelerate(cls(**{**config, "sample_max_value": 1.0})), edit=edit)[0]
    assert far(plain[-1], theirs[-1]) > 1e-3  # the bound is above 1 here


def test_the_kernels_are_not_asked_for_it(kernel_device):
    ours = fd.accelerate(diffusers.DDPMScheduler(**DYNAMIC, clip_sample=False))
    want = run(diffusers.DDPMScheduler(**DYNAMIC, clip_sample=False))[0]
    if kernel_device.type == "cpu":
        assert far(run(ours)[0][-1], want[-1]) <= 3e-5 and not ours._fastdiff.run.kernel
