"""The binned output distribution of discretised data: a Gaussian per element, read out as bins of [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import native, rng
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._dispatch import FLOATS, FLOATS64, INTS, check_batched, check_tensor, spread
from fastdiff.ops._log_ndtr import log_ndtr

MODES = ("sample", "mean")
CHUNK = 1 << 20  # elements x bins of one eager pass over the edges
LARGEST = 1 << 21  # bins whose numbers the C++ loop rounds


def binned_readout(
    x: Tensor,
    model_out: Tensor,
    coef: Tensor,
    row: Tensor,
    *,
    bins: int,
    readout: str = "sample",
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    stream: int = rng.CATEGORICAL,
    noise: Tensor | None = None,
) -> Tensor:
    """Reads the prediction of a row out of a mean and a log-std per element.

        mean = c_skip x + c_out m0,   std = |c_out| exp(m1)
        sample: the centre of the bin that mean + std n falls into, n = rng.normal(seeds, sample, row=row, stream=2)
        mean:   sum_j c_j P_j,   P_j = the Gaussian's mass in bin j

    Bin j of K has centre c_j = (2j + 1)/K - 1 and width 2/K; the outer bins take the tails.
    Args:
        x: state [B, *sample], fp32 (float64 in plain torch).   model_out: [B, 2 C, *] for a sample [C, *]: m0, then m1;
            fp32, bf16 or fp16.   coef: [N, 2], c_skip and c_out of every row.   row: int, [1] or [B], on the device.
        bins: K >= 2.   readout: "sample" or "mean".   seeds, index: int64 [B], or noise: n itself, for "sample".
    Returns: p [B, *sample] of x's dtype; NaN where mean or std is.
    Raises:  TypeError, ValueError: a wrong shape, dtype or device, bins < 2, an unknown readout, sample without noise.
    Numerics: fp32; a sampled bin may differ from float64's where mean + std n is within 1e-6 of an edge. The mean is
        within 1e-6 and (edges are fp32 numbers too) 1e-7 / std bins, and takes the same time for any K: the sum over
        many edges is made of its ends (Euler, Maclaurin).
    Source:  Graves et al. 2023, arXiv:2308.07037, eq. 107-112.
    """
    _check(x, model_out, coef, row, bins, readout, seeds, index, noise)
    sampled, plain = readout == "sample", x.dtype == torch.float64 or not x.numel()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if not plain and _dispatch.kernels_for(x):
        torch.ops.fastdiff.binned(x, model_out, coef, row, bins, sampled, seeds, index, stream, noise, out)
    elif plain or not _on_cpu(x, model_out, coef, row, bins, sampled, seeds, index, stream, noise, out):
        return binned_readout_ref(
            x, model_out, coef, row, bins=bins, readout=readout, seeds=seeds, index=index, stream=stream, noise=noise
        )
    return out


def _on_cpu(
    x: Tensor, model_out: Tensor, coef: Tensor, row: Tensor, bins: int, sampled: bool, seeds: Tensor | None,
    index: Tensor | None, stream: int, noise: Tensor | None, out: Tensor,
) -> bool:  # fmt: skip
    """Writes the readout by the C++ loop; False where it cannot run."""
    given = (x, model_out, coef, row, *(v for v in (seeds, index, noise) if v is not None))
    wide = torch.float64 in (model_out.dtype, coef.dtype) or bins > LARGEST
    if _dispatch.graded(*given) or wide or not _fused.wanted(*given):
        return False
    if sampled and noise is None:
        noise = _drawn(seeds, index, row, stream, x)
    n = None if noise is None else noise.float().contiguous()
    x, model_out, coef = x.contiguous(), model_out.contiguous(), coef[row.long()]  # which looks at the row
    options = *native.types(model_out), row.numel() > 1, bins, *native.layout(x, heavy=True)
    return native.run("binned", "binned", x, model_out, coef, n, out, *options)


def _drawn(seeds: Tensor | None, index: Tensor | None, row: Tensor, stream: int, x: Tensor) -> Tensor:
    assert seeds is not None
    index = torch.zeros_like(seeds) if index is None else index
    return rng.row_normals(seeds, index, row.long(), stream, x.shape[1:].numel()).view_as(x)


def binned_readout_ref(
    x: Tensor,
    model_out: Tensor,
    coef: Tensor,
    row: Tensor,
    *,
    bins: int,
    readout: str = "sample",
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    stream: int = rng.CATEGORICAL,
    noise: Tensor | None = None,
) -> Tensor:
    """`binned_readout` in plain torch, in x's dtype."""
    c_skip, c_out = (spread(c, x) for c in coef.to(x.dtype)[row.long()].unbind(1))
    m0, m1 = model_out.to(x.dtype).chunk(2, 1)
    mean, std = c_skip * x + c_out * m0, c_out.abs() * torch.exp(m1)
    if readout == "mean":
        return bin_mean(mean, std, bins)
    if noise is None:
        noise = _drawn(seeds, index, row, stream, x)
    return bin_of(mean + std * noise.to(x.dtype), bins)


def bin_of(v: Tensor, bins: int) -> Tensor:
    """The centre of the bin that v falls into, the outer ones taking everything beyond."""
    return (2 * torch.floor((v + 1) * (bins / 2)).clamp(0, bins - 1) + 1) / bins - 1


def smallest(std: Tensor) -> Tensor:
    """std, at least 4e-12 (float64: 5e-93): (edge - mean)^2 / std^2 and its gradient, one std^-1 more, stay numbers."""
    return std.clamp(min=torch.finfo(std.dtype).tiny ** 0.3)


