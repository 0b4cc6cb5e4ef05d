"""The squared error between one-hot classes and a network's softmax, with its gradient from the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.categorical_cpu import chunks, loss_into
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._categorical import (
    check_classes,
    check_logits,
    classes_of,
    row_stride,
    rows_of,
    vectors,
    with_rows,
)
from fastdiff.ops._dispatch import FLOATS64, check_tensor
from fastdiff.ops._once import once
from fastdiff.ops._scaled import scaled

PAIRS = {"BLOCK": 1024, "PARTS": 4, "num_warps": 1}  # one warp: its sum needs no shared memory


def categorical_loss(logits: Tensor, x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """The loss of a Bayesian flow network on categorical data, a number a sample.

        loss_b = weight_b mean_d ||e_x - softmax(logits)||^2        (K = 2: 2 (x - sigmoid(logit))^2)

    With weight = K beta_1 t_bfn this is the continuous-time loss, in nats a token.
    Args:
        logits: [B, *D, K'], fp32, bf16 or fp16 (float64 in plain torch), any strides; K' = K, or 1 for K = 2.
        x: int64 classes [B, *D].   weight: a number, or a tensor [B] or [1].
    Returns: [B] fp32 (float64 for float64 logits), differentiable once in logits and weight.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, K' = 0 or 2, classes outside 0..K-1 (on CUDA: NaN).
    Numerics: fp32; the gradient is kept in the logits' dtype, the one tensor of their size that is saved.
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 205.
    """
    weight = _checked(logits, x, weight)
    kernel = _dispatch.kernels_for(logits) and logits.dtype != torch.float64
    if not kernel and (torch.compiler.is_compiling() or not logits.is_cpu) or logits.numel() == 0:
        return categorical_loss_ref(logits, x, weight)
    error = _Error.apply(logits, x) if _dispatch.graded(logits) else _error(logits, x, None)
    return error if isinstance(weight, float) and weight == 1 else weight * error


def categorical_loss_ref(logits: Tensor, x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """`categorical_loss` in plain torch: float64 for float64 logits, else fp32; differentiable by autograd."""
    weight = _checked(logits, x, weight)
    m = logits.to(_dtype(logits))
    if m.shape[-1] == 1:
        error = 2 * (torch.sigmoid(m[..., 0]) - x) ** 2
    else:
        at = x[..., None] == torch.arange(m.shape[-1], device=x.device)
        error = ((torch.softmax(m, -1) - at.to(m.dtype)) ** 2).sum(-1)
    return weight * error.reshape(len(x), x.shape[1:].numel()).mean(1)


class _Error(torch.autograd.Function):
    """mean_d ||e_x - softmax(logits)||^2 [B], keeping nothing but its gradient, made in the same pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        error = _error(logits, x, grad)
        ctx.save_for_backward(grad)
        return error

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        factor = 1.0 / grad.shape[1:-1].numel()
        return *once(lambda: (scaled(grad, upstream[0], factor=factor),)), None


def _error(logits: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """The error [B]; grad receives tokens times its gradient."""
    batch, width = logits.shape[0], logits.shape[-1]
    tokens = logits.shape[1:-1].numel()
    if _dispatch.kernels_for(logits) and logits.dtype != torch.float64:
        programs = _programs(width, tokens)
        errors = torch.empty(batch * programs, dtype=torch.float32, device=logits.device)
        parts = errors.view(batch, programs)
        torch.ops.fastdiff.categorical_loss(logits, x, parts, grad)
        return errors if programs == 1 else parts.sum(1)
    found = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if _fused.wanted(logits, x) and loss_into(logits, x, found, grad):
        return found
    return _error_on_cpu(
        logits.reshape(batch, tokens, width), x.reshape(batch, tokens, 1),
        None if grad is None else grad.view(batch, tokens, width),
    )  # fmt: skip


@torch.no_grad()
def _error_on_cpu(logits: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
    """logits and grad [B, D, K'], x [B, D, 1], a chunk at a time."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    error = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
    for part in chunks(*logits.shape):
        m, at = part.of(logits).to(dtype), part.of(x)
        if m.shape[-1] == 1:
            p = torch.sigmoid(m)
            r = p - at
            error[part.b0 : part.b1] += 2 * (r * r).sum((1, 2))
            slope = 4 * r * p * (1 - p)
        else:
            p = torch.softmax(m, -1)
            r = p.scatter_add(-1, at, torch.full((), -1.0, dtype=dtype, device=p.device).expand(at.shape))
            error[part.b0 : part.b1] += (r * r).sum((1, 2))
            slope = r.sub_((p * r).sum(-1, keepdim=True)).mul_(p).mul_(2) if grad is not None else r
        if grad is not None:
            part.of(grad).copy_(slope)
    return error / logits.shape[1]


def _dtype(logits: Tensor) -> torch.dtype:
    """What the loss is computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _checked(logits: Tensor, x: Tensor, weight: float | Tensor) -> float | Tensor:
    """The weight as a float, or a tensor [B] or [1] of the dtype the loss is computed in."""
    check_logits("logits", logits, dtypes=FLOATS64)
    check_classes("x", x, classes_of(logits.shape[-1]), logits.shape[:-1], logits)
    if not isinstance(weight, Tensor):
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"weight must be a number or a tensor [B], got {type(weight).__name__}")
        return float(weight)
    check_tensor("weight", weight, dtypes=FLOATS64, like=logits)
    if tuple(weight.shape) not in ((), (1,), (logits.shape[0],)):
        raise ValueError(f"weight must be a number or have shape ({logits.shape[0]},), got {tuple(weight.shape)}")
    return weight.reshape(-1).to(_dtype(logits))


def _programs(width: int, tokens: int) -> int:
    """Partial sums of a sample: they depend on nothing but its size."""
    if width == 1:
        return -(-tokens // PAIRS["BLOCK"])
    rows = rows_of(width, tokens, lanes=64 if torch.version.hip else 32)
    return -(-tokens // rows.rows) * rows.pieces


def _launch(logits: Tensor, x: Tensor, errors: Tensor, grad: Tensor | None) -> None:
    batch, width = logits.shape[0], logits.shape[-1]
    tokens, programs = logits.shape[1:-1].numel(), errors.shape[1]
    logits, x = with_rows(logits), x.contiguous()
    kernels = _dispatch.kernels("categorical_loss")
    if width == 1:
        pairs = (logits, x, errors, grad, tokens, _dispatch.FIRST, programs, 1.0 / tokens)
        _dispatch.launch(kernels.categorical_pair_loss_kernel, pairs, tokens, batch, tile=PAIRS)
        return
    rows, stride = rows_of(width, tokens, lanes=64 if torch.version.hip else 32), row_stride(logits) or width
    plane = batch * programs
    part = None if rows.pieces == 1 else torch.empty(3, plane, dtype=torch.float32, device=x.device)
    shape: dict[str, Any] = {"ROWS": rows.rows, "COLS": rows.cols, "PIECES": rows.pieces, "WIDEST": rows.widest}
    shape |= {"QUADS": width % 4 == 0, "VECTOR": vectors(width, tokens, [width, stride]), "num_warps": rows.num_warps}
    shape["WIDE"] = tokens * max(width, stride) > 2**31 - 2 * rows.cols
    args = (logits, x, errors, grad, part, width, tokens, _dispatch.FIRST, programs, plane, stride, 1.0 / tokens)
    for phase in (0,) if rows.pieces == 1 else (1, 2):
        _dispatch.run(kernels.categorical_loss_kernel, args, programs, batch, PHASE=phase, **shape)


_dispatch.register(
    "categorical_loss(Tensor logits, Tensor x, Tensor(a!) errors, Tensor(b!)? grad) -> ()",
    _launch,
)
