"""Does something look on that takes functions apart: torch.compile, or a transform of torch.func?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["batched", "readable", "transformed", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])
_plain: dict[str, Callable[..., Any]] = {}
_disabled: dict[str, Callable[..., Any]] = {}


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


def untraced(function: Function) -> Function:
    """What torch.compiler.disable does, which would import the compiler with the package (a second)."""
    name = f"{function.__module__}.{function.__qualname__}"
    _plain[name] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's
        if torch.compiler.is_dynamo_compiling():
            _disable(name)
            return _disabled[name](*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _disable(name: str) -> int:
    """Runs while the compiler traces a call, which then breaks its graph at the disabled function."""
    if name not in _disabled:
        _disabled[name] = torch.compiler.disable(_plain[name])
    return 0


_disable._dynamo_marked_constant = True  # type: ignore[attr-defined]
