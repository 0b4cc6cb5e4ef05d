"""sample and Sampler: one loop over the rows of a plan."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastdiff import graph as graphs
from fastdiff import run as runs
from fastdiff.caller import warn
from fastdiff.categorical import make_run
from fastdiff.noise import NoiseFunction
from fastdiff.plan import Plan
from fastdiff.readout import ORDERS
from fastdiff.request import Callback, Options, Request, resolve
from fastdiff.run import Run
from fastdiff.transforms import untraced

__all__ = ["Sampler", "Trajectory", "sample"]

CACHED_RUNS = 4


class Trajectory(NamedTuple):
    """What a run went through: x [nfe + 1, B, *] fp32 (the start first), x0 [nfe, B, *] fp32, t [nfe] schedule time.

    Of a plan of classes: x the logits [nfe + 1, B, *D, K], x0 the classes [nfe, B, *D] int64; of masked tokens both are
    the tokens.
    """

    x: Tensor
    x0: Tensor
    t: Tensor


class _Prepared(NamedTuple):
    run: Run
    graph: graphs.StepGraph | graphs.LoopGraph | None


class Sampler:
    """A model and a plan, with the buffers, compiled loops and captured graphs that sampling them again can reuse.

    Args:
        model: model(x, t, **cond) -> Tensor of x's shape. x [B, *] and t [B] are the sampler's own buffers: do not keep
            or change them. t is float32 or int64 (plan.times).
        plan: from fastdiff.solvers. mode: see fd.sample; "auto" may capture a CUDA graph here, and keeps it if a
            measurement after warm-up shows it to be faster.
        options: any option of fd.sample, as a default for every call.

    Threads may share one: they wait for each other, since the buffers are one set. A copy, and what is pickled, has the
    model, the plan and the options, and makes its own buffers.
    """

    def __init__(self, model: Callable[..., Any], plan: Plan, *, mode: str = "auto", **options: Any) -> None:  # noqa: ANN401
        self.model, self.plan = model, plan
        self.options = Options().but(mode=mode, **options)
        self._one_shot = False
        self._begin()

    def _begin(self) -> None:
        self._runs: OrderedDict[tuple[Any, ...], _Prepared] = OrderedDict()
        self._compiled_model: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # what was compiled, and that
        self._lock = threading.Lock()
        self._thread: int | None = None  # that samples
        self._stream: torch.cuda.Stream | None = None  # of the last call

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "plan", "options", "_one_shot")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @overload
    def __call__(
        self, shape: Sequence[int], *, trajectory: Literal[True], **options: Any
    ) -> tuple[Tensor, Trajectory]: ...

    @overload
    def __call__(self, shape: Sequence[int], *, trajectory: Literal[False] = ..., **options: Any) -> Tensor: ...

    @untraced
    def __call__(self, shape: Sequence[int], **options: Any) -> Tensor | tuple[Tensor, Trajectory]:
        """Samples of the given shape (B, ...); options override the Sampler's own. See fd.sample."""
        o = self.options.but(**options)
        request = resolve(self.model, self.plan, shape, o)
        if 0 in request.shape:
            return self._empty(request)
        me = threading.get_ident()
        if self._thread == me:
            raise RuntimeError("a Sampler was called by its own model or callback: give that a Sampler of its own")
        with self._lock:
            self._thread = me
            try:  # entering a mode takes longer than a row
                if torch.is_inference_mode_enabled():  # leaving it turns gradients on
                    with torch.inference_mode(False), torch.no_grad():
                        return self._loop(request)
                if torch.is_grad_enabled():
                    with torch.no_grad():
                        return self._loop(request)
                return self._loop(request)
            finally:
                self._thread = None

    def _loop(self, request: Request) -> Tensor | tuple[Tensor, Trajectory]:
        if request.device.type == "cuda":
            self._follow(torch.cuda.current_stream(request.device))
        run, graph = self._prepared(request)
        run.used = self._stream
        o, plan = request.options, self.plan
        way = run if graph is None else graph
        way.start(request)
        advance = way.advance
        kept = _allocate(run, plan) if o.trajectory else None
        if kept is not None:
            kept.x[0].copy_(run.x)
        for k in _rows(plan.nfe, o.progress):
            advance(k)
            if run.x0 is not None:
                if kept is not None:
                    kept.x0[k].copy_(run.x0)
                if o.callback is not None:
                    _edit(run, o.callback, k)
                if kept is not None:
                    kept.x[k + 1].copy_(run.x)
        if run.bad is not None:
            _report(run.failed(), plan, o.check_finite)
        x = run.result(request.out_dtype)
        return (x, kept) if kept is not None else x

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """What the call before left to do on another stream comes first: the buffers are one set."""
        if self._stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():  # that cannot wait
            stream.wait_stream(self._stream)
        self._stream = stream

    def _empty(self, request: Request) -> Tensor | tuple[Tensor, Trajectory]:
        x = torch.empty(request.shape, device=request.device, dtype=request.out_dtype)
        if not request.options.trajectory:
            return x
        n = self.plan.nfe
        kept = torch.int64 if self.plan.readout in ORDERS else torch.float32
        states = torch.empty(n + 1, *request.state, dtype=kept, device=request.device)
        x0 = torch.empty(
            n, *request.shape, dtype=torch.float32 if x.is_floating_point() else x.dtype, device=request.device
        )
        return x, Trajectory(states, x0, torch.from_numpy(self.plan.t.copy()))

    def _prepared(self, request: Request) -> _Prepared:
        o, model = request.options, self._model(request.options.mode)
        on_host = request.device.type not in runs.KERNEL_DEVICES
        key = (self.plan, None if on_host else id(model), *_signature(request))  # a graph has captured the model
        prepared = self._runs.get(key)
        if prepared is not None:
            self._runs.move_to_end(key)
            prepared.run.bind(model, o.cond, o.uncond)
            return prepared
        loops = on_host and request.device.type == "cpu" and o.mode in ("auto", "compile")
        run = make_run(model, self.plan, request, compiled=loops)
        run.bind(model, o.cond, o.uncond)
        graph = None if self._one_shot and o.mode == "auto" else graphs.build(run, request)
        self._runs[key] = _Prepared(run, graph)
        while len(self._runs) > CACHED_RUNS:
            self._runs.popitem(last=False)
        return self._runs[key]

    def _model(self, mode: str) -> Callable[..., Any]:
        if mode != "compile":
            return self.model
        if self._compiled_model is None or self._compiled_model[0] is not self.model:
            self._compiled_model = self.model, torch.compile(self.model, dynamic=False)
        return self._compiled_model[1]


