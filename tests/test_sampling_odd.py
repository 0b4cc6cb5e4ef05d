"""What models, callbacks and noise functions do to tensors that are not theirs, and grids at a schedule's ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import rng, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample

VP = S.VP()
CHAIN = S.Betas(S.linear_betas(1000))
ZERO_SNR = S.Betas(S.zero_terminal_snr(S.scaled_linear_betas(1000)))
FLOW = S.BFNContinuous(0.05)
PLAN = solvers.ddpm(VP, 3)


def model(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    return 0.3 * x


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", [PLAN, solvers.heun(CHAIN, 2)], ids=["real times", "integer times"])
@pytest.mark.parametrize(
    "options", [{}, {"cond": {}, "uncond": {}, "guidance": 2.0, "batched_guidance": False}], ids=["plain", "two passes"]
)
def test_a_model_that_changes_its_times_is_refused(batch: int, plan: fd.Plan, options: dict[str, Any]) -> None:
    """The second pass, and every later call, would see times that were scaled twice; what it began leaves no trace."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.cos(t).view(-1, 1)

    def scales(x: Tensor, t: Tensor) -> Tensor:
        t *= 2
        return model(x, t)

    sampler = fd.Sampler(scales, plan, **options)
    for _ in range(2):
        with pytest.raises(ValueError, match="the model changed its input x or t in place"):
            sampler((batch, 4))
    sampler.model = model
    assert torch.equal(sampler((batch, 4)), fd.sample(model, plan, (batch, 4), **options))
    with pytest.raises(ValueError, match="the model changed its input x or t in place"):
        fd.predictor_corrector(scales, PLAN, (batch, 4))


