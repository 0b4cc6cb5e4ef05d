"""CUDA graphs of a run: one row replayed N times, or the whole trajectory as one graph."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdiff import ops, rng
from fastdiff.caller import warn
from fastdiff.noise import Noise
from fastdiff.request import GRAPH_DEVICES, Request
from fastdiff.run import Run

__all__ = ["CaptureError", "LoopGraph", "StepGraph", "build", "record"]

WARM_UPS = 3
MUST_WIN = 1.03
TIMED_ROWS = 8
TOLERANCE = 1e-5
DEEPEST = 8  # fields of fields of a condition that are looked at
AS_THE_MODEL = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType)


class CaptureError(RuntimeError):
    """A model or step that cannot be captured into a CUDA graph, or whose replay differs from the eager run."""


def _capture(body: Callable[[], None], rewind: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Warms `body` up on a side stream, each time after `rewind`, and captures it there.

    Nothing is freed by the garbage collector meanwhile, and autocast keeps no weights it has cast: it would free them
    at its end, and every replay would read them. Other threads may allocate and wait.
    """
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    collecting, caching = gc.isenabled(), torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                rewind()
                body()
        torch.cuda.synchronize(device)
        gc.collect()
        gc.disable()
        graph = record(body, stream, device)
    except Exception as error:
        torch.cuda.synchronize(device)
        raise CaptureError(str(error) or type(error).__name__) from error
    finally:
        torch.set_autocast_cache_enabled(caching)
        if collecting:
            gc.enable()
    current.wait_stream(stream)
    return graph


def record(body: Callable[[], None], stream: torch.cuda.Stream, device: torch.device) -> torch.cuda.CUDAGraph:
    """Captures `body`, which is warm, on a stream.

    Where that fails torch leaves the thread on the stream, and before 2.13 the graph's pool open and the default
    generator in the capture, until one succeeds: here all is as it was when the error arrives.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    index, current = stream.device.index, torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            body()
    except Exception:
        with torch.cuda.device(index):
            torch.cuda.set_stream(current)
            graph.reset()
            torch.cuda.synchronize()
            with contextlib.suppress(RuntimeError):  # it was not open
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)  # which a graph does only where its capture ended
            another = torch.cuda.Stream()  # torch's default one may be another device's
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=another, capture_error_mode="thread_local"):
                torch.zeros(1, device=device)
        raise
    return graph


def check_conditions(conditions: Mapping[str, Any]) -> None:
    """Refuses what a graph would go on reading as it was at the capture, whatever becomes of it between two calls.

    Tensors in dictionaries, lists and tuples are copied at each call, and another number or name makes another graph.
    A module or function is taken as the model is: it is the same as long as it is the same object.

    Raises: CaptureError that names the condition.
    """
    for name, value in conditions.items():
        for leaf in tree_leaves(value):
            if not isinstance(leaf, Tensor) and _changes(leaf):
                raise CaptureError(
                    f"condition {name!r} holds a {type(leaf).__name__}, whose changes a graph would not see; "
                    f"pass its tensors in a dict, list or tuple"
                )


def _changes(leaf: object, depth: int = 0) -> bool:
    """Can it be another without comparing as another, or are there tensors among its fields? True where none knows."""
    if isinstance(leaf, AS_THE_MODEL):
        return False
    slots = [n for c in type(leaf).__mro__ for n in _names(getattr(c, "__slots__", ())) if hasattr(leaf, n)]
    fields = tree_leaves([getattr(leaf, "__dict__", {}), [getattr(leaf, n) for n in slots]])
    compared = type(leaf).__hash__
    if compared is None or (compared is object.__hash__ and fields):
        return True
    return depth > DEEPEST or any(isinstance(v, Tensor) or _changes(v, depth + 1) for v in fields)


def _names(slots: object) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)  # type: ignore[arg-type]


class _Still(Noise):
    """The same normals for every draw, so that capturing leaves the caller's generator or function alone."""

    def __init__(self, run: Run) -> None:
        self.draws = run.plan.draws.tolist()
        self.philox = getattr(run.noise, "philox", None)  # which still draws a readout's classes
        seeds = torch.zeros(run.shape[0], dtype=torch.int64, device=run.device)
        self.n = rng.normal(seeds, run.shape[1:])

    def start(self, row: int) -> torch.Tensor:
        return self.n

    def row(self, k: int) -> torch.Tensor | None:
        return self.n if self.draws[k] else None


