"""Sampling classes: the paper's algorithm in float64, exact distributions, every option of the sampler."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.cli import main
from fastdiff.reference import reference_sample
from tests.bfn_oracle import chi_square, discrete_sample, one_hot, philox_numbers, posterior_logits
from tests.replay import device_path  # noqa: F401 - a fixture

SHAPE = (5, 2, 3)


def network(x: Tensor, t: Tensor | float, shift: Tensor | float = 0.0) -> Tensor:
    """Some smooth elementwise network: any logits will do."""
    time = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) if isinstance(t, Tensor) else t
    steer = shift.view(-1, *[1] * (x.dim() - 1)) if isinstance(shift, Tensor) else shift
    ramp = torch.arange(x.shape[-1], dtype=x.dtype) / x.shape[-1]
    return 3 * torch.sin(2 * x + time + 4 * ramp) + steer * ramp


@pytest.mark.parametrize("K", [3, 5, 27])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_equals_the_papers_algorithm(K: int, steps: int, device: torch.device) -> None:
    """The same Philox numbers in theta space and float64 give the same classes, token by token."""
    gumbel, noise = philox_numbers(7, SHAPE, K)
    want = discrete_sample(network, SHAPE, K, 1.5, steps, gumbel, noise)
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, K), steps)
    got, seen = fd.sample(network, plan, SHAPE, seed=7, trajectory=True)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    z = reference_sample(
        network, plan, torch.zeros(*SHAPE, K, dtype=torch.float64), lambda row, like: noise(row),
        gumbel=lambda row, like: gumbel(row),
    )  # fmt: skip
    assert torch.equal(z, want)
    assert torch.equal(seen.x0[-1], got) and seen.x.shape == (steps + 2, *SHAPE, K)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_two_classes_are_the_difference_of_two_logits(steps: int) -> None:
    """One channel, d = z_1 - z_0, against the paper's two: noise n_1 - n_0 and Gumbel g_1 - g_0 of the same numbers."""
    gumbel, noise = philox_numbers(3, SHAPE, 2)
    want = discrete_sample(
        lambda x, t: torch.stack([torch.zeros_like(x[..., 1]), network(x[..., 1:], t)[..., 0]], -1), SHAPE, 2, 2.0,
        steps, gumbel, noise,
    )  # fmt: skip
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 2), steps)

    def difference(draw: Any) -> Any:
        return lambda row, like: draw(row)[..., 1:] - draw(row)[..., :1]

    got = reference_sample(
        network, plan, torch.zeros(*SHAPE, 1, dtype=torch.float64),
        lambda row, like: difference(noise)(row, like) / 2**0.5, gumbel=difference(gumbel),
    )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("K", [2, 3, 27, 256])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_exact_posterior_gives_the_exact_distribution_for_every_n(K: int, steps: int) -> None:
    """readout sample: every step is exact Bayes, so the classes have the prior's distribution (chi-square, 4 sd)."""
    pi = 1.0 / np.arange(1, K + 1)
    pi /= pi.sum()
    plan = solvers.bfn_discrete(S.BFNDiscrete(3.0 if K < 256 else 1.0, K), steps)
    tokens = (2000, 40) if K < 256 else (500, 60)
    x = fd.sample(posterior_logits(torch.from_numpy(pi)), plan, tokens, seed=11)
    assert abs(chi_square(x, pi)) < 4
    wrong = np.roll(pi, 1)
    assert chi_square(x, wrong) > 100  # the test can fail


def test_argmax_and_mean_are_not_exact_at_one_step() -> None:
    pi = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for solver, options in ((solvers.bfn_discrete, {"readout": "argmax"}), (solvers.bfn_solver, {})):
        plan = solver(S.BFNDiscrete(3.0, 3), 1, **options)
        x = fd.sample(posterior_logits(pi), plan, (2000, 20), seed=1)
        assert abs(chi_square(x, pi.numpy())) > 100


