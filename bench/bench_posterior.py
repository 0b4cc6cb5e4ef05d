"""The DDPM posterior, by schedule."""

import pytest
import torch

from fastdiff_bench.kernels import CHAINS, posterior

COLUMNS = ("torch", "torch.compile", "fastdiff eager", "fastdiff compiled")


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_posterior(timed, device, schedule, dtype, exponent, column):
    with torch.no_grad():
        work = posterior(schedule, 1 << exponent, dtype, device, (column, "fastdiff eager"))
        assert column in work.columns, work.skipped
        units = len(work.sets) * work.units
        group = f"posterior {schedule} 2^{exponent} {str(dtype)[6:]}"
        timed(work.run(column), group=group, units=units, moved=work.bytes_per_element * work.elements)
