"""The main table: what a step costs, one row a schedule and solver, one column each way to run it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.commands.options import ModelError, guarded, one_line
from fastdiff.readout import BINNED, CATEGORICAL, ORDERS
from fastdiff_bench.cases import COLUMNS, GRAPHS, PEERS, Case, output_shape
from fastdiff_bench.counts import counted, held_bytes, peak_bytes
from fastdiff_bench.energy import Meter, throttled
from fastdiff_bench.stock import diffusers_loop, k_diffusion_loop
from fastdiff_bench.tables import best, first_peer
from fastdiff_bench.textbook import Textbook
from fastdiff_bench.textbook_graph import Graphed
from fastdiff_bench.textbook_tokens import TokensTextbook
from fastdiff_bench.timing import LEAST_ROUNDS, interleave, paired, summary

__all__ = ["ROUNDS", "Settings", "compile_row", "exact_fp32", "measure"]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HOST_RUNS = 5
LEAST_AGAIN = 2  # rounds of a later visit, where they are slow
ROUNDS = 201  # at most; the medians of short loops need many on a machine that others share

Model = Callable[[Tensor, Tensor], Tensor]


class Settings(NamedTuple):
    """What to measure and for how long."""

    device: torch.device
    columns: tuple[str, ...] = COLUMNS
    rounds: int = ROUNDS
    seconds: float = 4.0  # a row's timed part
    model: Callable[..., Any] | None = None
    copy_gb_s: float | None = None
    details: bool = True  # launches, host time, memory
    meter: Meter | None = None
    joules: bool = True  # with the details: 10 s a row
    keep: Callable[[dict[str, Any]], object] = lambda row: None  # takes a row before its joules, which take long


class Column(NamedTuple):
    """One way to run a plan: run(x_T, generator) -> the end, what precedes a run, and a note for the reader."""

    run: Callable[[Tensor, torch.Generator | None], Tensor]
    prepare: Callable[[], object] = lambda: None
    note: Callable[[], str] = str
    sampler: fd.Sampler | None = None

    def runs_as(self) -> tuple[bool, str]:
        """Of a Sampler that has run: does it replay a graph, and which step did it keep?"""
        assert self.sampler is not None
        run, graph = next(reversed(self.sampler._runs.values()))
        return graph is not None, "compiled" if run.compiled is not None else "eager"


def exact_fp32() -> None:
    """fp32 means fp32 in products and convolutions too, in every column."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _ours(plan: fd.Plan, model: Model, mode: str, dtype: torch.dtype, device: torch.device) -> Column:
    """fastdiff in one mode; `compiled` on a CPU is the default mode: compiled step and noise, the model as it is."""
    modes = {"compiled": "auto" if device.type == "cpu" else "compile"}
    sampler = fd.Sampler(model, plan, mode=modes.get(mode, mode), dtype=dtype, device=device)
    shape_of = (lambda x: x.shape[:-1]) if plan.readout in CATEGORICAL else (lambda x: x.shape)

    def run(x: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = tuple(shape_of(x))
        if generator is None:
            return sampler(shape, x_T=x)
        return sampler(shape, x_T=x, noise="torch", generator=generator, mode="eager")

    return Column(run, sampler=sampler)


def _textbook(
    plan: fd.Plan, model: Model, compiled: bool, dtype: torch.dtype, device: torch.device
) -> Textbook | TokensTextbook:
    if plan.readout in ORDERS:
        return TokensTextbook(plan, model, compiled=compiled, device=device)
    return Textbook(plan, model, compiled=compiled, dtype=dtype, device=device)


def column_of(name: str, case: Case, plan: fd.Plan, model: Model, dtype: torch.dtype, device: torch.device,
            compiled_model: Model | None = None) -> Column | str:  # fmt: skip
    """The column, or why there is none."""
    compiled_model = model if compiled_model is None else compiled_model
    if name == "torch":
        return Column(_textbook(plan, model, False, dtype, device))
    if name == "torch.compile":
        return Column(_textbook(plan, compiled_model, True, dtype, device))
    if name == "torch graph" and device.type == "cuda":
        ways = ((compiled_model, True), (model, False))
        graphed = Graphed([_textbook(plan, m, c, dtype, device) for m, c in ways])
        return Column(graphed, note=graphed.note)
    if name in ("diffusers", "k-diffusion"):
        make = diffusers_loop if name == "diffusers" else k_diffusion_loop
        try:
            stock = make(case, plan, model, dtype, device)
        except ModuleNotFoundError as error:
            return str(error)
        return Column(stock.loop, stock.prepare, lambda: stock.name) if stock else "no sampler that does the same"
    mode = name.removeprefix("fastdiff ")
    if mode in (*GRAPHS, "torch graph") and device.type != "cuda":
        return "CUDA graphs need a GPU"
    return _ours(plan, model, mode, dtype, device)


def _gap(got: Tensor, want: Tensor) -> float:
    if not got.is_floating_point():
        return float((got != want).float().mean())
    scale = want.double().abs().max().clamp_min(1e-30)
    return float((got.double() - want.double()).abs().max() / scale)


def _output(plan: fd.Plan, shape: tuple[int, ...]) -> Tensor:
    """An output for a model whose input has this shape."""
    return torch.randn(output_shape(plan, shape), generator=torch.Generator().manual_seed(0))


def _probe(plan: fd.Plan, out: Tensor) -> Model:
    """A model that looks at x: outputs of two loops agree only if every step does."""
    if plan.readout in ORDERS:
        return lambda x, t: out + torch.sin(x.roll(1, -1).float())[..., None] * out.roll(1, -1)
    two = plan.readout in BINNED or plan.learned_variance
    return lambda x, t: (0.2 * torch.tanh(torch.cat([x, x], 1) if two else x) + 0.1 * out).to(x.dtype)


def compare_outputs(case: Case, plan: fd.Plan, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
                    names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:  # fmt: skip
    """Relative difference of every peer from fastdiff eager, and what the others raised.

    Whole loops, the same start and the same normals.

    On a GPU compiled code and graphs draw their normals themselves: there those are compared on plans without noise
    only, as are fastdiff's own C++ loops on a CPU. Where classes are drawn, no two libraries draw alike: those columns
    are not compared here.
    """
    model = _probe(plan, _output(plan, shape).to(device))
    gaps: dict[str, float] = {}
    failed: dict[str, str] = {}
    x_T = _start(plan, shape, device)
    want = column_of("fastdiff eager", case, plan, model, dtype, device, model)
    assert isinstance(want, Column)
    drawn = "sample" in (plan.readout, plan.last_readout if plan.readout in CATEGORICAL else "")
    sampled = drawn or (plan.readout in ORDERS and plan.stochastic)
    for name in names:
        own_noise = plan.stochastic and name in (
            ("torch.compile", "torch graph") if device.type == "cuda" else ("fastdiff compiled",)
        )
        compared = name in PEERS or (name == "fastdiff compiled" and device.type == "cpu")
        if not compared or sampled or own_noise:
            continue
        seeds = [torch.Generator(device).manual_seed(3) if plan.stochastic else None for _ in range(2)]
        try:
            column = column_of(name, case, plan, model, dtype, device, model)
            if isinstance(column, str):
                continue
            column.prepare()
            end = column.run(x_T, seeds[0])
        except Exception as error:
            if name not in PEERS:
                raise
            failed[name] = one_line(error)
            continue
        gaps[name] = _gap(end, want.run(x_T, seeds[1]))
    return gaps, failed


def _start(plan: fd.Plan, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if plan.readout in ORDERS:
        return torch.full(shape, int(plan.mask), device=device)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * plan.init_scale).to(device)


def measure(case: Case, shape: tuple[int, ...], dtype_name: str, dtype: torch.dtype, set_: Settings, *,
            earlier: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """One row of the table: seconds of whole loops, a step's share, compared outputs, and what else a loop costs.

    Args: earlier: the row of an earlier visit, whose rounds count too where it timed the same columns.
    Returns: the row; under "times" the seconds of every round.
    Raises: ModelError where the given model does; ValueError for a case that does not exist.
    """
    plan, device = case.plan(), set_.device
    shape = case.state_shape(plan, shape)
    row: dict[str, Any] = {
        "schedule": case.schedule, "solver": case.solver, "shape": list(shape), "dtype": dtype_name,
        "steps": case.steps, "nfe": plan.nfe, "slots": plan.slots, "stochastic": plan.stochastic, "skipped": {},
    }  # fmt: skip
    with torch.no_grad():
        model, compiled_model = _models(set_, plan, shape, dtype)
        columns = _columns(row, case, plan, model, compiled_model, shape, dtype, set_)
        x_T = _start(plan, shape, device)
        for name, gap in row["differs"].items():
            if name.startswith("fastdiff") and not gap <= TOLERANCE[dtype]:
                raise RuntimeError(f"{case.schedule} {case.solver}: {name} differs from fastdiff's first by {gap:.1e}")
        runs = {name: partial(column.run, x_T, None) for name, column in columns.items()}
        prepare = {name: column.prepare for name, column in columns.items()}
        least = LEAST_ROUNDS if earlier is None else LEAST_AGAIN
        times = interleave(runs, rounds=set_.rounds, seconds=set_.seconds, device=device, prepare=prepare, least=least)
        if earlier is not None and set(earlier["times"]) == set(times):
            times = {name: earlier["times"][name] + values for name, values in times.items()}
        row["times"] = times
        if set_.meter is not None and set_.meter.nvml is not None:
            row["state"] = set_.meter.state()  # while the board is as it was in the rounds: energy ends idle
            row["throttled"] = throttled(row["state"]) or bool(earlier and earlier.get("throttled"))
        row["rounds"] = len(next(iter(times.values()), ()))
        row["us"] = {n: summary([1e6 * v / plan.nfe for v in values]) for n, values in times.items()}
        row["steps_per_s"] = {n: 1e6 / v["median"] for n, v in row["us"].items()}
        others = [n for n in PEERS if n in times]
        if others:
            row["against"] = ", ".join(others)
            theirs = [statistics.geometric_mean(round_) for round_ in zip(*(times[n] for n in others), strict=True)]
            row["times_faster"] = {n: paired(theirs, v) for n, v in times.items() if n not in others}
        logits = plan.classes if plan.readout in ORDERS else 1
        _bandwidth(row, plan, logits * x_T.numel(), dtype, set_.copy_gb_s)
        if set_.details:
            held = {
                name: held_bytes(column.run if column.sampler is None else column.sampler)
                for name, column in columns.items()
            }
            _details(row, plan, runs, prepare, held, set_)
    return row


def compile_row(case: Case, shape: tuple[int, ...], dtype: torch.dtype, set_: Settings) -> None:
    """Makes a row's columns as `measure` does, and leaves what was compiled in the compilers' caches on disk."""
    plan = case.plan()
    shape = case.state_shape(plan, shape)
    with torch.no_grad():
        model, compiled_model = _models(set_, plan, shape, dtype)
        _columns({"skipped": {}}, case, plan, model, compiled_model, shape, dtype, set_)


def _models(set_: Settings, plan: fd.Plan, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Model, Model]:
    """The model of the loops, and the one of torch.compile's; of a given one the output is checked.

    Raises: ModelError, ValueError, TypeError where the given model fails or returns something else than it must.
    """
    if set_.model is None:
        out = _output(plan, shape).to(set_.device, dtype)
        return (lambda x, t: out,) * 2
    if isinstance(set_.model, torch.nn.Module):
        set_.model.to(set_.device, dtype).eval()
    model = guarded(set_.model)
    end = _ours(plan, model, "eager", dtype, set_.device).run(_start(plan, shape, set_.device), None)
    if not bool(torch.isfinite(end).all()):
        raise ValueError("the model's loop ends in numbers that are not finite: nothing can be compared with them")
    return model, guarded(torch.compile(set_.model, dynamic=False))


def _columns(row: dict[str, Any], case: Case, plan: fd.Plan, model: Model, compiled_model: Model,
             shape: tuple[int, ...], dtype: torch.dtype, set_: Settings) -> dict[str, Column]:  # fmt: skip
    """What is timed, warm; the row says why the others are not, what each is called and by how much it differs."""
    device, columns = set_.device, dict[str, Column]()
    row["differs"], failed = compare_outputs(case, plan, shape, dtype, device, set_.columns)
    want: Tensor | None = None  # of fastdiff's first column: the others draw the same noise
    x_T = _start(plan, shape, device)
    for name in set_.columns:
        bare = set_.model is not None and name == "fastdiff compiled" and device.type == "cuda"  # no guard to compile
        given = set_.model if bare and set_.model is not None else model
        gap = row["differs"].get(name, 0.0)
        try:
            column = column_of(name, case, plan, given, dtype, device, compiled_model)
            if name in failed:
                column = f"it failed: {failed[name]}"
            elif not isinstance(column, str) and not gap <= TOLERANCE[dtype]:  # NaN too
                column = f"its result differs by {gap:.1e}: not the same computation, not timed"
            if isinstance(column, str):
                row["skipped"][name] = column
                continue
            column.prepare()
            end = column.run(x_T, None)  # compiles, captures, allocates
        except Exception as error:
            refused = isinstance(error, torch._dynamo.exc.TorchDynamoException)  # a model that does not compile
            if isinstance(error, ModelError) or (name not in PEERS and not refused):
                raise
            row["skipped"][name] = f"it failed: {one_line(error)}"
            continue
        if name.startswith("fastdiff"):
            graphed, step = column.runs_as()
            if name.endswith("_graph") and not graphed:
                row["skipped"][name] = "the capture failed: see the warning"
                continue
            if name == "fastdiff compiled" and device.type == "cpu":
                row["kept_step"] = step
            want = end if want is None else want
            row["differs"][name] = max(gap, _gap(end, want))
        columns[name] = column
        if note := column.note():
            row.setdefault("names", {})[name] = note
    return columns


def _bandwidth(row: dict[str, Any], plan: fd.Plan, n: int, dtype: torch.dtype, copy: float | None) -> None:
    """GB/s of the bytes the plan must move, by fastdiff's fastest column."""
    size = torch.finfo(dtype).bits // 8
    copies = 0 if dtype == torch.float32 and (plan.c_in == 1).all() else size
    per_element = float(plan.bytes_per_element(model_bytes=size).mean()) + (0 if plan.classes else copies)
    row["bytes_per_element"] = per_element
    fastest = best(row)
    if fastest is not None:
        row["gb_s"] = per_element * n / row["us"][fastest]["median"] / 1e3
        row["of_copy"] = row["gb_s"] / copy if copy else None


def _details(row: dict[str, Any], plan: fd.Plan, runs: Mapping[str, Callable[[], object]],
             prepare: Mapping[str, Callable[[], object]], held: Mapping[str, int], set_: Settings) -> None:  # fmt: skip
    """Launches, waits and bytes of every column; joules of the best one and of the first peer, on a GPU."""
    for key in ("launches", "syncs", "peak_mib", "host_us", "joules"):
        row[key] = {}
    for name, run in runs.items():
        prepare[name]()
        count = counted(run, set_.device)
        row["launches"][name], row["syncs"][name] = (count[k] / plan.nfe for k in ("launches", "syncs"))
        prepare[name]()
        row["peak_mib"][name] = (held[name] + peak_bytes(run, set_.device)) / 2**20
        if set_.device.type == "cuda":
            row["host_us"][name] = _host_us(run, prepare[name], plan.nfe)
    set_.keep(row)
    if set_.joules and set_.meter is not None and set_.meter.nvml is not None:
        _energy(row, plan, runs, prepare, set_.meter)


def _energy(row: dict[str, Any], plan: fd.Plan, runs: Mapping[str, Callable[[], object]],
            prepare: Mapping[str, Callable[[], object]], meter: Meter) -> None:  # fmt: skip
    """Joules of the best column and of the first peer, or why the board gave none."""
    for name in [n for n in {best(row), first_peer(row)} if n is not None]:
        try:
            reading = meter.energy(runs[name], prepare=prepare[name])
        except ModelError:
            raise
        except Exception as error:  # NVML's own error is no RuntimeError
            row.setdefault("not_measured", {})[f"joules of {name}"] = one_line(error)
            continue
        if reading is not None:
            row["joules"][name] = reading.joules / plan.nfe


def _host_us(run: Callable[[], object], prepare: Callable[[], object], rows: int) -> float:
    """Microseconds of the host a step: until the loop returns, the device not waited for; median of HOST_RUNS."""
    spent = []
    for _ in range(HOST_RUNS):
        prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        spent.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(spent) / rows