def test_a_model_may_scale_a_copy_of_its_times() -> None:
    """Guidance between two equal outputs is none: both passes of a row see one time."""

    def copies(x: Tensor, t: Tensor) -> Tensor:
        t = t.clone()
        t *= 1000
        return x * torch.cos(t).view(-1, 1)

    guided = fd.sample(copies, PLAN, (2, 4), cond={}, uncond={}, guidance=2.0, batched_guidance=False)
    torch.testing.assert_close(guided, fd.sample(copies, PLAN, (2, 4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("make", [lambda: PLAN, lambda: solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 3)])
def test_a_callback_sees_one_time_a_sample(batched: bool, make: Callable[[], fd.Plan]) -> None:
    """[B], guided in one batch too; and it is the callback's own."""
    plan, seen = make(), []

    def watch(row: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        seen.append(t.clone())
        t.zero_()

    sampler = fd.Sampler(model, plan, cond={}, uncond={}, guidance=2.0, batched_guidance=batched, callback=watch)
    first = sampler((3, 4))
    assert torch.equal(sampler((3, 4)), first)
    want = torch.from_numpy(np.tile(plan.times, 2)).float()[:, None].expand(-1, 3)
    torch.testing.assert_close(torch.stack(seen), want, rtol=0, atol=0)


def test_a_noise_function_that_changes_the_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise\(0, like\) changed `like` in place, which is the state"):
        fd.sample(model, PLAN, (2, 4), noise=lambda row, like: like.normal_())


def test_a_noise_function_may_return_the_state() -> None:
    """x' = A x + b p + s x, in float64."""
    seeds = torch.zeros(2, dtype=torch.int64)
    start = PLAN.init_scale * rng.normal(seeds, (4,), row=0, stream=rng.START, index=torch.arange(2)).double()
    got = fd.sample(model, PLAN, (2, 4), noise=lambda row, like: like)
    torch.testing.assert_close(
        got.double(), reference_sample(model, PLAN, start, lambda row, x: x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        (lambda x: 1.0, TypeError, "callback must return None or a Tensor, got float"),
        (lambda x: x[:1], ValueError, r"callback must return a state of shape \(2, 4\), got \(1, 4\)"),
        (lambda x: x.long(), TypeError, "callback must return a state of dtype torch.float32, got torch.int64"),
    ],
)
@pytest.mark.parametrize("sample", [fd.sample, fd.predictor_corrector])
def test_what_a_callback_must_return(
    sample: Callable[..., Tensor], changed: Callable[[Tensor], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        sample(model, PLAN, (2, 4), callback=lambda row, t, x, x0: changed(x))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"first": 1.5}, TypeError, "first must be an int, got float 1.5"),
        ({"first": True}, TypeError, "first must be an int, got bool True"),
        ({"first": torch.tensor(1.5)}, TypeError, "first must be an int, got tensor"),
        ({"first": "1"}, TypeError, "first must be an int, got str '1'"),
        ({"guidance": "3"}, TypeError, "guidance must be a number, or numbers a sample or a row, got '3'"),
        ({"guidance": True}, TypeError, "guidance must be a number, or numbers a sample or a row, got True"),
        ({"guidance": 1j}, TypeError, "guidance must be a number, or numbers a sample or a row, got 1j"),
        ({"guidance": [[1.0], [1.0, 2.0]]}, TypeError, "guidance must be a number, or numbers a sample or a row"),
        ({"guidance": 1e300}, ValueError, r"guidance must be finite in float32, got 1e\+300"),
        ({"guidance": 2.0, "batched_guidance": "no"}, TypeError, "batched_guidance must be True or False, got 'no'"),
    ],
)
def test_numbers_that_are_none(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fd.sample(model, PLAN, (2, 4), cond={}, uncond={}, **{"guidance": 2.0, **options})
    if "guidance" in options and error is TypeError and len(options) == 1:
        with pytest.raises(error, match=says):
            fd.sample(model, PLAN, (2, 4), **options)


def test_a_calls_own_seeds_take_the_place_of_a_first_sample_too() -> None:
    sampler = fd.Sampler(model, PLAN, seed=1, first=5)
    assert torch.equal(sampler((2, 4), seeds=[3, 4]), fd.sample(model, PLAN, (2, 4), seeds=[3, 4]))
    assert torch.equal(sampler((2, 4), seed=3), fd.sample(model, PLAN, (2, 4), seed=3, first=5))
    with pytest.raises(ValueError, match="first goes with seed=, not with seeds="):
        sampler((2, 4), seeds=[3, 4], first=5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prior": lambda x: -(x**2).sum(1, keepdim=True)}, r"prior must return .* shape \(3,\), got \(3, 1\)"),
        ({"prior": lambda x: 1.0}, r"prior must return a number a sample, shape \(3,\), got float"),
        ({"rtol": -1.0}, "rtol must be a finite number > 0, got -1.0"),
        ({"atol": float("nan")}, "atol must be a finite number > 0, got nan"),
        ({"seed": 1, "seeds": [1, 2, 3]}, "give either seed or seeds, got both"),
    ],
)
def test_what_a_likelihood_is_given(options: dict[str, Any], says: str) -> None:
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=says):
        fd.log_likelihood(model, VP, torch.zeros(3, 3), **{"rtol": 0.1, "atol": 0.1, **options})


@pytest.mark.parametrize(("made", "got"), [(lambda x: x[:, :1], r"\(3, 1\)"), (lambda x: (x,), "tuple")])
def test_a_probability_flow_of_a_models_other_shape(made: Callable[[Tensor], Any], got: str) -> None:
    """It would be spread over x in silence."""
    field = fd.drift(lambda x, t: made(x), VP)
    with pytest.raises(ValueError, match=rf"must return the shape of its input, \(3, 3\), got {got}"):
        field(0.5, torch.zeros(3, 3))
    with pytest.raises(TypeError, match="model must be callable"):
        fd.drift(None, VP)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [ZERO_SNR, CHAIN, VP], ids=["zero SNR", "chain", "vp"])
def test_a_corrector_on_the_way_up(schedule: S.Schedule) -> None:
    """Its step grows by (alpha_k / alpha_k+1)^2, without bound to zero signal."""
    plan = solvers.ddim_inversion(schedule, 3, prediction="v")
    with pytest.raises(
        ValueError, match="a corrector needs a plan from noise to data, 'ddim_inversion' goes the other"
    ):
        fd.predictor_corrector(model, plan, (2, 4), x_T=torch.ones(2, 4))


