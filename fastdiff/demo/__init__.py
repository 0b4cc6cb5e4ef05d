"""The demo: train two small networks on real data, sample them by every solver, measure, draw.

Needs the extra packages of `fastdiff-samplers[demo]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff.rng import checked_seed

__all__ = ["PARTS", "MissingExtraError", "run_demo"]

PARTS = ("schedules", "spiral", "digits", "bfn", "bfn_levels", "bfn_text")
EXTRAS = {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn"}


class MissingExtraError(ImportError):
    """A package of the `demo` extra is not installed."""


def _require_extras() -> None:
    missing = [name for module, name in EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"the demo needs {', '.join(missing)}: pip install 'fastdiff-samplers[demo]'")


def run_demo(
    out: str | Path, *, only: Sequence[str] = PARTS, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run parts of the demo and write their pictures and demo.json.

    Args: out: folder, made where missing. only: parts to run, of PARTS. seed: of training and sampling.
        say: receives the lines of progress and the table.
    Returns: the content of demo.json; "missed" lists the quality targets that were not met.
    Raises: ValueError for an unknown part or a bad seed; MissingExtraError; OSError where `out` cannot be written.
    """
    for name in only:
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}; valid: {', '.join(PARTS)}")
    if not only:
        raise ValueError(f"name at least one part of: {', '.join(PARTS)}")
    checked_seed(seed, 0, 1)
    _require_extras()
    # these need the extras
    from fastdiff.demo import bfn, bfn_levels, bfn_text, digits, overview, report, spiral

    runners = {
        "schedules": overview.run,
        "spiral": spiral.run,
        "digits": digits.run,
        "bfn": bfn.run,
        "bfn_levels": bfn_levels.run,
        "bfn_text": bfn_text.run,
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    parts = []
    threads = torch.get_num_threads()
    # networks this small gain little from a second thread and lose a lot where the cores are shared; one thread also
    # gives the same samples on every machine
    torch.set_num_threads(1)
    try:
        for name in PARTS:
            if name in only:
                parts.append(runners[name](out, seed=seed, say=say))
                say(f"  {name} done after {time.perf_counter() - began:.0f} s")
        content = report.write_report(out, parts, seed=seed, seconds=time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    rows = [row for part in parts for row in part.rows]
    if rows:
        say("")
        say(report.table(rows))
    return content
