"""The Langevin corrector with a signal-to-noise step, and the predictor-corrector loop of the score-SDE paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops, rng
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
    of_noise, of_score = (
        torch.linalg.vector_norm(v.reshape(len(v), v.shape[1:].numel()), dim=1) for v in (noise, score)
    )
    if norm == "batch":
        of_noise, of_score = of_noise.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
    ratio = torch.where(of_score > 0, snr * of_noise / of_score, torch.zeros_like(of_score))
    step = (2 * alpha * ratio**2).view(-1, *[1] * (x.ndim - 1))
    return x + step * score + torch.sqrt(2 * step) * noise


class _Corrector:
    """correct(k, x): Langevin steps at the noise level of row k, with that row's guidance."""

    def __init__(
        self, model: Callable[..., Any], plan: Plan, request: Request, count: int, snr: float, norm: str
    ) -> None:
        self.model, self.plan, self.request, self.count = model, plan, request, count
        self.step = {"snr": snr, "norm": norm}
        self.keys = request.keys()
        o = request.options
        self.cond = dict(o.cond or {})
        self.uncond = {**self.cond, **(o.uncond or {})}
        self.after = [*plan.alpha[1:].tolist(), plan.end[0]]
        self.rule = {"rule": o.guide, **(o.guide_options or {})} if o.guide != "cfg" else {}

    def start(self) -> Tensor:
        """The state before row 0, drawn as the sampler would."""
        o, plan = self.request.options, self.plan
        if o.x_T is not None:
            return o.x_T.to(self.request.device, torch.float32)
        x = plan.init_scale * self.draw(0, rng.START)
        if o.x_init is not None:
            x = x + float(plan.alpha[0]) * o.x_init
        return x + plan.init_noise * self.draw(1, rng.START) if plan.init_noise else x

    def draw(self, row: int, stream: int) -> Tensor:
        r = self.request
        if r.options.noise == "torch":
            parts, count = r.generators, r.shape[0] // len(r.generators)
            drawn = [torch.randn(count, *r.shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in parts]
            return torch.cat(drawn).to(r.device)
        seeds, index = self.keys
        return rng.normal(seeds, r.shape[1:], row=row, stream=stream, index=index)

    def output(self, k: int, x: Tensor) -> Tensor:
        """The model's output at row k, guided, in float32."""
        plan, r = self.plan, self.request
        kind = torch.int64 if plan.times.dtype.kind == "i" else torch.float32
        t = torch.full((len(x),), plan.times[k].item(), dtype=kind, device=x.device)
        seen = (float(plan.c_in[k]) * x).to(r.dtype)
        m = self.model(seen, t, **self.cond).to(x.dtype)
        if r.weight is None:
            return m
        w = r.weight.to(x.device)[k if r.weight.shape[0] > 1 else 0].expand(len(x))
        return ops.guide(m, self.model(seen, t, **self.uncond).to(x.dtype), w, **self.rule)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        plan = self.plan
        alpha, variance = float(plan.alpha[k]), float(plan.sigma[k]) ** 2
        skip, out = float(plan.c_skip[k]), float(plan.c_out[k])
        for i in range(self.count):
            m = self.output(k, x)
            if plan.clamped or self.request.options.threshold is not None:
                x0 = skip * x + out * m
                if self.request.options.threshold is not None:
                    x0 = ops.threshold(x0, *self.request.options.threshold)
                score = (alpha * x0.clamp(float(plan.lo[k]), float(plan.hi[k])) - x) / variance
            else:
                score = ((alpha * skip - 1) / variance) * x + (alpha * out / variance) * m
            n = self.draw(k * self.count + i, STREAM).to(x.dtype)
            x = langevin_snr(x, score, n, alpha=(alpha / self.after[k]) ** 2, **self.step)  # type: ignore[arg-type]
        return x


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
        each a model evaluation (two with guidance); 0 is fd.sample. norm: see langevin_snr.
        sampling: any of fd.sample's options. callback(row, t, x, x0) runs after the row, before the next corrections.
        noise="torch" draws the start, then for every row its corrections' noise and its own, as the reference code; a
        function gives the rows' noise, the corrector's stays Philox's.
    Returns: as fd.sample. nfe = plan.nfe (1 + corrections); the corrector's noise is Philox's stream 3.
    alpha of a step is (alpha_k / alpha_{k+1})^2: 1 on VE, 1 - beta_i where every step of a chain is taken, as the
    reference code has it (the paper's text can be read as the cumulative product).
    Source: Song et al. 2021, arXiv:2011.13456, algorithm 1 with 4 or 5.
    """
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise ValueError(f"corrections must be an integer >= 0, got {corrections!r}")
    request = resolve(model, plan, shape, Options().but(**sampling))
    if plan.readout != "affine":
        raise ValueError(f"plan {plan.name!r} reads its prediction out of {plan.classes} classes or bins: no score")
    if plan.slots != 1:
        raise ValueError(f"the predictor must have one slot, plan {plan.name!r} has {plan.slots}")
    if corrections == 0:
        return sample(model, plan, shape, **sampling)
    correct, after_row = _Corrector(model, plan, request, corrections, snr, norm), request.options.callback
    with torch.no_grad():
        x = correct(0, correct.start())

    # made of a seed again, they would start anew
    draws = {"generator": request.generators} if request.generators else {}

    def callback(k: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        changed = None if after_row is None else after_row(k, t, x, x0)
        x = x if changed is None else changed
        return correct(k + 1, x) if k + 1 < plan.nfe else changed

    return sample(model, plan, shape, **{**sampling, "x_T": x, "x_init": None, "callback": callback, **draws})
