"""The device path without a device: the step op by row tensor, graphs whose replay calls what was captured.

What a CUDA graph does is checked on a GPU (test_gpu.py); what fastdiff puts into it, and around it, is checked here.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

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


class Replay(TorchDispatchMode):
    """A stand-in for a captured graph: replaying makes torch's operations again on the same memory, and no Python.

    As in a capture, the host may not read a tensor.
    """

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.REFUSED:
            raise graphs.CaptureError(f"{func} is not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [v for v in tree_leaves(made) if isinstance(v, Tensor)]))
        return made

    @staticmethod
    def node(function: Callable[..., None]) -> Callable[..., None]:
        """The function as one operation, which on a device is a kernel."""

        def run(*args: Any) -> None:
            mode = _get_current_dispatch_mode()
            with _disable_current_modes():
                function(*args)
            if isinstance(mode, Replay):
                mode.calls.append((function, args, {}, []))

        return run

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                made = [v for v in tree_leaves(func(*args, **kwargs)) if isinstance(v, Tensor)]
                for old, new in zip(results, made, strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                        old.copy_(new)


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the path of a device: rows by index tensor, noise in the step, graphs allowed."""

    def capture(body: Callable[[], None], rewind: Callable[[], None], device: torch.device) -> Replay:
        for _ in range(graphs.WARM_UPS):
            rewind()
            body()
        rewind()
        with Replay() as recorded:
            body()
        return recorded

    monkeypatch.setattr(runs, "HOST_DEVICES", ())
    monkeypatch.setattr(requests, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "pays", lambda *args: True)
    for op in ("affine_step", "categorical_step"):  # on a device nobody looks at a row's number
        module = importlib.import_module(f"fastdiff.ops.{op}")
        monkeypatch.setattr(module, "check_row", lambda *args: None)
    monkeypatch.setattr(module, "_step_on_cpu", Replay.node(module._step_on_cpu))


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


def classes(x: Tensor, t: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[-1]) / x.shape[-1]
    return 3 * torch.sin(2 * x + t.view(-1, 1, 1) + 4 * ramp)


def two_channels(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), -0.5 + 0.3 * torch.cos(x)], 1)


CONDITIONS = {"cond": {"shift": torch.full((3,), 0.5)}, "uncond": {"shift": torch.zeros(3)}, "guidance": 3.0}
RUNS: dict[str, tuple[Callable[..., Tensor], fd.Plan, tuple[int, ...], dict[str, Any]]] = {
    "classes": (classes, solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 3), (2, 3), {}),
    "two classes": (classes, solvers.bfn_discrete(S.BFNDiscrete(2.0, 2), 3), (2, 3), {}),
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
    given = [options(c, w) for c, w in cases]
    for one, expected in zip(given, want, strict=True):
        assert close(sampler(SHAPE, seed=1, **one), expected)
    for one, (c, _) in zip(given, cases, strict=True):  # the caller's tensors are left alone
        assert torch.equal(one["cond"]["shift"], torch.full((3,), c))
    assert len(sampler._runs) == 1  # one capture serves them all


def nested(x: Tensor, t: Tensor, added: dict[str, Any]) -> Tensor:
    return model(x, t, added["shift"] * added["by"][0])


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
@pytest.mark.parametrize("batched", [True, False])
def test_tensors_inside_conditions_are_filled_in(mode: str, batched: bool, request: pytest.FixtureRequest) -> None:
    plan = PLANS["dpmpp_2m"]

    def options(c: float) -> dict[str, Any]:
        shifts = torch.full((3,), c), torch.full((3,), 0.5)
        cond, uncond = ({"added": {"shift": shift, "by": [torch.full((3,), 2.0)]}} for shift in shifts)
        return {"cond": cond, "uncond": uncond, "guidance": 2.0, "batched_guidance": batched}

    want = [fd.sample(nested, plan, SHAPE, seed=1, **options(c)) for c in (0.0, 1.0)]
    assert not close(want[0], want[1])
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(nested, plan, mode=mode)
    given = options(0.0)
    got = [sampler(SHAPE, seed=1, **given)]
    given["cond"]["added"]["shift"] = torch.full((3,), 1.0)
    got.append(sampler(SHAPE, seed=1, **given))
    assert close(got[0], want[0]) and close(got[1], want[1]) and len(sampler._runs) == 1


def test_a_condition_changes_sides(request: pytest.FixtureRequest) -> None:
    plan, shift = PLANS["dpmpp_2m"], {"shift": torch.full((3,), 0.5)}
    calls: list[dict[str, Any]] = [{"cond": shift, "uncond": {}}, {"cond": {}, "uncond": shift}]
    want = [fd.sample(model, plan, SHAPE, guidance=2.0, batched_guidance=False, **c) for c in calls]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode="step_graph", guidance=2.0, batched_guidance=False)
    assert all(close(sampler(SHAPE, **c), w) for c, w in zip(calls, want, strict=True))


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
