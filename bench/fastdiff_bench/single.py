"""What benchmarks of a single question share: glibc's thresholds, a row's numbers, the JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.files import write_atomic
from fastdiff_bench.timing import malloc_is_set, summary, with_malloc

__all__ = ["restart", "save", "summarised"]


def restart(module: str, argv: Sequence[str] | None) -> None:
    """Starts the module again with glibc's thresholds, which are read at start: page faults are off the clock then.

    Args: argv: the arguments it was given, or None for the process's own.
    """
    if not malloc_is_set():
        command = [sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, with_malloc(os.environ))


def summarised(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median as `name`, the 10th and 90th percentile as `name`_p10 and `name`_p90."""
    found = summary(values)
    return {name: found["median"], f"{name}_p10": found["p10"], f"{name}_p90": found["p90"]}


def save(path: Path | None, env: dict[str, Any], rows: list[dict[str, Any]], **more: object) -> None:
    """Writes what was measured so far, whole or not at all, where a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"environment": env, "rows": rows, **more}, indent=1) + "\n").encode())