def bin_mean(mean: Tensor, std: Tensor, bins: int) -> Tensor:
    """The mean bin centre of N(mean, std^2): 1 - 1/K - (2/K) sum over the inner edges e of Phi((e - mean)/std).

    Args: mean, std: [B, *]. Numerics: the order of a sample's sums depends on its size and the bins alone; `smallest`.
    """
    std = smallest(std)
    group = min(bins, max(1, CHUNK // max(1, mean.shape[1:].numel())))  # edges of a pass
    rows = max(1, CHUNK // (group * max(1, mean.shape[1:].numel())))  # and samples
    parts = [_bin_mean(m, s, bins, group) for m, s in zip(mean.split(rows), std.split(rows), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bin_mean(mean: Tensor, std: Tensor, bins: int, group: int) -> Tensor:
    total = torch.zeros_like(mean)
    for first in range(1, bins, group):
        j = torch.arange(first, min(first + group, bins), device=mean.device, dtype=mean.dtype)
        edges = 2 * j / bins - 1
        total = total + torch.special.ndtr((edges - mean[..., None]) / std[..., None]).sum(-1)
    return 1 - 1 / bins - (2 / bins) * total


def bin_log_probability(mean: Tensor, std: Tensor, k: Tensor, bins: int) -> Tensor:
    """ln P(bin k) of N(mean, std^2), the tails with the outer bins; differentiable far from the bin too.

    Args: mean, std: [*]. k: int64 [*], 0..K-1. Numerics: from log_ndtr on the side where it is small, so that a bin 20
        std away keeps its value and its gradient; `smallest`. The mass of a bin is a difference of two: of an inner one
        of K to 1.5e-7 K std (float64: 2e-16), relative.
    """
    std = smallest(std)
    edge = 2 * k.to(mean.dtype) / bins - 1
    low, high = (edge - mean) / std, (edge + 2 / bins - mean) / std
    flip = (low + high) > 0  # work in the lower tail
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    first = torch.where(flip, k == bins - 1, k == 0)  # nothing below a
    last = torch.where(flip, k == 0, k == bins - 1)  # nothing above b
    upper = log_ndtr(torch.where(last, 0.0, b))
    upper = torch.where(last, 0.0, upper)
    lower = log_ndtr(torch.where(first, 0.0, a))
    gap = torch.where(first | torch.isneginf(upper), -1.0, lower - upper)
    tiny = -torch.finfo(mean.dtype).tiny
    inner = upper + torch.log(-torch.expm1(gap.clamp(max=tiny)))
    return torch.where(first, upper, inner)


def _check(
    x: Tensor, model_out: Tensor, coef: Tensor, row: Tensor, bins: int, readout: str, seeds: Tensor | None,
    index: Tensor | None, noise: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("x", x, dtypes=(torch.float32, torch.float64), contiguous=False)
    batch, _ = check_batched("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, *], got {tuple(x.shape)}")
    check_tensor("model_out", model_out, shape=(batch, 2 * x.shape[1], *x.shape[2:]), dtypes=FLOATS64, like=x)
    check_tensor("coef", coef, dtypes=(torch.float32, torch.float64), like=x)
    if coef.dim() != 2 or coef.shape[1] != 2:
        raise ValueError(f"coef must be [N, 2], c_skip and c_out of every row, got {tuple(coef.shape)}")
    check_tensor("row", row, dtypes=INTS, like=x)
    if tuple(row.shape) not in ((1,), (batch,)):
        raise ValueError(f"row must have shape (1,) or ({batch},), got {tuple(row.shape)}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be an integer >= 2, got {bins!r}")
    if readout not in MODES:
        raise ValueError(f"unknown readout {readout!r}; valid: {', '.join(MODES)}")
    if (seeds is None) == (noise is None) if readout == "sample" else (seeds is not None or noise is not None):
        need = "needs seeds or noise, one of them" if readout == "sample" else "draws nothing: no seeds, no noise"
        raise ValueError(f"readout {readout!r} {need}")
    if index is not None and seeds is None:
        raise ValueError("index goes with seeds, which is None")
    for name, value in (("seeds", seeds), ("index", index)):
        if value is not None:
            check_tensor(name, value, shape=(batch,), dtypes=(torch.int64,), like=x)
    if noise is not None:
        check_tensor("noise", noise, shape=x.shape, dtypes=FLOATS, like=x)


def _launch(
    x: Tensor, model_out: Tensor, coef: Tensor, row: Tensor, bins: int, sampled: bool, seeds: Tensor | None,
    index: Tensor | None, stream: int, noise: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    batch, n = x.shape[0], x.shape[1:].numel()
    if seeds is not None and index is None:
        index = torch.zeros_like(seeds)
    given = (noise, seeds, index)
    args = (
        x.contiguous(), model_out.contiguous(), coef.float().contiguous(), row.contiguous(),
        *(None if v is None else v.contiguous() for v in given), out, n, _dispatch.FIRST, int(row.numel() > 1), stream,
        bins, 2.0 / bins,
    )  # fmt: skip
    # the mean works on many numbers of an element at a time, as a step on many slots does
    slots = 1 if sampled else 3
    _dispatch.launch(_dispatch.kernels("binned").binned_kernel, args, n, batch, slots=slots, SAMPLED=sampled)


_dispatch.register(
    "binned(Tensor x, Tensor model_out, Tensor coef, Tensor row, int bins, bool sampled, Tensor? seeds, Tensor? index, "
    "int stream, Tensor? noise, Tensor(a!) out) -> ()",
    _launch,
)
