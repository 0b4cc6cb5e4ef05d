"""Accelerated schedulers: the stock class with its step replaced by a row of a plan."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.caller import warn
from fastdiff.integrations.diffusers.cached import Unsupported, key_of
from fastdiff.integrations.diffusers.past import Past
from fastdiff.integrations.diffusers.reading import Setup, refusal
from fastdiff.integrations.diffusers.running import Run
from fastdiff.integrations.diffusers.timesteps import position_of
from fastdiff.integrations.diffusers.usual import leading, takes_past, usual
from fastdiff.probe.host import on_host
from fastdiff.probe.observe import LOCK
from fastdiff.transforms import untraced

__all__ = ["Accelerated", "Settings", "accelerated_class"]

PLAIN = (bool, int, float, str, type(None))
OF_A_LOOP = ("_step_index", "_begin_index", "is_scale_input_called")  # attributes that a loop itself changes
SIMILAR = 5e-3  # of a table in float32 against float64: larger differences are somebody's edit


class Settings:
    """What an accelerated scheduler keeps beside the stock attributes: options, the running loop, why stock runs."""

    def __init__(self, noise: str, seed: int, compiled: bool = False) -> None:
        self.noise, self.seed, self.compiled = noise, seed, compiled
        self.sources: dict[Any, Any] = {}  # Philox buffers, and compiled loops, by plan and shape
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the arguments of set_timesteps
        self.run: Run | None = None
        self.options: dict[str, Any] = {}  # of step, in the last loop
        self.stock: str | None = None  # the reason why stock steps run in this loop
        self.lost = False  # pickled in the middle of a loop, without its past
        self.past = Past()
        self.warned: set[str] = set()

    def restart(self) -> None:
        """Forgets the loop."""
        self.run = self.stock = None
        self.lost = False

    def __deepcopy__(self, memo: Any) -> Settings:
        new = Settings(self.noise, self.seed, self.compiled)
        new.call, new.options, new.stock, new.lost = self.call, dict(self.options), self.stock, self.lost
        new.run, new.past = None if self.run is None else self.run.clone(), copy.copy(self.past)
        return new

    def __reduce__(self) -> Any:
        lost = self.lost or (self.run is not None and self.run.remembers)
        return _settings, (self.noise, self.seed, self.compiled, self.call, self.options, lost)


def _settings(
    noise: str, seed: int, compiled: bool, call: Any, options: dict[str, Any], lost: bool = False
) -> Settings:
    new = Settings(noise, seed, compiled)
    new.call, new.options, new.lost = call, options, lost
    return new


class _Made:
    """Settings for an instance that somebody else made, by from_config of the accelerated class, say."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault("_fastdiff", Settings("torch", 0))


class Accelerated:
    """The part of an accelerated scheduler that is not stock; always before a diffusers scheduler in the bases."""

    _fastdiff: Any = _Made()
    _stock_class: type
    _step_defaults: dict[str, Any]
    timesteps: Tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._stock_class, dict(vars(self)))

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__dict__.update(vars(self), _fastdiff=copy.deepcopy(self._fastdiff))
        return new

    def __deepcopy__(self, memo: Any) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return new

    @untraced
    def _fastdiff_run(self, timestep: Any, options: dict[str, Any], batch: int, generator: Any) -> Run:
        """The loop that begins with this timestep."""
        kept = self._fastdiff
        if kept.run is None:
            setup = self._fastdiff_setup(timestep)
            kept.run = Run(setup, options, self.timesteps)
            kept.options = dict(options)
        return kept.run

    def _fastdiff_setup(self, timestep: Any) -> Setup:
        kept, stock = self._fastdiff, self._stock_class
        if kept.call is None and getattr(self, "num_inference_steps", None) is None and not _trains_whole(self):
            raise RuntimeError(f"{stock.__name__}.step was called before set_timesteps: call set_timesteps(n) first")
        if kept.lost:
            raise RuntimeError(
                f"{stock.__name__} was pickled in the middle of a loop that remembers its past, which a pickle does "
                f"not hold: call set_timesteps"
            )
        path = kept.noise == "philox" and hasattr(self, "noise_sampler")
        setup = Setup(usual(stock), self, kept.call, 0, False, False, path)
        at, told = self._fastdiff_place(timestep)
        if not 0 <= at < setup.calls:
            raise ValueError(f"begin_index {at} is outside the schedule of {setup.calls} steps")
        return setup._replace(begin=at, indexed=told, own=_edited(setup))

    def _fastdiff_place(self, timestep: Any) -> tuple[int, bool]:
        """The number of the call that takes this timestep, and whether an index tells it, as stock asks."""
        for name in ("_step_index", "_begin_index"):
            index = getattr(self, name, None)
            if index is not None:
                return int(index), True
        return position_of(timestep, self.timesteps), False

    def _fastdiff_current(self, timestep: Any) -> Run | None:
        """The running loop, at the step_index that somebody gave it; None where another has to begin there."""
        kept = self._fastdiff
        run = kept.run
        if run is None or not run.moved(self):
            return run
        if run.started and not run.reading.memoryless:
            raise RuntimeError(
                f"{self._stock_class.__name__}'s step_index was changed by hand in the middle of a loop that remembers "
                f"its past: call set_timesteps"
            )
        if not run.reading.memoryless or not run.jump(self._fastdiff_place(timestep)[0]):
            kept.run = None
        return kept.run

    @untraced
    def _fastdiff_options(self, timestep: Any, kwargs: dict[str, Any], m: Tensor, x: Tensor) -> Run:
        """The run for these options of step: a new one, or the running one from where it is if it carries nothing."""
        kept = self._fastdiff
        options = Run.options_of(kwargs, self._step_defaults)
        run = kept.run
        if run is None:
            return self._fastdiff_run(timestep, options, len(x), kwargs.get("generator"))
        if options == run.options:
            return run
        if run.started and not run.reading.memoryless:
            raise ValueError(f"step's options changed from {run.options} to {options} in the middle of a loop")
        kept.run = Run(run.setup, options, self.timesteps, at=run)
        kept.options = dict(options)
        return kept.run

    def _fastdiff_stock(self, reason: str) -> None:
        """This loop runs stock steps; says why, once."""
        kept = self._fastdiff
        kept.stock, kept.run = reason, None
        if reason not in kept.warned:
            kept.warned.add(reason)
            warn(f"{self._stock_class.__name__} runs its stock step: {reason}")


