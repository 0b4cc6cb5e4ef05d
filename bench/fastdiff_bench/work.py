"""One operation at a time, over rotated buffers: plain torch, torch.compile of it, the library's call, and fastdiff's.

A kernel's work is the same for every column: the same noise drawn, the same results written. Compared before timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.commands.options import one_line
from fastdiff.schedules import Betas, cosine_betas, linear_betas, scaled_linear_betas
from fastdiff_bench.timing import graph_us, interleave, summary

__all__ = [
    "CHAINS", "Column", "Work", "chain_of", "fails", "finish", "gap", "graded", "library", "randn", "shape", "times",
]  # fmt: skip

CHAINS = {"linear_betas": linear_betas, "scaled_linear_betas": scaled_linear_betas, "cosine_betas": cosine_betas}
GRAPH_CALLS = 40
PIECE = 1 << 24
Column = Callable[..., object]


@dataclass
class Work:
    """One kernel at one size: columns called with one set of rotated buffers, `units` kernels' work in each call."""

    kernel: str
    schedule: str
    elements: int
    dtype: str
    bytes_per_element: float
    sets: Sequence[tuple[Any, ...]]
    columns: dict[str, Column]
    units: int = 1
    prepare: dict[str, Callable[[], object]] = field(default_factory=dict)  # before a pass, not timed
    skipped: dict[str, str] = field(default_factory=dict)
    differs: dict[str, float] = field(default_factory=dict)

    def run(self, name: str) -> Callable[[], object]:
        """One pass over all sets."""
        column, sets = self.columns[name], self.sets

        def all_sets() -> None:
            for buffers in sets:
                column(*buffers)

        return all_sets


def times(work: Work, device: torch.device, *, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """us of the kernel's work: interleaved passes; on a GPU replays of a graph of passes where it can be captured."""
    calls = len(work.sets) * work.units
    if device.type != "cuda":
        runs = {name: work.run(name) for name in work.columns}
        spent = interleave(runs, rounds=rounds, seconds=seconds, device=device, prepare=work.prepare)
        return {name: summary([1e6 * v / calls for v in values]) for name, values in spent.items()}
    out = {}
    for name, column in work.columns.items():
        bodies = [partial(column, *buffers) for buffers in work.sets]
        repeat = max(1, GRAPH_CALLS // len(bodies)) if work.elements < 1 << 24 else 1
        try:
            out[name] = summary([v / work.units for v in graph_us(bodies * repeat)])
        except torch.OutOfMemoryError:
            where = f"{name}, {work.dtype} 2^{work.elements.bit_length() - 1}"
            work.skipped[where] = f"more memory than {device} has"
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            spent = interleave({name: work.run(name)}, rounds=rounds, seconds=seconds, device=device)
            out[name] = summary([1e6 * v / calls for v in spent[name]])
            work.skipped[f"{name}, graph timing"] = f"not capturable, timed by the clock: {one_line(error)}"
    return out


def gap(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value, in float64 pieces: 2^28 elements are 2 GiB each time."""
    pairs = zip(got.reshape(-1).split(PIECE), want.reshape(-1).split(PIECE), strict=True)
    parts = [torch.stack([(a.double() - b.double()).abs().max(), b.double().abs().max()]) for a, b in pairs]
    difference, scale = torch.stack(parts).amax(0)
    return float(difference / scale.clamp_min(1e-30))


def fails(call: Callable[[], object]) -> str:
    """Why a call raises; "" where it does not, or where it lacks memory, which is no fault of the column."""
    try:
        call()
    except torch.OutOfMemoryError:
        return ""
    except Exception as error:
        return f"it failed: {one_line(error)}"
    return ""


def shape(elements: int) -> tuple[int, int]:
    batch = 8 if elements >= 64 else 1
    return batch, elements // batch


def randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def chain_of(schedule: str) -> Betas:
    return Betas(CHAINS[schedule](1000))


def library(work: Work, names: Sequence[str], found: dict[str, Column], name: str,
             make: Callable[[Any], Column]) -> None:  # fmt: skip
    if name not in names:
        return
    try:
        import diffusers
    except ModuleNotFoundError:
        work.skipped[name] = "diffusers is not installed: pip install diffusers"
        return
    config = {"linear_betas": "linear", "scaled_linear_betas": "scaled_linear", "cosine_betas": "squaredcos_cap_v2"}
    found[name] = make(diffusers.DDPMScheduler(beta_schedule=config[work.schedule]))


def finish(work: Work, names: Sequence[str], found: dict[str, Column], ours: Column, device: torch.device,
            given: Callable[..., Any] | None = None, textbook: Column | None = None, *,
            compiles: bool = False) -> Work:  # fmt: skip
    """fastdiff's columns: eager, and on a CPU the compiled loops its operations choose by themselves."""

    def eager(*buffers: Any) -> object:  # noqa: ANN401
        with ops.cpu_compiler(False):
            return ours(*buffers)

    found["fastdiff eager"] = eager if device.type == "cpu" else ours
    if device.type == "cpu" and compiles:
        found["fastdiff compiled"] = ours
    if given is not None and textbook is not None:
        x0 = work.sets[0][0]
        noise = randn(x0.shape, device, x0.dtype, 9)
        want = textbook(x0, noise)
        assert isinstance(want, Tensor)
        work.differs["fastdiff eager"] = gap(given(x0, noise), want)
    work.columns = {name: found[name] for name in names if name in found}
    return work


def graded(loss: Callable[..., Tensor], *wanted: int) -> Column:
    """A column that returns the gradients of a loss by some of its arguments."""

    def call(*buffers: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(loss(*buffers), [buffers[i] for i in wanted])

    return call
