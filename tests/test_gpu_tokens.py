"""Masked diffusion on a CUDA device: the CPU's tokens in every mode, launches, what is not read. Run with -m gpu."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, solvers
from fastdiff import schedules as S
from fastdiff.readout import ORDERS
from tests.test_gpu import kernels

pytestmark = pytest.mark.gpu
SHAPE = (4, 24)


def network(K: int, dtype: torch.dtype = torch.float32):
    def model(x: Tensor, t: Tensor) -> Tensor:
        ramp = torch.arange(K, dtype=torch.float32, device=x.device) / K
        return (3 * torch.sin(7.0 * x.roll(1, 1)[..., None] + t.view(-1, 1, 1) + 40 * ramp)).to(dtype)

    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("K", [5, 27, 20_004])
def test_cpu_and_every_mode_give_the_same_tokens(K: int, order: str) -> None:
    plan = solvers.unmask(S.Masked(K), 6, order=order, blocks=2)
    model = network(K)
    logits = model(torch.arange(24).expand(SHAPE) % K, torch.ones(4))
    still = {place: logits.to(place) for place in ("cpu", "cuda")}
    want = fd.sample(lambda x, t: still["cpu"], plan, SHAPE, seed=3)
    for mode in ("eager", "step_graph", "loop_graph", "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sampler = fd.Sampler(lambda x, t: still["cuda"], plan, mode=mode, device="cuda")
            for _ in range(2):
                assert (sampler(SHAPE, seed=3).cpu() == want).float().mean() > 0.95, mode  # ties within 4e-6


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_graphs_replay_what_runs_eagerly(mode: str) -> None:
    """Prompts, guidance and conditions from call to call."""
    plan = solvers.unmask(S.Masked(27), 8, remask=0.3)
    model = network(27, torch.bfloat16)

    def shifted(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return model(x, t) + shift.view(-1, 1, 1) * torch.arange(27, device=x.device) / 27

    x_T = torch.full(SHAPE, 27, device="cuda")
    x_T[:, :6] = torch.arange(6, device="cuda")
    eager, graph = (fd.Sampler(shifted, plan, mode=m, device="cuda", guidance=2.0) for m in ("eager", mode))
    for seed, given in ((1, {}), (2, {"x_T": x_T}), (1, {}), (3, {})):
        cond = {"shift": torch.full((4,), float(seed), device="cuda")}, {"shift": torch.zeros(4, device="cuda")}
        got, want = (s(SHAPE, seed=seed, cond=cond[0], uncond=cond[1], **given) for s in (graph, eager))
        assert torch.equal(got, want)
        assert not given or torch.equal(got[:, :6], x_T[:, :6])
    assert next(iter(graph._runs.values())).graph is not None


@pytest.mark.parametrize(("order", "threshold"), [("confidence", 0.5), ("margin", 0.3), ("entropy", 2.0)])
def test_rows_with_nothing_to_do_are_skipped(order: str, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager and step_graph runs; a loop_graph runs all rows. The tokens are the same."""
    plan = solvers.unmask(S.Masked(27), 24, order=order, threshold=threshold, blocks=2)
    model, calls = network(27), [0]

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return 3 * model(x, t)

    want = fd.sample(counted, plan, SHAPE, seed=4, mode="eager", device="cuda")
    rows = calls[0]
    assert rows < 24 and bool((want < 27).all())
    replay, replays = torch.cuda.CUDAGraph.replay, [0]

    def counting(graph: torch.cuda.CUDAGraph) -> None:
        replays[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counting)
    for mode, graphs in (("step_graph", rows), ("loop_graph", 1)):
        sampler = fd.Sampler(counted, plan, mode=mode, device="cuda")
        for seed in (4, 5, 4):
            replays[0] = 0
            got = sampler(SHAPE, seed=seed)
        assert torch.equal(got, want) and replays[0] == graphs + 1, mode  # one more draws the start
        assert next(iter(sampler._runs.values())).graph is not None


def test_noise_on_scores() -> None:
    """The CPU's choice."""
    plan = solvers.unmask(S.Masked(27), 6, order="confidence", choice_temperature=1.5)
    m = network(27)(torch.arange(24).expand(SHAPE), torch.ones(4))
    want = fd.sample(lambda x, t: m, plan, SHAPE, seed=3)
    there = m.cuda()
    got = fd.sample(lambda x, t: there, plan, SHAPE, seed=3, device="cuda")
    assert (got.cpu() == want).float().mean() > 0.95


@pytest.mark.parametrize(("order", "launches"), [("random", 1), ("confidence", 2)])
def test_launches_of_a_row(order: str, launches: int) -> None:
    zeros = torch.zeros(*SHAPE, 1000, device="cuda")
    counts = {}
    for steps in (8, 18):
        plan = solvers.unmask(S.Masked(1000), steps, order=order)
        sampler = fd.Sampler(lambda x, t: zeros, plan, mode="loop_graph", device="cuda")
        counts[steps] = kernels(lambda run=sampler: run(SHAPE, seed=0)) - launches * steps
    assert counts[8] == counts[18]


def test_what_cannot_change_is_not_read() -> None:
    """NaN logits of tokens that are not masked, or not chosen, do nothing; nothing of the logits' size is allocated."""
    K = 32_768
    plan = solvers.unmask(S.Masked(K), 8)
    tokens = torch.full((2, 512), K, device="cuda")
    tokens[:, ::2] = 3
    m = torch.zeros(2, 512, K, device="cuda", dtype=torch.bfloat16)
    m[:, ::2] = torch.nan
    seeds, index = rng.keys(0, batch=2, device="cuda")
    given = {"mask": K, "group": torch.zeros(2, 512, dtype=torch.int32, device="cuda"), "seeds": seeds, "index": index}
    row, table = torch.tensor([7], device="cuda"), plan.pack("cuda")
    ops.unmask_step(tokens.clone(), m, table, row, **given)
    torch.cuda.reset_peak_memory_stats()
    before, got = torch.cuda.memory_allocated(), tokens.clone()
    ops.unmask_step(got, m, table, row, **given)
    assert torch.cuda.max_memory_allocated() - before < m.numel() / 100
    assert bool((got[:, ::2] == 3).all()) and bool((got[:, 1::2] < K).all())
