"""The sampler: modes, seeds, guidance, trajectories, starts, allocation, and what it must refuse."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import rng, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample

CHAIN = S.Betas(S.scaled_linear_betas(1000))
ELEMENTS = (5, 3, 3)


def elementwise(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """An elementwise model of x and t (t reaches the values, so a wrong time shows)."""
    time = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 1000
    return torch.tanh(1.3 * x + time) + shift


def philox(seed: int, batch: int, sample: tuple[int, ...]) -> Any:  # noqa: ANN401
    seeds, index = rng.keys(seed, batch=batch)
    return lambda row, like: rng.normal(seeds, sample, row=row, stream=1, index=index).to(like.dtype)


def start(plan: fd.Plan, seed: int, batch: int, sample: tuple[int, ...]) -> Tensor:
    seeds, index = rng.keys(seed, batch=batch)
    return rng.normal(seeds, sample, row=0, stream=0, index=index).double() * plan.init_scale


PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 12, clip=(-1, 1)),
    "ddim-own-eps": solvers.ddim(CHAIN, 12, eta=0.5, clip=(-1, 1), use_clipped_model_output=False),
    "euler": solvers.euler(S.Flow(), 12, prediction="flow"),
    "heun": solvers.heun(CHAIN, 7, prediction="v"),
    "dpmpp_2m": solvers.dpmpp_2m(CHAIN, 12, prediction="v"),
    "euler_maruyama": solvers.euler_maruyama(S.VP(), 12, prediction="score"),
    "edm": solvers.heun(S.EDM(), 6, prediction="edm"),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@plans
def test_eager_equals_the_float64_definition(plan: fd.Plan) -> None:
    want = reference_sample(elementwise, plan, start(plan, 3, 4, ELEMENTS), philox(3, 4, ELEMENTS))
    got = fd.sample(elementwise, plan, (4, *ELEMENTS), seed=3)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["ddpm", "heun", "edm"])
def test_compiled_equals_eager(name: str) -> None:
    plan = PLANS[name]
    eager = fd.sample(elementwise, plan, (4, *ELEMENTS), seed=3, mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a silent fallback to eager would be no test
        compiled = fd.Sampler(elementwise, plan, mode="compile")((4, *ELEMENTS), seed=3)
    assert (compiled - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.compiled
def test_auto_keeps_the_samples() -> None:
    plan = PLANS["ddpm"]
    sampler = fd.Sampler(elementwise, plan)
    first, again = sampler((4, *ELEMENTS), seed=3), sampler((4, *ELEMENTS), seed=3)
    assert torch.equal(first, again)
    eager = fd.sample(elementwise, plan, (4, *ELEMENTS), seed=3)
    assert (first - eager).abs().max() <= 1e-5 * eager.abs().max()


@plans
def test_a_sample_does_not_depend_on_its_batch(plan: fd.Plan) -> None:
    alone = torch.cat([fd.sample(elementwise, plan, (1, *ELEMENTS), seed=5, first=i) for i in range(7)])
    seven = fd.sample(elementwise, plan, (7, *ELEMENTS), seed=5)
    many = fd.sample(elementwise, plan, (64, *ELEMENTS), seed=5)
    assert torch.equal(alone, seven) and torch.equal(seven, many[:7])


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_a_compiled_sample_does_not_depend_on_its_batch(name: str) -> None:
    out = []
    for batch in (1, 7, 64):
        sampler = fd.Sampler(elementwise, PLANS[name], mode="compile")
        sampler._compiled_model = elementwise, elementwise  # the step and the noise are what is compiled here
        out.append(sampler((batch, *ELEMENTS), seed=5))
    assert torch.equal(out[0], out[1][:1]) and torch.equal(out[1], out[2][:7])


def test_seeds_in_any_order() -> None:
    plan, seeds = PLANS["ddpm"], [11, 0, 2**62, 7, 5]
    order = [3, 0, 4, 2, 1]
    straight = fd.sample(elementwise, plan, (5, *ELEMENTS), seeds=seeds)
    shuffled = fd.sample(elementwise, plan, (5, *ELEMENTS), seeds=[seeds[i] for i in order])
    assert torch.equal(straight[order], shuffled)
    assert torch.equal(straight, fd.sample(elementwise, plan, (5, *ELEMENTS), seeds=torch.tensor(seeds)))
    assert torch.equal(fd.sample(elementwise, plan, (1, *ELEMENTS), seed=7), straight[3:4])
    assert not torch.equal(fd.sample(elementwise, plan, (2, *ELEMENTS), seed=0)[1], straight[1])


@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 7), (2, 3, 33, 31), (1, 4099)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    plan = PLANS["ddpm"]
    want = reference_sample(elementwise, plan, start(plan, 1, shape[0], shape[1:]), philox(1, shape[0], shape[1:]))
    assert (fd.sample(elementwise, plan, shape, seed=1) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, trajectory = fd.sample(elementwise, PLANS["heun"], shape, trajectory=True)
    assert x.shape == shape and trajectory.x.shape == (14, *shape)


def test_times_reach_the_model() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.clone())
        return x * 0.5

    fd.sample(model, solvers.ddim(CHAIN, 4), (3, 2))
    assert [t.dtype for t in seen] == [torch.int64] * 4 and [t.tolist() for t in seen] == [
        [v] * 3 for v in (999, 749, 499, 249)
    ]
    seen.clear()
    fd.sample(model, solvers.ddim(S.VP(), 4), (3, 2), dtype=torch.bfloat16)
    assert all(t.dtype == torch.float32 and t.shape == (3,) for t in seen)
    np.testing.assert_allclose([t[0].item() for t in seen], np.linspace(1, 1e-3, 4), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@plans
def test_low_precision_models(plan: fd.Plan, dtype: torch.dtype) -> None:
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return elementwise(x.float(), t).to(dtype)

    def rounded(x: Tensor, t: Tensor) -> Tensor:  # the same roundings around a float64 state
        return elementwise(x.to(dtype).float(), t.float()).to(dtype).to(x.dtype)

    got = fd.sample(model, plan, (3, *ELEMENTS), seed=2, dtype=dtype)
    want = reference_sample(rounded, plan, start(plan, 2, 3, ELEMENTS), philox(2, 3, ELEMENTS))
    assert seen == {dtype} and got.dtype == torch.float32
    # a rounding that falls the other way moves the input by one ulp: compare on the scale of that ulp
    ulp = torch.finfo(dtype).eps
    assert (got - want).abs().max() <= 4 * ulp * want.abs().max()
    assert (got - want).abs().mean() <= 0.3 * ulp * want.abs().max()
    assert fd.sample(model, plan, (3, *ELEMENTS), dtype=dtype, out_dtype=dtype).dtype == dtype


class Conditional(nn.Module):
    """m = tanh(x + t) + shift: the guided output is tanh + u + w (c - u) in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        self.calls.append(len(x))
        return scale * elementwise(x, t) + shift.view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["number", "sample", "row", "row-sample", "array"])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "edm"])
