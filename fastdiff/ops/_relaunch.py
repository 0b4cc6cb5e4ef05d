"""The launches of an operation, made once more without its checks and Triton's argument binding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import _dispatch

__all__ = ["Relaunch"]


class Relaunch:
    """An operation on fixed buffers that only a few tensors change for: its launches by the kind of those tensors.

    The first call of a kind (dtypes, strides, 16-byte alignment) runs the operation and keeps the compiled kernels, the
    grids and the arguments; later ones put the new pointers into their places. All other arguments must stay the very
    same memory and numbers.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, list[_Launch] | None] = {}

    def __call__(self, name: str, operation: Callable[[], object], changing: Sequence[Tensor | None]) -> None:
        """Runs `operation`, which reads the `changing` tensors, or repeats its launches.

        Args: name: the operation with its options, shown by a profiler.   changing: laid out as the kernel takes them.
        """
        pointers = [0 if x is None else x.data_ptr() for x in changing]
        kind = (name, *(None if x is None else (x.dtype, x.shape, x.stride(), p % 16 == 0)
                        for x, p in zip(changing, pointers, strict=True)))  # fmt: skip
        found = self.known.get(kind)
        if found is not None:
            with torch._C._profiler._RecordFunctionFast(name):
                for launch in found:
                    launch(pointers)
        elif kind in self.known or torch.compiler.is_compiling():
            operation()
        else:
            with _dispatch.recording() as calls:
                operation()
            self.known[kind] = _launches(calls, changing)


def _launches(calls: Sequence[_dispatch.Call], changing: Sequence[Tensor | None]) -> list[_Launch] | None:
    """What repeats the calls; None where that cannot be told: a changing tensor was copied first, is given twice or is
    one of the fixed buffers too (a model that returned its input), or nothing is compiled."""
    made = [_Launch(call, changing) for call in calls]
    for launch in made:
        if any(len(set(numbers)) < len(numbers) for numbers in zip(*launch.places, strict=True)):
            return None
    reached = {v for launch in made for _, v in launch.places}
    return made if reached == {v for v, x in enumerate(changing) if x is not None} else None


class _Launch:
    """One kernel on one grid; `places` says which argument is which changing tensor."""

    def __init__(self, call: _dispatch.Call, changing: Sequence[Tensor | None]) -> None:
        self.places = [(i, v) for i, a in enumerate(call.args) for v, x in enumerate(changing) if a is x is not None]
        moving = {i for i, _ in self.places}
        self.kept = [a for i, a in enumerate(call.args) if isinstance(a, Tensor) and i not in moving]
        self.args: list[Any] = [a.data_ptr() if isinstance(a, Tensor) else a for a in call.args]
        self.index = next(a.device.index for a in call.args if isinstance(a, Tensor))
        self.run = call.compiled[call.grid]

    def __call__(self, pointers: Sequence[int]) -> None:
        for i, v in self.places:
            self.args[i] = pointers[v]
        if self.index is None or self.index == torch.cuda.current_device():
            self.run(*self.args)
        else:
            with torch.cuda.device(self.index):
                self.run(*self.args)
