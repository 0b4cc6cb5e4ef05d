"""The squared error between one-hot classes and a network's softmax, and its gradient, each from one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.categorical_cpu import chunks, loss_into
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._categorical import (
    NARROW,
    Rows,
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
from fastdiff.transforms import batched, transformed

PAIRS = {"BLOCK": 1024, "PARTS": 4, "num_warps": 1}  # one warp: its sum needs no shared memory
WHOLE = 16  # tokens of several windows whose sums a program adds


def categorical_loss(logits: Tensor, x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """The loss of a Bayesian flow network on categorical data, a number a sample.

        loss_b = weight_b mean_d ||e_x - softmax(logits)||^2        (K = 2: 2 (x - sigmoid(logit))^2)

    With weight = K beta_1 t_bfn this is the continuous-time loss, in nats a token.
    Args:
        logits: [B, *D, K'], fp32, bf16 or fp16 (float64 in plain torch), any strides; K' = K, or 1 for K = 2.
        x: int64 classes [B, *D].   weight: a number, or a tensor [B] or [1].
    Returns: [B] fp32 (float64 for float64 logits), differentiable once in logits and weight.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, K' = 0 or 2, classes outside 0..K-1 (on CUDA: NaN).
    Numerics: fp32. One tensor of the logits' size is saved: the gradient in their dtype, or, on a GPU for K > 32,
        in fp32 for K > 2, the logits themselves, from which backward makes it, rounded once.
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 205.
    """
    weight = _checked(logits, x, weight)
    kernel = _dispatch.kernels_for(logits) and logits.dtype != torch.float64
    traced = torch.compiler.is_compiling()
    inside = not traced and transformed()  # plain torch has every transform
    if inside or not kernel and (traced or not logits.is_cpu) or logits.numel() == 0:
        return categorical_loss_ref(logits, x, weight)
    error = _Error.apply(logits, x)[0] if _dispatch.graded(logits) else _error(logits, x, None)
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
    """mean_d ||e_x - softmax(logits)||^2 [B]: its gradient is made and kept in the same pass, or, with four numbers a
    token, from the logits later. What is kept is an output too: see `denoising_loss`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        ctx.again = _reads_again(logits)
        if ctx.again:
            kept = torch.empty(x.numel(), 4, dtype=torch.float32, device=x.device)
            error = _error(logits, x, token=kept)
            ctx.save_for_backward(kept, logits, x)
        else:
            kept = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            error = _error(logits, x, kept)
            ctx.save_for_backward(kept)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(kept)
        return error, kept

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None]:  # noqa: ANN401
        g = upstream[0]
        if g is None:
            return None, None
        kept, *given = ctx.saved_tensors
        tokens = (given[0] if ctx.again else kept).shape[1:-1].numel()

        def gradients() -> tuple[Tensor]:
            if not ctx.again:
                return (scaled(kept, g, factor=1.0 / tokens),)
            logits, x = given
            if not batched(g):
                return (_gradient(logits, x, kept, g),)
            ones = torch.full((len(x),), float(tokens), device=x.device)  # the kernel takes one g
            return (scaled(_gradient(logits.float(), x, kept, ones), g, logits.dtype, factor=1.0 / tokens),)

        return once(gradients, (kept, g))[0], None


def _reads_again(logits: Tensor) -> bool:
    """Is the gradient made from the logits once more? Where the saved bytes are worth the instructions."""
    width = logits.shape[-1]
    heavy = width > NARROW or (logits.element_size() == 4 and width > 2)
    return heavy and _dispatch.kernels_for(logits) and logits.dtype != torch.float64


def _gradient(logits: Tensor, x: Tensor, token: Tensor, scale: Tensor) -> Tensor:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.ops.fastdiff.categorical_gradient(logits, x, token, scale, grad)
    return grad