def test_guidance(name: str, kind: str, batched: bool) -> None:
    plan, batch = PLANS[name], 3
    n = plan.nfe
    w = {
        "number": 2.5,
        "sample": torch.tensor([1.0, 2.0, 3.0]),
        "row": torch.linspace(1, 3, n)[:, None],
        "row-sample": torch.linspace(1, 3, n)[:, None] * torch.tensor([1.0, 0.5, 2.0]),
        "array": np.linspace(1, 3, n)[:, None],
    }[kind]
    table = torch.as_tensor(w, dtype=torch.float64).reshape(
        (1, 1) if kind == "number" else (-1, 3) if kind == "sample" else (n, -1)
    )
    table = table.expand(n, batch)
    c, u = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.1, 0.0, 0.1])
    model, row = Conditional(), iter(range(n))

    def closed(x: Tensor, t: Tensor) -> Tensor:
        shift = u + table[next(row)] * (c - u)
        return 0.7 * elementwise(x, t) + shift.view(-1, 1, 1, 1)

    got = fd.sample(
        model, plan, (batch, *ELEMENTS), seed=4, cond={"shift": c, "scale": 0.7}, uncond={"shift": u}, guidance=w,
        batched_guidance=batched,
    )  # fmt: skip
    want = reference_sample(closed, plan, start(plan, 4, batch, ELEMENTS), philox(4, batch, ELEMENTS))
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert model.calls == ([2 * batch] * n if batched else [batch] * 2 * n)


