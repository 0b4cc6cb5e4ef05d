"""The device path without a device: the step op by row tensor, graphs whose replay calls what was captured.

What a CUDA graph does is checked on a GPU (test_gpu.py); what fastdiff puts into it, and around it, is checked here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import graph as graphs
from fastdiff import schedules as S
from fastdiff import solvers
from tests.replay import CHAIN, PLANS, SHAPE, close, device_path, model  # noqa: F401 - one is a fixture

plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@plans
@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph", "auto"])
def test_modes(plan: fd.Plan, mode: str, request: pytest.FixtureRequest) -> None:
    want = [fd.sample(model, plan, SHAPE, seed=s) for s in (3, 4)]
    request.getfixturevalue("device_path")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler = fd.Sampler(model, plan, mode=mode)
        got = [sampler(SHAPE, seed=s) for s in (3, 4, 3)]
    graph = next(iter(sampler._runs.values())).graph
    assert type(graph) is {"loop_graph": graphs.LoopGraph, "eager": type(None)}.get(mode, graphs.StepGraph)
    assert close(got[0], want[0]) and close(got[1], want[1]) and torch.equal(got[0], got[2])


def test_another_model_or_plan_is_another_graph(device_path: None) -> None:  # noqa: F811
    first, second = PLANS["ddpm"], solvers.ddpm(CHAIN, PLANS["ddpm"].nfe, spacing="linspace")
    sampler = fd.Sampler(model, first, mode="step_graph")
    sampler(SHAPE, seed=3)
    for network, plan in ((lambda x, t: 0.5 * model(x, t), first), (model, second), (model, first)):
        sampler.model, sampler.plan = network, plan
        assert close(sampler(SHAPE, seed=3), fd.Sampler(network, plan, mode="step_graph")(SHAPE, seed=3))
    assert len(sampler._runs) == 3


def classes(x: Tensor, t: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[-1]) / x.shape[-1]
    return 3 * torch.sin(2 * x + t.view(-1, 1, 1) + 4 * ramp)


def two_channels(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), -0.5 + 0.3 * torch.cos(x)], 1)


def tokens(x: Tensor, t: Tensor) -> Tensor:
    ramp = torch.arange(5) / 5
    return 3 * torch.sin(x[..., None] + t.view(-1, 1, 1) + 4 * ramp)


CONDITIONS = {"cond": {"shift": torch.full((3,), 0.5)}, "uncond": {"shift": torch.zeros(3)}, "guidance": 3.0}
RUNS: dict[str, tuple[Callable[..., Tensor], fd.Plan, tuple[int, ...], dict[str, Any]]] = {
    "classes": (classes, solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 3), (2, 3), {}),
    "two classes": (classes, solvers.bfn_discrete(S.BFNDiscrete(2.0, 2), 3), (2, 3), {}),
    "tokens": (tokens, solvers.unmask(S.Masked(5), 3), (2, 6), {}),
    "sure tokens": (
        tokens,
        solvers.unmask(S.Masked(5, 4), 4, order="margin", blocks=2),
        (2, 6),
        {"check_finite": "raise"},
    ),
    "bins": (two_channels, solvers.bfn_discretised(S.BFNContinuous(0.05), 6, bins=16, readout="binned"), SHAPE, {}),
    "learned variance": (two_channels, solvers.ddpm(CHAIN, 6, variance="learned_range"), SHAPE, {}),
    "restarted": (model, solvers.restart(S.EDM(), 6, prediction="edm"), SHAPE, {}),
    "guided": (model, PLANS["dpmpp_2m"], SHAPE, {**CONDITIONS, "guide": "apg", "threshold": (0.9, 1.5)}),
    "two passes": (model, PLANS["ddpm"], SHAPE, {**CONDITIONS, "batched_guidance": False, "check_finite": "raise"}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_every_run_replays(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    network, plan, shape, options = RUNS[name]
    want = [fd.sample(network, plan, shape, seed=s, **options).float() for s in (3, 4)]
    assert not torch.equal(*want)
    request.getfixturevalue("device_path")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler = fd.Sampler(network, plan, mode=mode, **options)
        got = [sampler(shape, seed=s).float() for s in (3, 4, 3)]
    assert next(iter(sampler._runs.values())).graph is not None
    for one, expected in zip(got, (*want, want[0]), strict=True):
        assert close(one, expected)


@pytest.mark.parametrize("name", ["bins", "two classes"])
def test_given_noise_beside_a_readout_that_draws(name: str, request: pytest.FixtureRequest) -> None:
    network, plan, shape, _ = RUNS[name]
    want = fd.sample(network, plan, shape, seed=3, noise=lambda row, like: torch.full_like(like, 0.1 * row)).float()
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(network, plan, mode="step_graph", noise=lambda row, like: torch.full_like(like, 0.1 * row))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert close(sampler(shape, seed=3).float(), want)
    assert next(iter(sampler._runs.values())).graph is not None


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 5)])
def test_given_starts_between_drawn_ones(mode: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """A drawn start is replayed, a given one copied: one capture serves both, in any order."""
    plan = solvers.ddim(CHAIN, 12, start=4)
    x = torch.linspace(-1, 1, 30).view(3, 2, 5)[: shape[0]]
    calls: list[dict[str, Any]] = [
        {"seed": 3}, {"x_T": 2 * x}, {"x_init": x, "seed": 5}, {"seed": 3}, {"seed": 4, "first": 2},
        {"seeds": list(range(7, 7 + shape[0]))}, {"seed": 4, "first": 2}, {"seed": 4},
    ]  # fmt: skip
    want = [fd.sample(model, plan, shape, **given) for given in calls]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode=mode)
    for given, expected in zip(calls, want, strict=True):
        assert close(sampler(shape, **given), expected), given
    (prepared,) = sampler._runs.values()
    first = prepared.graph.first if prepared.graph is not None else None
    assert first is not None
    replays, replay = [], first.replay
    first.replay = lambda: (replays.append(0), replay())[1]  # type: ignore[method-assign, func-returns-value]
    for given in calls:
        sampler(shape, **given)
    assert len(replays) == 6  # all but x_T's and x_init's


@pytest.mark.parametrize("mode", ["eager", "step_graph"])
def test_outside_noise(mode: str, request: pytest.FixtureRequest) -> None:
    plan = PLANS["ddpm"]
    calls: list[int] = []

    def noise(row: int, like: Tensor) -> Tensor:
        calls.append(row)
        return torch.full_like(like, 0.1 * row)

    want = fd.sample(model, plan, SHAPE, noise=noise)
    drawn = fd.sample(model, plan, SHAPE, noise="torch", generator=torch.Generator().manual_seed(5))
    calls.clear()
    request.getfixturevalue("device_path")
    assert close(fd.Sampler(model, plan, mode=mode)(SHAPE, noise=noise), want)
    assert calls == list(range(11))  # capturing and checking did not call it
    generator = torch.Generator().manual_seed(5)
    sampler = fd.Sampler(model, plan, mode=mode)
    assert close(sampler(SHAPE, noise="torch", generator=generator), drawn)
    graph = next(iter(sampler._runs.values())).graph
    assert graph is None or graph.first is None  # the start is the generator's


@pytest.mark.parametrize("mode", ["eager", "step_graph"])
def test_callbacks_trajectories_and_finite_checks(mode: str, request: pytest.FixtureRequest) -> None:
    plan = PLANS["heun"]

    def callback(row: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        return 0.9 * x if row % 2 else None

    want, kept = fd.sample(model, plan, SHAPE, seed=2, callback=callback, trajectory=True)
    request.getfixturevalue("device_path")
    got, seen = fd.Sampler(model, plan, mode=mode)(SHAPE, seed=2, callback=callback, trajectory=True)
    assert close(got, want) and close(seen.x, kept.x) and close(seen.x0, kept.x0)

    def bad(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1) < float(plan.times[5]) + 1e-3, torch.nan, model(x, t))

    with pytest.raises(ValueError, match="first at row 5 of 11"):
        fd.Sampler(bad, plan, mode="eager", check_finite="raise")(SHAPE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    def low(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        return model(x.float(), t).to(dtype)

    plan = PLANS["heun"]
    want = fd.sample(low, plan, SHAPE, seed=2, dtype=dtype)
    request.getfixturevalue("device_path")
    got = fd.Sampler(low, plan, mode="loop_graph", dtype=dtype)(SHAPE, seed=2)
    assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.usefixtures("device_path")
def test_a_replay_that_differs_is_not_used() -> None:
    calls = itertools.count()

    def forgetful(x: Tensor, t: Tensor) -> Tensor:  # a model with a state of its own
        return torch.tanh(x) * (1 + 0.01 * next(calls))

    sampler = fd.Sampler(forgetful, PLANS["ddpm"], mode="step_graph")
    with pytest.warns(RuntimeWarning, match="replay differs from the eager run"):
        sampler(SHAPE)
    assert next(iter(sampler._runs.values())).graph is None


@pytest.mark.usefixtures("device_path")
def test_a_replay_that_gives_another_token_is_not_used() -> None:
    """Ids that are neighbours are as wrong as others."""
    calls, K = itertools.count(), 300_000

    def forgetful(x: Tensor, t: Tensor) -> Tensor:
        return (torch.arange(K) == K - 1 - next(calls) % 2).float().expand(*x.shape, K)

    sampler = fd.Sampler(forgetful, solvers.unmask(S.Masked(K), 3, temperature=0.0), mode="step_graph")
    with pytest.warns(RuntimeWarning, match="replay differs from the eager run"):
        sampler((1, 8))
    assert next(iter(sampler._runs.values())).graph is None


@pytest.mark.usefixtures("device_path")
def test_a_failed_capture_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise graphs.CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_capture", fails)
    shift, seen = torch.full((3,), 0.25), []

    def watched(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        seen.append(shift.data_ptr())
        return model(x, t, shift)

    want = fd.sample(model, PLANS["ddpm"], SHAPE, seed=1, cond={"shift": shift})
    sampler = fd.Sampler(watched, PLANS["ddpm"], mode="loop_graph", cond={"shift": shift})
    with pytest.warns(RuntimeWarning, match="sampling runs eagerly: operation not permitted"):
        assert close(sampler(SHAPE, seed=1), want)
    assert set(seen) == {shift.data_ptr()}  # the caller's own
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler(SHAPE, seed=1)
