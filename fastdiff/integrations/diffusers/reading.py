"""A diffusers scheduler read back: its plan from a given call on, and how it speaks (dtypes, draws, outputs)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from fastdiff.integrations.diffusers.usual import USUAL, leading, takes_past
from fastdiff.integrations.rows import HostRow, Terms, reads_p, rows_of
from fastdiff.plan import Plan
from fastdiff.probe import probe
from fastdiff.probe.host import on_host
from fastdiff.probe.observe import LOCK

__all__ = ["Dialect", "Reading", "Setup", "dialect_of", "read", "refusal"]

NORMALS = ("randn", "randn_like", "normal_", "normal")
EXACT = 1e-9
ONE_MORE_TIME = ("DDPMWuerstchenScheduler", "SCMScheduler")  # the last timestep is where the loop ends

BATCHED_TIME = ("DDPMWuerstchenScheduler",)  # its step takes a timestep [B]


class Setup(NamedTuple):
    """How a stock scheduler comes to where the loop begins.

    stock: the class. live: the scheduler. set_timesteps: its arguments, None where it was never called. begin: the
    number of the first call in `timesteps`. indexed: was that told by set_begin_index? own: use a copy of the live
    scheduler itself, because it is not what its configuration makes. path: are the draws of a Brownian tree made of
    independent normals, rather than taken from it?
    """

    stock: type
    live: Any
    set_timesteps: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    begin: int
    indexed: bool
    own: bool
    path: bool = False

    def make(self, *, lifted: bool = True) -> Any:
        """A stock scheduler before its first step; lifted: a copy of the live one computes in float64."""
        if self.own:
            new: Any = object.__new__(self.stock)
            new.__dict__.update({k: _host(v, lifted) for k, v in vars(self.live).items() if k != "_fastdiff"})
        else:
            cls: Any = self.stock if self.set_timesteps is None else _lean(self.stock)
            # not from_config: it imports every compatible scheduler, and SciPy with them
            names = inspect.signature(self.stock).parameters
            new = cls(**{k: v for k, v in self.live.config.items() if k in names})
            if self.set_timesteps is not None:
                new.__class__ = self.stock
                args, kwargs = _on_host(self.stock, *self.set_timesteps)
                new.set_timesteps(*args, **kwargs)
        if self.indexed:
            new.set_begin_index(self.begin)
        return new

    @property
    def calls(self) -> int:
        """How often a whole loop calls step."""
        return len(self.live.timesteps) - (self.stock.__name__ in ONE_MORE_TIME)


@functools.cache
def _lean(stock: type) -> type:
    """The class, but its constructor does not set the timesteps of all training steps before the ones asked for."""

    def set_timesteps(self: Any, n: Any = None, *args: Any, **kwargs: Any) -> None:
        stock.set_timesteps(self, 2 if isinstance(n, int) else n, *args, **kwargs)  # type: ignore[attr-defined]

    return type(stock.__name__, (stock,), {"set_timesteps": set_timesteps})


def _on_host(stock: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of set_timesteps for a scheduler on the CPU, whatever device the live one is on."""

    def host(v: Any) -> Any:
        return v.detach().cpu() if isinstance(v, Tensor) else v

    names = list(inspect.signature(stock.set_timesteps).parameters)[1:]
    device = names.index("device") if "device" in names else len(args)
    moved = tuple("cpu" if i == device else host(v) for i, v in enumerate(args))
    return moved, {k: "cpu" if k == "device" else host(v) for k, v in kwargs.items()}


def _host(v: Any, lifted: bool) -> Any:
    """A copy on the host, floating point tensors in float64 if asked: a table of the scheduler's own."""
    if isinstance(v, Tensor):
        v = v.detach().cpu()
        return v.double() if lifted and v.is_floating_point() else v.clone()
    return copy.deepcopy(v)


class Reading(NamedTuple):
    """A plan and what goes with every row of it.

    rows: for History. draws: normal tensors stock draws. second: terms of the second result, None where it has none or
    it is not a combination of x, m, p and n. after: stock's step_index after the step. c_in: [N] scale of the input.
    times: [N] what stock's timesteps are, float. threshold: (quantile, maximum) or None. spread: [N] (a, b) where the
    model's second plane v scales the noise by exp(a + b v), or None. spans: [N] what stock asks its Brownian tree for,
    None where it has none or the draws are made of independent normals.
    """

    plan: Plan
    rows: list[HostRow]
    draws: list[int]
    second: list[Terms] | None
    after: list[int | None]
    c_in: list[float]
    times: list[float]
    threshold: tuple[float, float] | None
    spread: list[tuple[float, float]] | None
    spans: list[tuple[Any, ...]] | None

    @property
    def memoryless(self) -> bool:
        """Does every row read its x alone, so that any of them can be the first?"""
        return self.plan.slots == 1


