"""What programs do around an accelerated step: edit samples, keep results, pass generators, take gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.integrations.diffusers.reading import Setup
from tests.accelerate_cases import (
    ALL,
    TOLERANCE,
    TREES,
    accelerated,
    arguments,
    exact,
    far,
    loop,
    make,
    start,
    stepping,
)
from tests.probe_cases import shipped

diffusers = pytest.importorskip("diffusers")
ONE_EACH = list({case.scheduler: name for name, case in reversed(ALL.items())}.values())
MULTISTEP = ["unipc-3-bh2", "unipc-2-zero", "dpmsolver++-3m", "deis-3", "pndm", "heun-eps", "sa-solver", "lms", "ipndm"]


def replaced(k, x):
    y = x.clone()
    y[:, :, :3] = 0.1 * k - 0.2
    return y


def in_place(k, x):
    x[:, :1] += 0.3
    return x


@pytest.mark.parametrize("edit", [replaced, in_place])
@pytest.mark.parametrize("name", [*ONE_EACH, *MULTISTEP])
def test_samples_may_be_edited_between_steps(name, edit):
    case = ALL[name]
    x = start(make(case))
    theirs = loop(make(case), case, x, edit=edit).x[-1]
    mine = loop(accelerated(case), case, x, edit=edit).x[-1]
    whole = exact(case, x, edit=edit).x[-1]
    assert far(theirs, loop(make(case), case, x).x[-1]) > 1e-3
    apart = far(theirs, whole)
    assert far(mine, whole) <= max(TOLERANCE, apart + TOLERANCE)
    assert far(mine, theirs) <= apart + TOLERANCE


@pytest.mark.parametrize(
    "name", ["euler-eps", "ddim-noclip", "ddim-clip", "ddpm-noclip", "ddpm-clip", "lcm", "heun-eps"]
)
@pytest.mark.parametrize("changed", ["x", "m", "result", None])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_second_result_is_that_of_the_step_whatever_happens_later(name, changed, return_dict):
    case = ALL[name]
    results = []
    for scheduler in (make(case, 4), accelerated(case, 4)):
        x, t = start(scheduler), scheduler.timesteps[0]
        m = torch.tanh(x)
        noise = {"generator": torch.Generator().manual_seed(0)}
        noise = noise if "generator" in inspect.signature(scheduler.step).parameters else {}
        scheduler.scale_model_input(x, t)
        out = scheduler.step(m, t, x, return_dict=return_dict, **noise)
        if changed is not None:
            {"x": x, "m": m, "result": out[0]}[changed].mul_(3).add_(1)
        results.append(out[1])
    assert far(results[1], results[0]) <= 1e-5


def test_the_second_result_is_refused_rather_than_wrong():
    ours = accelerated(ALL["euler-eps"], 4)
    x, t = start(ours), ours.timesteps[0]
    m = torch.tanh(x)
    out = ours.step(m, t, x)
    x.zero_()
    m.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        out.pred_original_sample  # noqa: B018


def test_results_are_fresh_and_do_not_change_later():
    for name in ("unipc-2-zero", "dpmsolver++-2m", "lms", "ddim-clip"):
        case = ALL[name]
        ours = accelerated(case, 8)
        x = start(ours)
        kept, outs = [], []
        for t in ours.timesteps:
            out = ours.step(torch.tanh(ours.scale_model_input(x, t)), t, x)
            outs.append(out)
            kept.append([v.clone() for v in out.to_tuple()])
            x = out.prev_sample
        assert len({o.prev_sample.data_ptr() for o in outs}) == 8
        for out, values in zip(outs, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(out.to_tuple(), values, strict=True))


def test_a_changed_second_result_does_not_reach_the_history():
    case = ALL["heun-clip"]
    results = []
    for spoil in (False, True):
        ours = accelerated(case, 6)
        x = start(ours)
        for t in ours.timesteps:
            out = ours.step(torch.tanh(ours.scale_model_input(x, t)), t, x)
            if spoil:
                out.pred_original_sample.fill_(9.0)
            x = out.prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_a_model_that_reuses_its_output_buffer():
    for name in ("unipc-2-zero", "deis-2", "dpmsolver++-2m", "sa-solver"):
        case, results = ALL[name], []
        for static in (False, True):
            ours = accelerated(case, 8)
            x = start(ours)
            generator = {"generator": torch.Generator().manual_seed(0)} if name == "sa-solver" else {}
            buffer = torch.empty_like(x)
            for t in ours.timesteps:
                m = torch.tanh(x)
                x = ours.step(buffer.copy_(m) if static else m, t, x, **generator).prev_sample
            results.append(x)
        assert torch.equal(*results)


@pytest.mark.parametrize("name", ["euler-eps", "ddim-noclip", "dpmsolver++-2m", "unipc-2-zero", "ddpm-clip"])
def test_gradients_go_through_as_through_stock(name):
    case, grads = ALL[name], []
    for scheduler in (make(case, 5), accelerated(case, 5)):
        x = start(scheduler).requires_grad_()
        y, total = x, 0.0
        noise = {"generator": torch.Generator().manual_seed(0)} if "ddpm" in name else {}
        for t in scheduler.timesteps:
            out = scheduler.step(torch.tanh(scheduler.scale_model_input(y, t)), t, y, **noise)
            total = total + out[-1].square().mean()
            y = out.prev_sample
        grads.append(torch.autograd.grad(total + y.square().sum(), x)[0])
    assert far(grads[1], grads[0]) <= 1e-4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode(mode):
    for name in ("euler-eps", "unipc-2-zero", "ddpm-clip"):
        case = ALL[name]
        with mode():
            ours, stock = accelerated(case, 5), make(case, 5)
            x = start(stock)
            mine, theirs = loop(ours, case, x), loop(stock, case, x)
        assert ours._fastdiff.stock is None
        assert far(mine.x[-1], theirs.x[-1]) <= 1e-5
        assert theirs.second[0] is None or far(mine.second[0], theirs.second[0]) <= 2e-5


@pytest.mark.parametrize("name", ["ddpm-clip", "euler-a-eps", "sde-dpmsolver++-2m", "lcm", "ddim-eta", "tcd"])
@pytest.mark.parametrize("source", ["global", "one", "list", "one in a list"])
def test_the_same_draws_from_the_same_generators(name, source):
    case, results, states = ALL[name], [], []
    for scheduler in (make(case, 5), accelerated(case, 5)):
        x = start(scheduler)
        torch.manual_seed(5)
        several = [torch.Generator().manual_seed(s) for s in (3, 4)]
        given = {
            "global": None, "one": several[0], "list": several, "one in a list": several[:1],
        }[source]  # fmt: skip
        for t in scheduler.timesteps:
            m = torch.tanh(scheduler.scale_model_input(x, t))
            x = scheduler.step(m, t, x, generator=given, **case.step).prev_sample
        results.append(x)
        states.append([torch.get_rng_state(), *(g.get_state() for g in several)])
    assert far(results[1], results[0]) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_given_variance_noise_takes_the_place_of_a_draw():
    for name, options in (("ddim-eta", {"eta": 0.6}), ("sde-dpmsolver++-2m", {})):
        results = []
        for scheduler in (make(ALL[name], 4), accelerated(ALL[name], 4)):
            x, before = torch.ones(2, 3, 4, 4), torch.get_rng_state()
            for k, t in enumerate(scheduler.timesteps):
                n = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
                x = scheduler.step(torch.tanh(x), t, x, variance_noise=n, **options).prev_sample
            assert torch.equal(before, torch.get_rng_state())
            results.append(x)
        assert far(*results) <= 1e-5
    ddim = accelerated(ALL["ddim-eta"], 4)
    with pytest.raises(ValueError, match="not both"):
        ddim.step(x, ddim.timesteps[0], x, eta=1.0, variance_noise=x, generator=torch.Generator())


def test_philox_noise_does_not_depend_on_the_batch():
    case = ALL["ddpm-clip"]
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(x, generator=None, seed=11):
        ours = accelerated(case, 6, noise="philox", seed=seed)
        for t in ours.timesteps:
            x = ours.step(torch.tanh(x), t, x, generator=generator).prev_sample
        return x

    assert torch.equal(run(x)[:2], run(x[:2]))
    assert not torch.equal(run(x), run(x, seed=12))
    generators = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
    assert torch.equal(run(x, generators)[2:], run(x[2:], generators[2:]))
    negative = torch.Generator().manual_seed(-1)  # its seed is 2^64 - 1, as a list and alone
    assert torch.equal(run(x[:1], [negative]), run(x[:1], negative))
    with pytest.raises(ValueError, match=r"generator must be one or 3 \(one a sample\), got 2"):
        run(x, generators[:2])
    plan = fd.probe(make(case, 6), steps=6)
    want = fd.sample(lambda x, t: torch.tanh(x), plan, x.shape, x_T=x, seed=11)
    assert far(run(x), want) <= 1e-5


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_philox_noise_is_the_same_noise():
    case, results = ALL["ddpm-clip"], []
    x = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        ours = accelerated(case, 6, noise="philox", seed=11, compile=compiled)
        for _ in range(2):
            ours.set_timesteps(6)
            y = x
            for t in ours.timesteps:
                y = ours.step(torch.tanh(y), t, y).prev_sample
            results.append(y)
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    assert far(results[2], results[0]) <= 1e-5


def test_robot_action_chunks_edited_in_place():
    """(B, horizon, action), conditioned entries written into the sample before and after every step."""
    for cls, options in ((diffusers.DDPMScheduler, {}), (diffusers.DDIMScheduler, {"set_alpha_to_one": True})):
        config = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, **options}
        results = []
        for wrap in (lambda s: s, fd.accelerate):
            scheduler = wrap(cls(**config))
            scheduler.set_timesteps(16)
            generator = torch.Generator().manual_seed(0)
            chunk = torch.randn(4, 16, 7, generator=generator)
            known = torch.linspace(-1, 1, 4 * 2 * 7).reshape(4, 2, 7)
            for t in scheduler.timesteps:
                chunk[:, :2] = known
                out = torch.tanh(chunk.flip(1) * 0.9)
                chunk = scheduler.step(out, t, chunk, generator=generator).prev_sample
            chunk[:, :2] = known
            results.append(chunk)
        assert far(results[1], results[0]) <= 5e-6


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_the_kernel_does_what_the_host_rows_do(name, noise, kernel_device):
    """On a GPU, else in Triton's interpreter: one launch a step."""
    if kernel_device.type == "cuda":
        pytest.skip("a GPU runs the kernel: the host's rows are compared with stock on the CPU")
    from fastdiff.ops import _dispatch

    case = ALL[name]
    x = start(make(case, 5))
    kernels = accelerated(case, 5, noise=noise)
    got = loop(kernels, case, x)
    assert kernels._fastdiff.run.kernel
    _dispatch._forced = False
    want = loop(accelerated(case, 5, noise=noise), case, x)
    for a, b in zip(got.x, want.x, strict=True):
        assert far(a, b) <= 1e-5
    for a, b in zip(got.second, want.second, strict=True):
        assert (a is None) == (b is None) and (a is None or far(a, b) <= 5e-5)


