"""One sampling run's buffers, and the one thing it does with them: a model evaluation and a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdiff import ops
from fastdiff.cpu import CompiledStep, EagerStep
from fastdiff.noise import CallableNoise, Noise, PhiloxNoise, TorchNoise
from fastdiff.ops._relaunch import Relaunch
from fastdiff.plan import Plan
from fastdiff.readout import BINNED
from fastdiff.request import MODEL_DTYPES, Request

__all__ = ["Run"]

KERNEL_DEVICES = ("cuda",)  # where rows run by the step kernel; elsewhere as numbers that the host knows


class Run:
    """State slab, model input, times, weights and noise of one (plan, shape, device, dtype, guidance).

    advance(k) evaluates the model at row k and updates the state in place; x is slot 0, [B, *] fp32. Plans with another
    readout than an affine map override the methods that say so (fastdiff.categorical).
    """

    input_is_state = True  # may the model see slot 0 itself?
    loop_draws = True  # may the CPU's loop draw a row's noise?
    draws_on_host = True  # does the host draw a row's noise, where rows run on the host?
    output_says = "the shape of its input"

    def __init__(self, model: Callable[..., Any], plan: Plan, request: Request, *, compiled: bool) -> None:
        self.model, self.plan, self.shape, self.device = model, plan, request.state, request.device
        batch = self.shape[0]
        o = request.options
        self.on_host = self.device.type not in KERNEL_DEVICES
        # whose memory the buffers are, and what worked on them last
        self.home = self.used = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self.guided = request.weight is not None
        self.owns_conditions = False
        self.doubled = self.guided and o.batched_guidance
        self.slab = self._buffer((plan.allocate().physical, *self.shape), torch.float32)
        self.x = self.slab[0]
        self.x_pointer = self.x.data_ptr()
        copies = 2 if self.doubled else 1
        same = self.input_is_state and request.dtype == torch.float32 and bool((plan.c_in == 1).all())
        self.aliased = copies == 1 and same
        size = (copies * batch, *self.shape[1:])
        self.model_in = self.x if self.aliased else self._buffer(size, request.dtype)
        self.halves = [] if self.aliased else list(self.model_in.split(batch)) if batch else [self.model_in]
        self.c_in = plan.c_in.tolist()
        times = torch.from_numpy(plan.times.copy())
        times = (times if times.dtype == torch.int64 else times.float()).to(self.device)
        self.times = times
        self.t = list(times[:, None].expand(plan.nfe, size[0]).contiguous().unbind(0))
        rows = torch.arange(plan.nfe, dtype=torch.int32, device=self.device)
        # 16 bytes apart: Triton compiles a kernel for aligned pointers and one for others
        self.rows = [row[:1] for row in torch.nn.functional.pad(rows[:, None], (0, 3)).unbind(0)]
        self.rule = {"rule": o.guide, **(o.guide_options or {})} if o.guide != "cfg" else {}
        self.threshold = o.threshold
        self.conversion = plan.pack(self.device)[:, :2].unbind(1)
        self.first: Tensor | None = None  # two-pass guidance keeps the conditional output here
        self.x0 = self._watched(o.trajectory or o.callback is not None)
        self.cond: dict[str, Any] = {}
        self.uncond: dict[str, Any] = {}
        self.bad = torch.full((), plan.nfe, dtype=torch.int32, device=self.device) if o.check_finite != "off" else None
        self.noise = self._noise(request, compiled)
        self.weight = None if request.weight is None else request.weight.to(self.device, copy=True)
        self.compiled: Any = None  # the loops of this kind of run
        self.w_tensors: list[Tensor] = []
        self.relaunch = Relaunch()
        self.numbered = False  # do kernels get a row's number itself? Where each is launched, or captured, for one row
        self.adjusts = self.on_host and (self.threshold is not None or (self.guided and bool(self.rule)))
        self.expected = torch.Size(self.output_shape())  # of the model's output
        self._prepare(compiled)

    def __del__(self) -> None:
        """Buffers that are freed go to whatever their stream does next, which has to come after another one's work."""
        home, used = getattr(self, "home", None), getattr(self, "used", None)
        if home is not None and used is not None and used != home:
            with contextlib.suppress(Exception):  # at the end of a process
                home.wait_stream(used)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for the state or the model's input."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _watched(self, asked: bool) -> Tensor | None:
        """The buffer of a row's prediction, where someone looks at it."""
        return torch.empty_like(self.x) if asked else None

    def _prepare(self, compiled: bool) -> None:
        """What runs the rows."""
        plan = self.plan
        if self.on_host:
            if self.weight is not None:
                rows = self.weight.expand(plan.nfe, -1)
                self.w_tensors = [w.view(-1, *[1] * (len(self.shape) - 1)) for w in rows]
            slots = list(self.slab.unbind(0))
            self.eager = EagerStep(plan, slots)
            keys = (self.noise.seeds, self.noise.index) if isinstance(self.noise, PhiloxNoise) else None
            self.compiled = CompiledStep(plan, slots, copies=self.halves, keys=keys) if compiled else None
        else:
            self.table = plan.pack(self.device)

    def _noise(self, request: Request, compiled: bool) -> Noise:
        noise, plan = request.options.noise, self.plan
        draws = compiled and self.on_host and self.loop_draws and CompiledStep.usable(len(self.slab))
        self.noise_in_kernel = noise == "philox" and (draws or not (self.on_host and self.draws_on_host))
        if noise == "torch":
            return TorchNoise(plan, self.x, request.generators)
        philox = PhiloxNoise(plan, self.x, compiled=compiled, in_kernel=noise != "philox" or self.noise_in_kernel)
        return CallableNoise(plan, self.x, noise, philox) if callable(noise) else philox

    def bind(self, model: Callable[..., Any], cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None) -> None:
        """The model and its keyword arguments for this run; tensors a graph has captured are filled, not replaced."""
        self.model = model
        cond = dict(cond or {})
        uncond = {**cond, **(uncond or {})}
        if self.doubled:
            if set(uncond) - set(cond):
                raise ValueError(f"cond lacks {sorted(set(uncond) - set(cond))}, which uncond has")
            cond = {name: _joined(name, uncond[name], value, self.shape[0]) for name, value in cond.items()}
        for mine, new in ((self.cond, cond), (self.uncond, uncond)):
            for name in mine.keys() - new.keys():
                del mine[name]
            for name, value in new.items():
                if self.owns_conditions:
                    for old, given in zip(tree_leaves(mine[name]), tree_leaves(value), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(given)
                else:
                    mine[name] = value

    def own_conditions(self) -> None:
        """Before a capture: the graph reads buffers of its own, which later calls fill (never the caller's tensors).

        All are on the device: a number that a kernel takes from the host would stay what it was.
        """
        self.owns_conditions = True
        for mine in (self.cond, self.uncond):
            mine.update(tree_map_only(Tensor, lambda v: v.to(self.device, copy=True), dict(mine)))

    def release_conditions(self, request: Request) -> None:
        """Where no graph reads them after all: the caller's own again."""
        self.owns_conditions = False
        self.bind(self.model, request.options.cond, request.options.uncond)

    def start(self, request: Request) -> None:
        """Before the first row: what the host knows of the request, and the start."""
        self.prepare(request)
        self.draw(request.options.x_T, request.options.x_init)

    def prepare(self, request: Request) -> None:
        """Takes over the request's keys, generators and weights."""
        philox = self.noise.philox if isinstance(self.noise, CallableNoise) else self.noise
        if isinstance(philox, PhiloxNoise):
            if request.seeded is None:
                philox.reset(*request.keys())
            else:
                philox.seed(*request.seeded)
        if isinstance(self.noise, TorchNoise):
            self.noise.generators = request.generators
        if isinstance(self.noise, CallableNoise):
            self.noise.function = request.options.noise  # type: ignore[assignment]
        if self.weight is not None and request.weight is not None:
            self.weight.copy_(request.weight)
            if self.on_host:
                self.w_eager = [float(w) if w.numel() == 1 else w for w in self.w_tensors]

    def draw(self, x_T: Tensor | None, x_init: Tensor | None) -> None:
        """Writes the start, given or drawn, into slot 0 and the model's first input."""
        plan = self.plan
        if x_T is not None:
            self.x.copy_(x_T)
        else:
            if plan.init_scale:
                self.noise.begin(self.x, plan.init_scale)
            else:
                self.x.zero_()
            if x_init is not None:
                self._add_data(x_init, float(plan.alpha[0]))
            if plan.init_noise and not (x_init is not None and plan.readout in BINNED):  # a bin in the data's place
                self.x.add_(self._second(self.noise.start(1)), alpha=plan.init_noise)
        if self.bad is not None:
            self.bad.fill_(plan.nfe)
        self.refresh(0)

    def _second(self, n: Tensor) -> Tensor:
        """What init_noise scales."""
        return n

    def _add_data(self, x_init: Tensor, alpha: float) -> None:
        """x += alpha x_init."""
        self.x.add_(x_init, alpha=alpha)

    def outside(self) -> bool:
        """Does the host draw something in every row, whatever runs the rows?"""
        return not self.noise_in_kernel and bool(self.plan.draws.any())

    def captured(self, k: int) -> bool:
        """Is row k what a graph of one row does?"""
        return True

    def result(self, dtype: torch.dtype) -> Tensor:
        """The samples."""
        return self.x.to(dtype, copy=True)

    def idle(self, k: int) -> bool:
        """Has row k nothing to do? Then its model is not called."""
        return False

    def failed(self) -> int:
        """The first row whose state or model output was not finite, or nfe; of a run that watches them."""
        assert self.bad is not None
        return int(self.bad)

    def edited(self, k: int) -> None:
        """After an edit of x by a callback, before row k."""
        self.refresh(k)

    def refresh(self, k: int) -> None:
        """Writes the input of row k's model from the state (after the start, or an edit of x)."""
        c = self.c_in[k] if k < self.plan.nfe else 1.0
        for half in self.halves:
            if c == 1.0:
                half.copy_(self.x)
            elif half.dtype == torch.float32:
                torch.mul(self.x, c, out=half)
            else:
                half.copy_(self.x * c)

    def evaluate(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's output(s) at the current state: (m, None) or (cond, uncond)."""
        version = self.model_in._version + t._version
        m = self.model(self.model_in, t, **self.cond)
        self._check(m)
        u = None
        if self.doubled:
            u, m = m.split(self.shape[0])
        elif self.guided:
            if self.first is None or self.first.dtype != m.dtype:
                self.first = torch.empty(m.shape, dtype=m.dtype, device=self.device)
            m = self.first.copy_(m)  # the second call may reuse the first one's memory
            u = self.model(self.model_in, t, **self.uncond)
            self._check(u)
        if self.model_in._version + t._version != version:
            for mine, time in zip(self.t, self.plan.times.tolist(), strict=True):
                mine.fill_(time)
            raise ValueError("the model changed its input x or t in place; both are the sampler's: let it copy them")
        return m, u

    def output_shape(self) -> tuple[int, ...]:
        """What the model must return."""
        return self.model_in.shape

    def _check(self, m: object) -> None:
        if not isinstance(m, Tensor):
            raise TypeError(
                f"the model must return a Tensor, got {type(m).__name__}; wrap it: lambda x, t: model(x, t)[0], say"
            )
        if m.shape != self.expected:
            raise ValueError(f"the model must return {self.output_says}, {tuple(self.expected)}, got {tuple(m.shape)}")
        if m.dtype not in MODEL_DTYPES:
            raise TypeError(f"the model must return float32, bfloat16 or float16, got {m.dtype}")
        if m.device != self.device:
            raise ValueError(f"the model must return a tensor on {self.device}, got {m.device}")

    def step(self, k: int, row: Tensor, m: Tensor, u: Tensor | None, noise: Tensor | None) -> None:
        """Runs row k (on CUDA: the row whose index the device tensor `row` holds)."""
        if not m.is_contiguous():
            m = m.contiguous()
        if u is not None and not u.is_contiguous():
            u = u.contiguous()
        if m.data_ptr() == self.x_pointer:
            m = m.clone()  # a model that returns its input: the step would overwrite what it still reads
        bound = None
        if self.adjusts:
            m, u, bound = self.adjust(k, row, m, u)
        if not self.on_host:
            reduced = self.reduce(row, m, u)
            changing = (m, u, row, noise, *reduced.values())
            if self.numbered:
                self._launch(k, m, u, noise, reduced)
            else:
                self.relaunch("fastdiff::affine_step", lambda: self._launch(row, m, u, noise, reduced), changing)
        elif (
            bound is not None
            or self.compiled is None
            or not self.compiled(k, m, u, self.w_tensors[k] if self.guided else None, noise, self.x0)
        ):
            self.eager(k, m, u, self.w_eager[k] if self.guided else None, noise, self.x0, bound)
            self.refresh(k + 1)
            if self.compiled is not None:
                self.compiled.bind()  # the eager step may have traded slots
        if self.bad is not None:
            self.watch(row, m)

    def _launch(
        self, row: Tensor | int, m: Tensor, u: Tensor | None, noise: Tensor | None, reduced: dict[str, Any]
    ) -> None:
        seeded = self.noise if self.noise_in_kernel and self.plan.stochastic else None
        ops.affine_step(
            self.slab, m, self.table, row, slots=self.plan.slots, uncond=u, **reduced,
            seeds=seeded.seeds if seeded else None, index=seeded.index if seeded else None,  # type: ignore[attr-defined]
            noise=noise, model_in=None if self.aliased else self.model_in, x0=self.x0,
        )  # fmt: skip

    def watch(self, row: Tensor, m: Tensor) -> None:
        """Keeps the first row whose state or model output is not finite."""
        assert self.bad is not None
        finite = torch.isfinite(self.x).all() & self._finite(m)
        self.bad.copy_(torch.minimum(self.bad, torch.where(finite, self.plan.nfe, row[0])))

    def _finite(self, m: Tensor) -> Tensor:
        return torch.isfinite(m).all()

    def advance(self, k: int) -> None:
        """Row k: one model evaluation (two with two-pass guidance) and one step."""
        if self.idle(k):
            return
        m, u = self.evaluate(self.t[k])
        self.step(k, self.rows[k], m, u, self.noise.row(k))

    def reduce(self, row: Tensor, m: Tensor, u: Tensor | None) -> dict[str, Any]:
        """What the step kernel takes beside the outputs: a weight, or a rule's and a threshold's numbers a sample."""
        weight = None if u is None else self.weight
        scales = bound = None
        if u is not None and weight is not None and self.rule:
            scales, weight = ops.guidance_scales(m, u, weight, row=row, **self.rule), None
        if self.threshold is not None:
            bound = ops.threshold_bound(
                self.x, *self.threshold, model_out=m, table=self.table, row=row, uncond=u, guidance=weight,
                scales=scales,
            )  # fmt: skip
        return {"guidance": weight, "scales": scales, "bound": bound}

    def adjust(self, k: int, row: Tensor, m: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same before a step on the host. Thresholding replaces x0-hat: m' = (threshold(x0) - c_skip x) / c_out;
        where c_out is 0 no m' does, and the step is handed the bound."""
        if u is not None and self.weight is not None and (self.rule or self.threshold is not None):
            w = self.weight[0] if self.weight.shape[0] == 1 else self.weight.index_select(0, row)[0]
            m, u = ops.guide(m, u, w.expand(self.shape[0]), **self.rule), None
        if self.threshold is not None:
            c_skip, c_ratio = (c.index_select(0, row) for c in self.conversion)
            if self.plan.c_out[k] == 0:
                return m, u, ops.threshold_bound(c_skip * self.x, *self.threshold)
            p = ops.threshold(c_skip * (self.x + c_ratio * m.float()), *self.threshold)
            m = (p - c_skip * self.x) / (c_skip * c_ratio)
        return m, u, None


def _joined(name: str, uncond: Any, cond: Any, batch: int) -> Any:  # noqa: ANN401 - any model argument
    """[uncond; cond] of one model argument, which may be a dictionary or a sequence of such."""
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        both = {key: _joined(f"{name}.{key}", uncond[key], value, batch) for key, value in cond.items()}
        if type(cond) is dict or not isinstance(cond, dict):
            return both
        with contextlib.suppress(TypeError):  # a model's output, say, whose entries are attributes too
            return type(cond)(**both)
    if type(cond) in (list, tuple) and type(uncond) is type(cond) and len(cond) == len(uncond):
        pairs = enumerate(zip(uncond, cond, strict=True))
        return type(cond)(_joined(f"{name}.{i}", u, c, batch) for i, (u, c) in pairs)
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond is uncond and cond.shape == (1,) != (batch,):
            return cond  # a number for all
        if cond.ndim and uncond.ndim and cond.shape[1:] == uncond.shape[1:]:
            sizes = [batch if v.shape[0] == 1 else v.shape[0] for v in (uncond, cond)]
            if sizes == [batch, batch]:
                return torch.cat([v.expand(batch, *v.shape[1:]) for v in (uncond, cond)])
        if cond is uncond or (cond.shape == uncond.shape and torch.equal(cond, uncond)):
            return cond
    elif not isinstance(cond, Tensor) and not isinstance(uncond, Tensor) and _same(cond, uncond):
        return cond
    raise ValueError(
        f"cond[{name!r}] and uncond[{name!r}] cannot be joined into one batch of 2 x {batch}; "
        "give tensors [B, ...] of one shape, or batched_guidance=False for two calls a row"
    )


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401 - any model argument
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # an array, or an object that holds tensors
        return False