def test_guidance_of_one_is_none() -> None:
    model = Conditional()
    cond, uncond = {"shift": torch.zeros(2)}, {"shift": torch.ones(2)}
    fd.sample(model, PLANS["heun"], (2, 4), cond=cond, uncond=uncond, guidance=1.0)
    assert model.calls == [2] * 13


@plans
def test_trajectory(plan: fd.Plan) -> None:
    x, kept = fd.sample(elementwise, plan, (2, *ELEMENTS), seed=6, trajectory=True)
    assert kept.x.shape == (plan.nfe + 1, 2, *ELEMENTS) and kept.x0.shape == (plan.nfe, 2, *ELEMENTS)
    assert torch.equal(kept.x[-1], x) and torch.equal(x, fd.sample(elementwise, plan, (2, *ELEMENTS), seed=6))
    assert (kept.x[0] - start(plan, 6, 2, ELEMENTS)).abs().max() <= 1e-5 * plan.init_scale
    np.testing.assert_array_equal(kept.t.numpy(), plan.t)
    for k in range(plan.nfe):  # x0-hat from its definition
        t = torch.full((2,), plan.times[k].item(), dtype=torch.int64 if plan.times.dtype == np.int64 else torch.float32)
        m = elementwise(float(plan.c_in[k]) * kept.x[k], t)
        p = (plan.c_skip[k] * kept.x[k] + plan.c_out[k] * m).clamp(plan.lo[k], plan.hi[k])
        assert (kept.x0[k] - p).abs().max() <= 1e-5 * max(1.0, abs(plan.c_skip[k]) * float(kept.x[k].abs().max()))


