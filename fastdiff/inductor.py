"""One function on fixed buffers, compiled by Inductor without Dynamo's guards (tens of microseconds a call)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["ONE_THREAD", "compile_static", "unusable"]

_broken: list[str] = []
UNCHECKED: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}  # the buffers are fastdiff's own
ONE_THREAD = 1 << 16


def compile_static(
    fn: Callable[..., Any], example: Sequence[torch.Tensor], *, elements: int
) -> Callable[..., Any] | None:
    """Compiles fn for exactly these shapes, dtypes and strides; mutations of its arguments are kept.

    Args:
        fn: traceable, tensors in, tensors or nothing out. example: tensors to trace with (fn is really run on them).
        elements: the work of a call; little work stays on one thread, where no thread has to be woken.
    Returns: the compiled function, or None (and one warning per process) where no C++ compiler or Inductor works.
    Numerics: as eager fp32, except that a * b + c may be contracted to one rounding.
    """
    if _broken:
        return None
    try:
        from torch._inductor import compile as inductor_compile
        from torch.fx.experimental.proxy_tensor import make_fx

        with torch.no_grad():
            graph = make_fx(fn)(*example)
            threads = {"cpp.threads": 1} if elements < ONE_THREAD else {}
            with _cacheable():
                compiled = inductor_compile(graph, list(example), options=UNCHECKED | threads)
            compiled(*example)
        return compiled
    except Exception as error:  # any failure of the compiler has the same answer: eager
        unusable(error)
        return None


def _cacheable() -> AbstractContextManager[Any]:
    """Inductor keeps a graph for later processes only where it finds a shape environment, even of fixed shapes."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)))


def unusable(error: Exception | None = None) -> bool:
    """Has the CPU compiler failed in this process? With an error: it has now, which is said once."""
    if error is not None and not _broken:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the CPU compiler is not usable ({reason[0][:200]}); steps and noise run eagerly. "
            "Installing a C++ compiler (g++ or clang++) makes them several times faster.",
            RuntimeWarning,
            stacklevel=4,
        )
    if error is not None:
        _broken.append(str(error))
    return bool(_broken)
