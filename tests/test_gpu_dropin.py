"""Accelerated schedulers on a CUDA device: stock's samples, one launch a step, no host sync. Run with -m gpu."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastdiff as fd
from tests.accelerate_cases import ALL, exact, far, loop, make, start
from tests.probe_cases import shipped

pytestmark = pytest.mark.gpu
diffusers = pytest.importorskip("diffusers")
ONE_EACH = list({case.scheduler: name for name, case in reversed(ALL.items())}.values())
STEPS = 6


def scheduler_of(case, wrap):
    s = wrap(shipped(case)(**case.config))
    given = () if "timesteps" in case.setup or "sigmas" in case.setup else (STEPS,)
    s.set_timesteps(*given, device="cuda", **case.setup)
    return s


def run(s, case, x, watch=None):
    generator = torch.Generator("cuda").manual_seed(3)
    options = {"generator": generator} if "generator" in inspect.signature(s.step).parameters else {}
    times = list(s.timesteps)[: STEPS * getattr(s, "order", 1) - (getattr(s, "order", 1) > 1)]
    for k, t in enumerate(times):
        t = t.reshape(1) if "Wuerstchen" in case.scheduler else t
        seen = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
        m = torch.tanh(1.3 * seen)
        call = lambda t=t, m=m, x=x: s.step(m, t, x, **options, **case.step).prev_sample  # noqa: E731
        x = call() if watch is None or k == 0 else watch(call)
    return x


def no_sync(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ONE_EACH)
def test_stocks_sample_without_a_sync(name):
    case = ALL[name]
    x = start(shipped(case)(**case.config)).cuda()
    want = run(scheduler_of(case, lambda s: s), case, x)
    ours = scheduler_of(case, fd.accelerate)
    got = run(ours, case, x, no_sync)
    rounding = far(loop(make(case), case, x.cpu()).x[-1], exact(case, x.cpu()).x[-1])  # stock's own
    assert ours._fastdiff.run.kernel and far(got.cpu(), want.cpu()) <= 5e-5 + rounding


@pytest.mark.parametrize("name", ["euler-eps", "unipc-2-zero", "dpmsolver++-2m", "ddpm-clip"])
def test_one_launch_a_step(name):
    """ddpm-clip draws torch's noise: one launch more."""
    case, counts = ALL[name], []
    x = start(shipped(case)(**case.config)).cuda()

    def count(call):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(len([n for n in names if not n.lower().startswith(("memcpy", "memset"))]))
        return out

    run(scheduler_of(case, fd.accelerate), case, x)
    run(scheduler_of(case, fd.accelerate), case, x, count)
    assert max(counts) == (2 if name == "ddpm-clip" else 1)


def test_philox_is_drawn_in_the_kernel_and_equals_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        s = fd.accelerate(diffusers.DDPMScheduler(), noise="philox", seed=5)
        s.set_timesteps(STEPS, device=device)
        x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(device)
        for t in s.timesteps:
            x = s.step(torch.tanh(x), t, x).prev_sample
        results.append(x.cpu())
    assert far(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    case = ALL["dpmsolver++-2m"]
    x = start(shipped(case)(**case.config)).cuda().to(dtype)
    got, want = (run(scheduler_of(case, wrap), case, x) for wrap in (fd.accelerate, lambda s: s))
    assert got.dtype == want.dtype and far(got.cpu().float(), want.cpu().float()) <= 4 * torch.finfo(dtype).eps
