"""A known part of the sample: exact along the way and at the end, and nothing else is touched."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from tests.replay import close, device_path  # noqa: F401 - one is a fixture

SHAPE = (3, 2, 6)
KNOWN = torch.linspace(-1.5, 1.5, 12).view(1, 2, 6)
MASK = torch.tensor([True, False, True, True, False, False]).view(1, 1, 6)


def half(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    """Some elementwise network, of the prediction it is taken for."""
    return 0.5 * x + sum((0.1 * v for v in cond.values()), torch.zeros(()))


def cond(known: Tensor = KNOWN, mask: Tensor | None = MASK) -> dict[str, Any]:
    return {"known": known} if mask is None else {"known": known, "mask": mask}


VP, EDM, FLOW, CHAIN = S.VP(), S.EDM(0.02, 20.0), S.Flow(2.0), S.Betas(S.linear_betas(1000))
ODES = [
    solvers.ddim(CHAIN, 12), solvers.ddim(CHAIN, 12, prediction="v"), solvers.euler(EDM, 12, prediction="edm"),
    solvers.heun(EDM, 8, prediction="edm"), solvers.dpm2(VP, 8), solvers.dpmpp_2m(VP, 12, prediction="x0"),
    solvers.dpmpp_3m(VP, 12, prediction="v"), solvers.unipc(VP, 12), solvers.deis(VP, 12), solvers.lms(EDM, 12),
    solvers.ipndm(VP, 12), solvers.plms(CHAIN, 12), solvers.dpm_solver(VP, 6, order=3), solvers.euler(FLOW, 12,
    prediction="flow"), solvers.heun(FLOW, 8, prediction="flow"), solvers.dpmpp_2m(S.VE(0.02, 20.0), 12),
    solvers.ddim(S.Cosine(), 12, prediction="x0"), solvers.dpmpp_2m(VP, 12, prediction="score"),
]  # fmt: skip


@pytest.mark.parametrize("plan", ODES, ids=lambda p: f"{p.name}-{p.nfe}")
def test_an_odes_known_part_is_its_noise_and_the_data_at_every_row(plan: fd.Plan) -> None:
    """x_k = alpha_k y + sigma_k n with one n from the first row to the last, and y after it."""
    model = fd.inpaint(half, plan)
    x, seen = fd.sample(model, plan, SHAPE, seed=4, cond=cond(), trajectory=True)
    y, where = KNOWN.double().expand(SHAPE), MASK.expand(SHAPE)
    n = (seen.x[0].double() - plan.alpha[0] * y) / plan.sigma[0]
    for k in range(plan.nfe):
        want = plan.alpha[k] * y + plan.sigma[k] * n
        assert float((seen.x[k] - want)[where].abs().max()) <= 2e-5 * max(1.0, plan.sigma[k])
    last_is_x0 = not plan.A[-1, 0].any() and plan.b[-1, 0] == 1  # else a sum of eps, each a difference
    assert float((x - y)[where].abs().max()) <= (2e-6 if last_is_x0 else 2e-5)
    plain = fd.sample(half, plan, SHAPE, seed=4)
    assert torch.equal(x[~where], plain[~where]) and not torch.allclose(x[where], plain[where])


@pytest.mark.parametrize(
    "plan",
    [solvers.ddpm(CHAIN, 10), solvers.ddim(CHAIN, 10, eta=0.5, prediction="v"), solvers.euler_ancestral(EDM, 10),
     solvers.dpmpp_2m_sde(VP, 10), solvers.ddpm(S.BFNContinuous(0.03), 10, prediction="x0")],
    ids=lambda p: p.name,
)  # fmt: skip
def test_a_stochastic_known_part_is_distributed_as_noised_data(plan: fd.Plan) -> None:
    """Mean alpha_k y and deviation sigma_k of 40000 samples, to five standard errors."""
    many, y = 40_000, 0.8
    start = torch.full((many, 1), y)
    noise = torch.randn(many, 1, generator=torch.Generator().manual_seed(0)) * plan.sigma[0]
    x, seen = fd.sample(fd.inpaint(half, plan), plan, (many, 1), seed=1, cond=cond(start[:1], None),
                        x_T=plan.alpha[0] * start + noise, trajectory=True)  # fmt: skip
    for k in (1, plan.nfe // 2, plan.nfe - 1):
        at = seen.x[k].double()
        assert abs(float(at.mean()) - plan.alpha[k] * y) <= 5 * plan.sigma[k] / many**0.5 + 1e-6
        assert abs(float(at.std()) / plan.sigma[k] - 1) <= 5 / (2 * many) ** 0.5
    assert float((x - y).abs().max()) <= 2e-6


@pytest.mark.parametrize("mode", ["auto", pytest.param("compile", marks=pytest.mark.compiled)])
def test_modes_and_unrolled_agree(mode: str) -> None:
    plan = solvers.dpmpp_2m(VP, 8)
    model, start = fd.inpaint(half, plan), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    want = fd.sample(model, plan, SHAPE, x_T=start, cond=cond(), mode="eager")
    close = 1e-5 * float(want.abs().max())
    assert float((fd.sample(model, plan, SHAPE, x_T=start, cond=cond(), mode=mode) - want).abs().max()) <= close
    assert float((fd.Unrolled(model, plan)(start, cond=cond()) - want).abs().max()) <= close


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_graphs_are_filled_with_what_is_known(mode: str, request: pytest.FixtureRequest) -> None:
    """One capture serves other data and other masks."""
    plan = solvers.dpmpp_2m(VP, 6)
    model = fd.inpaint(half, plan)
    calls = [cond(), cond(KNOWN + 1, ~MASK)]
    want = [fd.sample(model, plan, SHAPE, seed=1, cond=one) for one in calls]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode=mode)
    assert all(close(sampler(SHAPE, seed=1, cond=one), x) for one, x in zip(calls, want, strict=True))
    assert len(sampler._runs) == 1


def test_what_is_not_known_may_be_nan_and_masks_may_differ_by_sample() -> None:
    plan = solvers.dpmpp_2m(VP, 8)
    model = fd.inpaint(half, plan)
    holes = torch.where(MASK, KNOWN, torch.nan)
    want = fd.sample(model, plan, SHAPE, seed=4, cond=cond())
    assert torch.equal(fd.sample(model, plan, SHAPE, seed=4, cond=cond(holes, None)), want)
    own = torch.stack(
        [torch.zeros(2, 6, dtype=torch.bool), MASK.expand(1, 2, 6)[0], torch.ones(2, 6, dtype=torch.bool)]
    )
    x = fd.sample(model, plan, SHAPE, seed=4, cond=cond(KNOWN, own))
    assert torch.equal(x[0], fd.sample(half, plan, SHAPE, seed=4)[0]) and torch.equal(x[1], want[1])
    torch.testing.assert_close(x[2], KNOWN[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_does_not_move_what_is_known(batched: bool) -> None:
    plan, label = solvers.dpmpp_2m(VP, 8), {"label": torch.ones(3, 1, 1)}
    asked = {"uncond": {"label": torch.zeros(3, 1, 1)}, "guidance": 5.0, "batched_guidance": batched, "seed": 4}
    x = fd.sample(fd.inpaint(half, plan), plan, SHAPE, cond={**cond(), **label}, **asked)
    plain = fd.sample(half, plan, SHAPE, cond=label, **asked)
    where = MASK.expand(SHAPE)
    torch.testing.assert_close(x[where], KNOWN.expand(SHAPE)[where], rtol=0, atol=4e-6)
    assert torch.equal(x[~where], plain[~where])


def test_clean_data_as_the_models_input() -> None:
    """c_in y at every row, where y is known; the noised state elsewhere."""
    plan, inputs = solvers.heun(EDM, 6, prediction="edm"), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x.clone())
        return half(x, t)

    x = fd.sample(fd.inpaint(model, plan, clean=True), plan, SHAPE, seed=4, cond=cond())
    where = MASK.expand(SHAPE)
    for k, seen in enumerate(inputs):
        torch.testing.assert_close(seen[where], (plan.c_in[k] * KNOWN.double()).float().expand(SHAPE)[where])
    assert torch.equal(x, fd.sample(fd.inpaint(half, plan), plan, SHAPE, seed=4, cond=cond()))  # half is elementwise


def test_clean_is_the_loop_of_diffusion_policy() -> None:
    """Observed actions written into the trajectory before every call and after the last, by diffusers' DDIM."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(prediction_type="sample", clip_sample=False)
    plan = fd.probe(scheduler, steps=10)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) / 6**0.5

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ mix)  # every action sees every other

    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    got = fd.sample(fd.inpaint(model, plan, clean=True), plan, SHAPE, x_T=start, cond=cond())
    scheduler.set_timesteps(10)
    x, where = start.clone(), MASK.expand(SHAPE)
    for t in scheduler.timesteps:
        x[where] = KNOWN.expand(SHAPE)[where]
        x = scheduler.step(model(x, t), t, x).prev_sample
    x[where] = KNOWN.expand(SHAPE)[where]
    torch.testing.assert_close(got, x, rtol=0, atol=5e-6)
    noised = fd.sample(fd.inpaint(model, plan), plan, SHAPE, x_T=start, cond=cond())
    assert float((noised - x).abs().max()) > 0.01


