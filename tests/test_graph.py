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
from fastdiff import request as requests
from fastdiff import run as runs
from fastdiff import schedules as S
from fastdiff import solvers

CHAIN = S.Betas(S.scaled_linear_betas(1000))
SHAPE = (3, 2, 5)
PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 12, clip=(-1, 1)),
    "heun": solvers.heun(S.EDM(), 6, prediction="edm"),
    "dpmpp_2m": solvers.dpmpp_2m(CHAIN, 12, prediction="v"),
    "one-row": solvers.ddim(CHAIN, 1),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def model(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    time = t.view(-1, 1, 1).to(x.dtype) / 1000
    return torch.tanh(1.3 * x + time) + (shift.view(-1, 1, 1) if isinstance(shift, Tensor) else shift)


class Replay:
    """A stand-in for a captured graph: replaying runs the captured body."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.replay = body


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the path of a device: rows by index tensor, noise in the step, graphs allowed."""

    def capture(body: Callable[[], None], rewind: Callable[[], None], device: torch.device) -> Replay:
        for _ in range(graphs.WARM_UPS):
            rewind()
            body()
        return Replay(body)

    monkeypatch.setattr(runs, "HOST_DEVICES", ())
    monkeypatch.setattr(requests, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "pays", lambda *args: True)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


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


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
@pytest.mark.parametrize("batched", [True, False])
def test_conditions_and_weights_are_filled_in(mode: str, batched: bool, request: pytest.FixtureRequest) -> None:
    plan = PLANS["dpmpp_2m"]
    cases = list(itertools.product((0.0, 1.0), (1.5, 3.0)))

    def options(c: float, w: float) -> dict[str, Any]:
        return {"cond": {"shift": torch.full((3,), c)}, "uncond": {"shift": torch.full((3,), 0.5)}, "guidance": w}

    want = [fd.sample(model, plan, SHAPE, seed=1, **options(c, w)) for c, w in cases]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode=mode, batched_guidance=batched)
    for (c, w), expected in zip(cases, want, strict=True):
        given = options(c, w)
        assert close(sampler(SHAPE, seed=1, **given), expected)
        assert torch.equal(given["cond"]["shift"], torch.full((3,), c))  # the caller's tensors are left alone
    assert len(sampler._runs) == 1  # one capture serves them all


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


def test_a_replay_that_differs_is_not_used(device_path: None) -> None:
    calls = itertools.count()

    def forgetful(x: Tensor, t: Tensor) -> Tensor:  # a model with a state of its own
        return torch.tanh(x) * (1 + 0.01 * next(calls))

    sampler = fd.Sampler(forgetful, PLANS["ddpm"], mode="step_graph")
    with pytest.warns(RuntimeWarning, match="replay differs from the eager run"):
        sampler(SHAPE)
    assert next(iter(sampler._runs.values())).graph is None


def test_a_failed_capture_is_said_once(device_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise graphs.CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_capture", fails)
    want = fd.sample(model, PLANS["ddpm"], SHAPE, seed=1)
    sampler = fd.Sampler(model, PLANS["ddpm"], mode="loop_graph")
    with pytest.warns(RuntimeWarning, match="sampling runs eagerly: operation not permitted"):
        assert close(sampler(SHAPE, seed=1), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler(SHAPE, seed=1)
