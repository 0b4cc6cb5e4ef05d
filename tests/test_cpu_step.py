"""The CPU's one C++ loop for every row: against the float64 reference, and what it must leave alone."""

import dataclasses

import pytest
import torch

from fastdiff import Plan, ops, rng, schedules, solvers
from fastdiff.cpu import CompiledStep, EagerStep

SHAPE = (3, 7, 173)  # two blocks and a rest
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding to the copy's dtype
BETAS = schedules.Betas(schedules.linear_betas(1000))


def mutual(plan: Plan) -> Plan:
    """Rows in which slots 0 and 1 are written from each other: one has to wait."""
    A = plan.A.copy()
    A[1:-1, 1, 0] = 0.25
    return dataclasses.replace(plan, A=A)


PLANS = {
    "ddpm": solvers.ddpm(BETAS, 5, clip=(-1.0, 1.0)),
    "unipc": solvers.unipc(BETAS, 8, order=3),
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde(BETAS, 6),
    "heun": solvers.heun(schedules.EDM(), 6, prediction="edm"),
    "plms": solvers.plms(BETAS, 8),
    "lms": solvers.lms(BETAS, 8),
    "dpmpp_2m clipped": solvers.dpmpp_2m(BETAS, 6, clip=(-1.0, 1.0)),
    "dpmpp_3m": solvers.dpmpp_3m(BETAS, 6),
    "five slots and a rest": solvers.sa_solver(BETAS, 8, predictor_order=4, corrector_order=4),
    "each reads the other": mutual(solvers.dpmpp_2m(BETAS, 6)),
}


pytestmark = pytest.mark.usefixtures("cpp_loops")


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(plan, k, S, m, u, w, n, p):
    """What fp32 may be off in p and in the new state: four roundings of the sum of the terms' sizes."""
    S, m, u, n = (float(v.double().abs().max()) for v in (S, m, u, n))
    mixed = m if not len(w) else u + float(w.max()) * (m + u)
    bound_p = 4 * 2.0**-24 * (abs(plan.c_out[k]) * mixed + abs(plan.c_skip[k]) * S)
    A, b, d, s = (abs(v[k]).sum(-1).max() if v.ndim == 3 else abs(v[k]).max() for v in (plan.A, plan.b, plan.d, plan.s))
    terms = A * S + b * p + d * mixed + s * n
    return bound_p, b * bound_p + d * 4 * 2.0**-24 * mixed + 4 * 2.0**-24 * terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [0, 1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_every_row_against_float64(name: str, weights: int, dtype: torch.dtype):
    """State, prediction and the model's next input, to fp32 rounding (the input to its own dtype's).

    Bit for bit the same where nobody asks for the prediction, which then may never be stored.
    """
    plan: Plan = PLANS[name]
    table, physical = plan.pack("cpu"), plan.allocate().physical
    held = random(physical, *SHAPE, seed=0)
    slots, copies = list(held.unbind(0)), [torch.empty(SHAPE, dtype=dtype) for _ in range(2)]
    step = CompiledStep(plan, slots, copies=copies)
    w = torch.linspace(0.5, 7, weights)
    for k in range(plan.nfe):
        m, u, n = (random(*SHAPE, seed=s + 10 * k).to(dtype) for s in (1, 2, 3))
        noise = n.float() if plan.s[k].any() else None
        guide = {"uncond": u.double(), "guidance": w.view(1, -1).double()} if weights else {}
        before = held.double()
        new, x, p = ops.affine_step_ref(
            held.double(), m.double(), table.double(), torch.tensor([k]), slots=plan.slots,
            noise=None if noise is None else noise.double(), **guide,
        )  # fmt: skip
        x0, other = torch.empty(SHAPE), held.clone()
        each = w.view(-1, 1, 1) if weights else None
        assert step(k, m, u if weights else None, each, noise, x0)
        again = [torch.empty(SHAPE, dtype=dtype) for _ in copies]
        assert CompiledStep(plan, list(other.unbind(0)), copies=again)(k, m, u if weights else None, each, noise, None)
        assert torch.equal(other, held) and all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
        bound_p, bound = rounding(plan, k, before, m, u, w, n, float(p.abs().max()))
        assert (x0 - p).abs().max() <= bound_p
        assert (held - new).abs().max() <= bound
        for copy in copies:
            error = (copy.double() - x).abs() - UNIT[dtype] * x.abs()
            assert error.max() <= 2 * bound * max(1.0, float(plan.c_in.max()))


def test_a_clamp_lets_nan_through_and_bounds_the_rest():
    plan = PLANS["ddpm"]
    slots, x0 = list(torch.zeros(plan.allocate().physical, 1, 40).unbind(0)), torch.empty(1, 40)
    m = torch.full((1, 40), 9.0)
    m[0, 3] = float("nan")
    m[0, 7] = float("-inf")
    assert CompiledStep(plan, slots, copies=[])(0, m, None, None, torch.zeros(1, 40), x0)
    assert x0[0, 3].isnan() and slots[0][0, 3].isnan()
    rest = torch.arange(40) != 3
    assert x0[0, 0] == -1 and x0[0, 7] == 1 and slots[0][0, rest].isfinite().all()


@pytest.mark.parametrize(("name", "k"), [("unipc", 4), ("plms", 5), ("lms", 5), ("dpmpp_2m clipped", 3), ("heun", 2)])
def test_the_same_bits_in_any_batch_and_thread_count(name: str, k: int):
    plan = PLANS[name]
    held, m = random(plan.allocate().physical, 5, 30011, seed=4), random(5, 30011, seed=5)
    whole = held.clone()
    assert CompiledStep(plan, list(whole.unbind(0)), copies=[])(k, m, None, None, None, None)
    alone = held[:, 2:3].clone()
    assert CompiledStep(plan, list(alone.unbind(0)), copies=[])(k, m[2:3].clone(), None, None, None, None)
    assert torch.equal(whole[:, 2:3], alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        again = held.clone()
        assert CompiledStep(plan, list(again.unbind(0)), copies=[])(k, m, None, None, None, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, again)


def test_an_output_that_is_the_models_input():
    """A model may return its own input, a buffer that the row writes."""
    plan = PLANS["heun"]
    held = random(plan.allocate().physical, *SHAPE, seed=6)
    x = random(*SHAPE, seed=7)
    out = []
    for m, copy in ((x.clone(), torch.empty(SHAPE)), (x, x)):
        slots = list(held.clone().unbind(0))
        assert CompiledStep(plan, slots, copies=[copy])(1, m, None, None, None, None)
        out.append((slots[0], copy))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])


