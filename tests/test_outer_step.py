"""outer_step against its reference, and whole loops against the plan's own definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import ops, rng, schedules, solvers
from fastdiff.ops.outer_step import outer_step, outer_step_ref
from fastdiff.reference import reference_sample

CHAIN = schedules.Betas(schedules.scaled_linear_betas(1000))
PLANS = {
    "ddim": solvers.ddim(CHAIN, 6),
    "ddpm": solvers.ddpm(CHAIN, 6, clip=(-1.0, 1.0)),
    "unipc-3": solvers.unipc(CHAIN, 8, order=3),
    "heun": solvers.heun(CHAIN, 4),
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde(CHAIN, 6),
}
SHAPES = [(2, 3, 5, 7), (3, 130), (1, 4, 16, 16)]


def normals(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("noise", ["given", "philox"])
def test_a_loop_is_the_plan_in_float64(name, shape, noise, device):
    plan = PLANS[name]
    x = normals(shape, 0)
    pool = [normals(shape, 10 + k) for k in range(plan.nfe)]
    seeds = torch.arange(5, 5 + shape[0])
    if noise == "philox":
        pool = [rng.normal(seeds, shape[1:], row=k, stream=1) for k in range(plan.nfe)]
    want = reference_sample(lambda x, t: torch.tanh(x), plan, x.double(), lambda k, like: pool[k].double())
    table, places = plan.pack(device), plan.allocate().physical - 1
    slab = torch.full((places, *shape), float("nan"), device=device) if places else None
    y = x.to(device)
    for k in range(plan.nfe):
        before = y.clone()
        options = {"seeds": seeds.to(device)} if noise == "philox" else {"noise": pool[k].to(device)}
        x0 = torch.empty_like(y)
        new = outer_step(y, torch.tanh(plan.c_in[k] * y), table, k, slots=plan.slots, slab=slab, x0=x0, **options)
        assert torch.equal(y, before) and new.data_ptr() != y.data_ptr()
        p = plan.c_skip[k] * before + plan.c_out[k] * torch.tanh(plan.c_in[k] * before)
        assert torch.allclose(x0, p.clamp(plan.lo[k], plan.hi[k]), atol=2e-4)
        y = new
    assert float((y.cpu().double() - want).abs().max() / want.abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype, device):
    plan = PLANS["unipc-3"]
    x, m = normals((2, 3, 5, 7), 0).to(device, dtype), normals((2, 3, 5, 7), 1).to(device, dtype)
    slab = normals((plan.allocate().physical - 1, 2, 3, 5, 7), 2).to(device)
    table = plan.pack(device)
    want, state, _ = outer_step_ref(x.double(), m.double(), table, 4, slots=plan.slots, slab=slab.double())
    for out_dtype in (None, torch.float32):
        mine = slab.clone()
        got = outer_step(x, m, table, 4, slots=plan.slots, slab=mine, out_dtype=out_dtype)
        assert got.dtype == (out_dtype or dtype)
        # the interpreter truncates where hardware rounds to nearest: one unit
        bound = 4e-6 if out_dtype else float(torch.finfo(dtype).eps)
        assert torch.allclose(got.double(), want, rtol=bound, atol=bound)
        assert torch.allclose(mine.double(), state, rtol=4e-6, atol=4e-6)


def test_nan_stays_and_strides_do_not_matter(device):
    plan = PLANS["ddpm"]
    x = normals((2, 4, 6, 6), 0).to(device).to(memory_format=torch.channels_last)
    m = normals((2, 6, 6, 4), 1).to(device).permute(0, 3, 1, 2)
    m[0, 0, 0, 0] = float("nan")
    got = outer_step(x, m, plan.pack(device), 2, slots=1)
    want, _, _ = outer_step_ref(x.double(), m.double(), plan.pack(device), 2, slots=1)
    assert torch.equal(got.isnan(), want.isnan()) and int(got.isnan().sum()) == 1
    assert torch.allclose(got.double(), want, rtol=4e-6, atol=4e-6, equal_nan=True)
    assert outer_step(x[:0], m[:0], plan.pack(device), 2, slots=1).shape == (0, 4, 6, 6)


GOOD = {"x": torch.ones(2, 3), "model_out": torch.ones(2, 3), "table": PLANS["ddim"].pack(), "row": 1, "slots": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((2, 3))}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.ones(2, 3).long()}, TypeError, "x must be float32"),
        ({"model_out": torch.ones(1, 3)}, ValueError, r"model_out must have shape \(2, 3\)"),
        ({"row": 6}, ValueError, r"row must be an int in 0..5, got 6"),
        ({"row": torch.tensor(1)}, ValueError, "row must be an int"),
        ({"slots": 2}, ValueError, "table must be"),
        ({"slots": 9}, ValueError, "slots must be an int in 1..6"),
        ({"slab": torch.ones(1, 2, 4)}, ValueError, r"slab must be \[P - 1, 2, 3\]"),
        ({"noise": torch.ones(2, 4)}, ValueError, "noise must have shape"),
        ({"seeds": torch.ones(2)}, TypeError, "seeds must be int64"),
        ({"seeds": torch.ones(2).long(), "noise": torch.ones(2, 3)}, ValueError, "not both"),
        ({"x0": torch.ones(2, 3).half()}, TypeError, "x0 must be float32"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be fp32"),
    ],
)
def test_refused(change, error, message):
    given = {**GOOD, **change}
    x, m, table, row = (given.pop(name) for name in ("x", "model_out", "table", "row"))
    with pytest.raises(error, match=message):
        outer_step(x, m, table, row, **given)


def test_registration(kernel_device):
    plan = PLANS["heun"]
    x, slab = torch.ones(2, 3, device=kernel_device), torch.ones(1, 2, 3, device=kernel_device)
    args = (x, x, torch.empty_like(x), plan.pack(kernel_device), 1, plan.slots, slab, None, None, None, None)
    torch.library.opcheck(torch.ops.fastdiff.outer_step.default, args, test_utils=("test_schema", "test_faketensor"))
    assert ops.outer_step is outer_step and ops.outer_step_ref is outer_step_ref
