"""probe: any scheduler or sampler that is linear in its inputs, read back into a Plan from one run."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.plan import Plan
from fastdiff.probe.clamp import end_of, name_of, prediction_of, split
from fastdiff.probe.host import on_host
from fastdiff.probe.learned import with_second_plane
from fastdiff.probe.noise import correlated
from fastdiff.probe.observe import RIDERS, Observation, Overflow, Recorder, Refused, globals_of, observe
from fastdiff.probe.realise import realise

__all__ = ["probe"]

_cache: dict[Any, Plan] = {}
CACHED = 256
INPUTS_A_ROW = 4  # columns reserved: a model output, a clamp, two draws


def probe(
    target: Any,
    steps: int | None = None,
    *,
    sigmas: Any = None,
    step_options: Mapping[str, Any] | None = None,
    edits: bool = False,
    brownian: bool | None = None,
    name: str | None = None,
    **options: Any,
) -> Plan:
    """Reads a scheduler or a sampler function back into a plan, from one run on basis vectors in float64.

        x_{k+1} = A x_k + b p + d m + s n      where every coefficient is read off, none is known beforehand

    Args:
        target: a scheduler - set_timesteps(steps, **options), timesteps, step(m, t, x, **step_options) with or without
            scale_model_input and init_noise_sigma - or a sampler function f(model, x, sigmas, **options) whose
            model(x, sigma) returns x0. The scheduler itself is not touched: a fresh one is made from its config, or a
            deep copy where it has none.
        steps: of a scheduler. sigmas: [n + 1] of a function, or handed to set_timesteps.
        edits: also follow what happens when x is changed between steps (a hook, an inpainting mask): some solvers
            remember their own x, which costs the plan slots. Schedulers only.
        brownian: a noise sampler's draws on overlapping intervals (t0, t1) are correlated as those of one Brownian
            motion. False: each draw is an independent normal, exactly as it is handed out. By default True for a
            scheduler that owns a noise sampler (a Brownian tree over its sigmas), False for a function.
        name: the plan's name for people; the class or function name by default.
    Returns: Plan, in the state the black box carries (x / alpha where it carries that; c_in is what scales it for the
        model), with the fewest slots that repeat it. draws[k] counts its normal draws in row k, those without effect
        too, so that the same noise gives the same sample. alpha, sigma and end are NaN where the scheduler cannot
        tell.
    Raises: ValueError: what it does is not linear (dynamic thresholding, step sizes from norms, adaptive steps,
        branches on values, another noise than normal), or it needs more than a plan has; the message says what was
        seen. TypeError: neither a scheduler nor a function.
    Numerics: float64 throughout (float32 casts and constants are lifted); superposition is checked to 1e-9 on random
        numbers that ride along. Plans are cached by class, config and arguments; functions by identity.
    """
    scheduler = hasattr(target, "step") and hasattr(target, "set_timesteps")
    if scheduler and isinstance(target, type):
        raise TypeError(f"probe needs a scheduler, got its class: {target.__name__}()")
    if not scheduler and hasattr(target, "scheduler"):
        raise TypeError(f"probe needs a scheduler, got {type(target).__name__}: give its .scheduler")
    if not scheduler and not callable(target):
        raise TypeError(
            f"probe needs a scheduler (set_timesteps, step) or a sampler f(model, x, sigmas), got {target!r}"
        )
    label = str(name or (type(target).__name__ if scheduler else getattr(target, "__name__", type(target).__name__)))
    step_options = dict(step_options or {})
    if scheduler:
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"probe needs steps >= 1, got {steps!r}")
        if steps is None and sigmas is None and "timesteps" not in options:
            raise ValueError("probe of a scheduler needs steps=N (or sigmas= or timesteps=)")
    else:
        if sigmas is None:
            raise ValueError("probe of a sampler function needs sigmas=[...]")
        if steps is not None or step_options or edits:
            raise ValueError("steps, step_options and edits are for schedulers; a sampler function takes sigmas")
    if brownian is None:
        brownian = scheduler and hasattr(target, "noise_sampler")
    if sigmas is not None:
        sigmas = np.asarray(sigmas.detach().cpu() if isinstance(sigmas, Tensor) else sigmas, np.float64)
        if sigmas.ndim != 1 or len(sigmas) < 1 + (not scheduler) or not np.all(np.isfinite(sigmas)):
            raise ValueError(f"sigmas must be finite numbers [n + 1], got {sigmas!r}")
    key = _key(target, scheduler, steps, sigmas, step_options, options, edits, brownian, label)
    if key is not None and key in _cache:
        return _cache[key]
    try:
        if scheduler:
            read = partial(_scheduler, target, steps, sigmas, step_options, options, edits, brownian, label)
            try:
                plan = read(None)
            except Refused as reason:
                try:  # it may want a second plane, a learned variance
                    plan = with_second_plane(read)
                except (Refused, ValueError):
                    raise reason from None
        else:
            plan = _function(target, sigmas, options, brownian, label)
    except Refused as reason:
        raise ValueError(f"{label} is not a plan: {reason}") from reason
    if key is not None:
        while len(_cache) >= CACHED:
            _cache.pop(next(iter(_cache)))
        _cache[key] = plan
    return plan


def _frozen(value: Any) -> Any:
    """A hashable copy of an argument; what cannot be copied stands for itself."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return ("array", value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return (type(value).__name__, value) if isinstance(value, (bool, int, float, str, type(None))) else value


