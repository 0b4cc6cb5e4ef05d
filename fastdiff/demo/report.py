"""What the demo measured: rows, the printed table, DIR/demo.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastdiff.demo.measure import Case, Sampled
from fastdiff.files import write_atomic

__all__ = ["PACKAGES", "Part", "Row", "machine", "make_row", "table", "write_report"]

PACKAGES = ("torch", "numpy", "triton", "diffusers", "matplotlib", "pillow", "scikit-learn")

_SHOWN = {
    "distance": ("distance", ".4f"),
    "coverage": ("coverage", ".4f"),
    "confidence": ("confidence", ".3f"),
    "rarest_class": ("rarest", ".1%"),
    "commonest_class": ("commonest", ".1%"),
    "nearest_training_image": ("nearest", ".3f"),
    "known_words": ("known words", ".0%"),
    "bits_per_character": ("bits/char", ".2f"),
    "order_0": ("order 0", ".2f"),
}


@dataclass(frozen=True)
class Row:
    """One sampled case: what ran, how long a step took, how good the samples are.

    us_per_step, us_beyond_model: wall microseconds per model evaluation, with the network and with one that costs
    nothing; *_plain: of a plain eager torch loop. metrics: what was measured. missed: targets that were not met.
    """

    part: str
    schedule: str
    solver: str
    spacing: str
    evaluations: int
    us_per_step: float
    us_per_step_plain: float
    us_beyond_model: float
    us_beyond_model_plain: float
    metrics: dict[str, float]
    missed: list[str] = field(default_factory=list)


def make_row(part: str, case: Case, got: Sampled, metrics: dict[str, float], missed: list[str]) -> Row:
    """A row from a sampled case and its judgement."""
    if got.difference is not None:
        metrics = metrics | {"difference_from_plain_loop": got.difference}
    return Row(
        part, case.schedule_name, case.solver, case.spacing, got.plan.nfe, got.us, got.us_plain, got.us_beyond_model,
        got.us_beyond_model_plain, metrics, missed,
    )  # fmt: skip


@dataclass
class Part:
    """What one part of the demo leaves behind."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def machine() -> dict[str, Any]:
    """The machine and the versions a report names."""
    versions = {"python": platform.python_version()}
    for name in ("fastdiff-samplers", *PACKAGES):
        try:
            versions[name] = torch.__version__ if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": versions,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as one text table."""
    names = [name for name in _SHOWN if any(name in row.metrics for row in rows)]
    head = ["data", "schedule", "solver", "spacing", "evals", "us/step", "plain", "solver us", "plain"]
    head += [*(_SHOWN[n][0] for n in names), ""]
    body = [
        [
            row.part, row.schedule, row.solver, row.spacing, str(row.evaluations), f"{row.us_per_step:.0f}",
            f"{row.us_per_step_plain:.0f}", f"{row.us_beyond_model:.0f}", f"{row.us_beyond_model_plain:.0f}",
            *(format(row.metrics[n], _SHOWN[n][1]) if n in row.metrics else "-" for n in names),
            "MISSED" if row.missed else "ok",
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    left = 4
    lines = [
        "  ".join(v.ljust(w) if i < left else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True)))
        for line in [head, ["-" * w for w in widths], *body]
    ]
    notes = [
        "us/step: wall microseconds per model evaluation, model included; solver us: with a model that costs nothing;",
        "plain: the same of a plain eager torch loop. One CPU thread, mode 'eager': nothing is compiled",
    ]
    return "\n".join([*(line.rstrip() for line in lines), *notes])


def write_report(out: Path, parts: Sequence[Part], *, seed: int, seconds: float) -> dict[str, Any]:
    """Write `out`/demo.json and return its content."""
    report: dict[str, Any] = {
        "machine": machine(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "facts": {name: value for part in parts for name, value in part.facts.items()},
        "rows": [asdict(row) for part in parts for row in part.rows],
        "missed": [line for part in parts for line in (*part.missed, *(m for row in part.rows for m in row.missed))],
        "pictures": [name for part in parts for name in part.pictures],
    }
    write_atomic(out / "demo.json", (json.dumps(report, indent=1) + "\n").encode())
    return report
