"""Noising, training loss and its gradient, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import CHAINS, denoising_loss

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses(kernel, schedule):
    kernel(denoising_loss, schedule)
