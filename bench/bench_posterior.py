"""The DDPM posterior, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import CHAINS, posterior

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_posterior(kernel, schedule):
    kernel(posterior, schedule)
