"""Guidance rules and dynamic thresholding inside a sampling run, against their formulas in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, solvers
from fastdiff import schedules as S
from fastdiff.ops import _dispatch
from fastdiff.reference import reference_sample
from tests import replay

device_path = replay.device_path
CHAIN = S.Betas(S.scaled_linear_betas(1000))
SHAPE = (3, 4, 5)
PLANS = [solvers.ddim(CHAIN, 8), solvers.dpmpp_2m(CHAIN, 8, prediction="v"), solvers.ddpm(CHAIN, 8, prediction="x0")]
C, U = torch.linspace(0, 1, 3), torch.linspace(0.5, -0.5, 3)


def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + t.view(-1, 1, 1).to(x.dtype) / 1000) * (1 + 0.2 * shift.view(-1, 1, 1).to(x.dtype))


def philox(seed: int, row: int, stream: int) -> Tensor:
    seeds, index = rng.keys(seed, batch=3)
    return rng.normal(seeds, SHAPE[1:], row=row, stream=stream, index=index).double()


def reference(plan: fd.Plan, combine: Any) -> Tensor:
    return reference_sample(
        lambda x, t: combine(model(x, t, C), model(x, t, U), x, t),
        plan,
        philox(1, 0, 0) * plan.init_scale,
        lambda k, like: philox(1, k, 1),
    )


def sampled(plan: fd.Plan, mode: str = "eager", **options: Any) -> Tensor:
    sampler = fd.Sampler(model, plan, mode=mode, cond={"shift": C}, uncond={"shift": U}, **options)
    return sampler(SHAPE, seed=1)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("rule", "options"), [("rescale", {"rescale": 0.5}), ("apg", {"eta": 0.3}), ("zero_star", {}), ("cfg", {})]
)
def test_rules(plan: fd.Plan, rule: str, options: dict[str, float], batched: bool) -> None:
    w = torch.tensor([1.5, 2.0, 4.0])
    want = reference(plan, lambda c, u, x, t: ops.guide_ref(c, u, w.double(), rule=rule, **options))
    got = sampled(plan, guidance=w, guide=rule, guide_options=options, batched_guidance=batched)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
def test_threshold(plan: fd.Plan) -> None:
    row = {int(t): k for k, t in enumerate(plan.times)}

    def thresholded(c: Tensor, u: Tensor, x: Tensor, t: Tensor) -> Tensor:
        k = row[int(t[0])]
        m = u + 3.0 * (c - u)
        p = ops.threshold_ref(plan.c_skip[k] * x + plan.c_out[k] * m, 0.9, 2.0)
        return (p - plan.c_skip[k] * x) / plan.c_out[k]

    want = reference(plan, thresholded)
    got = sampled(plan, guidance=3.0, threshold=(0.9, 2.0))
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    plain = sampled(plan, guidance=3.0)
    assert (plain - got).abs().max() > 5e-3  # the threshold was active


def never(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    raise AssertionError("the model was called")


def test_a_threshold_may_be_a_list() -> None:
    plan = PLANS[0]
    pairs = ([0.9, 2.0], np.array([0.9, 2.0]), torch.tensor([0.9, 2.0], dtype=torch.float64))
    got = [sampled(plan, guidance=3.0, threshold=pair) for pair in ((0.9, 2.0), *pairs)]
    assert all(torch.equal(x, got[0]) for x in got)


def test_a_column_of_weights_needs_what_it_guides_away_from() -> None:
    plan, given = ops.guidance_interval(PLANS[0], 3.0, 200, 800), {"cond": {"shift": C}, "seed": 1}
    with pytest.raises(ValueError, match="a column of guidance weights: give uncond, or guidance=1"):
        fd.sample(never, plan, SHAPE, **given)
    plain = fd.sample(model, PLANS[0], SHAPE, **given)
    assert torch.equal(fd.sample(model, plan, SHAPE, guidance=1, **given), plain)
    assert torch.equal(fd.sample(model, ops.guidance_interval(plan, 1.0, 0, 999), SHAPE, **given), plain)


@pytest.mark.parametrize("clip", [None, (-0.7, 0.6)])
@pytest.mark.parametrize("path", ["host", "device_path"])
def test_threshold_where_the_output_has_no_share(
    path: str, clip: tuple[float, float] | None, request: pytest.FixtureRequest
) -> None:
    """c_out is 0 at sigma_min of a consistency model: x0-hat, which is c_skip x there, is thresholded all the same."""
    if path == "device_path":
        request.getfixturevalue(path)
    plan = solvers.consistency(S.EDM(), 4, prediction="edm", spacing="karras", clip=clip)
    assert plan.c_out[-1] == 0 and plan.b[-1, 0] == 1 and not plan.A[-1].any()
    seen = []

    def callback(k: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        if k == 2:
            seen.append(5 * x)  # where the threshold is active
        return seen[0] if k == 2 else None

    got = fd.sample(lambda x, t: 0.5 * torch.tanh(x), plan, (2, 8), threshold=(0.9, 1.5), callback=callback)
    assert seen[0].abs().amax(1).min() > 1
    want = ops.threshold_ref(plan.c_skip[-1] * seen[0].double(), 0.9, 1.5).clamp(*(clip or (-1, 1)))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
def test_on_the_device_path(mode: str, request: pytest.FixtureRequest) -> None:
    plan = ops.guidance_interval(PLANS[1], 3.0, 200, 800)
    want = [sampled(plan, guide="apg"), sampled(PLANS[0], guidance=2.0, threshold=(0.9, 2.0))]
    request.getfixturevalue("device_path")
    got = [sampled(plan, mode, guide="apg"), sampled(PLANS[0], mode, guidance=2.0, threshold=(0.9, 2.0))]
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule",
    ["none", "rescale", "apg", "zero_star", "threshold", "apg+threshold", "rescale+threshold", "zero_star+threshold"],
)
def test_rules_in_the_step(rule: str, dtype: torch.dtype, clipped: bool, device: torch.device) -> None:
    """Three numbers a sample and a bound a sample, then the step, against the step on the combined float64 output."""
    plan, k = solvers.dpmpp_2m(CHAIN, 6, prediction="v", clip=(-1.2, 1.1) if clipped else None), 3
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(plan.allocate().physical, 3, 2, 9, 7, generator=generator)
    c, u = (torch.randn(3, 2, 9, 7, generator=generator).to(dtype) for _ in range(2))
    row, weights = (
        torch.tensor([k], dtype=torch.int32),
        torch.linspace(1, 9, 6)[:, None] + torch.tensor([[0, 1.0, -0.5]]),
    )
    name, _, bounded = rule.partition("+")
    if name == "zero_star":
        u = (1e-3 * (c.float() + 0.3 * u.float())).to(dtype)  # s, near 1e3, times u is of c's size
    m = c.double()
    if name not in ("none", "threshold"):
        m = ops.guide_ref(m, u.double(), weights[k].double(), rule=name)
    elif name == "threshold":
        m = u.double() + weights[k].double().view(-1, 1, 1, 1) * (c.double() - u.double())
    table = torch.from_numpy(plan.packed())
    x, (c_skip, c_ratio) = state[0].double(), table[k, :2].double()
    c_out = c_skip * c_ratio
    if name == "threshold" or bounded:
        x0 = c_skip * x + c_out * m
        assert (ops.threshold_bound_ref(x0, 0.9) > 1.5).all()  # it is neither 1 nor the maximum
        m = (ops.threshold_ref(x0, 0.9) - c_skip * x) / c_out
    want, _, p = ops.affine_step_ref(state.double(), m, table, row, slots=plan.slots)

    state, c, u, row, weights, table = (v.to(device) for v in (state, c, u, row, weights, table))
    guided: dict[str, Any] = {} if name == "none" else {"uncond": u}
    if name not in ("none", "threshold"):
        guided["scales"] = ops.guidance_scales(c, u, weights, rule=name, row=row)
    elif name == "threshold":
        guided["guidance"] = weights
    if name == "threshold" or bounded:
        guided["bound"] = ops.threshold_bound(state[0], 0.9, model_out=c, table=table, row=row, **guided)
    x0 = torch.empty_like(state[0])
    ops.affine_step(state, c, table, row, slots=plan.slots, x0=x0, **guided)
    for got, exact in ((state, want), (x0, p)):
        assert (got.cpu().double() - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_a_bound_is_differentiable() -> None:
    """In the model's output where that alone asks for it: at quantile 1 the bound moves with the largest."""
    table, row = PLANS[1].pack(), torch.tensor([2])
    m = torch.tensor([[5e6, 4e6, -3e6]], requires_grad=True)
    (slope,) = torch.autograd.grad(ops.threshold_bound(torch.zeros(1, 3), 1.0, model_out=m, table=table, row=row), m)
    assert slope[0, 0] == (table[2, 0] * table[2, 1]).abs() and not slope[0, 1:].any()


