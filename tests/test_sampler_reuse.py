"""A Sampler that is called again: what it keeps from call to call, and what it must not."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import solvers
from fastdiff.schedules import VP

PLAN = solvers.ddim(VP(), 3, prediction="x0")


def conditioned(x: Tensor, t: Tensor, c: Any = 0.0, y: Any = 0.0) -> Tensor:
    return torch.zeros_like(x) + c + y


def test_conditions_of_the_last_call_are_forgotten() -> None:
    """A name that a call does not give has the model's default, whatever calls came before."""
    sampler = fd.Sampler(conditioned, PLAN)
    for cond, want in (({"c": 1.0}, 1), (None, 0), ({"y": 3.0}, 3), ({}, 0)):
        assert sampler((2, 3), cond=cond).unique().tolist() == [want]


@pytest.mark.parametrize(
    ("batched", "calls"),
    [
        # u + 2 (c - u): 1 + 2 (2 - 1), then 0 + 2 (2 - 0)
        (False, [({"c": 2.0}, {"c": 0.0, "y": 1.0}, 3), ({"c": 2.0}, {"c": 0.0}, 4)]),
        # 0 + 2 (4 - 0), then 1 + 2 (2 - 1)
        (True, [({"c": 2.0, "y": 2.0}, {"c": 0.0, "y": 0.0}, 8), ({"y": 2.0}, {"y": 1.0}, 3)]),
    ],
)
def test_guided_conditions_of_the_last_call_are_forgotten(batched: bool, calls: list[tuple[Any, Any, int]]) -> None:
    sampler = fd.Sampler(conditioned, PLAN)
    for cond, uncond, want in calls:
        given = [{name: torch.full((2, 1), v) for name, v in values.items()} for values in (cond, uncond)]
        got = sampler((2, 3), cond=given[0], uncond=given[1], guidance=2.0, batched_guidance=batched)
        assert got.unique().tolist() == [want]


def test_the_cache_of_runs_is_bounded() -> None:
    sampler = fd.Sampler(conditioned, PLAN, mode="eager")
    for n in range(1, 9):
        sampler((1, n))
    assert len(sampler._runs) == 4
