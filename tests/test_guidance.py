"""Guidance rules and dynamic thresholding inside a sampling run, against their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample
from tests import test_graph

device_path = test_graph.device_path
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


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
def test_on_the_device_path(mode: str, request: pytest.FixtureRequest) -> None:
    plan = ops.guidance_interval(PLANS[1], 3.0, 200, 800)
    want = [sampled(plan, guide="apg"), sampled(PLANS[0], guidance=2.0, threshold=(0.9, 2.0))]
    request.getfixturevalue("device_path")
    got = [sampled(plan, mode, guide="apg"), sampled(PLANS[0], mode, guidance=2.0, threshold=(0.9, 2.0))]
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_interval_column() -> None:
    plan = ops.guidance_interval(PLANS[0], 3.0, 200, 800)
    outside = (plan.t < 200) | (plan.t > 800)
    assert (plan.guidance == 1).tolist() == outside.tolist() and outside.any() and not outside.all()
    column = torch.tensor(plan.guidance.copy())[:, None]
    assert torch.equal(sampled(plan), sampled(PLANS[0], guidance=column))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"guide": "cfgg", "guidance": 2.0}, ValueError, "valid: cfg, rescale, apg, zero_star"),
        ({"guide": "apg", "guidance": 2.0, "guide_options": {"etta": 1}}, ValueError, "valid: rescale, eta"),
        ({"guide": "apg", "guidance": 2.0, "uncond": None}, ValueError, "guide='apg' needs uncond"),
        ({"guidance": 2.0, "threshold": 0.9}, TypeError, "quantile, maximum"),
        ({"guidance": 2.0, "threshold": (1.5, 2.0)}, ValueError, "quantile must be in 0..1"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fd.sample(model, PLANS[0], SHAPE, **{"cond": {"shift": C}, "uncond": {"shift": U}, **options})
