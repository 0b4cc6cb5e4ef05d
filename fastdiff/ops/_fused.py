"""Noising and loss on a CPU as one compiled loop each: one function per signature, made at its first call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.inductor import compile_static
from fastdiff.ops import _dispatch

log = logging.getLogger("fastdiff")
FEWEST = 1 << 16  # elements: below, eager torch is done before a compiler has paid off
MOST_CACHED = 32

_enabled = True
_cache: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()


@contextmanager
def cpu_compiler(enabled: bool) -> Iterator[None]:
    """Inside this context the CPU's noising and loss are compiled (the default), or run as eager torch."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def wanted(tensors: Sequence[Tensor], elements: int) -> bool:
    """Plain CPU tensors, FEWEST elements or more, outside of tracing and of functorch."""
    if not _enabled or elements < FEWEST or torch.compiler.is_compiling() or _dispatch.kernels_for(tensors[0]):
        return False
    if any(type(a) not in (Tensor, torch.nn.Parameter) or not a.is_cpu for a in tensors):
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.maybe_current_level() is None


def run(name: str, fn: Callable[..., None], args: Sequence[Tensor], key: Hashable) -> bool:
    """Runs fn(*args), which writes into some of its contiguous arguments, as a compiled loop; False if it cannot.

    The first call of a signature (name, key, shapes, dtypes) compiles: some 5 to 10 seconds, said in the log.
    """
    signature = (name, key, torch.get_num_threads(), *((a.shape, a.dtype) for a in args))
    args = [a.detach() for a in args]
    if signature not in _cache:
        log.warning("compiling %s for shape %s (once, 5 to 10 s)", name, tuple(args[0].shape))
        _cache[signature] = compile_static(fn, args, elements=args[0].numel())
        while len(_cache) > MOST_CACHED:
            _cache.popitem(last=False)
    compiled = _cache[signature]
    if compiled is None:
        return False
    _cache.move_to_end(signature)
    with torch.no_grad():
        compiled(*args)
    return True
