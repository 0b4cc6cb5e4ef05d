"""Registered operations without a test of their own: the schema names what is written, fake tensors work."""

import pytest
import torch

from fastdiff import solvers
from fastdiff.ops._scaled import scaled
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
        "scaled": (x, bound, bound.clone(), 0.5, out),
        "levels": (
            torch.linspace(0, 1, 3, device=d),
            torch.ones(2, dtype=torch.float64, device=d),
            "VP",
            "noise",
            "v",
            torch.empty(3, 4, device=d),
        ),
        "threshold": (x, bound, out),
        "threshold_bound": (x, y, table, row, out, scales, True, 8, 0.5, 3.0, torch.empty(3, device=d)),
        "normal": (torch.empty(2, 3, 10, device=d), seeds, index, torch.tensor([0, 7], device=d), 1),
        "advance": (row.int(), torch.linspace(1, 0, 5, device=d), torch.zeros(3, device=d)),
    }


@pytest.mark.parametrize("name", list(cases("cpu")))
def test_opcheck(name, kernel_device):
    op = getattr(torch.ops.fastdiff, name).default
    torch.library.opcheck(op, cases(kernel_device)[name], test_utils=UTILS)


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("n", [1, 7, 3000])
def test_samples_scaled(n, dtypes, device):
    """g x in float64, rounded once (the interpreter cuts bf16 where it should round)."""
    dtype, to = dtypes
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    g = torch.tensor([0.5, -3.0, 1e-3])
    got = scaled(x.to(device), g.to(device), to).cpu()
    want = g.double()[:, None] * x.double()
    cut = 1 if got.dtype == torch.float32 or device.type == "cuda" else 2
    assert got.dtype == (to or dtype)
    assert ((got.double() - want).abs() <= cut * torch.finfo(got.dtype).eps / 2 * want.abs()).all()


def test_samples_scaled_by_products(device):
    """factor g by, g one number a sample or the same for all (a sum's gradient is an expanded number), three roundings
    more; in powers of 2 there are none."""
    x, by = torch.randn(3, 257, generator=torch.Generator().manual_seed(0)), torch.tensor([0.25, -8.0, 2.0])
    for g in (torch.tensor([4.0, 0.5, -2.0]), torch.tensor(4.0).expand(3)):
        got = scaled(x.to(device), g.to(device), by=by.to(device), factor=0.125).cpu()
        assert torch.equal(got, 0.125 * (g * by)[:, None] * x)
    g = torch.tensor([0.3, 0.7, 1e-3])
    got = scaled(x.to(device), g.to(device), by=by.to(device), factor=1 / 3).cpu()
    want = (g.double() * by.double() / 3)[:, None] * x.double()
    assert ((got.double() - want).abs() <= 4 * 2.0**-24 * want.abs()).all()
