"""Where the tests of kernels run: on the GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_kernels() -> AbstractContextManager[None]:
    """CUDA tensors go to the kernels by themselves; CPU tensors, which hold what is expected, to plain torch."""
    from fastdiff import ops

    return nullcontext() if torch.cuda.is_available() else ops.use_kernels()
