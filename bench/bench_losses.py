"""Noising, training loss and its gradient, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import CHAINS, denoising_loss

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses(timed, device, schedule, dtype, exponent, column):
    with torch.no_grad():
        work = denoising_loss(schedule, 1 << exponent, dtype, device, (column, "fastdiff eager"))
        assert column in work.columns, work.skipped
        units = len(work.sets) * work.units
        group = f"denoising_loss {schedule} 2^{exponent} {str(dtype)[6:]}"
        timed(work.run(column), group=group, units=units, moved=work.bytes_per_element * work.elements)
