"""The training loss, its noise drawn again from the counter, and the slopes of its gradient in the same pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.devices import widest
from fastdiff.ops import _dispatch, _fused, _levels, _noising
from fastdiff.ops._dispatch import FLOATS64, check_batched, check_tensor
from fastdiff.ops._noising import Seeds
from fastdiff.ops._once import once
from fastdiff.ops._scaled import scaled
from fastdiff.ops.add_noise import TARGETS
from fastdiff.schedules import EDM, Betas, Schedule
from fastdiff.transforms import transformed
from fastdiff.weighting import WEIGHTINGS, WeightOptions, target_weight

LOSSES = ("l2", "l1", "huber")
NOISE_TARGETS = ("eps", "score")  # need no x0
GROUP = 256  # elements summed at a time: the order of a sample's sum is a function of its size alone
LARGE = 1 << 20  # elements of a sample from which a program of the kernel reads more of them


def denoising_loss(
    model_out: Tensor,
    x0: Tensor | None,
    t: int | float | Tensor,
    schedule: Schedule,
    seeds: Seeds,
    *,
    target: str = "eps",
    weighting: str | Tensor | None = None,
    loss: str = "l2",
    delta: float = 1.0,
    gamma: float = 5.0,
    p2: tuple[float, float] = (1.0, 1.0),
    sigma_data: float | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
) -> Tensor:
    """The loss of every sample of a batch, against a target made again from seeds; its gradient is computed with it.

        loss_b = w_b mean_e rho(m - target),   n = rng.normal(seeds, sample, row=row, stream=stream, index=index)
        eps = n;  v = (alpha n - sigma x0) / sqrt(alpha^2 + sigma^2);  score = -n / sigma;  flow = n - x0
        rho(d) = d^2 (l2),  |d| (l1),  d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2) (huber)

    Nothing is kept from `add_noise` to the loss, and rho' alone, of model_out's dtype, from the loss to backward.
    Args:
        model_out: [B, *sample], fp32, bf16 or fp16 (float64 in plain torch), any strides.
        x0: [B, *sample]; None is allowed for the targets eps and score.
        t, schedule, seeds, index, row, stream: as given to `add_noise`.
        target: "eps", "x0", "v", "score" or "flow": what model_out predicts.
        weighting: None is w = 1. A Tensor [B] multiplies the loss as it is. A name is a weight of the squared error of
            x0, converted to the target's (eps: / SNR, v: / (SNR + 1), score: sigma^2 / SNR, flow:
            / (1 + sqrt(SNR))^2; l1 and huber take the same number), SNR = alpha^2 / sigma^2:
            "snr" SNR;  "min_snr" min(SNR, gamma);  "truncated_snr" max(SNR, 1);  "edm" SNR + 1 / sigma_data^2;
            "sigma2" SNR (sigma^2 on the score: denoising score matching);  "likelihood" g^2 SNR / sigma^2 (g^2 on the
            score; Betas: g^2 per index);  "p2" SNR / (k + SNR)^p, p2 = (k, p).
        delta: of huber, > 0.   sigma_data: of "edm"; default the schedule's, else 0.5.
    Returns: [B] float32 (float64 for float64), differentiable in model_out and x0; each the mean over the sample.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, an unknown target, weighting or loss, x0 missing,
        seeds of another length, integer t for a continuous schedule or floating t for Betas, t out of range (on CUDA:
        NaN instead of an error).
    Numerics: a sample's loss never depends on the batch. Coefficients in float64, arithmetic in fp32. The gradient is
        rho' times the incoming one times w / n, that product taken in fp32: a loss scale keeps fp16 from underflow.
    Source:  Hang et al. 2023, arXiv:2303.09556 (min_snr); Salimans and Ho 2022, arXiv:2202.00512 (truncated_snr);
        Karras et al. 2022, arXiv:2206.00364 (edm); Vincent 2011 (sigma2); Song et al. 2021, arXiv:2101.09258
        (likelihood); Choi et al. 2022, arXiv:2204.00227 (p2).
    """
    named = weighting if isinstance(weighting, str) else None
    known = named is None and _levels.usable(schedule, model_out, x0)
    at, keyed, which, options = _checked(
        model_out, x0, t, schedule, seeds, target, weighting, loss, delta, gamma, p2, sigma_data, index, row, stream,
        raw=known,
    )  # fmt: skip
    x0 = None if target in NOISE_TARGETS else x0
    wide = torch.float64 if torch.float64 in (model_out.dtype, x0.dtype if x0 is not None else None) else torch.float32
    on_kernel = _dispatch.kernels_for(model_out) and wide == torch.float32
    if known:
        coef, rows = _levels.coefficients(schedule, at, "loss", target), None
    else:
        coef, rows = _coefficients(schedule, at, target, named, options, wide)
    given = coef, rows, keyed, which, row, stream, LOSSES.index(loss), float(delta), on_kernel
    if torch.compiler.is_compiling():
        out: Tensor = _DenoisingLoss.apply(model_out, x0, *given)[0]
    elif transformed():  # plain torch has every transform
        out = _as_defined(model_out, x0, coef, rows, keyed, which, row, stream, LOSSES.index(loss), delta)
    elif _dispatch.graded(model_out, x0):
        out = _Direct.apply(model_out, x0, given)[0]
    else:
        out = _loss_and_slopes(model_out, x0, *given)[0]
    return out if named == weighting else out * weighting.to(out.dtype)  # type: ignore[union-attr]


def denoising_loss_ref(
    model_out: Tensor,
    x0: Tensor | None,
    t: int | float | Tensor,
    schedule: Schedule,
    seeds: Seeds,
    *,
    target: str = "eps",
    weighting: str | Tensor | None = None,
    loss: str = "l2",
    delta: float = 1.0,
    gamma: float = 5.0,
    p2: tuple[float, float] = (1.0, 1.0),
    sigma_data: float | None = None,
    index: Tensor | None = None,
    row: int = 0,
    stream: int = rng.ROWS,
) -> Tensor:
    """`denoising_loss` as it is defined, in plain torch with its own autograd: the noise and the target are tensors."""
    at, keyed, which, options = _checked(
        model_out, x0, t, schedule, seeds, target, weighting, loss, delta, gamma, p2, sigma_data, index, row, stream
    )
    dtype = _noising.wide(model_out)
    named = weighting if isinstance(weighting, str) else None
    coef, rows = _coefficients(schedule, at, target, named, options, dtype)
    x0 = None if target in NOISE_TARGETS else x0
    out = _as_defined(model_out, x0, coef, rows, keyed, which, row, stream, LOSSES.index(loss), delta)
    return out if named == weighting else out * weighting.to(dtype)  # type: ignore[union-attr]


def _as_defined(
    m: Tensor, x0: Tensor | None, coef: Tensor, rows: Tensor | None, seeds: Tensor, index: Tensor | None, row: int,
    stream: int, kind: int, delta: float,
) -> Tensor:  # fmt: skip
    coef = (coef if rows is None else coef[rows]).expand(m.shape[0], 4)
    shape = m.shape[0], m.shape[1:].numel()
    goal = coef[:, 1:2] * rng.normal(seeds, shape[1:], row=row, stream=stream, index=index).to(coef.dtype)
    if x0 is not None:
        goal = goal + coef[:, :1] * x0.to(coef.dtype).reshape(shape)
    value, _ = _rho(m.to(coef.dtype).reshape(shape) - goal, kind, delta)
    return coef[:, 2] * value.mean(1)


def _rho(d: Tensor, kind: int, delta: float) -> tuple[Tensor, Tensor]:
    """rho(d) and its derivative."""
    if kind == 0:
        return d * d, 2 * d
    if kind == 1:
        return d.abs(), d.sign() + 0 * d  # a NaN stays one
    inside = d.clamp(-delta, delta)
    return inside * (d - 0.5 * inside), inside


def ordered_sum(values: Tensor) -> Tensor:
    """[B, n] -> [B], GROUP at a time, in an order that depends on n alone (not on B, not on threads)."""
    dtype, wide = values.dtype, widest(values.device)
    while values.shape[1] > GROUP:
        whole = values.shape[1] // GROUP * GROUP
        sums = values[:, :whole].unflatten(1, (-1, GROUP)).sum(2, dtype=wide)
        if whole < values.shape[1]:
            sums = torch.cat([sums, values[:, whole:].sum(1, keepdim=True, dtype=wide)], 1)
        values = sums
    return values.sum(1, dtype=wide).to(dtype)


def _fill(
    loss: Tensor, slope: Tensor, scale: Tensor, model_out: Tensor, x0: Tensor | None, coef: Tensor, noise: Tensor,
    kind: int, delta: float,
) -> None:  # fmt: skip
    """Writes loss, scale [B] and slope [B, n] from model_out, x0, noise [B, n] and coef [B, 4]."""
    wide = noise.dtype
    goal = coef[:, 1:2] * noise
    if x0 is not None:
        goal = goal + coef[:, :1] * x0.to(wide)
    value, derivative = _rho(model_out.to(wide) - goal, kind, delta)
    n, weight = noise.shape[1], coef[:, 2]
    loss.copy_(weight * (ordered_sum(value) / n))  # of an empty sample: NaN, as torch has it
    slope.copy_(derivative)
    scale.copy_(weight / max(n, 1))


def _on_cpu(
    model_out: Tensor, x0: Tensor | None, coef: Tensor, t: Tensor | None, seeds: Tensor, index: Tensor | None, row: int,
    stream: int, kind: int, delta: float, loss: Tensor, slope: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """Writes loss, scale [B] and slope like model_out: by the C++ loop where it can run, else plain torch."""
    batch, wide = model_out.shape[0], coef.dtype
    plain = wide == torch.float32 and (x0 is None or _fused.wanted(x0))
    given = model_out, x0, coef, t, seeds, index, row, stream, kind, delta
    if not (plain and _fused.loss_and_slopes(*given, loss, slope, scale)):
        n = slope.shape[1:].numel()
        z = rng.normal(seeds, (n,), row=row, stream=stream, index=index).to(wide)
        clean, c = None if x0 is None else x0.reshape(batch, n), (coef if t is None else coef[t]).expand(batch, 4)
        _fill(loss, slope.view(batch, n), scale, model_out.reshape(batch, n), clean, c, z, kind, delta)


def _loss_and_slopes(
    model_out: Tensor, x0: Tensor | None, coef: Tensor, rows: Tensor | None, seeds: Tensor, index: Tensor | None,
    row: int, stream: int, kind: int, delta: float, on_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [B], rho' like model_out, w / n [B]): backward multiplies the last two, and saves no more of full size."""
    loss, scale = (torch.empty(model_out.shape[0], dtype=coef.dtype, device=model_out.device) for _ in range(2))
    slope = torch.empty_like(model_out, memory_format=torch.contiguous_format)
    given = model_out, x0, coef, rows, seeds, index, row, stream, kind, delta, loss, slope, scale
    if not on_kernel:
        _on_cpu(*given)
    elif model_out.numel():
        torch.ops.fastdiff.denoising_loss(*given)
    else:
        loss.fill_(math.nan)
    return loss, slope, scale