class _Graph:
    """A run whose start, where the device draws it, is a graph of its own: one launch for five and more."""

    def __init__(self, run: Run) -> None:
        self.run = run
        for conditions in (run.cond, run.uncond):
            check_conditions(conditions)
        run.own_conditions()
        self.first = _capture(self._first, lambda: None, run.device) if run.noise_in_kernel else None

    def _first(self) -> None:
        self.run.draw(None, None)
        self.rewind()

    def start(self, request: Request) -> None:
        """Before the first row, as Run.start."""
        o = request.options
        if self.first is None or o.x_T is not None or o.x_init is not None:
            self.run.start(request)
            self.rewind()
        else:
            self.run.prepare(request)
            self.first.replay()

    def rewind(self) -> None:
        """Back to row 0."""
        raise NotImplementedError

    def advance(self, k: int) -> None:
        """Row k. Rows must come in order after a start."""
        raise NotImplementedError


class StepGraph(_Graph):
    """Model + step of one row, captured once and replayed: 2 nodes beyond the model (the step, and the row's advance).

    The row index and the model's time live in device memory; a one-program node of their own moves them on.
    """

    def __init__(self, run: Run) -> None:
        self.row = torch.zeros(1, dtype=torch.int32, device=run.device)
        self.t = run.t[0].clone()
        self.noise = torch.zeros_like(run.x) if run.outside() else None
        super().__init__(run)
        self.graph = _capture(self._row, self.rewind, run.device)

    def _row(self) -> None:
        run = self.run
        m, u = run.evaluate(self.t)
        run.step(0, self.row, m, u, self.noise)
        ops.advance(self.row, run.times, self.t)

    def rewind(self) -> None:
        """Back to row 0."""
        self.row.zero_()
        self.t.copy_(self.run.t[0])

    def advance(self, k: int) -> None:
        """Row k: one replay."""
        if not self.run.captured(k):
            self.run.advance(k)
            return
        if self.run.idle(k):
            ops.advance(self.row, self.run.times, self.t)
            return
        if self.noise is not None:
            noise = self.run.noise.row(k)
            if noise is not None:
                self.noise.copy_(noise)
        self.graph.replay()


class LoopGraph(_Graph):
    """All rows as one graph: 1 node a row beyond the model, no host work between rows."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.graph = _capture(self._rows, self.rewind, run.device)

    def _rows(self) -> None:
        self.run.numbered = True
        try:
            for k in range(self.run.plan.nfe):
                self.run.advance(k)
        finally:
            self.run.numbered = False

    def rewind(self) -> None:
        """Nothing to do: every row holds its own index."""

    def advance(self, k: int) -> None:
        """The whole trajectory, at k = 0."""
        if k == 0:
            self.graph.replay()


def verify(graph: StepGraph | LoopGraph, request: Request) -> None:
    """Runs the same rows eagerly and by replay from one start, in poisoned buffers; CaptureError if they differ.

    Two rows for a StepGraph, all of them for a LoopGraph.
    """
    run = graph.run
    rows = min(2, run.plan.nfe) if isinstance(graph, StepGraph) else run.plan.nfe
    results = []
    for way in (run, graph):
        run.slab.fill_(torch.nan if run.slab.is_floating_point() else run.plan.mask)
        way.start(request)
        for k in range(rows):
            way.advance(k)
        results.append(run.x.clone())
    eager, replayed = results
    scale = eager.abs().max().clamp_min(1e-30) if eager.is_floating_point() else 1 / (2 * TOLERANCE)  # ids are equal
    if not bool(((eager - replayed).abs().max() / scale) <= TOLERANCE):
        raise CaptureError("the graph's replay differs from the eager run (a model with its own randomness or state?)")


def pays(graph: StepGraph, request: Request) -> bool:
    """Is a replayed row more than 3 % faster than an eager one? Median of alternating measurements."""
    run, ratios = graph.run, []
    rows = min(TIMED_ROWS, run.plan.nfe)
    for _ in range(3):
        spent = []
        for way in (run, graph):
            way.start(request)
            torch.cuda.synchronize(run.device)
            begin = time.perf_counter()
            for k in range(rows):
                way.advance(k)
            torch.cuda.synchronize(run.device)
            spent.append(time.perf_counter() - begin)
        ratios.append(spent[0] / spent[1])
    return sorted(ratios)[1] > MUST_WIN


def build(run: Run, request: Request) -> StepGraph | LoopGraph | None:
    """The graph that request.options.mode asks for; None for modes without one, and, loudly, where capture fails."""
    mode = request.options.mode
    if mode not in ("step_graph", "loop_graph", "auto") or run.device.type not in GRAPH_DEVICES:
        return None
    noise = run.noise
    if not run.noise_in_kernel:
        run.noise = _Still(run)
    try:
        graph = LoopGraph(run) if mode == "loop_graph" else StepGraph(run)
        verify(graph, request)
        if mode == "auto" and isinstance(graph, StepGraph) and not pays(graph, request):
            run.release_conditions(request)
            return None
        return graph
    except CaptureError as error:
        run.release_conditions(request)
        warn(f"CUDA graph capture failed, sampling runs eagerly: {error}")
        return None
    finally:
        run.noise = noise