@pytest.mark.parametrize("K", [2, 27])
def test_mean_solvers_approach_the_distribution(K: int) -> None:
    pi = 1.0 / np.arange(1, K + 1)
    pi /= pi.sum()
    for method in ("sde_bfn_solver1", "sde_bfn_solver2", "bfn_solver1", "bfn_solver2", "ode_euler", "sde_euler"):
        plan = solvers.bfn_solver(S.BFNDiscrete(2.0, K), 60, method=method)
        x = fd.sample(posterior_logits(torch.from_numpy(pi)), plan, (400, 25), seed=2)
        shares = np.bincount(x.flatten(), minlength=K) / x.numel()
        assert np.abs(shares - pi).sum() / 2 < 0.03  # total variation: order 1 leaves 0.02, counting 0.01


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("make", [solvers.bfn_discrete, solvers.bfn_solver])
def test_a_sample_does_not_depend_on_its_batch(K: int, make: Any) -> None:
    plan = make(S.BFNDiscrete(2.0, K), 6)
    whole, kept = fd.sample(network, plan, (6, 7), seed=4, trajectory=True)
    for i in range(6):
        alone, one = fd.sample(network, plan, (1, 7), seed=4, first=i, trajectory=True)
        assert torch.equal(alone[0], whole[i]) and torch.equal(one.x[:, 0], kept.x[:, i])
    listed = fd.sample(network, plan, (2, 7), seeds=[9, 4])
    assert torch.equal(listed[1], whole[0]) and torch.equal(listed[:1], fd.sample(network, plan, (1, 7), seed=9))


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("name", ["bfn_discrete", "bfn_solver"])
@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph", "auto"])
def test_modes(K: int, name: str, mode: str, request: pytest.FixtureRequest) -> None:
    plan = getattr(solvers, name)(S.BFNDiscrete(2.0, K), 6)
    want = [fd.sample(network, plan, SHAPE, seed=s) for s in (3, 4)]
    request.getfixturevalue("device_path")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sampler = fd.Sampler(network, plan, mode=mode)
        got = [sampler(SHAPE, seed=s) for s in (3, 4, 3)]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[2], got[0])


@pytest.mark.parametrize("mode", ["eager", "step_graph"])
@pytest.mark.parametrize("name", ["bfn_discrete", "bfn_solver"])
def test_torch_noise(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    """A row draws its Gumbel numbers, then its normals, from the generator; a graph's replays do so too."""
    plan = getattr(solvers, name)(S.BFNDiscrete(2.0, 5), 4)
    want = fd.sample(network, plan, SHAPE, noise="torch", generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    drawn: dict[int, tuple[Tensor, Tensor]] = {}
    for row in range(plan.nfe):
        sampled = (plan.readout if row < plan.nfe - 1 else plan.last_readout) == "sample"
        gumbel = -torch.empty(*SHAPE, 5).exponential_(generator=g).log() if sampled else torch.zeros(())
        normal = torch.empty(*SHAPE, 5).normal_(generator=g) if plan.draws[row] else torch.zeros(())
        drawn[row] = (gumbel, normal)
    by_hand = reference_sample(
        network, plan, torch.zeros(*SHAPE, 5, dtype=torch.float64), lambda row, like: drawn[row][1].double(),
        gumbel=lambda row, like: drawn[row][0].double(),
    )  # fmt: skip
    assert torch.equal(want, by_hand)
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(network, plan, mode=mode)
    for _ in range(2):
        assert torch.equal(sampler(SHAPE, noise="torch", generator=torch.Generator().manual_seed(5)), want)
    listed = [torch.Generator().manual_seed(5 + i) for i in range(5)]
    several = fd.sample(network, plan, SHAPE, noise="torch", generator=listed)
    alone = fd.sample(network, plan, (1, *SHAPE[1:]), noise="torch", generator=torch.Generator().manual_seed(7))
    assert torch.equal(several[2:3], alone)


def test_noise_functions_replace_the_normals_only() -> None:
    plan, calls = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4), []

    def noise(row: int, like: Tensor) -> Tensor:
        calls.append((row, tuple(like.shape)))
        return philox_numbers(8, SHAPE, 5)[1](row).float()

    got = fd.sample(network, plan, SHAPE, seed=8, noise=noise)
    assert calls == [(row, (*SHAPE, 5)) for row in range(4)]
    assert torch.equal(got, fd.sample(network, plan, SHAPE, seed=8))


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_acts_on_the_logits(K: int, batched: bool) -> None:
    """m = u + w (c - u) is the network at the blended shift, since the shift is added to the logits."""
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, K), 5)
    cond, uncond = ({"shift": torch.full((5,), v)} for v in (1.0, 0.25))
    got = fd.sample(network, plan, SHAPE, seed=6, cond=cond, uncond=uncond, guidance=3.0, batched_guidance=batched)
    want = fd.sample(network, plan, SHAPE, seed=6, cond={"shift": torch.full((5,), 0.25 + 3 * 0.75)})
    assert (got == want).float().mean() > 0.99
    per_row = fd.sample(
        network, plan, SHAPE, seed=6, cond=cond, uncond=uncond, guidance=np.full((6, 1), 3.0), batched_guidance=batched
    )
    assert torch.equal(per_row, got)


def test_callbacks_see_logits_and_classes() -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 3)
    seen: list[tuple[int, tuple[int, ...], torch.dtype]] = []

    def watch(row: int, t: Tensor, z: Tensor, classes: Tensor) -> None:
        seen.append((row, tuple(z.shape), classes.dtype))

    plain = fd.sample(network, plan, SHAPE, seed=2)
    assert torch.equal(fd.sample(network, plan, SHAPE, seed=2, callback=watch), plain)
    assert seen == [(row, (*SHAPE, 5), torch.int64) for row in range(4)]
    # a callback that makes every token class 3 for certain: an identity network keeps it
    forced = fd.sample(
        lambda x, t: 50 * x, plan, SHAPE, callback=lambda row, t, z, k: 100 * one_hot(torch.full(SHAPE, 3), 5).float()
    )
    assert (forced == 3).all()


