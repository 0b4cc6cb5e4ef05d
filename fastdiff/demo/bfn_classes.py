"""Sampling a Bayesian flow over classes by the package and by the paper's loop, timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastdiff as fd
from fastdiff.demo.report import Row

__all__ = ["ClassCase", "ClassSampled", "class_loss", "sample_classes", "total_bits"]

Tensor = torch.Tensor
PLAIN_STEPS = 10


@dataclass(frozen=True)
class ClassCase:
    """A solver of classes, e.g. ClassCase("bfn_discrete", schedule, 100)."""

    solver: str
    schedule: fd.schedules.BFNDiscrete
    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The solver, and its method where it has one."""
        return self.options.get("method", self.solver)

    def plan(self) -> fd.Plan:
        """The solver's table."""
        return getattr(fd.solvers, self.solver)(self.schedule, self.steps, **self.options)


@dataclass(frozen=True)
class ClassSampled:
    """Classes [B, *D], what the first samples went through, and microseconds an evaluation."""

    x: Tensor
    plan: fd.Plan
    trajectory: fd.Trajectory
    us: float
    us_plain: float
    us_beyond_model: float
    us_beyond_model_plain: float

    def row(self, part: str, case: ClassCase, metrics: dict[str, float], missed: list[str]) -> Row:
        """The row of the demo's table."""
        return Row(
            part, f"BFN, K = {self.plan.classes}", case.label, "default", self.plan.nfe, self.us, self.us_plain,
            self.us_beyond_model, self.us_beyond_model_plain, metrics, missed,
        )  # fmt: skip


def plain_classes(
    model: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], schedule: fd.schedules.BFNDiscrete, n: int,
    stop: int,
) -> Tensor:  # fmt: skip
    """Algorithm 9 of Graves et al. 2023 in theta, step by step in eager torch; the first `stop` steps only."""
    K, beta_1 = schedule.num_classes, schedule.beta_1
    theta = torch.full((*shape, K), 1 / K)
    for i in range(1, min(n, stop) + 1):
        p = torch.softmax(model(2 * theta - 1, torch.full((shape[0],), (i - 1) / n)), dim=-1)
        k = torch.distributions.Categorical(probs=p).sample()
        accuracy = beta_1 * (2 * i - 1) / n**2
        mean = accuracy * (K * nn.functional.one_hot(k, K) - 1)
        y = mean + math.sqrt(accuracy * K) * torch.randn_like(theta)
        theta = torch.exp(y) * theta
        theta = theta / theta.sum(dim=-1, keepdim=True)
    return theta


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    x = run()
    return x, time.perf_counter() - began


def sample_classes(
    net: nn.Module, case: ClassCase, shape: tuple[int, ...], *, seed: int, preview: int = 8
) -> ClassSampled:
    """Sample a case, and time it and the paper's loop, with the network and with one that costs nothing."""
    plan, stop = case.plan(), min(case.steps, PLAIN_STEPS)
    nothing = torch.zeros(*shape, case.schedule.num_classes)

    def idle(x: Tensor, t: Tensor) -> Tensor:
        return nothing

    def plain(model: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return plain_classes(model, shape, case.schedule, case.steps, stop)

    with torch.inference_mode():
        sampler, empty = (fd.Sampler(m, plan, mode="eager") for m in (net, idle))
        x, ours = _timed(lambda: sampler(shape, seed=seed))
        _, trajectory = sampler((preview, *shape[1:]), seed=seed, trajectory=True)
        empty(shape, seed=seed)
        _, alone = _timed(lambda: empty(shape, seed=seed))
        _, other = _timed(lambda: plain(net))
        _, other_alone = _timed(lambda: plain(idle))
    micro = [1e6 * v for v in (ours / plan.nfe, other / stop, alone / plan.nfe, other_alone / stop)]
    return ClassSampled(x, plan, trajectory, *micro)


def class_loss(net: nn.Module, x: Tensor, t: Tensor, schedule: fd.schedules.BFNDiscrete, seeds: Tensor) -> Tensor:
    """The continuous-time loss of classes x at times t, in bits a token, [B]."""
    seen = fd.ops.categorical_noise(x, t, schedule, seeds=seeds)
    assert isinstance(seen, Tensor)
    logits = net(seen, schedule.model_time(t).float())
    return fd.training.bfn_discrete_loss(logits, x, t, schedule, units="bits_per_dim")


def total_bits(net: nn.Module, x: Tensor, schedule: fd.schedules.BFNDiscrete, *, times: int, seed: int) -> float:
    """Bits a token that sending x by the flow takes: the continuous-time loss at `times` times, and reconstruction."""
    total = 0.0
    with torch.inference_mode():
        for i in range(times):
            t = torch.full((len(x),), (i + 0.5) / times, dtype=torch.float64)
            total += class_loss(net, x, t, schedule, torch.arange(len(x)) + seed + i * len(x)).mean().item() / times
        seen = fd.ops.categorical_noise(x, 0.0, schedule, seeds=torch.arange(len(x)) + seed + times * len(x))
        logits = net(seen, torch.ones(len(x)))
        left = fd.training.bfn_discrete_reconstruction(logits, x, schedule, units="bits_per_dim")
    return total + left.mean().item()
