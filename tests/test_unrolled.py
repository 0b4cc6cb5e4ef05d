"""A plan in plain torch: the sampler's own samples, exported, and gradients through its rows."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import rng, solvers
from fastdiff import schedules as S
from fastdiff.reference import reference_sample

ROOT = Path(__file__).parents[1]
SHAPE = (3, 4, 5)
CHAIN = S.Betas(S.linear_betas(100))
PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 8, clip=(-1, 1)),
    "ddim": solvers.ddim(CHAIN, 8, prediction="v"),
    "heun": solvers.heun(S.EDM(0.02, 10.0), 5, prediction="edm"),
    "dpmpp_2m": solvers.dpmpp_2m(CHAIN, 8, clip=(-0.5, 2.0)),
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde(S.VP(), 8, prediction="v"),
    "dpmpp_sde": solvers.dpmpp_sde(S.VP(), 5, prediction="x0"),
    "unipc": solvers.unipc(S.Flow(3.0), 8, prediction="flow", order=3),
    "sa_solver": solvers.sa_solver(CHAIN, 8, prediction="x0"),
    "plms": solvers.plms(CHAIN, 8, prediction="v"),
    "euler_maruyama": solvers.euler_maruyama(S.VP(), 8, prediction="score", final="min"),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        time = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / 100
        return self.gain * torch.tanh(x + time) + shift


def given(plan: fd.Plan, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """x_T and the noise of a seeded run."""
    seeds, index = torch.full((3,), 4), torch.arange(3)
    rows = [k for k in range(plan.nfe) if plan.s[k].any()]
    normals = [rng.normal(seeds, SHAPE[1:], row=k, index=index) for k in rows]
    start = plan.init_scale * rng.normal(seeds, SHAPE[1:], stream=0, index=index)
    return start.to(dtype), torch.stack(normals).to(dtype) if normals else None


@plans
def test_samples_are_the_samplers(plan: fd.Plan) -> None:
    net, (x_T, noise) = Net(), given(plan)
    shift = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(0))
    got = fd.Unrolled(net, plan)(x_T, noise, {"shift": shift})
    want = fd.sample(net, plan, SHAPE, seed=4, cond={"shift": shift})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert got.requires_grad and got.dtype == torch.float32


@pytest.mark.parametrize("column", [False, True])
def test_guidance(column: bool) -> None:
    """A weight, or the plan's own column of them: CFG++."""
    plan, net = PLANS["ddim"], Net()
    plan = fd.ops.cfg_plus_plus(plan, 0.6) if column else plan
    x_T, _ = given(plan)
    c, u = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))

    def network(x: Tensor, t: Tensor, shift: Tensor, both: float) -> Tensor:
        return both * net(x, t, shift)

    for w in (None, 1, 2.5) if column else (1, 2.5):
        given_to = {"cond": {"shift": c, "both": 0.9}, "uncond": {"shift": u}}
        got = fd.Unrolled(network, plan, guidance=w)(x_T, None, **given_to)
        want = fd.sample(network, plan, SHAPE, seed=4, guidance=w, **given_to)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    same = fd.Unrolled(network, plan, guidance=np.float32(2.5))(x_T, None, **given_to)
    assert torch.equal(same, got)
    alone = fd.Unrolled(network, plan, guidance=1)(x_T, None, given_to["cond"])
    assert torch.equal(alone, fd.Unrolled(network, plan, guidance=1)(x_T, None, **given_to))