class Reads(TorchDispatchMode):
    """Counts what would make a host wait for a device: values read, shapes that depend on values."""

    WAIT = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.WAIT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ONE_EACH)
def test_no_step_reads_a_value(name):
    case = ALL[name]
    ours = accelerated(case, 6, noise="philox" if case.scheduler in TREES else "torch")  # a tree reads its intervals
    x = start(ours)
    for attempt in range(2):  # what the first loop learns of the class is kept
        ours.set_timesteps(*((6,) if "sigmas" not in case.setup else ()), **case.setup)
        noise = {"generator": torch.Generator()} if "generator" in inspect.signature(ours.step).parameters else {}
        y, step = x, stepping(ours)
        times = list(ours.timesteps)[: 6 * getattr(ours, "order", 1) - 1]
        for k, t in enumerate(times):
            with Reads() as reads:
                t = t.reshape(1) if "Wuerstchen" in case.scheduler else t
                seen = ours.scale_model_input(y, t) if hasattr(ours, "scale_model_input") else y
                y = step(torch.tanh(seen), t, y, **noise, **case.step).prev_sample
            assert attempt == 0 or reads.count == 0, f"step {k}"


def test_a_schedule_set_again_is_not_read_again():
    ours, x = fd.accelerate(diffusers.UniPCMultistepScheduler()), torch.zeros(1, 3, 4, 4)
    readings = []
    for scheduler in (ours, ours, fd.accelerate(diffusers.UniPCMultistepScheduler())):
        scheduler.set_timesteps(10)
        scheduler.step(x, scheduler.timesteps[0], x)
        readings.append(scheduler._fastdiff.run.reading)
    assert readings[0] is readings[1] is readings[2]
    other = fd.accelerate(diffusers.UniPCMultistepScheduler(use_karras_sigmas=True))
    other.set_timesteps(10)
    other.step(x, other.timesteps[0], x)
    assert other._fastdiff.run.reading is not readings[0]


