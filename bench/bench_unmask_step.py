"""A step of masked diffusion over K classes: the surest masked tokens become classes."""

import pytest
import torch

from fastdiff_bench.kernels_categorical import unmask_step

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("classes", [256, 32768])
@pytest.mark.parametrize("schedule", ["masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unmask_step(kernel, schedule, classes, top_p):
    kernel(unmask_step, schedule, classes=classes, top_p=top_p)
