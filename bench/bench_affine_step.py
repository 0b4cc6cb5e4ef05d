"""The step of a plan: plain torch, torch.compile, diffusers and fastdiff, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import affine_step

COLUMNS = ("torch", "torch.compile", "diffusers", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["scaled_linear_betas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_affine_step(timed, device, schedule, dtype, exponent, column, solver):
    with torch.no_grad():
        work = affine_step(schedule, 1 << exponent, dtype, device, (column, "fastdiff eager"), solver=solver)
        assert column in work.columns, work.skipped
        units = len(work.sets) * work.units
        group = f"affine_step {schedule} 2^{exponent} {str(dtype)[6:]}"
        timed(work.run(column), group=group, units=units, moved=work.bytes_per_element * work.elements)
