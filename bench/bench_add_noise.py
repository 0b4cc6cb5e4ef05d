"""Noising clean data, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import CHAINS, add_noise

COLUMNS = ("torch", "torch.compile", "diffusers", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_noise(kernel, schedule):
    kernel(add_noise, schedule)
