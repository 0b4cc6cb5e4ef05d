"""Random times: their distributions by quantiles and moments, importance sampling's weights, no host sync."""

import math

import numpy as np
import pytest
import torch

from fastdiff import training
from fastdiff.schedules import EDM, VE, VP, Betas, Cosine, Flow, Masked, linear_betas

CHAIN = Betas(linear_betas(1000))
N = 20000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_uniform():
    t = training.uniform_times(N, VP(), low=0.2, high=0.7, generator=generator())
    assert t.dtype == torch.float32 and 0.2 <= t.min() and t.max() <= 0.7
    assert abs(t.mean() - 0.45) < 5 * 0.5 / math.sqrt(12 * N)
    k = training.uniform_times(N, CHAIN, generator=generator())
    assert k.dtype == torch.int64 and 0 <= k.min() and k.max() == 999
    counts = torch.bincount(k // 100).double()
    assert ((counts - N / 10) ** 2 / (N / 10)).sum() < 27.9  # chi^2 of 9 degrees, p = 0.001


@pytest.mark.parametrize("schedule", [VP(), CHAIN, Masked(5)], ids=repr)
def test_low_discrepancy(schedule):
    """Every stratum of width 1/B holds exactly one time, and each time alone is uniform."""
    batch, g = 50, generator()
    first = []
    for _ in range(400):
        t = training.low_discrepancy_times(batch, schedule, generator=g)
        u = (t.double() + 0.5) / 1000 if schedule is CHAIN else t.double()
        assert torch.equal((u * batch).long().sort().values, torch.arange(batch))
        first.append(u[3].item())
    assert abs(np.mean(first) - 0.5) < 5 / math.sqrt(12 * 400) and abs(np.std(first) - 1 / math.sqrt(12)) < 0.05


@pytest.mark.parametrize("schedule", [EDM(), VE(0.002, 80.0), VP(), Cosine(), Flow(3.0), CHAIN], ids=repr)
def test_log_normal(schedule):
    """ln(sigma / alpha) has the quantiles of N(-1.2, 1.2^2), as far as the schedule reaches."""
    t = training.log_normal_times(N, schedule, generator=generator())
    assert t.dtype == (torch.int64 if schedule is CHAIN else torch.float32)
    level = -0.5 * schedule.logsnr(t.numpy())
    for q, z in ((0.1, -1.2816), (0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745), (0.9, 1.2816)):
        assert abs(np.quantile(level, q) - (-1.2 + 1.2 * z)) < 0.05, q
    fixed = training.log_normal_times(4, schedule, mean=0.3, std=0.0, generator=generator())
    got = -0.5 * schedule.logsnr(fixed.numpy())
    assert np.abs(got - 0.3).max() < (0.02 if schedule is CHAIN else 1e-4)


@pytest.mark.parametrize("schedule", [VP(), EDM(), Betas(linear_betas(1000))], ids=repr)
def test_log_normal_compiles(schedule):
    """In one graph, with the schedule's table made while it is traced; the draw is eager's."""
    draw = torch.compile(lambda: training.log_normal_times(64, schedule), fullgraph=True, backend="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        got = draw()
        torch.manual_seed(3)
        assert torch.equal(got, training.log_normal_times(64, schedule))


def test_logit_normal():
    t = training.logit_normal_times(N, Flow(), mean=0.5, std=0.8, generator=generator()).double()
    y = torch.log(t / (1 - t))
    assert abs(y.mean() - 0.5) < 5 * 0.8 / math.sqrt(N) and abs(y.std() / 0.8 - 1) < 5 / math.sqrt(2 * N)
    assert training.logit_normal_times(9, CHAIN, generator=generator()).dtype == torch.int64


def test_importance_is_uniform_until_warm_then_follows_the_losses():
    chain = Betas(linear_betas(4))
    times = training.ImportanceTimes(chain, history=3, uniform=0.01)
    torch.testing.assert_close(times.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    losses = {0: [1.0, 2.0, 3.0], 1: [5.0, 5.0, 5.0], 2: [0.5, 0.0, 0.0], 3: [1.0, 1.0, 1.0]}
    for k in range(3):  # repeated indices in one batch as well
        t = torch.tensor([0, 1, 2, 3])
        times.update(t, torch.tensor([losses[i][k] for i in range(4)]))
    times.update(torch.tensor([1, 1, 1, 1, 1]), torch.tensor([9.0, 9.0, 4.0, 4.0, 4.0]))  # the last three stay
    root = np.sqrt([14 / 3, 16.0, 0.25 / 3, 1.0])
    want = 0.99 * root / root.sum() + 0.01 / 4
    np.testing.assert_allclose(times.probabilities(), want, rtol=1e-12)
    t, w = times.sample(N, generator=generator())
    share = torch.bincount(t, minlength=4).double() / N
    assert (share - torch.from_numpy(want)).abs().max() < 0.02
    np.testing.assert_allclose(w, (1 / (4 * want))[t], rtol=1e-6)
    value = torch.tensor([2.0, 7.0, -1.0, 3.0])  # the weighted mean is the uniform one
    assert abs((w * value[t]).mean() - value.mean()) < 0.1
    other = training.ImportanceTimes(chain, history=3, uniform=0.01)
    other.load_state_dict(times.state_dict())
    assert torch.equal(other.probabilities(), times.probabilities())


def test_importance_on_a_continuous_schedule():
    times = training.ImportanceTimes(VP(), bins=5, history=1)
    times.update(torch.tensor([0.05, 0.25, 0.45, 0.65, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 16.0]))
    t, w = times.sample(N, generator=generator())
    assert t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
    assert abs((t > 0.8).float().mean() - 0.8) < 0.02 and abs(w.mean() - 1) < 0.05
    assert abs((w * t).mean() - 0.5) < 0.03


@pytest.mark.gpu
def test_no_host_sync():
    g = torch.Generator("cuda").manual_seed(0)
    times = training.ImportanceTimes(CHAIN, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            training.log_normal_times(8, CHAIN, generator=g)
            training.low_discrepancy_times(8, VP(), generator=g)
            t, w = times.sample(8, generator=g)
            times.update(t, w)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: training.uniform_times(-1, VP()), ValueError, "batch"),
        (lambda: training.uniform_times(2, "vp"), TypeError, "str"),
        (lambda: training.uniform_times(2, VP(), low=0.5, high=0.5), ValueError, "low < high"),
        (lambda: training.uniform_times(2, CHAIN, low=0.5), ValueError, "continuous"),
        (lambda: training.log_normal_times(2, VP(), std=-1.0), ValueError, "std"),
        (lambda: training.logit_normal_times(2, VP(), mean=math.nan), ValueError, "mean"),
        (lambda: training.ImportanceTimes(VP(), bins=0), ValueError, "bins"),
        (lambda: training.ImportanceTimes(CHAIN, uniform=0.0), ValueError, "uniform"),
        (lambda: training.ImportanceTimes(3), TypeError, "int"),
        (
            lambda: training.ImportanceTimes(CHAIN).update(torch.zeros(2).long(), torch.zeros(3)),
            ValueError,
            "one length",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
