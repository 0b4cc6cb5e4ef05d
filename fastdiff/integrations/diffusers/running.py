"""One loop of an accelerated scheduler: which row a call is, what it draws, what it returns."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.integrations.diffusers.outputs import Second, lazy_output, lazy_tuple
from fastdiff.integrations.diffusers.reading import Dialect, Reading, Setup, dialect_of, read
from fastdiff.integrations.rows import History
from fastdiff.noise import PhiloxNoise

__all__ = ["Run", "Unsupported", "key_of"]

PASSING = frozenset(("generator", "return_dict", "variance_noise"))  # of step, not part of its configuration
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CACHED = 256
NEAR = 1e-5
LARGEST = 1 << 62  # of Philox's seeds here
_readings: dict[Any, Reading | str] = {}
_dialects: dict[Any, Dialect] = {}


class Unsupported(Exception):
    """The stock step has to run; the message says why."""


def frozen(value: Any) -> Any:
    """A hashable copy of an argument."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, Mapping):
        return tuple((k, frozen(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return (type(value).__name__, value)


def key_of(setup: Setup, options: Mapping[str, Any]) -> Any:
    """What a reading depends on, None where that cannot be told."""
    if setup.own:
        return None
    call = setup.set_timesteps
    given = None if call is None else (frozen(call[0]), frozen({k: v for k, v in call[1].items() if k != "device"}))
    try:
        key = (setup.stock, frozen(setup.live.config), given, setup.begin, setup.indexed, frozen(options))
        hash(key)
    except TypeError:
        return None
    return key


def reading_of(setup: Setup, options: Mapping[str, Any]) -> Reading:
    """`read`, cached. Raises: Unsupported."""
    key = key_of(setup, options)
    found = None if key is None else _readings.get(key)
    if found is None:
        try:
            found = read(setup, options)
        except ValueError as error:
            found = str(error)
        if key is not None:
            while len(_readings) >= CACHED:
                _readings.pop(next(iter(_readings)))
            _readings[key] = found
    if isinstance(found, str):
        raise Unsupported(found)
    return found


class Run:
    """The rows of one loop, the history, and the next row.

    A scheduler without a step index (DDPM, DDIM) finds its row by the timestep at every call; the others go from row to
    row, as the stock code does, and look at the timestep in the first call only (but refuse one that is not theirs).
    """

    def __init__(self, setup: Setup, options: dict[str, Any], timesteps: Tensor, *, at: Any = None) -> None:
        self.addressed = not hasattr(setup.live, "_step_index")
        reading = None
        if self.addressed:
            reading = reading_of(setup._replace(begin=0), options)
            self.addressed = reading.memoryless
        self.base = 0 if self.addressed else setup.begin
        self.reading = reading if self.addressed and reading is not None else reading_of(setup, options)
        self.setup, self.options, self.timesteps = setup, options, timesteps
        self.all_options = {**type(setup.live)._step_defaults, **options}
        self.rows, self.count = self.reading.rows, len(self.reading.rows)
        self.next: int = setup.begin - self.base if at is None else at.next
        self.started: bool = at is not None and at.started
        self.history = History(self.reading.plan.allocate().physical - 1)
        self.shape: torch.Size | None = None
        self.signature: Any = None
        self.pointer = _pointer(timesteps)
        self.itemsize = timesteps.element_size() * (timesteps.stride(0) if timesteps.dim() else 1)
        self.values: np.ndarray | None = None
        self.philox: PhiloxNoise | None = None
        self.buffer: Tensor | None = None

    def clone(self) -> Run:
        """The same loop at the same place, with a history of its own."""
        new = object.__new__(Run)
        new.__dict__.update(vars(self))
        new.history, new.buffer = self.history.clone(), None
        return new

    @staticmethod
    def options_of(kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The options of step that differ from their defaults."""
        options = {}
        for name, value in kwargs.items():
            if name in PASSING:
                continue
            if name not in defaults:
                raise TypeError(f"step got an unexpected argument {name!r}; it takes {', '.join(defaults)}")
            if isinstance(value, (Tensor, np.ndarray)):
                raise Unsupported(f"step's {name} is an array: it is not part of a table")
            if value != defaults[name]:
                options[name] = value
        return options

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Do these arguments of step mean this run's options?"""
        matched = 0
        for name, value in kwargs.items():
            if name in PASSING:
                continue
            if isinstance(value, Tensor) or name not in self.all_options or value != self.all_options[name]:
                return False
            matched += name in self.options
        return matched == len(self.options)

    @staticmethod
    def position_of(timestep: Any, timesteps: Tensor) -> int:
        """Where in the schedule a timestep stands: the first place, or the second of several, as stock.

        Raises: ValueError: it is not in the schedule.
        """
        at = _viewed(timestep, timesteps)
        if at is not None:
            return at
        value = _value(timestep)
        found = np.flatnonzero(_near(timesteps.detach().cpu().double().numpy(), value))
        if not len(found):
            raise ValueError(_stranger(value, timesteps))
        return int(found[1 if len(found) > 1 else 0])

    def locate(self, timestep: Any) -> int:
        """The row of a call whose timestep is not the expected one."""
        at = _viewed(timestep, self.timesteps)
        if at is None:
            if self.values is None:
                self.values = self.timesteps.detach().cpu().double().numpy()
            if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and not self.addressed:
                return self.next  # reading it would stall the device, and stock does not look at it either
            value = _value(timestep)
            if self.next < self.count and bool(_near(self.values[self.base + self.next], value)):
                return self.next
            found = np.flatnonzero(_near(self.values, value))
            if not len(found):
                raise ValueError(_stranger(value, self.timesteps))
            at = int(found[0])
        return at - self.base if self.addressed else self.next

    def row_of(self, timestep: Any) -> int:
        """The row of this call."""
        k = self.next
        if not (
            isinstance(timestep, Tensor)
            and self.pointer
            and timestep.data_ptr() == self.pointer + (self.base + k) * self.itemsize
        ):
            k = self.locate(timestep)
        if k >= self.count:
            raise RuntimeError(
                f"all {self.count} steps of this schedule are done; call set_timesteps before the next loop"
            )
        return k

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The model's input."""
        c = self.reading.c_in[self.row_of(timestep)]
        return sample if c == 1.0 else sample * c

    def adopt(self, x: Tensor, m: Tensor) -> None:
        """Checks the tensors of a first call, and learns how stock would answer their dtypes."""
        for name, v in (("sample", x), ("model_output", m)):
            if not isinstance(v, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(v).__name__}")
            if v.dtype not in FLOATS:
                raise TypeError(f"{name} must be floating point, got {v.dtype}")
        if x.device != m.device:
            raise ValueError(f"sample is on {x.device}, model_output on {m.device}; they must be on one device")
        if m.shape != x.shape:
            if x.dim() > 1 and m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
                raise Unsupported("the model also predicts a variance")
            raise ValueError(f"model_output has shape {tuple(m.shape)}, sample {tuple(x.shape)}; they must be the same")
        if self.started and not self.reading.memoryless and self.shape is not None and x.shape != self.shape:
            raise ValueError(f"the sample changed its shape from {tuple(self.shape)} to {tuple(x.shape)} in a loop")
        key = (key_of(self.setup, self.options), x.dtype, m.dtype, x.dim())
        dialect = _dialects.get(key) if key[0] is not None else None
        if dialect is None:
            try:
                dialect = dialect_of(self.setup, self.options, x, m)
            except Exception as error:  # stock fails on these tensors: let it say so itself
                raise Unsupported(f"a trial step failed with {type(error).__name__}: {error}") from error
            while len(_dialects) >= CACHED:
                _dialects.pop(next(iter(_dialects)))
            _dialects[key] = dialect
        second = self.reading.second
        if second is None and dialect.pair:
            raise Unsupported("its second result is not a combination of the sample, the output and the noise")
        self.dialect, self.second = dialect, second
        wide = torch.float64 in (x.dtype, m.dtype)
        self.compute = torch.float64 if wide else torch.float32
        self.threshold = None
        if self.reading.threshold is not None:
            quantile, most = self.reading.threshold
            self.threshold = functools.partial(ops.threshold, quantile=quantile, maximum=most)
        self.make = lazy_output(dialect.output) if second is not None else None
        self.buffer = None
        self.signature = (x.dtype, m.dtype, x.device)
        self.x_dtype, self.m_dtype, self.device, self.shape = x.dtype, m.dtype, x.device, x.shape

    def step(self, owner: Any, m: Tensor, timestep: Any, x: Tensor, kwargs: dict[str, Any], kept: Any) -> Any:
        """One call of step."""
        k = self.row_of(timestep)
        if (
            self.shape is None
            or not isinstance(x, Tensor)
            or x.shape != self.shape
            or m.shape != self.shape
            or x.dtype is not self.x_dtype
            or m.dtype is not self.m_dtype
            or x.device != self.device
            or m.device != self.device
        ):
            self.adopt(x, m)
        row, reading, dialect = self.rows[k], self.reading, self.dialect
        compute = self.compute
        x_in, m_in = x, m
        if self.x_dtype is not compute:
            x_in = x.to(compute)
        if self.m_dtype is not compute:
            m_in = m.to(compute)
        n = None
        if reading.draws[k]:
            n = self.noise(k, m, kwargs, kept)
            if n is not None and n.dtype is not compute:
                n = n.to(compute)
        graded = torch.is_grad_enabled() and (x.requires_grad or m.requires_grad)
        y, p = self.history.step(row, x_in, m_in, n, graded=graded, threshold=self.threshold)
        self.next = k + 1
        self.started = True
        after = reading.after[k]
        if after is not None:
            owner._step_index = after
        given = y
        if dialect.result is not compute:
            given = y.to(dialect.result)
        later = None
        if self.second is not None:
            noise = n.clone() if n is not None and n is self.buffer else n
            later = Second(row, self.second[k], x_in, m_in, p, noise, y if given is y else given, dialect.second)
            if graded or later.versions is None:
                later.get()
        if kwargs.get("return_dict", True):
            if self.make is not None:
                return self.make(given, later)
            return _single(dialect.output, given)
        if dialect.pair and later is not None:
            return lazy_tuple(given, later)
        return (given,)

    def noise(self, k: int, m: Tensor, kwargs: dict[str, Any], kept: Any) -> Tensor | None:
        """Row k's normals: given ones, Philox's, or torch's in the draw order of stock."""
        generator, given = kwargs.get("generator"), kwargs.get("variance_noise")
        if given is not None:
            if generator is not None and "DDIM" in self.setup.stock.__name__:
                raise ValueError("give a generator or variance_noise, not both")
            return given.to(m.device)
        if kept.noise == "philox":
            return self._philox(m, generator, kept).row(k)
        n = None
        for _ in range(self.reading.draws[k]):
            n = _normal(m.shape, generator, m.device, self.dialect.noise)
        return n

    def _philox(self, m: Tensor, generator: Any, kept: Any) -> PhiloxNoise:
        if self.philox is None or self.philox.shape != m.shape:
            like = torch.empty(m.shape, device=m.device)
            self.philox = PhiloxNoise(self.reading.plan, like, compiled=False, in_kernel=False)
            batch = m.shape[0]
            index = torch.arange(batch)
            if isinstance(generator, Sequence):
                seeds, index = (
                    torch.tensor([g.initial_seed() for g in generator]),
                    torch.zeros(batch, dtype=torch.int64),
                )
            else:
                seed = kept.seed if generator is None else generator.initial_seed() % LARGEST
                seeds = torch.full((batch,), seed)
            self.philox.reset(seeds, index)
        return self.philox


def _normal(shape: torch.Size, generator: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """diffusers' randn_tensor: a list of generators draws a sample each, a generator on the CPU draws there."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == device.type):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


def _single(output: Any, y: Tensor) -> Any:
    """An output with one field."""
    out = output.__new__(output)
    OrderedDict.__setitem__(out, "prev_sample", y)
    out.__dict__["prev_sample"] = y
    return out


def _pointer(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0


def _viewed(timestep: Any, timesteps: Tensor) -> int | None:
    """The index of a timestep that is an entry of the schedule's own tensor: no value is read, nothing waits."""
    if not isinstance(timestep, Tensor) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    base, mine = _pointer(timesteps), _pointer(timestep)
    if not base or not mine:
        return None
    at, rest = divmod(mine - base, timesteps.element_size())
    inside = rest == 0 and 0 <= at < len(timesteps)
    alone = timestep.numel() == 1 or not any(timestep.stride())
    return at if inside and alone else None


def _value(timestep: Any) -> float:
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1 and timestep.numel() and bool((timestep != timestep.reshape(-1)[0]).any()):
            raise Unsupported("each sample has a timestep of its own")
        timestep = timestep.reshape(-1)[0].item()
    return float(timestep)


def _near(values: np.ndarray, value: float) -> np.ndarray:
    return np.abs(values - value) <= NEAR * max(1e-3, abs(value))


def _stranger(value: float, timesteps: Tensor) -> str:
    shown = [f"{v:g}" for v in timesteps.tolist()]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-2:]]
    return f"timestep {value:g} is not in the schedule ({', '.join(shown)}); pass an entry of scheduler.timesteps"
