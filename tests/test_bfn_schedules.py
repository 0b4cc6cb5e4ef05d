"""Bayesian flow schedules: the paper's worked values, its own formulas, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff import schedules as S


def test_worked_accuracies() -> None:
    assert S.BFNDiscrete(4.0, 3).accuracy(10, 20) == pytest.approx(0.19, rel=1e-15)
    assert S.BFNContinuous(0.001).accuracy(50, 100) == pytest.approx(129.0364100439194, rel=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_accuracies_add_up(steps: int) -> None:
    """sum of accuracy_i is beta(1) for classes and 1/sigma_1^2 - 1 = rho_n - 1 for continuous data."""
    i = np.arange(1, steps + 1)
    assert S.BFNDiscrete(2.5, 9).accuracy(i, steps).sum() == pytest.approx(2.5, rel=1e-14)
    assert S.BFNContinuous(0.01).accuracy(i, steps).sum() == pytest.approx(0.01**-2 - 1, rel=1e-13)


def test_the_worked_bayesian_update() -> None:
    """mu' = (rho mu + a y) / (rho + a), with the accuracy above; y and the result are rounded to four digits."""
    a = float(S.BFNContinuous(0.001).accuracy(50, 100))
    mu, y, rho = np.array([0.25, 0.55, 0.18]), np.array([0.3117, 0.4742, 0.2356]), 3.0
    np.testing.assert_allclose((rho * mu + a * y) / (rho + a), [0.3103, 0.4759, 0.2344], atol=1e-4)


def test_continuous_flow_is_the_papers() -> None:
    schedule, u = S.BFNContinuous(0.02), np.linspace(0, 1, 33)
    gamma = 1 - 0.02 ** (2 * u)
    np.testing.assert_allclose(schedule.alpha(1 - u), gamma, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(1 - u) ** 2, gamma * (1 - gamma), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(schedule.model_time(1 - u), 1 - (1 - u))
    mu, noise = np.array([0.2959, 0.4435, 0.2119]), np.array([0.05, -0.02, 0.03])
    g = float(S.BFNContinuous(0.001).gamma(0.5))
    x = mu / g - math.sqrt((1 - g) / g) * noise
    np.testing.assert_allclose(x, [0.2946, 0.4446, 0.2112], atol=5.1e-5)
    assert schedule.alpha(1.0) == 0 and schedule.sigma(1.0) == 0 and schedule.logsnr(1.0) == -np.inf


def test_discrete_flow_is_the_papers() -> None:
    """sigma is sqrt(beta K), not beta K; alpha is the gap beta K between the class and the others."""
    schedule, u = S.BFNDiscrete(3.0, 27), np.linspace(0, 1, 33)
    np.testing.assert_allclose(schedule.beta(1 - u), 3.0 * u**2, rtol=1e-14)
    np.testing.assert_allclose(schedule.alpha(1 - u), 27 * 3.0 * u**2, rtol=1e-14)
    np.testing.assert_allclose(schedule.sigma(1 - u), np.sqrt(27 * 3.0 * u**2), rtol=1e-14)
    assert schedule.alpha(1.0) == 0 and schedule.logsnr(1.0) == -np.inf  # theta is uniform


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: S.BFNContinuous(0.0), ValueError, r"sigma_1 must be in \(0, 1\), got 0.0"),
        (lambda: S.BFNContinuous(1.0), ValueError, r"sigma_1 must be in \(0, 1\)"),
        (lambda: S.BFNContinuous(math.nan), ValueError, r"sigma_1 must be in \(0, 1\)"),
        (lambda: S.BFNContinuous("a"), ValueError, "sigma_1"),  # type: ignore[arg-type]
        (lambda: S.BFNDiscrete(0.0, 3), ValueError, "beta_1 must be a finite number > 0"),
        (lambda: S.BFNDiscrete(-1.0, 3), ValueError, "beta_1 must be a finite number > 0, got -1.0"),
        (lambda: S.BFNDiscrete(1.0, 1), ValueError, "num_classes must be >= 2, got 1"),
        (lambda: S.BFNDiscrete(1.0, 2.5), TypeError, "num_classes must be an integer"),  # type: ignore[arg-type]
        (lambda: S.BFNContinuous(0.1).alpha(1.01), ValueError, r"t must be in \[0, 1\]"),
        (lambda: S.BFNDiscrete(1.0, 3).alpha(torch.tensor(-0.01)), ValueError, r"t must be in \[0, 1\]"),
        (lambda: S.BFNDiscrete(1.0, 3).accuracy(0, 4), ValueError, r"i must be in 1\.\.4"),
        (lambda: S.BFNDiscrete(1.0, 3).accuracy(5, 4), ValueError, r"i must be in 1\.\.4"),
        (lambda: S.BFNContinuous(0.1).accuracy(1, 0), ValueError, "steps must be an integer >= 1"),
        (lambda: S.BFNContinuous(0.1).accuracy(1, 1.5), ValueError, "steps must be an integer >= 1"),
    ],
)
def test_bad_input(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]
