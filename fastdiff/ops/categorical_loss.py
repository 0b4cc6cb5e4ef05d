"""The squared error between one-hot classes and a network's softmax, with its gradient from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._categorical import check_classes, check_logits, classes_of
from fastdiff.ops._dispatch import FLOATS64, check_tensor


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
    return categorical_loss_ref(logits, x, weight)


def categorical_loss_ref(logits: Tensor, x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """`categorical_loss` in plain torch: float64 for float64 logits, else fp32; differentiable by autograd."""
    weight = _checked(logits, x, weight)
    m = logits.to(weight.dtype)
    if m.shape[-1] == 1:
        error = 2 * (torch.sigmoid(m[..., 0]) - x) ** 2
    else:
        at = x[..., None] == torch.arange(m.shape[-1], device=x.device)
        error = ((torch.softmax(m, -1) - at.to(m.dtype)) ** 2).sum(-1)
    return weight * error.flatten(1).mean(1)


def _checked(logits: Tensor, x: Tensor, weight: float | Tensor) -> Tensor:
    """The weight as a tensor [B] or [1] of the dtype the loss is computed in."""
    check_logits("logits", logits, dtypes=FLOATS64)
    check_classes("x", x, classes_of(logits.shape[-1]), logits.shape[:-1], logits)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if not isinstance(weight, Tensor):
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"weight must be a number or a tensor [B], got {type(weight).__name__}")
        return torch.full((1,), float(weight), dtype=dtype, device=logits.device)
    check_tensor("weight", weight, dtypes=FLOATS64, like=logits)
    if tuple(weight.shape) not in ((), (1,), (logits.shape[0],)):
        raise ValueError(f"weight must be a number or have shape ({logits.shape[0]},), got {tuple(weight.shape)}")
    return weight.reshape(-1).to(dtype)
