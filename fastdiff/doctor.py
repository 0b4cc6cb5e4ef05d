"""What this installation has, and what each thing means for sampling."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

__all__ = ["Finding", "examine"]

OPTIONAL = ("diffusers", "scikit-learn", "matplotlib", "pillow", "pytest-benchmark", "nvidia-ml-py")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, whether it is there, its version or place, what that means."""

    name: str
    ok: bool
    value: str
    meaning: str


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13)."""
    return tuple(int(n) for n in version.split(".")[:2])


def _compiler() -> str | None:
    """What torch will call: $CXX, else its platform's own; it looks for no other."""
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or own)


def _device() -> Finding:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        value = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {torch.cuda.device_count()} device(s)"
        return Finding("CUDA device", True, value, "one fused kernel a step; step_graph and loop_graph work")
    built = torch.version.cuda or torch.version.hip
    why = f"torch is built for {built}, but no device answers" if built else "this torch is a CPU build"
    other = torch.accelerator.current_accelerator(check_available=True)
    where = "the CPU" if other is None else f"the CPU as C++ loops, on {other.type} as plain torch"
    return Finding("CUDA device", False, why, f"sampling runs on {where}; step_graph and loop_graph need a GPU")


def examine() -> list[Finding]:
    """Look at Python, torch, Triton, the C++ compiler, the device and the optional packages; changes nothing."""
    own, triton, compiler = _version("fastdiff-samplers"), _version("triton"), _compiler()
    recent = _release(torch.__version__) >= (2, 9)
    found = [
        Finding("fastdiff", own is not None, own or "not installed", "" if own else "runs from its source folder"),
        Finding("Python", sys.version_info >= (3, 11), platform.python_version(), "3.11 or newer is needed"),
        Finding("torch", recent, torch.__version__, f"2.9 or newer is needed; {torch.get_num_threads()} CPU threads"),
        _device(),
    ]
    if triton is not None and find_spec("triton") is not None:
        found.append(Finding("triton", True, triton, "the fused kernels can be compiled"))
    else:
        found.append(Finding("triton", False, "not installed", "no fused GPU kernels; everything runs in plain torch"))
    if compiler is not None:
        found.append(
            Finding(
                "C++ compiler",
                True,
                compiler,
                "noise and steps on the CPU are C++ loops; mode 'compile' can fuse the model",
            )
        )
    else:
        found.append(
            Finding(
                "C++ compiler",
                False,
                "none found",
                "noise and steps on the CPU run as plain torch, several times slower; no mode 'compile'",
            )
        )
    owners = sorted(set(metadata.packages_distributions().get("fastdiff", [])) - {"fastdiff-samplers"})
    if owners:
        found.append(Finding("name clash", False, ", ".join(owners), "it installs a package 'fastdiff' too: remove it"))
    for name in OPTIONAL:
        version = _version(name)
        found.append(Finding(name, version is not None, version or "not installed", "optional"))
    return found
