"""Does something look on that takes functions apart: torch.compile, or a transform of torch.func?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["readable", "transformed"]


def transformed() -> bool:
    """Does torch.compile or a function transform look on? It takes apart functions in their longer form."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def readable(x: Tensor) -> bool:
    """May a check look at these numbers: on the CPU, untransformed (vmap has none to show)?"""
    return x.is_cpu and not transformed()
