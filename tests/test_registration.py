"""Registered operations without a test of their own: the schema names what is written, fake tensors work."""

import pytest
import torch

from fastdiff import solvers
from fastdiff.schedules import Betas, linear_betas

UTILS = ("test_schema", "test_faketensor")
PLAN = solvers.dpmpp_2m(Betas(linear_betas(100)), 5)


def cases(d):
    x, y, out = (torch.randn(3, 2, 5, device=d) for _ in range(3))
    row, w = torch.tensor([2], device=d), torch.full((5, 1), 2.0, device=d)
    table, scales, bound = PLAN.pack(d), torch.rand(3, 3, device=d), torch.rand(3, device=d) + 1
    seeds, index = torch.arange(3, device=d), torch.zeros(3, dtype=torch.int64, device=d)
    return {
        "guide": (x, y, scales, 1, out),
        "guidance_scales": (x, y, w, row, 2, 0.3, 0.0, torch.empty(3, 3, device=d)),
        "threshold": (x, bound, out),
        "threshold_bound": (x, y, table, row, out, scales, True, 8, 0.5, 3.0, torch.empty(3, device=d)),
        "normal": (torch.empty(2, 3, 10, device=d), seeds, index, torch.tensor([0, 7], device=d), 1),
        "advance": (row.int(), torch.linspace(1, 0, 5, device=d), torch.zeros(3, device=d)),
    }


@pytest.mark.parametrize("name", list(cases("cpu")))
def test_opcheck(name, kernel_device):
    op = getattr(torch.ops.fastdiff, name).default
    torch.library.opcheck(op, cases(kernel_device)[name], test_utils=UTILS)
