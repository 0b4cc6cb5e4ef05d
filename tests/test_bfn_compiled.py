"""Compiled runs of plans of classes give the classes of eager ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers

SHAPE = (3, 2, 4)


def network(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    ramp = torch.arange(x.shape[-1], dtype=x.dtype) / x.shape[-1]
    steer = shift.view(-1, 1, 1, 1) if isinstance(shift, Tensor) else shift
    return 3 * torch.sin(2 * x + t.view(-1, 1, 1, 1) + 4 * ramp) + steer * ramp


@pytest.mark.parametrize(("K", "name"), [(2, "bfn_discrete"), (40, "bfn_solver")])
def test_compiled_equals_eager(K: int, name: str) -> None:
    plan = getattr(solvers, name)(S.BFNDiscrete(1.5, K), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler = fd.Sampler(network, plan, mode="compile")
        for seed in (3, 4):
            got, seen = sampler(SHAPE, trajectory=True, seed=seed)
            want, kept = fd.sample(network, plan, SHAPE, trajectory=True, seed=seed)
            assert torch.equal(got, want) and torch.equal(seen.x0, kept.x0)
            torch.testing.assert_close(seen.x, kept.x, rtol=1e-5, atol=1e-4)


def test_compiled_guidance_and_torch_noise() -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, 5), 5)
    options = {"cond": {"shift": torch.ones(3)}, "uncond": {"shift": torch.zeros(3)}, "guidance": 2.5, "noise": "torch"}
    sampler = fd.Sampler(network, plan, mode="compile")
    got = sampler(SHAPE, generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(got, fd.sample(network, plan, SHAPE, generator=torch.Generator().manual_seed(5), **options))
