"""What a program has set for its whole process changes no result: default device and dtype, autocast, inference."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import diffusers
import pytest
import torch

import fastdiff as fd
from fastdiff import ops
from fastdiff import training as tr
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.diffusers import cached, scheduler
from fastdiff.reference import reference_sample
from fastdiff.schedules import EDM, VP, Betas, BFNContinuous, BFNDiscrete, Flow
from fastdiff.schedules.betas import linear_betas
from tests.kernel_runs import on_kernels

CPU = torch.device("cpu")
place = CPU  # a GPU while its kernels are tested


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    # the stand-in for a GPU as the default device: a tensor that lands there has no values
    "default device": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast(place.type, torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": deterministic,
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=made, device="cpu", dtype=torch.float32).to(place)


def model(x, t, c=None):
    return torch.tanh(x) * 0.3 if c is None else torch.tanh(x) * c.view(-1, 1)


def sampled(make, shape=(3, 6), **options):
    def run():
        plan = make()
        given = {k: v() if callable(v) else v for k, v in options.items()}
        seed = {} if "generator" in given else {"seed": 5}
        return fd.sample(model, plan, shape, device=place, dtype=torch.float32, **seed, **given)

    return run


def betas(T: int = 1000) -> Betas:
    return Betas(linear_betas(T))


def condition(value: float):
    return lambda: {"c": torch.full((3,), value, device=place, dtype=torch.float32)}


GUIDED = {"cond": condition(0.4), "uncond": condition(0.1), "guidance": 3.0}
PLANS = {
    "ddim": sampled(lambda: fd.solvers.ddim(betas(), 5)),
    "ddpm clip": sampled(lambda: fd.solvers.ddpm(betas(), 5, clip=(-1.0, 1.0))),
    "dpmpp_2m_sde": sampled(lambda: fd.solvers.dpmpp_2m_sde(VP(), 5)),
    "heun": sampled(lambda: fd.solvers.heun(EDM(), 5)),
    "flow": sampled(lambda: fd.solvers.euler(Flow(), 5, prediction="flow")),
    "unipc": sampled(lambda: fd.solvers.unipc(betas(), 5)),
    "torch noise": sampled(lambda: fd.solvers.ddpm(betas(), 5), noise="torch"),
    "generator": sampled(
        lambda: fd.solvers.ddpm(betas(), 5), noise="torch", generator=lambda: torch.Generator(place).manual_seed(3)
    ),
    "eager": sampled(lambda: fd.solvers.ddpm(betas(), 5), mode="eager"),
    "guided": sampled(lambda: fd.solvers.ddim(betas(), 5), **GUIDED),
    "rescaled": sampled(lambda: fd.solvers.ddim(betas(), 5), guide="rescale", **GUIDED),
    "apg": sampled(lambda: fd.solvers.ddim(betas(), 5), guide="apg", **GUIDED),
    "thresholded": sampled(lambda: fd.solvers.ddim(betas(), 5), threshold=(0.9, 1.0)),
    "from an image": sampled(lambda: fd.solvers.ddim(betas(), 5, start=2), x_init=lambda: normal(3, 6)),
    "trajectory": lambda: sampled(lambda: fd.solvers.ddpm(betas(), 5), trajectory=True)()[1].x,
    "bfn": sampled(lambda: fd.solvers.bfn_continuous(BFNContinuous(0.02), 5)),
    "classes": lambda: fd.sample(
        lambda x, t: x * 0.3, fd.solvers.bfn_discrete(BFNDiscrete(3.0, 5), 4), (3, 7), seed=1, device=place
    ),
    "corrected": lambda: fd.predictor_corrector(
        model, fd.solvers.euler_maruyama(VP(), 5), (3, 6), seed=2, device=place, dtype=torch.float32
    ),
}


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=place)


PLANS["reference"] = lambda: reference_sample(
    lambda x, t: 0.3 * x + 1e-3 * t[:, None].to(x.dtype),
    fd.solvers.ddpm(betas(), 3),
    normal(2, 3),
    lambda row, like: 0.5 * like,
)

OPERATIONS = {
    "add_noise": lambda: ops.add_noise(normal(3, 6), long(3, 400, 999), betas(), seeds=[1, 2, 3], target="v"),
    "add_noise at a number": lambda: ops.add_noise(normal(3, 6), 0.3, VP(), seeds=[1, 2, 3], target="score"),
    "forward_step": lambda: ops.forward_step(normal(3, 6), 300, betas(), seeds=[1, 2, 3]),
    "forward_step by numbers": lambda: ops.forward_step(normal(3, 6), a=0.9, s=0.2, seeds=[1, 2, 3]),
    "posterior": lambda: ops.posterior(normal(3, 6), normal(3, 6, seed=1), long(3, 400, 999), betas()),
    "loss": lambda: ops.denoising_loss(
        normal(3, 6), normal(3, 6, seed=1), long(3, 400, 999), betas(), [1, 2, 3], target="v", weighting="min_snr"
    ),
    "continuous loss": lambda: ops.denoising_loss(
        normal(3, 6), normal(3, 6, seed=1), 0.4, VP(), [1, 2, 3], weighting="likelihood"
    ),
    "kl": lambda: ops.gaussian_kl(*(normal(3, 6, seed=s) for s in range(4))),
    "decoder": lambda: ops.decoder_nll(normal(3, 6).clamp(-1, 1), normal(3, 6, seed=1), normal(3, 6, seed=2)),
    "guide": lambda: ops.guide(normal(3, 6), normal(3, 6, seed=1), 3.0, rule="zero_star"),
    "threshold": lambda: ops.threshold(normal(3, 600)),
    "class noise": lambda: ops.categorical_noise(
        long(*range(5)).expand(3, 5), 0.4, BFNDiscrete(3.0, 5), seeds=[1, 2, 3]
    ),
    "class loss": lambda: ops.categorical_loss(normal(3, 5, 5), long(*range(5)).expand(3, 5), 0.3),
    "normal": lambda: fd.rng.normal([1, 2, 3], (6,), row=3, device=place),
    "normal of samples": lambda: fd.rng.normal([1, 1, 1], (6,), index=[4, 0, 2], device=place),
    "vlb": lambda: tr.vlb_loss(normal(3, 4, 6), normal(3, 2, 6, seed=1), long(0, 400, 999), betas(), [1, 2, 3]),
    "hybrid": lambda: tr.hybrid_loss(normal(3, 4, 6), normal(3, 2, 6, seed=1), long(0, 400, 999), betas(), [1, 2, 3]),
    "prior": lambda: tr.prior_kl(normal(3, 6), betas()),
    "bits": lambda: (
        tr.bits_per_dim(
            lambda x, t: torch.cat([x, 0 * x], 1) * 0.3, normal(2, 1, 4), betas(5), seeds=[1, 2], progress=False
        ).total
    ),
    "conditional likelihood": lambda: fd.log_likelihood(
        lambda x, t, c: x * c, VP(), normal(2, 3), cond={"c": normal(2, 3, seed=4)}, rtol=1e-3, atol=1e-3
    ),
    "likelihood": lambda: fd.log_likelihood(lambda x, t: x * 0.3, VP(), normal(2, 3), rtol=1e-3, atol=1e-3),
    "density": lambda: tr.log_density(normal(3, 2), normal(9, 2, seed=1), 0.4, VP()),
    "ideal": lambda: tr.ideal_model(normal(9, 2, seed=1), VP(), "eps")(
        normal(3, 2), torch.full((3,), 0.4, device=place, dtype=torch.float32)
    ),
    "bfn loss": lambda: tr.bfn_continuous_loss(
        *(normal(3, 6, seed=s) for s in range(3)),
        torch.full((3,), 0.4, device=place, dtype=torch.float32),
        BFNContinuous(0.02),
    ),
    "stratified times": lambda: tr.low_discrepancy_times(
        5, VP(), device=place, generator=torch.Generator(place).manual_seed(1)
    ),
    "log-normal times": lambda: tr.log_normal_times(
        5, EDM(), device=place, generator=torch.Generator(place).manual_seed(1)
    ),
}


def accelerated(cls: type, **options):
    def run():
        with torch.device(CPU):  # stock diffusers makes its tables wherever the default says
            s = fd.accelerate(cls(), **options)
            s.set_timesteps(6, device=place)
        x, g = normal(3, 2, 4, 4), torch.Generator(CPU).manual_seed(1)
        for t in s.timesteps:
            seen = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            m = model(seen, t)
            x = s.step(m, t, x, generator=g).prev_sample if cls in DRAWS else s.step(m, t, x).prev_sample
        assert s._fastdiff.stock is None, s._fastdiff.stock
        return x

    return run


DRAWS = (diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler, diffusers.LCMScheduler)
DROP_IN = {
    cls.__name__: accelerated(cls)
    for cls in (
        diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler, diffusers.HeunDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler,
        *DRAWS,
    )
}  # fmt: skip


DROP_IN["DDPM with Philox"] = accelerated(diffusers.DDPMScheduler, noise="philox", seed=3)


def trained() -> torch.Tensor:
    """Weights after an epoch; what made them, the network, is the program's own."""
    net = torch.nn.utils.skip_init(torch.nn.Linear, 6, 6, device=CPU, dtype=torch.float32)
    for p in net.parameters():
        p.data.copy_(normal(*p.shape) * 0.1)

    def loss(net, x0, seeds, generator):
        t = tr.uniform_times(len(x0), betas(), generator=generator)
        return ops.denoising_loss(net(ops.add_noise(x0, t, betas(), seeds=seeds)), None, t, betas(), seeds)

    tr.Trainer(net, loss, normal(20, 6), epochs=1, batch=8, learning_rate=1e-2, held_out=normal(6, 6)).run()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sigmas() -> torch.Tensor:
    return torch.tensor([10.0, 3.0, 1.0, 0.2, 0.0], device=CPU, dtype=torch.float32)


