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
PLAIN_POINTS = 50


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

    def plan(self, steps: int | None = None) -> fd.Plan:
        """The plan, with another number of steps where given."""
        return getattr(fd.solvers, self.solver)(self.schedule, steps or self.steps, **self.options)


@dataclass(frozen=True)
class Sampled:
    """What sampling a case gave.

    x: samples. trajectory: x_t and x0-hat of every row, of the first samples where noise is added. us, us_plain:
    microseconds per evaluation. difference: largest distance from the plain loop's samples, None where noise differs.
    """

    x: Tensor
    plan: fd.Plan
    us: float
    us_plain: float
    trajectory: fd.Trajectory
    difference: float | None = None


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    x = run()
    return x, time.perf_counter() - began


def sample_case(net: Preconditioned, case: Case, shape: tuple[int, ...], *, seed: int, preview: int = 64) -> Sampled:
    """Sample a case by fd.Sampler and by the textbook loop, and time both per evaluation, model included.

    A deterministic case starts both from the same noise and compares them. The plain loop of a stochastic one stops
    after its first points (the time of a step does not depend on which one it is), and its trajectory holds the first
    `preview` samples, which are the same ones in any batch size.
    """
    plan = case.plan()
    model = PlanModel(net, plan)
    sampler = fd.Sampler(model, plan, mode="eager")
    loop, per_step = LOOPS[case.solver], 2 if case.solver == "heun" else 1
    limit = PLAIN_POINTS if plan.stochastic else None
    go = trip(plan, case.schedule, per_step=per_step, limit=limit)
    short = trip(plan, case.schedule, per_step=per_step, limit=2)
    with torch.inference_mode():
        if plan.stochastic:
            start = plan.init_scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            loop(model, start, short)
            _, plain = _timed(lambda: loop(model, start, go))
            x, ours = _timed(lambda: sampler(shape, seed=seed))
            _, trajectory = sampler((preview, *shape[1:]), seed=seed, trajectory=True)
            return Sampled(x, plan, 1e6 * ours / plan.nfe, 1e6 * plain / len(go.t), trajectory)
        _, trajectory = sampler(shape, seed=seed, trajectory=True)
        start = trajectory.x[0]
        loop(model, start, short)
        other, plain = _timed(lambda: loop(model, start, go))
        x, ours = _timed(lambda: sampler(shape, seed=seed))
    difference = (other - x).abs().max().item()
    return Sampled(x, plan, 1e6 * ours / plan.nfe, 1e6 * plain / plan.nfe, trajectory, difference)