def _error(logits: Tensor, x: Tensor, grad: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """The error [B]. grad receives tokens times its gradient, token what a kernel makes that from."""
    batch, width = logits.shape[0], logits.shape[-1]
    tokens = logits.shape[1:-1].numel()
    if _dispatch.kernels_for(logits) and logits.dtype != torch.float64:
        programs = _programs(width, tokens)
        errors = torch.empty(batch * programs, dtype=torch.float32, device=logits.device)
        parts = errors.view(batch, programs)
        torch.ops.fastdiff.categorical_loss(logits, x, parts, grad, token)
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


def _rows(width: int, tokens: int) -> Rows:
    return rows_of(width, tokens, lanes=64 if torch.version.hip else 32)


def _programs(width: int, tokens: int) -> int:
    """Partial sums of a sample: they depend on nothing but its size."""
    if width == 1:
        return -(-tokens // PAIRS["BLOCK"])
    rows = _rows(width, tokens)
    return -(-tokens // (rows.rows if rows.pieces == 1 else WHOLE))


def _launch(logits: Tensor, x: Tensor, errors: Tensor, grad: Tensor | None, token: Tensor | None) -> None:
    batch, width = logits.shape[0], logits.shape[-1]
    tokens, programs = logits.shape[1:-1].numel(), errors.shape[1]
    logits, x = with_rows(logits), x.contiguous()
    kernels = _dispatch.kernels("categorical_loss")
    if width == 1:
        pairs = (logits, x, errors, grad, tokens, _dispatch.FIRST, programs, 1.0 / tokens)
        _dispatch.launch(kernels.categorical_pair_loss_kernel, pairs, tokens, batch, tile=PAIRS)
        return
    rows, plane, stride = _rows(width, tokens), batch * tokens, row_stride(logits) or width
    part = None if rows.pieces == 1 else torch.empty(3, plane, rows.pieces, dtype=torch.float32, device=x.device)
    args = (width, tokens, _dispatch.FIRST, programs, plane, stride, 1.0 / tokens)
    windows = -(-tokens // rows.rows) * rows.pieces
    _dispatch.run(
        kernels.categorical_loss_kernel,
        (logits, x, errors, grad, token, part, *args),
        windows,
        batch,
        **_shape(rows, width, tokens, stride),
    )
    if part is not None:
        whole: dict[str, Any] = {"PIECES": rows.pieces, "WIDEST": rows.widest, "ROWS": WHOLE, "num_warps": 4}
        _dispatch.run(
            kernels.categorical_error_kernel, (logits, x, errors, token, part, *args), programs, batch, **whole
        )


def _shape(rows: Rows, width: int, tokens: int, stride: int) -> dict[str, Any]:
    """The constexprs of the windows of logits whose rows are `stride` apart, beside dense ones."""
    shape: dict[str, Any] = {"PIECES": rows.pieces, "ROWS": rows.rows, "COLS": rows.cols, "num_warps": rows.num_warps}
    shape |= {"QUADS": width % 4 == 0, "VECTOR": vectors(width, tokens, [width, stride])}
    return shape | {"WIDE": rows.reach(tokens, max(width, stride)) >= 2**31}


def _launch_gradient(logits: Tensor, x: Tensor, token: Tensor, scale: Tensor, grad: Tensor) -> None:
    batch, width = logits.shape[0], logits.shape[-1]
    tokens = logits.shape[1:-1].numel()
    logits, x = with_rows(logits), x.contiguous()
    rows, stride = _rows(width, tokens), row_stride(logits) or width
    args = (logits, x, token, scale, grad, width, tokens, _dispatch.FIRST, stride, scale.stride(0), 1.0 / tokens)
    kernel = _dispatch.kernels("categorical_loss").categorical_gradient_kernel
    windows = -(-tokens // rows.rows) * rows.pieces
    _dispatch.run(kernel, args, windows, batch, **_shape(rows, width, tokens, stride))


_dispatch.register(
    "categorical_loss(Tensor logits, Tensor x, Tensor(a!) errors, Tensor(b!)? grad, Tensor(c!)? token) -> ()", _launch
)
_dispatch.register(
    "categorical_gradient(Tensor logits, Tensor x, Tensor token, Tensor scale, Tensor(a!) grad) -> ()",
    _launch_gradient,
)
