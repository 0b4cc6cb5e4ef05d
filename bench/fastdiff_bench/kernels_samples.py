"""The kernels that look at a whole sample, and the readout of bins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff_bench.textbook import compiled
from fastdiff_bench.timing import rotation
from fastdiff_bench.work import Column, Work, finish, gap, graded, randn, shape

__all__ = ["binned", "binned_mean", "gaussian_kl", "guide", "threshold"]

WEIGHT, RESCALE, QUANTILE = 5.0, 0.7, 0.995
BINS, FEW_BINS = 256, 32


def guide(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """Guidance that keeps a sample's deviation (rescale 0.7): reads two outputs, writes one."""

    def textbook(c: Tensor, u: Tensor) -> Tensor:
        c, u = c.float(), u.float()
        g = u + WEIGHT * (c - u)
        ratio = c.std(1, keepdim=True) / g.std(1, keepdim=True)
        return ((RESCALE * ratio + 1 - RESCALE) * g).to(dtype)

    def ours(c: Tensor, u: Tensor) -> Tensor:
        return ops.guide(c, u, WEIGHT, rule="rescale", rescale=RESCALE)

    return _elementwise("guide", schedule, elements, dtype, device, names, 2, textbook, ours)


def threshold(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """Dynamic thresholding at the 99.5 % quantile: reads x0, writes it clamped and scaled."""

    def textbook(x: Tensor) -> Tensor:
        rank = QUANTILE * (x.shape[1] - 1)  # torch.quantile sorts all, and refuses more than 2^24 numbers
        largest = x.float().abs().topk(x.shape[1] - int(rank), 1).values
        low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
        s = torch.lerp(low, high, rank - int(rank)).clamp(min=1)[:, None]
        return (x.float().clamp(-s, s) / s).to(dtype)

    return _elementwise("threshold", schedule, elements, dtype, device, names, 1, textbook,
                        lambda x: ops.threshold(x, QUANTILE))  # fmt: skip


def _elementwise(
    name: str, schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str],
    inputs: int, textbook: Callable[..., Tensor], ours: Callable[..., Tensor],
) -> Work:  # fmt: skip
    moved = (inputs + 1) * torch.finfo(dtype).bits // 8
    sets = [
        tuple(2 * randn(shape(elements), device, dtype, inputs * i + j) for j in range(inputs))
        for i in range(rotation(moved * elements, device))
    ]
    work = Work(name, schedule, elements, str(dtype), moved, sets, {})
    work.differs["fastdiff eager"] = gap(ours(*sets[0]), textbook(*sets[0]))
    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    return finish(work, names, found, ours, device, compiles=True)


def gaussian_kl(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """KL of two Gaussians and its gradient to the second: reads two means and log-variances, writes two gradients."""
    size = torch.finfo(dtype).bits // 8

    def buffers(i: int) -> tuple[Tensor, ...]:
        m1, l1, m2, l2 = (randn(shape(elements), device, dtype, 4 * i + j) for j in range(4))
        return m1, l1, m2.requires_grad_(), l2.requires_grad_()

    sets = [buffers(i) for i in range(rotation(6 * size * elements, device))]
    work = Work("gaussian_kl", schedule, elements, str(dtype), 6 * size, sets, {})

    def textbook(m1: Tensor, l1: Tensor, m2: Tensor, l2: Tensor) -> Tensor:
        m1, l1, m2, l2 = (v.float() for v in (m1, l1, m2, l2))
        return (0.5 * (l2 - l1 - 1 + torch.exp(l1 - l2) + (m1 - m2) ** 2 * torch.exp(-l2))).mean()

    def ours(*values: Tensor) -> Tensor:
        return ops.gaussian_kl(*values).mean()

    got, want = (graded(f, 2, 3)(*sets[0]) for f in (ours, textbook))
    assert isinstance(got, tuple) and isinstance(want, tuple)
    work.differs["fastdiff eager"] = max(gap(a, b) for a, b in zip(got, want, strict=True))
    found = {"torch": graded(textbook, 2, 3), "torch.compile": graded(compiled(textbook, elements), 2, 3)}
    return finish(work, names, found, graded(ours, 2, 3), device, compiles=True)


def binned(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """One of 256 bins drawn from a Gaussian per element: reads x and the output's two numbers, writes the bin."""

    def textbook(mean: Tensor, std: Tensor) -> Tensor:
        v = mean + std * torch.randn_like(mean)
        return (2 * torch.floor((v + 1) * (BINS / 2)).clamp(0, BINS - 1) + 1) / BINS - 1

    def settled(mean: Tensor, std: Tensor) -> Tensor:
        return (2 * torch.floor((mean + 1) * (BINS / 2)).clamp(0, BINS - 1) + 1) / BINS - 1

    return _readout("binned", schedule, elements, dtype, device, names, BINS, textbook, settled)


def binned_mean(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """The mean of 32 bins under a Gaussian per element: reads x and the output's two numbers, writes the mean."""

    def textbook(mean: Tensor, std: Tensor) -> Tensor:
        total = torch.zeros_like(mean)
        for j in range(1, FEW_BINS):
            total = total + torch.special.ndtr((2 * j / FEW_BINS - 1 - mean) / std)
        return 1 - 1 / FEW_BINS - (2 / FEW_BINS) * total

    return _readout("binned_mean", schedule, elements, dtype, device, names, FEW_BINS, textbook, None)


def _readout(
    name: str, schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], bins: int,
    readout: Callable[[Tensor, Tensor], Tensor], settled: Callable[[Tensor, Tensor], Tensor] | None,
) -> Work:  # fmt: skip
    """settled: what a sampled readout gives where there is no noise."""
    batch, n = shape(elements)
    coef, row = torch.tensor([[0.5, -0.6]], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    seeds = torch.arange(batch, device=device)
    moved = 8 + 2 * torch.finfo(dtype).bits // 8
    sets = [
        (randn((batch, 1, n), device, torch.float32, 2 * i), 0.5 * randn((batch, 2, n), device, dtype, 2 * i + 1))
        for i in range(rotation(moved * elements, device))
    ]
    work = Work(name, schedule, elements, str(dtype), moved, sets, {})

    def of_output(x: Tensor, m: Tensor, readout: Callable[[Tensor, Tensor], Tensor] = readout) -> Tensor:
        m0, m1 = m.float().chunk(2, 1)
        return readout(0.5 * x - 0.6 * m0, 0.6 * m1.exp())

    def ours(x: Tensor, m: Tensor, **noise: Any) -> Tensor:  # noqa: ANN401
        drawn = noise or {"seeds": seeds}
        given = {"readout": "mean"} if settled is None else {"readout": "sample", **drawn}
        return ops.binned_readout(x, m, coef, row, bins=bins, **given)

    x, m = sets[0]
    want = of_output(x, m) if settled is None else of_output(x, m, settled)
    got = ours(x, m, noise=torch.zeros_like(x))
    # a sampled bin may be the next one where a mean is on its edge: one in 1e5
    off = (got - want).abs() > 2e-5
    work.differs["fastdiff eager"] = gap(got.masked_fill(off, 0), want.masked_fill(off, 0)) + float(off.float().mean())
    found: dict[str, Column] = {"torch": of_output, "torch.compile": compiled(of_output, elements)}
    return finish(work, names, found, ours, device, compiles=True)
