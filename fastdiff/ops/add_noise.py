"""Forward noising q(x_t | x_0), with the training target from the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.ops import _levels, _noising
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.ops._noising import Seeds
from fastdiff.schedules import Betas, Schedule


def _v(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Its limit (-1, 0) where alpha = sigma = 0: alpha goes first where a Bayesian flow knows nothing."""
    h = torch.hypot(a, s)
    nothing = h == 0
    return torch.where(nothing, -1.0, -s / h), torch.where(nothing, 0.0, a / h)


# target name -> its coefficients of x0 and eps, from float64 alpha, sigma
TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (0 * a, 1 + 0 * s),
    "v": _v,
    "x0": lambda a, s: (1 + 0 * a, 0 * s),
    "score": lambda a, s: (0 * a, -1 / s),
    "flow": lambda a, s: (-1 + 0 * a, 1 + 0 * s),
}


def add_noise(
    x0: Tensor,
    t: int | float | Tensor,
    schedule: Schedule,
    *,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    target: str | None = None,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noises clean data to time t, and gives the training target on request.

        x_t = alpha(t) x0 + sigma(t) n
        eps = n;  v = (alpha n - sigma x0) / sqrt(alpha^2 + sigma^2);  score = -n / sigma;  flow = n - x0

    Args:
        x0: [B, *sample], fp32, bf16 or fp16 (float64 in plain torch), any strides.
        t: one time, or [B]: an integer index for Betas, floating point for a continuous schedule.
        schedule: one of fastdiff.schedules.
        seeds: B ints or int64 [B]: n = rng.normal(seeds, sample, row=row, stream=stream, index=index), drawn in the
            kernel.   index: int64 [B], None is 0 each.   row: changes n (a training step, say).
        noise: n itself, [B, *sample]; not with seeds.   target: None, "eps", "v", "x0", "score" or "flow".
        out_dtype: of x_t and the target; default x0's.
    Returns: x_t [B, *sample], or (x_t, target).
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, an unknown target, seeds and noise both or neither,
        integer t for a continuous schedule or floating t for Betas, t out of range (on CUDA: NaN instead of an error).
    Numerics: coefficients in float64, arithmetic in fp32. Differentiable in x0 (alpha g and the target's part), and
        nothing of full size is saved. On a CPU a C++ loop does it in one pass: `fastdiff.ops.cpu_compiler`.
    Source:  Ho et al. 2020, arXiv:2006.11239, eq. 4; v: Salimans and Ho 2022, arXiv:2202.00512.
    """
    known = _levels.usable(schedule, x0)
    at, keyed, which = _checked(x0, t, schedule, seeds, index, row, stream, target, noise, raw=known)
    dtype = _noising.out_type(x0, out_dtype)
    on_kernel = _noising.on_kernel(x0, dtype, noise)
    if not on_kernel and not _noising.on_loop(x0, dtype, noise):
        return add_noise_ref(
            x0, at, schedule, seeds=keyed, index=which, row=row, stream=stream, target=target, noise=noise,
            out_dtype=dtype,
        )  # fmt: skip
    which_row: Tensor | None = at
    if isinstance(schedule, Betas):
        coef = _noising.table_of(schedule, _table, (target,), x0.device)
    elif known:
        coef, which_row = _levels.coefficients(schedule, at, "noise", target), None
    else:
        coef, which_row = torch.stack(_columns(schedule, at, target), 1).float(), None
    out = _noising.noised(
        x0, coef, which_row, keyed, which, row, stream, noise, dtype, target is not None, on_kernel
    )  # fmt: skip
    return out[0] if target is None else (out[0], out[1])


def add_noise_ref(
    x0: Tensor,
    t: int | float | Tensor,
    schedule: Schedule,
    *,
    seeds: Seeds | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
    target: str | None = None,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`add_noise` in plain torch: computes in float64 for float64 data, else in float32; differentiable."""
    at, keyed, which = _checked(x0, t, schedule, seeds, index, row, stream, target, noise)
    dtype = _noising.out_type(x0, out_dtype)
    n = _noising.noise_of(x0, keyed, which, row, stream, noise, _noising.wide(x0))
    alpha, sigma, *pair = _columns(schedule, at, target)
    x_t = _noising.affine(x0, n, alpha, sigma).to(dtype)
    return x_t if target is None else (x_t, _noising.affine(x0, n, *pair).to(dtype))


def _columns(schedule: Schedule, t: Tensor, target: str | None) -> tuple[Tensor, ...]:
    alpha, sigma = schedule.alpha_sigma(t)
    return alpha, sigma, *((alpha, sigma) if target is None else TARGETS[target](alpha, sigma))


def _table(schedule: Betas, target: str | None) -> tuple[Tensor, ...]:
    return _columns(schedule, torch.arange(len(schedule.betas), device="cpu"), target)


def _checked(
    x0: Tensor, t: int | float | Tensor, schedule: Schedule, seeds: Seeds | None, index: Tensor | None, row: int,
    stream: int, target: str | None, noise: Tensor | None, *, raw: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    check_tensor("x0", x0, dtypes=FLOATS64)
    check_batched("x0", x0)
    if target is not None and target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; valid: {', '.join(TARGETS)}, or None")
    at = _noising.times(t, schedule, x0, raw=raw)
    return at, *_noising.noise_arguments(x0, seeds, index, row, stream, noise, fill=False)
