"""A device that is neither the CPU nor CUDA, for tests on a CPU: its tensors say "mps", and have no float64.

What real ones refuse is refused: operands of two devices, NumPy's view, float64. Arithmetic is the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NAME = "mps"
MIXED = ("copy_", "to", "__setitem__")  # functions that take operands of two devices
AUTOGRAD = ("grad", "backward", "requires_grad_", "detach_")  # functions that mean the very tensors
OWN = [getattr(Tensor, name) for name in ("grad", "grad_fn", "is_leaf", "requires_grad")]
PROPERTIES = [way for v in OWN for way in (v.__get__, v.__set__)]
PLACED = ("to", "new_zeros", "new_empty", "new_full", "new_tensor")  # and those that may name one


class There(Tensor):
    """A tensor of the device."""

    @staticmethod
    def of(x: Tensor) -> There:
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError("the framework of this device does not support float64")
        return x.as_subclass(There)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return _call(function, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return _call(function, args, kwargs or {})


@contextmanager
def third_device() -> Iterator[None]:
    """Inside, torch.device("mps") is this device."""
    with _Mode():
        yield


def here(x: Tensor) -> Tensor:
    """Its numbers as a tensor of the CPU."""
    with torch._C.DisableTorchFunction():
        return x.as_subclass(Tensor)


def _each(f: Callable[[Any], Any], values: Any) -> Any:
    return tree_map(f, values, is_leaf=lambda v: isinstance(v, torch.Size))


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", "")
    if function == Tensor.device.__get__ and isinstance(args[0], There):  # type: ignore[attr-defined]
        return torch.device(NAME, 0)
    if function == Tensor.is_cpu.__get__ and isinstance(args[0], There):  # type: ignore[attr-defined]
        return False
    found: list[Tensor] = []
    _each(lambda v: found.append(v) if isinstance(v, Tensor) else None, (list(args), kwargs))
    theirs = {id(v): v for v in found if isinstance(v, There)}
    if theirs and name not in MIXED and any(v.dim() and id(v) not in theirs for v in found):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME} and cpu")
    if theirs and name in ("numpy", "__array__"):
        raise TypeError(f"can't convert a {NAME} tensor to numpy: use Tensor.cpu() first")
    if name in AUTOGRAD or function in PROPERTIES:
        made = function(*args, **kwargs)
        return _each(lambda v: There.of(v) if isinstance(v, Tensor) and not isinstance(v, There) else v, made)
    if name == "__deepcopy__":
        copied = There.of(here(args[0]).detach().clone())
        copied._is_param = getattr(args[0], "_is_param", False)  # type: ignore[attr-defined]
        return copied.requires_grad_(args[0].requires_grad)
    asked: list[str] = ["cpu"] if name == "cpu" else []

    def placed(v: Any) -> Any:
        if isinstance(v, torch.device) or (isinstance(v, str) and v.split(":")[0] in ("cpu", NAME)):
            asked.append(torch.device(v).type)
            return torch.device("cpu")
        return v

    if name in PLACED or "device" in kwargs:
        args, kwargs = tuple(placed(v) for v in args), {k: placed(v) for k, v in kwargs.items()}
    there = asked[-1] == NAME if asked else bool(theirs)
    plain: dict[int, Tensor] = {}  # what the function sees instead: one that it returns was written

    def seen(v: Any) -> Any:
        if not isinstance(v, There):
            return v
        x = here(v)
        plain[id(x)] = v
        return x

    args, kwargs = _each(seen, args), _each(seen, kwargs)
    out = function(*args, **kwargs)

    def back(v: Any) -> Any:
        if not isinstance(v, Tensor) or isinstance(v, There):
            return v
        if there and id(v) in plain:
            return plain[id(v)]
        moved = name in ("to", "cpu") and there != bool(theirs)
        v = v.clone() if moved else v
        return There.of(v) if there else v

    return _each(back, out)
