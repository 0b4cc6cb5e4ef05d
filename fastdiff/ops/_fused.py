"""Noising and loss on a CPU as compiled loops: the noise into the output's own memory, then the rest in place.

One function per signature, made at its first call; both operations share the loop that draws the noise, so the noise
they use is the same bit for bit.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff import native, rng
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


def wanted(*tensors: Tensor) -> bool:
    """Plain CPU tensors, outside of tracing and of functorch."""
    return _enabled and native.plain(tensors) and not _dispatch.kernels_for(tensors[0])


def run(name: str, fn: Callable[..., None], args: Sequence[Tensor], key: Hashable) -> bool:
    """Runs fn(*args), which writes into some of its contiguous arguments, as a compiled loop; False if it cannot.

    Fewer than FEWEST elements are not worth compiling for: False too. The first call of a signature (name, key, shapes,
    dtypes) compiles: some 5 seconds, said in the log.
    """
    signature = (name, key, torch.get_num_threads(), *((a.shape, a.dtype) for a in args))
    if not all(a.is_contiguous() for a in args):
        raise ValueError(f"{name}: a compiled loop takes contiguous tensors, got strides {[a.stride() for a in args]}")
    if args[0].numel() < FEWEST:
        return False
    args = [a.detach() for a in args]
    if signature not in _cache:
        log.warning("compiling %s for shape %s (once, about 5 s)", name, tuple(args[0].shape))
        # compiling runs fn, which may update in place: on copies
        _cache[signature] = compile_static(fn, [a.clone() for a in args], elements=args[0].numel())
        while len(_cache) > MOST_CACHED:
            _cache.popitem(last=False)
    compiled = _cache[signature]
    if compiled is None:
        return False
    _cache.move_to_end(signature)
    with torch.no_grad():
        compiled(*args)
    return True


def noise_into(
    out: Tensor, seeds: Tensor, index: Tensor | None, row: int, stream: int, x: Tensor | None = None,
    coef: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills out [B, n], fp32 and contiguous, with rng.normal(seeds, (n,), row=row, stream=stream, index=index).

    With x and coef [B, 4] (fp32, contiguous): coef[:, 0] x + coef[:, 1] times that.
    """
    if not (wanted(out, seeds) and native.available()):
        rng.normal(seeds, (out.shape[1],), row=row, stream=stream, index=index, out=out)
        return out if x is None or coef is None else out.mul_(coef[:, 1:2]).add_(coef[:, :1] * x)
    index = torch.zeros_like(seeds) if index is None else index
    pair = (torch.full((1,), v, dtype=torch.int64) for v in (stream, row))
    native.fill(out[None], seeds, index, *pair, x=x, coef=coef)
    return out
