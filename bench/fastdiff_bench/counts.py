"""What a loop does besides taking time: operations or kernels launched, synchronisations, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

__all__ = ["SYNCS", "VIEWS", "activities", "counted", "events", "held_bytes", "on_device", "outermost", "peak_bytes"]

SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize",
         "hipDeviceSynchronize")  # fmt: skip
COPIES = ("aten::item", "aten::_local_scalar_dense")


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What to record for a device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def events(prof: Any) -> list[Any]:  # noqa: ANN401 - torch.profiler.profile
    """The events of a finished profile, those of the device included."""
    return list(prof.profiler.kineto_results.events())


def on_device(event: Any) -> bool:  # noqa: ANN401 - a kineto event
    """Is this a kernel, copy or fill on the device? A name's range there is none."""
    if event.device_type() == torch.autograd.DeviceType.CPU:
        return False
    ranged = event.is_user_annotation() if hasattr(event, "is_user_annotation") else event.name().startswith("row ")
    return not ranged and event.name() not in ("sample", "Context Sync", "Stream Sync", "Event Sync", "Device Sync")


def outermost(found: list[Any]) -> int:
    """Operations not called by another operation, views and fastdiff's ranges not counted."""
    count, until = 0, -1
    for event in sorted(found, key=lambda e: (e.start_ns(), -e.duration_ns())):
        if event.start_ns() >= until:
            until = event.start_ns() + event.duration_ns()
            count += 1
    return count


# what launches nothing itself: of aten::to the copy it makes, if it makes one, is counted
VIEWS = ("aten::view", "aten::expand", "aten::slice", "aten::select", "aten::unbind", "aten::reshape", "aten::t",
         "aten::as_strided", "aten::detach", "aten::alias", "aten::unsqueeze", "aten::squeeze", "aten::split",
         "aten::lift_fresh", "aten::detach_", "aten::transpose", "aten::permute", "aten::to")  # fmt: skip


def counted(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Profiles one run (warm): launches (kernels on a GPU, outermost torch operations on a CPU) and host waits."""
    with profile(activities=activities(device)) as prof:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = events(prof)
    waits = sum(e.name() in (SYNCS if device.type == "cuda" else COPIES[:1]) for e in found)
    if device.type == "cuda":
        return {"launches": sum(on_device(e) for e in found), "syncs": max(0, waits - 1)}  # one is the line above
    ops = [e for e in found if "::" in e.name() and e.name() not in VIEWS]
    return {"launches": outermost(ops), "syncs": waits}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes held at once during a run beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    held = most = 0
    for event in sorted((e for e in events(prof) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def held_bytes(*holders: object) -> int:
    """Bytes of tensors that objects of fastdiff keep between runs; not networks' weights, nor the pools of graphs."""
    found: dict[int, int] = {}
    visited: set[int] = set()
    waiting = list(holders)
    while waiting:
        for value in tree_leaves(waiting.pop()):
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif type(value).__module__.startswith("fastdiff") and not isinstance(value, torch.nn.Module):
                if id(value) not in visited:
                    visited.add(id(value))
                    waiting += getattr(value, "__dict__", {}).values()
    return sum(found.values())
