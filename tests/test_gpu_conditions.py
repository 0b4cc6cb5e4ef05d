"""Known parts and gradients on a CUDA device, captured too. Run with -m gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers

pytestmark = pytest.mark.gpu
SHAPE = (3, 2, 6)
PLAN = solvers.dpmpp_2m(S.VP(), 6, prediction="x0")


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + t.to(x.dtype).view(-1, 1, 1))


def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return -((x - y) ** 2).flatten(1).sum(1) / 2


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
@pytest.mark.parametrize("kind", ["inpaint", "x", "x0"])
def test_it_is_the_cpus_sample_and_one_capture_serves_other_conditions(kind: str, mode: str) -> None:
    if kind == "inpaint":
        wrapped, name = fd.inpaint(model, PLAN), "known"
    else:
        wrapped, name = fd.classifier_guidance(model, PLAN, log_prob, scale=0.3, of=kind, given=("y",)), "y"
    sampler = fd.Sampler(wrapped, PLAN, mode=mode, device="cuda")
    for value in (0.2, 1.0):
        condition = torch.full((1, *SHAPE[1:]), value)
        condition[..., 3:] = torch.nan if kind == "inpaint" else -value
        want = fd.sample(wrapped, PLAN, SHAPE, seed=1, cond={name: condition})
        x = sampler(SHAPE, seed=1, cond={name: condition.cuda()}).cpu()
        assert float((x - want).abs().max()) <= 2e-5 * float(want.abs().max())
    assert len(sampler._runs) == 1
