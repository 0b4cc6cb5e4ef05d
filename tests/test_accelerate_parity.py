"""Accelerated schedulers against the stock code: every class, step by step and whole loops, in float64 and in half."""

from __future__ import annotations

import pytest
import torch

from fastdiff.integrations.diffusers.reading import Setup
from tests.accelerate_cases import ALL, TOLERANCE, accelerated, exact, far, loop, make, start

pytest.importorskip("diffusers")
LIGHT = ["ddpm-clip", "ddim-clip-eta", "euler-eps", "dpmsolver++-2m", "unipc-2-zero", "heun-eps", "flow-euler"]


@pytest.mark.parametrize("name", list(ALL))
def test_steps_and_loops_equal_stock(name):
    case = ALL[name]
    stock, ours = make(case), accelerated(case)
    x = start(stock)
    theirs, mine = loop(stock, case, x), loop(ours, case, x)
    assert ours._fastdiff.stock is None
    step, whole = exact(case, x, follow=mine), exact(case, x)
    again = loop(make(case), case, x, follow=mine)
    for k, (got, want) in enumerate(zip(mine.x, step.x, strict=True)):
        assert far(got, want) <= TOLERANCE, f"step {k}"
    for k, (got, want, old) in enumerate(zip(mine.second, step.second, again.second, strict=True)):
        assert (got is None) == (want is None) == (old is None)
        if got is not None:  # x0 = (x - sigma m) / alpha magnifies the rounding of x at low alpha, in stock as well
            assert far(got, want) <= max(TOLERANCE, far(old, want) + TOLERANCE), f"second result {k}"
    apart = far(theirs.x[-1], whole.x[-1])
    assert far(mine.x[-1], theirs.x[-1]) <= apart + TOLERANCE
    assert far(mine.x[-1], whole.x[-1]) <= max(TOLERANCE, apart + TOLERANCE)
    if hasattr(stock, "step_index"):
        assert ours.step_index == stock.step_index


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LIGHT, "euler-a-eps", "sde-dpmsolver++-2m", "plms", "lcm", "edm-euler-churn"])
def test_half_precision_is_no_worse_than_stock(name, dtype):
    case = ALL[name]
    stock, ours = make(case), accelerated(case)
    x = start(stock).to(dtype)
    mine = loop(ours, case, x)
    theirs = loop(stock, case, x, follow=mine)
    with_their_draws = _exact_with_draws_of(dtype, case, x, mine)
    for got, old, want in zip(mine.x, theirs.x, with_their_draws.x, strict=True):
        assert got.dtype == old.dtype
        ulp = torch.finfo(dtype).eps
        assert far(got, want) <= max(far(old, want), ulp)


def _exact_with_draws_of(dtype, case, x, mine):
    """The stock code in float64 on the half-precision noise that the stock code draws."""
    import tests.accelerate_cases as cases

    kept = cases.DRAWN
    cases.DRAWN = torch.float32 if case.scheduler == "DPMSolverMultistepScheduler" else dtype
    try:
        return exact(case, x, follow=mine)
    finally:
        cases.DRAWN = kept


@pytest.mark.parametrize("name", ["dpmsolver++-2m", "unipc-3-bh2", "heun-eps", "euler-eps", "plms", "ddpm-clip", "lms"])
@pytest.mark.parametrize("begin", [2, 5])
def test_a_loop_that_begins_in_the_middle(name, begin):
    case = ALL[name]
    x = start(make(case))
    results = []
    for scheduler in (make(case), accelerated(case)):
        noise = {"generator": torch.Generator().manual_seed(0)} if name == "ddpm-clip" else {}
        at = begin * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(at)
        y = x
        for t in scheduler.timesteps[at:]:
            y = scheduler.step(torch.tanh(scheduler.scale_model_input(y, t)), t, y, **noise).prev_sample
        results.append(y)
    assert far(results[1], results[0]) <= 5 * TOLERANCE


def test_a_scheduler_changed_by_hand_is_read_as_it_is():
    case = ALL["ddim-noclip"]
    results = []
    for scheduler in (make(case), accelerated(case)):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
        results.append(loop(scheduler, case, start(scheduler)).x[-1])
    assert far(results[1], results[0]) <= 5 * TOLERANCE
    assert far(results[1], loop(make(case), case, start(make(case))).x[-1]) > 1e-2


def test_set_timesteps_before_accelerate_counts():
    import fastdiff as fd

    case = ALL["dpm-karras"]
    scheduler = make(case, 7)
    ours = fd.accelerate(scheduler)
    x = start(scheduler)
    assert far(loop(ours, case, x).x[-1], loop(scheduler, case, x).x[-1]) <= 5 * TOLERANCE
    assert isinstance(ours._fastdiff.run.setup, Setup) and ours._fastdiff.run.setup.own
