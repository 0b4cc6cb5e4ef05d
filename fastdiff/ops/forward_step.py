"""One step of the forward chain, q(x_t | x_{t-1}), or any a x + s n."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.devices import widest
from fastdiff.ops import _noising
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.ops._noising import Seeds
from fastdiff.schedules import Betas, Schedule


def forward_step(
    x: Tensor,
    t: int | Tensor | None = None,
    schedule: Schedule | None = None,
    *,
    a: float | Tensor | None = None,
    s: float | Tensor | None = None,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Adds the noise of one forward step.

        x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) n,   or   a x + s n

    Args:
        x: x_{t-1} [B, *sample] (t = 0: the clean data), fp32, bf16 or fp16 (float64 in plain torch), any strides.
        t: index of the step, one or [B], with schedule = Betas.
        a, s: instead of t and schedule: numbers or tensors [B]; a^2 + s^2 may be anything.
        seeds, index, row, stream, noise, out_dtype: as in add_noise.
    Returns: x_t [B, *sample].
    Raises:  TypeError, ValueError: as add_noise; a schedule that is no Betas; a, s together with t or alone.
    Numerics: coefficients in float64, arithmetic in fp32; differentiable in x. Runs add_noise's kernel, or its loop.
    Source:  Ho et al. 2020, arXiv:2006.11239, eq. 2.
    """
    at, keyed, which = _checked(x, t, schedule, a, s, seeds, index, row, stream, noise)
    dtype = _noising.out_type(x, out_dtype)
    on_kernel = _noising.on_kernel(x, dtype, a, s, noise)
    if not on_kernel and not _noising.on_loop(x, dtype, noise, a, s):
        return forward_step_ref(
            x, at, schedule, a=a, s=s, seeds=keyed, index=which, row=row, stream=stream, noise=noise, out_dtype=dtype
        )
    if isinstance(schedule, Betas):
        coef = _noising.table_of(schedule, _table, (), x.device)
    else:
        coef = torch.stack(_padded(*_pair(a, s, x)), 1).float()
    return _noising.noised(x, coef, at, keyed, which, row, stream, noise, dtype, False, on_kernel)[0]


def forward_step_ref(
    x: Tensor,
    t: int | Tensor | None = None,
    schedule: Schedule | None = None,
    *,
    a: float | Tensor | None = None,
    s: float | Tensor | None = None,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`forward_step` in plain torch: computes in float64 for float64 data, else in float32; differentiable."""
    at, keyed, which = _checked(x, t, schedule, a, s, seeds, index, row, stream, noise)
    n = _noising.noise_of(x, keyed, which, row, stream, noise, _noising.wide(x))
    if isinstance(schedule, Betas):
        pair = _noising.table_of(schedule, _table, (), x.device, widest(x.device))[at][:, :2].unbind(-1)
    else:
        pair = _pair(a, s, x)
    return _noising.affine(x, n, *pair).to(_noising.out_type(x, out_dtype))


def _pair(a: float | Tensor | None, s: float | Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for name, value in (("a", a), ("s", s)):
        if not isinstance(value, int | float | Tensor) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number or a tensor [B], got {type(value).__name__}")
        c = (
            value.to(widest(value.device))
            if isinstance(value, Tensor)
            else torch.full((1,), value, dtype=widest(x.device), device=x.device)
        )
        if c.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {c.device}")
        if c.dim() > 1 or c.numel() not in (1, x.shape[0]):
            raise ValueError(f"{name} must be a number or have shape ({x.shape[0]},), got {tuple(c.shape)}")
        out.append(c.reshape(-1))
    first, second = torch.broadcast_tensors(*out)
    return first, second


def _padded(a: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return a, s, 0 * a, 0 * s


def _table(schedule: Betas) -> tuple[Tensor, ...]:
    betas = torch.from_numpy(schedule.betas.copy())
    return _padded(torch.sqrt(1 - betas), torch.sqrt(betas))


def _checked(
    x: Tensor, t: int | Tensor | None, schedule: Schedule | None, a: float | Tensor | None, s: float | Tensor | None,
    seeds: Seeds | None, index: Tensor | None, row: int, stream: int, noise: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    check_tensor("x", x, dtypes=FLOATS64)
    check_batched("x", x)
    at = None
    if a is None and s is None:
        if t is None or schedule is None:
            raise ValueError("give t and schedule, or a and s")
        if isinstance(schedule, Schedule) and not isinstance(schedule, Betas):
            raise TypeError(f"one forward step is defined for Betas, got {schedule}; give a and s instead")
        at = _noising.times(t, schedule, x)
    elif a is None or s is None or t is not None or schedule is not None:
        raise ValueError("give a and s together, and neither t nor schedule with them")
    else:
        _pair(a, s, x)
    return at, *_noising.noise_arguments(x, seeds, index, row, stream, noise, fill=False)
