"""Runs the main table and writes it down row by row, so that an interrupted run keeps what it has.

python -m fastdiff_bench.suite ...        (fastdiff bench starts it in a process with glibc's thresholds set)
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdiff.commands.options import failed, written
from fastdiff.files import write_atomic
from fastdiff.names import load_model
from fastdiff_bench import options, tables
from fastdiff_bench.compare import compare, comparison_text
from fastdiff_bench.energy import Meter
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.networks import build
from fastdiff_bench.options import Request
from fastdiff_bench.throughput import ROUNDS, Settings, compile_row, exact_fp32, measure
from fastdiff_bench.timing import cache_bytes, copy_bandwidth, launch_floor_us, malloc_is_set

__all__ = ["begin", "fill", "main", "pace"]

REGRESSED = 1
QUICK_S, FULL_S, LARGE_S = 2.5, 2.0, 5.0  # timed seconds of a row a visit; a large state's loop takes up to a second
VISITS = 4  # of a full run: what a process's memory and a machine's minute happened to be like counts a quarter
ROW_S = 13.0  # all of a row, what compiles at its first visit included: on a slow machine later visits are shorter
ENERGY_S = 10.0  # and of its joules, where there are any
LEAST_PACE, UNTIMED = 0.1, 1.1  # a visit lasts a tenth longer than its timed part
LARGE = 1 << 18  # elements
METERED = ("ddpm",)  # rows of a quick run whose energy is measured: 5 s a window


def method(request: Request, copy: float, floor: float) -> dict[str, Any]:
    """How a result was measured, to be stored with it."""
    return {
        "copy_gb_s": copy, "launch_floor_us": floor, "cache_bytes": cache_bytes(request.device),
        "malloc_thresholds": malloc_is_set(), "malloc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "steps": request.steps, "quick": request.quick,
        "device": str(request.device), "model": request.model_text or options.NO_MODEL,
    }  # fmt: skip


def begin(request: Request, meter: Meter, *, say: Callable[[str], object]) -> dict[str, Any]:
    """A result without rows: the machine, and how it will be measured."""
    say("measuring the copy bandwidth and the launch floor")
    copy, floor = copy_bandwidth(request.device), launch_floor_us(request.device)
    return {
        "environment": environment(request.device),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": method(request, copy, floor),
        "state_before": meter.state(), "complete": False,
        "refused": [{"schedule": c.schedule, "solver": c.solver, "why": why}
                    for c, why in request.refused],
        "rows": [],
    }  # fmt: skip


def fill(data: dict[str, Any], request: Request, meter: Meter, model: Callable[..., Any] | None = None, *,
         say: Callable[[str], object]) -> None:  # fmt: skip
    """Measures every row into the result, keeping the JSON current.

    Raises: ModelError where the given model fails; what was measured before it is in the result and the file.
    """
    settings = Settings(
        request.device, request.columns, rounds=ROUNDS, model=model, copy_gb_s=data["method"]["copy_gb_s"], meter=meter,
    )  # fmt: skip
    work, visits = request.work(), 1 if request.quick else VISITS
    lasts = [QUICK_S if request.quick else LARGE_S if math.prod(shape) >= LARGE else FULL_S for _, shape, _ in work]
    budget = (ROW_S + (0.0 if meter.nvml is None else ENERGY_S)) * len(work)
    began = time.monotonic()
    try:
        for at in range(visits * len(work)):
            (case, shape, dtype), again = work[at % len(work)], at >= len(work)
            say(f"[{at + 1}/{visits * len(work)}] {case.schedule} {case.solver} {'x'.join(map(str, shape))} {dtype}")
            metered = not request.quick or case.solver in METERED
            left = budget - (time.monotonic() - began)
            rest = sum(lasts[at % len(work) :]) + sum(lasts) * (visits - 1 - at // len(work))
            seconds = lasts[at % len(work)] * (pace(left, rest) if again else 1)
            earlier = data["rows"][at % len(work)] if again else {}

            def keep(row: dict[str, Any], at: int = at % len(work), earlier: dict[str, Any] = earlier) -> None:
                data["rows"][at : at + 1] = [earlier | row]
                save(request.json, data)

            one = settings._replace(seconds=seconds, details=not again, joules=metered, keep=keep)
            keep(measure(case, shape, dtype, request.dtypes[dtype], one, earlier=earlier or None))
        data["complete"] = True
    finally:
        data["state_after"] = meter.state()
        save(request.json, data)


def compile_all(request: Request, model: Callable[..., Any] | None, *, say: Callable[[str], object]) -> None:
    """Compiles what the rows need; runs of their own, side by side, take a part of the time that one would."""
    settings = Settings(request.device, request.columns, model=model)
    for case, shape, dtype in request.work():
        say(f"compiling {case.schedule} {case.solver} {'x'.join(map(str, shape))} {dtype}")
        compile_row(case, shape, request.dtypes[dtype], settings)


def pace(left: float, rest: float) -> float:
    """How much of their planned seconds the visits to come may take, so that `rest` of them end in `left` seconds."""
    return min(1.0, max(LEAST_PACE, left / (UNTIMED * rest)))


def save(path: Path | None, data: dict[str, Any]) -> None:
    """Writes the results so far, whole or not at all; of a row's rounds the summary."""
    if path is not None:
        rows = [{k: v for k, v in row.items() if k != "times"} for row in data["rows"]]
        text = json.dumps(_finite(data | {"rows": rows}), indent=1, allow_nan=False)
        write_atomic(path, f"{text}\n".encode())