class Counted(TorchDispatchMode):
    VIEWS = ("view", "unbind", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in self.VIEWS:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_it_costs_five_operations() -> None:
    model = fd.inpaint(lambda x, t: x, PLAN)
    x, t = torch.ones(SHAPE), torch.full((3,), float(PLAN.times[1]))
    model(x, t, **cond())  # makes the tables
    with Counted() as counted:
        model(x, t, **cond())
    assert counted.names == ["searchsorted", "index", "mul", "addcmul", "where"]


def test_times_that_are_neighbours_in_fp32_and_what_lies_beside_them() -> None:
    """The row of each, exactly; NaN one fp32 number away, between them and beyond both ends."""
    from fastdiff.at_time import numbers_at

    near = np.float32(0.5)
    times = np.array([np.float32(0.9), np.nextafter(near, np.float32(1)), near, np.float32(0.1)], np.float32)
    plan = dataclasses.replace(PLAN, times=times.astype(np.float64))
    x = torch.ones(4, 1)
    of_x0 = numbers_at(plan, torch.from_numpy(times), x)[0][:, 0]
    torch.testing.assert_close(of_x0, torch.tensor(1 / PLAN.c_out).float(), rtol=1e-6, atol=0)
    other = np.array(
        [np.nextafter(times[0], np.float32(1)), np.nextafter(near, np.float32(0)), 0.3, 0.0, 2.0], np.float32
    )
    assert bool(numbers_at(plan, torch.from_numpy(other), torch.ones(5, 1))[0].isnan().all())


def test_a_learned_variance_keeps_its_plane() -> None:
    plan = solvers.ddpm(CHAIN, 10, variance="learned_range")
    planes: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.5 * x, torch.tanh(x)], 1)

    wrapped = fd.inpaint(model, plan)
    x = fd.sample(lambda x, t, **c: planes.append(wrapped(x, t, **c)) or planes[-1], plan, SHAPE, seed=4, cond=cond())
    where = MASK.expand(SHAPE)
    torch.testing.assert_close(x[where], KNOWN.expand(SHAPE)[where], rtol=0, atol=2e-6)
    assert torch.equal(x[~where], fd.sample(model, plan, SHAPE, seed=4)[~where])
    assert float(planes[0][:, 2:].abs().max()) <= 1 and planes[0].shape == (3, 4, 6)


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("readout", ["sample", "argmax", "mean"])
@pytest.mark.parametrize("clean", [False, True])
def test_classes(K: int, readout: str, clean: bool) -> None:
    """Known tokens come out, -1 is unknown, and unknown ones are those of the model alone."""
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, K), 6, readout=readout)
    tokens = torch.arange(8).view(1, 8) % K
    tokens[0, ::3] = -1
    model = fd.inpaint(lambda x, t: 2 * x, plan, clean=clean)
    x = fd.sample(model, plan, (50, 8), seed=2, cond={"known": tokens})
    known = (tokens >= 0).expand(50, 8)
    assert torch.equal(x[known], tokens.expand(50, 8)[known])
    assert torch.equal(x[~known], fd.sample(lambda x, t: 2 * x, plan, (50, 8), seed=2)[~known])
    same = fd.sample(model, plan, (50, 8), seed=2, cond={"known": tokens.clamp(min=0), "mask": tokens >= 0})
    assert torch.equal(same, x)


