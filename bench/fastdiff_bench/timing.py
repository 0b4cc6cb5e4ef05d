"""How times are taken, in one place: interleaved rounds, medians, rotated buffers, graph replays, the copy bandwidth.

bench/README.md says why each of these is there.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fastdiff.graph import record

__all__ = [
    "LEAST_ROUNDS",
    "MALLOC",
    "cache_bytes",
    "captured",
    "copy_bandwidth",
    "graph_us",
    "interleave",
    "launch_floor_us",
    "malloc_is_set",
    "paired",
    "return_freed",
    "rotation",
    "summary",
    "with_malloc",
]

# above every buffer's size: what one column frees beyond it, the next one would fault in again, on its own clock
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 40))
NO_CRUMBS = "glibc.malloc.tcache_count=0"
# shorter runs are repeated inside one sample; a GPU that waited for the host in between has to get going again
LEAST_SAMPLE_S = {"cpu": 5e-4, "cuda": 3e-3}
LEAST_ROUNDS = 5
SLOW_S = 0.1
CACHES = 4
MOST_CACHE = 64 << 20  # of a CPU: a shared last level of hundreds of MiB cannot be rotated out of
GRAPH_REPLAYS = 9


def with_malloc(env: Mapping[str, str], *, large: bool = False) -> dict[str, str]:
    """An environment in which glibc returns no memory to the system between allocations: it reads this at start.

    large: where buffers are, its thread cache is off. A freed aligned buffer leaves crumbs in it, which keep glibc
    (seen in 2.36) from using the place again for the same size.
    """
    tunables = {"GLIBC_TUNABLES": ":".join(filter(None, (env.get("GLIBC_TUNABLES"), NO_CRUMBS)))} if large else {}
    return {**env, **MALLOC, **tunables}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    p10, p90 = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": p10, "p90": p90}


def paired(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Summary of theirs / ours of the same rounds: how many times faster ours is."""
    return summary([a / b for a, b in zip(theirs, ours, strict=True)])


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(run: Callable[[], object], prepare: Callable[[], object], count: int, device: torch.device) -> float:
    spent = 0.0
    if device.type == "cuda" and count > 1:
        prepare()
        run()  # not timed: the column before it was another one
    for _ in range(count):
        prepare()
        _sync(device)
        begin = time.perf_counter()
        run()
        _sync(device)
        spent += time.perf_counter() - begin
    return spent / count


def _nothing() -> None:
    pass


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    device: torch.device,
    least: int = LEAST_ROUNDS,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run in every round: A B C, C B A, A B C ... so that drift of the machine hits all alike.

    Args:
        runs: name -> what is timed (warm already: compiled, captured, allocated). prepare: called before a run, not
        timed. rounds: at most this many; fewer, but `least`, when they would take longer than `seconds`.
    """
    ready = {name: (prepare or {}).get(name, _nothing) for name in runs}
    counts, once = {}, 0.0
    for name, run in runs.items():
        spent = _sample(run, ready[name], 1, device)
        if spent < SLOW_S:  # else the first call tells enough
            spent = min(_sample(run, ready[name], 1, device) for _ in range(2))
        counts[name] = max(1, min(200, round(LEAST_SAMPLE_S.get(device.type, 5e-4) / max(spent, 1e-9))))
        once += spent * counts[name]
    rounds = max(least, min(rounds, int(seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, began = list(runs), time.perf_counter()
    for i in range(rounds):
        if i >= least and time.perf_counter() - began > 2 * seconds:
            break  # slower than the first calls promised
        for name in order:
            times[name].append(_sample(runs[name], ready[name], counts[name], device))
        order.reverse()
    return times


def cache_bytes(device: torch.device) -> int:
    """The last-level cache in bytes: of a CPU the largest one Linux names (32 MiB where it names none)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def rotation(bytes_each: int, device: torch.device) -> int:
    """How many sets of buffers make a working set of several caches: at least 2, at most 200 (16 on a CPU)."""
    cache, most = cache_bytes(device), 200
    if device.type == "cpu":
        cache, most = min(cache, MOST_CACHE), 16
    return max(2, min(most, CACHES * cache // max(1, bytes_each) + 1))


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all the calls, replayed once.

    Raises: RuntimeError for a call that cannot be captured.
    """

    def all_calls() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_calls()
    torch.cuda.synchronize()
    graph = record(all_calls, stream, stream.device)
    graph.replay()
    return graph


def graph_us(calls: Sequence[Callable[[], object]], replays: int = GRAPH_REPLAYS) -> list[float]:
    """Microseconds of one call, one number a replay of one CUDA graph that holds all the calls."""
    graph, times = captured(calls), []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return times


def copy_bandwidth(device: torch.device, elements: int | None = None) -> float:
    """GB/s, read + written, of copying fp32 `elements` between rotated buffers far out of cache; on a CPU the p90.

    Default: 256 MiB, on a GPU the faster of 256 MiB and 1 GiB (an H200 copies 1 GiB a third slower).
    """
    sizes = [elements] if elements else [1 << 26, 1 << 28] if device.type == "cuda" else [1 << 26]
    return max(_copy_rate(device, n) for n in sizes)


def _copy_rate(device: torch.device, n: int) -> float:
    pairs = [(torch.randn(n, device=device), torch.empty(n, device=device)) for _ in range(2)]
    copies = [partial(b.copy_, a) for a, b in pairs]
    if device.type == "cuda":
        seconds = statistics.median(graph_us(copies * 3)) / 1e6
    else:

        def both() -> None:
            for copy in copies:
                copy()

        # a limit of the machine: of its quiet moments, not of what its neighbours leave
        seconds = summary(interleave({"copy": both}, rounds=21, seconds=4, device=device)["copy"])["p10"] / 2
    return 2 * 4 * n / seconds / 1e9


def launch_floor_us(device: torch.device) -> float:
    """Microseconds of the smallest operation: a replayed one-element kernel on a GPU, one call into torch on a CPU."""
    x = torch.zeros(1, device=device)
    if device.type == "cuda":
        return statistics.median(graph_us([lambda: x.add_(1.0)] * 200))

    def hundred() -> None:
        for _ in range(100):
            x.add_(1.0)

    return statistics.median(interleave({"add": hundred}, rounds=41, seconds=1, device=device)["add"]) * 1e4


def malloc_is_set() -> bool:
    """Was this process started with the thresholds?"""
    return all(os.environ.get(name) == value for name, value in MALLOC.items())


def return_freed() -> None:
    """Gives the system back what is free, between measurements: under the thresholds nothing else does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
