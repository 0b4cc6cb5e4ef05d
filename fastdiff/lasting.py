"""Tensors that a process keeps: made once, for every later call, whatever goes on around the first one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["lasting", "traced_constant"]

Made = TypeVar("Made", bound=Callable[..., torch.Tensor])
_count = itertools.count()


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, tensors are plain ones: a function transform's, a mode's or inference's would end with it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


def traced_constant(function: Made) -> Made:
    """What torch.compiler.assume_constant_result does, which would import the compiler with the package (a second).

    The compiler names a constant by its function's code and refuses a second one of that name in a graph, so while it
    traces every call gets another.
    """

    @functools.wraps(function)
    def constant(*args: object) -> torch.Tensor:
        if TracingContext.try_get() is not None:
            code = constant.__code__  # type: ignore[attr-defined]  # a function has one
            constant.__code__ = code.replace(co_name=f"{function.__name__}_{next(_count)}")  # type: ignore[attr-defined]
        return function(*args)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant  # type: ignore[return-value]
