"""What add_noise and forward_step share: times, coefficients, noise arguments and the launch of a x + s n."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.devices import widest
from fastdiff.lasting import lasting, traced_constant
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._dispatch import FLOATS64, check_tensor, graded, spread
from fastdiff.schedules import Betas, Schedule
from fastdiff.schedules.base import outside
from fastdiff.transforms import readable

Seeds = Sequence[int] | Tensor


def times(t: object, schedule: object, x: Tensor, *, raw: bool = False) -> Tensor:
    """t as a tensor [B] or [1] on x's device: int64 for Betas, floating for a continuous schedule.

    raw: what is outside on a device stays as it is, for a kernel that marks it itself.
    Raises: TypeError for a schedule that is none and for the other kind of time; ValueError for another shape, and for
        a number or a CPU tensor outside the schedule's range (on CUDA, where looking would wait for the device, and in
        compiled code, a tensor's gives NaN).
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be one of fastdiff.schedules, got {type(schedule).__name__}")
    if not isinstance(t, int | float | Tensor) and isinstance(t, Real):  # NumPy's
        t = int(t) if isinstance(t, Integral) else float(t)
    if isinstance(t, bool) or not isinstance(t, int | float | Tensor):
        raise TypeError(f"t must be a number or a tensor [B], got {type(t).__name__}")
    if isinstance(t, Tensor):
        out = t
    else:  # a fill, not a copy from the host, so that it can be captured
        out = torch.full((1,), t, dtype=torch.int64 if isinstance(t, int) else widest(x.device), device=x.device)
    if isinstance(schedule, Betas):
        if out.dtype.is_floating_point or out.dtype == torch.bool:
            raise TypeError(f"t must be an integer index 0..{len(schedule.betas) - 1} for {schedule}, got {out.dtype}")
        out = out.long()
    elif not out.dtype.is_floating_point:
        raise TypeError(f"t must be floating point, in [0, {schedule.t_max:g}], for {schedule}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"t must be on {x.device}, got {out.device}")
    if out.dim() == 0:
        out = out.view(1)
    if tuple(out.shape) not in ((1,), (x.shape[0],)):
        raise ValueError(f"t must be a scalar or have shape ({x.shape[0]},), got {tuple(out.shape)}")
    if not isinstance(t, Tensor):
        low = high = float(t)
        wrong = not 0 <= t <= schedule.t_max
    elif wrong := readable(out) and outside(out, schedule.t_max):
        low, high = out.min().item(), out.max().item()
    elif not raw and out.dtype.is_floating_point and not readable(out):
        out = torch.where(out.clamp(0, schedule.t_max) == out, out, torch.nan)
    if wrong:
        raise ValueError(f"t must be in 0..{schedule.t_max:g} for {schedule}, got {low:g}..{high:g}")
    return out


def check_chain(schedule: object, what: str) -> None:
    """Raises: TypeError unless the schedule is a chain, Betas."""
    if not isinstance(schedule, Betas):
        raise TypeError(f"{what} needs Betas, a chain made of betas [T], got {type(schedule).__name__}")


@traced_constant
def table_of(
    schedule: Betas,
    columns: Callable[..., Sequence[Tensor]],
    options: tuple[Hashable, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A chain's table [T, columns], made once from the float64 columns(schedule, *options), a module's function.

    Compiled code holds it as a constant: traced, it would be made again in every call.
    """
    cache = schedule.__dict__.setdefault("_op_tables", {})
    key = (columns, options, device, dtype)
    if key not in cache:
        with lasting():
            cache[key] = torch.stack([c.double() for c in columns(schedule, *options)], 1).to(device, dtype)
    return cache[key]


def noise_arguments(
    x: Tensor,
    seeds: Seeds | None,
    index: Tensor | None,
    row: int,
    stream: int,
    noise: Tensor | None,
    *,
    fill: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """seeds and index as int64 [B] on x's device, checked; None, None where the noise itself is given.

    An index that was not given is 0 each: zeros, or with fill=False None, which saves a launch.
    """
    batch = x.shape[0]
    if (seeds is None) == (noise is None):
        raise ValueError("give either seeds or noise, got " + ("neither" if seeds is None else "both"))
    for name, value in (("row", row), ("stream", stream)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= rng.MASK:
            raise ValueError(f"{name} must be an int in 0 .. 2**32 - 1, got {value!r}")
    if noise is not None:
        if index is not None:
            raise ValueError("index goes with seeds, not with noise")
        check_tensor("noise", noise, shape=x.shape, dtypes=FLOATS64, like=x)
        return None, None
    assert seeds is not None
    keyed = rng.seed_tensor(seeds, None if isinstance(seeds, Tensor) else x.device)
    check_tensor("seeds", keyed, shape=(batch,), dtypes=(torch.int64,), like=x)
    if index is None:
        return keyed, torch.zeros_like(keyed) if fill else None
    check_tensor("index", index, shape=(batch,), dtypes=(torch.int64,), like=x)
    return keyed, index


def noise_of(
    x: Tensor,
    seeds: Tensor | None,
    index: Tensor | None,
    row: int,
    stream: int,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """n [B, *sample] in a dtype: the noise that is given, or Philox's."""
    if noise is not None:
        return noise.to(dtype)
    assert seeds is not None
    return rng.normal(seeds, x.shape[1:], row=row, stream=stream, index=index).to(dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype plain torch computes in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def affine(x: Tensor, n: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """a x + s n with a, s [B or 1] float64, computed in n's dtype."""
    return spread(a.to(n.dtype), x) * x.to(n.dtype) + spread(s.to(n.dtype), x) * n


def out_type(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """x's dtype, or the one asked for."""
    if out_dtype is None:
        return x.dtype
    if out_dtype not in FLOATS64:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    return out_dtype


def on_kernel(x: Tensor, dtype: torch.dtype, *others: object) -> bool:
    """The kernel, unless float64 or a gradient to another argument than x is wanted."""
    return _dispatch.kernels_for(x) and torch.float64 not in (x.dtype, dtype) and not graded(*others)


def on_loop(x: Tensor, dtype: torch.dtype, noise: Tensor | None, *others: object) -> bool:
    """The CPU's loop: the same, and Philox noise."""
    return noise is None and torch.float64 not in (x.dtype, dtype) and _fused.wanted(x) and not graded(*others)


def noised(
    x: Tensor, coef: Tensor, t: Tensor | None, seeds: Tensor | None, index: Tensor | None, row: int, stream: int,
    noise: Tensor | None, dtype: torch.dtype, with_target: bool, by_kernel: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(x_t,) or (x_t, target), differentiable in x; coef [rows, 4], t [B], [1] or None (row = sample)."""
    run: Any = Noised.apply if graded(x) or torch.compiler.is_compiling() else Noised.forward
    out: tuple[Tensor, ...] = run(x, coef, t, seeds, index, row, stream, noise, dtype, with_target, by_kernel)
    return out


class Noised(torch.autograd.Function):
    """(x_t,) or (x_t, target) from coefficients; backward needs only those: dL/dx0 = alpha g + target_x0 g_target."""

    @staticmethod
    def forward(
        x: Tensor, coef: Tensor, t: Tensor | None, seeds: Tensor | None, index: Tensor | None, row: int, stream: int,
        noise: Tensor | None, dtype: torch.dtype, with_target: bool, by_kernel: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if by_kernel:
            x_t, target = run_kernel(x, coef, t, seeds, index, row, stream, noise, dtype, with_target)
            return (x_t,) if target is None else (x_t, target)
        assert seeds is not None
        outs = [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)]
        if with_target:
            outs.append(torch.empty_like(outs[0]))
        _on_cpu(x, coef, t, seeds, index, row, stream, outs)
        return tuple(outs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        x, coef, t = inputs[:3]
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        if x.requires_grad:
            ctx.save_for_backward(coef if t is None else coef[t])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (coef,) = ctx.saved_tensors
        parts = [spread(coef[:, 2 * i], g) * g for i, g in enumerate(grads) if g is not None]
        return (sum(parts[1:], start=parts[0]).to(ctx.dtype) if parts else None, *(None,) * 10)


def _on_cpu(
    x: Tensor, coef: Tensor, t: Tensor | None, seeds: Tensor, index: Tensor | None, row: int, stream: int,
    outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Writes outs, contiguous, by the C++ loop where there is a compiler, else by plain torch."""
    if _fused.noised(x, coef, t, seeds, index, row, stream, outs):
        return
    z, c = rng.normal(seeds, x.shape[1:], row=row, stream=stream, index=index), coef if t is None else coef[t]
    for i, out in enumerate(outs):
        out.copy_(affine(x, z, c[:, 2 * i], c[:, 2 * i + 1]))


def run_kernel(
    x: Tensor, coef: Tensor, t: Tensor | None, seeds: Tensor | None, index: Tensor | None, row: int, stream: int,
    noise: Tensor | None, dtype: torch.dtype, with_target: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Allocates the outputs and calls the registered kernel; coef [rows, 4], t [B], [1] or None (row = sample)."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    target = torch.empty_like(out) if with_target else None
    if x.numel():
        torch.ops.fastdiff.add_noise(x, noise, coef, t, seeds, index, row, stream, out, target)
    return out, target


def _launch(
    x: Tensor, noise: Tensor | None, coef: Tensor, t: Tensor | None, seeds: Tensor | None, index: Tensor | None,
    row: int, stream: int, out: Tensor, target: Tensor | None,
) -> None:  # fmt: skip
    batch, n = x.shape[0], x.shape[1:].numel()
    per_sample = coef.shape[0] > 1 if t is None else t.numel() > 1
    args = (
        x.contiguous(),
        None if noise is None else noise.contiguous(),
        coef,
        None if t is None else t.contiguous(),
        None if seeds is None else seeds.contiguous(),
        None if index is None else index.contiguous(),
        out,
        target,
        n,
        _dispatch.FIRST,
        coef.shape[0],
        int(per_sample),
        row,
        stream,
    )
    _dispatch.launch(_dispatch.kernels("add_noise").add_noise_kernel, args, n, batch)


_dispatch.register(
    "add_noise(Tensor x, Tensor? noise, Tensor coef, Tensor? t, Tensor? seeds, Tensor? index, int row, int stream, "
    "Tensor(a!) out, Tensor(b!)? target) -> ()",
    _launch,
)
