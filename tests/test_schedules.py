"""Schedules against their closed forms, their own derivatives, and what they must refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import schedules as S

CONTINUOUS = [S.VP(), S.SubVP(), S.VE(0.01, 50.0), S.Flow(), S.Flow(3.0), S.EDM(), S.Cosine()]
CONTINUOUS += [S.BFNContinuous(0.02), S.BFNDiscrete(3.0, 5)]
CHAINS = [S.Betas(S.linear_betas(1000)), S.Betas(S.scaled_linear_betas(1000)), S.Betas(S.cosine_betas(1000))]
ALL = CONTINUOUS + CHAINS
ids = [str(s) for s in ALL]


def interior(schedule: S.Schedule) -> np.ndarray:
    t = np.linspace(0.02, 0.98, 41) * schedule.t_max
    return np.round(t) if schedule.t_max > 1 else t


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_drift_and_diffusion_are_the_derivatives(schedule: S.Schedule) -> None:
    t, h = interior(schedule), 1e-6
    if schedule.t_max > 1:
        t, h = t - 0.5, 1e-3
    f = (np.log(schedule.alpha(t + h)) - np.log(schedule.alpha(t - h))) / (2 * h)
    g2 = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h) - 2 * f * schedule.sigma(t) ** 2
    np.testing.assert_allclose(schedule.drift(t), f, rtol=2e-8, atol=1e-9)
    np.testing.assert_allclose(schedule.diffusion2(t), g2, rtol=2e-8)


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_t_of_inverts_logsnr(schedule: S.Schedule) -> None:
    t = interior(schedule)
    np.testing.assert_allclose(schedule.t_of(schedule.logsnr(t)), t, rtol=1e-11)


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_torch_and_numpy_agree(schedule: S.Schedule) -> None:
    t = interior(schedule)
    for name in ("alpha", "sigma", "drift", "diffusion2", "logsnr", "model_time"):
        got = getattr(schedule, name)(torch.from_numpy(t))
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), getattr(schedule, name)(t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_both_at_once_are_each_alone(schedule: S.Schedule) -> None:
    """The same bits, ends included; of 41 times, of one, and of tensors."""
    t = np.concatenate([[0.0], interior(schedule), [schedule.t_max]])
    for at in (t, np.float64(t[7]), torch.from_numpy(t), torch.from_numpy(t).float()):
        for got, want in zip(schedule.alpha_sigma(at), (schedule.alpha(at), schedule.sigma(at)), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("schedule", ALL, ids=ids)
@pytest.mark.parametrize("changed", ["alpha", "sigma"])
def test_a_subclass_changes_one_formula(schedule: S.Schedule, changed: str) -> None:
    """A person's schedule that overrides alpha or sigma alone has its own there, and everywhere both are asked for."""
    kind = type(schedule)
    own = type("Own", (kind,), {changed: lambda self, t: 0.5 * getattr(kind, changed)(self, t)})
    mine = object.__new__(own)
    mine.__dict__.update(schedule.__dict__)
    t = interior(schedule)
    alpha, sigma = schedule.alpha(t) * (0.5 if changed == "alpha" else 1), schedule.sigma(t)
    sigma = sigma * (0.5 if changed == "sigma" else 1)
    got = mine.alpha_sigma(t)
    np.testing.assert_array_equal(got[0], alpha)
    np.testing.assert_array_equal(got[1], sigma)


