"""What an accelerated step returns: the stock classes, their second field made when it is first read."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.rows import HostRow, Terms, combine, predict

__all__ = ["Second", "lazy_output", "lazy_tuple"]


class Second:
    """The second result of a step (x0-hat, as a rule), computed when it is first read.

        second = sum c * (x, m, p, n)

    It keeps x and m, not copies. Were they changed in place since, then x comes back out of x' (or m out of x and x'),
    as long as x' is linear in them; where that cannot be, reading raises RuntimeError.
    """

    __slots__ = ("dtype", "kept", "row", "terms", "threshold", "value", "versions")

    def __init__(
        self, row: HostRow, terms: Terms, x: Tensor, m: Tensor, p: Tensor | None, n: Tensor | None, y: Tensor,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.row, self.terms, self.dtype = row, terms, dtype
        self.value: Tensor | None = None
        self.kept: Any = (x, m, p, n, y)
        try:
            self.versions: tuple[int, int, int] | None = (x._version, m._version, y._version)
        except RuntimeError:  # inference tensors do not count their versions
            self.versions = None

    def get(self) -> Tensor:
        """The value, the same tensor every time."""
        if self.value is None:
            x, m, p, n, y = self.kept
            if not self.whole(p):
                x, m = self._again(x, m, n, y)
                p = None
            if p is None and any(at == 2 for at, _ in self.terms):
                p = predict(self.row, x, m)
            self.value = combine(self.terms, [x, m, p, n]).to(self.dtype)
            self.kept = None
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.stack and others read a tuple's entries without asking it."""
        plain = (a._plain() if isinstance(a, LazyPair) else a for a in args)
        return func(*plain, **(kwargs or {}))

    def whole(self, p: Tensor | None) -> bool:
        """Are the tensors it would read as they were?"""
        if self.versions is None:
            return True
        read = {at for at, _ in self.terms}
        if 2 in read and p is None:
            read |= {0, 1}
        x, m = self.kept[:2]
        return not (0 in read and x._version != self.versions[0]) and not (1 in read and m._version != self.versions[1])

    def _again(self, x: Tensor, m: Tensor, n: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and m as they were: one of them solved out of x' = a x + d m + s n, with p = c_skip x + c_out m inside."""
        assert self.versions is not None
        x_changed, m_changed, y_changed = (v._version != was for v, was in zip((x, m, y), self.versions, strict=True))
        c = [0.0] * 4
        linear = all(at < 4 for at, _ in self.row.out) and not (self.row.cut and self.row.uses_p)
        if linear:
            for at, value in self.row.out:
                c[at] += value
            c[0] += c[2] * self.row.c_skip
            c[1] += c[2] * self.row.c_out
        lost = 0 if x_changed else 1
        if not linear or (x_changed and m_changed) or y_changed or c[lost] == 0 or y.dtype != x.dtype:
            raise RuntimeError(
                "pred_original_sample was not read before the sample and the model's output it comes from were changed "
                "in place; read it right after step(), or pass step() a copy"
            )
        rest = y.clone() if n is None or not c[3] else y.sub(n, alpha=c[3])
        if x_changed:
            return rest.sub_(m, alpha=c[1]).div_(c[0]), m
        return x, rest.sub_(x, alpha=c[0]).div_(c[1])


@functools.cache
def lazy_output(stock: type) -> Callable[[Tensor, Second | None], Any]:
    """A maker of `stock` outputs (diffusers' BaseOutput, two fields) whose second field is a Second."""
    import dataclasses

    first, second = [f.name for f in dataclasses.fields(stock)][:2]

    def settled(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            settle(self)
            return method(self, *args)

        return call

    def plain(self: Any) -> Any:
        return stock(getattr(self, first), getattr(self, second))

    def settle(self: Any) -> Any:
        value = self.__dict__["_second"]
        if isinstance(value, Second):
            value = value.get()
            write(self, value)
        return value

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:  # dataclasses.replace, or type(out)(...), is stock's
        return stock(*args, **kwargs) if args or kwargs else OrderedDict.__new__(cls)

    def write(self: Any, value: Any) -> None:
        self.__dict__["_second"] = value
        OrderedDict.__setitem__(self, second, value)

    reading = ("keys", "items", "values", "__iter__", "__len__", "__eq__")
    body: dict[str, Any] = {name: settled(getattr(OrderedDict, name)) for name in reading}
    body |= {
        "__module__": f"{__name__}.{stock.__module__}",  # the name diffusers registers it under must be its own
        "__new__": new,
        "__contains__": lambda self, key: key in (first, second),
        "__reduce__": lambda self: (stock, (getattr(self, first), getattr(self, second))),
        "__copy__": plain,
        "__repr__": lambda self: repr(plain(self)),
        "__hash__": None,
        second: property(settle, write),
    }
    made: Any = type(stock.__name__, (stock,), body)
    made.__module__, made.__qualname__ = stock.__module__, stock.__qualname__
    put = OrderedDict.__setitem__

    def make(y: Tensor, later: Second | None) -> Any:
        out = made.__new__(made)
        put(out, first, y)
        state = out.__dict__
        state[first] = y
        state["_second"] = later
        return out

    return make


class LazyPair(tuple):
    """(x', second) as a tuple whose second entry is computed when it is read."""

    __slots__ = ()

    def __getitem__(self, at: Any) -> Any:
        if at == 0:
            return tuple.__getitem__(self, 0)
        return self._plain()[at]

    def _plain(self) -> tuple[Any, ...]:
        return tuple(v.get() if isinstance(v, Second) else v for v in tuple.__iter__(self))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._plain())

    def __reversed__(self) -> Iterator[Tensor]:
        return reversed(self._plain())

    def __add__(self, other: Any) -> tuple[Any, ...]:
        return self._plain() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._plain() if isinstance(other, tuple) else NotImplemented  # list += self

    def __mul__(self, times: Any) -> tuple[Any, ...]:
        return self._plain() * times

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self._plain() == other

    def __hash__(self) -> int:
        return hash(self._plain())

    def __contains__(self, item: object) -> bool:
        return item in self._plain()

    def __repr__(self) -> str:
        return repr(self._plain())

    def __reduce__(self) -> Any:
        return tuple, (self._plain(),)


def lazy_tuple(y: Tensor, later: Second) -> tuple[Tensor, Any]:
    """(y, later) for return_dict=False."""
    return LazyPair((y, later))
