"""Masked diffusion: its schedule, and the probabilities of its plans."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from tests.test_masked import KINDS, SCHEDULE, K


@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: s.kind)
def test_schedule(schedule: S.Masked) -> None:
    t = np.linspace(0.01, 0.99, 31)
    assert np.array_equal(schedule.alpha(np.array([0.0, 1.0])), [1.0, 0.0])
    assert np.allclose(schedule.alpha(t) + schedule.masked(t), 1, rtol=0, atol=1e-15)
    h = 1e-6
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    assert np.allclose(schedule.weight(t), -slope / schedule.masked(t), rtol=1e-7)
    assert schedule.weight(0.0) == math.inf
    for name in ("alpha", "masked", "weight"):
        got = getattr(schedule, name)(torch.from_numpy(t))
        assert got.dtype == torch.float64 and np.allclose(got, getattr(schedule, name)(t), rtol=1e-15)


def test_numbers_of_the_plan() -> None:
    plan = solvers.unmask(SCHEDULE, 8)
    assert np.allclose(plan.b[:, 0], 1 / np.arange(8, 0, -1), rtol=1e-14)  # MDLM's (t - s) / t
    assert np.array_equal(plan.A, np.ones((8, 1, 1))) and np.array_equal(plan.s, np.ones((8, 1)))
    assert np.allclose(plan.times, np.arange(8, 0, -1) / 8) and np.allclose(plan.sigma, plan.times)
    assert (plan.classes, plan.mask, plan.nfe, plan.slots, plan.last_readout) == (K, K, 8, 1, "random")
    blocks = solvers.unmask(S.Masked(K, 2, "cosine"), 8, blocks=2, order="margin", temperature=0.0)
    assert np.array_equal(blocks.d[:, 0], [0] * 4 + [1] * 4) and np.array_equal(blocks.b[:4], blocks.b[4:])
    t = np.array([1.0, 0.75, 0.5, 0.25])
    assert np.allclose(blocks.times, np.concatenate([1 + t, t]) / 2)
    ahead = 1 - np.append(np.sin(np.pi * t[1:] / 2), 0) / np.sin(np.pi * t / 2)
    assert np.allclose(blocks.b[:4, 0], ahead) and np.allclose(blocks.alpha[4:], (1 + 1 - np.sin(np.pi * t / 2)) / 2)
    given = solvers.unmask(SCHEDULE, 3, spacing=[0.9, 0.5, 0.1])
    assert np.allclose(given.b[:, 0], [4 / 9, 4 / 5, 1])


@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: s.kind)
@pytest.mark.parametrize(("remask", "most"), [(0.0, 1.0), (0.4, 1.0), (1.0, 0.05), (1.0, 1.0), (0.7, 0.2)])
def test_a_row_takes_one_marginal_to_the_next(schedule: S.Masked, remask: float, most: float) -> None:
    """P(not masked) is alpha_t before a row and alpha_s after it, whatever is masked again."""
    plan = solvers.unmask(schedule, 10, remask=remask, remask_most=most)
    alpha, keep, b = plan.alpha, plan.A[:, 0, 0], plan.b[:, 0]
    assert np.allclose(alpha * keep + (1 - alpha) * b, np.append(alpha[1:], 1), rtol=0, atol=1e-14)
    with np.errstate(divide="ignore"):
        largest = np.minimum(1, (1 - np.append(alpha[1:], 1)) / alpha)
    assert np.allclose(1 - keep, np.minimum(remask * largest, most), rtol=0, atol=1e-14)
    assert keep[-1] == b[-1] == 1


def test_every_number_of_rows_is_a_plan() -> None:
    """The largest remasking leaves no rounding between a probability and 1."""
    for schedule in KINDS:
        for steps in [*range(1, 130), 200, 256, 305, 373, 500, 1000]:
            for most in (1.0, 0.1):
                plan = solvers.unmask(schedule, steps, remask=1.0, remask_most=most)
                assert plan.b[-1, 0] == 1 and plan.b.max() == 1


def test_no_row_is_idle() -> None:
    """What does not divide goes to the first rows, and every row unmasks a token while there are any: as LLaDA's."""
    for M, steps in ((20, 16), (24, 16), (18, 16), (8, 8), (256, 64)):
        plan = solvers.unmask(S.Masked(3), steps, order="confidence", temperature=0.0)
        _, kept = fd.sample(lambda x, t: torch.zeros(*x.shape, 3), plan, (1, M), trajectory=True)
        each = -torch.diff((kept.x[:, 0] == 3).sum(1))
        assert each.tolist() == [M // steps + 1] * (M % steps) + [M // steps] * (steps - M % steps)
    few = solvers.unmask(S.Masked(3, kind="cosine"), 64, order="confidence")
    _, kept = fd.sample(lambda x, t: torch.zeros(*x.shape, 3), few, (1, 40), trajectory=True)
    assert (-torch.diff((kept.x[:, 0] == 3).sum(1))).tolist() == [1] * 40 + [0] * 24


def test_chance_is_no_temperature() -> None:
    assert "stochastic" in repr(solvers.unmask(SCHEDULE, 4, temperature=0.0))
    assert "deterministic" in repr(solvers.unmask(SCHEDULE, 4, temperature=0.0, order="margin"))
    assert not solvers.unmask(SCHEDULE, 1, temperature=0.0).stochastic
    cold = solvers.unmask(SCHEDULE, 4, temperature=0.0)
    assert np.array_equal(replace(cold, s=np.ones((4, 1))).draws, np.zeros(4))


def test_what_the_plan_says_of_itself() -> None:
    plan = solvers.unmask(SCHEDULE, 4, remask=0.5)
    text = str(plan)
    assert "5 classes, mask 5: k drawn from softmax(m / s)" in text and "A 0.5  b 0.25  d 0  s 1" in text
    assert "the surest share b of the masked tokens, by margin" in str(solvers.unmask(SCHEDULE, 4, order="margin"))
    assert np.allclose(plan.bytes_per_element(model_bytes=2), 2 * plan.sigma * plan.b[:, 0])
    ordered = solvers.unmask(SCHEDULE, 4, order="margin", blocks=2)
    assert np.allclose(ordered.bytes_per_element(), [2, 1, 2, 1])  # of a block, half of all, all and then half
    _, kept = fd.sample(lambda x, t: torch.zeros(*x.shape, K), ordered, (1, 40), trajectory=True)
    share = [float((x[0, g : g + 20] == K).sum()) / 40 for x, g in zip(kept.x, (0, 0, 20, 20, 20), strict=True)]
    assert np.allclose(ordered.bytes_per_element(guided=True), 8 * np.array(share[:4]))
