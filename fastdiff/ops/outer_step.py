"""One row of a plan whose x belongs to somebody else: x is read, x' is a new tensor, the history is a slab."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.ops import _dispatch
from fastdiff.ops._dispatch import FLOATS, check_tensor
from fastdiff.ops._row import check_table
from fastdiff.ops.affine_step import affine_step_ref
from fastdiff.plan import ROW_HEADER, row_width

__all__ = ["outer_step", "outer_step_ref"]


def outer_step(
    x: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: int,
    *,
    slots: int,
    slab: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs one row of a plan from x to a new x', for loops that hold x themselves (a scheduler's step).

        p = clamp(c_skip (x + c_ratio m), lo, hi);   (x', S') = A (x, S) + b p + d m + s n

    Args:
        x, model_out: [B, *sample], fp32, bf16 or fp16; made contiguous where they are not. Only read.
        table: fp32 [N, W] of `Plan.pack()`.   row: which one, an int on the host.   slots: logical slots, 1 to 6.
        slab: fp32 [P - 1, B, *sample], contiguous: the physical slots besides x, updated in place (None: P = 1).
        seeds, index: int64 [B]: Philox noise drawn in the kernel.   noise: n itself; not with seeds.
        x0: fp32 output [B, *sample].   out_dtype: of x', x's by default.
    Returns: x' [B, *sample]. One launch on CUDA.
    Raises:  TypeError, ValueError: a tensor of another dtype, shape, device or layout; a row outside the table; seeds
        with noise.
    Numerics: those of affine_step: fp32 arithmetic, within 4e-6 of float64, x' rounded once.
    """
    check_tensor("x", x)
    check_tensor("model_out", model_out, shape=x.shape, like=x)
    if x.dim() < 1:
        raise ValueError("x must be [B, *sample], got a 0-d tensor")
    check_table(table, slots, x)
    if not isinstance(row, int) or not 0 <= row < table.shape[0]:
        raise ValueError(f"row must be an int in 0..{table.shape[0] - 1}, got {row!r}")
    if slab is not None:
        check_tensor("slab", slab, dtypes=(torch.float32,), like=x, contiguous=True)
        if slab.shape[1:] != x.shape:
            raise ValueError(f"slab must be [P - 1, {', '.join(map(str, x.shape))}], got {tuple(slab.shape)}")
    if seeds is not None and noise is not None:
        raise ValueError("give seeds (noise drawn in the kernel) or noise, not both")
    for name, v in (("seeds", seeds), ("index", index)):
        if v is not None:
            check_tensor(name, v, shape=x.shape[:1], dtypes=(torch.int64,), like=x)
    if noise is not None:
        check_tensor("noise", noise, shape=x.shape, like=x)
    if x0 is not None:
        check_tensor("x0", x0, shape=x.shape, dtypes=(torch.float32,), like=x, contiguous=True)
    dtype = out_dtype or x.dtype
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype must be fp32, bf16 or fp16, got {dtype}")
    if _dispatch.kernels_for(x) and x.numel():
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        torch.ops.fastdiff.outer_step(x, model_out, out, table, row, slots, slab, seeds, index, noise, x0)
        return out
    y, state, p = outer_step_ref(
        x, model_out, table, row, slots=slots, slab=slab, seeds=seeds, index=index, noise=noise
    )
    if slab is not None and state is not None:
        slab.copy_(state)
    if x0 is not None:
        x0.copy_(p)
    return y.to(dtype)


def outer_step_ref(
    x: Tensor, model_out: Tensor, table: Tensor, row: int, *, slots: int, slab: Tensor | None = None,
    seeds: Tensor | None = None, index: Tensor | None = None, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """`outer_step` in plain torch. Returns: x', the new slab and x0, in float32 (float64 where slab or x is)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.to(dtype)[None]
    if slab is not None:
        state = torch.cat([state, slab.to(dtype)])
    at = torch.tensor([row], device=x.device)
    new, _, p = affine_step_ref(
        state, model_out.to(dtype), table, at, slots=slots, seeds=seeds, index=index, stream=rng.ROWS, noise=noise
    )
    return new[0], None if slab is None else new[1:], p


def _launch(
    x: Tensor, model_out: Tensor, out: Tensor, table: Tensor, row: int, slots: int, slab: Tensor | None,
    seeds: Tensor | None, index: Tensor | None, noise: Tensor | None, x0: Tensor | None,
) -> None:  # fmt: skip
    batch, n = x.shape[0], x.shape[1:].numel()
    if seeds is not None and index is None:
        index = torch.zeros_like(seeds)
    contiguous = (None if v is None else v.contiguous() for v in (noise,))
    args = (
        x.contiguous(), model_out.contiguous(), out, slab, x0, *contiguous, table, seeds, index,
        n, batch, _dispatch.FIRST, row, rng.ROWS,
    )  # fmt: skip
    _dispatch.launch(
        _dispatch.kernels("outer_step").outer_step_kernel, args, n, batch, slots=slots, SLOTS=slots, HEADER=ROW_HEADER,
        WIDTH=row_width(slots), NOISE=1 if seeds is not None else 2 if noise is not None else 0,
    )  # fmt: skip


_dispatch.register(
    "outer_step(Tensor x, Tensor model_out, Tensor(a!) out, Tensor table, int row, int slots, Tensor(b!)? slab, "
    "Tensor? seeds, Tensor? index, Tensor? noise, Tensor(c!)? x0) -> ()",
    _launch,
)