def test_worked_values() -> None:
    vp = S.VP(0.1, 20.0)
    B = 0.1 * 0.5 + 19.9 * 0.125
    assert math.isclose(vp.alpha(0.5), math.exp(-B / 2), rel_tol=1e-15)
    assert math.isclose(vp.sigma(0.5) ** 2, 1 - math.exp(-B), rel_tol=1e-14)
    sub = S.SubVP(0.1, 20.0)
    assert math.isclose(sub.sigma(0.5), 1 - math.exp(-B), rel_tol=1e-14)  # no square root
    assert math.isclose(sub.diffusion2(0.5), (0.1 + 19.9 * 0.5) * (1 - math.exp(-2 * B)), rel_tol=1e-14)
    assert math.isclose(S.VE(0.01, 50.0).sigma(0.5), math.sqrt(0.01 * 50.0), rel_tol=1e-14)
    assert math.isclose(S.Flow(3.0).sigma(0.5), 1.5 / 2.0, rel_tol=1e-15)
    edm = S.EDM(0.002, 80.0)
    assert math.isclose(edm.sigma(0.0), 0.002, rel_tol=1e-13) and math.isclose(edm.sigma(1.0), 80.0, rel_tol=1e-13)
    assert S.Cosine().alpha(1.0) == 0 and S.Cosine().sigma(1.0) == 1 and S.Cosine().sigma(0.0) == 0
    cosine = S.Cosine()
    expected = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert math.isclose(cosine.alpha(0.5), expected, rel_tol=1e-14)


