"""Bayesian flow plans: the paper's update, exact moments of Gaussian data, orders, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from tests.oracles import exact_gaussian_flow, gaussian_map, slope

C, D, B = S.BFNContinuous(0.02), S.BFNDiscrete(3.0, 27), S.BFNDiscrete(3.0, 2)
METHODS = ("sde_euler", "ode_euler", "sde_bfn_solver1", "sde_bfn_solver2", "bfn_solver1", "bfn_solver2")


@pytest.mark.parametrize("sigma_1", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_row_is_the_papers_bayesian_update(steps: int, sigma_1: float) -> None:
    """mu' = (rho mu + a y) / (rho + a), y = p + n / sqrt(a), with rho_i = 1 + the accuracies so far."""
    schedule, i = S.BFNContinuous(sigma_1), np.arange(1, steps + 1)
    plan, a = solvers.bfn_continuous(schedule, steps, prediction="x0"), schedule.accuracy(i, steps)
    rho = 1 + np.append(0, np.cumsum(a))[:-1]
    np.testing.assert_allclose(plan.b[:-1, 0], a / (rho + a), rtol=1e-12)
    np.testing.assert_allclose(plan.s[:-1, 0], np.sqrt(a) / (rho + a), rtol=1e-11)
    np.testing.assert_allclose(plan.A[1:-1, 0, 0], (rho / (rho + a))[1:], rtol=1e-11)
    assert plan.init_scale == 0 and plan.A[0, 0, 0] == 0  # mu = 0 at the start
    np.testing.assert_allclose(plan.times, np.arange(steps + 1) / steps, atol=2e-16)
    assert plan.nfe == steps + 1


@pytest.mark.parametrize("schedule", [D, B], ids=["K=27", "K=2"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_row_on_classes(schedule: S.BFNDiscrete, steps: int) -> None:
    """z' = z + a K onehot(k) + sqrt(a K) n; for K = 2 the difference z_1 - z_0, whose noise is sqrt(2 a K)."""
    plan, K = solvers.bfn_discrete(schedule, steps), schedule.num_classes
    a = schedule.accuracy(np.arange(1, steps + 1), steps)
    np.testing.assert_allclose(plan.b[:-1, 0], a * K, rtol=1e-13)
    np.testing.assert_allclose(plan.s[:-1, 0], np.sqrt(a * K * (2 if K == 2 else 1)), rtol=1e-13)
    np.testing.assert_allclose(plan.A[1:-1, 0, 0], 1, rtol=1e-14)
    assert plan.nfe == steps + 1 and plan.classes == K and (plan.readout, plan.last_readout) == ("sample", "sample")


def test_eps_prediction_folds_the_singular_row_into_the_start() -> None:
    full, folded = solvers.bfn_continuous(C, 6, prediction="x0"), solvers.bfn_continuous(C, 6)
    assert folded.nfe == 6 and folded.init_scale == pytest.approx(full.s[0, 0], rel=1e-14)
    for name in ("times", "A", "b", "s"):
        np.testing.assert_array_equal(getattr(full, name)[1:], getattr(folded, name))
    g = C.gamma(folded.t)
    np.testing.assert_allclose(folded.c_skip, 1 / g, rtol=1e-13)
    np.testing.assert_allclose(folded.c_out, -np.sqrt((1 - g) / g), rtol=1e-12)


def moments(schedule: S.BFNContinuous, steps: int, mean: float, std: float, *, folded: bool) -> tuple[float, float]:
    """The n-step chain of the paper for data N(mean, std^2) and the exact posterior mean, in mu and rho."""
    m, v, rho = 0.0, 0.0, 1.0  # of mu
    for i in range(1, steps + 2):
        seen = rho - 1  # y summed: precision of what is known about x beyond the prior N(0, 1) of mu
        keep = seen + 1 / std**2
        u, w = rho / keep, (mean / std**2) / keep  # E[x | mu] = (rho mu + mean / std^2) / (rho - 1 + 1 / std^2)
        if i == 1 and folded:
            u = w = 0.0
        if i == steps + 1:
            return u * m + w, u * u * v
        a = float(schedule.accuracy(i, steps))
        m, v = (rho * m + a * (u * m + w)) / (rho + a), ((rho + a * u) / (rho + a)) ** 2 * v + a / (rho + a) ** 2
        rho += a
    raise AssertionError


def end_moments(plan: Plan, mean: float, std: float) -> tuple[float, float]:
    gain, shift, variance = gaussian_map(plan, mean, std)
    return shift, gain**2 * plan.init_scale**2 + variance


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5, 64])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.7, 0.3), (-0.4, 1.0)])
def test_gaussian_data_follows_the_moment_recursion(prediction: str, steps: int, mean: float, std: float) -> None:
    plan = solvers.bfn_continuous(C, steps, prediction=prediction)
    got, want = end_moments(plan, mean, std), moments(C, steps, mean, std, folded=prediction == "eps")
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_the_stated_stds() -> None:
    """0.3 at n = 20, 100, 400 with sigma_1 = 0.001."""
    for prediction in ("eps", "x0"):
        plans = [solvers.bfn_continuous(S.BFNContinuous(0.001), n, prediction=prediction) for n in (20, 100, 400)]
        stds = [math.sqrt(end_moments(p, 0.0, 0.3)[1]) for p in plans]
        np.testing.assert_allclose(stds, [0.251, 0.289, 0.297], atol=6e-4)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_weak_order_one_in_the_variance(prediction: str) -> None:
    """To Var E[x | mu(1)], a little less than the prior's: the last call knows x to 1/sigma_1^2 - 1."""
    steps, limit = [100, 200, 400, 800], 0.09**2 / (0.09 + 1 / (C.sigma_1**-2 - 1))
    plans = [solvers.bfn_continuous(C, n, prediction=prediction) for n in steps]
    assert slope(steps, [abs(end_moments(p, 0.0, 0.3)[1] - limit) for p in plans]) == pytest.approx(1, abs=0.05)


