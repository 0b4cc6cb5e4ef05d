"""Runs a black box once on basis vectors, in float64, and records what it does as coefficient rows.

The last axis of every sample is the basis: column j of a tensor is its coefficient on the j-th input (the start, a
model output, a normal draw, a clamped prediction, an outside edit), in the order in which the inputs appear. The last
columns carry random numbers through the same run, and one carries zeros: they check superposition. A dispatch mode
keeps the arithmetic in float64, hands out the noise, cuts the run at a clamp and notices where values leave the linear
world.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.probe.host import on_host

__all__ = ["LOCK", "Clamp", "Observation", "Overflow", "Recorder", "Refused", "lifted"]

RIDER_SCALES = (1.0, 1.0, 30.0, 1000.0)
RIDERS = len(RIDER_SCALES) + 1  # and a column of zeros
SUPERPOSITION = 1e-9
LOW = (torch.float32, torch.float16, torch.bfloat16)
UNIFORM = {"rand", "rand_like", "uniform_", "bernoulli", "bernoulli_", "exponential_", "multinomial", "randint_like"}
DRAWING = {"randn", "randn_like", "normal_", "normal"}
MAKING = {"new_ones", "new_zeros", "new_full", "new_empty", "new_empty_strided"}
MAKING |= {"ones_like", "zeros_like", "full_like", "empty_like"}
LEAVING = {"_local_scalar_dense", "is_nonzero", "equal"}
ESCAPING = {"numpy", "tolist", "__array__"}

as_numpy = Tensor.numpy
LOCK = threading.RLock()  # held while the default dtype is another


class Refused(ValueError):
    """The black box is not a plan; the message says why."""


class Overflow(Exception):
    """More inputs than columns: run again with more."""


class Clamp(NamedTuple):
    """One clamp of row `row`: its result is input `column`, its argument the coefficients `argument`."""

    row: int
    column: int
    lo: float
    hi: float
    argument: np.ndarray


class Observation(NamedTuple):
    """What a run did, as rows of coefficients over its J inputs.

    kinds: [J] letters: x the start, m model output, p clamped prediction, n normal draw, e outside edit.
    rows: [J] the model evaluation after which the input came (-1: before the first). state: [N + 1, J] the state before
    each evaluation and the result; seen: [N, J] what the model was given. times: [N] what it was told. clamps: all of
    them. predicted: [N] x0 as the black box reports it, or None.
    spans: [J] the interval of a noise sampler's draw, or None.
    """

    kinds: np.ndarray
    rows: np.ndarray
    state: np.ndarray
    seen: np.ndarray
    times: list[Any]
    clamps: list[Clamp]
    predicted: list[np.ndarray | None]
    spans: list[tuple[float, float] | None]


class Recorder:
    """Hands out basis vectors [1, 1, 1, width] and keeps what the black box did with them."""

    def __init__(self, width: int) -> None:
        self.width, self.capacity = width, width - RIDERS
        self.shape = (1, 1, 1, width)
        draw = np.random.default_rng(0).standard_normal((self.capacity, len(RIDER_SCALES)))
        self.riders = np.concatenate([draw * RIDER_SCALES, np.zeros((self.capacity, 1))], axis=1)
        self.kinds: list[str] = []
        self.rows: list[int] = []
        self.spans: list[tuple[float, float] | None] = []
        self.state: list[np.ndarray] = []
        self.seen: list[np.ndarray] = []
        self.times: list[Any] = []
        self.clamps: list[Clamp] = []
        self.sources: list[Tensor] = []
        self.predicted: list[np.ndarray | None] = []

    def source(self, kind: str, span: tuple[float, float] | None = None) -> Tensor:
        """A new input, one basis vector."""
        column = len(self.kinds)
        if column >= self.capacity:
            raise Overflow
        values = np.zeros(self.width)
        values[column] = 1.0
        values[self.capacity :] = self.riders[column]
        self.kinds.append(kind)
        self.rows.append(len(self.times) - 1)
        self.spans.append(span)
        return torch.from_numpy(values).reshape(self.shape)

    def draw(self, *span: object) -> Tensor:
        """A normal draw; a noise sampler passes its interval."""
        ends = [float(v) for v in span[:2] if isinstance(v, (int, float, Tensor, np.number))]
        return self.source("n", (ends[0], ends[1]) if len(ends) == 2 else None)

    def model(self, x: Tensor, time: object) -> Tensor:
        """One model evaluation: records its input and time, returns a new input."""
        self.seen.append(self.row(x, "the model's input"))
        self.predicted.append(None)
        value = time.reshape(-1)[0].item() if isinstance(time, Tensor) and time.numel() else time
        if not isinstance(value, (int, float, np.number)):
            raise Refused(f"the model is called with the time {time!r}, not a number")
        self.times.append(value)
        return self.source("m")

    def forget(self) -> None:
        """Takes the last evaluation back: its output went nowhere; the state before it is the result."""
        self.seen.pop()
        self.predicted.pop()
        self.times.pop()
        self.kinds.pop()
        self.rows.pop()
        self.spans.pop()

    def carries(self, x: object) -> bool:
        """Does some axis of x hold the basis (einsum and friends move it)?"""
        return isinstance(x, Tensor) and self.width in x.shape

    def row(self, x: object, what: str) -> np.ndarray:
        """A tensor's coefficients [width]; refuses a sample that changed its shape or is not finite."""
        if not isinstance(x, Tensor):
            raise Refused(f"{what} is no tensor but {type(x).__name__}")
        if x.numel() != self.width or not self.carries(x):
            raise Refused(f"{what} has shape {tuple(x.shape)}, the sample {self.shape}")
        reason = getattr(x, "_fastdiff_value_of", None)
        if reason:
            raise Refused(f"{what} is scaled by a reduction over the sample ({reason}), so it is not linear")
        with torch._C._DisableTorchDispatch():
            values = as_numpy(x.detach().reshape(-1).double()).copy()
        if not np.all(np.isfinite(values)):
            raise Refused(f"{what} is not finite after {len(self.times)} model evaluations")
        return values

    def clamp(self, x: Tensor, lo: float, hi: float) -> Tensor:
        """Cuts the run: the result of a clamp is a new input."""
        argument = self.row(x, "a clamped tensor")
        row = len(self.times) - 1
        for old, source in zip(self.clamps, self.sources, strict=True):
            if (old.row, old.lo, old.hi) == (row, lo, hi) and np.array_equal(old.argument, argument):
                return source.clone().reshape(x.shape)
        result = self.source("p")
        self.clamps.append(Clamp(row, len(self.kinds) - 1, lo, hi, argument))
        self.sources.append(result.clone())
        return result.reshape(x.shape)

    def observation(self) -> Observation:
        """Everything recorded, checked for superposition."""
        J = len(self.kinds)
        state, seen = self._linear(self.state, "the state"), self._linear(self.seen, "the model's input")
        clamps = [c._replace(argument=c.argument[:J]) for c in self.clamps]
        predicted = [None if p is None else p[:J] for p in self.predicted]
        return Observation(
            np.array(self.kinds), np.array(self.rows), state, seen, self.times, clamps, predicted, self.spans
        )

    def _linear(self, recorded: list[np.ndarray], what: str) -> np.ndarray:
        J = len(self.kinds)
        values = np.array(recorded)
        coefficients, got = values[:, :J], values[:, self.capacity :]
        if np.any(got[:, -1]):
            k = int(np.flatnonzero(got[:, -1])[0])
            raise Refused(f"{what} has a constant part ({got[k, -1]:.3g} at evaluation {k}): it is not linear")
        scale = np.abs(coefficients) @ np.abs(self.riders[:J]) + np.finfo(float).tiny
        error = (np.abs(got - coefficients @ self.riders[:J]) / scale).max(axis=1)
        if not error.max() <= SUPERPOSITION:
            k = int(np.flatnonzero(~(error <= SUPERPOSITION))[0])
            raise Refused(
                f"{what} is not linear in the start, the model's outputs and the noise: superposition fails by "
                f"{error[k]:.1e} at evaluation {k}"
            )
        return coefficients


