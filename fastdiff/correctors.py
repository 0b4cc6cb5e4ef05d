"""The Langevin corrector with a signal-to-noise step, and the predictor-corrector loop of the score-SDE paper."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.categorical import make_run
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
    _check(snr, norm)
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


def _check(snr: float, norm: str) -> None:
    if isinstance(snr, bool) or not isinstance(snr, Real) or not 0 < snr < np.inf:
        raise ValueError(f"snr must be a finite number > 0, got {snr!r}")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")


class _Corrector:
    """correct(k, x): Langevin steps at the noise level of row k, with that row's guidance."""

    def __init__(
        self, model: Callable[..., Any], plan: Plan, request: Request, count: int, snr: float, norm: str
    ) -> None:
        self.plan, self.request, self.count = plan, request, count
        self.step = {"snr": snr, "norm": norm}
        self.keys = request.keys()
        self.run = make_run(model, plan, request, compiled=False)
        self.run.bind(model, request.options.cond, request.options.uncond)
        self.after = [*plan.alpha[1:].tolist(), plan.end[0]]

    def start(self) -> Tensor:
        """The state before row 0, drawn as the sampler does."""
        self.run.start(self.request)
        return self.run.x.clone()

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
        run = self.run
        run.x.copy_(x)
        run.refresh(k)
        m, u = run.evaluate(run.t[k])
        m = m.to(x.dtype)
        if u is None or run.weight is None:
            return m
        w = run.weight[k if run.weight.shape[0] > 1 else 0].expand(len(x))
        return ops.guide(m, u.to(x.dtype), w, **run.rule)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        plan = self.plan
        if plan.sigma[k] == 0:  # no noise, no score
            return x
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
        euler_maruyama, ...); of a learned variance the score takes the mean's half. snr: 0.16 for VE, 0.01 for VP on
        images in the paper. corrections: Langevin steps a row, each a model evaluation (two with guidance); 0 is
        fd.sample. A row whose sigma is 0 has none. norm: see langevin_snr.
        sampling: any of fd.sample's options. callback(row, t, x, x0) runs after the row, before the next corrections.
        noise="torch" draws the start, then for every row its corrections' noise and its own, as the reference code; a
        function gives the rows' noise, the corrector's stays Philox's.
    Returns: as fd.sample. nfe = plan.nfe (1 + corrections) where no sigma is 0. The corrector's noise: stream 3.
    alpha of a step is (alpha_k / alpha_{k+1})^2: 1 on VE, 1 - beta_i where every step of a chain is taken, as the
    reference code has it (the paper's text can be read as the cumulative product).
    Source: Song et al. 2021, arXiv:2011.13456, algorithm 1 with 4 or 5.
    """
    if isinstance(corrections, bool) or not isinstance(corrections, Integral) or corrections < 0:
        raise ValueError(f"corrections must be an integer >= 0, got {corrections!r}")
    _check(snr, norm)
    request = resolve(model, plan, shape, Options().but(**sampling))
    if plan.readout != "affine":
        raise ValueError(f"plan {plan.name!r} reads its prediction out of {plan.classes} classes or bins: no score")
    if plan.slots != 1:
        raise ValueError(f"the predictor must have one slot, plan {plan.name!r} has {plan.slots}")
    levels = [*plan.alpha, *plan.sigma, *plan.end, *plan.c_skip, *plan.c_out]
    if not np.all(np.isfinite(levels)):
        raise ValueError(f"plan {plan.name!r} does not record its alpha and sigma: no score")
    alpha, sigma = np.append(plan.alpha, plan.end[0]), np.append(plan.sigma, plan.end[1])
    if np.any(sigma[1:] * alpha[:-1] > (1 + 1e-9) * sigma[:-1] * alpha[1:]):
        raise ValueError(f"a corrector needs a plan from noise to data, {plan.name!r} goes the other way")
    if corrections == 0 or 0 in request.shape:
        return sample(model, plan, shape, **sampling)
    after_row = request.options.callback
    with torch.inference_mode(False), torch.no_grad():
        correct = _Corrector(model, plan, request, corrections, snr, norm)
        x = correct(0, correct.start())

    # made of a seed again, they would start anew
    draws = {"generator": request.generators, "seed": None, "seeds": None} if request.generators else {}

    def callback(k: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        changed = None if after_row is None else after_row(k, t, x, x0)
        fits = isinstance(changed, Tensor) and changed.shape == x.shape and changed.is_floating_point()
        if k + 1 == plan.nfe or not (changed is None or fits):
            return changed  # the sampler says what is wrong with it
        return correct(k + 1, x if changed is None else changed)

    return sample(model, plan, shape, **{**sampling, "x_T": x, "x_init": None, "callback": callback, **draws})