def test_a_guidance_interval_of_no_plan() -> None:
    with pytest.raises(TypeError, match="plan must be a fastdiff.Plan, got int"):
        fd.ops.guidance_interval(3, 2.0, 0.0, 1.0)  # type: ignore[arg-type]


@dataclass
class Text:
    embedding: Tensor


@pytest.mark.parametrize("of", [np.array, lambda v: Text(torch.tensor(v)), lambda v: [np.array(v)]])
def test_conditions_whose_equality_has_no_truth(of: Callable[[list[float]], Any]) -> None:
    """They cannot be joined, and are said to; one object given to both needs no joining."""
    one, two = of([1.0, 2.0]), of([0.0, 0.0])
    with pytest.raises(ValueError, match=r"cond\['y.*'\] and uncond\['y.*'\] cannot be joined into one batch of 2 x 2"):
        fd.sample(model, PLAN, (2, 4), cond={"y": one}, uncond={"y": two}, guidance=2.0)
    given = {"cond": {"y": one, "w": torch.ones(2, 1)}, "uncond": {"w": torch.zeros(2, 1)}}
    assert fd.sample(lambda x, t, y, w: w * x, PLAN, (2, 4), **given, guidance=2.0).shape == (2, 4)


def test_weights_in_half_precision() -> None:
    """Numbers that bfloat16 holds are those numbers."""
    options: dict[str, Any] = {"cond": {"y": torch.ones(2, 1)}, "uncond": {"y": torch.zeros(2, 1)}}

    def shifted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * x + y

    half, full = (
        fd.sample(shifted, PLAN, (2, 4), guidance=torch.tensor([2.0, 3.5], dtype=dtype), **options)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(half, full)


def variance(plan: fd.Plan) -> float:
    """Of the samples of data 0: x = S a with independent normals, of which every row's model knows x0 = 0."""
    count = plan.nfe + 2
    x = torch.zeros(1, count, dtype=torch.float64)
    x[0, :2] = torch.tensor([plan.init_scale, plan.init_noise], dtype=torch.float64)

    def normal(row: int, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([row + 2]), count).double()

    return float(reference_sample(lambda x, t: 0 * x, plan, x, normal).square().sum())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("schedule", "low"), [(CHAIN, 100), (VP, 0.1), (S.EDM(), 0.1)], ids=["chain", "vp", "edm"])
def test_churn_keeps_the_variance_of_a_point(schedule: S.Schedule, low: float, order: int) -> None:
    """All x0 are 0, where every step is exact: the samples are N(0, sigma^2) at the end, noised on the way or not."""
    plan = solvers.edm_stochastic(
        schedule, 5, s_churn=2.0, s_max=20.0, order=order, prediction="x0", final="min", t_end=low
    )
    assert plan.stochastic
    assert variance(plan) == pytest.approx(plan.end[1] ** 2, rel=1e-9)


@pytest.mark.parametrize(("schedule", "top"), [(CHAIN, 999), (ZERO_SNR, 998), (S.Betas(S.exp_betas(200)), 199)])
def test_churn_above_the_top_of_a_chain_is_refused(schedule: S.Schedule, top: int) -> None:
    """Its times end there: the model would be told less noise than there is."""
    with pytest.raises(ValueError, match="noise would lift row 0 to sigma/alpha = .*, above the top of Betas"):
        solvers.edm_stochastic(schedule, 3, s_churn=2.0, prediction="v", spacing=[top, 100, 10])