def test_the_beliefs_about_a_known_class() -> None:
    """z of a known class after i of n steps: K beta_i onehot up to a constant, plus noise of variance K beta_i."""
    K, beta_1, n, many = 4, 2.0, 5, 4000
    plan = solvers.bfn_discrete(S.BFNDiscrete(beta_1, K), n)
    known = torch.full((1, 1), 3)
    _, seen = fd.sample(
        fd.inpaint(lambda x, t: x, plan), plan, (many, 1), seed=2, cond={"known": known}, trajectory=True
    )
    for i in range(1, n):
        beta, z = beta_1 * (i / n) ** 2, seen.x[i, :, 0].double()
        gap = z[:, 3] - z[:, :3].mean(1)
        assert abs(float(gap.mean()) - K * beta) <= 5 * (K * beta * (4 / 3) / many) ** 0.5
        assert abs(float(gap.var()) / (K * beta * 4 / 3) - 1) <= 5 * (2 / many) ** 0.5


@pytest.mark.parametrize("readout", ["binned", "binned_mean"])
def test_bins(readout: str) -> None:
    plan = solvers.bfn_discretised(S.BFNContinuous(0.05), 8, bins=16, readout=readout)
    centres = ((2 * torch.arange(12) + 1) / 16 - 1).view(1, 2, 6)
    model = lambda x, t: torch.cat([0.3 * x, 0 * x - 1], 1)  # noqa: E731
    x = fd.sample(fd.inpaint(model, plan), plan, SHAPE, seed=4, cond=cond(centres))
    where = MASK.expand(SHAPE)
    torch.testing.assert_close(x[where], centres.expand(SHAPE)[where], rtol=0, atol=2e-6)
    assert torch.equal(x[~where], fd.sample(model, plan, SHAPE, seed=4)[~where])


