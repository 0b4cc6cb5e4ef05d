"""Masked diffusion of classes as a schedule: how likely a token is still itself at time t, and not the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastdiff.schedules.base import Array, Schedule, on_any_device, plain, positive, quiet, xp_of

__all__ = ["Masked"]

KINDS = ("linear", "cosine", "polynomial")


@dataclass(frozen=True)
class Masked:
    """Masked (absorbing) diffusion of K classes: each token is itself with probability alpha(t), the mask otherwise.

        linear:      alpha = 1 - t                     MDLM's log-linear, LLaDA's
        cosine:      alpha = 1 - sin(pi t / 2)         MaskGIT's and MD4's: few tokens first, many at the end
        polynomial:  alpha = 1 - t^power

    t = 0 is data, t = 1 the mask everywhere. It is no fastdiff.Schedule: nothing is added to a token.
    Args: num_classes: K >= 2, the logits a model returns for a token. mask: the id of the mask in the model's input;
        default K, one beyond the logits. Where it is below K its logit is never chosen. kind, power: above.
    Raises: TypeError, ValueError: K or mask is no such integer; an unknown kind; power <= 0, or given to another kind.
    Source: Sahoo et al. 2024, arXiv:2406.07524; Shi et al. 2024, arXiv:2406.04329; Chang et al. 2022, arXiv:2202.04200.
    """

    num_classes: int
    mask: int = -1
    kind: str = "linear"
    power: float = 1.0
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        plain(self, "num_classes", "mask", "power")
        for name, value in (("num_classes", self.num_classes), ("mask", self.mask)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {self.num_classes}")
        if self.mask == -1:
            object.__setattr__(self, "mask", self.num_classes)
        if not 0 <= self.mask < 2**31:
            raise ValueError(f"mask must be in 0..2**31 - 1, got {self.mask}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; valid: {', '.join(KINDS)}")
        positive(power=self.power)
        if self.power != 1 and self.kind != "polynomial":
            raise ValueError(f"power belongs to kind 'polynomial', got {self.power!r} with {self.kind!r}")

    def _time(self, t: Array) -> Array:
        """float64 time, refused outside [0, 1] as a Schedule's."""
        return Schedule._time(self, t)  # type: ignore[arg-type]

    @on_any_device
    def masked(self, t: Array) -> Array:
        """1 - alpha(t), the probability of the mask."""
        t = self._time(t)
        if self.kind == "cosine":
            return xp_of(t).sin(0.5 * math.pi * t)
        return t**self.power

    @on_any_device
    def alpha(self, t: Array) -> Array:
        """alpha(t), the probability that a token is still itself."""
        return 1.0 - self.masked(t)

    @on_any_device
    def weight(self, t: Array) -> Array:
        """-alpha'(t) / (1 - alpha(t)), what the cross-entropy of a masked token counts in the bound; inf at t = 0."""
        t = self._time(t)
        xp = xp_of(t)
        with quiet(t):
            if self.kind == "cosine":
                return 0.5 * math.pi / xp.tan(0.5 * math.pi * t)
            return self.power / t
