"""Sampling with a part of the sample known: inpainting, imputation, plans with fixed states, text infilling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.at_time import check_times, numbers_at, planes
from fastdiff.plan import Plan
from fastdiff.readout import BINNED, CATEGORICAL, ORDERS
from fastdiff.request import check_pair

__all__ = ["inpaint"]

CERTAIN = 80.0  # a logit: 1 / (1 + e^-80) is 1
NARROW = -30.0  # a logarithm of a std: far below the width of a bin


def inpaint(model: Callable[..., Any], plan: Plan, *, clean: bool = False) -> torch.nn.Module:
    """A model that knows a part of the sample: there it predicts what is known, elsewhere it is the model given.

        m' = where(mask, the m whose x0 is known, m)         of classes: certain logits; of bins: a mean without width

    The known part then goes from noise to data with the noise of the plan itself: at every row it is distributed as
    noised known data, by a first-order row of ddpm, ddim or Euler exactly so, and after the last row it is known data.
    This is replacement; a `solvers.restart` plan goes back and forth, as RePaint does.
    Args:
        model: as in fd.sample. plan: the one it is sampled with; at other times the known part is NaN.
        clean: the model sees known data themselves in place of noised ones, as models that were trained on conditions
            do (policies and planners with fixed states, imputation).
    Returns: a Module (x, t, *, known, mask=None, **cond), for fd.sample, Sampler in every mode, and Unrolled. Give
        known and mask as cond: known [B or 1, *sample], int64 classes of a plan of classes; mask [B or 1, *sample],
        True where known. Without a mask NaN says what is not known, of classes -1. Five operations a call, of numbers.
    Raises:  TypeError, ValueError: no plan, or one without noise levels or with rows of one time that read the model
        differently; no `known`; shapes that do not fit; classes that are not int64; in sampling a rule of guidance or
        a threshold that scales whole samples.
    Numerics: known data come out to the last digits of fp32, or of the model's precision, where the last row returns
        x0: within the plan's clip, of bins the nearest centre, with final="min" noised to the end. Where it is a sum
        of several outputs (ipndm, plms) rounding is larger, in half precision much: paste known data then. A class
        outside 0..K-1 gives NaN logits, which check_finite reports.
    Source:  Song et al. 2021, arXiv:2011.13456, appendix I.2 (imputation); Lugmayr et al. 2022, arXiv:2201.09865.
    """
    check_pair(model, plan)
    if not isinstance(clean, bool):
        raise TypeError(f"clean must be True or False, got {clean!r}")
    if plan.readout in ORDERS:
        raise ValueError(
            f"plan {plan.name!r} keeps what is known by itself: give x_T, {plan.mask} where it is not known"
        )
    if plan.readout not in CATEGORICAL:
        check_times(plan)
    return _Inpaint(model, plan, clean)


class _Inpaint(torch.nn.Module):
    keeps_known = True

    def __init__(self, model: Callable[..., Any], plan: Plan, clean: bool) -> None:
        super().__init__()
        self.model, self.plan, self.clean = model, plan, clean

    def forward(
        self, x: Tensor, t: Tensor, *, known: Tensor | None = None, mask: Tensor | None = None, **cond: Any
    ) -> Any:  # noqa: ANN401 - any model argument
        if known is None:
            raise TypeError('fd.inpaint needs what is known: fd.sample(..., cond={"known": data, "mask": where})')
        if self.plan.readout in CATEGORICAL:
            return self._classes(x, t, known, mask, cond)
        known = _fitting("known", known, x)
        mask = ~known.isnan() if mask is None else _fitting("mask", mask, x)
        of_x0, of_x, _, _, of_clean = numbers_at(self.plan, t, x)
        seen = torch.where(mask, (of_clean * known).to(x.dtype), x) if self.clean else x
        m = self.model(seen, t, **cond)
        many = planes(m, x)
        if not many:
            return m  # the sampler says what is wrong with it
        sure = torch.addcmul(of_x * x, of_x0, known.to(of_x0.dtype)).to(m.dtype)
        if many == 1:
            return torch.where(mask, sure, m)
        mean, second = m.chunk(2, 1)  # a second plane: a learned variance, or the width of bins
        mean = torch.where(mask, sure, mean)
        if self.plan.readout in BINNED:
            second = torch.where(mask, NARROW, second)
        return torch.cat([mean, second], 1)

    def _classes(self, x: Tensor, t: Tensor, known: Tensor, mask: Tensor | None, cond: dict[str, Any]) -> Any:  # noqa: ANN401
        known = _fitting("known", known, x[..., 0], torch.int64)[..., None]
        mask = known >= 0 if mask is None else _fitting("mask", mask, x[..., 0])[..., None]
        if x.shape[-1] == 1:
            seen, there = 2.0 * known - 1, (known == 0) | (known == 1)
            sure = seen * CERTAIN
        else:
            at = known == torch.arange(x.shape[-1], device=x.device)
            seen, there = 2.0 * at - 1, at.any(-1, keepdim=True)
            sure = torch.where(at, 0.0, -torch.inf)
        m = self.model(torch.where(mask, seen.to(x.dtype), x) if self.clean else x, t, **cond)
        if planes(m, x) != 1:
            return m
        return torch.where(mask, torch.where(there, sure, torch.nan).to(m.dtype), m)


def _fitting(name: str, value: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = torch.bool if name == "mask" else dtype
    if not isinstance(value, Tensor) or (dtype is not None and value.dtype != dtype):
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a {'' if dtype is None else f'{dtype} '}tensor, got {got}")
    if value.dim() != x.dim() or any(v not in (1, n) for v, n in zip(value.shape, x.shape, strict=True)):
        raise ValueError(
            f"{name} must fit the samples, {tuple(x.shape)}, with 1 where it is the same; got {tuple(value.shape)}"
        )
    return value
