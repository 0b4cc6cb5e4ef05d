"""Devices that are neither the CPU nor CUDA run plain torch: the CPU's samples and losses, without float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import devices, ops, training
from fastdiff import schedules as C
from fastdiff import solvers as S
from fastdiff.doctor import examine
from tests.third_device import NAME, There, here, third_device

VP, CHAIN, FLOW = C.VP(), C.Betas(C.linear_betas(100, 1e-3, 0.1)), C.Flow()
CLASSES, CONTINUOUS, MASKED = C.BFNDiscrete(0.1, 27), C.BFNContinuous(0.02), C.Masked(27)
IMAGE, TEXT = (2, 4, 8, 8), (2, 9)
PLAN = S.dpmpp_2m(VP, 6)
X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(27, TEXT, generator=torch.Generator().manual_seed(0))
SEEDS = torch.arange(2)
Of = Callable[[str], Tensor]  # a result of a device


def eps(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    m = 0.9 * x * VP.sigma(t).to(x.dtype).view(-1, 1, 1, 1)
    return m if c is None else m + c.view(-1, 1, 1, 1)


def logits(x: Tensor, t: Tensor) -> Tensor:
    if x.dtype == torch.int64:
        return torch.nn.functional.one_hot(x, 28)[..., :27] * 0.5 + x[..., None] * torch.linspace(
            0, 0.1, 27, device=x.device
        )
    return 0.3 * x + torch.linspace(0, 1, 27, device=x.device)


def planes(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([0.3 * x, 0.01 * x], 1)


def sampled(model: Callable[..., Tensor], plan: fd.Plan, shape: tuple[int, ...] = IMAGE, **options: object) -> Of:
    def on(device: str) -> Tensor:
        given = {k: v(device) if callable(v) and k != "noise" else v for k, v in options.items()}
        made = fd.sample(model, plan, shape, seed=1, device=device, **given)  # type: ignore[arg-type]
        return made[1].x if isinstance(made, tuple) else made

    return on


def guided(**options: object) -> Of:
    def conditions(value: float) -> Callable[[str], dict[str, Tensor]]:
        return lambda device: {"c": torch.full((2,), value, device=device)}

    return sampled(eps, PLAN, cond=conditions(1.0), uncond=conditions(0.0), **options)


def known(device: str) -> dict[str, Tensor]:
    return {"known": torch.where(torch.arange(8) > 3, 1.0, torch.nan).expand(IMAGE).to(device)}


def log_prob(x: Tensor, t: Tensor) -> Tensor:
    return -(x**2).sum((1, 2, 3))


def loss(schedule: C.Schedule, t: Tensor, weighting: str | None = None) -> Of:
    def gradient(device: str) -> Tensor:
        m = (0.5 * X).to(device).requires_grad_()
        made = ops.denoising_loss(
            m, X.to(device), t.to(device), schedule, seeds=SEEDS.to(device), target="v", weighting=weighting
        )
        (made * torch.tensor([1.0, 2.0]).to(device)).sum().backward()
        assert m.grad is not None
        return torch.cat([made.detach(), m.grad.flatten()])

    return gradient


def ideal(prediction: str) -> Of:
    t = -0.2 if prediction == "edm" else 0.3
    return lambda device: training.ideal_model(DATA.to(device), VP, prediction)(
        X.to(device), torch.full((2,), t).to(device)
    )


DATA = torch.randn(5, *X.shape[1:], generator=torch.Generator().manual_seed(8))
U, K = torch.tensor([0.2, 0.7]), torch.tensor([3, 70])
RESULTS: dict[str, Of] = {
    "dpmpp_2m": sampled(eps, PLAN),
    "eager": sampled(eps, PLAN, mode="eager"),
    "euler_maruyama": sampled(eps, S.euler_maruyama(VP, 6)),
    "unipc": sampled(eps, S.unipc(VP, 6)),
    "trajectory": sampled(eps, PLAN, trajectory=True),
    "x_init": sampled(eps, S.dpmpp_2m(VP, 6, start=2), x_init=X.to),
    "noise of a function": sampled(eps, S.euler_maruyama(VP, 6), noise=lambda k, like: torch.ones_like(like)),
    "check_finite": sampled(eps, PLAN, check_finite="raise"),
    "guidance": guided(guidance=3.0),
    "two passes": guided(guidance=3.0, batched_guidance=False),
    "guidance of samples": guided(guidance=lambda device: torch.tensor([1.5, 2.0]).to(device)),
    "apg": guided(guidance=3.0, guide="apg"),
    "rescale": guided(guidance=3.0, guide="rescale"),
    "threshold": sampled(eps, PLAN, threshold=(0.99, 1.0)),
    "learned variance": sampled(planes, S.ddpm(CHAIN, 6, variance="learned_range")),
    "inpaint": sampled(fd.inpaint(eps, PLAN), PLAN, cond=known),
    "classifier guidance": sampled(fd.classifier_guidance(eps, PLAN, log_prob), PLAN),
    "corrector": lambda device: fd.predictor_corrector(
        eps, S.reverse_diffusion(VP, 4), IMAGE, snr=0.1, seed=1, device=device
    ),
    "unrolled": lambda device: fd.Unrolled(eps, PLAN)(X.to(device)),
    "likelihood": lambda device: fd.log_likelihood(eps, VP, X[:, :1, :2, :2].to(device)),
    "bfn_continuous": sampled(lambda x, t: 0.3 * x, S.bfn_continuous(CONTINUOUS, 6)),
    "bfn_discretised": sampled(planes, S.bfn_discretised(CONTINUOUS, 6, bins=16)),
    "bfn_discrete": sampled(logits, S.bfn_discrete(CLASSES, 6), TEXT),
    "bfn_discrete mean": sampled(logits, S.bfn_discrete(CLASSES, 6, readout="mean"), TEXT),
    "bfn_discrete of two": sampled(lambda x, t: 0.3 * x, S.bfn_discrete(C.BFNDiscrete(1.0, 2), 6), TEXT),
    "unmask": sampled(logits, S.unmask(MASKED, 6), TEXT),
    "unmask entropy": sampled(logits, S.unmask(MASKED, 6, order="entropy"), TEXT),
    "unmask top_p": sampled(logits, S.unmask(MASKED, 6, order="confidence", top_p=0.8), TEXT),
    "unmask enough": sampled(logits, S.unmask(MASKED, 9, order="confidence", threshold=0.1), TEXT),
    "add_noise": lambda device: ops.add_noise(X.to(device), U.to(device), VP, seeds=SEEDS.to(device)),  # type: ignore
    "forward_step": lambda device: ops.forward_step(X.to(device), K.to(device), CHAIN, seeds=SEEDS.to(device)),
    "posterior": lambda device: ops.posterior(X.to(device), 0.3 * X.to(device), K.to(device), CHAIN)[0],
    "loss": loss(VP, U),
    "loss of a chain": loss(CHAIN, K, "min_snr"),
    "loss of a flow": loss(FLOW, U, "snr"),
    "loss of a Bayesian flow": loss(CONTINUOUS, torch.tensor([0.2, 1.0]), "likelihood"),
    "categorical_noise": lambda device: ops.categorical_noise(  # type: ignore[dict-item]
        TOKENS.to(device), U.to(device), CLASSES, seeds=SEEDS.to(device)
    ),
    "categorical_loss": lambda device: ops.categorical_loss(logits(TOKENS, U).to(device), TOKENS.to(device)),
    "mask_tokens": lambda device: training.mask_tokens(TOKENS.to(device), U.to(device), MASKED, seeds=SEEDS.to(device)),
    "masked_loss": lambda device: training.masked_loss(
        logits(TOKENS, U).to(device), TOKENS.to(device), torch.full_like(TOKENS, 27).to(device), U.to(device), MASKED
    ),
    "ideal_model": ideal("eps"),
    "ideal_model edm": ideal("edm"),
    "log_density": lambda device: training.log_density(X.to(device), DATA.to(device), U.to(device), VP),
    "score": lambda device: training.score(
        X.to(device), DATA.to(device), 0.3, VP, weights=torch.arange(1.0, 6).to(device)
    ),
    "bits_per_dim": lambda device: training.bits_per_dim(planes, X.to(device).clamp(-1, 1), CHAIN, progress=False)[0],
    "bfn_discrete_loss": lambda device: training.bfn_discrete_loss(
        logits(TOKENS, U).to(device), TOKENS.to(device), U.to(device), CLASSES
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_another_device_has_the_cpus_results(name: str) -> None:
    """Classes and tokens exactly, numbers to fp32's rounding: no noise, time or coefficient depends on the device."""
    expected = RESULTS[name]("cpu")
    with third_device():
        got = RESULTS[name](NAME)
    assert isinstance(got, There)
    assert got.dtype == (torch.float32 if expected.dtype == torch.float64 else expected.dtype)
    scale = expected.double().abs().max()
    assert (here(got).double() - expected.double()).abs().max() <= (3e-6 * scale if got.is_floating_point() else 0)