def _finite(value: Any) -> Any:  # noqa: ANN401 - anything JSON holds
    """The same with null for what JSON has no number for, as the difference of a peer that ends in NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(data: dict[str, Any]) -> str:
    """Everything for a terminal."""
    rows = data["rows"]
    null = data["method"]["model"] == options.NO_MODEL
    what = "the model does nothing" if null else f"the model {data['method']['model']} included"
    stopped = [] if data["complete"] else [tables.interrupted(rows), ""]
    lines = [*stopped, f"us a step (one model evaluation), median; {what}", ""]
    lines += [tables.throughput(rows, aligned=True), ""]
    lines += ["fastdiff's fastest column / the first peer, a step:", "", tables.details(rows, aligned=True), ""]
    lines += tables.footnotes(rows)
    lines += [f"{r['schedule']} {r['solver']}: {r['why']}" for r in data["refused"]]
    why = data["state_before"].get("nvml")
    lines += [f"joules, clocks: {why}"] if why else []
    copy = data["method"]["copy_gb_s"]
    lines.append(f"copy bandwidth {copy:.1f} GB/s, out of cache: more than 100 % means the state stays in cache")
    return "\n".join([*lines, describe(data["environment"]), f"it took {data['seconds']:.0f} s"])


def run(data: dict[str, Any], request: Request, *, say: Callable[[str], object]) -> int:
    """Measures into the result, prints, compares and draws; 1 where a row got slower than in the stored results."""
    began = time.perf_counter()
    exact_fp32()
    model = None
    if request.model_text:
        name = request.model_text
        model = build(name, request.device) if request.network else load_model(name)
    if request.compile_only:
        compile_all(request, model, say=say)
        return 0
    meter = Meter(request.device)
    data |= begin(request, meter, say=say)
    try:
        fill(data, request, meter, model, say=say)
    finally:
        data["seconds"] = round(time.perf_counter() - began, 1)
        if data["rows"]:
            print(text(data))
        save(request.json, data)
    code = 0
    if request.stored is not None:
        data["comparison"] = found = compare(request.stored, data)
        print(comparison_text(found))
        save(request.json, data)
        code = REGRESSED if found["slower"] else 0
    if request.plot is not None:
        from fastdiff_bench.page import write_report

        print(f"wrote {write_report(data, request.plot)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 2 and a line for bad input or a failure, 1 where --compare finds slower rows."""
    args = options.parser().parse_args(argv)
    data: dict[str, Any] = {}
    before = written(args.json)
    try:
        return run(data, Request(args), say=lambda line: print(line, file=sys.stderr, flush=True))
    except (Exception, KeyboardInterrupt) as error:
        return failed("bench", error, found=data.get("rows"), path=args.json, before=before)


if __name__ == "__main__":
    sys.exit(main())