def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
    _check_timesteps(type(self), args, kwargs)
    with LOCK:
        result = self._stock_class.set_timesteps(self, *args, **kwargs)
    kept = self._fastdiff
    kept.call = (args, kwargs)
    kept.restart()
    return result


def set_begin_index(self: Any, begin_index: int = 0) -> None:
    self._stock_class.set_begin_index(self, begin_index)
    run = self._fastdiff.run
    if run is not None and not run.started:
        self._fastdiff.run = None


def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kept = self._fastdiff
    timestep = args[0] if args else kwargs.get("timestep")
    if kept.stock is None and timestep is not None:
        try:
            run = self._fastdiff_current(timestep) or self._fastdiff_run(timestep, kept.options, len(sample), None)
            self.is_scale_input_called = True
            return run.scale(self, sample, timestep)
        except Unsupported as reason:
            self._fastdiff_stock(str(reason))
    return self._stock_class.scale_model_input(self, sample, *args, **kwargs)


def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
    made = _made_step(self, model_output, timestep, sample, args, kwargs)
    return self._stock_class.step(self, model_output, timestep, sample, *args, **kwargs) if made is None else made


def _made_step(
    self: Any, model_output: Tensor, timestep: Any, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A row of the plan, or None where the stock step has to run."""
    kept = self._fastdiff
    if kept.stock is not None:
        return None
    if args:
        kwargs = _named(self._stock_class, args, kwargs)
    try:
        run = self._fastdiff_current(timestep)
        if run is None or not run.takes(kwargs):
            run = self._fastdiff_options(timestep, kwargs, model_output, sample)
        return run.step(self, model_output, timestep, sample, kwargs, kept)
    except Unsupported as reason:
        if kept.run is not None and kept.run.started:
            raise ValueError(f"{reason}; this cannot change in the middle of a loop") from None
        self._fastdiff_stock(str(reason))
    return None


def step_with_past(
    self: Any, model_output: Tensor, old_pred_original_sample: Tensor | None, timestep: Any, timestep_back: Any,
    sample: Tensor, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    kept, made = self._fastdiff, None
    if kept.stock is None:
        wrong = kept.past.differs(kept.run, old_pred_original_sample, timestep, timestep_back)
        if wrong is None:
            named = _named(self._stock_class, args, kwargs) if args else kwargs
            own = {"return_dict": False, **named, "variance_noise": None}  # which stock ignores
            made = _made_step(self, model_output, timestep, sample, (), own)
        else:
            self._fastdiff_stock(wrong)
    if made is None:
        return self._stock_class.step(
            self, model_output, old_pred_original_sample, timestep, timestep_back, sample, *args, **kwargs
        )
    kept.past.keep(made[1])
    return made


REPLACED = {f.__name__: f for f in (step, set_timesteps, set_begin_index, scale_model_input)}


def _trains_whole(scheduler: Any) -> bool:
    """Is the scheduler, as made, a complete loop over its training steps (DDPM), as the stock step allows?"""
    return hasattr(scheduler, "custom_timesteps") and "DDPM" in type(scheduler).__name__


def _edited(setup: Setup) -> bool:
    """Does the live scheduler differ from what its configuration and set_timesteps make?"""
    if setup.live._fastdiff.call is None and getattr(setup.live, "num_inference_steps", None) is not None:
        return True  # set_timesteps ran before it was accelerated
    tables, plain = _made(setup)
    live = vars(setup.live)
    if any(_is_plain(live.get(name)) and live[name] != want for name, want in plain.items()):
        return True
    for name, want in tables.items():
        got = getattr(setup.live, name, None)
        if isinstance(got, Tensor) and got.shape != want.shape:
            return True
        if not isinstance(got, Tensor) or got.device.type != "cpu":
            continue  # reading it would stall the device
        if not np.allclose(got.double().numpy(), want, rtol=SIMILAR, atol=1e-6):
            return True
    return False


_MADE: dict[Any, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}


def _made(setup: Setup) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tables, and the numbers and words beside them, that the configuration and set_timesteps make."""
    key = key_of(setup, {})
    if key is None or key not in _MADE:
        with LOCK, on_host():
            s = setup._replace(own=False, begin=0, indexed=False).make()
        found = {n: getattr(s, n, None) for n in ("timesteps", "sigmas", "alphas_cumprod")}
        tables = {n: v.detach().cpu().double().numpy() for n, v in found.items() if isinstance(v, Tensor)}
        made = tables, {n: v for n, v in vars(s).items() if n not in OF_A_LOOP and _is_plain(v)}
        if key is None:
            return made
        if len(_MADE) > 256:
            _MADE.clear()
        _MADE[key] = made
    return _MADE[key]


def _is_plain(v: Any) -> bool:
    if type(v) in (list, tuple):
        return all(isinstance(one, PLAIN) for one in v)
    return isinstance(v, PLAIN)


def _named(stock: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(stock.step).parameters)[leading(stock) :]  # type: ignore[attr-defined]
    if len(args) > len(names):
        own = leading(stock) - 1
        raise TypeError(f"{stock.__name__}.step takes at most {len(names) + own} arguments, got {len(args) + own}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_timesteps(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses what stock takes and gets wrong: no steps, sigmas that rise or are not numbers."""
    names = list(inspect.signature(cls.set_timesteps).parameters)[1:]  # type: ignore[attr-defined]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    n = given.get("num_inference_steps")
    if n is not None and not isinstance(n, Tensor) and isinstance(n, (int, np.integer)) and n < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {n!r}")
    for name in ("sigmas", "timesteps"):
        values = given.get(name)
        if values is None or isinstance(values, str):
            continue
        v = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
        if v.ndim != 1 or not len(v):
            raise ValueError(f"{name} must be numbers [n] with n >= 1, got {values!r}")
        if not np.all(np.isfinite(v)):
            raise ValueError(f"{name} must be finite, got {values!r}")
        if name == "sigmas" and np.any(np.diff(v) > 0):
            raise ValueError(f"sigmas must not increase, got {values!r}")


@functools.cache
def accelerated_class(stock: type) -> type:
    """The accelerated subclass of a diffusers scheduler class; it saves and introduces itself as the stock class.

    Raises: TypeError: the class cannot be accelerated, whatever its configuration.
    """
    why = refusal(stock)
    if why is not None:
        raise TypeError(f"{stock.__name__} cannot be accelerated: {why}")
    signature = inspect.signature(stock.step)  # type: ignore[attr-defined]
    body: dict[str, Any] = {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "_stock_class": stock,
        "_step_defaults": {p.name: p.default for p in list(signature.parameters.values())[leading(stock) :]},
    }
    for name, ours in REPLACED.items():
        if hasattr(stock, name) and not (name == "scale_model_input" and _identity(stock)):
            ours = step_with_past if name == "step" and takes_past(stock) else ours
            body[name] = _presented(ours, getattr(stock, name))
    made = type(stock.__name__, (Accelerated, stock), body)
    made.__qualname__ = stock.__qualname__
    return made


def _presented(ours: Any, theirs: Any) -> Any:
    """A function of its own, with the stock name, documentation and signature."""

    call = type(ours)(ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__)
    return functools.wraps(theirs)(call)


def _identity(stock: type) -> bool:
    """Does scale_model_input return the sample itself? Its source is one line then."""
    try:
        source = inspect.getsource(stock.scale_model_input)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return False
    return source.rstrip().endswith('"""\n        return sample')


def _rebuild(stock: type, state: dict[str, Any]) -> Any:
    new: Any = object.__new__(accelerated_class(stock))
    new.__dict__.update(state)
    return new
