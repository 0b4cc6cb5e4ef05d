"""The loop of k-diffusion's samplers over noise levels: rows, callbacks, and who draws the noise when."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.integrations.brownian import BrownianTreeNoiseSampler
from fastdiff.integrations.rows import History, HostRow, rows_of
from fastdiff.plan import Plan

__all__ = ["Loop", "Maker", "checked", "churned", "philox"]

Maker = Callable[[np.ndarray], Plan]
Draw = Callable[[int, int], Tensor | None]  # (step, stage) -> the normals of that row
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_CHURN = 2**0.5 - 1
CACHED = 64
_seeds: ContextVar[int | Sequence[int] | None] = ContextVar("fastdiff_k_diffusion_seeds", default=None)
_tables: OrderedDict[Any, _Table] = OrderedDict()


@contextmanager
def philox(seed: int | Sequence[int] = 0) -> Iterator[None]:
    """Inside, samplers that were given no noise_sampler draw Philox noise: the same whatever the batch.

    Args: seed: samples are (seed, 0), (seed, 1), ...; or one seed a sample.
    """
    token = _seeds.set(seed)
    try:
        yield
    finally:
        _seeds.reset(token)


def checked(sigmas: Tensor) -> np.ndarray:
    """sigmas [n + 1] on the host in float64: the one time they are read.

    Raises: TypeError, ValueError: no tensor [n], not finite, negative, rising or repeated.
    """
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas must be a torch.Tensor, got {type(sigmas).__name__}")
    if sigmas.dim() != 1:
        raise ValueError(f"sigmas must be [n + 1], got shape {tuple(sigmas.shape)}")
    v = sigmas.detach().cpu().double().numpy()
    if not np.all(np.isfinite(v)) or np.any(v < 0):
        raise ValueError(f"sigmas must be finite and not negative, got {v.tolist()}")
    if np.any(np.diff(v) >= 0):
        raise ValueError(f"sigmas must decrease from one to the next, got {v.tolist()}")
    return v


class _Table(NamedTuple):
    """Rows and what the model is told in them; places: of the history."""

    rows: list[HostRow]
    times: np.ndarray
    places: int
    shares: np.ndarray  # [N, 2] of what slot 1 of the row before holds and of the row's own: two increments of a path


def _table(make: Maker, key: Any, sigmas: np.ndarray, hat: np.ndarray | None) -> _Table:
    """The rows of a sampler, cached. hat: [n] where a step begins above its sigma; then each step is its own plan."""
    key = (key, sigmas.tobytes(), None if hat is None else hat.tobytes())
    found = _tables.get(key)
    if found is None:
        if hat is None:
            plans = [make(sigmas)]
        else:
            plans = [make(np.array(ends)) for ends in zip(hat, sigmas[1:], strict=True)]
        rows = [row for plan in plans for row in rows_of(plan)]
        shares = np.concatenate([_shares(plan) for plan in plans])
        times = np.concatenate([plan.times for plan in plans])
        found = _tables[key] = _Table(rows, times, max(p.allocate().physical for p in plans) - 1, shares)
        while len(_tables) > CACHED:
            _tables.popitem(last=False)
    return found


def _shares(plan: Plan) -> np.ndarray:
    """[N, 2] the noise that the row before left in slot 1, and each row's own, of their sum's deviation."""
    shares = np.tile([0.0, 1.0], (plan.nfe, 1))
    if plan.slots > 1:
        before, now = plan.s[:-1, 1], plan.s[1:, 0]
        size = np.hypot(before, now)
        drawn = now > 0
        shares[1:][drawn] = np.stack([before, now], 1)[drawn] / size[drawn, None]
    return shares


def _stages(times: np.ndarray, levels: np.ndarray, wanted: list[int]) -> list[int]:
    """Model calls a step: as wanted, but one where a step to all of its noise leaves nothing to do from its middle."""
    if len(times) == sum(wanted):
        return wanted
    starts = [int(np.argmin(np.abs(times - level))) for level in levels[: len(wanted)]]
    return np.diff([*starts, len(times)]).tolist()


class Loop:
    """One call of a sampler: `stages` model calls a step, one in a step that ends clean."""

    def __init__(
        self, make: Maker, stages: int, levels: np.ndarray, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
        extra: Mapping[str, Any] | None, *, hat: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        self.model, self.sigmas, self.levels, self.extra = model, sigmas, levels, dict(extra or {})
        self.x, self.steps, self.hat = x, max(len(levels) - 1, 0), hat
        self.stages = [stages if end > 0 else 1 for end in levels[1:]]
        self.compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.steps:
            self.table = _table(make, _key(make), levels, hat)
            self.stages = _stages(self.table.times, levels, self.stages)

    def run(self, callback: Callable[[dict[str, Any]], Any] | None, disable: bool | None, draw: Draw | None = None,
            before: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
        """The sample. before: what changes x before the first model call of a step."""
        from tqdm.auto import trange

        x = self.x
        if not self.steps:
            return x
        with torch.no_grad():
            state = x.to(self.compute)
            history, k = History(self.table.places), 0
            told = torch.from_numpy(self.table.times).to(x.device, self.sigmas.dtype)
            sigma_of = (told[:, None] * x.new_ones([x.shape[0]])).to(x.dtype).unbind(0)  # 0-d times [B] is [B]'s dtype
            for i in trange(self.steps, disable=disable):
                if before is not None:
                    state = before(i, state)
                for stage in range(self.stages[i]):
                    seen = state if x.dtype is self.compute else state.to(x.dtype)
                    m = self.model(seen, sigma_of[k], **self.extra)
                    if m.shape != x.shape:
                        raise ValueError(f"the model must return x's shape {tuple(x.shape)}, got {tuple(m.shape)}")
                    if stage == 0 and callback is not None:
                        sigma = self.sigmas[i]
                        hat = sigma if self.hat is None else sigma * (self.hat[i] / self.levels[i])
                        callback({"x": seen, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": m})
                        state = seen if x.dtype is self.compute else seen.to(self.compute)  # it may have changed x
                    row = self.table.rows[k]
                    n = None if draw is None else draw(i, stage)
                    if n is not None:
                        n = n.to(self.compute)
                    state, _ = history.step(row, state, m.to(self.compute), n)
                    k += 1
            return state.to(x.dtype)

    def once(self, noise_sampler: Callable[..., Tensor] | None, *, tree: bool = False, used: bool = True) -> Draw:
        """One draw a step, after its last model call, where the next sigma is not 0."""
        noise = self._source(noise_sampler, tree)

        def draw(i: int, stage: int) -> Tensor | None:
            if not used or stage + 1 < self.stages[i] or self.levels[i + 1] == 0:
                return None
            return noise(self.sigmas[i], self.sigmas[i + 1])

        return draw

    def each(self, noise_sampler: Callable[..., Tensor] | None, *, used: bool = True) -> Draw:
        """One draw a model call, between the levels of its row and the next."""
        if noise_sampler is None and _seeds.get() is not None:
            return self._philox(lambda i, stage: used and self.levels[i + 1] > 0)
        noise, told = self._source(noise_sampler, False), np.append(self.table.times, self.levels[-1])

        def draw(i: int, stage: int) -> Tensor | None:
            if not used or self.levels[i + 1] == 0:
                return None
            k = sum(self.stages[:i]) + stage
            a, b = (
                torch.as_tensor(float(v), dtype=self.sigmas.dtype, device=self.sigmas.device) for v in told[k : k + 2]
            )
            return noise(a, b)

        return draw

    def twice(
        self, noise_sampler: Callable[..., Tensor] | None, r: float, *, flow: bool = False, exact: bool = False
    ) -> Draw:
        """A draw to the middle and one over the whole step, w and w': the second row's is (w' - q w) / sqrt(1 - q^2).

        Philox draws are independent, as the rows want them. The levels are rounded as k-diffusion rounds them: a
        Brownian tree answers the last digit.
        """
        if noise_sampler is None and _seeds.get() is not None:
            return self._philox(lambda i, stage: self.levels[i + 1] > 0)
        noise = self._source(noise_sampler, True)
        first: list[Tensor] = []
        lam = (self.sigmas.logit() if flow else self.sigmas.log()).neg()
        middle = lam[:-1] + lam.diff() * r
        middle = middle.neg().sigmoid() if flow else middle.neg().exp()
        level = self.sigmas if exact else lam.neg().exp()

        def draw(i: int, stage: int) -> Tensor | None:
            if self.levels[i + 1] == 0:
                return None
            at = sum(self.stages[:i])
            if stage == 0:
                first[:] = [noise(level[i], middle[i]).clone()]  # its buffer may serve the next draw too
                return first[0]
            (q, own), w = self.table.shares[at + 1].tolist(), noise(level[i], level[i + 1])
            return (w - q * first[0]) / own

        return draw

    def _source(self, noise_sampler: Callable[..., Tensor] | None, tree: bool) -> Callable[..., Tensor]:
        """What draws: the given sampler, Philox inside `philox`, else what k-diffusion would use."""
        if noise_sampler is not None:
            return noise_sampler
        if _seeds.get() is not None:
            drawn = self._philox(lambda i, stage: True)
            order = iter(range(self.steps))
            return lambda a, b: drawn(next(order), 0)  # type: ignore[return-value]
        if tree and self.steps:
            positive = self.sigmas[: int((self.levels > 0).sum())]
            return BrownianTreeNoiseSampler(self.x, positive[-1], positive[0])
        return lambda a, b: torch.randn_like(self.x)

    def _philox(self, wanted: Callable[[int, int], bool]) -> Draw:
        given = _seeds.get()
        batch, device = self.x.shape[0], self.x.device
        if isinstance(given, Sequence):
            seeds, index = rng.keys(None, given, first=0, batch=batch, device=device)
        else:
            seeds, index = rng.keys(given, None, first=0, batch=batch, device=device)

        def draw(i: int, stage: int) -> Tensor | None:
            if not wanted(i, stage):
                return None
            row = sum(self.stages[:i]) + stage
            return rng.normal(seeds, self.x.shape[1:], row=row, stream=rng.ROWS, index=index)

        return draw


def churned(
    make: Maker, stages: int, hat: tuple[np.ndarray, float, float, float], s_noise: float,
    model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra: Mapping[str, Any] | None,
    callback: Callable[[dict[str, Any]], Any] | None, disable: bool | None,
) -> Tensor:  # fmt: skip
    """A sampler that lifts x to sigma_hat = (1 + gamma) sigma before a step, and draws for it in every step."""
    levels, s_churn, s_tmin, s_tmax = hat
    n = len(levels) - 1
    gamma = min(s_churn / n, MOST_CHURN) if n > 0 else 0.0
    inside = (levels[:-1] >= s_tmin) & (levels[:-1] <= s_tmax)
    lifted = np.where(inside & (gamma > 0), levels[:-1] * (1 + gamma), levels[:-1])
    loop = Loop(make, stages, levels, model, x, sigmas, extra, hat=lifted if np.any(lifted > levels[:-1]) else None)
    draw = None if _seeds.get() is None else loop._philox(lambda i, stage: True)
    size = s_noise * np.sqrt(np.maximum(lifted**2 - levels[:-1] ** 2, 0.0))

    def before(i: int, state: Tensor) -> Tensor:
        if draw is not None:
            eps = draw(i, 0) if size[i] else None
        else:
            eps = torch.randn_like(x)  # in every step, used or not
        return state if eps is None or not size[i] else torch.add(state, eps, alpha=float(size[i]))

    return loop.run(callback, disable, None, before)


def _key(make: Maker) -> Any:
    """What a maker depends on besides sigmas."""
    values = [cell.cell_contents for cell in make.__closure__ or ()]
    return tuple(tuple(sorted(v.items())) if isinstance(v, dict) else v for v in values)