@pytest.mark.parametrize("K", [2, 5])
def test_classes_that_are_none(K: int) -> None:
    """NaN logits for a class outside 0..K-1, whatever the mask says: found by check_finite, and nowhere else."""
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, K), 4)
    model = fd.inpaint(lambda x, t: 2 * x, plan)
    seen = x_of(plan, 3)
    for wrong, mask in ((K, None), (K + 2**32, None), (-1, True)):
        known = torch.tensor([[wrong, 1, -1]])
        where = None if mask is None else torch.tensor([[True, True, False]])
        m = model(seen, torch.full((2,), float(plan.times[0])), known=known, mask=where)
        assert bool(m[:, 0].isnan().all()) and not bool(m[:, 1:].isnan().any())
        with pytest.raises(ValueError, match="not finite, first at row 0"):
            given = {"known": known} if where is None else {"known": known, "mask": where}
            fd.sample(model, plan, (2, 3), cond=given, check_finite="raise")
    with pytest.raises(TypeError, match=r"known must be a torch.int64 tensor, got torch.uint8"):
        fd.sample(model, plan, (2, 3), cond={"known": torch.ones(1, 3, dtype=torch.uint8)})


def x_of(plan: fd.Plan, tokens: int) -> Tensor:
    return torch.zeros(2, tokens, 1 if plan.classes == 2 else plan.classes)