def test_chains() -> None:
    betas = S.linear_betas(1000)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    chain = S.Betas(betas)
    np.testing.assert_allclose(chain.alpha_bar, np.cumprod(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(chain.sigma(np.arange(1000)) ** 2 + chain.alpha_bar, 1, atol=1e-15)
    assert np.array_equal(chain.betas, betas)
    half = chain.logsnr(np.array([10, 11])).mean()
    assert math.isclose(chain.logsnr(10.5), half, rel_tol=1e-12)  # ln(sigma/alpha) is linear between indices
    cosine = S.cosine_betas(1000)
    assert cosine.max() == 0.999 and np.sum(cosine == 0.999) == 1
    np.testing.assert_allclose(S.scaled_linear_betas(3, 0.01, 0.09), [0.01, 0.04, 0.09])
    assert np.array_equal(S.constant_betas(3, 0.5), [0.5] * 3)
    terminal = S.Betas([0.1, 0.5, 1.0])
    assert terminal.alpha(2) == 0 and terminal.sigma(2) == 1 and terminal.t_of(-np.inf) == 2


def test_sigma_near_zero_keeps_its_digits() -> None:
    # 1 - alpha^2 by subtraction would have 4 digits here
    t = 1e-9
    theta0, theta = 0.008 / 1.008 * math.pi / 2, (t + 0.008) / 1.008 * math.pi / 2
    series = math.sqrt((theta - theta0) * math.sin(2 * theta0)) / math.cos(theta0)
    assert math.isclose(S.Cosine().sigma(t), series, rel_tol=1e-6)
    assert math.isclose(S.VP().sigma(1e-12), math.sqrt(1e-13), rel_tol=1e-9)


def test_model_time() -> None:
    chain = S.Betas(S.linear_betas(10))
    assert chain.model_time(np.array([0.0, 9.0])).dtype == np.int64
    assert chain.model_time(np.array([0.5, 9.0])).dtype == np.float64
    assert S.Flow(3.0).model_time(0.5) == S.Flow(3.0).sigma(0.5)
    assert S.EDM().model_time(0.25) == S.EDM().sigma(0.25)
    assert S.VP().model_time(0.25) == 0.25


TOLD = [
    S.VP(), S.VE(), S.Cosine(), S.Flow(), S.Flow(3.0), S.EDM(), S.BFNContinuous(0.02), S.BFNDiscrete(1.0, 3),
    S.EDM(0.01, 10.1),  # float32 rounds its least sigma down and its largest up
]  # fmt: skip


@pytest.mark.parametrize("schedule", TOLD, ids=str)
def test_the_time_that_a_model_is_told(schedule: S.Schedule) -> None:
    """As plans give it, float32, and back: at the ends too, which float32 rounds past the schedule's own."""
    t = torch.linspace(0, 1, 33)
    told = schedule.model_time(t)
    assert told.dtype == torch.float32 and schedule.model_time(t.double()).dtype == torch.float64
    assert schedule.model_time(torch.tensor([0, 1])).dtype == torch.float32
    back = schedule.time_of_model(told)
    assert back.dtype == torch.float64 and float((back - t).abs().max()) <= 2e-6
    assert (
        np.abs(schedule.time_of_model(schedule.model_time(np.linspace(0, 1, 33))) - np.linspace(0, 1, 33)).max()
        <= 1e-12
    )
    with pytest.raises(ValueError, match="t must be in"):
        schedule.time_of_model(torch.tensor([-0.5]))


def test_the_time_that_a_chain_tells() -> None:
    """int64 of its indices, which an embedding wants."""
    chain = S.Betas(S.linear_betas(10))
    k = torch.tensor([0, 9])
    assert chain.model_time(k).dtype == torch.int64 and torch.equal(chain.model_time(k), k)
    assert chain.model_time(torch.tensor([0.5])).dtype == torch.float32
    assert chain.time_of_model(k).tolist() == [0.0, 9.0]
    with pytest.raises(ValueError, match="t must be in"):
        chain.model_time(torch.tensor([10]))


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (S.VP, (0.1, 20.3)), (S.VE, (0.013, 50.0)), (S.Flow, (3.1,)), (S.EDM, (0.002, 80.0, 7.0, 0.55)),
        (S.Cosine, (0.008,)), (S.BFNContinuous, (0.03,)), (lambda beta: S.BFNDiscrete(beta, 5), (2.1,)),
    ],
)  # fmt: skip
def test_numpy_numbers_are_numbers(make: Any, values: tuple[float, ...]) -> None:
    """Of a narrow type too, and then computed with in float64."""
    given = make(*map(np.float32, values))
    assert given == (want := make(*(float(np.float32(v)) for v in values)))
    t = np.linspace(0.1, 0.9, 5)
    for got, exact in zip(given.alpha_sigma(t), want.alpha_sigma(t), strict=True):
        np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: S.VP(True, 20.0), "beta_min must be a finite number > 0, got True"),
        (lambda: S.VP(np.float32(-1), 20.0), "beta_min must be a finite number > 0, got -1.0"),
        (lambda: S.VP("1", 20.0), "beta_min must be a finite number > 0, got '1'"),
        (lambda: S.BFNContinuous(np.float32(2)), r"sigma_1 must be in \(0, 1\), got 2.0"),
        (lambda: S.VP(0.0, 20.0), "beta_min must be a finite number > 0"),
        (lambda: S.VP(math.nan, 20.0), "beta_min must be a finite number > 0, got nan"),
        (lambda: S.VP(2.0, 1.0), "beta_max must be >= beta_min"),
        (lambda: S.VE(1.0, 1.0), "sigma_max must be > sigma_min"),
        (lambda: S.EDM(-1.0, 80.0), "sigma_min must be in"),
        (lambda: S.Flow(0.0), "shift must be"),
        (lambda: S.Cosine(-1.0), "s must be"),
        (lambda: S.Betas([]), "non-empty 1-D"),
        (lambda: S.Betas([[0.1]]), "1-D"),
        (lambda: S.Betas([0.1, math.nan]), r"betas\[1\] = nan"),
        (lambda: S.Betas([0.1, 0.0]), r"betas\[1\] = 0"),
        (lambda: S.Betas([0.1, 1.5]), r"betas\[1\] = 1.5"),
        (lambda: S.Betas([1.0, 0.5]), "last beta only"),
        (lambda: S.linear_betas(0), "T, the number of betas"),
        (lambda: S.linear_betas(2.5), "T, the number of betas"),  # type: ignore[arg-type]
        (lambda: S.cosine_betas(10, max_beta=1.5), "max_beta"),
        (lambda: S.cosine_betas(10, s=math.nan), "s must be a finite number >= 0, got nan"),
        (lambda: S.VP().alpha(1.5), r"t must be in \[0, 1\]"),
        (lambda: S.VP().sigma(torch.tensor([-0.1])), r"t must be in \[0, 1\]"),
        (lambda: S.VP().sigma(math.nan), r"t must be in \[0, 1\]"),
        (lambda: S.Betas([0.1, 0.2]).alpha(2), r"t must be in \[0, 1\]"),
    ],
)
def test_bad_input(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]
