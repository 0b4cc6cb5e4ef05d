"""Bayesian flows on a CUDA device: the CPU's classes in every mode, launches, memory. Run with -m gpu."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, solvers
from fastdiff import schedules as S
from tests.test_gpu import kernels

pytestmark = pytest.mark.gpu
SHAPE = (4, 3, 5)


def model(x: Tensor, t: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[-1], dtype=torch.float32, device=x.device) / x.shape[-1]
    return (3 * torch.sin(2 * x.float() + t.view(-1, 1, 1, 1) + 4 * ramp)).to(x.dtype)


def gaussians(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([torch.sin(2 * x + t.view(-1, 1, 1)), -1 + 0.3 * torch.cos(x)], 1)


@pytest.mark.parametrize("K", [2, 5, 27, 1000, 20_000])
@pytest.mark.parametrize("name", ["bfn_discrete", "bfn_solver"])
def test_cpu_and_every_mode_give_the_same_classes(K: int, name: str) -> None:
    plan = getattr(solvers, name)(S.BFNDiscrete(2.0 if K < 1000 else 0.2, K), 6)
    want = fd.sample(model, plan, SHAPE, seed=3)
    for mode in ("eager", "step_graph", "loop_graph", "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sampler = fd.Sampler(model, plan, mode=mode, device="cuda")
            for _ in range(2):
                assert (sampler(SHAPE, seed=3).cpu() == want).float().mean() > 0.98, mode  # ties within 1e-6


@pytest.mark.parametrize("readout", ["binned", "binned_mean"])
def test_discretised(readout: str) -> None:
    plan = solvers.bfn_discretised(S.BFNContinuous(0.05), 6, bins=16, readout=readout)
    want = fd.sample(gaussians, plan, SHAPE, seed=3)
    for mode in ("eager", "step_graph", "loop_graph"):
        got = fd.Sampler(gaussians, plan, mode=mode, device="cuda")(SHAPE, seed=3)
        assert ((got.cpu() - want).abs() < 1e-4).float().mean() > 0.98, mode


@pytest.mark.parametrize(("K", "launches"), [(2, 1), (27, 1), (4096, 1), (100_000, 3)])
def test_launches_of_a_row(K: int, launches: int) -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(0.5, K), 8)
    zeros = torch.zeros(2, 3, 1 if K == 2 else K, device="cuda")
    sampler = fd.Sampler(lambda x, t: zeros, plan, mode="loop_graph", device="cuda")
    start = kernels(lambda: sampler((2, 3), seed=0)) - launches * plan.nfe
    longer = solvers.bfn_discrete(S.BFNDiscrete(0.5, K), 18)
    again = fd.Sampler(lambda x, t: zeros, longer, mode="loop_graph", device="cuda")
    assert kernels(lambda: again((2, 3), seed=0)) - launches * longer.nfe == start


def test_memory_of_a_step() -> None:
    """Beyond state, logits and next input a step allocates nothing of their size."""
    K, tokens = 4096, 2048
    plan = solvers.bfn_discrete(S.BFNDiscrete(0.5, K), 4)
    state = ops.categorical_buffer((1, 1, tokens, K), device="cuda").zero_()
    m, seen = torch.zeros(1, tokens, K, device="cuda"), ops.categorical_buffer((1, tokens, K), device="cuda")
    args = (state, m, plan.pack("cuda"), torch.zeros(1, dtype=torch.int32, device="cuda"))
    options = {"slots": 1, "readout": "sample", "seeds": torch.zeros(1, dtype=torch.int64, device="cuda")}
    ops.categorical_step(*args, **options, model_in=seen)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.categorical_step(*args, **options, model_in=seen)
    assert torch.cuda.max_memory_allocated() - before < m.numel() * 4 / 100