class _Watched:
    """What fd.probe sees of a scheduler: the loop as a pipeline runs it from `begin` on, each step noted."""

    def __init__(self, setup: Setup, options: Mapping[str, Any], prepared: dict[str, Any] | None = None) -> None:
        self.setup, self.options, self.change = setup, dict(options), prepared or {}
        self.draws: list[int] = []
        self.second: list[Terms | None] = []
        self.after: list[int | None] = []
        self._made_of = getattr(setup.live, "config", None)
        tables = (v for v in vars(setup.live).values() if isinstance(v, (Tensor, np.ndarray)) and v.ndim)
        self.__dict__.update({f"_table{i}": np.zeros(v.shape[-1]) for i, v in enumerate(tables)})
        if _has_tree(setup):
            self.noise_sampler = None  # fd.probe gives its own

    def __deepcopy__(self, memo: Any) -> _Watched:
        return self  # one run, one object

    def set_timesteps(self, rows: int) -> None:
        s = self.inner = self.setup.make()
        if self.change:
            s.register_to_config(**self.change)
        self.draws, self.second, self.after = [], [], []
        self.config = dict(s.config)
        self.timesteps = s.timesteps[self.setup.begin : self.setup.begin + rows]
        self.init_noise_sigma = float(getattr(s, "init_noise_sigma", 1.0))
        if hasattr(s, "scale_model_input"):
            self.scale_model_input = s.scale_model_input
        before = copy.copy(s)
        before.__dict__.update(_begin_index=None, _step_index=None)
        for name in ("add_noise", "scale_noise"):
            if hasattr(s, name):
                setattr(self, name, functools.partial(_fresh_call, before, name))

    def step(self, m: Tensor, t: Tensor, x: Tensor) -> Any:
        recorder: Any = getattr(_get_current_dispatch_mode(), "recorder", None)
        first = len(recorder.kinds) - 1  # the model's output is the newest input
        if _has_tree(self.setup):
            self.inner.noise_sampler = self.noise_sampler
        if self.setup.stock.__name__ in BATCHED_TIME:
            t = t.reshape(1)
        out = self.inner.step(m, t, x, **self.options)
        kinds = recorder.kinds
        self.draws.append(kinds[first:].count("n"))
        self.after.append(getattr(self.inner, "_step_index", None))
        v = _second_of(out)
        self.second.append(None if v is None else self._terms(recorder, x, v, first))
        return out

    def _terms(self, recorder: Any, x: Tensor, v: Tensor, m: int) -> Terms | None:
        """v as c (x, m, p, n) of this step, or None."""
        if v.numel() != recorder.width:
            return None
        kinds, width = recorder.kinds, len(recorder.kinds)
        target, state = (recorder.row(y, "a result")[:width].copy() for y in (v, x))
        size = np.abs(target).max()
        own = next((i for i in range(m - 1, -1, -1) if kinds[i] in "ex"), 0)  # x's own column: the edit before the step
        terms = []
        c = target[own] / state[own]
        if c:
            terms.append((0, float(c)))
            target -= c * state
        for i in range(m, width):
            if kinds[i] in "mpn" and target[i]:
                at = {"m": 1, "p": 2, "n": 3}[kinds[i]]
                if any(at == other for other, _ in terms):
                    return None
                terms.append((at, float(target[i])))
                target[i] = 0.0
        return tuple(terms) if terms and np.abs(target).max() <= EXACT * size else None


def _fresh_call(target: Any, name: str, *args: Any) -> Any:
    return getattr(copy.copy(target), name)(*args)


def _second_of(out: Any) -> Tensor | None:
    fields = [f.name for f in dataclasses.fields(out)] if dataclasses.is_dataclass(out) else []
    v = getattr(out, fields[1], None) if len(fields) > 1 else None
    return v if isinstance(v, Tensor) else None


def read(setup: Setup, options: Mapping[str, Any]) -> Reading:
    """The plan of a scheduler from its call number `setup.begin` on.

    Raises: ValueError: it is not a plan; the message says why (see fd.probe).
    """
    watched = _Watched(setup, options)
    threshold = None
    config = getattr(setup.live, "config", {})
    if config.get("thresholding") and float(config.get("sample_max_value", 1.0)) > 1:
        # the clamp in the place of the quantile cuts x0 out of the step; the bound is then each sample's own
        threshold = float(config["dynamic_thresholding_ratio"]), float(config["sample_max_value"])
        watched.change = {"sample_max_value": 1.0}
    watched.__class__ = type("_Watched", (_Watched,), {"__module__": setup.stock.__module__})  # whose globals to lift
    count = setup.calls - setup.begin
    plan = probe(watched, steps=count, edits=True, brownian=setup.path, name=setup.stock.__name__)
    used = [k for k in range(plan.nfe) if plan.s[k].any()]
    last = used[-1] if used else -1
    draws = [int(plan.draws[k]) if k <= last else watched.draws[k] for k in range(plan.nfe)]
    spans = _spans(setup, options, count) if _has_tree(setup) and not setup.path else None
    if spans is not None:
        draws = [1] * plan.nfe  # also where it draws nothing: stock makes its tree in any step
    terms = [t for t in watched.second if t is not None]
    second = terms if len(terms) == len(watched.second) else None
    rows = rows_of(plan)
    if second is not None:  # a step that stays where it is has no use for the clamped x0 it returns
        rows = [r._replace(uses_p=r.uses_p or (r.cut and reads_p(t))) for r, t in zip(rows, second, strict=True)]
    return Reading(
        plan, rows, draws, second, watched.after,
        plan.c_in.tolist(), plan.times.astype(np.float64).tolist(), threshold, _spread(plan),
        spans,
    )  # fmt: skip