def _key(target: Any, scheduler: bool, *arguments: Any) -> Any:
    if scheduler and getattr(target, "config", None) is None:
        return None  # its state is its own affair
    own = (type(target), _frozen(dict(target.config))) if scheduler else (target,)
    try:
        key = (own, _frozen(arguments))
        hash(key)
    except TypeError:
        return None
    return key


def _fresh(target: Any, steps: int | None) -> Any:
    """A new scheduler of the same configuration, made inside the lifted world; a deep copy where there is no config."""
    cls, config = type(target), getattr(target, "config", None)
    if config is None or not hasattr(cls, "from_config"):
        return copy.deepcopy(target)
    if steps is None:
        return cls.from_config(config)

    def set_timesteps(self: Any, num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
        # constructors that prepare every training step take longer than the probe; those steps are set anew anyway
        return cls.set_timesteps(self, min(num_inference_steps, steps), *args, **kwargs)

    short: Any = type(cls.__name__, (cls,), {"set_timesteps": set_timesteps})
    made = short.from_config(config)
    made.__class__ = cls
    return made


def _guarded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls foreign code; what it raises becomes the reason of a refusal."""
    try:
        return call(*args, **kwargs)
    except (Refused, Overflow, IndexError):
        raise
    except Exception as error:
        raise Refused(f"it failed with {type(error).__name__}: {error}") from error


def _lengths(target: Any) -> set[int]:
    """Lengths of the tables an object holds, or held while it was made: a basis could be mistaken for one of them."""
    tables = {v.shape[-1] for v in vars(target).values() if isinstance(v, (Tensor, np.ndarray)) and v.ndim}
    config = getattr(target, "_made_of", None) or getattr(target, "config", None) or {}
    counts = [v for v in dict(config).values() if isinstance(v, int) and not isinstance(v, bool)]
    return tables | {v + more for v in counts for more in (-1, 0, 1)}


def _width(rows: int, avoid: set[int]) -> int:
    width = INPUTS_A_ROW * rows + 8 + RIDERS
    while width in avoid or width % 10 != 7:
        width += 1
    return width


def _scheduler(
    target: Any, steps: int | None, sigmas: np.ndarray | None, step_options: dict[str, Any], options: dict[str, Any],
    edits: bool, brownian: bool, label: str, second: float | None,
) -> Plan:  # fmt: skip
    made: list[Any] = []
    if sigmas is not None:
        options = {**options, "sigmas": sigmas.tolist()}

    def body(recorder: Recorder) -> None:
        s = _guarded(_fresh, target, steps)
        _guarded(s.set_timesteps, *(() if steps is None else (steps,)), **options)
        if hasattr(s, "noise_sampler"):
            s.noise_sampler = recorder.draw
        made[:] = [copy.copy(s)]  # as it is before the first step
        timesteps = list(s.timesteps)
        x = recorder.source("x")
        for k, t in enumerate(timesteps):
            recorder.state.append(recorder.row(x, "the state"))
            seen = _guarded(s.scale_model_input, x, t) if hasattr(s, "scale_model_input") else x
            m = recorder.model(seen.clone(), t)
            m = m if second is None else torch.cat([m, torch.full_like(m, second)], 1)
            try:
                out = _step(s, m, t, x, step_options)
            except IndexError as error:
                if k == 0 or k + 1 < len(timesteps):
                    raise Refused(f"it failed with IndexError: {error}") from error
                recorder.forget()  # a last time that is where it arrives, not a step
                return
            x = _result(out)
            predicted = getattr(out, "pred_original_sample", None)
            if predicted is not None:
                recorder.predicted[-1] = recorder.row(predicted, "pred_original_sample")
            if edits and k + 1 < len(timesteps):
                x = x + recorder.source("e")
        recorder.state.append(recorder.row(x, "the result"))

    rows = steps if steps is not None else len(options.get("timesteps", options.get("sigmas", ())))
    seen = observe(body, _width(rows + edits * rows, _lengths(target) | {rows, rows + 1}), globals_of(target))
    s = made[0]
    alpha, sigma = _levels(s, len(seen.times))
    config = getattr(s, "config", None)
    named = config.get("prediction_type") if isinstance(config, Mapping) else None
    integer = not torch.is_floating_point(torch.as_tensor(s.timesteps))
    init_scale = float(getattr(s, "init_noise_sigma", 1.0))
    return _plan(seen, named, alpha, sigma, init_scale, integer, brownian, label)


def _step(s: Any, m: Tensor, t: Any, x: Tensor, options: dict[str, Any]) -> Any:
    """One step; a time that must have a batch axis gets one."""
    try:
        return _guarded(s.step, m, t, x, **options)
    except IndexError:
        if not isinstance(t, Tensor) or t.ndim:
            raise
        return _guarded(s.step, m, t[None], x, **options)


def _result(out: Any) -> Any:
    if hasattr(out, "prev_sample"):
        return out.prev_sample
    return out[0] if isinstance(out, (tuple, list)) else out


def _levels(s: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """alpha, sigma of the state at every row, from how the scheduler itself adds noise; NaN where it does not tell."""
    unknown = np.full(rows, math.nan), np.full(rows, math.nan)
    x0, eps = (
        torch.tensor(v, dtype=torch.float64, device="cpu").expand(rows, 1, 1, 2).clone()
        for v in ([1.0, 0.0], [0.0, 1.0])
    )
    try:
        with on_host():
            times = torch.as_tensor(s.timesteps)[:rows]
            if hasattr(s, "add_noise"):
                y = copy.copy(s).add_noise(x0, eps, times)
            else:  # flow matching: one time a call, and it remembers which
                y = torch.cat([copy.copy(s).scale_noise(x0[:1], t[None], eps[:1]) for t in times])
    except Exception:  # foreign code that may have no such thing, or another signature
        return unknown
    if not isinstance(y, Tensor) or y.shape != x0.shape:
        return unknown
    levels = y.double().numpy().reshape(rows, 2)
    return (levels[:, 0].copy(), levels[:, 1].copy()) if np.all(np.isfinite(levels)) else unknown


def _function(target: Any, sigmas: np.ndarray, options: dict[str, Any], brownian: bool, label: str) -> Plan:
    try:
        accepted = inspect.signature(target).parameters
    except (TypeError, ValueError):
        accepted = {}  # type: ignore[assignment]

    def body(recorder: Recorder) -> None:
        def model(x: Tensor, sigma: Any, **extra: Any) -> Tensor:
            row = recorder.row(x, "the model's input")
            recorder.state.append(row)
            return recorder.model(x, sigma)

        given = dict(options)
        if "noise_sampler" in accepted:
            given["noise_sampler"] = recorder.draw
        if "disable" in accepted:
            given.setdefault("disable", True)
        x = recorder.source("x")
        result = _guarded(target, model, x.clone(), torch.from_numpy(sigmas.copy()), **given)
        recorder.state.append(recorder.row(_result(result), "the result"))

    seen = observe(body, _width(2 * len(sigmas), {len(sigmas)}), globals_of(target))
    sigma = np.array([float(t) for t in seen.times])
    return _plan(seen, None, np.ones(len(sigma)), sigma, float(sigmas[0]), False, brownian, label, function=True)


def _plan(
    seen: Observation, named: str | None, alpha: np.ndarray, sigma: np.ndarray, init_scale: float, integer: bool,
    brownian: bool, label: str, *, function: bool = False,
) -> Plan:  # fmt: skip
    N = len(seen.times)
    if brownian:
        seen = correlated(seen)
    c_in = np.array([_ratio(k, seen) for k in range(N)])
    if seen.state[0, 0] == 0:
        raise Refused("the model's first input does not depend on the start")
    if seen.state[0, 0] != 1:  # a function that scales its start: the start is the state, the scale the model's
        first = seen.state[0, 0]
        c_in[0] *= first
        seen = seen._replace(state=np.concatenate([seen.state[:1] / first, seen.state[1:]]))
    prediction = prediction_of(seen, None, alpha, sigma)
    known = function or bool(np.isfinite(alpha).all() or np.isfinite(prediction.c_skip).all())
    if np.isnan(prediction.c_skip).any():
        name = "x0" if function else name_of(seen, named, alpha, sigma)
        prediction = prediction_of(seen, name, alpha, sigma)
    if named == "epsilon":  # its own account of x0 = (x - sigma m) / alpha tells what add_noise did not
        skip = np.where(prediction.c_skip == 0, np.nan, prediction.c_skip)
        told = 1 / skip, -prediction.c_out / skip
        alpha, sigma = (np.where(np.isfinite(v), v, own) for v, own in zip((alpha, sigma), told, strict=True))
    outputs = np.flatnonzero(seen.kinds == "m")
    x0: list[np.ndarray | None] = []
    for k in range(N):
        free = math.isfinite(prediction.c_skip[k]) and not math.isfinite(prediction.hi[k] - prediction.lo[k])
        v = prediction.c_skip[k] * seen.state[k] if free else None
        if v is not None:
            v[outputs[k]] += prediction.c_out[k]
        x0.append(v)
    size = np.sqrt(alpha**2 + sigma**2)
    table = realise(seen, x0, np.append(np.where(np.isfinite(size), size, 1.0), 1.0))
    table, prediction = split(table, prediction, alpha, sigma)
    start = (alpha[0], sigma[0]) if np.isfinite(alpha[0] + sigma[0]) else (0.0, init_scale)
    end = end_of(table, prediction, *start) if known else (math.nan, math.nan)
    times = np.array([int(t) for t in seen.times]) if integer else np.array([float(t) for t in seen.times])
    return Plan(
        label, times, times.astype(np.float64), alpha, sigma, c_in, prediction.c_skip, prediction.c_out,
        prediction.lo, prediction.hi, table.A, table.b, table.d, table.s, init_scale=init_scale,
        init_noise=table.init_noise, end=end, draws=table.draws,
    )  # fmt: skip


def _ratio(k: int, seen: Observation) -> float:
    """c_in of row k: what the model was given over the state."""
    x, given = seen.state[k], seen.seen[k]
    i = int(np.argmax(np.abs(x)))
    ratio = given[i] / x[i]
    if ratio == 0 or np.abs(given - ratio * x).max() > 1e-12 * abs(ratio * x[i]):
        raise Refused(f"the model's input is not a multiple of the state (row {k})")
    return float(ratio)
