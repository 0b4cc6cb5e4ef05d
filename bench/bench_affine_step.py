"""The step of a plan: plain torch, torch.compile, diffusers and fastdiff, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import affine_step

COLUMNS = ("torch", "torch.compile", "diffusers", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["scaled_linear_betas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_affine_step(kernel, schedule, solver):
    kernel(affine_step, schedule, solver=solver)