def _has_tree(setup: Setup) -> bool:
    return hasattr(setup.live, "noise_sampler")


def _spans(setup: Setup, options: Mapping[str, Any], count: int) -> list[tuple[Any, ...]]:
    """The intervals stock asks its tree for, in stock's own numbers: the tree answers the last digit."""
    found: list[tuple[Any, ...]] = []
    x = torch.zeros(1, 1, dtype=torch.float32, device="cpu")

    def noted(*span: Any) -> Tensor:
        found.append(span)
        return torch.zeros_like(x)

    with LOCK, on_host(), torch.no_grad():
        s = setup.make(lifted=False)
        for t in s.timesteps[setup.begin :][:count]:
            s.noise_sampler = noted
            if hasattr(s, "scale_model_input"):
                s.scale_model_input(x, t)
            before = len(found)
            s.step(x, t, x, **options)
            if len(found) - before > 1:
                raise ValueError(f"{setup.stock.__name__} draws {len(found) - before} times in a step")
            found += [()] * (before + 1 - len(found))
    return found


def _spread(plan: Plan) -> list[tuple[float, float]] | None:
    """exp((f hi + (1 - f) lo) / 2) with f = (v + 1) / 2, as exp(a + b v)."""
    if plan.log_var_lo is None or plan.log_var_hi is None:
        return None
    return [((hi + lo) / 4, (hi - lo) / 4) for lo, hi in zip(plan.log_var_lo, plan.log_var_hi, strict=True)]


class Dialect(NamedTuple):
    """How a class answers tensors of two dtypes: what it returns, and the dtype it draws noise in.

    output: the class of its outputs. pair: does return_dict=False give two entries?
    """

    result: torch.dtype
    second: torch.dtype
    noise: torch.dtype
    output: type
    pair: bool


class _Draws(TorchDispatchMode):
    """Notes the dtype of every normal draw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in NORMALS:
            self.seen.append(out.dtype)
        return out


def dialect_of(setup: Setup, options: Mapping[str, Any], x: Tensor, m: Tensor) -> Dialect:
    """What one stock step says on a tiny sample of these dtypes; torch's random state stays as it was."""
    shape = (1, *x.shape[1:2], *(1 for _ in x.shape[2:]))
    answers = []
    with LOCK, torch.random.fork_rng(devices=[]), on_host(), torch.no_grad(), _Draws() as draws:
        for return_dict in (True, False):
            s = setup.make()
            t = s.timesteps[setup.begin]
            if setup.stock.__name__ in BATCHED_TIME:
                t = t.reshape(1)
            small = torch.full(shape, 0.5, dtype=x.dtype, device="cpu")
            out = torch.full((1, *m.shape[1:2], *shape[2:]), 0.5, dtype=m.dtype, device="cpu")
            if hasattr(s, "scale_model_input"):
                s.scale_model_input(small, t)
            answers.append(s.step(out, t, small, **options, return_dict=return_dict))
    full, plain = answers
    second = _second_of(full)
    y = plain[0]
    noise = draws.seen[0] if draws.seen else m.dtype
    return Dialect(y.dtype, y.dtype if second is None else second.dtype, noise, type(full), len(plain) > 1)


def refusal(stock: type) -> str | None:
    """Why a class cannot be accelerated whatever its configuration, or None."""
    step = getattr(stock, "step", None)
    if step is None or not hasattr(stock, "set_timesteps"):
        return "it has no step and set_timesteps"
    parameters = list(inspect.signature(step).parameters.values())[1:]
    names = [p.name for p in parameters[:3]]
    if names != USUAL and not takes_past(stock):
        return f"its step takes {', '.join(names)}, not {', '.join(USUAL)}"
    options = parameters[leading(stock) - 1 :]
    needed = [p.name for p in options if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,)]
    if needed:
        return f"its step also needs {', '.join(needed)}"
    return None
