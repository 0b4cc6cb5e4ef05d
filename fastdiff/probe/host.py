"""Foreign code is read on the CPU, whatever device a program has made its default."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["on_host"]


def on_host() -> AbstractContextManager[object]:
    """Inside, tensors are made on the CPU whatever the default device: that is a function mode, as others may be."""
    return torch._C.DisableTorchFunction()  # type: ignore[no-any-return]