@pytest.mark.parametrize("K", [2, 5])
def test_clean_classes_as_the_models_input(K: int) -> None:
    """2 onehot - 1 (K = 2: 2 k - 1) where known, what the flow believes elsewhere; that everywhere without clean."""
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, K), 4)
    tokens = torch.tensor([[1, 0, -1, -1]])
    for clean in (True, False):
        inputs: list[Tensor] = []
        model = fd.inpaint(lambda x, t, inputs=inputs: inputs.append(x.clone()) or 2 * x, plan, clean=clean)
        fd.sample(model, plan, (3, 4), seed=0, cond={"known": tokens})
        onehot = 2.0 * torch.nn.functional.one_hot(tokens[0, :2], K) - 1 if K > 2 else 2.0 * tokens[0, :2, None] - 1
        assert all(torch.equal(x[:, :2], onehot.expand(3, 2, -1)) == clean for x in inputs)
        assert all(float(x[:, 2:].abs().max()) < 1 for x in inputs)


@pytest.mark.parametrize("output", [lambda x: (x,), lambda x: x[..., :3], lambda x: x[..., :1]])
def test_an_output_that_is_none_is_the_samplers_to_refuse(output: Any) -> None:
    plan = solvers.bfn_discrete(S.BFNDiscrete(1.5, 5), 4)
    with pytest.raises((TypeError, ValueError), match="the model must return"):
        fd.sample(fd.inpaint(lambda x, t: output(x), plan), plan, (2, 3), cond={"known": torch.ones(1, 3).long()})


def test_what_scales_whole_samples_is_refused() -> None:
    """A guidance rule, a threshold: both would move what is known; also where the model is wrapped once more."""
    plan = solvers.dpmpp_2m(VP, 4)
    labels = {"uncond": {"label": torch.zeros(3, 1, 1)}, "guidance": 2.0}
    given = {**cond(), "label": torch.ones(3, 1, 1)}
    model = fd.inpaint(half, plan)
    outer = fd.classifier_guidance(model, plan, lambda x, t: x.flatten(1).sum(1))
    for wrapped in (model, outer):
        for guide in ("rescale", "apg", "zero_star"):
            with pytest.raises(ValueError, match=f"goes with guide='cfg': guide='{guide}' scales"):
                fd.sample(wrapped, plan, SHAPE, cond=given, guide=guide, **labels)
        with pytest.raises(ValueError, match=r"goes with threshold=None: threshold=\(0.9, 3.0\) scales"):
            fd.sample(wrapped, plan, SHAPE, cond=given, threshold=(0.9, 3.0))


def test_a_clip_clips_it_and_an_early_end_leaves_it_noised() -> None:
    clipped = solvers.dpmpp_2m(VP, 8, clip=(-1, 1))
    where = MASK.expand(SHAPE)
    x = fd.sample(fd.inpaint(half, clipped), clipped, SHAPE, seed=4, cond=cond())
    torch.testing.assert_close(x[where], KNOWN.clamp(-1, 1).expand(SHAPE)[where], rtol=0, atol=2e-6)
    early = solvers.dpmpp_2m(VP, 8, final="min")
    x, seen = fd.sample(fd.inpaint(half, early), early, SHAPE, seed=4, cond=cond(), trajectory=True)
    n = (seen.x[0] - early.alpha[0] * KNOWN) / early.sigma[0]
    want = early.end[0] * KNOWN + early.end[1] * n
    torch.testing.assert_close(x[where], want.float()[where], rtol=0, atol=5e-6)