@pytest.mark.parametrize("K", [2, 5])
def test_starting_from_classes(K: int) -> None:
    """z at the start is alpha onehot(x) + sigma n: at the last interval of a sharp flow nothing is left to decide."""
    plan = solvers.bfn_discrete(S.BFNDiscrete(40.0, K), 8, start=7)
    x = torch.randint(0, K, SHAPE, generator=torch.Generator().manual_seed(0))
    y, seen = fd.sample(posterior_logits(torch.full((K,), 1 / K)), plan, SHAPE, x_init=x, seed=1, trajectory=True)
    assert torch.equal(y, x)
    seeds, width = torch.full((5,), 1), 1 if K == 2 else K
    n = fd.rng.normal(seeds, (*SHAPE[1:], width), stream=0, index=torch.arange(5))
    data = (2.0 * x - 1)[..., None] if K == 2 else one_hot(x, K).float()
    torch.testing.assert_close(seen.x[0], plan.init_scale * n + plan.alpha[0] * data, rtol=1e-6, atol=1e-5)
    z = fd.sample(network, plan, SHAPE, x_T=seen.x[0], seed=1)
    assert torch.equal(z, fd.sample(network, plan, SHAPE, x_init=x, seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    def low(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype and t.dtype == torch.float32
        return network(x.float(), t).to(dtype)

    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 27), 6)
    got, want = (fd.sample(m, plan, (16, 30), seed=2, dtype=d) for m, d in ((low, dtype), (network, torch.float32)))
    assert (got == want).float().mean() > 0.9


def test_times_are_the_flows_own() -> None:
    for K in (2, 5):
        times: list[float] = []

        def model(x: Tensor, t: Tensor, times: list[float] = times, K: int = K) -> Tensor:
            if not times:  # theta is uniform
                torch.testing.assert_close(x, torch.full_like(x, 2 / K - 1), rtol=0, atol=1e-7)
            times.append(t[0].item())
            return x

        fd.sample(model, solvers.bfn_discrete(S.BFNDiscrete(2.0, K), 4), (1, 2))
        np.testing.assert_allclose(times, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_continuous_sampling_is_the_papers_algorithm(prediction: str) -> None:
    """Algorithm 3 in mu and rho, float64, with the sampler's normals: the start's where the row at u = 0 is folded."""
    schedule, n, seeds = S.BFNContinuous(0.02), 8, torch.full((4,), 5)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x + t.view(-1, 1).to(x.dtype))

    def draw(stream: int, row: int) -> Tensor:
        return fd.rng.normal(seeds, (3,), row=row, stream=stream, index=torch.arange(4)).double()

    mu, rho = torch.zeros(4, 3, dtype=torch.float64), 1.0
    for i in range(1, n + 2):
        t = torch.full((4,), (i - 1) / n, dtype=torch.float64)
        m, gamma = network(mu, t), 1 - 0.02 ** (2 * (i - 1) / n)
        p = m
        if prediction == "eps":
            p = mu / gamma - np.sqrt((1 - gamma) / gamma) * m if i > 1 else torch.zeros_like(mu)
        p = p.clamp(-1, 1)
        if i <= n:
            a = 0.02 ** (-2 * i / n) * (1 - 0.02 ** (2 / n))
            noise = (draw(0, 0) if i == 1 else draw(1, i - 2)) if prediction == "eps" else draw(1, i - 1)
            mu, rho = (rho * mu + a * (p + noise / np.sqrt(a))) / (rho + a), rho + a
    plan = solvers.bfn_continuous(schedule, n, prediction=prediction, clip=(-1, 1))
    got = fd.sample(network, plan, (4, 3), seed=5)
    torch.testing.assert_close(got.double(), p, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_quarter_of_a_million_classes(steps: int) -> None:
    """K = 262,144, beta_1 = 16, bf16: the paper's exp(y) overflows at K beta_1 > 88; logits do not."""
    K, worst = 262_144, []

    def model(x: Tensor, t: Tensor) -> Tensor:
        worst.append(x.isfinite().all())
        return 20 * x

    plan = solvers.bfn_discrete(S.BFNDiscrete(16.0, K), steps)
    y, seen = fd.sample(model, plan, (1, 2), dtype=torch.bfloat16, trajectory=True, check_finite="raise")
    assert all(worst) and seen.x.isfinite().all() and y.shape == (1, 2) and (y >= 0).all() and (y < K).all()


def test_check_finite_and_forbidden_classes() -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4)

    def forbid(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.arange(5) == 2, -torch.inf, network(x, t))

    assert (fd.sample(forbid, plan, (50, 4), check_finite="raise") != 2).all()
    shifts = {"cond": {"shift": torch.ones(50, 1, 5)}, "uncond": {"shift": torch.zeros(50, 1, 5)}}
    guided = fd.sample(lambda x, t, shift: forbid(x, t) + shift, plan, (50, 4), guidance=3.0, **shifts)
    assert (guided != 2).all()

    def bad(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1, 1) > 0.4, torch.nan, network(x, t))

    with pytest.raises(ValueError, match="first at row 2 of 5"):
        fd.sample(bad, plan, SHAPE, check_finite="raise")