class _DenoisingLoss(torch.autograd.Function):
    """All three, in the form that torch.compile takes apart."""

    forward = staticmethod(_loss_and_slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs[1], inputs[2], inputs[3], *output[1:], *inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return *_scaled(ctx, g), *(None,) * 9


class _Direct(torch.autograd.Function):
    """The same in the form that binds no arguments to names: that takes longer than a small loss.

    scale is an output because a saved output belongs to the graph: what `once` ties a gradient to, at no cost.
    """

    @staticmethod
    def forward(
        ctx: Any, model_out: Tensor, x0: Tensor | None, given: tuple[Any, ...]  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, slope, scale = _loss_and_slopes(model_out, x0, *given)
        _save(ctx, x0, given[0], given[1], slope, scale)
        return loss, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return *_scaled(ctx, g), None


def _save(
    ctx: Any, x0: Tensor | None, coef: Tensor, rows: Tensor | None, slope: Tensor, scale: Tensor,  # noqa: ANN401
    *sources: Tensor | None,
) -> None:  # fmt: skip
    ctx.set_materialize_grads(False)
    column = None
    if x0 is not None and x0.requires_grad:
        column = coef[:, 0] if rows is None else coef[:, 0][rows]
        ctx.x0_dtype = x0.dtype
    ctx.save_for_backward(slope, scale, column, *sources)


def _scaled(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gradients of model_out and x0, from that of the loss [B]."""
    if g is None:
        return None, None
    slope, scale, column, *sources = ctx.saved_tensors

    def gradients() -> tuple[Tensor | None, Tensor | None]:
        of_model = of_x0 = None
        if ctx.needs_input_grad[0]:  # a loss scale is in g: before anything is rounded to the model's dtype
            of_model = scaled(slope, g, by=scale)
        if ctx.needs_input_grad[1]:
            of_x0 = scaled(slope, -(g * scale) * column, ctx.x0_dtype)
        return of_model, of_x0

    return once(gradients, (*sources, scale, g))


def _coefficients(
    schedule: Schedule, t: Tensor, target: str, weighting: str | None, options: WeightOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(coef, t): [T, 4] and its row a sample for a chain, else [B or 1, 4] and None."""
    if not isinstance(schedule, Betas):
        return torch.stack(_columns(schedule, t, target, weighting, options), 1).to(dtype), None
    return _noising.table_of(schedule, _table, (target, weighting, options), t.device, dtype), t


def _columns(
    schedule: Schedule, t: Tensor, target: str, weighting: str | None, options: WeightOptions
) -> tuple[Tensor, ...]:
    of_x0, of_eps = TARGETS[target](*schedule.alpha_sigma(t))
    weight = target_weight(weighting, target, schedule, t, options)
    return of_x0, of_eps, weight, torch.zeros_like(weight)


def _table(schedule: Betas, target: str, weighting: str | None, options: WeightOptions) -> tuple[Tensor, ...]:
    return _columns(schedule, torch.arange(len(schedule.betas), device="cpu"), target, weighting, options)


def _checked(
    model_out: Tensor, x0: Tensor | None, t: int | float | Tensor, schedule: Schedule, seeds: Seeds, target: str,
    weighting: str | Tensor | None, loss: str, delta: float, gamma: float, p2: tuple[float, float],
    sigma_data: float | None, index: Tensor | None, row: int, stream: int, *, raw: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, WeightOptions]:  # fmt: skip
    check_tensor("model_out", model_out, dtypes=FLOATS64)
    check_batched("model_out", model_out)
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; valid: {', '.join(TARGETS)}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; valid: {', '.join(LOSSES)}")
    if x0 is not None:
        check_tensor("x0", x0, shape=model_out.shape, dtypes=FLOATS64, like=model_out)
    elif target not in NOISE_TARGETS:
        raise ValueError(f"target {target!r} needs x0, got None; {' and '.join(NOISE_TARGETS)} do without")
    if isinstance(weighting, Tensor):
        check_tensor("weighting", weighting, shape=model_out.shape[:1], dtypes=FLOATS64, like=model_out)
    elif weighting is not None and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; valid: None, {', '.join(WEIGHTINGS)}, or a Tensor [B]")
    if sigma_data is None:
        sigma_data = schedule.sigma_data if isinstance(schedule, EDM) else 0.5
    for name, value in (("delta", delta), ("gamma", gamma), ("sigma_data", sigma_data)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    if not isinstance(p2, tuple | list) or len(p2) != 2 or not all(0 <= v < math.inf for v in p2):
        raise ValueError(f"p2 must be (k, p), two finite numbers >= 0, got {p2!r}")
    at = _noising.times(t, schedule, model_out, raw=raw)
    keyed, which = _noising.noise_arguments(model_out, seeds, index, row, stream, None, fill=False)
    assert keyed is not None
    return at, keyed, which, WeightOptions(float(gamma), float(p2[0]), float(p2[1]), float(sigma_data))


def _launch(
    model_out: Tensor, x0: Tensor | None, coef: Tensor, t: Tensor | None, seeds: Tensor, index: Tensor | None, row: int,
    stream: int, kind: int, delta: float, loss: Tensor, slope: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    batch, n = model_out.shape[0], model_out.shape[1:].numel()
    per_sample = coef.shape[0] > 1 if t is None else t.numel() > 1
    tile = loss_tile(n)
    tiles = -(-n // tile["BLOCK"])
    parts = loss if tiles == 1 else torch.empty(batch, tiles, dtype=torch.float32, device=loss.device)
    args = (
        model_out.contiguous(), None if x0 is None else x0.contiguous(), coef.contiguous(),
        None if t is None else t.contiguous(), seeds.contiguous(),
        None if index is None else index.contiguous(), parts, slope, scale, n,
        _dispatch.FIRST, coef.shape[0], int(per_sample), row, stream, tiles, 1.0 / n, delta,
    )  # fmt: skip
    _dispatch.launch(_dispatch.kernels("denoising_loss").denoising_loss_kernel, args, n, batch, tile=tile, KIND=kind)
    add_parts(parts, loss)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """out [B] = the sums of parts [B, tiles], unless they are it; in an order that depends on their number alone."""
    if parts is not out:
        batch, tiles = parts.shape
        width = {"BLOCK": 128, "num_warps": 1} if tiles <= 1024 else {"BLOCK": 1024, "num_warps": 4}
        args = (parts, out, tiles, _dispatch.FIRST)
        _dispatch.launch(_dispatch.kernels("denoising_loss").sum_kernel, args, 1, batch, tile={"PARTS": 1, **width})


def loss_tile(n: int) -> dict[str, int]:
    """One warp a program, pieces by the size of a sample: no shared memory, and its sums depend on nothing else."""
    parts = 4 if n <= LARGE else 16
    return {"BLOCK": 256 * parts, "PARTS": parts, "num_warps": 1}


_dispatch.register(
    "denoising_loss(Tensor model_out, Tensor? x0, Tensor coef, Tensor? t, Tensor seeds, Tensor? index, int row, "
    "int stream, int kind, float delta, Tensor(a!) loss, Tensor(b!) slope, Tensor(c!) scale) -> ()",
    _launch,
)