def test_the_folded_row_biases_the_mean_and_the_kept_one_does_not() -> None:
    """p = 0 at u = 0 in place of the prior's mean: the bias is what one interval knows, and falls as 1/n."""
    steps, bias = [50, 100, 200, 400], []
    for n in steps:
        kept, folded = (end_moments(solvers.bfn_continuous(C, n, prediction=p), 0.7, 0.3) for p in ("x0", "eps"))
        assert kept[0] == pytest.approx(0.7, abs=1e-12)
        assert folded[0] == pytest.approx(moments(C, n, 0.7, 0.3, folded=True)[0], abs=1e-12)
        assert folded[0] < 0.7 and folded[1] == pytest.approx(kept[1], abs=1e-12)
        bias.append(0.7 - folded[0])
    assert slope(steps, bias) == pytest.approx(1, abs=0.1)


def linear_model(plan: Plan, u: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the state before the last row for p = g(u) z + h(u), a smooth network of one logit."""
    n, r = plan.nfe, plan.slots
    state = np.zeros((r, 2 + n))  # coefficients of 1, the start and n_0, n_1, ..
    state[0, 1] = plan.init_scale
    for k in range(n - 1):
        p = gain(u[k]) * state[0] + shift(u[k]) * np.eye(2 + n)[0]
        state = plan.A[k] @ state + np.outer(plan.b[k], p)
        state[:, 2 + k] += plan.s[k]
    return float(state[0, 0]), float(np.sum(state[0, 1:] ** 2))


def gain(u: float) -> float:
    return -0.06 * math.cos(2 * u)


def shift(u: float) -> float:
    return 0.4 + 0.5 * math.sin(3 * u)


def exact_linear(c: float, *, flow: bool, start: float) -> tuple[float, float]:
    """Moments at u = 1, by 4,000 steps of RK4, of dz = 2 c u p du + sqrt(2 c u) dW, or of y = z/u in dy = c p du.

    y starts with N(0, c) wherever the flow starts.
    """

    def rate(u: float, m_v: np.ndarray) -> np.ndarray:
        m, v = m_v
        if flow:
            return np.array([c * (u * gain(u) * m + shift(u)), 2 * c * u * gain(u) * v])
        return np.array([2 * c * u * (gain(u) * m + shift(u)), 4 * c * u * gain(u) * v + 2 * c * u])

    count = 4000
    y, h = np.array([0.0, c if flow else c * start**2]), (1 - start) / count
    for i in range(count):
        u = start + i * h
        k1 = rate(u, y)
        k2 = rate(u + h / 2, y + h / 2 * k1)
        k3 = rate(u + h / 2, y + h / 2 * k2)
        k4 = rate(u + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return float(y[0]), float(y[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t_start", [None, 0.9])
def test_order_on_logits(method: str, t_start: float | None) -> None:
    """Mean and variance of the logits against the SDE's and the flow's own, for a smooth linear network."""
    schedule, steps, errors = S.BFNDiscrete(1.5, 5), [64, 128, 256, 512], []
    want = exact_linear(schedule.scale, flow="sde" not in method, start=0.0 if t_start is None else 1 - t_start)
    for n in steps:
        plan = solvers.bfn_solver(schedule, n, method=method, t_start=t_start)
        got = linear_model(plan, plan.times)
        errors.append(np.abs(np.subtract(got, want)).max())
    assert slope(steps, errors) == pytest.approx(2 if method.endswith("2") else 1, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_order_on_gaussian_data(method: str, prediction: str) -> None:
    """From N(0, sigma^2) at u = 0.1 to u = 1: the exact flow, or the SDE's moments through a finer plan."""
    steps, errors, mean, std = [64, 128, 256, 512], [], 0.3, 0.4
    options: dict[str, Any] = {"method": method, "t_start": 0.9, "final": "min", "prediction": prediction}
    finest = gaussian_map(solvers.bfn_solver(C, 8192, **options), mean, std)
    for n in steps:
        plan = solvers.bfn_solver(C, n, **options)
        got = gaussian_map(plan, mean, std)
        want = finest if "sde" in method else (*exact_gaussian_flow(plan, mean, std), 0.0)
        errors.append(np.abs(np.subtract(got, want)).max())
    assert slope(steps, errors) == pytest.approx(2 if method.endswith("2") else 1, abs=0.2)


@pytest.mark.parametrize("method", ["sde_bfn_solver1", "sde_bfn_solver2"])
def test_the_sde_solvers_are_the_bayesian_update_for_a_constant_prediction(method: str) -> None:
    plan, update = solvers.bfn_solver(D, 9, method=method), solvers.bfn_discrete(D, 9, readout="mean")
    np.testing.assert_allclose(plan.b[:, 0] + plan.A[:, 0, 1:].sum(1), update.b[:, 0], rtol=1e-12)
    np.testing.assert_allclose(plan.s[:, 0], update.s[:, 0], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [C, D, B], ids=["continuous", "K=27", "K=2"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(method: str, schedule: S.Schedule, steps: int) -> None:
    for start in range(steps + 1):
        plan = solvers.bfn_solver(schedule, steps, method=method, start=start)
        assert plan.nfe == steps + 1 - start - (start == 0 and schedule is C)
        assert np.isfinite(plan.A).all() and plan.end == (1.0, 0.0) and plan.times[-1] == 1


@pytest.mark.parametrize("schedule", [C, D], ids=["continuous", "classes"])
def test_start_skips_intervals(schedule: S.Schedule) -> None:
    solve = solvers.bfn_discrete if schedule is D else solvers.bfn_continuous
    full, part = solve(schedule, 8), solve(schedule, 8, start=3)
    offset = full.nfe - part.nfe
    for name in ("times", "A", "b", "s", "alpha"):
        np.testing.assert_allclose(getattr(part, name), getattr(full, name)[offset:], rtol=1e-14)
    assert part.init_scale == pytest.approx(float(schedule.sigma(5 / 8)), rel=1e-14)


def test_plans_say_what_they_read_out() -> None:
    assert "27 classes: p = one-hot(k), k ~ Categorical(softmax(m)); the model sees 2 softmax(S0) - 1" in str(
        solvers.bfn_discrete(D, 3)
    )
    text = str(solvers.bfn_solver(B, 3, last_readout="argmax"))
    assert "p = 2 sigmoid(m) - 1; last row: p = sign(m); the model sees 2 sigmoid(S0) - 1" in text
    assert "256 bins" in str(solvers.bfn_discretised(C, 3)) and "classes" not in str(solvers.bfn_continuous(C, 3))


def test_bytes_per_element() -> None:
    """State in and out, logits, next input: 12 bytes in bf16 from the second row on; the last has no next input.

    Guided, there are two outputs and two copies of the input.
    """
    plan = solvers.bfn_discrete(D, 4)
    np.testing.assert_array_equal(plan.bytes_per_element(model_bytes=2), [8, 12, 12, 12, 6])
    np.testing.assert_array_equal(plan.bytes_per_element(model_bytes=2, guided=True), [12, 16, 16, 16, 8])
    bins = solvers.bfn_discretised(C, 3)  # readout: x, two planes, p; step: x, p, x'; the last row reads p alone
    np.testing.assert_array_equal(bins.bytes_per_element(model_bytes=2), [24, 24, 20])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: solvers.bfn_continuous(D, 3), TypeError, "needs a schedule of type BFNContinuous, got BFNDiscrete"),
        (lambda: solvers.bfn_discrete(C, 3), TypeError, "needs a schedule of type BFNDiscrete, got BFNContinuous"),
        (lambda: solvers.bfn_discretised(D, 3), TypeError, "needs a schedule of type BFNContinuous"),
        (lambda: solvers.bfn_solver(S.VP(), 3), TypeError, "BFNContinuous or BFNDiscrete, got VP"),
        (lambda: solvers.bfn_continuous(C, 0), ValueError, "steps must be >= 1, got 0"),
        (lambda: solvers.bfn_discrete(D, 0), ValueError, "steps must be >= 1, got 0"),
        (lambda: solvers.bfn_discrete(D, 2.5), TypeError, "steps must be an integer"),  # type: ignore[arg-type]
        (lambda: solvers.bfn_continuous(C, 3, start=4), ValueError, "start must be <= 3"),
        (lambda: solvers.bfn_continuous(C, 3, clip=(1, -1)), ValueError, "lo < hi"),
        (lambda: solvers.bfn_discrete(D, 3, readout="best"), ValueError, "valid: sample, argmax, mean"),
        (lambda: solvers.bfn_discretised(C, 3, bins=1), ValueError, "bins must be >= 2, got 1"),
        (lambda: solvers.bfn_discretised(C, 3, readout="mean"), ValueError, "valid: binned, binned_mean"),
        (lambda: solvers.bfn_discretised(C, 3, prediction="v"), ValueError, "must be eps or x0"),
        (lambda: solvers.bfn_solver(C, 3, method="rk4"), ValueError, "unknown method 'rk4'; valid: sde_euler"),
        (lambda: solvers.bfn_solver(C, 3, readout="sample"), ValueError, "belong to BFNDiscrete"),
        (lambda: solvers.bfn_solver(C, 3, spacing="karras"), TypeError, "grid of its own"),
        (lambda: solvers.bfn_solver(C, 3, t_end=0.1), TypeError, "grid of its own, .* no t_end"),
        (lambda: solvers.bfn_solver(D, 3, clip=(-1, 1)), TypeError, "unknown option 'clip' for classes"),
        (lambda: solvers.bfn_solver(D, 3, last_readout="mean"), ValueError, "valid: sample, argmax"),
        (lambda: solvers.bfn_solver(D, 3, t_start=0.0), ValueError, r"t_start must be in \(0, 1\]"),
        (lambda: solvers.bfn_solver(D, 3, t_start=1.5), ValueError, r"t_start must be in \(0, 1\]"),
    ],
)
def test_bad_input(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]