class _Dispatch(TorchDispatchMode):
    """float32 becomes float64, normals come from the recorder, clamps are cut, what depends on values is refused."""

    def __init__(self, recorder: Recorder | None) -> None:
        super().__init__()
        self.recorder = recorder
        self.names: dict[Any, tuple[str, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in LOW:
            kwargs = {**kwargs, "dtype": torch.float64}
        if self.recorder is None:
            return func(*args, **kwargs)
        return self._watched(self.recorder, func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under this mode, and the wrapper costs more than most operations

    def _watched(self, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
        known = self.names.get(func)
        if known is None:
            name = func.overloadpacket.__name__
            self.names[func] = known = (name, name in DRAWING or name in UNIFORM)
        name, random = known
        if random:
            noise = self._noise(recorder, name, func, args, kwargs)
            if noise is not None:
                return noise
        carried, reason, width = False, None, recorder.width
        for a in (*args, *kwargs.values()) if kwargs else args:
            for v in a if isinstance(a, (list, tuple)) else (a,):
                if isinstance(v, Tensor):
                    if width in v.shape:
                        carried = True
                    if reason is None:
                        reason = getattr(v, "_fastdiff_value_of", None)
        if (not carried and reason is None) or name in MAKING:
            return func(*args, **kwargs)
        if name in LEAVING:
            raise Refused(f"it branches on the sample's values ({reason or name})")
        if name.startswith("clamp"):
            cut = self._clamp(recorder, name, args, kwargs, reason)
            if cut is not None:
                return cut
        out = func(*args, **kwargs)
        for y in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(y, Tensor) and (reason or not recorder.carries(y)):
                y._fastdiff_value_of = reason or name  # type: ignore[attr-defined]
        return out

    @staticmethod
    def _noise(recorder: Recorder, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        like = name in ("randn_like", "normal_") or (name == "normal" and args and isinstance(args[0], Tensor))
        if name in UNIFORM and any(recorder.carries(a) for a in args):
            raise Refused(f"it draws noise that is not normal (torch.{name})")
        if name == "rand" and recorder.width in tuple(args[0])[-1:]:
            raise Refused("it draws noise that is not normal (torch.rand)")
        if name not in DRAWING:
            return None
        size = args[0].shape if like else tuple(args[2] if name == "normal" and len(args) > 2 else args[0])
        if not size or size[-1] != recorder.width:
            out = func(*args, **kwargs)
            out._fastdiff_value_of = f"torch.{name} of another shape"
            return out
        n = recorder.draw().reshape(size)
        if name == "normal_":
            mean = args[1] if len(args) > 1 else kwargs.get("mean", 0.0)
            std = args[2] if len(args) > 2 else kwargs.get("std", 1.0)
            return args[0].copy_(n * std + mean)
        if name == "normal":
            return n * args[1] + args[0]
        return n

    @staticmethod
    def _clamp(recorder: Recorder, name: str, args: Any, kwargs: Any, reason: str | None) -> Tensor | None:
        given = list(args[1:3])
        if name.startswith("clamp_max"):
            given = [None, *given]
        bounds = [*given, None, None][:2]
        bounds = [kwargs.get(key, bounds[i]) for i, key in enumerate(("min", "max"))]
        limits = []
        for i, bound in enumerate(bounds):
            why = getattr(bound, "_fastdiff_value_of", None)
            if why or recorder.carries(bound):
                raise Refused(f"a clamp's bounds depend on the sample's values ({why or 'the sample'})")
            if isinstance(bound, Tensor):
                if bound.numel() > 1 and bool((bound != bound.reshape(-1)[0]).any()):
                    raise Refused("a clamp's bounds differ between elements")
                bound = bound.reshape(-1)[0].item()
            limits.append((-np.inf, np.inf)[i] if bound is None else float(bound))
        lo, hi = limits
        x = args[0]
        if not recorder.carries(x):  # a value of the sample between equal bounds is a constant again
            return torch.full_like(x, lo) if lo == hi else None
        if reason:
            raise Refused(f"a clamp's bounds depend on the sample's values ({reason})")
        cut = recorder.clamp(x, lo, hi)
        return x.copy_(cut) if name.endswith("_") else cut


@contextmanager
def _functions(recorder: Recorder | None) -> Iterator[None]:
    """What the dispatcher does not see: constants made as float32, and values read as NumPy or lists.

    Replaced for this thread alone; a function mode would do the same at twice the time of a probe.
    """
    owner, make = threading.get_ident(), torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") in LOW and threading.get_ident() == owner:
            kwargs["dtype"] = torch.float64
        return make(*args, **kwargs)

    def watched(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def reads(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if recorder is not None and threading.get_ident() == owner:
                if recorder.carries(x) or getattr(x, "_fastdiff_value_of", None):
                    raise Refused(f"it reads the sample's values (Tensor.{name})")
            copied = kwargs.pop("copy", None)  # NumPy 2 asks; torch's __array__ does not know it and warns
            return read(x, *args, **kwargs).copy() if copied else read(x, *args, **kwargs)

        return reads

    own = {name: vars(Tensor)[name] for name in ESCAPING if name in vars(Tensor)}
    try:
        torch.tensor = tensor
        for name in ESCAPING:
            setattr(Tensor, name, watched(name))
        yield
    finally:
        torch.tensor = make
        for name in ESCAPING:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)


class _Numpy:
    """NumPy with float32 read as float64, in the thread that made it."""

    def __init__(self) -> None:
        self.owner = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        lifts = name in ("float32", "single") and threading.get_ident() == self.owner
        return np.float64 if lifts else getattr(np, name)


@contextmanager
def lifted(recorder: Recorder | None, namespaces: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, float32 is float64: in torch everywhere, in NumPy for the code whose globals are given.

    One at a time: a lock holds other threads back, because the default dtype and module globals change. Inference mode
    is left: in it `Tensor.to(torch.float32)` and its like reach no dispatch mode.
    """
    with LOCK:
        saved = [(g, key, value) for g in namespaces for key, value in g.items() if value is np]
        before = torch.get_default_dtype()
        try:
            for g, key, _ in saved:
                g[key] = _Numpy()
            torch.set_default_dtype(torch.float64)
            with on_host(), torch.inference_mode(False), torch.no_grad(), _functions(recorder), _Dispatch(recorder):
                yield
        finally:
            torch.set_default_dtype(before)
            for g, key, value in saved:
                g[key] = value


def globals_of(target: object) -> list[dict[str, Any]]:
    """The globals of a function's module, or of an object's classes' modules and the modules beside them."""
    if isinstance(target, functools.partial):
        return globals_of(target.func)
    if inspect.isroutine(target):
        found = [getattr(inspect.unwrap(target), "__globals__", {})]
    else:
        names = {c.__module__ for c in type(target).__mro__ if c is not object}
        packages = tuple(n.rpartition(".")[0] + "." for n in names if "." in n)
        beside = [m for n, m in list(sys.modules.items()) if n in names or n.startswith(packages)]
        found = [vars(m) for m in beside if isinstance(m, type(sys))]
    return list({id(g): g for g in found}.values())


Body = Callable[[Recorder], None]


def observe(body: Body, width: int, namespaces: list[dict[str, Any]]) -> Observation:
    """Runs body(recorder) under the lifting mode; doubles the width while inputs overflow it."""
    while True:
        recorder = Recorder(width)
        try:
            with lifted(recorder, namespaces):
                body(recorder)
        except Overflow:
            width = 2 * width + 1
            continue
        if not recorder.times:
            raise Refused("it never calls the model")
        return recorder.observation()
