"""Random times for training, on the device and without looking at them: no host sync."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.devices import widest
from fastdiff.lasting import lasting, traced_constant
from fastdiff.schedules import Betas, Masked, Schedule
from fastdiff.schedules.base import outside
from fastdiff.transforms import readable

__all__ = [
    "ImportanceTimes",
    "log_normal_times",
    "logit_normal_times",
    "low_discrepancy_times",
    "step_times",
    "uniform_times",
]

END = 60  # log-normal times go down to t_max / 2^END where the level has no end there


def uniform_times(
    batch: int,
    schedule: Schedule | Masked,
    *,
    low: float | None = None,
    high: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent uniform times.

    Args:    batch: B.   schedule: Betas gives every index 0 .. T-1 the same probability; or Masked.
             low, high: of a continuous schedule, default 0 and t_max (avoid 0 for score and likelihood weighting).
             generator: on the device the times are wanted on.   device: default the generator's, else torch's.
    Returns: t [B], float32, or int64 for Betas.
    Raises:  TypeError, ValueError for a bad batch, schedule or range.
    """
    return _place(_random(batch, generator, device), schedule, low, high)


def low_discrepancy_times(
    batch: int,
    schedule: Schedule | Masked,
    *,
    low: float | None = None,
    high: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform times of which every stratum of size 1/B holds one: each alone is uniform, their mean varies less.

        u_i = (u + i / B) mod 1,  one u for the batch

    Args, Returns, Raises: as `uniform_times`.   Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """
    offset = _random(1, generator, device)
    _check_batch(batch)
    strata = torch.arange(batch, dtype=offset.dtype, device=offset.device) / max(batch, 1)
    return _place((offset + strata) % 1.0, schedule, low, high)


def log_normal_times(
    batch: int,
    schedule: Schedule,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times at which ln(sigma / alpha) is normal: EDM's training distribution on any schedule.

        ln(sigma / alpha) ~ N(mean, std^2), kept in the schedule's range

    Args:    mean, std: Karras et al.'s P_mean and P_std.   The rest: as `uniform_times`.
    Returns: t [B], float32, or int64 for Betas (the nearest index), from a float64 table of levels.
    Source:  Karras et al. 2022, arXiv:2206.00364, table 1.
    """
    if not (math.isfinite(mean) and 0 <= std < math.inf):
        raise ValueError(f"mean must be finite and std >= 0, got {mean!r} and {std!r}")
    normal = _random(batch, generator, device, torch.randn)
    return _rounded(_time_of_level(mean + std * normal, schedule), schedule)


def logit_normal_times(
    batch: int,
    schedule: Schedule,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times whose logit is normal, in the middle of the path more often than at its ends.

        t / t_max = 1 / (1 + exp(-y)),  y ~ N(mean, std^2)

    Args:    mean > 0 leans to noise.   The rest: as `uniform_times`.   Returns: t [B], float32, or int64 for Betas.
    Source:  Esser et al. 2024, arXiv:2403.03206, section 3.1 (rf/lognorm).
    """
    if not (math.isfinite(mean) and 0 <= std < math.inf):
        raise ValueError(f"mean must be finite and std >= 0, got {mean!r} and {std!r}")
    normal = _random(batch, generator, device, torch.randn)
    return _place(torch.sigmoid(mean + std * normal), schedule, None, None)


def step_times(
    batch: int,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The beginnings of uniformly drawn steps of a Bayesian flow's n: what its n-step losses take.

        t = 1 - (i - 1)/n,  i uniform in 1 .. n

    Args:    batch: B.   steps: n >= 1.   generator, device: as `uniform_times`.
    Returns: t [B] float32.   Raises: TypeError, ValueError for a bad batch or number of steps.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    _check_batch(batch)
    i = torch.randint(int(steps), (batch,), generator=generator, device=_device(generator, device))
    return (1.0 - i.to(widest(i.device)) / steps).float()


class ImportanceTimes:
    """Times drawn where the loss is large: p(t) in proportion to the root of its mean square over the last losses.

        p_t ~ sqrt(mean of the last `history` losses^2 at t),  mixed with `uniform` of the uniform distribution
        weights: 1 / (T p_t), so that mean(weights * losses) estimates the uniform mean

    Uniform until every bin has `history` losses, and where a loaded one is not finite. State lives on one device and is
    updated there, without host syncs; a loss that is not finite, or (on CUDA) whose time is outside, is left out.
    Args:    schedule: Betas has one bin an index; a continuous schedule `bins` of equal width.   history: losses kept
             a bin.   uniform: share of the uniform distribution.   device: of the state.
    Source:  Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 18.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        bins: int = 100,
        history: int = 10,
        uniform: float = 0.001,
        device: torch.device | str | None = None,
    ) -> None:
        _check_schedule(schedule)
        for name, value in (("bins", bins), ("history", history)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1], got {uniform!r}")
        self.schedule, self.uniform = schedule, uniform
        self.bins = len(schedule.betas) if isinstance(schedule, Betas) else bins
        self.losses = torch.zeros(self.bins, history, dtype=_widest(device), device=device)
        self.counts = torch.zeros(self.bins, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p [bins] float64 (fp32 on a device without), sums to 1."""
        # by a power of two, which changes no digit: else a square may be infinite
        largest = self.losses.abs().amax()
        scale = torch.where(largest > 0, largest / torch.frexp(largest)[0], 1.0)
        root = (self.losses / scale).square().mean(1).sqrt()
        total = root.sum()
        warm = (self.counts >= self.losses.shape[1]).all() & (total > 0) & total.isfinite()
        even = torch.full_like(root, 1.0 / self.bins)
        p = torch.where(warm, root / torch.where(warm, total, 1.0), even)
        return (1 - self.uniform) * p + self.uniform * even

    def sample(self, batch: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(t [B], weights [B] float32)."""
        _check_batch(batch)
        where, p = self.losses.device, self.probabilities()
        edges = p.cumsum(0)
        u = torch.rand(batch, generator=generator, device=where, dtype=p.dtype) * edges[-1]
        at = torch.searchsorted(edges, u, right=True).clamp(max=self.bins - 1)
        weights = (1.0 / (self.bins * p[at])).float()
        if isinstance(self.schedule, Betas):
            return at, weights
        inside = torch.rand(batch, generator=generator, device=where, dtype=p.dtype)
        return ((at + inside) * (self.schedule.t_max / self.bins)).float().clamp(max=self.schedule.t_max), weights

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Enters unweighted losses [B] at times t [B], the oldest of a bin leaving (t may repeat in a batch).

        Raises: TypeError, ValueError for another shape, or kind of time; on the CPU for a time outside the schedule.
        """
        for name, value in (("t", t), ("losses", losses)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a Tensor [B], got {type(value).__name__}")
        if t.shape != losses.shape or t.dim() != 1:
            raise ValueError(f"t and losses must be [B] of one length, got {tuple(t.shape)} and {tuple(losses.shape)}")
        chain, largest = isinstance(self.schedule, Betas), self.schedule.t_max
        if t.dtype == torch.bool or t.dtype.is_floating_point == chain:
            kind = "an integer index" if chain else "floating point"
            raise TypeError(f"t must be {kind} for {self.schedule}, got {t.dtype}")
        if readable(t) and t.numel() and outside(t, largest):
            low, high = t.min().item(), t.max().item()
            raise ValueError(f"t must be in 0..{largest:g} for {self.schedule}, got {low:g}..{high:g}")
        at = t.long() if chain else (t * (self.bins / largest)).long().clamp(max=self.bins - 1)
        # a bin beyond the last, thrown away: of what must not enter
        at = torch.where((t >= 0) & (t <= largest) & losses.detach().isfinite(), at, self.bins)
        order = at.argsort(stable=True)
        at, history = at[order], self.losses.shape[1]
        # the k-th loss of its bin in this batch; of more than `history` the last ones win
        first = torch.searchsorted(at, at)
        rank = torch.arange(len(at), device=at.device) - first
        left = torch.searchsorted(at, at, right=True) - first - rank  # entries from here to the bin's last
        counts = nn.functional.pad(self.counts, (0, 1))
        slot = (counts[at] + rank) % history
        slot = torch.where(left <= history, slot, history)  # a column that is thrown away
        wide = nn.functional.pad(self.losses, (0, 1, 0, 1))
        wide[at, slot] = losses.detach().to(wide.dtype)[order]
        self.losses.copy_(wide[: self.bins, :history])
        self.counts.copy_(counts.index_add_(0, at, torch.ones_like(at))[: self.bins])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts a saved state back.   Raises: ValueError, and nothing has changed, for other bins or another history."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"a state holds {', '.join(own)}, got {', '.join(state) or 'nothing'}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name} must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


def _check_batch(batch: int) -> None:
    if isinstance(batch, bool) or not isinstance(batch, Integral) or batch < 0:
        raise ValueError(f"batch must be an int >= 0, got {batch!r}")


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastdiff.schedules.Schedule, got {type(schedule).__name__}")


def _device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return generator.device if device is None and generator is not None else device


def _widest(device: torch.device | str | None) -> torch.dtype:
    return widest(torch.empty(0, device=device).device)


def _random(
    batch: int, generator: torch.Generator | None, device: torch.device | str | None,
    draw: Callable[..., Tensor] = torch.rand,
) -> Tensor:  # fmt: skip
    _check_batch(batch)
    where = _device(generator, device)
    return draw(batch, generator=generator, device=where, dtype=_widest(where))


def _place(u: Tensor, schedule: Schedule | Masked, low: float | None, high: float | None) -> Tensor:
    """u [B] in [0, 1) as times."""
    if not isinstance(schedule, Masked):
        _check_schedule(schedule)
    if isinstance(schedule, Betas):
        if low is not None or high is not None:
            raise ValueError("low and high are of continuous schedules; Betas draws from all its indices")
        count = len(schedule.betas)
        return (u * count).long().clamp(max=count - 1)
    start, end = 0.0 if low is None else float(low), schedule.t_max if high is None else float(high)
    if not 0 <= start < end <= schedule.t_max:
        raise ValueError(f"times need 0 <= low < high <= {schedule.t_max:g}, got {start!r} and {end!r}")
    return (start + (end - start) * u).float().clamp(max=end)


def _rounded(t: Tensor, schedule: Schedule) -> Tensor:
    return t.round().long() if isinstance(schedule, Betas) else t.float().clamp(max=schedule.t_max)


def _time_of_level(level: Tensor, schedule: Schedule) -> Tensor:
    """t [B] with ln(sigma / alpha) = level, from a table made on the host once."""
    _check_schedule(schedule)
    levels, at = _level_table(schedule, level.device, level.dtype)
    high = torch.searchsorted(levels, level.contiguous()).clamp(1, max(len(levels) - 1, 1)).clamp(max=len(levels) - 1)
    low = (high - 1).clamp(min=0)
    part = ((level - levels[low]) / (levels[high] - levels[low]).clamp(min=torch.finfo(level.dtype).tiny)).clamp(0, 1)
    out: Tensor = at[low] + part * (at[high] - at[low])
    return out


@traced_constant
def _level_table(schedule: Schedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ln(sigma / alpha), rising, and t there, as [2, N]; compiled code holds it as a constant."""
    table = schedule.__dict__.setdefault("_level_tables", {})
    if device not in table:
        if isinstance(schedule, Betas):
            t = np.arange(len(schedule.betas), dtype=np.float64)
        else:
            # even in level as well as in t: steep ends are resolved; endless ones as far as a time tells
            even = np.linspace(0.0, schedule.t_max, 4097)
            ends = [2.0 ** -np.arange(12, END, 0.25), 1 - 2.0 ** -np.arange(12, 50, 0.25)]
            infinite = np.isinf(schedule.logsnr(even[[0, -1]]))
            even = np.concatenate([even, *(schedule.t_max * v for v, far in zip(ends, infinite, strict=True) if far)])
            finite = -0.5 * schedule.logsnr(even)
            finite = finite[np.isfinite(finite)]
            t = schedule.t_of(-2 * np.linspace(finite.min(), finite.max(), 1 << 16))
            t = np.unique(np.clip(np.concatenate([even, t]), 0.0, schedule.t_max))
        at = -0.5 * schedule.logsnr(t)
        keep = np.isfinite(at)
        with lasting():
            at = np.maximum.accumulate(at[keep])  # rounding
            table[device] = torch.from_numpy(np.stack([at, t[keep]])).to(dtype).to(device)
    return table[device]
