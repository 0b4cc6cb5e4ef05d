"""A step of a discrete Bayesian flow over K classes."""

import pytest
import torch

from fastdiff_bench.kernels_categorical import categorical_step

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("classes", [27, 256])
@pytest.mark.parametrize("schedule", ["bfndiscrete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_categorical_step(timed, device, schedule, dtype, exponent, column, classes):
    with torch.no_grad():
        work = categorical_step(schedule, 1 << exponent, dtype, device, (column, "fastdiff eager"), classes=classes)
        assert column in work.columns, work.skipped
        units = len(work.sets) * work.units
        group = f"categorical_step {schedule} 2^{exponent} {str(dtype)[6:]}"
        timed(work.run(column), group=group, units=units, moved=work.bytes_per_element * work.elements)
