"""Does something look on that takes functions apart: torch.compile, or a transform of torch.func?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batched", "readable", "transformed"]


def transformed() -> bool:
    """Does torch.compile or a function transform look on? It takes apart functions in their longer form."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def batched(g: Tensor) -> bool:
    """Is an incoming gradient many at once? is_grads_batched is no transform that is seen from inside a backward."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(g) or functorch.is_functorch_wrapped_tensor(g)


def readable(x: Tensor) -> bool:
    """May a check look at these numbers: on the CPU, untransformed (vmap has none to show)?"""
    return x.is_cpu and not transformed()