@pytest.mark.parametrize("schedule", [VP, FLOW, C.Cosine(), C.EDM(), C.VE(), CONTINUOUS, CLASSES, MASKED], ids=str)
def test_levels_are_those_of_float64(schedule: C.Schedule) -> None:
    """Of times near the end, too, where a cosine of fp32 has three digits: alpha(t) is rounded once."""
    t = torch.tensor([0.1, 0.5, 0.9999])
    expected = schedule.alpha(t).float()
    assert schedule.alpha(t).dtype == torch.float64
    with third_device():
        got = schedule.alpha(t.to(NAME))
    assert isinstance(got, There)
    assert torch.equal(here(got), expected)


def test_times_are_drawn_there() -> None:
    """In [0, 1], of every stratum one; what ImportanceTimes has learned of the losses is there, too."""
    with third_device():
        t = training.low_discrepancy_times(8, VP, device=NAME)
        assert sorted((here(t) * 8).long().tolist()) == list(range(8))
        assert here(training.log_normal_times(8, VP, device=NAME)).isfinite().all()
        times = training.ImportanceTimes(VP, bins=2, history=1, device=NAME)
        times.update(torch.tensor([0.25, 0.75]).to(NAME), torch.tensor([1.0, 3.0]).to(NAME))
        p = times.probabilities()
    assert torch.allclose(here(p), torch.tensor([0.25, 0.75]) * 0.999 + 0.0005)