def test_one_reduction_and_the_step(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """A rule is one launch before the step, a threshold another: what a row of the device path launches."""
    launched: list[str] = []
    launch = _dispatch.launch

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(getattr(kernel, "__name__", "") or kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(_dispatch, "launch", counted)
    table, row = PLANS[1].pack(kernel_device), torch.tensor([2], device=kernel_device)
    state = torch.randn(PLANS[1].allocate().physical, *SHAPE, device=kernel_device)
    c, u = torch.randn(2, *SHAPE, device=kernel_device)
    w = torch.full((1, 1), 3.0, device=kernel_device)
    scales = ops.guidance_scales(c, u, w, rule="apg", row=row)
    bound = ops.threshold_bound(state[0], model_out=c, table=table, row=row, uncond=u, scales=scales)
    ops.affine_step(state, c, table, row, slots=PLANS[1].slots, uncond=u, scales=scales, bound=bound)
    assert launched == ["scales_kernel", "bound_kernel", "affine_step_kernel"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: ops.threshold_bound(x, model_out=x), "go together"),
        (lambda x: ops.threshold_bound(x, uncond=x), "uncond goes with"),
        (lambda x: ops.threshold_bound(x, 0.9, 0.5), "at least 1"),
        (lambda x: ops.guidance_scales(x, x, torch.ones(2, 2), rule="apg"), r"w must be a number or \[B\] = \[3\]"),
        (lambda x: ops.guidance_scales(x, x, 2.0, rule="apgg"), "cfg, rescale, apg, zero_star"),
        (lambda x: ops.guidance_scales(x, x, 2.0, rule="apg", row=torch.zeros(2, dtype=torch.int32)), "row"),
    ],
)
def test_bad_reductions(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(SHAPE))


