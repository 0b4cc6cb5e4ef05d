"""Guidance by a gradient: a classifier's, an energy's, a reward's, a measurement's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.at_time import check_times, numbers_at, planes
from fastdiff.plan import Plan
from fastdiff.request import check_pair

__all__ = ["classifier_guidance"]

LogProb = Callable[..., Tensor]
HIDDEN = "no_grad, inference_mode or detach"


def classifier_guidance(
    model: Callable[..., Any],
    plan: Plan,
    log_prob: LogProb,
    *,
    scale: float = 1.0,
    of: str = "x",
    given: Sequence[str] = (),
) -> torch.nn.Module:
    """A model guided by the gradient of a log-probability, in any prediction.

        score' = score + scale g,  x0' = x0 + scale (sigma^2 / alpha) g,  eps' = eps - scale sigma g;  g = grad log_prob

    Args:
        model: as in fd.sample; where it is a function and log_prob a Module, tell fd.sample its dtype. plan: the one it
            is sampled with; at other times the result is NaN.
        log_prob: (x, t, **those of `given`) -> [B], differentiable in x. x is the state x_t [B, *] fp32 (of "x"), for a
            classifier of noised data; or the model's x0, for a function of clean data (of "x0"). t is the model's, the
            schedule's is schedule.time_of_model(t).
        scale: of the gradient; 1 samples p(x | y) where log_prob is log p(y | x_t).
        of: "x", or "x0": the gradient goes through the model, as in diffusion posterior sampling. cond and uncond get
            one each; let a model combine them itself where log_prob is to see the guided x0.
        given: names of the keyword arguments in cond that log_prob takes; the model takes the others.
    Returns: a Module (x, t, **cond), for fd.sample and Sampler in every mode, and Unrolled, whose gradients go through
        this one. A call is one more backward pass, of log_prob or of both.
    Raises:  TypeError, ValueError: no plan; a plan of classes or bins, without noise levels, with rows of one time that
        read the model differently, or with a row at alpha = 0, where x says nothing; an unknown `of`; a scale that is
        not finite; in sampling a value that autograd cannot follow to x, or a model that it cannot ("x0").
    Source:  Dhariwal and Nichol 2021, arXiv:2105.05233, algorithms 1 and 2; Chung et al. 2023, arXiv:2209.14687 (x0).
    """
    check_pair(model, plan)
    if not callable(log_prob):
        raise TypeError(f"log_prob must be callable as log_prob(x, t), got {type(log_prob).__name__}")
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if of not in ("x", "x0"):
        raise ValueError(f"unknown of={of!r}; valid: x, x0")
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f'given must be a sequence of names, such as ("y",), got {given!r}')
    if plan.readout != "affine":
        raise ValueError(f"guidance by a gradient needs a model of numbers, {plan.name} reads out {plan.readout!r}")
    if np.any(plan.alpha == 0):
        raise ValueError(
            f"guidance by a gradient needs alpha > 0, {plan.name} has alpha = 0 in row {int(np.argmin(plan.alpha))}"
        )
    check_times(plan)
    return _Guided(model, plan, log_prob, float(scale), of == "x0", tuple(given))


class _Guided(torch.nn.Module):
    def __init__(
        self,
        model: Callable[..., Any],
        plan: Plan,
        log_prob: LogProb,
        scale: float,
        through: bool,
        given: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.model, self.plan, self.log_prob = model, plan, log_prob
        self.scale, self.through, self.given = scale, through, given

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:  # noqa: ANN401 - any model argument
        mine = {name: cond.pop(name) for name in self.given if name in cond}
        of_x0, of_x, of_score, of_state, _ = numbers_at(self.plan, t, x)
        further = torch.is_grad_enabled()  # Unrolled: a gradient of the gradient
        with torch.enable_grad():
            state = (of_state * x).float()
            state = state if further and state.requires_grad else state.detach().requires_grad_()
            seen = state / of_state if self.through else x
            with torch.set_grad_enabled(further or self.through):
                m = self.model(seen.to(x.dtype), t, **cond)
            many = planes(m, x)
            if not many:
                return m  # the sampler says what is wrong with it
            if self.through and not m.requires_grad:
                raise ValueError(f"the model's output does not depend on x through autograd ({HIDDEN} in it?)")
            mean = m if many == 1 else m[:, : x.shape[1]]  # a second plane is a learned variance
            value = self.log_prob((mean.float() - of_x * seen) / of_x0 if self.through else state, t, **mine)
            grad = _gradient(value, state, t, further)
        moved = (mean + self.scale * of_score * grad).to(m.dtype)
        return moved if many == 1 else torch.cat([moved, m[:, x.shape[1] :]], 1)


def _gradient(value: object, state: Tensor, t: Tensor, further: bool) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != t.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"log_prob must return a number a sample, shape {tuple(t.shape)}, got {got}")
    grad = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), state, create_graph=further, allow_unused=True)
    if grad is None:
        raise ValueError(f"log_prob does not depend on x through autograd ({HIDDEN} in it?)")
    return grad
