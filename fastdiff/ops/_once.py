"""Gradients that were kept, not how they came about: to differentiate one again is refused instead of being wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["once"]


class _Kept(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:  # noqa: ANN401
        raise RuntimeError(
            "trying to differentiate twice: this loss keeps its gradient, not how it came about; "
            "the operation's _ref in fastdiff.ops is plain torch and has every derivative"
        )


def once(
    gradients: Callable[[], Sequence[Tensor | None]], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients on their way out of a backward: where a graph of them is being made, ones that refuse to go further.

    torch's once_differentiable looks only at whether the incoming gradient asks for one, which a mean's does not.
    sources: what the gradients are functions of, the incoming one included, or an output of the forward: the engine
        passes by what does not lead to the tensors that it was asked for, so a leaf of our own would never be seen.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients())
    with torch.no_grad():
        made = gradients()
    tied = [v for v in sources if v is not None]
    return tuple(g if g is None else _Kept.apply(g, *tied) for g in made)
