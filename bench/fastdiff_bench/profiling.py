"""One sampling run under torch.profiler: a trace with named ranges, and where each microsecond of a step goes.

The ranges are put around the methods of the run that is profiled, and taken off again: nothing is paid for them when
nobody profiles.
"""

from __future__ import annotations

import os
import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

import fastdiff as fd
from fastdiff.commands.options import dtype_of, guarded
from fastdiff_bench.counts import SYNCS, VIEWS, activities, events, on_device, outermost
from fastdiff_bench.tables import markdown, number

__all__ = ["profile_run", "table"]

TIMED = 9
TOP = 10
RUNTIME = ("cuda", "cuLaunch", "hip")  # how the host's calls begin that launch, copy and fill
INNER = ("model", "noise", "step")  # of a row's ranges
FIRST = "first loop, not counted"  # it pays for the profiler's start, 1 ms before its first row
REST, OUTSIDE, WAITS = "rest of the row", "before and after the rows", "waits for the GPU"


@contextmanager
def _range(name: str, nvtx: bool) -> Iterator[None]:
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


@contextmanager
def ranges(prepared: Any, nvtx: bool = False) -> Iterator[None]:  # noqa: ANN401 - what a Sampler keeps of a run
    """Names what a run does: "row 3", inside it "row 3 model", "row 3 noise", "row 3 step" (or "row 3 replay")."""
    run, graph = prepared
    at = {"row": "row 0"}
    inner = [(run, "evaluate", "model"), (run, "step", "step"), (run.noise, "row", "noise")]
    if graph is not None:
        inner.append((graph.graph, "replay", "replay"))

    def named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:  # noqa: ANN401
            with _range(f"{at['row']} {part}", nvtx):
                return function(*args)

        return call

    def row(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(k: int) -> Any:  # noqa: ANN401
            at["row"] = f"row {k}"
            with _range(at["row"], nvtx):
                return function(k)

        return call

    outer = run if graph is None else graph
    outer.advance = row(outer.advance)
    replaced = [(outer, "advance")]
    for owner, method, part in inner:
        try:
            setattr(owner, method, named(getattr(owner, method), part))
        except AttributeError:  # a CUDAGraph's own methods cannot be replaced: its replay is the row's range
            continue
        replaced.append((owner, method))
    try:
        yield
    finally:
        for owner, method in replaced:
            delattr(owner, method)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wall_us(sampler: fd.Sampler, shape: Sequence[int], device: torch.device) -> float:
    """us of a loop without the profiler: the median of several."""
    spent = []
    for _ in range(TIMED):
        _sync(device)
        begin = time.perf_counter()
        sampler(shape, seed=0)
        _sync(device)
        spent.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(spent)


def profile_run(
    model: Callable[..., Any], plan: fd.Plan, shape: Sequence[int], *, mode: str = "eager",
    device: torch.device | None = None, dtype: torch.dtype | None = None, trace: Path | None = None, nvtx: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Profiles one warm loop.

    Args: model, plan, shape, mode, device, dtype: as for fd.Sampler. trace: a Chrome / Perfetto trace goes here.
        nvtx: the same ranges for Nsight Systems (a CUDA device is needed).
    Returns: wall_us (a step, without the profiler), profiled_us, parts (name -> us a step), counts a step, top
        operations or kernels.
    Raises: ModelError where the model raises; ValueError, TypeError for what fd.Sampler refuses.
        A model that is compiled (mode "compile") raises its own errors.
    """
    device = device or torch.device("cpu")
    if nvtx and device.type != "cuda":
        raise ValueError("--nvtx marks ranges for Nsight Systems: it needs --device cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a build of torch prints a line at each start and stop
    dtype = dtype or dtype_of(model)
    from_data = plan.init_scale == plan.init_noise == 0 and plan.alpha[0] != 0
    x_T = torch.zeros(*shape, device=device) if from_data else None
    seen = model if mode == "compile" else guarded(model)
    sampler = fd.Sampler(seen, plan, mode=mode, device=device, dtype=dtype, x_T=x_T)
    for _ in range(2):
        sampler(shape, seed=0)
    wall = _wall_us(sampler, shape, device)
    prepared = next(iter(sampler._runs.values()))
    with profile(activities=activities(device)):  # its first start costs milliseconds
        pass
    with ranges(prepared, nvtx), profile(activities=activities(device)) as prof:
        with record_function(FIRST):
            sampler(shape, seed=0)
            _sync(device)
        with record_function("sample"):
            sampler(shape, seed=0)
        _sync(device)
    if trace is not None:
        prof.export_chrome_trace(str(trace))
    found = events(prof)
    n = plan.nfe
    loop = next(e for e in found if e.name() == "sample" and not _device_side(e))
    found = [e for e in found if e.start_ns() >= loop.start_ns()]
    out: dict[str, Any] = {
        "plan": plan.name, "nfe": n, "shape": list(shape), "mode": mode, "device": str(device), "wall_us": wall / n,
        "profiled_us": loop.duration_ns() / 1e3 / n, "graph": type(prepared.graph).__name__ if prepared.graph else None,
        "compiled_step": prepared.run.compiled is not None if device.type == "cpu" else None,
        "trace": str(trace) if trace is not None else None,
    }  # fmt: skip
    parts = _host_parts(found, loop, device, n)
    if device.type == "cuda":
        out |= {"host": parts, "parts": _device_parts(found, n)}
    else:
        out["parts"] = parts
    out |= {"counts": _counts(found, device, n), "top": _top(found, device, n)}
    return out


def _device_side(event: Any) -> bool:  # noqa: ANN401 - a kineto event
    return event.device_type() != torch.autograd.DeviceType.CPU


def _ranges(found: list[Any]) -> list[tuple[int, int, str]]:
    """Begin, end and part of the host's ranges: "model" of "row 3 model", REST of all of "row 3"."""
    out = []
    for event in found:
        words = event.name().split()
        if len(words) >= 2 and words[0] == "row" and words[1].isdigit() and not _device_side(event):
            part = words[2] if len(words) > 2 else REST
            out.append((event.start_ns(), event.start_ns() + event.duration_ns(), part))
    return sorted(out, key=lambda r: (r[0], -r[1]))


def _part(ranges: list[tuple[int, int, str]], at: int) -> str:
    """The part of the innermost range a time lies in: rows follow each other, and so do the parts of one."""
    for i in range(bisect_right(ranges, at, key=lambda r: r[0]) - 1, -1, -1):
        _, end, part = ranges[i]
        if at < end:
            return part
        if part == REST:
            break
    return OUTSIDE


def _host_parts(found: list[Any], loop: Any, device: torch.device, n: int) -> dict[str, float]:  # noqa: ANN401
    """us a step of the host: a row's ranges, what it does between them, and what the loop does outside its rows.

    Waits for a GPU are taken out of where they are, and given beside.
    """
    spent: Counter[str] = Counter()
    ranges = _ranges(found)
    for begin, end, part in ranges:
        spent[part] += end - begin
    rows = spent.pop(REST)
    spent[REST] = rows - sum(spent.values())
    spent[OUTSIDE] = loop.duration_ns() - rows
    if device.type == "cuda":
        waits = [e for e in found if e.name() in SYNCS and 0 <= e.start_ns() - loop.start_ns() < loop.duration_ns()]
        spent[WAITS] = sum(e.duration_ns() for e in waits)
        for event in waits:
            spent[_part(ranges, event.start_ns())] -= event.duration_ns()
    return {name: value / 1e3 / n for name, value in spent.items()}


def _own_kernels() -> set[str]:
    """The names of fastdiff's kernels, as a device's events have them."""
    import importlib
    import pkgutil

    import fastdiff_kernels

    names = set()
    for info in pkgutil.iter_modules(fastdiff_kernels.__path__):
        module = importlib.import_module(f"fastdiff_kernels.{info.name}")
        names |= {n for n in vars(module) if n.endswith("_kernel")}
    return names


def _device_parts(found: list[Any], n: int) -> dict[str, float]:
    """us a step of the device, by the range that launched a kernel, copy or fill, and the gaps between them.

    A graph's replay launches the model's kernels and fastdiff's, which are told by their names there.
    """
    kernels = sorted((e for e in found if on_device(e)), key=lambda e: e.start_ns())
    if not kernels:
        return {}
    own, ranges = _own_kernels(), _ranges(found)
    launched = {e.correlation_id(): e.start_ns() for e in found
                if not _device_side(e) and e.name().startswith(RUNTIME)}  # fmt: skip
    spent: Counter[str] = Counter()
    gaps, until = 0, kernels[0].start_ns()
    for event in kernels:
        at = launched.get(event.correlation_id())
        part = REST if at is None else _part(ranges, at)
        if part not in (*INNER, OUTSIDE):
            part = "step" if event.name() in own else "model and other kernels"
        spent[part] += event.duration_ns()
        gaps += max(0, event.start_ns() - until)
        until = max(until, event.start_ns() + event.duration_ns())
    return {name: v / 1e3 / n for name, v in (*spent.items(), ("launch gaps", gaps))}


def _counts(found: list[Any], device: torch.device, n: int) -> dict[str, float]:
    """Kernels (operations on a CPU) and host waits a step; the one wait after the loop is the profiler's own."""
    if device.type != "cuda":
        ops = [e for e in found if "::" in e.name() and e.name() not in VIEWS]
        waits = sum(e.name() == "aten::item" for e in found)
        return {"torch operations": outermost(ops) / n, "host reads (item)": waits / n}
    own = _own_kernels()
    kernels = [e for e in found if on_device(e)]
    return {
        "kernels, copies and fills": len(kernels) / n,
        "of them fastdiff's": sum(e.name() in own for e in kernels) / n,
        "launches": sum(e.name() in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
                        for e in found) / n,
        "graph launches": sum(e.name() == "cudaGraphLaunch" for e in found) / n,
        "host waits": max(0, sum(e.name() in SYNCS for e in found) - 1) / n,
    }  # fmt: skip


def _top(found: list[Any], device: torch.device, n: int) -> list[dict[str, Any]]:
    """What takes longest: kernels on a GPU, torch operations on a CPU (with what they call)."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in found:
        if on_device(event) if device.type == "cuda" else "::" in event.name():
            spent[event.name()] += event.duration_ns()
            calls[event.name()] += 1
    return [{"name": k, "us": v / 1e3 / n, "calls": calls[k] / n} for k, v in spent.most_common(TOP)]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    where = "compiled step, " if result["compiled_step"] else f"{result['graph']}, " if result["graph"] else ""
    lines = [
        f"{result['plan']}, {result['nfe']} rows, shape {tuple(result['shape'])}, {result['mode']} ({where}"
        f"{result['device']})",
        f"{number(result['wall_us'])} us a step without the profiler, {number(result['profiled_us'])} with it", "",
    ]  # fmt: skip
    for name, title in (("parts", "where a step's time goes"), ("host", "of it on the host")):
        if result.get(name):
            total = sum(result[name].values())
            rows = [[k, number(v), f"{100 * v / total:.0f} %"] for k, v in result[name].items()]
            lines += [markdown([title, "us", "share"], rows, aligned=True), ""]
    rows = [[k, number(v)] for k, v in result["counts"].items()]
    lines += [markdown(["a step", "count"], rows, aligned=True), ""]
    rows = [[t["name"][:60], number(t["us"]), number(t["calls"])] for t in result["top"]]
    lines.append(markdown(["longest", "us a step", "calls a step"], rows, aligned=True))
    if result["trace"]:
        lines += ["", f"trace: {result['trace']} (open it in ui.perfetto.dev or chrome://tracing)"]
    return "\n".join(lines)