def test_slots_that_the_eager_rows_trade():
    """They share the list: a row after an eager one finds the slots where that left them."""
    plan = PLANS["dpmpp_2m clipped"]
    held, outputs = random(plan.allocate().physical, *SHAPE, seed=8), [random(*SHAPE, seed=9 + k) for k in range(3)]
    ends = []
    for eager in (False, True):
        slots = list(held.clone().unbind(0))
        native, other = CompiledStep(plan, slots, copies=[]), EagerStep(plan, slots)
        assert native(0, outputs[0], None, None, None, None)
        before = slots[1]
        (other if eager else native)(1, outputs[1], None, None, None, None)
        assert (slots[1] is not before) == eager
        native.bind()
        assert native(2, outputs[2], None, None, None, None)
        ends.append(torch.stack(slots))
    assert (ends[0] - ends[1]).abs().max() <= 4 * 2.0**-24 * 3 * ends[
        0
    ].abs().max()  # four roundings of a row, in three


@pytest.mark.parametrize("weights", [0, 1, 6])
@pytest.mark.parametrize("sample", [(1,), (3,), (4, 8), (16, 14), (513,), (3, 700)])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_a_row_that_draws_its_noise(name: str, sample: tuple[int, ...], weights: int):
    """Bit for bit what the same row makes of rng.normal's numbers: samples that share a draw, and those of many."""
    plan, shape = PLANS[name], (6, *sample)
    seeds, index = torch.tensor([7, 2**62 + 1, 3, 3, 9, 0]), torch.tensor([0, 2**31 + 3, 1, 2, 5, 0])
    held, w = random(plan.allocate().physical, *shape, seed=1), torch.linspace(0.5, 3, weights)
    ends = []
    for given in (False, True):
        slots, copies = list(held.clone().unbind(0)), [torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)]
        step = CompiledStep(plan, slots, copies=copies, keys=(seeds, index))
        for k in range(plan.nfe):
            m, u = (random(*shape, seed=s + 10 * k) for s in (2, 3))
            n = rng.normal(seeds, sample, row=k, index=index) if given and plan.s[k].any() else None
            each = w.view(-1, *[1] * len(sample)) if weights else None
            assert step(k, m, u if weights else None, each, n, None)
        ends.append((torch.stack(slots), *copies))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*ends, strict=True))


def test_noise_is_drawn_the_same_by_any_number_of_threads():
    plan, seeds = PLANS["ddpm"], torch.arange(5)
    held, m = random(plan.allocate().physical, 5, 3001, seed=4), random(5, 3001, seed=5)
    ends = []
    for threads in (1, 2, 3):
        step = CompiledStep(plan, slots := list(held.clone().unbind(0)), copies=[], keys=(seeds, seeds * 0))
        step.drawing = threads
        assert step(0, m, None, None, None, None)
        ends.append(slots[0])
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