def test_interval_column() -> None:
    plan = ops.guidance_interval(PLANS[0], 3.0, 200, 800)
    outside = (plan.t < 200) | (plan.t > 800)
    assert (plan.guidance == 1).tolist() == outside.tolist() and outside.any() and not outside.all()
    column = torch.tensor(plan.guidance.copy())[:, None]
    assert torch.equal(sampled(plan), sampled(PLANS[0], guidance=column))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "euler_ancestral"])
@pytest.mark.parametrize("schedule", [CHAIN, S.VP(), S.EDM(0.02, 10.0), S.Flow()], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_cfg_plus_plus(solver: str, schedule: S.Schedule, prediction: str) -> None:
    """The paper's update, written out: guided x0, unconditional eps, noise that keeps the row's variance."""
    options: dict[str, Any] = {} if schedule is CHAIN else {"t_start": 0.99}
    plan = ops.cfg_plus_plus(getattr(solvers, solver)(schedule, 7, prediction=prediction, **options), 0.7)
    assert plan.guidance is not None and plan.guidance[-1] == pytest.approx(0.7)
    alpha, sigma = np.append(plan.alpha, plan.end[0]), np.append(plan.sigma, plan.end[1])
    x = mine = 1.3
    for k in range(plan.nfe):
        n = 0.4 * (-1) ** k
        outputs = [0.3 * x + shift for shift in (0.5, -0.2)]
        c, u = (plan.c_skip[k] * x + plan.c_out[k] * m for m in outputs)
        eps = (x - alpha[k] * u) / sigma[k]
        down = np.sqrt(sigma[k + 1] ** 2 - plan.s[k, 0] ** 2)
        x = alpha[k + 1] * (u + 0.7 * (c - u)) + down * eps + plan.s[k, 0] * n
        c, u = (0.3 * mine + shift for shift in (0.5, -0.2))
        m = u + plan.guidance[k] * (c - u)
        p = plan.c_skip[k] * mine + plan.c_out[k] * m
        mine = plan.A[k, 0, 0] * mine + plan.b[k, 0] * p + plan.d[k, 0] * m + plan.s[k, 0] * n
        assert mine == pytest.approx(x, rel=1e-7, abs=1e-9)


def test_cfg_plus_plus_takes_numpys_numbers() -> None:
    scale = np.float32(0.7)
    got, want = (ops.cfg_plus_plus(PLANS[0], v).guidance for v in (scale, float(scale)))
    np.testing.assert_array_equal(got, want)


def test_cfg_plus_plus_of_rows_on_the_models_output() -> None:
    """The same map of (x, m), written with d in place of b as a probed plan may be."""
    for schedule in (CHAIN, S.EDM(0.02, 10.0)):
        plan = solvers.ddim(schedule, 6, eta=0.4, prediction="v")
        skip, out = plan.b[:, 0] * plan.c_skip, plan.b[:, 0] * plan.c_out
        moved = dataclasses.replace(plan, A=plan.A + skip[:, None, None], b=0 * plan.b, d=out[:, None])
        weights = [ops.cfg_plus_plus(p, 0.6).guidance for p in (plan, moved)]
        np.testing.assert_allclose(weights[1], weights[0], rtol=1e-10)


def test_cfg_plus_plus_samples_without_another_word() -> None:
    plan = ops.cfg_plus_plus(PLANS[0], 0.6)
    column = torch.tensor(plan.guidance.copy())
    want = reference(PLANS[0], Rows(column))
    assert (sampled(plan) - want).abs().max() <= 2e-5 * want.abs().max()


class Rows:
    """Guidance by the row's number."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = iter(weights)

    def __call__(self, c: Tensor, u: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return u + next(self.weights) * (c - u)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.cfg_plus_plus(PLANS[1], 0.5), ValueError, "has 2 slots"),
        (lambda: ops.cfg_plus_plus(PLANS[0], True), ValueError, "scale must be a finite number, got True"),
        (lambda: ops.cfg_plus_plus(PLANS[0], math.nan), ValueError, "scale must be a finite number, got nan"),
        (lambda: ops.cfg_plus_plus("ddim", 0.5), TypeError, "plan must be a fastdiff.Plan, got str"),
        (lambda: ops.cfg_plus_plus(solvers.ddim(CHAIN, 8, clip=(-1, 1)), 0.5), ValueError, "with clip=None"),
        (lambda: ops.cfg_plus_plus(solvers.euler_maruyama(S.VP(), 8), 0.5), ValueError, "that keep the mean"),
        (lambda: ops.cfg_plus_plus(solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4), 0.5), ValueError, "classes or bins"),
    ],
)
def test_cfg_plus_plus_refuses(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"guide": "cfgg", "guidance": 2.0}, ValueError, "valid: cfg, rescale, apg, zero_star"),
        ({"guide": "apg", "guidance": 2.0, "guide_options": {"etta": 1}}, ValueError, "valid: eta, norm_threshold$"),
        ({"guide": "apg", "guidance": 2.0, "guide_options": {"rescale": 0.5}}, ValueError, "'rescale' of guide 'apg'"),
        ({"guide": "rescale", "guidance": 2.0, "guide_options": {"eta": 0.5}}, ValueError, "valid: rescale$"),
        ({"guidance": 2.0, "guide_options": {"rescale": 0.5}}, ValueError, "of guide 'cfg'; valid: none"),
        ({"guide": "zero_star", "guidance": 2.0, "guide_options": {"eta": 0.5}}, ValueError, "valid: none"),
        ({"guide": "apg", "guidance": 2.0, "guide_options": ["eta"]}, TypeError, "must be a dict .* got list"),
        (
            {"guide": "apg", "guidance": 2.0, "guide_options": {"eta": "1"}},
            TypeError,
            "'eta' must be a number, got '1'",
        ),
        ({"guide": "apg", "guidance": 2.0, "guide_options": {"eta": math.nan}}, ValueError, "eta must be finite"),
        (
            {"guide": "apg", "guidance": 2.0, "guide_options": {"norm_threshold": -1}},
            ValueError,
            "norm_threshold must be",
        ),
        ({"guide": "rescale", "guidance": 2.0, "guide_options": {"rescale": 2}}, ValueError, "rescale must be in 0..1"),
        ({"guide": "apg", "guidance": 2.0, "uncond": None}, ValueError, "guide='apg' needs uncond"),
        ({"guidance": 2.0, "threshold": 0.9}, TypeError, "quantile, maximum"),
        ({"guidance": 2.0, "threshold": (0.9, 2.0, 3.0)}, TypeError, "quantile, maximum"),
        ({"guidance": 2.0, "threshold": (1.5, 2.0)}, ValueError, "quantile must be in 0..1"),
        ({"guidance": 2.0, "threshold": [0.9, 0.5]}, ValueError, "maximum must be at least 1, got 0.5"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """Before any model call."""
    with pytest.raises(error, match=text):
        fd.sample(never, PLANS[0], SHAPE, **{"cond": {"shift": C}, "uncond": {"shift": U}, **options})