def _signature(request: Request) -> tuple[Any, ...]:
    """What buffers, compiled loops and graphs depend on, beside the plan and a graph's model."""
    o = request.options
    weight = None if request.weight is None else (o.batched_guidance, request.weight.shape)
    noise = o.noise if isinstance(o.noise, str) else "callable"
    cond: list[Any] = []
    if request.device.type in runs.KERNEL_DEVICES:
        for values in (o.cond, o.uncond):
            leaves, structure = tree_flatten(dict(values)) if values else ((), None)
            cond.append((str(structure), *map(_key, leaves)))
        cond.append(torch.is_autocast_enabled(request.device.type) and torch.get_autocast_dtype(request.device.type))
    generator = request.generators[0].device if request.generators else None
    rule = (o.guide, tuple((o.guide_options or {}).items()), o.threshold)
    watched = (o.trajectory or o.callback is not None, o.check_finite != "off")
    return (request.shape, request.device, request.dtype, weight, noise, generator, o.mode, watched, rule, tuple(cond))


def _key(value: object) -> object:
    """What a graph depends on: of a tensor all but its numbers, of another value itself, or its identity."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value  # 1, 1.0 and True are equal


def _rows(count: int, progress: bool) -> Any:  # noqa: ANN401 - an iterable of int
    if not progress:
        return range(count)
    from tqdm.auto import tqdm

    return tqdm(range(count), desc="sampling", unit="row")


def _allocate(run: Run, plan: Plan) -> Trajectory:
    assert run.x0 is not None
    x = torch.empty(plan.nfe + 1, *run.shape, dtype=run.x.dtype, device=run.device)
    x0 = torch.empty(plan.nfe, *run.x0.shape, dtype=run.x0.dtype, device=run.device)
    return Trajectory(x, x0, torch.from_numpy(plan.t.copy()))


def _edit(run: Run, callback: Callback, k: int) -> None:
    t = run.t[k][: len(run.x)].clone()  # the model's own is twice as long in batched guidance
    new = callback(k, t, run.x, run.x0)  # type: ignore[arg-type]
    if new is not None:
        if not isinstance(new, Tensor):
            raise TypeError(f"callback must return None or a Tensor, got {type(new).__name__}")
        if new.shape != run.shape:
            raise ValueError(f"callback must return a state of shape {tuple(run.shape)}, got {tuple(new.shape)}")
        if new.is_floating_point() != run.x.is_floating_point():
            raise TypeError(f"callback must return a state of dtype {run.x.dtype}, got {new.dtype}")
        run.x.copy_(new)
    run.edited(k + 1)


def _report(bad: int, plan: Plan, check_finite: str) -> None:
    if bad >= plan.nfe:
        return
    message = (
        f"the model's output or the state is not finite, first at row {bad} of {plan.nfe} "
        f"(t = {plan.times[bad]:g}) of {plan.name}"
    )
    if check_finite == "raise":
        raise ValueError(message)
    warn(message)


@overload
def sample(
    model: Callable[..., Any], plan: Plan, shape: Sequence[int], *, trajectory: Literal[True], **options: Any
) -> tuple[Tensor, Trajectory]: ...


@overload
def sample(
    model: Callable[..., Any], plan: Plan, shape: Sequence[int], *, trajectory: Literal[False] = ..., **options: Any
) -> Tensor: ...


@untraced  # type: ignore[misc]  # the overloads say what trajectory changes
def sample(
    model: Callable[..., Any],
    plan: Plan,
    shape: Sequence[int],
    *,
    seed: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    first: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: str | NoiseFunction = "philox",
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance: float | Sequence[float] | np.ndarray | Tensor | None = None,
    batched_guidance: bool = True,
    guide: str = "cfg",
    guide_options: Mapping[str, Any] | None = None,
    threshold: tuple[float, float] | None = None,
    x_T: Tensor | None = None,
    x_init: Tensor | None = None,
    mode: str = "auto",
    callback: Callback | None = None,
    trajectory: bool = False,
    progress: bool = False,
    check_finite: str = "off",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Trajectory]:
    """Samples from a model by a plan.

        x = start;  for each row: m = model(c_in x, t, **cond); x = row(x, m, n)

    Args:
        model: model(x, t, **cond) -> Tensor of x's shape, t [B] float32 or int64.
        plan: fastdiff.Plan. shape: (B, ...).
        seed: the samples are (seed, first), (seed, first + 1), ..., default 0; or seeds: [B], samples (seeds[i], 0).
        noise: "philox" (the same sample whatever the batch, device or mode), "torch" (generator's own stream; a
            generator or a list of B), or a function (row, like) -> Tensor called plan.draws[row] times a row.
        cond, uncond, guidance: m = uncond + w (cond - uncond); w a number, (B,), (nfe, 1) or (nfe, B); 1 is none. What
            uncond does not name is cond's. The model is called once on [uncond; cond], in which tensors of B (or 1)
            rows are joined and others shared, or twice with batched_guidance=False.
        guide, guide_options: the rule that combines them (cfg, rescale, apg, zero_star) and its own: fd.ops.guide.
        threshold: (quantile, maximum), dynamic thresholding of x0-hat: fd.ops.threshold.
        x_T: the starting state itself. x_init: clean data, noised to the plan's start (plans made with start=k).
        mode: auto | eager | compile (the model through torch.compile) | step_graph | loop_graph (CUDA). On a CPU all
            but eager run rows as C++ loops. auto captures no graph in this one-shot call; a fd.Sampler may.
        callback: (row, t, x, x0) -> None or a replacement of x, after each row; x may be edited in place. Both are
            buffers that the next row writes: clone what you keep.
        trajectory: also return a Trajectory. check_finite: off | warn | raise (read once, at the end).
        device, dtype (of the model's input): default those of the model's parameters, else torch's default device and
            float32; rows are kernels on CUDA, plain torch on devices other than that and the CPU. out_dtype: default
            float32.
    Plans of classes (fd.solvers.bfn_discrete, bfn_solver): shape is (B, *D), the result int64 classes [B, *D]. The
        model sees 2 theta - 1, [B, *D, K] (a view with padded rows: reshape, do not view), and returns logits of that
        shape; for K = 2 both are [B, *D, 1], 2 P(class 1) - 1 and the logit of class 1. x_T is the logits, x_init
        classes; callbacks get (row, t, logits, classes); guidance acts on the logits.
    Plans of masked tokens (fd.solvers.unmask): shape is (B, *D), the result int64 [B, *D]. The model sees ids, the
        plan's mask where masked, and returns logits [B, *D, K]. x_T is ids: what is not masked there is given, and
        stays; x_init is classes, masked as the first row expects; callbacks get (row, t, tokens, tokens). With a
        threshold the model is not called in rows that find nothing masked.
    Returns: x [B, *] of out_dtype, or (x, Trajectory).
    Raises: TypeError / ValueError for anything else, before the first model call.
    Numerics: fp32 state; bit-equal for any batch with an elementwise model; modes and devices agree to 1e-5 relative.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "plan", "shape")}
    sampler = Sampler(model, plan, **given)
    sampler._one_shot = True
    return sampler(shape)