def test_gradients_leave_the_kernel(kernel_device):
    case, grads = ALL["dpmsolver++-2m"], []
    for scheduler in (make(case, 5), accelerated(case, 5)):
        first = start(scheduler).to(kernel_device)
        y = scheduler.step(torch.tanh(first), scheduler.timesteps[0], first).prev_sample
        x = y.detach().requires_grad_()
        y = x
        for t in scheduler.timesteps[1:]:
            y = scheduler.step(torch.tanh(y), t, y).prev_sample
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert far(grads[1], grads[0]) <= 1e-4


def by_position(name):
    """Does set_timesteps take the device right after the number of steps?"""
    return list(inspect.signature(shipped(ALL[name]).set_timesteps).parameters)[2:3] == ["device"]


BY_NAME, BY_POSITION = ((6,), {"device": "meta"}), ((6, "meta"), {})


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, given) for name in ONE_EACH for given in (BY_NAME, BY_POSITION) if given is BY_NAME or by_position(name)],
)
def test_a_scheduler_on_another_device_is_read_on_the_host(name, given):
    case, stock = ALL[name], shipped(ALL[name])
    live = stock(**case.config)
    args = given[0] if arguments(case) else (None, *given[0][1:])
    made = Setup(stock, live, (args, {**case.setup, **given[1]}), 0, False, False).make()
    assert all(v.device.type == "cpu" for v in vars(made).values() if isinstance(v, torch.Tensor))
    assert torch.equal(made.timesteps, make(case, 6).timesteps)
