"""The Langevin corrector with a signal-to-noise step, and the predictor-corrector loop of the score-SDE paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.plan import Plan
from fastdiff.request import Options, Request, resolve
from fastdiff.sampler import Trajectory, sample

__all__ = ["langevin_snr", "predictor_corrector"]

STREAM = 3  # of the corrector's noise: 0 is the start's, 1 the rows', 2 categorical
NORMS = ("sample", "batch")


def langevin_snr(
    x: Tensor, score: Tensor, noise: Tensor, *, snr: float = 0.16, alpha: float = 1.0, norm: str = "sample"
) -> Tensor:
    """One Langevin step whose size keeps the ratio of signal to noise.

        x' = x + e score + sqrt(2 e) n,   e = 2 alpha (snr |n| / |score|)^2;   e = 0 where the score vanishes

    Not a row of a plan: e depends on the data. The norms are reduced on the device; nothing waits for the host.
    Args:
        x, score, noise: [B, *]. snr: r > 0. alpha: see predictor_corrector. norm: "sample" takes each sample's own
        norms, so a sample is the same alone and in a batch; "batch" the means over the batch, as the reference code.
    Returns: x' [B, *].
    Source: Song et al. 2021, arXiv:2011.13456, appendix G, algorithms 4 and 5.
    """
    if not snr > 0:
        raise ValueError(f"snr must be > 0, got {snr!r}")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")
    if not x.shape == score.shape == noise.shape:
        raise ValueError(f"x, score and noise must have one shape, got {[tuple(v.shape) for v in (x, score, noise)]}")
    of_noise, of_score = (torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (noise, score))
    if norm == "batch":
        of_noise, of_score = of_noise.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
    ratio = torch.where(of_score > 0, snr * of_noise / of_score, torch.zeros_like(of_score))
    step = (2 * alpha * ratio**2).view(-1, *[1] * (x.ndim - 1))
    return x + step * score + torch.sqrt(2 * step) * noise


def _corrector(
    model: Callable[..., Any], plan: Plan, request: Request, count: int, snr: float, norm: str
) -> Callable[[int, Tensor], Tensor]:
    """correct(k, x): `count` Langevin steps at the noise level of row k."""
    cond = dict(request.options.cond or {})
    after = [*plan.alpha[1:].tolist(), plan.end[0]]
    integers = plan.times.dtype.kind == "i"

    def correct(k: int, x: Tensor) -> Tensor:
        alpha, variance = float(plan.alpha[k]), float(plan.sigma[k]) ** 2
        t = torch.full(
            (len(x),), plan.times[k].item(), dtype=torch.int64 if integers else torch.float32, device=x.device
        )
        skip, out = float(plan.c_skip[k]), float(plan.c_out[k])
        for i in range(count):
            m = model((float(plan.c_in[k]) * x).to(request.dtype), t, **cond).to(x.dtype)
            if plan.clamped:
                score = (alpha * (skip * x + out * m).clamp(float(plan.lo[k]), float(plan.hi[k])) - x) / variance
            else:
                score = ((alpha * skip - 1) / variance) * x + (alpha * out / variance) * m
            n = rng.normal(request.seeds, x.shape[1:], row=k * count + i, stream=STREAM, index=request.index)
            x = langevin_snr(x, score, n.to(x.dtype), snr=snr, alpha=(alpha / after[k]) ** 2, norm=norm)
        return x

    return correct


def predictor_corrector(
    model: Callable[..., Any],
    plan: Plan,
    shape: tuple[int, ...],
    *,
    snr: float = 0.16,
    corrections: int = 1,
    norm: str = "sample",
    **sampling: Any,  # noqa: ANN401 - any option of fd.sample
) -> Tensor | tuple[Tensor, Trajectory]:
    """fd.sample with Langevin steps before every row, at the row's own noise level.

        for each row k: x = langevin_snr(x, score(x, t_k), n) `corrections` times; x = row_k(x)

    Args:
        model, shape: as fd.sample. plan: the predictor, any plan of one slot (reverse_diffusion, ancestral, ddpm,
        euler_maruyama, ...). snr: 0.16 for VE, 0.01 for VP on images in the paper. corrections: Langevin steps a row,
        each a model evaluation; 0 is fd.sample. norm: see langevin_snr. sampling: fd.sample's options but callback,
        guidance, uncond and noise="torch".
    Returns: as fd.sample. nfe = plan.nfe (1 + corrections); the corrector's noise is Philox's stream 3.
    alpha of a step is (alpha_k / alpha_{k+1})^2: 1 on VE, 1 - beta_i where every step of a chain is taken, as the
    reference code has it (the paper's text can be read as the cumulative product).
    Source: Song et al. 2021, arXiv:2011.13456, algorithm 1 with 4 or 5.
    """
    for name in ("callback", "guidance", "uncond"):
        if sampling.get(name) is not None:
            raise ValueError(f"predictor_corrector takes no {name}: its corrector evaluates the model by itself")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise ValueError(f"corrections must be an integer >= 0, got {corrections!r}")
    request = resolve(model, plan, shape, Options().but(**sampling))
    if request.options.noise == "torch":
        raise ValueError("predictor_corrector draws by Philox: noise must be 'philox' or a function")
    if plan.slots != 1:
        raise ValueError(f"the predictor must have one slot, plan {plan.name!r} has {plan.slots}")
    if corrections == 0:
        return sample(model, plan, shape, **sampling)
    correct = _corrector(model, plan, request, corrections, snr, norm)
    with torch.no_grad():
        x = correct(0, _start(plan, request))

    def callback(k: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        return correct(k + 1, x) if k + 1 < plan.nfe else None

    return sample(model, plan, shape, **{**sampling, "x_T": x, "x_init": None, "callback": callback})


def _start(plan: Plan, request: Request) -> Tensor:
    o = request.options
    if o.x_T is not None:
        return o.x_T.to(request.device, torch.float32)
    x = plan.init_scale * rng.normal(request.seeds, request.shape[1:], row=0, stream=rng.START, index=request.index)
    return x if o.x_init is None else x + float(plan.alpha[0]) * o.x_init
