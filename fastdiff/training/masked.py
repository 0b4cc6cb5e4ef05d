"""Training masked diffusion: tokens masked to time t, and the bound's loss on what a network makes of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.devices import widest
from fastdiff.ops import _noising
from fastdiff.ops._categorical import check_classes
from fastdiff.ops._dispatch import FLOATS64, check_tensor
from fastdiff.ops._noising import Seeds
from fastdiff.ops.unmask_step import CHOICE, uniforms
from fastdiff.schedules import Masked
from fastdiff.training.bfn import scaled
from fastdiff.transforms import readable

__all__ = ["mask_tokens", "masked_loss"]


def mask_tokens(
    x: Tensor, t: float | Tensor, schedule: Masked, *, seeds: Seeds | None = None, index: Tensor | None = None,
    row: int = 0, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Masks integer classes to time t: each is itself with probability alpha(t), the mask otherwise.

        token = mask where u <= 1 - alpha(t), else x          u uniform in (0, 1], one a token

    Args:
        x: int64 classes [B, *D], 0..K-1.   t: one time, or [B], floating point in [0, 1].   schedule: Masked.
        seeds, index, row: B ints or int64 [B]: u is of Philox's stream 5, no dependence on batch or device; row changes
            it (a training step, say).   noise: u itself, [B, *D], floating point; not with seeds.
    Returns: int64 [B, *D].
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, classes outside 0..K-1 or t outside [0, 1] (on the
        CPU), seeds and noise both or neither, another schedule.
    Source:  Sahoo et al. 2024, arXiv:2406.07524, section 3; Shi et al. 2024, arXiv:2406.04329, section 2.
    """
    at = _times(x, t, schedule)
    gone = schedule.masked(at)
    keyed, which = _noising.noise_arguments(x, seeds, index, row, CHOICE, noise)
    if noise is None:
        assert keyed is not None and which is not None
        rows = torch.full_like(keyed, row)
        noise = uniforms(keyed, which, rows, CHOICE, x.shape[1:].numel()).view(x.shape)
    return torch.where(noise <= gone.view(-1, *[1] * (x.dim() - 1)), schedule.mask, x)


def masked_loss(
    logits: Tensor, x: Tensor, tokens: Tensor, t: float | Tensor, schedule: Masked, *, units: str = "nats"
) -> Tensor:
    """The negative bound on ln p(x) of masked diffusion, a number a sample: a weighted cross-entropy of masked tokens.

        -alpha'(t) / (1 - alpha(t)) sum over masked tokens of -ln softmax(m)_x

    Its expectation over t uniform in [0, 1] and tokens = mask_tokens(x, t, schedule) is the bound.
    Args:
        logits: [B, *D, K], what the network makes of tokens (and t).   x: int64 classes [B, *D].   tokens: int64
            [B, *D], x or the mask.   t: schedule time, one or [B].   units: "nats" (a sum over the sample) or
            "bits_per_dim" (a token).
    Returns: [B] fp32 (float64 for float64 logits), differentiable in logits; 0 where nothing is masked.
    Raises:  TypeError, ValueError: a wrong shape, dtype or schedule, classes outside 0..K-1, t outside [0, 1], unknown
        units.
    Numerics: the mask's own logit counts as -inf. The weight grows like 1 / t: `low_discrepancy_times`
        lower the variance.
    Source:  Sahoo et al. 2024, arXiv:2406.07524, eq. 10; Shi et al. 2024, arXiv:2406.04329, eq. 4.
    """
    at = _times(x, t, schedule)
    weight = schedule.weight(at)
    check_tensor("logits", logits, shape=(*x.shape, schedule.num_classes), dtypes=FLOATS64, like=x)
    check_tensor("tokens", tokens, shape=x.shape, dtypes=(torch.int64,), like=x)
    if readable(tokens) and bool((wrong := (tokens != x) & (tokens != schedule.mask)).any()):
        raise ValueError(
            f"tokens must be x or the mask, {schedule.mask}, got {int(tokens[wrong][0])} for another class"
        )
    m = logits if logits.dtype == torch.float64 else logits.float()
    if schedule.mask < schedule.num_classes:
        m = torch.where(torch.arange(schedule.num_classes, device=m.device) == schedule.mask, -torch.inf, m)
    masked = tokens == schedule.mask
    # what is not masked gives no gradient, of an infinite loss neither
    safe = torch.where(masked[..., None], m, 0.0)
    lost = torch.nn.functional.cross_entropy(safe.flatten(0, -2), x.flatten(), reduction="none").view(x.shape)
    total = torch.where(masked, lost, 0.0).flatten(1).sum(1)
    weight = torch.where(total.detach() > 0, weight, 0.0)  # infinite at t = 0
    return scaled(weight.to(total.dtype) * total, x.shape[1:].numel(), units)


def _times(x: Tensor, t: float | Tensor, schedule: Masked) -> Tensor:
    """t as float64 [1] or [B], with x and the schedule checked."""
    if not isinstance(schedule, Masked):
        raise TypeError(f"schedule must be schedules.Masked, got {type(schedule).__name__}")
    check_classes("x", x, schedule.num_classes)
    if readable(x) and bool((x == schedule.mask).any()):
        raise ValueError(f"x must be data, without the mask, {schedule.mask}")
    if x.dim() < 2:
        raise ValueError(f"x must be [B, *D], got {tuple(x.shape)}")
    if not isinstance(t, float | Tensor) or (isinstance(t, Tensor) and not t.is_floating_point()):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a float or a floating point tensor [B], got {got}")
    at = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=widest(x.device), device=x.device)
    at = at.to(widest(at.device))
    at = at.view(1) if at.dim() == 0 else at
    if tuple(at.shape) not in ((1,), (len(x),)):
        raise ValueError(f"t must be a number or have shape ({len(x)},), got {tuple(at.shape)}")
    if at.device != x.device:
        raise ValueError(f"t must be on {x.device}, got {at.device}")
    return at