def test_half_precision_knows_to_its_own_digits() -> None:
    plan = solvers.dpmpp_2m(VP, 12)
    x = fd.sample(fd.inpaint(half, plan), plan, SHAPE, seed=4, cond=cond(), dtype=torch.bfloat16)
    where = MASK.expand(SHAPE)
    assert float((x - KNOWN)[where].abs().max()) <= 1.5 * 2.0**-8


def test_a_module_stays_one() -> None:
    plan, net = solvers.dpmpp_2m(VP, 4), torch.nn.Linear(6, 6)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net

    assert dict(fd.inpaint(Net(), plan).named_parameters()).keys() == {"model.layer.weight", "model.layer.bias"}
    sampler = fd.Sampler(fd.inpaint(half, plan), plan)
    x = sampler(SHAPE, seed=1, cond=cond())
    assert torch.equal(pickle.loads(pickle.dumps(sampler))(SHAPE, seed=1, cond=cond()), x)  # noqa: S301 - made here
    moved = sampler(SHAPE, seed=1, cond=cond(KNOWN + 1))
    torch.testing.assert_close(moved[MASK.expand(SHAPE)], (x + 1)[MASK.expand(SHAPE)], rtol=0, atol=4e-6)


PLAN = solvers.dpmpp_2m(VP, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({}, TypeError, "needs what is known: fd.sample"),
        ({"known": KNOWN[0]}, ValueError, r"known must fit the samples, \(3, 2, 6\).*got \(2, 6\)"),
        ({"known": KNOWN, "mask": MASK[..., :5]}, ValueError, r"mask must fit .*got \(1, 1, 5\)"),
        ({"known": KNOWN, "mask": MASK.float()}, TypeError, "mask must be a torch.bool tensor, got torch.float32"),
        ({"known": KNOWN.numpy(), "mask": MASK}, TypeError, "known must be a tensor, got ndarray"),
    ],
)
def test_errors_of_a_call(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fd.sample(fd.inpaint(half, PLAN), PLAN, SHAPE, cond=arguments)


def test_errors() -> None:
    with pytest.raises(TypeError, match="must be callable"):
        fd.inpaint(3, PLAN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a fastdiff.Plan"):
        fd.inpaint(half, "ddim")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clean must be True or False, got 1"):
        fd.inpaint(half, PLAN, clean=1)  # type: ignore[arg-type]
    silent = dataclasses.replace(PLAN, name="mine", alpha=np.array([*PLAN.alpha[:2], np.nan, 1.0]))
    with pytest.raises(ValueError, match="mine does not record the alpha and sigma of its rows, first of row 2"):
        fd.inpaint(half, silent)
    with pytest.raises(ValueError, match=r"ddim_inversion takes nothing of x0 .* in row 0 \(c_out = 0\)"):
        fd.inpaint(half, solvers.ddim_inversion(VP, 4))
    other = solvers.dpmpp_2m(VP, 5)
    with pytest.raises(ValueError, match="not finite, first at row 1"):
        fd.sample(fd.inpaint(half, PLAN), other, SHAPE, cond=cond(), check_finite="raise")
    twice = dataclasses.replace(PLAN, times=np.array([*PLAN.times[:3], PLAN.times[2]]))
    with pytest.raises(ValueError, match=r"calls its model at t = \S+ in rows 2 and 3 with different conversions"):
        fd.inpaint(half, twice)
    with pytest.raises(ValueError, match=r"must return the shape of its input, \(3, 2, 6\), got \(3, 5, 6\)"):
        fd.sample(fd.inpaint(lambda x, t: x.new_zeros(3, 5, 6), PLAN), PLAN, SHAPE, cond=cond())
    with pytest.raises(TypeError, match="must return a Tensor, got tuple"):
        fd.sample(fd.inpaint(lambda x, t: (x,), PLAN), PLAN, SHAPE, cond=cond())
