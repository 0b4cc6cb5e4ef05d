"""Gradients that were kept, not how they came about: to differentiate one again is refused instead of being wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import _dispatch

__all__ = ["once"]


class _Kept(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:  # noqa: ANN401
        raise RuntimeError(
            "trying to differentiate twice: this loss keeps its gradient, not how it came about; "
            "the operation's _ref in fastdiff.ops is plain torch and has every derivative"
        )


def once(
    gradients: Callable[[], Sequence[Tensor | None]], sources: Sequence[Tensor | None] = ()
) -> tuple[Tensor | None, ...]:
    """Gradients on their way out of a backward: where a graph of them is being made, ones that refuse to go further.

    torch's once_differentiable looks only at whether the incoming gradient asks for one, which a mean's does not.
    sources: inside a function transform what each is the gradient of; elsewhere nothing has to be kept for it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients())
    with torch.no_grad():
        made = gradients()
    inside = _dispatch.transformed()
    return tuple(
        g if g is None else _kept(g, source if inside else None)
        for g, source in zip(made, sources if inside else made, strict=True)
    )


def _kept(gradient: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        gradient = source = gradient.detach().requires_grad_()
    out: Tensor = _Kept.apply(gradient, source)
    return out
