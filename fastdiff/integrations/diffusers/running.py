"""One loop of an accelerated scheduler: which row a call is, what it draws, what it returns."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.integrations.diffusers.cached import Unsupported, cached_dialect, reading_of
from fastdiff.integrations.diffusers.outputs import Second, lazy_output, lazy_tuple
from fastdiff.integrations.diffusers.reading import Setup
from fastdiff.integrations.diffusers.timesteps import near, pointer, stranger, value_of, viewed
from fastdiff.integrations.rows import History
from fastdiff.noise import PhiloxNoise
from fastdiff.ops import _dispatch
from fastdiff.transforms import untraced

__all__ = ["Run"]

PASSING = frozenset(("generator", "return_dict", "variance_noise"))  # of step, not part of its configuration
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = 1 << 62  # of Philox's seeds here


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
        self.index: int | None = getattr(setup.live, "_step_index", None)  # as this loop last left it
        self.history = History(self.reading.plan.allocate().physical - 1)
        self.shape: torch.Size | None = None
        self.signature: Any = None
        self.pointer = pointer(timesteps)
        self.itemsize = timesteps.element_size() * (timesteps.stride(0) if timesteps.dim() else 1)
        self.values: np.ndarray | None = None
        self.philox: PhiloxNoise | None = None
        self.slab: Tensor | None = None  # the history on a device

    def clone(self) -> Run:
        """The same loop at the same place, with a history of its own."""
        new = object.__new__(Run)
        new.__dict__.update(vars(self))
        new.history = self.history.clone()
        new.slab = None if self.slab is None else self.slab.clone()
        return new

    @property
    def remembers(self) -> bool:
        """Is it in the middle, and would what it goes on with be lost?"""
        return self.started and self.next < self.count and not self.reading.memoryless

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

    def locate(self, timestep: Any) -> int:
        """The row of a call whose timestep is not the expected one."""
        at = viewed(timestep, self.timesteps)
        if at is None:
            if self.values is None:
                self.values = self.timesteps.detach().cpu().double().numpy()
            if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and not self.addressed:
                return self.next  # reading it would stall the device, and stock does not look at it either
            value = value_of(timestep)
            if self.next < self.count and bool(near(self.values[self.base + self.next], value)):
                return self.next
            found = np.flatnonzero(near(self.values, value))
            if not len(found):
                raise ValueError(stranger(value, self.timesteps))
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

    def moved(self, owner: Any) -> bool:
        """Was step_index changed by hand?"""
        return getattr(owner, "_step_index", None) != self.index

    def jump(self, index: int) -> bool:
        """Goes on at that step_index; False where this loop has no such row."""
        inside = self.base <= index < self.base + self.count
        if inside:
            self.next, self.index = index - self.base, index
        return inside

    def scale(self, owner: Any, sample: Tensor, timestep: Any) -> Tensor:
        """The model's input."""
        k = self.row_of(timestep)
        if hasattr(owner, "_step_index") and owner._step_index is None:
            owner._step_index = self.index = self.base + k  # as stock, for those who look up their sigma
        c = self.reading.c_in[k]
        return sample if c == 1.0 else sample * c

    @untraced
    def adopt(self, x: Tensor, m: Tensor) -> None:
        """Checks the tensors of a first call, and learns how stock would answer their dtypes."""
        for name, v in (("sample", x), ("model_output", m)):
            if not isinstance(v, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(v).__name__}")
            if v.dtype not in FLOATS:
                raise TypeError(f"{name} must be floating point, got {v.dtype}")
        if x.device != m.device:
            raise ValueError(f"sample is on {x.device}, model_output on {m.device}; they must be on one device")
        doubled = x.dim() > 1 and m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if doubled != (self.reading.spread is not None) and (doubled or m.shape == x.shape):
            raise Unsupported("the model's output and variance_type do not agree on a learned variance")
        if m.shape != x.shape and not doubled:
            raise ValueError(f"model_output has shape {tuple(m.shape)}, sample {tuple(x.shape)}; they must be the same")
        if self.started and not self.reading.memoryless and self.shape is not None and x.shape != self.shape:
            raise ValueError(f"the sample changed its shape from {tuple(self.shape)} to {tuple(x.shape)} in a loop")
        dialect = cached_dialect(self.setup, self.options, x, m)
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
        # one kernel a step on CUDA; what it does not know takes the same rows through torch
        self.kernel = _dispatch.kernels_for(x) and not (wide or self.threshold or self.reading.spread)
        if self.kernel:
            places = self.reading.plan.allocate().physical - 1
            if places and (self.slab is None or self.slab.shape[1:] != x.shape):
                self.slab = torch.empty(places, *x.shape, dtype=torch.float32, device=x.device)
            self.table = self.reading.plan.pack(x.device)
        self.x_dtype, self.m_dtype, self.device, self.shape = x.dtype, m.dtype, x.device, x.shape
        self.m_shape = m.shape

    def step(self, owner: Any, m: Tensor, timestep: Any, x: Tensor, kwargs: dict[str, Any], kept: Any) -> Any:
        """One call of step."""
        k = self.row_of(timestep)
        if (
            self.shape is None
            or not isinstance(x, Tensor)
            or x.shape != self.shape
            or m.shape != self.m_shape
            or x.dtype is not self.x_dtype
            or m.dtype is not self.m_dtype
            or x.device != self.device
            or m.device != self.device
        ):
            self.adopt(x, m)
        row, reading, dialect = self.rows[k], self.reading, self.dialect
        compute = self.compute
        graded = torch.is_grad_enabled() and (x.requires_grad or m.requires_grad)
        if self.kernel and graded:
            self.unload()
        if self.kernel:
            return self.launch(owner, k, m, x, kwargs, kept)
        v = None
        if reading.spread is not None:
            m, v = m.chunk(2, dim=1)
        x_in, m_in = x, m
        if self.x_dtype is not compute:
            x_in = x.to(compute)
        if self.m_dtype is not compute:
            m_in = m.to(compute)
        n = None
        if reading.draws[k]:
            n = self.noise(owner, k, m, x, kwargs, kept)
            if n is not None and n.dtype is not compute:
                n = n.to(compute)
            if v is not None and n is not None:
                a, b = reading.spread[k]  # type: ignore[index]
                n = n * v.to(compute).mul(b).add_(a).exp_()
        y, p = self.history.step(row, x_in, m_in, n, graded=graded, threshold=self.threshold)
        given = y
        if dialect.result is not compute:
            given = y.to(dialect.result)
        later = None
        if self.second is not None:
            later = Second(row, self.second[k], x_in, m_in, p, n, given, dialect.second)
            if graded or later.versions is None:
                later.get()
        return self.answer(owner, k, given, later, kwargs)

    def launch(self, owner: Any, k: int, m: Tensor, x: Tensor, kwargs: dict[str, Any], kept: Any) -> Any:
        """One call of step as one kernel."""
        row, dialect, plan = self.rows[k], self.dialect, self.reading.plan
        source: dict[str, Any] = {}
        n = None
        if self.reading.draws[k]:
            if kept.noise == "philox" and kwargs.get("variance_noise") is None:
                philox = self._philox(m, kwargs.get("generator"), kept)
                source = {"seeds": philox.seeds, "index": philox.index} if row.noisy else {}
            else:
                n = self.noise(owner, k, m, x, kwargs, kept)
                source = {"noise": n} if row.noisy else {}
        terms = () if self.second is None else self.second[k]
        p = (
            torch.empty(x.shape, dtype=torch.float32, device=x.device)
            if row.cut and any(at == 2 for at, _ in terms)
            else None
        )
        y = ops.outer_step(
            x, m, self.table, k, slots=plan.slots, slab=self.slab, x0=p, out_dtype=dialect.result, **source
        )  # fmt: skip
        later = None
        if self.second is not None:
            x_in, m_in = (v if v.dtype is torch.float32 else v.float() for v in (x, m))
            if any(at == 3 for at, _ in terms) and n is None and source:
                n = rng.normal(philox.seeds, x.shape[1:], row=k, stream=rng.ROWS, index=philox.index)
            later = Second(row, terms, x_in, m_in, p, n, y, dialect.second)
            if later.versions is None:
                later.get()
        return self.answer(owner, k, y, later, kwargs)

    def unload(self) -> None:
        """From the kernel to the host's rows, which autograd understands, for the rest of the loop."""
        self.kernel = False
        self.philox = None  # the kernel drew for itself
        if self.slab is not None:
            self.history.slots = list(self.slab.clone().unbind(0))

    def answer(self, owner: Any, k: int, given: Tensor, later: Second | None, kwargs: dict[str, Any]) -> Any:
        """Moves on, and wraps what a step returns."""
        dialect = self.dialect
        self.next = k + 1
        self.started = True
        after = self.reading.after[k]
        if after is not None:
            owner._step_index = self.index = after
        if kwargs.get("return_dict", True):
            if self.make is not None:
                return self.make(given, later)
            return _single(dialect.output, given)
        if dialect.pair and later is not None:
            return lazy_tuple(given, later)
        return (given,)

    def noise(self, owner: Any, k: int, m: Tensor, x: Tensor, kwargs: dict[str, Any], kept: Any) -> Tensor | None:
        """Row k's normals: given ones, Philox's, those of stock's tree, or torch's in the draw order of stock."""
        generator, given = kwargs.get("generator"), kwargs.get("variance_noise")
        if given is not None:
            if generator is not None and "DDIM" in self.setup.stock.__name__:
                raise ValueError("give a generator or variance_noise, not both")
            return given.to(m.device)
        if kept.noise == "philox":
            return self._philox(m, generator, kept).row(k)
        if self.reading.spans is not None:
            return self._of_tree(owner, k, m, x, generator)
        n = None
        for _ in range(self.reading.draws[k]):
            n = _normal(m.shape, generator, m.device, self.dialect.noise)
        return n

    def _of_tree(self, owner: Any, k: int, m: Tensor, x: Tensor, generator: Any) -> Tensor | None:
        """What stock's Brownian tree answers; a stock step on a copy makes the tree where there is none."""
        span = self.reading.spans[k]  # type: ignore[index]
        if owner.noise_sampler is None:
            made = self.setup.make(lifted=False)
            seeded = {"generator": generator} if "generator" in type(owner)._step_defaults else {}
            with torch.no_grad():
                made.step(m.detach(), made.timesteps[self.setup.begin], x.detach(), **self.options, **seeded)
            owner.noise_sampler = made.noise_sampler
        return owner.noise_sampler(*span).to(m.device) if self.rows[k].noisy else None

    def _philox(self, m: Tensor, generator: Any, kept: Any) -> PhiloxNoise:
        if self.philox is None or self.philox.shape != m.shape:
            plan, on_host = self.reading.plan, m.device.type == "cpu"
            key = (plan, m.shape, m.device, self.kernel)
            if key not in kept.sources:
                like = torch.empty(m.shape, dtype=torch.float32, device=m.device)
                kept.sources.clear()
                compiled = kept.compiled and on_host
                kept.sources[key] = PhiloxNoise(plan, like, compiled=compiled, in_kernel=self.kernel)
            self.philox = kept.sources[key]
            batch = m.shape[0]
            index = torch.arange(batch, device="cpu")
            if isinstance(generator, Sequence):
                if len(generator) != batch:
                    raise ValueError(f"generator must be one or {batch} (one a sample), got {len(generator)}")
                seeds = torch.tensor([g.initial_seed() % LARGEST for g in generator], device="cpu")
                index = torch.zeros(batch, dtype=torch.int64, device="cpu")
            else:
                seed = kept.seed if generator is None else generator.initial_seed() % LARGEST
                seeds = torch.full((batch,), seed, device="cpu")
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
