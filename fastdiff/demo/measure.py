"""Sampling one case: the package's sampler against the plain loop, on the same network, grid and start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastdiff as fd
from fastdiff.demo.nets import PlanModel, Preconditioned
from fastdiff.demo.plain import LOOPS, trip

__all__ = ["Case", "Sampled", "sample_case"]

Tensor = torch.Tensor
PLAIN_POINTS = 25
REPEATS = 2


@dataclass(frozen=True)
class Case:
    """A solver on a schedule, e.g. Case("ddim", "Cosine", fd.schedules.Cosine(), 40)."""

    solver: str
    schedule_name: str
    schedule: fd.schedules.Schedule
    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """solver / schedule."""
        return f"{self.solver} / {self.schedule_name}"

    @property
    def spacing(self) -> str:
        """The spacing asked for, or "default"."""
        return self.options.get("spacing", "default")

    def plan(self) -> fd.Plan:
        """The solver's table."""
        return getattr(fd.solvers, self.solver)(self.schedule, self.steps, **self.options)


@dataclass(frozen=True)
class Sampled:
    """What sampling a case gave.

    x: samples. trajectory: x_t and x0-hat of every row, of the first samples where noise is added. difference: largest
    distance from the plain loop's samples, None where noise differs. us, us_plain: microseconds per evaluation, model
    included; us_beyond_model(_plain): the same with a model that costs nothing.
    """

    x: Tensor
    plan: fd.Plan
    trajectory: fd.Trajectory
    difference: float | None
    us: float
    us_plain: float
    us_beyond_model: float
    us_beyond_model_plain: float


def _timed(run: Callable[[], Tensor], *, times: int = 1) -> tuple[Tensor, float]:
    """The result, and the shortest of `times` wall times in seconds."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        x = run()
        best = min(best, time.perf_counter() - began)
    return x, best


def sample_case(net: Preconditioned, case: Case, shape: tuple[int, ...], *, seed: int, preview: int = 64) -> Sampled:
    """Sample a case by fd.Sampler and by the textbook loop, and time both per evaluation.

    A deterministic case starts both from the same noise and compares them. The plain loop of a stochastic one stops
    after its first points (the time of a step does not depend on which one it is), and its trajectory holds the first
    `preview` samples, which are the same ones in any batch size.
    """
    plan = case.plan()
    model = PlanModel(net, plan)
    sampler = fd.Sampler(model, plan, mode="eager")
    loop, per_step = LOOPS[case.solver], 2 if case.solver == "heun" else 1
    go = trip(plan, case.schedule, per_step=per_step, limit=PLAIN_POINTS if plan.stochastic else None)
    rows = len(go.t) if plan.stochastic else plan.nfe
    difference = None
    with torch.inference_mode():
        if plan.stochastic:
            x, ours = _timed(lambda: sampler(shape, seed=seed))
            _, trajectory = sampler((preview, *shape[1:]), seed=seed, trajectory=True)
            start = plan.init_scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        else:
            _, trajectory = sampler(shape, seed=seed, trajectory=True)
            x, ours = _timed(lambda: sampler(shape, seed=seed))
            start = trajectory.x[0]
        other, plain = _timed(lambda: loop(model, start, go))
        if not plan.stochastic:
            difference = (other - x).abs().max().item()
        # a model that costs nothing leaves the solver, its noise and the loop
        nothing = torch.zeros(shape)
        empty = fd.Sampler(lambda x, t: nothing, plan, mode="eager")
        empty(shape, seed=seed)
        _, ours_alone = _timed(lambda: empty(shape, seed=seed), times=REPEATS)
        _, plain_alone = _timed(lambda: loop(lambda x, t: nothing, start, go), times=REPEATS)
    micro = {"us": ours / plan.nfe, "us_plain": plain / rows}
    micro |= {"us_beyond_model": ours_alone / plan.nfe, "us_beyond_model_plain": plain_alone / rows}
    return Sampled(x, plan, trajectory, difference, **{name: 1e6 * value for name, value in micro.items()})
