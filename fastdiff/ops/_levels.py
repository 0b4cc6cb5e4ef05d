"""Coefficient rows of a continuous schedule, by one kernel or C++ loop instead of some twenty operations of torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import native
from fastdiff import schedules as S
from fastdiff.lasting import lasting
from fastdiff.ops import _dispatch, _fused
from fastdiff.transforms import transformed

__all__ = ["KINDS", "coefficients", "usable"]

BLOCK = 128
GIVES = ("noise", "loss", "classes")
TARGETS = ("eps", "v", "x0", "score", "flow")

# schedule -> the numbers its closed form in fastdiff_kernels/levels.py and levels_cpu.hpp reads, in the latter's order;
# a subclass has formulas of its own
KINDS: dict[type, Callable[[Any], tuple[float, ...]]] = {
    S.VP: lambda s: (s.beta_min, 0.5 * (s.beta_max - s.beta_min)),
    S.SubVP: lambda s: (s.beta_min, 0.5 * (s.beta_max - s.beta_min)),
    S.VE: lambda s: (s.sigma_min, s._log_ratio),
    S.Flow: lambda s: (s.shift,),
    S.EDM: lambda s: (*s._ramp, s.rho),
    S.Cosine: lambda s: (s.s, 1.0 + s.s, 0.5 * math.pi, s._theta(0.0), math.cos(s._theta(0.0))),
    S.BFNContinuous: lambda s: (s.rate,),
    S.BFNDiscrete: lambda s: (s.scale, math.sqrt(s.scale), math.sqrt(2.0) if s.num_classes == 2 else 1.0),
}

NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


def usable(schedule: object, *tensors: object) -> bool:
    """Is this schedule's formula known, and are these an operation's tensors that runs as a kernel or a C++ loop?

    Not in code that is compiled, transformed or watched, which fuses or takes apart the plain formulas.
    """
    if type(schedule) not in KINDS or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    given = [x for x in tensors if isinstance(x, Tensor)]
    if not given or any(x.dtype == torch.float64 for x in given):
        return False
    return _dispatch.kernels_for(given[0]) or (_fused.wanted(*given) and native.available())


def coefficients(schedule: S.Schedule, t: Tensor, gives: str, target: str | None = None) -> Tensor:
    """Rows of four fp32 coefficients at times t [B], of any float dtype and not looked at: NaN outside [0, 1].

    Args: gives: "noise" (alpha, sigma, the target's of x0 and eps), "loss" (the target's, 1, 0) or "classes"
        (alpha, sigma twice; of two classes in one channel sqrt(2) sigma). target: of fastdiff.ops.add_noise.TARGETS.
    Returns: fp32 [B, 4].
    Numerics: float64, rounded once.
    """
    out = torch.empty(t.shape[0], 4, dtype=torch.float32, device=t.device)
    if not len(out):
        return out
    kind, numbers = type(schedule), _parameters(schedule, t.device)
    if _dispatch.kernels_for(t):
        torch.ops.fastdiff.levels(t, numbers, kind.__name__, gives, target, out)
    else:
        which = NUMBERS[kind], GIVES.index(gives), -1 if target is None else TARGETS.index(target)
        assert native.run("noise", "levels", t.double().contiguous(), numbers, out, *which, len(out))
    return out


@functools.lru_cache(1 << 16)  # a graph that someone captured reads them: as good as never given up
def _parameters(schedule: S.Schedule, device: torch.device) -> Tensor:
    with lasting():
        return torch.tensor(KINDS[type(schedule)](schedule), dtype=torch.float64, device=device)


def _launch(t: Tensor, parameters: Tensor, kind: str, gives: str, target: str | None, out: Tensor) -> None:
    count, kernel = t.shape[0], _dispatch.kernels("levels").levels_kernel
    _dispatch.run(
        kernel, (t.contiguous(), parameters, out, count), -(-count // BLOCK), 1,
        KIND=kind, GIVES=gives, TARGET=target, BLOCK=BLOCK, num_warps=BLOCK // (64 if torch.version.hip else 32),
    )  # fmt: skip


_dispatch.register(
    "levels(Tensor t, Tensor parameters, str kind, str gives, str? target, Tensor(a!) out) -> ()", _launch
)
