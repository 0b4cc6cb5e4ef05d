"""CogVideoXDPMScheduler, whose step is handed its last x0 and the time before: what a row stands for, and what not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastdiff as fd
from tests.accelerate_cases import far

diffusers = pytest.importorskip("diffusers")
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
STEPS = 8
CLOSE = 5e-6  # of float32 loops of 8 steps: each step of stock and of ours is within 2e-6 of float64 on the same noise


def loop(scheduler, change=lambda k, old, t, before, x: (old, t, before, x), begin=0, batch=2):
    """As the pipelines of CogVideoX: the last x, x0, and what the generator gives next."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(7)
    x, old = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(1))[:batch], None
    timesteps = scheduler.timesteps[begin:]
    for k, t in enumerate(timesteps):
        m = torch.tanh(1.3 * x + float(t) / 2000)
        old, t, before, x = change(k, old, t, timesteps[k - 1] if k else None, x)
        x, old = scheduler.step(m, old, t, before, x, eta=0.0, generator=generator, return_dict=False)
    return x, old, torch.rand(2, generator=generator)


def pair(config=V):
    stock = diffusers.CogVideoXDPMScheduler(**config)
    return stock, fd.accelerate(stock)


@pytest.mark.parametrize("config", [{}, V, {"prediction_type": "sample", "timestep_spacing": "linspace"}])
@pytest.mark.parametrize("begin", [0, 3])
def test_a_pipelines_loop(config, begin):
    """From the start and from the middle (video to video): the sample, x0, and the generator's state."""
    stock, ours = pair(config)
    assert isinstance(ours, diffusers.CogVideoXDPMScheduler)
    for want, got in zip(loop(stock, begin=begin), loop(ours, begin=begin), strict=True):
        assert far(got, want) <= CLOSE
    assert ours._fastdiff.stock is None and ours._fastdiff.run.next == STEPS - begin


def edited(k, old, t, before, x):  # a callback's
    return old, t, before, 0.9 * x if k == 3 else x


def plain_times(k, old, t, before, x):
    return old, int(t), None if before is None else int(before), x


@pytest.mark.parametrize("change", [edited, plain_times])
def test_what_a_row_stands_for(change):
    stock, ours = pair()
    want, got = loop(stock, change), loop(ours, change)
    assert far(got[0], want[0]) <= CLOSE and ours._fastdiff.stock is None


def other_x0(k, old, t, before, x):
    return 0.5 * old if k == 3 else old, t, before, x


def no_x0(k, old, t, before, x):
    return None if k == 3 else old, t, before, x


def other_time_back(k, old, t, before, x):
    return old, t, before + 40 if k == 3 else before, x


def no_time_back(k, old, t, before, x):
    return old, t, None if k == 3 else before, x


def other_time(k, old, t, before, x):
    return old, t - 20 if k == 3 else t, before, x


def another_entry(k, old, t, before, x):
    seen.append(t)
    return (old, seen[2], seen[1], x) if k == 3 else (old, t, before, x)


seen: list[torch.Tensor] = []


def past_at_first(k, old, t, before, x):
    return (x, t, t + 50, x) if k == 0 else (old, t, before, x)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_x0, "old_pred_original_sample is not what the last step returned"),
        (no_x0, "old_pred_original_sample is not what the last step returned"),
        (other_time_back, "timestep_back is not the last step's timestep"),
        (other_time, "timestep is not the next of the schedule"),
        (another_entry, "timestep is not the next of the schedule"),
        (past_at_first, "the first step of the loop was handed a past"),
    ],
)
def test_another_past_takes_the_stock_step(change, why):
    """From there on, in the middle of a loop too: a stock step is handed all it needs."""
    stock, ours = pair({})
    seen.clear()
    with pytest.warns(RuntimeWarning, match=f"CogVideoXDPMScheduler runs its stock step: {why}"):
        got = loop(ours, change)
    seen.clear()
    for want, mine in zip(loop(stock, change), got, strict=True):
        assert far(mine, want) <= CLOSE
    loop(ours)
    assert ours._fastdiff.stock is None  # the next loop is a plan again


def test_an_error_of_stocks_stays_one():
    """A past x0 without its time."""
    stock, ours = pair({})
    with pytest.raises(IndexError):
        loop(stock, no_time_back)
    with pytest.warns(RuntimeWarning, match="timestep_back is not the last"), pytest.raises(IndexError):
        loop(ours, no_time_back)


def test_a_loop_that_is_copied_or_pickled():
    """A copy goes on as a plan; what a pickle does not hold, its caller hands to the stock step."""
    stock, ours = pair()
    states = []

    def copied(k, old, t, before, x):
        if k == 4:
            states.append((copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), old, t, before, x))
        return old, t, before, x

    loop(ours, copied)
    for made in states[0][:2]:
        _, _, old, t, before, x = states[0]
        m, generator = torch.tanh(x), torch.Generator().manual_seed(3)
        if made._fastdiff.run is None:
            with pytest.warns(RuntimeWarning, match="handed a past"):
                got, _ = made.step(m, old, t, before, x, generator=generator)
        else:
            got, _ = made.step(m, old, t, before, x, generator=generator)
            assert made._fastdiff.stock is None
        stock.set_timesteps(STEPS)
        want = stock.step(m, old, t, before, x, generator=torch.Generator().manual_seed(3))[0]
        assert far(got, want) <= CLOSE


def test_what_stock_ignores_or_returns():
    """variance_noise changes nothing; a tuple of two by default, an output for return_dict=True; no other argument."""
    stock, ours = pair()
    x = torch.randn(1, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    made = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(1)
        made.append(scheduler.step(x, None, scheduler.timesteps[0], None, x, 0.0, False, generator, variance_noise=x))
        assert isinstance(made[-1], tuple) and len(made[-1]) == 2
    assert far(made[1][0], made[0][0]) <= CLOSE and far(made[1][1], made[0][1]) <= CLOSE
    out = ours.step(x, made[1][1], ours.timesteps[1], ours.timesteps[0], x, return_dict=True)
    assert torch.equal(out.prev_sample, out[0]) and out.pred_original_sample.shape == x.shape
    with pytest.raises(TypeError, match="unexpected argument 'sigma'"):
        ours.step(x, out[1], ours.timesteps[2], ours.timesteps[1], x, sigma=1.0)
    with pytest.raises(TypeError, match="CogVideoXDPMScheduler.step takes at most 10 arguments, got 11"):
        ours.step(x, out[1], ours.timesteps[2], ours.timesteps[1], x, 0.0, False, None, None, False, 1)


def test_philox_noise_does_not_depend_on_the_batch():
    _, ours = pair()
    ours = fd.accelerate(ours, noise="philox", seed=5)
    both, _, after = loop(ours)
    alone, _, _ = loop(ours, batch=1)
    assert torch.equal(both[:1], alone) and torch.equal(
        after, torch.rand(2, generator=torch.Generator().manual_seed(7))
    )
