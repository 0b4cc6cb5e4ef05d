"""The rows of a plan written out in plain torch: to export a sampler with its network, to differentiate through it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from fastdiff.cpu import HostRow, host_rows
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.parameters import seen_by
from fastdiff.plan import Plan
from fastdiff.request import check_pair, check_second

__all__ = ["Unrolled"]

Names = Mapping[str, Any]


class Unrolled(torch.nn.Module):
    """A model and a plan as one module of plain torch operations, without this library's kernels, loops or noise.

        x = Unrolled(model, plan)(x_T, noise, cond, uncond)   as   fd.sample(model, plan, x_T.shape, x_T=x_T, ...)

    torch.export, torch.compile and AOTInductor take it whole; autograd goes through every row, to the model's
    parameters, x_T, noise and conditions: a reward of the sample trains the model directly.
    Args:
        model: model(x, t, **cond) -> Tensor of x's shape; a Module's parameters are this one's. plan: of an affine
            readout and no learned variance.
        guidance: w of m = uncond + w (cond - uncond), two calls a row, 1 is none; None is the plan's own column, if it
            has one.
        grad_rows: K, gradients through the last K rows alone (DRaFT-K); None is all. checkpoint: every row is computed
            again in backward, so that a model's activations are held for one row at a time (not inside torch.func).
        dtype: of the model's input; None is that of a Module's parameters, else the state's.
    Raises: TypeError, ValueError: no plan, or one of classes, bins or a learned variance; a guidance that is no finite
        number; grad_rows that are not in 1..plan.nfe.
    Numerics: the sampler's own fp32 coefficients; fp32 (float64 for float64), equal to fd.sample to rounding.
    Source:  Clark et al. 2024, arXiv:2309.17400, section 4 (DRaFT); Prabhudesai et al. 2023, arXiv:2310.03739.
    """

    def __init__(
        self, model: Callable[..., Any], plan: Plan, *, guidance: float | None = None, grad_rows: int | None = None,
        checkpoint: bool = False, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_pair(model, plan)
        if plan.beyond_table:
            raise ValueError(f"only rows that are the table's alone are written out, {plan.name} {plan.beyond_table}")
        whole = isinstance(grad_rows, Integral) and not isinstance(grad_rows, bool)
        if grad_rows is not None and not (whole and 1 <= grad_rows <= plan.nfe):
            raise ValueError(f"grad_rows must be in 1..{plan.nfe}, the rows of {plan.name}, got {grad_rows!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype, the model's input type, must be a floating point torch.dtype, got {dtype!r}")
        self.model, self.plan, self.checkpoint, self.dtype = model, plan, checkpoint, dtype
        self.asked, self.weights = guidance is not None or plan.guidance is not None, _weights(plan, guidance)
        self.first = 0 if grad_rows is None else plan.nfe - int(grad_rows)
        self.rows, self.c_in, self.places = host_rows(plan), plan.c_in.tolist(), plan.allocate().physical
        self.noises = sum(row.noisy for row in self.rows)  # normals [B, *] that a call takes
        self.times, self.kind = plan.times.tolist(), torch.int64 if plan.times.dtype == np.int64 else torch.float32

    def forward(
        self, x_T: Tensor, noise: Tensor | None = None, cond: Names | None = None, uncond: Names | None = None
    ) -> Tensor:
        """The samples.

        Args: x_T: [B, *sample], the state at row 0 (plan.init_scale times a normal, as a rule). noise: the normals of
            the rows that add some, in their order, [noises, B, *sample]; None where there are none. cond, uncond: the
            model's keyword arguments, and those that differ in guidance's second call.
        Returns: [B, *sample] fp32, float64 for float64.
        """
        self._check(x_T, noise, cond, uncond)
        names = dict(cond or {}), {**(cond or {}), **(uncond or {})}
        x = x_T if x_T.dtype == torch.float64 else x_T.float()
        slots: tuple[Tensor | None, ...] = (x, *[None] * (self.places - 1))
        drawn = iter(() if noise is None else noise.to(x.dtype).unbind(0))
        for k, row in enumerate(self.rows):
            n = next(drawn) if row.noisy else None
            with torch.no_grad() if k < self.first else contextlib.nullcontext():
                if self.checkpoint and torch.is_grad_enabled():
                    slots = recomputed(self._row, k, n, *names, *slots, use_reentrant=False)
                else:
                    slots = self._row(k, n, *names, *slots)
        out = slots[0]
        assert out is not None
        return out

    def _row(
        self, k: int, n: Tensor | None, cond: dict[str, Any], uncond: dict[str, Any], *slots: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """One model evaluation (two with guidance), and every slot after it."""
        row, x = self.rows[k], slots[0]
        assert x is not None
        m = self._output(k, x, cond)
        if self.weights is not None:
            u = self._output(k, x, uncond)
            m = u + self.weights[k] * (m - u)
        p = _prediction(row, x, m)
        new = list(slots)
        for target in row.targets:
            terms = [(slots[at], c) for at, c in target.terms] + [(p, target.b), (m, target.d), (n, target.s)]
            kept = [c * v for v, c in terms if c != 0 and v is not None]
            new[target.place] = sum(kept[1:], start=kept[0]) if kept else torch.zeros_like(x)
        return tuple(new)

    def _output(self, k: int, x: Tensor, names: dict[str, Any]) -> Tensor:
        """The model's output at row k, in the state's dtype and memory that it does not use again."""
        shown = x if self.c_in[k] == 1 else self.c_in[k] * x
        seen = seen_by(self.model, shown) if self.dtype is None else shown.to(self.dtype)
        watched = not torch.compiler.is_compiling() and not seen.is_inference()
        version = seen._version if watched else 0
        m = self.model(seen, torch.full((x.shape[0],), self.times[k], dtype=self.kind, device=x.device), **names)
        check_tensor("the model's output", m, shape=x.shape, dtypes=FLOATS64, like=x)
        if watched and seen._version != version:
            raise ValueError("the model changed its input x in place; x is the sampler's state: let the model copy it")
        reused = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return m.to(x.dtype, copy=reused)  # type: ignore[no-any-return]

    def _check(self, x_T: Tensor, noise: Tensor | None, cond: Names | None, uncond: Names | None) -> None:
        check_tensor("x_T", x_T, dtypes=FLOATS64)
        check_batched("x_T", x_T)
        if noise is not None:
            check_tensor("noise", noise, dtypes=FLOATS64, like=x_T)
        given = 0 if noise is None else noise.shape[0] if noise.dim() else 1
        if given != self.noises:
            raise ValueError(f"noise must hold {self.noises} normals, one a row that adds some, got {given}")
        if noise is not None:
            check_tensor("noise", noise, shape=(given, *x_T.shape), dtypes=FLOATS64)
        for name, value in (("cond", cond), ("uncond", uncond)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a dict of keyword arguments, got {type(value).__name__}")
        if uncond is None and self.weights is not None:
            raise ValueError("guidance needs uncond, the model's arguments without the condition; got uncond=None")
        if uncond is not None and not self.asked:
            raise ValueError("uncond was given without guidance; give guidance=w (1 is none)")
        if self.weights is not None:
            check_second(cond, uncond)


def _weights(plan: Plan, guidance: float | None) -> list[float] | None:
    """A weight a row; None where all are 1."""
    if guidance is None:
        column = [] if plan.guidance is None else plan.guidance.tolist()
    elif isinstance(guidance, bool) or not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    else:
        column = [float(guidance)] * plan.nfe
    return column if any(w != 1 for w in column) else None


def _prediction(row: HostRow, x: Tensor, m: Tensor) -> Tensor:
    """p = clamp(c_skip (x + c_ratio m), lo, hi)."""
    p = row.c_skip * (x + row.c_ratio * m) if row.c_skip else row.c_out * m
    return p.clamp(row.lo, row.hi) if row.clamps else p
