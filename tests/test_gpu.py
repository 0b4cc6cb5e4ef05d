"""What only a CUDA device can show: modes, graphs and their nodes, noise, large offsets. Run with -m gpu."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, solvers
from fastdiff import schedules as S

pytestmark = pytest.mark.gpu
CHAIN = S.Betas(S.scaled_linear_betas(1000))
SHAPE = (4, 3, 17, 5)
PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 20, clip=(-1, 1)),
    "heun": solvers.heun(S.EDM(), 10, prediction="edm"),
    "dpmpp_2m": solvers.dpmpp_2m(CHAIN, 20, prediction="v"),
    "flow": solvers.euler(S.Flow(3.0), 12, prediction="flow"),
    "euler_maruyama": solvers.euler_maruyama(S.VP(), 20, prediction="score"),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def model(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    time = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 1000
    return torch.tanh(1.3 * x + time) + (shift.view(-1, 1, 1, 1) if isinstance(shift, Tensor) else shift)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a.cpu() - b.cpu()).abs().max() <= 1e-5 * b.abs().max().cpu())


def kernels(run: Callable[[], object]) -> int:
    """CUDA kernels (not copies or fills) that a call launches, replays included."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not n.lower().startswith(("memcpy", "memset")) for n in names)


@plans
def test_cpu_and_every_mode_give_the_same_samples(plan: fd.Plan) -> None:
    want = fd.sample(model, plan, SHAPE, seed=3)
    for mode in ("eager", "step_graph", "loop_graph", "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sampler = fd.Sampler(model, plan, mode=mode, device="cuda")
            for _ in range(2):  # the second call replays what the first captured
                assert close(sampler(SHAPE, seed=3), want), mode
            other = sampler(SHAPE, seed=4)
        assert close(other, fd.sample(model, plan, SHAPE, seed=4)), mode


@plans
def test_rows_after_the_first_are_launched_again(plan: fd.Plan) -> None:
    """Outputs at changing addresses, one of them not aligned to 16 bytes: the samples stay those of the CPU."""
    held = [torch.empty(4 * 255 + k, device="cuda")[k:].view(SHAPE) for k in (0, 1, 4)]
    calls = itertools.count()

    def moving(x: Tensor, t: Tensor) -> Tensor:
        return held[next(calls) % 3].copy_(model(x, t))

    sampler = fd.Sampler(moving, plan, mode="eager", device="cuda")
    for seed in (3, 4):
        assert close(sampler(SHAPE, seed=seed), fd.sample(model, plan, SHAPE, seed=seed))
    known = next(iter(sampler._runs.values())).run.relaunch.known
    assert len(known) == 2 and all(known.values())


@plans
@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
def test_a_sample_does_not_depend_on_its_batch(plan: fd.Plan, mode: str) -> None:
    out = [fd.Sampler(model, plan, mode=mode, device="cuda")((b, *SHAPE[1:]), seed=5) for b in (1, 7, 64)]
    assert torch.equal(out[0], out[1][:1]) and torch.equal(out[1], out[2][:7])


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance(mode: str, batched: bool) -> None:
    plan = PLANS["dpmpp_2m"]
    w = torch.linspace(1, 3, plan.nfe)[:, None] * torch.tensor([1.0, 0.5, 2.0, 1.5])
    outputs = []
    for device in ("cpu", "cuda"):
        c, u = torch.linspace(0, 1, 4, device=device), torch.linspace(1, 0, 4, device=device)
        sampler = fd.Sampler(
            model, plan, mode="eager" if device == "cpu" else mode, device=device, batched_guidance=batched
        )
        outputs += [sampler(SHAPE, seed=1, cond={"shift": v}, uncond={"shift": u}, guidance=w) for v in (c, 2 * c)]
    assert close(outputs[2], outputs[0]) and close(outputs[3], outputs[1])


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_a_number_on_the_host_as_a_condition(mode: str) -> None:
    """A kernel would take it as an argument, which a graph keeps."""
    plan = PLANS["dpmpp_2m"]
    sampler = fd.Sampler(lambda x, t, by: by * model(x, t), plan, mode=mode, device="cuda")
    for by in (0.5, 0.7, 0.5):
        want = fd.sample(lambda x, t, by=by: by * model(x, t), plan, SHAPE, seed=1)
        assert close(sampler(SHAPE, seed=1, cond={"by": torch.tensor(by)}), want)
    assert len(sampler._runs) == 1


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_under_autocast_a_graph_keeps_no_weights_of_its_cache(mode: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(SHAPE[-1], SHAPE[-1], device="cuda")
    plan, sampler = PLANS["heun"], fd.Sampler(lambda x, t: layer(x).float(), PLANS["heun"], mode=mode, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            want = fd.sample(lambda x, t: layer(x).float(), plan, SHAPE, seed=1, mode="eager", device="cuda")
        with torch.autocast("cuda", dtype):  # another one: the first one's casts are gone
            held = [torch.full_like(layer.weight, torch.nan, dtype=dtype) for _ in range(64)]
            assert close(sampler(SHAPE, seed=1), want)
            del held
    plain = fd.sample(lambda x, t: layer(x).float(), plan, SHAPE, seed=1, mode="eager", device="cuda")
    assert close(sampler(SHAPE, seed=1), plain) and len(sampler._runs) == 3


def test_after_a_failed_capture_everyone_still_draws() -> None:
    """torch before 2.13 leaves the default generator in the capture."""

    def reads(x: Tensor, t: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            return x
        return model(x, t) + 0 * torch.randn_like(x)

    stream = torch.cuda.current_stream()
    for mode in ("step_graph", "loop_graph"):
        with pytest.warns(RuntimeWarning, match="sampling runs eagerly"):
            got = fd.Sampler(reads, PLANS["ddpm"], mode=mode, device="cuda")(SHAPE, seed=1)
        assert close(got, fd.sample(model, PLANS["ddpm"], SHAPE, seed=1))
        assert torch.cuda.current_stream() == stream and torch.randn(8, device="cuda").isfinite().all()
        held = [torch.full((1 << 20,), float(k), device="cuda") for k in range(8)]  # not in the pool of a lost capture
        assert [float(v.mean()) for v in held] == list(range(8))
        assert close(
            fd.Sampler(model, PLANS["ddpm"], mode=mode, device="cuda")(SHAPE, seed=1),
            fd.sample(model, PLANS["ddpm"], SHAPE, seed=1),
        )


@pytest.mark.parametrize("mode", ["eager", "step_graph", "loop_graph"])
def test_calls_on_two_streams_wait_for_each_other(mode: str) -> None:
    plan, shape = PLANS["ddpm"], (64, 3, 64, 64)
    sampler = fd.Sampler(lambda x, t: 0.1 * x, plan, mode=mode, device="cuda")
    want = [sampler(shape, seed=s) for s in range(8)]
    streams, got = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for s in range(8):
        with torch.cuda.stream(streams[s % 2]):
            got.append(sampler(shape, seed=s))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_buffers_that_are_freed_wait_for_the_stream_that_used_them() -> None:
    """A Sampler made on one stream, called on another and deleted while that one works: what the first stream allocates
    next overwrites nothing."""
    plan, shape, other = PLANS["ddpm"], (64, 3, 64, 64), torch.cuda.Stream()
    want = fd.sample(model, plan, shape, seed=1, mode="eager", device="cuda")
    for _ in range(3):
        sampler = fd.Sampler(model, plan, mode="eager", device="cuda")
        sampler(shape, seed=0)
        with torch.cuda.stream(other):
            torch.cuda._sleep(100_000_000)
            got = sampler(shape, seed=1)
        del sampler
        junk = [torch.full(shape, torch.nan, device="cuda") for _ in range(8)]
        torch.cuda.synchronize()
        assert torch.equal(got, want) and len(junk) == 8


@pytest.mark.parametrize("mode", ["eager", "step_graph"])
def test_callbacks_and_trajectories(mode: str) -> None:
    plan = PLANS["heun"]

    def callback(row: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        return 0.9 * x if row % 2 else None

    want, kept = fd.sample(model, plan, SHAPE, seed=2, callback=callback, trajectory=True)
    got, seen = fd.Sampler(model, plan, mode=mode, device="cuda")(SHAPE, seed=2, callback=callback, trajectory=True)
    assert close(got, want) and close(seen.x, kept.x) and close(seen.x0, kept.x0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    def low(x: Tensor, t: Tensor) -> Tensor:
        return model(x.float(), t).to(dtype)

    for plan in PLANS.values():
        want = fd.sample(low, plan, SHAPE, seed=2, dtype=dtype)
        for mode in ("eager", "loop_graph"):
            got = fd.Sampler(low, plan, mode=mode, device="cuda", dtype=dtype)(SHAPE, seed=2).cpu()
            assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_torch_noise_in_a_step_graph() -> None:
    plan = PLANS["ddpm"]
    x = [
        fd.Sampler(model, plan, mode=mode, device="cuda", noise="torch")(
            SHAPE, generator=torch.Generator("cuda").manual_seed(1)
        )
        for mode in ("eager", "step_graph")
    ]
    assert close(x[1], x[0])


@plans
def test_nodes_beyond_the_model(plan: fd.Plan) -> None:
    """loop_graph: 1 kernel a row; step_graph: 2. The model is one kernel (tanh of its input)."""

    def one_kernel(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    for mode, beyond in (("loop_graph", 1), ("step_graph", 2)):
        sampler = fd.Sampler(one_kernel, plan, mode=mode, device="cuda")
        sampler(SHAPE)
        graph = next(iter(sampler._runs.values())).graph
        assert graph is not None
        graph.rewind()
        rows = plan.nfe if mode == "loop_graph" else 1
        assert kernels(lambda graph=graph: graph.advance(0)) == rows * (1 + beyond)  # type: ignore[misc]


def test_a_model_that_cannot_be_captured_falls_back_loudly() -> None:
    def syncing(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * float(t[0].item() > -1)

    plan = PLANS["dpmpp_2m"]
    sampler = fd.Sampler(syncing, plan, mode="step_graph", device="cuda")
    with pytest.warns(RuntimeWarning, match="sampling runs eagerly"):
        x = sampler(SHAPE, seed=1)
    assert close(x, fd.sample(syncing, plan, SHAPE, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # once
        sampler(SHAPE, seed=1)


def test_new_seeds_and_conditions_reach_a_captured_graph() -> None:
    plan = PLANS["ddpm"]
    sampler = fd.Sampler(model, plan, mode="loop_graph", device="cuda")
    for seed, shift in itertools.product((1, 2), (0.0, 1.0)):
        cond = {"shift": torch.full((4,), shift)}
        got = sampler(SHAPE, seed=seed, cond={"shift": cond["shift"].cuda()})
        assert close(got, fd.sample(model, plan, SHAPE, seed=seed, cond=cond))


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_given_starts_between_drawn_ones(mode: str) -> None:
    """The start is one launch where it is drawn, and copied where it is given; one capture serves both."""
    plan = solvers.ddim(CHAIN, 12, start=4)
    x = torch.linspace(-1, 1, 4 * 3 * 17 * 5).view(SHAPE)
    calls: list[dict[str, Any]] = [{"seed": 3}, {"x_T": 2 * x}, {"x_init": x, "seed": 5}, {"seeds": [7, 8, 9, 2]},
                                   {"seed": 3}, {"seed": 3, "first": 2}]  # fmt: skip
    sampler = fd.Sampler(model, plan, mode=mode, device="cuda")
    for given in calls:
        moved = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in given.items()}
        assert close(sampler(SHAPE, **moved), fd.sample(model, plan, SHAPE, **given)), given
    (prepared,) = sampler._runs.values()
    assert prepared.graph is not None and prepared.graph.first is not None


def test_noise_equals_the_cpus() -> None:
    for n in (1, 5, 4099, 1 << 20):
        want = rng.normal([3, 2**62 + 5], (n,), row=7, stream=1, index=[0, 9])
        got = rng.normal([3, 2**62 + 5], (n,), row=7, stream=1, index=[0, 9], device="cuda")
        assert (got.cpu() - want).abs().max() <= 2e-6


@pytest.mark.parametrize("schedule", [S.VP(), S.Flow(3.0), S.EDM(), S.Cosine(), S.BFNContinuous(0.02)], ids=str)
def test_noising_is_two_launches(schedule: S.Schedule) -> None:
    """One makes the schedule's coefficients of the times, one all the rest; a chain's coefficients are a table."""
    x, t = torch.ones(5, 3, 17, device="cuda"), torch.linspace(0.05, 0.95, 5, device="cuda")
    seeds, step = torch.arange(5, device="cuda"), (1000 * t).long()
    got = ops.add_noise(x, t, schedule, seeds=seeds, target="v")
    want = ops.add_noise(x.cpu(), t.cpu(), schedule, seeds=seeds.cpu(), target="v")
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    assert kernels(lambda: ops.add_noise(x, t, schedule, seeds=seeds, target="v")) == 2
    assert kernels(lambda: ops.add_noise(x, step, CHAIN, seeds=seeds, target="v")) == 1
    loss = ops.denoising_loss(x, x, t, schedule, seeds, target="v")
    assert close(loss, ops.denoising_loss(x.cpu(), x.cpu(), t.cpu(), schedule, seeds.cpu(), target="v"))


def test_times_out_of_range_are_nan() -> None:
    """A continuous schedule's, where looking would wait for the device."""
    t, x, seeds = torch.tensor([-0.1, 0.5, 1.1], device="cuda"), torch.zeros(3, 8, device="cuda"), [1, 2, 3]
    classes = ops.categorical_noise(x.long(), t, S.BFNDiscrete(2.0, 27), seeds=seeds).flatten(1)
    noised, loss = ops.add_noise(x, t, S.VP(), seeds=seeds), ops.denoising_loss(x, x, t, S.VP(), seeds)
    for y in (classes, noised, loss[:, None]):
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [True, False, True]


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    n = 2**31 + 4100
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(1, 1, n, device="cuda")
    m = torch.ones(1, n, device="cuda", dtype=torch.bfloat16)
    plan = solvers.ddpm(CHAIN, 2)
    row = torch.zeros(1, dtype=torch.int32, device="cuda")
    seeds, index = rng.keys(5, batch=1, device="cuda")
    ops.affine_step(x, m, plan.pack("cuda"), row, slots=1, seeds=seeds, index=index)
    for start in (0, 2**31 - 2050, n - 4100):  # the same tail elements, drawn on the CPU from their own counters
        at = start // 4 * 4
        quads = torch.arange(at // 4, at // 4 + 1000)
        zero = torch.zeros_like(quads)
        words = rng.philox(quads, zero, zero + 1, zero, zero + 5, zero)
        z = torch.stack([*rng.box_muller(words[0], words[1]), *rng.box_muller(words[2], words[3])], -1).flatten()
        want = plan.b[0, 0] * plan.c_out[0] + plan.s[0, 0] * z
        assert (x[0, 0, at : at + 4000].cpu() - want).abs().max() <= 1e-5


def test_auto_keeps_a_graph_only_where_it_pays(monkeypatch: Any) -> None:
    from fastdiff import graph as graphs

    for answer in (True, False):
        monkeypatch.setattr(graphs, "pays", lambda *args, answer=answer: answer)
        sampler = fd.Sampler(model, PLANS["heun"], device="cuda")
        sampler(SHAPE)
        assert (next(iter(sampler._runs.values())).graph is not None) == answer


@pytest.mark.parametrize(("K", "launches"), [(2, 1), (27, 1), (4096, 1), (262144, 3)])
def test_a_categorical_step_is_its_launches_and_no_temporary(K: int, launches: int) -> None:
    """One launch (three for split rows), nothing of the logits' size allocated, the classes of the CPU."""
    width, tokens = 1 if K == 2 else K, max(2, 4096 // K)
    table = solvers.bfn_discrete(S.BFNDiscrete(0.5, K), 4).pack()
    m = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(K))
    seeds = torch.tensor([3, 4])

    def buffers(device: str) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.zeros(1, 2, tokens, width, device=device)
        return state, torch.empty_like(state[0], dtype=torch.bfloat16), torch.zeros_like(state[0, ..., 0]).long()

    def step(state: Tensor, x: Tensor, k: Tensor, where: dict[str, Tensor]) -> None:
        ops.categorical_step(state, where["m"], where["table"], where["row"], slots=1, readout="sample",
                             seeds=where["seeds"], index=where["index"], model_in=x, classes=k)  # fmt: skip

    given = {"m": m, "table": table, "row": torch.tensor([1]), "seeds": seeds, "index": torch.zeros_like(seeds)}
    there = {name: value.cuda() for name, value in given.items()}
    mine, theirs = buffers("cpu"), buffers("cuda")
    step(*mine, given)
    step(*theirs, there)
    assert torch.equal(theirs[2].cpu(), mine[2]) and close(theirs[0], mine[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert kernels(lambda: step(*theirs, there)) == launches
    assert torch.cuda.max_memory_allocated() - before < 4 * m.numel() // 4 + 4096


def test_step_densities_without_a_sync() -> None:
    """As on the CPU, of one row and of one a sample; a row outside the plan and one without noise are NaN."""
    plan, (x, m, y) = PLANS["ddpm"], torch.randn(3, *SHAPE)
    k = torch.tensor([3, 18, 0, 7])
    given = [v.cuda() for v in (x, m, y)]
    wrong = torch.tensor([3, 20, -1, 19], device="cuda")
    fd.training.transition(plan, 3, *given[:2])  # makes the table
    rows = k.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one, each, off = (fd.training.transition_log_prob(plan, row, *given) for row in (3, rows, wrong))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, row in ((one, 3), (each, k)):
        torch.testing.assert_close(got.cpu(), fd.training.transition_log_prob(plan, row, x, m, y), rtol=1e-6, atol=1e-4)
    assert off.isnan().tolist() == [False, True, True, True]


def test_models_of_two_times_in_every_mode() -> None:
    """The time of the next row, looked up on the device, inside a graph too."""
    plan = PLANS["flow"]

    def of_two(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.tanh(x) * (t - r).view(-1, 1, 1, 1) + r.view(-1, 1, 1, 1)

    want = fd.sample(fd.flow_map(of_two, plan), plan, SHAPE, seed=3)
    for mode in ("eager", "step_graph", "loop_graph"):
        sampler = fd.Sampler(fd.flow_map(of_two, plan), plan, mode=mode, device="cuda")
        assert close(sampler(SHAPE, seed=3), want) and close(sampler(SHAPE, seed=3), want), mode


def test_a_plan_in_plain_torch() -> None:
    """The network is on the device, the plan is nowhere."""
    plan, net = PLANS["dpmpp_2m"], torch.nn.Linear(SHAPE[-1], SHAPE[-1])
    x_T = plan.init_scale * torch.randn(SHAPE)
    want = fd.sample(lambda x, t: net(x), plan, SHAPE, x_T=x_T)
    net.cuda()
    assert close(fd.Unrolled(lambda x, t: net(x), plan)(x_T.cuda()).detach(), want.detach())