def test_levels_between_no_signal_and_a_chains_last_are_none_of_its() -> None:
    """With zero terminal SNR sigma/alpha goes from infinity to that of the time before, and nothing is between."""
    last = float(ZERO_SNR.sigma(998) / ZERO_SNR.alpha(998))
    with pytest.raises(ValueError, match="sigma/alpha = 5000 is not on the schedule"):
        solvers.euler(ZERO_SNR, 2, sigmas=[5000.0, 1.0], prediction="v")
    for sigma, time in ((last, 998), (1.005 * last, 998), (np.inf, 999)):
        assert solvers.euler(ZERO_SNR, 2, sigmas=[sigma, 1.0], prediction="v").times[0] == time


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "seeds", "tcd", "unipc"])
def test_other_solvers_on_a_bayesian_flow(name: str) -> None:
    """At u = 0 nothing is known, alpha = sigma = 0: their first step starts where something is, at the next time."""
    for final in ("zero", "min"):
        plan = getattr(solvers, name)(FLOW, 4, prediction="x0", final=final)
        assert plan.t[0] < 1 and plan.init_scale == pytest.approx(float(FLOW.sigma(plan.t[0])))
    levels = getattr(solvers, name)(FLOW, 3, prediction="x0", sigmas=[10.0, 1.0, 0.2])
    assert (levels.sigma / levels.alpha)[0] == pytest.approx(10.0)
    with pytest.raises(ValueError, match="no interval is left of the grid"):
        getattr(solvers, name)(FLOW, 1, prediction="x0")
    with pytest.raises(ValueError, match="needs finite sigma/alpha > 0 at both ends, got inf and"):
        getattr(solvers, name)(FLOW, 3, prediction="x0", spacing="karras")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: solvers.ddim(CHAIN, 3, spacing="linspace", t_start=500.5), "t_start must be .* 'linspace', got 500.5"),
        (lambda: solvers.ddim(CHAIN, 3, spacing="linspace", t_end=10.5), "t_end must be .* 'linspace', got 10.5"),
        (lambda: solvers.edm_stochastic(S.EDM(), 3, s_churn=1, s_max=np.nan), "s_max must be a number, got nan"),
        (lambda: solvers.edm_stochastic(S.EDM(), 3, s_churn=1, s_max="a"), "s_max must be a number, got 'a'"),  # type: ignore[arg-type]
        (lambda: solvers.euler_ancestral(VP, 3, eta="1"), "eta must be a finite number >= 0, got '1'"),  # type: ignore[arg-type]
        (lambda: solvers.dpm2_ancestral(VP, 3, s_noise="a"), "s_noise must be a finite number >= 0, got 'a'"),  # type: ignore[arg-type]
        (lambda: solvers.dpmpp_sde(VP, 3, r="a"), r"r must be in \(0, 1\], got 'a'"),  # type: ignore[arg-type]
        (lambda: solvers.euler(VP, 3, prediction=["eps"]), r"unknown prediction \['eps'\]"),  # type: ignore[typeddict-item]
    ],
)
def test_one_sentence_of_a_solver(make: Callable[[], fd.Plan], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("schedule", [S.Flow(3.0), VP, S.EDM()], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral", "euler_ancestral"])
def test_no_noise_is_the_limit_of_little(schedule: S.Schedule, name: str) -> None:
    """y = x / alpha in r = sigma / alpha whatever eta: its rows go over into those of eta = 0."""
    options: dict[str, Any] = {"prediction": "x0", "t_start": 0.9, "final": "min", "t_end": 0.1}
    none, little = (getattr(solvers, name)(schedule, 4, eta=eta, **options) for eta in (0.0, 1e-7))
    for column in ("t", "A", "b", "d", "s"):
        np.testing.assert_allclose(getattr(little, column), getattr(none, column), rtol=1e-6, atol=1e-5)


def test_a_coefficient_that_float32_cannot_hold() -> None:
    """Of an alpha of 5e-87: it was infinite in the table the kernels read, and the samples NaN."""
    faint = S.Betas(S.linear_betas(4000, 1e-6, 0.2))
    plan = solvers.dpm2_ancestral(faint, 10, eta=0.5, prediction="x0", final="min", spacing="karras")
    with pytest.raises(ValueError, match="row 18, at alpha = .*, has a coefficient beyond float32"):
        fd.sample(model, plan, (2, 4))
