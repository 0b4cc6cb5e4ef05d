"""The density of a sampler's step, against the sampler's own noise, torch's distributions and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import rng, solvers, training
from fastdiff import schedules as S

SHAPE = (3, 4, 5)
CHAIN = S.Betas(S.linear_betas(100))
PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 10, clip=(-1, 1)),
    "ddim": solvers.ddim(CHAIN, 10, eta=0.7, prediction="v"),
    "kept_eps": solvers.ddim(CHAIN, 10, eta=0.7, clip=(-0.5, 0.5), use_clipped_model_output=False),
    "euler_ancestral": solvers.euler_ancestral(S.EDM(0.02, 10.0), 10, prediction="edm"),
    "euler_maruyama": solvers.euler_maruyama(S.VP(), 10, prediction="score"),
    "flow_grpo": solvers.euler_maruyama(S.Flow(), 10, prediction="flow", eta=0.7 / math.sqrt(2), t_start=0.95),
    "lcm": solvers.lcm(CHAIN, 4, prediction="x0"),
    "bfn_continuous": solvers.bfn_continuous(S.BFNContinuous(0.02), 10),
}


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.1 * x


def outputs(plan: fd.Plan, x: Tensor) -> list[Tensor]:
    """What the model returned in every row of a trajectory."""
    times = torch.from_numpy(plan.times.copy())
    return [network(plan.c_in[k] * x[k], times[k]) for k in range(plan.nfe)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_residuals_are_the_noise_that_was_drawn(plan: fd.Plan) -> None:
    """(x' - mean) / std is the Philox normal of the row, and the density that of torch's Normal."""
    _, seen = fd.sample(network, plan, SHAPE, seed=5, trajectory=True)
    seeds, index = torch.full((3,), 5), torch.arange(3)
    noisy = [k for k in range(plan.nfe) if plan.s[k, 0] != 0]
    assert noisy
    for k, m in enumerate(outputs(plan, seen.x)):
        mean, std = training.transition(plan, k, seen.x[k], m)
        assert std.tolist() == pytest.approx([plan.s[k, 0]] * 3, rel=1e-6)
        if k not in noisy:
            torch.testing.assert_close(mean, seen.x[k + 1], rtol=1e-5, atol=1e-5)
            continue
        drawn = rng.normal(seeds, SHAPE[1:], row=k, stream=rng.ROWS, index=index)
        off = (seen.x[k + 1] - mean) / std.view(-1, 1, 1)
        scale = float(seen.x[k + 1].abs().max()) / float(std[0])  # of fp32's rounding of the state
        torch.testing.assert_close(off, drawn, rtol=1e-5, atol=1e-5 + 2e-7 * scale)
        got = training.transition_log_prob(plan, k, seen.x[k], m, seen.x[k + 1])
        normal = torch.distributions.Normal(mean.double(), std.double().view(-1, 1, 1))
        want = normal.log_prob(seen.x[k + 1].double()).sum((1, 2))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def test_rows_of_a_tensor_are_rows_one_by_one() -> None:
    plan, (x, m, y) = PLANS["ddpm"], torch.randn(3, *SHAPE)
    k = torch.tensor([7, 0, 3])
    mean, std = training.transition(plan, k, x, m)
    got = training.transition_log_prob(plan, k, x, m, y)
    for b, row in enumerate(k.tolist()):
        one = slice(b, b + 1)
        alone, of = training.transition(plan, row, x[one], m[one])
        assert torch.equal(mean[one], alone) and torch.equal(std[one], of)
        torch.testing.assert_close(got[one], training.transition_log_prob(plan, row, x[one], m[one], y[one]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_is_the_papers_step(shift: float) -> None:
    """x + (v + s^2 / 2t (x + (1 - t) v)) dt + s sqrt(|dt|) n, s = a sqrt(t / (1 - t)), at a shift's own levels."""
    a, t = 0.7, np.linspace(0.95, 0.05, 10)
    t = shift * t / (1 + (shift - 1) * t)
    plan = solvers.euler_maruyama(S.Flow(), 10, prediction="flow", eta=a / math.sqrt(2), sigmas=t)
    x, v = torch.randn(2, *SHAPE, dtype=torch.float64)
    np.testing.assert_allclose(plan.times, t, rtol=1e-12)
    for k in range(plan.nfe - 1):
        dt, s2 = t[k + 1] - t[k], a * a * t[k] / (1 - t[k])
        mean, std = training.transition(plan, k, x, v)
        want = x + (v + s2 / (2 * t[k]) * (x + (1 - t[k]) * v)) * dt
        torch.testing.assert_close(mean, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(std, math.sqrt(-s2 * dt), rtol=1e-6)
    with pytest.raises(ValueError, match="row 9 of euler_maruyama"):
        training.transition_log_prob(plan, 9, x, v, x)


def test_gradients() -> None:
    """d/dm ln p = d (x' - mean) / std^2, and autograd's against finite differences in every argument."""
    plan, k = PLANS["flow_grpo"], 4
    x, m, y = (v.requires_grad_() for v in torch.randn(3, 2, 3, dtype=torch.float64).unbind())
    assert torch.autograd.gradcheck(lambda *args: training.transition_log_prob(plan, k, args[0], args[1], args[2]),
                                    (x, m, y))  # fmt: skip
    mean, std = training.transition(plan, k, x, m)
    (got,) = torch.autograd.grad(training.transition_log_prob(plan, k, x, m, y).sum(), m)
    pull = (plan.d + plan.b * plan.c_out[:, None])[k, 0]
    torch.testing.assert_close(got, (pull * (y - mean) / std.view(-1, 1) ** 2).detach(), rtol=1e-6, atol=1e-9)


def test_ratios_keep_their_digits() -> None:
    """A small change of the model's output in a large sample: the ratio's logarithm; fp32 sums would end at 0.125."""
    plan, k, n = PLANS["euler_maruyama"], 3, 1 << 20
    x, m, noise = torch.randn(3, 1, n, generator=torch.Generator().manual_seed(1))
    mean, std = training.transition(plan, k, x, m)
    y = mean + std * noise
    before, after = (training.transition_log_prob(plan, k, x, m + e, y) for e in (0.0, 1e-3))
    change = float(plan.d[k, 0] + plan.b[k, 0] * plan.c_out[k]) * 1e-3 / float(plan.s[k, 0])
    r = (y.double() - mean.double()) / std.double()
    assert float(after - before) == pytest.approx(float(change * r.sum() - n * change**2 / 2), abs=1e-3)


def test_a_mean_ratio_is_one() -> None:
    """E[p_new / p_old] = 1 over the old steps: 20000 of them, to five standard errors."""
    plan, k, count = PLANS["flow_grpo"], 5, 20_000
    x = torch.randn(1, 2).expand(count, 2)
    m, new = torch.zeros(count, 2), torch.full((count, 2), 0.3)
    mean, std = training.transition(plan, k, x, m)
    y = mean + std[:, None] * torch.randn(count, 2, generator=torch.Generator().manual_seed(3))
    ratio = (training.transition_log_prob(plan, k, x, new, y) - training.transition_log_prob(plan, k, x, m, y)).exp()
    assert ratio.std() > 0.05
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / math.sqrt(count))


def test_a_policy_gradient_is_the_derivative_of_the_mean_reward() -> None:
    """A model that returns theta: E[x] before the last row is affine in theta, its slope in the table."""
    plan, count = PLANS["flow_grpo"], 40_000
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    _, seen = fd.sample(lambda x, t: torch.full_like(x, 0.4), plan, (count, 1), seed=1, trajectory=True)
    reward = seen.x[-2, :, 0].double()
    each = torch.zeros(count, dtype=torch.float64)
    slope = 0.0
    for k in range(plan.nfe - 1):
        m = theta.expand(count, 1)
        score = training.transition_log_prob(plan, k, seen.x[k], m, seen.x[k + 1])
        mean, std = training.transition(plan, k, seen.x[k], m)
        pull = float((plan.d + plan.b * plan.c_out[:, None])[k, 0])
        each += (pull * (seen.x[k + 1] - mean) / std[:, None] ** 2)[:, 0].detach()
        slope = float((plan.A[:, 0, 0] + plan.b[:, 0] * plan.c_skip)[k]) * slope + pull
        ((reward - reward.mean()) * score).mean().backward()
    error = float(((reward - reward.mean()) * each).std()) / math.sqrt(count)
    assert theta.grad is not None
    assert float(theta.grad) == pytest.approx(slope, abs=5 * error)
    assert 5 * error < 0.1 * abs(slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    plan, (x, m) = PLANS["ddim"], torch.randn(2, *SHAPE)
    mean, std = training.transition(plan, 2, x, m.to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == std.dtype == wide and mean.shape == SHAPE and std.shape == (3,)
    assert training.transition_log_prob(plan, 2, x, m.to(dtype), x).dtype == torch.float64
    assert training.transition_log_prob(plan, 2, x[:0], m[:0].to(dtype), x[:0]).shape == (0,)


def test_a_deviation_is_not_the_plans_table() -> None:
    plan, x = solvers.ddpm(CHAIN, 5), torch.randn(1, 4)
    want = fd.sample(network, plan, (1, 4), seed=0)
    training.transition(plan, 1, x, x)[1].clamp_(min=2.0)
    assert torch.equal(fd.sample(network, plan, (1, 4), seed=0), want)


def test_rows_and_states_of_other_kinds() -> None:
    """NumPy's integers, states of one number a sample, a plan of negative s; under vmap, k a sample."""
    plan, (x, m, y) = PLANS["ddim"], torch.randn(3, 3)
    want = training.transition_log_prob(plan, 2, x[:, None], m[:, None], y[:, None])
    assert torch.equal(training.transition_log_prob(plan, np.int64(2), x, m, y), want)
    turned = replace(plan, s=-plan.s)
    assert torch.equal(training.transition_log_prob(turned, 2, x, m, y), want)
    k = torch.tensor([2, 9, 10])

    def one(k: Tensor, x: Tensor, m: Tensor, y: Tensor) -> Tensor:
        return training.transition_log_prob(plan, k[None], x[None], m[None], y[None])[0]

    got = torch.func.vmap(one)(k, x, m, y)
    torch.testing.assert_close(got[0], want[0])
    assert got[1:].isnan().all()  # no noise, and outside


@pytest.mark.compiled
def test_inside_compiled_code() -> None:
    plan, (x, m, y) = PLANS["ddpm"], torch.randn(3, *SHAPE)
    k = torch.tensor([1, 4, 2])

    def both(m: Tensor) -> Tensor:
        return training.transition_log_prob(plan, k, x, m, y) + training.transition_log_prob(plan, 3, x, m, y)

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(m), both(m), rtol=1e-6, atol=1e-4)


X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: training.transition(solvers.dpmpp_2m_sde(CHAIN, 5), 0, X, X), ValueError, "one slot, dpmpp_2m_sde"),
        (lambda: training.transition(solvers.ddpm(CHAIN, 5, variance="learned_range"), 0, X, X), ValueError,
         "learns its variance"),
        (lambda: training.transition(solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4), 0, X, X), ValueError,
         "reads out classes or bins"),
        (lambda: training.transition(PLANS["ddpm"], 10, X, X), ValueError, r"row 0\.\.9 of ddpm.*got 10"),
        (lambda: training.transition(PLANS["ddpm"], -1, X, X), ValueError, r"row 0\.\.9"),
        (lambda: training.transition(PLANS["ddpm"], 1.0, X, X), TypeError, "an integer or an int64 tensor"),
        (lambda: training.transition(PLANS["ddpm"], True, X, X), TypeError, "got bool"),
        (lambda: training.transition("ddpm", 0, X, X), TypeError, "must be a fastdiff.Plan"),
        (lambda: training.transition_log_prob(PLANS["ddpm"], 0, X, X, X.long()), TypeError, "x_next must be float32"),
        (lambda: training.transition(PLANS["ddpm"], torch.tensor([0, 1, 10]), X, X), ValueError,
         r"0\.\.9.*got 0\.\.10"),
        (lambda: training.transition(PLANS["ddpm"], torch.tensor([0]), X, X), ValueError, "k must have shape"),
        (lambda: training.transition(PLANS["ddpm"], torch.zeros(3), X, X), TypeError, "k must be int64"),
        (lambda: training.transition(PLANS["ddpm"], 0, X, X[:2]), ValueError, "model_out must have shape"),
        (lambda: training.transition(PLANS["ddpm"], 0, X.long(), X), TypeError, "x must be float32"),
        (lambda: training.transition_log_prob(PLANS["ddpm"], 0, X, X, X[0]), ValueError, "x_next must have shape"),
        (lambda: training.transition_log_prob(PLANS["ddpm"], torch.tensor([0, 9, 1]), X, X, X), ValueError,
         r"row 9 of ddpm\(.*adds no noise"),
    ],
)  # fmt: skip
def test_errors(call: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()  # type: ignore[operator]