def test_empty() -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4)
    assert fd.sample(network, plan, (0, 4)).dtype == torch.int64
    x, seen = fd.sample(network, plan, (2, 0), trajectory=True)
    assert x.shape == (2, 0) and seen.x.shape == (6, 2, 0, 5) and seen.x0.shape == (5, 2, 0)


def test_a_corrector_needs_a_score() -> None:
    with pytest.raises(ValueError, match="reads its prediction out of 5 classes or bins: no score"):
        fd.predictor_corrector(network, PLAN, SHAPE)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("def model(x, t):\n    return 4 * x\n")
    plan = ["--solver", "bfn_discrete", "--schedule", "bfndiscrete:beta_1=3,num_classes=5", "--steps", "6"]
    where = ["--model", f"{tmp_path}/model.py:model", "--shape", "4,3", "--out", str(tmp_path / "x.npy")]
    assert main(["sample", *plan, *where, "--seed", "2"]) == 0
    assert "(4, 3) int64, bfn_discrete(sample), 7 evaluations" in capsys.readouterr().out
    x = np.load(tmp_path / "x.npy")
    want = fd.sample(lambda x, t: 4 * x, solvers.bfn_discrete(S.BFNDiscrete(3, 5), 6), (4, 3), seed=2)
    np.testing.assert_array_equal(x, want)
    assert main(["plan", "bfn_discrete", "--schedule", "vp", "--steps", "3"]) == 2
    assert "needs a schedule of type BFNDiscrete, got VP" in capsys.readouterr().err


PLAN = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4)


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (network, {"shape": (4,)}, ValueError, r"shape must be \(B, \*D\)"),
        (lambda x, t: x[..., :3], {}, ValueError, r"must return the shape of its input, \(5, 2, 3, 5\), got"),
        (network, {"out_dtype": torch.float32}, TypeError, "gives classes, int64"),
        (network, {"threshold": (0.9, 1.0)}, ValueError, "no threshold"),
        (network, {"guide": "apg", "uncond": {}, "guidance": 2.0}, ValueError, "guide='cfg' only"),
        (network, {"x_init": torch.zeros(SHAPE)}, TypeError, "x_init must be classes, an int64 Tensor"),
        (network, {"x_init": torch.full(SHAPE, 5), "start": 1}, ValueError, r"x_init must be in 0\.\.4, got 5\.\.5"),
        (network, {"x_init": torch.full(SHAPE, -1), "start": 1}, ValueError, r"x_init must be in 0\.\.4, got -1"),
        (network, {"x_init": torch.zeros(SHAPE).long()}, ValueError, "x_init is lost .* build it with start=k"),
        (network, {"x_init": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "x_init must have the shape"),
        (network, {"x_T": torch.zeros(SHAPE)}, ValueError, r"x_T must have the shape .*\(5, 2, 3, 5\)"),
        (network, {"callback": lambda *a: torch.zeros(SHAPE)}, ValueError, r"state of shape \(5, 2, 3, 5\)"),
    ],
)
def test_bad_input(model: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    shape = options.pop("shape", SHAPE)
    plan = solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4, start=options.pop("start", 0))
    with pytest.raises(error, match=text):
        fd.sample(model, plan, shape, **options)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"readout": "best"}, "unknown readout 'best'; valid: affine, sample"),
        ({"classes": 1}, "needs at least 2 classes, got 1"),
        ({"readout": "affine", "last_readout": "affine"}, "an affine plan has no classes"),
        ({"last_readout": "mean"}, "last_readout must be sample or argmax, got 'mean'"),
        ({"c_out": np.full(5, 2.0)}, "returns logits: c_skip 0, c_out 1"),
        ({"d": np.ones((5, 1))}, "gives p only; d must be 0"),
        ({"hi": np.ones(5)}, "is not clamped"),
        ({"A": np.ones((5, 1, 1))}, "last row of readout 'sample' must be S0 = p"),
    ],
)
def test_bad_plans(changes: dict[str, Any], text: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=text):
        replace(PLAN, **changes)