def denoiser(x, sigma, **_):
    return x / (1 + sigma.view(-1, 1) ** 2)


DROP_IN |= {
    name: partial(lambda f: f(denoiser, normal(3, 6) * 10, sigmas(), disable=True), getattr(k_diffusion, name))
    for name in ("sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_lms")
}
CALLS = PLANS | OPERATIONS | DROP_IN
WAYS = {"loop": nullcontext, "eager": lambda: ops.cpu_compiler(False), "kernel": on_kernels}
KERNELS = [*OPERATIONS, "ddpm clip", "guided", "apg", "dpmpp_2m_sde", "classes", "UniPCMultistepScheduler"]


def values(result) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple | list) else [result]
    return [v for v in parts if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name,way", [(n, "loop") for n in CALLS] + [(n, w) for n in KERNELS for w in ("eager", "kernel")]
)
def test_changes_nothing(name, way, mode, monkeypatch):
    on_gpu = way == "kernel" and torch.cuda.is_available()
    monkeypatch.setattr(sys.modules[__name__], "place", torch.device("cuda", 0) if on_gpu else CPU)
    with WAYS[way]():
        _changes_nothing(name, mode)


def _changes_nothing(name: str, mode: str) -> None:
    want = values(CALLS[name]())
    if name in DROP_IN:
        cached._readings.clear()  # what was read before, without the mode
        cached._dialects.clear()
        scheduler._MADE.clear()
    with MODES[mode]():
        got = values(CALLS[name]())
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.device == place and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("mode", ["default float64", "default bfloat16", "deterministic"])
def test_training_changes_nothing(mode):
    want = trained()
    with MODES[mode]():
        assert torch.equal(trained(), want)


def test_the_default_device_is_where_a_loop_runs_that_names_none():
    plan = fd.solvers.ddim(betas(), 2)
    assert fd.sample(model, plan, (1, 2)).device == CPU
    with torch.device("meta"), pytest.raises(ValueError, match="must be one that holds numbers, got 'meta'"):
        fd.sample(model, plan, (1, 2))


def test_a_trajectory_of_no_samples_has_float32_predictions():
    with default_dtype(torch.float64):
        _, trajectory = fd.sample(model, fd.solvers.ddim(betas(), 2), (0, 2), trajectory=True, dtype=torch.float32)
    assert trajectory.x0.dtype == torch.float32
