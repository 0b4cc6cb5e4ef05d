"""Readings and dialects of schedulers, each made once a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.integrations.diffusers.reading import Dialect, Reading, Setup, dialect_of, read

__all__ = ["Unsupported", "cached_dialect", "key_of", "reading_of"]

CACHED = 256
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
        key = (setup.stock, frozen(setup.live.config), given, setup.begin, setup.indexed, setup.path, frozen(options))
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
            if setup.own and (getattr(setup.live, "_step_index", None) or 0) > 0:
                found = "it was accelerated in the middle of a loop, whose past a plan does not know"
        if key is not None:
            while len(_readings) >= CACHED:
                _readings.pop(next(iter(_readings)))
            _readings[key] = found
    if isinstance(found, str):
        raise Unsupported(found)
    return found


def cached_dialect(setup: Setup, options: Mapping[str, Any], x: Tensor, m: Tensor) -> Dialect:
    """`dialect_of`, cached. Raises: Unsupported: stock fails on these tensors."""
    own = key_of(setup, options)
    key = (own, x.dtype, m.dtype, x.dim())
    found = None if own is None else _dialects.get(key)
    if found is None:
        try:
            found = dialect_of(setup, options, x, m)
        except Exception as error:  # let stock say so itself
            raise Unsupported(f"a trial step failed with {type(error).__name__}: {error}") from error
        while len(_dialects) >= CACHED:
            _dialects.pop(next(iter(_dialects)))
        _dialects[key] = found
    return found