@plans
def test_callback_edits_are_what_the_next_row_sees(plan: fd.Plan) -> None:
    rows: list[int] = []

    def replace(row: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        rows.append(row)
        assert t.shape == (2,) and x.shape == x0.shape
        return x * 0.9 if row % 2 else None

    def in_place(row: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        if row % 2:
            x.mul_(0.9)

    want = reference_sample(
        elementwise, plan, start(plan, 7, 2, ELEMENTS), philox(7, 2, ELEMENTS),
        edit=lambda k, x: x * 0.9 if k % 2 else x,
    )  # fmt: skip
    for callback in (replace, in_place):
        got = fd.sample(elementwise, plan, (2, *ELEMENTS), seed=7, callback=callback)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert rows == list(range(plan.nfe))


def test_starts() -> None:
    plan = solvers.dpmpp_2m(CHAIN, 20, start=8, prediction="v")
    clean = torch.linspace(-1, 1, 30).view(2, 15)
    noise = start(plan, 9, 2, (15,)) / plan.init_scale
    x_T = plan.alpha[0] * clean + plan.sigma[0] * noise
    a = fd.sample(elementwise, plan, (2, 15), seed=9, x_init=clean)
    b = fd.sample(elementwise, plan, (2, 15), seed=9, x_T=x_T.float())
    assert (a - b).abs().max() <= 1e-6
    assert not torch.equal(a, fd.sample(elementwise, plan, (2, 15), seed=9))


def test_torch_noise_is_torchs_own_stream() -> None:
    plan = PLANS["ddpm"]
    draw = torch.Generator().manual_seed(42)
    x_T = torch.randn(3, 5, 4, generator=draw)
    want = reference_sample(
        elementwise, plan, x_T.double() * plan.init_scale, lambda k, x: torch.randn(3, 5, 4, generator=draw).double()
    )
    got = fd.sample(elementwise, plan, (3, 5, 4), noise="torch", generator=torch.Generator().manual_seed(42))
    assert (got - want).abs().max() <= 1e-5
    assert torch.equal(got, fd.sample(elementwise, plan, (3, 5, 4), noise="torch", seed=42))
    each = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    listed = fd.sample(elementwise, plan, (3, 5, 4), noise="torch", generator=each)
    alone = fd.sample(elementwise, plan, (1, 5, 4), noise="torch", generator=torch.Generator().manual_seed(2))
    assert torch.equal(listed[1:2], alone)


def test_callable_noise_is_drawn_as_often_as_the_plan_says() -> None:
    draws = np.array([2] * 6 + [0] + [1] * 5)
    plan = PLANS["ddpm"]
    plan = dataclasses.replace(plan, draws=draws, s=np.where(np.arange(12)[:, None] == 6, 0, plan.s))
    calls: list[int] = []

    def noise(row: int, like: Tensor) -> Tensor:
        calls.append(row)
        return torch.full_like(like, 0.1 * len(calls))

    x = fd.sample(elementwise, plan, (2, 4), noise=noise)
    assert calls == np.repeat(np.arange(12), draws).tolist()
    count = iter(range(1, 100))
    want = reference_sample(
        elementwise, plan, start(plan, 0, 2, (4,)), lambda k, like: torch.full_like(like, 0.1 * next(count))
    )
    assert (x - want).abs().max() <= 1e-5


@plans
@pytest.mark.parametrize("native", [False, True])
def test_noise_may_be_the_state_itself(plan: fd.Plan, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("fastdiff.cpu.function", lambda *_: None)
    same, copied = (
        fd.sample(elementwise, plan, (2, 4), seed=1, noise=noise)
        for noise in (lambda _, like: like, lambda _, like: like.clone())
    )
    assert torch.equal(same, copied)


class _Allocations(TorchDispatchMode):
    """Counts fresh tensors of at least `size` elements made by any op."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.known, self.made = size, set(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        before = {
            a.untyped_storage().data_ptr()
            for a in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(a, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for o in torch.utils._pytree.tree_leaves(out):
            if isinstance(o, Tensor) and o.numel() >= self.size and o.untyped_storage().data_ptr() not in before:
                self.made.append(str(func))
        return out


@plans
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_an_eager_loop_allocates_nothing_per_step(
    plan: fd.Plan, guided: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the C++ loop's noise and with torch's; the watch is a dispatch mode, under which the loop would not run."""
    monkeypatch.setattr("fastdiff.native.plain", lambda tensors: native)
    monkeypatch.setattr("fastdiff.noise.BLOCK_ELEMENTS", 1)  # noise a row at a time, as for large states
    m = torch.linspace(-1, 1, 2 * 4096).view(2, 4096)

    guidance: dict[str, Any] = {
        "cond": {"which": 1},
        "uncond": {"which": 2},
        "guidance": 2.0,
        "batched_guidance": False,
    }
    options = guidance if guided else {}
    sampler = fd.Sampler(lambda x, t, which=0: m, plan, mode="eager", **options)
    sampler((2, 4096))  # buffers
    with _Allocations(1024) as watch:
        sampler((2, 4096), seed=1)
    assert len(watch.made) <= 2, watch.made  # once a run: the start's noise and the result


def test_a_model_that_returns_its_input() -> None:
    plan = solvers.euler_maruyama(S.VP(), 6, prediction="eps")
    same = fd.sample(lambda x, t: x, plan, (2, 9), seed=1)
    copied = fd.sample(lambda x, t: x.clone(), plan, (2, 9), seed=1)
    assert torch.equal(same, copied)


def test_non_contiguous_outputs() -> None:
    plan = PLANS["dpmpp_2m"]
    straight = fd.sample(lambda x, t: 0.5 * x, plan, (2, 6, 6), seed=1)
    turned = fd.sample(lambda x, t: (0.5 * x).transpose(1, 2).contiguous().transpose(1, 2), plan, (2, 6, 6), seed=1)
    assert torch.equal(straight, turned)


def test_parameters_choose_dtype_and_device() -> None:
    net = nn.Linear(4, 4, dtype=torch.bfloat16)
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(x.dtype)
            return self.net(x)

    assert fd.sample(Net(), PLANS["heun"], (2, 4)).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
