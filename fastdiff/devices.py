"""What a device can do that another cannot."""

from __future__ import annotations

import functools

import torch

__all__ = ["has_float64", "widest"]


def has_float64(device: torch.device) -> bool:
    """Does a device compute in float64? Apple's do not, nor do some of Intel's."""
    return device.type in ("cpu", "cuda", "meta") or _computes_float64(device)


@functools.cache
def _computes_float64(device: torch.device) -> bool:
    try:
        return bool(torch.ones(1, dtype=torch.float64, device=device).mul(2.0).item() == 2)
    except (TypeError, RuntimeError):
        return False


def widest(device: torch.device) -> torch.dtype:
    """What a device computes most precisely in."""
    return torch.float64 if has_float64(device) else torch.float32
