"""diffusers: `accelerate` a scheduler or a pipeline in one line, `restore` it in another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastdiff.caller import warn
from fastdiff.integrations.diffusers.models import as_model, flux_arguments

__all__ = ["accelerate", "as_model", "flux_arguments", "is_accelerated", "restore"]

NOISES = ("torch", "philox")


def accelerate(obj: Any, *, noise: str = "torch", seed: int = 0, compile: bool = False) -> Any:
    """Makes a diffusers scheduler, or every scheduler of a pipeline, run one fused row of a plan a step.

        pipe = fd.accelerate(pipe);  scheduler = fd.accelerate(scheduler)

    Args:
        obj: a scheduler (the result is a new object that shares its state; the given one stays as it is) or a pipeline
            (its schedulers, and those of pipelines inside it, are exchanged in place, and it is returned). Accelerating
            twice changes nothing.
        noise: "torch" draws as stock does: the same generator gives the same picture. "philox" does not depend on the
            batch, and costs nothing on CUDA, where the step draws it; its seeds are those of the generators step is
            given, or `seed`. It also takes the place of a Brownian tree, which costs a hundred steps.
        compile: changes no number; Philox noise on a CPU is a C++ loop without it too, some rows at a time with it.
    Returns: an instance of a subclass of the stock class, which saves under the stock name; or the pipeline. A class
        whose step takes something else than (model_output, timestep, sample), or these and its past (CogVideoX), stays
        as it is, with a RuntimeWarning.
    Raises: TypeError: neither a scheduler nor a pipeline with one. ValueError: an unknown noise or seed.
    Numerics: fp32 arithmetic (fp64 of float64 samples); within 2e-6 of the largest value of stock's run in float64.
    """
    if noise not in NOISES:
        raise ValueError(f"unknown noise {noise!r}; valid: {', '.join(NOISES)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 62:
        raise ValueError(f"seed must be an int in 0..2^62 - 1, got {seed!r}")
    if isinstance(obj, type):
        raise TypeError(f"accelerate needs a scheduler or a pipeline, got a class: {obj.__name__}(...)")
    if _is_scheduler(obj):
        return _accelerated(obj, noise, seed, compile)
    return _exchanged(obj, functools.partial(_accelerated, noise=noise, seed=seed, compiled=compile))


def restore(obj: Any) -> Any:
    """Undoes `accelerate`: the stock scheduler with its state, or the pipeline with stock schedulers.

    Args: obj: a scheduler or a pipeline, accelerated or not.   Returns: a stock scheduler, or the same pipeline.
    Raises: TypeError: neither a scheduler nor a pipeline with one.
    """
    if _is_scheduler(obj):
        return _restored(obj)
    return _exchanged(obj, _restored)


def is_accelerated(scheduler: Any) -> bool:
    """Was this scheduler made by `accelerate`?"""
    return hasattr(type(scheduler), "_stock_class")


def _is_scheduler(obj: Any) -> bool:
    return hasattr(obj, "step") and hasattr(obj, "set_timesteps")


def _exchanged(pipe: Any, new: Callable[[Any], Any]) -> Any:
    """The pipeline, and the pipelines it is made of, with other schedulers; a shared one stays shared."""
    inner = [v for v in getattr(pipe, "__dict__", {}).values() if hasattr(v, "components")]
    found = [(owner, name, scheduler) for owner in (pipe, *inner) for name, scheduler in _schedulers(owner).items()]
    if not found:
        raise TypeError(
            f"accelerate and restore take a diffusers scheduler or a pipeline with one, got {type(pipe).__name__}"
        )
    made: dict[int, Any] = {}
    for *_, scheduler in found:
        if id(scheduler) not in made:
            made[id(scheduler)] = new(scheduler)
    for owner, name, scheduler in found:
        setattr(owner, name, made[id(scheduler)])
    return pipe


def _schedulers(pipe: Any) -> dict[str, Any]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        return {}
    return {name: value for name, value in components.items() if _is_scheduler(value)}


def _accelerated(scheduler: Any, noise: str, seed: int, compiled: bool) -> Any:
    from fastdiff.integrations.diffusers.reading import refusal
    from fastdiff.integrations.diffusers.scheduler import Settings, accelerated_class

    if is_accelerated(scheduler):
        kept = scheduler._fastdiff
        if (kept.noise, kept.seed, kept.compiled) == (noise, seed, compiled):
            return scheduler
        scheduler = _restored(scheduler)
    stock: Any = type(scheduler)
    why = refusal(stock)
    if why is not None:
        warn(f"{stock.__name__} stays as it is: {why}")
        return scheduler
    new: Any = object.__new__(accelerated_class(stock))
    new.__dict__.update(vars(scheduler))
    new.__dict__["_fastdiff"] = Settings(noise, seed, compiled)
    return new


def _restored(scheduler: Any) -> Any:
    if not is_accelerated(scheduler):
        return scheduler
    run = scheduler._fastdiff.run
    if run is not None and run.remembers:
        raise RuntimeError(
            f"{scheduler._stock_class.__name__} is in the middle of a loop whose past the stock one has not seen: "
            f"restore it before set_timesteps, or after its last step"
        )
    new: Any = object.__new__(scheduler._stock_class)
    new.__dict__.update({k: v for k, v in vars(scheduler).items() if k != "_fastdiff"})
    return new
