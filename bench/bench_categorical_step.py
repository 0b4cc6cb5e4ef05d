"""A step of a discrete Bayesian flow over K classes."""

import pytest
import torch

from fastdiff_bench.kernels_categorical import categorical_step

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("classes", [27, 256])
@pytest.mark.parametrize("schedule", ["bfndiscrete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_categorical_step(kernel, schedule, classes):
    kernel(categorical_step, schedule, classes=classes)