@plans
def test_gradients_are_those_of_the_plan(plan: fd.Plan) -> None:
    """Of a parameter, x_T and the noise, against autograd through the float64 rows; checkpointed bit for bit."""
    net = Net().double()
    x_T, noise = given(plan, torch.float64)
    x_T = (x_T / plan.init_scale).requires_grad_()

    def loss(y: Tensor) -> Tensor:
        return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()

    def of(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(y), [net.gain, x_T]))

    rows = [k for k in range(plan.nfe) if plan.s[k].any()]
    drawn = dict(zip(rows, () if noise is None else noise, strict=True))  # some draw what they do not use
    want = of(reference_sample(net, plan, x_T, lambda k, like: drawn.get(k, torch.zeros_like(like))))
    got = of(fd.Unrolled(net, plan)(x_T, noise))
    again = of(fd.Unrolled(net, plan, checkpoint=True)(x_T, noise))
    for a, b, c in zip(got, want, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert torch.equal(a, c)


def test_gradients_of_the_last_rows() -> None:
    """DRaFT-1: d x0 / d gain of the last row at the state before it, which no gradient reaches."""
    plan, net = PLANS["ddim"], Net().double()
    x_T, _ = given(plan, torch.float64)
    x_T.requires_grad_()
    y = fd.Unrolled(net, plan, grad_rows=1)(x_T)
    (got,) = torch.autograd.grad(y.sum(), net.gain, retain_graph=True)
    x = x_T.detach()
    states: list[Tensor] = []
    reference_sample(net, plan, x, lambda k, like: like, edit=lambda k, s: states.append(s.detach()) or s)
    m = torch.tanh(states[-2] + float(plan.times[-1]) / 100)
    slope = float(plan.b[-1, 0] * plan.c_out[-1] + plan.d[-1, 0])
    assert float(got) == pytest.approx(slope * float(m.sum()), rel=1e-6)
    with pytest.raises(RuntimeError, match="not have been used|appears to not"):
        torch.autograd.grad(y.sum(), x_T)
    again = fd.Unrolled(net, plan, grad_rows=np.int64(1), checkpoint=True)(x_T)
    assert torch.equal(torch.autograd.grad(again.sum(), net.gain)[0], got)
    full = fd.Unrolled(net, plan)(x_T)
    (whole,) = torch.autograd.grad(full.sum(), net.gain)
    assert abs(float(whole - got)) > 0.01 * abs(float(whole))


def test_checkpoints_hold_one_row_at_a_time() -> None:
    """What autograd keeps of 8 rows: the states alone, where it keeps every row's activations otherwise."""
    plan, kept = PLANS["ddim"], [0]
    x_T, _ = given(plan)

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.back = torch.nn.Linear(5, 200), torch.nn.Linear(200, 5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.back(torch.tanh(self.into(x)))

    def count(v: Tensor) -> Tensor:
        kept[0] += v.numel()
        return v

    found = []
    for checkpoint in (False, True):
        kept[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda v: v):
            fd.Unrolled(Wide(), plan, checkpoint=checkpoint)(x_T.requires_grad_())
        found.append(kept[0])
    assert found[0] > 8 * 12 * 200 and found[1] <= 3 * 8 * x_T.numel()


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
def test_exported(name: str) -> None:
    """torch.export holds rows, coefficients and network, for any batch size."""
    plan, net = PLANS[name], Net()
    x_T, noise = given(plan)
    batch = torch.export.Dim("batch", min=2)
    shapes: dict[str, Any] = {"x_T": {0: batch}, "noise": None if noise is None else {1: batch}}
    program = torch.export.export(fd.Unrolled(net, plan), (x_T, noise), dynamic_shapes=shapes)
    want = fd.sample(net, plan, SHAPE, seed=4)
    got = program.module()(x_T, noise)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    two = program.module()(x_T[:2], None if noise is None else noise[:, :2])
    torch.testing.assert_close(two, want[:2], rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert not any("fastdiff" in str(node.target) for node in program.graph.nodes)


def test_the_policy_of_the_docs_is_exported() -> None:
    """docs/drop-in.md's last block, with a network and an observation of a policy."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "drop-in.md").read_text(), re.S)[-1]

    class Policy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(7 + 3, 7)

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            seen = torch.cat([x, condition[:, None].expand(-1, x.shape[1], -1)], -1)
            return self.layer(seen) + t.view(-1, 1, 1) / 100

    names: dict[str, Any] = {"torch": torch, "fd": fd, "network": Policy(), "chain": CHAIN,
                             "observation": torch.randn(1, 3)}  # fmt: skip
    torch.manual_seed(0)
    exec(block, names)  # noqa: S102 - the project's own page
    torch.manual_seed(0)
    torch.randn(1, 16, 7)
    want = fd.sample(names["network"], names["policy"].plan, (1, 16, 7), x_T=torch.randn(1, 16, 7),
                     cond={"condition": names["observation"]})  # fmt: skip
    torch.testing.assert_close(names["actions"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compiled
def test_a_package_without_python(tmp_path: Path) -> None:
    """AOTInductor compiles network and rows into one library."""
    plan, net = PLANS["dpmpp_2m"], Net()
    x_T, _ = given(plan)
    with torch.no_grad():
        program = torch.export.export(fd.Unrolled(net, plan), (x_T,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "policy.pt2"))
        got = torch._inductor.aoti_load_package(package)(x_T)
    want = fd.sample(net, plan, SHAPE, seed=4)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.compiled
def test_compiled_whole() -> None:
    plan, net = PLANS["dpmpp_2m_sde"], Net()
    x_T, noise = given(plan)
    given_to = {"cond": {"shift": torch.ones(3, 1, 1)}, "uncond": {"shift": torch.zeros(3, 1, 1)}}
    whole = torch.compile(fd.Unrolled(net, plan, guidance=1.5), fullgraph=True)
    want = fd.sample(net, plan, SHAPE, seed=4, guidance=1.5, **given_to)
    torch.testing.assert_close(whole(x_T, noise, **given_to), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["ddim", "flow"])
def test_the_model_sees_the_samplers_times(name: str) -> None:
    """int64 or float32 [B], on x's device, whatever the module was moved to; nothing a model does to them stays."""
    plan = PLANS["ddim"] if name == "ddim" else solvers.euler(S.Flow(3.0), 50, prediction="flow")
    seen: dict[str, list[Tensor]] = {"sample": [], "unrolled": []}

    class Watched(torch.nn.Linear):
        into = "sample"

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen[self.into].append(t.clone())
            t.mul_(1000)
            return super().forward(x)

    net = Watched(5, 5)
    fd.sample(lambda x, t: net(x, t.clone()), plan, SHAPE, seed=0)
    net.into = "unrolled"
    sampler = fd.Unrolled(net, plan).to(torch.bfloat16)
    sampler(torch.zeros(SHAPE))
    for a, b in zip(seen["sample"], seen["unrolled"], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    sampler(torch.zeros(SHAPE))
    assert all(torch.equal(a, b) for a, b in zip(seen["sample"], seen["unrolled"][plan.nfe :], strict=True))
    assert set(sampler.state_dict()) == {"model.weight", "model.bias"}
    net.into = "meta"
    seen["meta"] = []
    assert sampler.to("meta")(torch.zeros(SHAPE, device="meta")).is_meta
    assert all(t.is_meta for t in seen["meta"])


def test_low_precision_networks_are_the_samplers() -> None:
    """A Module's parameters say the dtype of its input; its outputs are widened before they are summed."""
    plan, net = PLANS["dpmpp_2m"], torch.nn.Linear(5, 5).bfloat16()
    x_T, _ = given(plan)

    def of(module: torch.nn.Linear) -> torch.nn.Module:
        return torch.nn.Sequential(module)

    class Timed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = of(net)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    got, want = fd.Unrolled(Timed(), plan)(x_T), fd.sample(Timed(), plan, SHAPE, seed=4)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["plms", "heun"])
def test_a_model_may_use_its_output_memory_again(name: str) -> None:
    plan, held = PLANS[name], torch.empty(SHAPE)
    x_T, _ = given(plan)

    def model(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        return torch.tanh(x + shift, out=held)

    with torch.no_grad():
        got = fd.Unrolled(model, plan, guidance=2.0)(x_T, None, {"shift": 0.3}, {"shift": 0.0})
    want = fd.sample(lambda x, t, shift: torch.tanh(x + shift), plan, SHAPE, seed=4, guidance=2.0,
                     cond={"shift": torch.tensor(0.3)}, uncond={"shift": torch.tensor(0.0)},
                     batched_guidance=False)  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_the_callers_start_stays() -> None:
    """Also where the result is it, and of a module that was made in inference mode."""
    plan = solvers.ddim(S.Flow(), 1, prediction="x0")
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert fd.Unrolled(lambda x, t: x, plan)(x).data_ptr() != x.data_ptr()
    with torch.inference_mode():
        made = fd.Unrolled(Net(), PLANS["ddim"])
        made(x)
    made.model.gain = torch.nn.Parameter(torch.tensor(0.5))
    made(x).sum().backward()
    assert made.model.gain.grad is not None and torch.equal(x, torch.ones(2, 3))


def test_a_reward_trains_the_model_through_the_sampler() -> None:
    """The mean of the samples is the network's shift in closed form; gradient descent on (mean - 2)^2 finds it."""
    plan = solvers.ddim(CHAIN, 5, prediction="x0")  # x0-hat of the last row is the sample
    shift = torch.nn.Parameter(torch.tensor(0.0))
    sampler = fd.Unrolled(lambda x, t: shift.expand(x.shape), plan, checkpoint=True)
    step = torch.optim.SGD([shift], 0.25)
    for _ in range(60):
        step.zero_grad()
        (sampler(torch.randn(4, 3)).mean() - 2).square().backward()
        step.step()
    assert float(shift.detach()) == pytest.approx(2.0, abs=1e-6)


def test_dtypes() -> None:
    seen: list[torch.dtype] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    plan = PLANS["ddim"]
    for state, dtype, result in (
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
    ):
        y = fd.Unrolled(model, plan, dtype=dtype)(torch.ones(2, 3, dtype=state))
        assert y.dtype == result and seen[-1] == (dtype or result)
    assert math.isfinite(float(y.sum()))


X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fd.Unrolled(Net(), solvers.ddpm(CHAIN, 5, variance="learned_range")), ValueError,
         "learns its variance"),
        (lambda: fd.Unrolled(Net(), solvers.bfn_discrete(S.BFNDiscrete(2.0, 5), 4)), ValueError,
         "reads out classes or bins"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], grad_rows=0), ValueError, r"in 1\.\.8.*got 0"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], grad_rows=True), ValueError, "got True"),
        (lambda: fd.Unrolled(Net(), PLANS["ddpm"])(X), ValueError, "must hold 7 normals.*got 0"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X, X[None]), ValueError, "must hold 0 normals.*got 1"),
        (lambda: fd.Unrolled(Net(), PLANS["ddpm"])(X, torch.zeros(7, 3, 4, 4)), ValueError, "noise must have"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X.long()), TypeError, "x_T must be float32"),
        (lambda: fd.Unrolled(lambda x, t: x[:1], PLANS["ddim"])(X), ValueError, r"\(3, 4, 5\), got \(1, 4, 5\)"),
        (lambda: fd.Unrolled(lambda x, t: None, PLANS["ddim"])(X), TypeError, "model's output must .* got NoneType"),
        (lambda: fd.Unrolled(lambda x, t: x.long(), PLANS["ddim"])(X), TypeError, "model's output must .* got int64"),
        (lambda: fd.Unrolled(lambda x, t: x.mul_(0.5), PLANS["ddim"])(X), ValueError, "changed its input x in place"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X, uncond={"shift": 1.0}), ValueError, "uncond was given without"),
        (lambda: fd.Unrolled(Net(), fd.ops.cfg_plus_plus(PLANS["ddim"], 0.6))(X), ValueError, "guidance needs uncond"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], guidance=2.0)(X), ValueError, "guidance needs uncond"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], guidance=math.nan), ValueError, "finite number, got nan"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], guidance=torch.ones(3)), ValueError, "must be a finite number"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X, [X]), TypeError, "noise must be a torch.Tensor, got list"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X, X.to("meta")), ValueError, "noise must be on cpu, got meta"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"])(X, None, X), TypeError, "cond must be a dict.*got Tensor"),
        (lambda: fd.Unrolled(Net(), "ddim"), TypeError, "must be a fastdiff.Plan"),
        (lambda: fd.Unrolled(None, PLANS["ddim"]), TypeError, "model must be callable"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], grad_rows=2.5), ValueError, "got 2.5"),
        (lambda: fd.Unrolled(Net(), PLANS["ddim"], dtype="bf16"), TypeError, "floating point torch.dtype, got 'bf16'"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
