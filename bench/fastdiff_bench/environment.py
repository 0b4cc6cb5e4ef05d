"""Where a number was measured: machine, versions, commit, and the GPU's state."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastdiff_bench.energy import Meter

__all__ = ["describe", "environment"]

PACKAGES = ("torch", "triton", "numpy", "diffusers", "k-diffusion", "scipy")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The source's commit; FASTDIFF_COMMIT names it where a copy has no history."""
    if named := os.environ.get("FASTDIFF_COMMIT"):
        return named

    def git(*args: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=root, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not of a repository that holds an installation
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with what it was built for
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    p = torch.cuda.get_device_properties(device)
    found = {"gpu": p.name, "sms": p.multi_processor_count, "memory_gib": round(p.total_memory / 2**30)}
    return found | Meter(device).state()


def environment(device: str | torch.device) -> dict[str, Any]:
    """Machine, versions and commit as a flat dictionary; of a GPU only where it is what is measured."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": _commit(),
        **_gpu(torch.device(device)),
    }


def describe(env: dict[str, Any]) -> str:
    """One line for people."""
    vectors = f", {env['vectors']}" if "vectors" in env else ""
    where = env.get("gpu") or f"{env['cpu']}, {env['cores']} cores{vectors}"
    versions = ", ".join(f"{name} {env[name]}" for name in PACKAGES if name in env)
    return f"{where}; Python {env['python']}, {versions}; commit {env['commit']}"