def same(run: Callable[[str], Tensor]) -> None:
    """What runs on the stand-in stays there, and has the CPU's result."""
    expected = run("cpu")
    with third_device():
        got = run(NAME)
    assert isinstance(got, There)
    assert (here(got) - expected).abs().max() <= 1e-6 * expected.abs().max()


class Net(torch.nn.Module):
    """Two tensors of a device: Module.to would leave the stand-in's out."""

    def __init__(self, device: str) -> None:
        super().__init__()
        start = 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(start.to(device))
        self.bias = torch.nn.Parameter(torch.zeros(4).to(device))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ self.weight + self.bias + t.view(-1, 1)


def trained(device: str, folder: Path) -> tuple[Tensor, float]:
    """The weights and the validation loss, after an epoch, a new trainer that resumes, and two more."""

    def of_batch(net: torch.nn.Module, x: Tensor, seeds: Tensor, generator: torch.Generator) -> Tensor:
        t = training.low_discrepancy_times(len(x), VP, generator=generator).to(x.device)
        return ops.denoising_loss(net(ops.add_noise(x, t, VP, seeds=seeds), t), x, t, VP, seeds=seeds)

    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).to(device)
    for until in (1, 3):
        trainer = training.Trainer(
            Net(device), of_batch, data[:48], held_out=data[48:], epochs=3, batch=16, seed=3, folder=folder
        )
        assert trainer.resume() == (until > 1)
        trainer.run(until)
    return trainer.net.weight.detach(), trainer.validate()  # type: ignore[return-value]


def test_a_trainer_trains_there(tmp_path: Path) -> None:
    """With AdamW, averages and a checkpoint, as on the CPU."""
    losses = []

    def weights(device: str) -> Tensor:
        weight, loss = trained(device, tmp_path / device)
        losses.append(loss)
        return weight

    same(weights)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_accelerated_scheduler_steps_there() -> None:
    """A pipeline moved to another device: diffusers' scheduler, accelerated, gives the CPU's samples."""
    diffusers = pytest.importorskip("diffusers")

    def loop(device: str) -> Tensor:
        scheduler, x = fd.accelerate(diffusers.DPMSolverMultistepScheduler()), X.to(device)
        scheduler.set_timesteps(6, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x).prev_sample
        return x

    same(loop)


def test_k_diffusions_sampler_steps_there() -> None:
    """Sigmas on the device, as ComfyUI and others give them."""
    k_diffusion = pytest.importorskip("fastdiff.integrations.k_diffusion")
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0])

    def run(device: str) -> Tensor:
        made: Tensor = k_diffusion.sample_dpmpp_2m(
            lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2), X.to(device), sigmas.to(device), disable=True
        )
        return made

    same(run)


def test_devices_that_cannot_be() -> None:
    """A name that torch does not know, one that it was not built for, one without numbers."""
    for device, message in (
        ("gpu", "device must be a device of torch, got 'gpu'"),
        ("meta", "device must be one that holds numbers, got 'meta'"),
        ("xla", "device 'xla' is none of this torch: "),
    ):
        with pytest.raises(ValueError, match=message):
            fd.sample(eps, PLAN, IMAGE, device=device)
    with pytest.raises(ValueError, match="mode 'step_graph' needs a CUDA device, this run is on mps:0"), third_device():
        fd.sample(eps, PLAN, IMAGE, device=NAME, mode="step_graph")


def test_the_widest_dtype() -> None:
    assert devices.widest(torch.device("cpu")) == torch.float64
    with third_device():
        assert devices.widest(torch.device(NAME, 0)) == torch.float32


def test_doctor_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on an accelerator without kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(NAME))
    found = next(f for f in examine() if f.name == "CUDA device")
    assert "on the CPU as C++ loops, on mps as plain torch" in found.meaning
