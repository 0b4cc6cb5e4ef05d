"""Tensors that a process keeps: made once, for every later call, whatever goes on around the first one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["lasting", "traced_constant"]

Made = TypeVar("Made", bound=Callable[..., torch.Tensor])
NAMES = 64  # of one kind; two in a graph whose numbers are a multiple of it apart are still refused


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, tensors are plain ones: a function transform's, a mode's or inference's would end with it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


def traced_constant(function: Made) -> Made:
    """What torch.compiler.assume_constant_result does, which would import the compiler with the package (a second).

    The compiler names a constant by its function's code and refuses a second one of that name in a graph: each table
    has a function of its own, of which there are NAMES.
    """
    named = {str(i): _marked(function, i) for i in range(NAMES)}
    numbers: dict[tuple[object, ...], str] = {}

    def name(*args: object) -> str:
        return numbers.setdefault((id(args[0]), *args[1:]), str(len(numbers) % NAMES))

    name._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @functools.wraps(function)
    def constant(*args: object) -> torch.Tensor:
        return named[name(*args)](*args) if torch.compiler.is_compiling() else function(*args)

    return constant  # type: ignore[return-value]


def _marked(function: Callable[..., torch.Tensor], number: int) -> Callable[..., torch.Tensor]:
    def constant(*args: object) -> torch.Tensor:
        return function(*args)

    constant.__code__ = constant.__code__.replace(co_name=f"{function.__name__}_{number}")
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant
