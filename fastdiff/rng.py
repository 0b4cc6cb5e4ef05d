"""Reproducible normal noise: a pure function of (seed, stream, row, sample index, element within the sample).

Philox4x32-10 with key = the 64-bit seed and counter = (element // 4, row, stream, sample index); four normals each.
The integers equal those of the Triton kernels bit for bit, the normals within 2e-6.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastdiff import native
from fastdiff.lasting import lasting
from fastdiff.transforms import transformed

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
START, ROWS, CATEGORICAL = 0, 1, 2  # streams; 3: correctors, 4: likelihood probes
CHUNK = 1 << 15  # counters of one eager pass and thread: its temporaries stay in a core's cache

_scratch = threading.local()


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four uint32 words, held in int64, of a 128-bit counter and a 64-bit key.

    Args:    c0..c3, k0, k1: int64 tensors of uint32 values, broadcastable.   rounds: 10 is Random123's default.
    Returns: four int64 tensors of uint32 values.
    Numerics: int64 products wrap, so bits 32..63 are the high word; c1 and c3 keep surplus high bits until the end.
    Source:  Salmon et al. 2011, Random123.
    """
    for _ in range(rounds):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def box_muller(i0: Tensor, i1: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals (r sin a, r cos a) of two uint32 words.

        r = sqrt(-2 ln(i0 2^-32 + 2^-33)),  a = int32(i1) pi 2^-31

    Args:    i0, i1: int64 tensors of uint32 values.
    Returns: two fp32 tensors.
    Source:  Box and Muller 1958 with cuRAND's maps of the integers.
    """
    u = i0.to(torch.float32) * 2.0**-32 + 2.0**-33
    angle = i1.to(torch.int32).to(torch.float32) * (math.pi * 2.0**-31)
    r = torch.sqrt(-2.0 * torch.log(u))
    return r * torch.sin(angle), r * torch.cos(angle)


def normals(seeds: Tensor, index: Tensor, rows: Tensor, stream: int | Tensor, n: int) -> Tensor:
    """The noise of several rows and samples in one traceable expression (torch.compile makes it one loop).

    Args:    seeds, index: int64 [B].   rows: int64 [k].   n: elements.
             stream: 0 start, 1 plan rows, 2 categorical, or int64 [k], one a row.
    Returns: fp32 [k, B, n].
    """
    streams = stream.view(-1, 1, 1) if isinstance(stream, Tensor) else stream
    return _expression(seeds.view(1, -1, 1), index.view(1, -1, 1), rows.view(-1, 1, 1), streams, n)


def paired_normals(seeds: Tensor, index: Tensor, rows: Tensor, stream: int, n: int) -> Tensor:
    """`normals` with one row a sample: seeds, index, rows int64 [B] -> fp32 [B, n]."""
    return _expression(seeds.view(-1, 1), index.view(-1, 1), rows.view(-1, 1), stream, n)


def row_normals(seeds: Tensor, index: Tensor, row: Tensor, stream: int, n: int) -> Tensor:
    """The noise of one row [1] or one a sample [B], traceable: seeds, index int64 [B] -> fp32 [B, n]."""
    drawn = native.draw(seeds, index, row, stream, n)
    if drawn is not None:
        return drawn
    return (
        normals(seeds, index, row, stream, n)[0] if row.numel() == 1 else paired_normals(seeds, index, row, stream, n)
    )


def _expression(seeds: Tensor, index: Tensor, rows: Tensor, stream: int | Tensor, n: int) -> Tensor:
    counter = torch.arange((n + 3) // 4, device=seeds.device)
    c2 = stream if isinstance(stream, Tensor) else torch.full((), stream, dtype=torch.int64, device=seeds.device)
    words = philox(counter, rows, c2, index, seeds & MASK, seeds >> 32)
    lanes = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    # lanes apart, then interleaved: the compiler vectorises along the counter and is done in a fifth of the time
    return torch.stack(lanes, -2).transpose(-1, -2).flatten(-2)[..., :n]


def keys(
    seed: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    *,
    first: int = 0,
    batch: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The (seed, sample index) pairs of a batch.

        seed = s: (s, first), (s, first + 1), ...;  seeds = [a, b, ...]: (a, 0), (b, 0), ...

    Args:    seed: one seed for the batch.   seeds: one a sample.   first: index of the first sample (with `seed`).
             batch: number of samples B.
    Returns: seeds int64 [B], index int64 [B].
    Raises:  ValueError if both or neither are given, if len(seeds) != batch, or a number is out of range.
    """
    if (seed is None) == (seeds is None):
        raise ValueError("give either seed or seeds, got " + ("neither" if seed is None else "both"))
    if seed is not None:
        value = checked_seed(seed, first, batch)
        index = torch.arange(first, first + batch, dtype=torch.int64, device=device)
        return torch.full((batch,), value, dtype=torch.int64, device=device), index
    if first != 0:
        raise ValueError(f"first goes with seed=, not with seeds=; got first={first}")
    assert seeds is not None
    tensor = seed_tensor(seeds, device)
    if tensor.numel() != batch:
        raise ValueError(f"seeds must hold one seed a sample: got {tensor.numel()} for a batch of {batch}")
    return tensor, torch.zeros_like(tensor)


def checked_seed(seed: int, first: int, batch: int) -> int:
    """The seed as an int, it and the index of a batch's first sample inside their ranges."""
    if not 0 <= _whole("first", first) <= 2**32 - batch:
        raise ValueError(f"first must be in 0..2**32 - batch, got {first}")
    return _checked_seed(seed)


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    try:
        return value.__index__()
    except TypeError:  # a tensor of another kind
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def _checked_seed(seed: int) -> int:
    value = _whole("a seed", seed)
    if not 0 <= value < 2**63:
        raise ValueError(f"a seed must be in 0 .. 2**63 - 1, got {value}")
    return value


def seed_tensor(seeds: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Seeds as an int64 tensor [B]; Python ints are checked, a tensor is taken as it is (no host sync).

    Raises:  TypeError for another dtype or a bare number; ValueError for another shape or a number out of range.
    """
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64:
            raise TypeError(f"seeds must be an int64 tensor or a list of ints, got {seeds.dtype}")
        if seeds.dim() != 1:
            raise ValueError(f"seeds must have shape [B], got {tuple(seeds.shape)}")
        return seeds if device is None else seeds.to(device)
    if isinstance(seeds, (int, str, bytes)) or not hasattr(seeds, "__iter__"):
        raise TypeError(f"seeds must be a list of ints or an int64 tensor [B], got {type(seeds).__name__} {seeds!r}")
    return torch.tensor([_checked_seed(s) for s in seeds], dtype=torch.int64, device=device)


def normal(
    seeds: Sequence[int] | Tensor,
    sample_shape: Sequence[int],
    *,
    row: int | Tensor = 0,
    stream: int = ROWS,
    index: Sequence[int] | Tensor | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise of a batch of samples.

        n[b, e] = lane e % 4 of Philox(key = seeds[b], counter = (e // 4, row, stream, index[b]))

    Args:    seeds: B ints in 0 .. 2**63 - 1, or int64 [B].   sample_shape: shape of one sample.
             row: plan row, or int64 [k] for many rows in one call.   stream: 0 start, 1 plan rows, 2 categorical.
             index: sample index, int64 [B]; None is 0 each.   device: default that of `seeds`.   out: fp32 buffer.
    Returns: fp32 [B, *sample_shape], or [k, B, *sample_shape] for a tensor of rows.
    Raises:  TypeError or ValueError for seeds, index, rows, a shape or a buffer that do not fit.
    Numerics: independent of batch, position, device and chunking; integers exact, normals within 2e-6 between devices.
    """
    shape = tuple(int(s) for s in sample_shape)
    if any(s < 0 for s in shape):
        raise ValueError(f"sample_shape must not be negative, got {shape}")
    keyed = seed_tensor(seeds, device if device is not None else (out.device if out is not None else None))
    where = keyed.device
    batch = keyed.numel()
    if index is None:
        which = torch.zeros_like(keyed)
    else:
        if not isinstance(index, Tensor) and not all(isinstance(i, Integral) and 0 <= i <= MASK for i in index):
            raise ValueError(f"index must be integers in 0 .. 2**32 - 1, got {list(index)}")
        which = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64, device=where)
        which = which.to(where)
        if which.dtype != torch.int64 or which.shape != keyed.shape:
            raise ValueError(f"index must be int64 [{batch}], got {which.dtype} {tuple(which.shape)}")
    if isinstance(row, Tensor):
        if row.dtype not in (torch.int64, torch.int32) or row.dim() != 1:
            raise ValueError(f"row must be an int or an int64 tensor [k], got {row.dtype} {tuple(row.shape)}")
        rows = row.to(where, torch.int64)
        lead: tuple[int, ...] = (row.numel(), batch)
    else:
        if isinstance(row, bool) or not isinstance(row, Integral) or not 0 <= row <= MASK:
            raise ValueError(f"row must be an integer in 0 .. 2**32 - 1, got {row!r}")
        rows, lead = torch.full((1,), row, dtype=torch.int64, device=where), (batch,)
    if not 0 <= stream <= MASK:
        raise ValueError(f"stream must be in 0 .. 2**32 - 1, got {stream}")
    size, n = (*lead, *shape), math.prod(shape)
    if out is None and transformed():
        return normals(keyed, which, rows, stream, n).reshape(size)
    if out is None:
        out = torch.empty(size, dtype=torch.float32, device=where)
    elif out.dtype != torch.float32 or tuple(out.shape) != size or out.device != where or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous fp32 {size} on {where}, got {out.dtype} {tuple(out.shape)} on {out.device}"
            f"{'' if out.is_contiguous() else ', not contiguous'}"
        )
    fill(out.view(rows.numel(), batch, n), keyed, which, rows, stream)
    return out


def fill(out: Tensor, seeds: Tensor, index: Tensor, rows: Tensor, stream: int) -> None:
    """Writes `normals` into out, contiguous fp32 [k, B, n], unchecked: what `normal` does once it has looked."""
    if out.numel() == 0:
        return
    from fastdiff.ops._dispatch import kernels_for

    if transformed():
        out.copy_(normals(seeds, index, rows, stream, out.shape[-1]))
    elif kernels_for(out):
        torch.ops.fastdiff.normal(out, seeds, index, rows, stream)
    elif native.usable(out, seeds, index, rows):
        native.fill(out, seeds, index, stream, rows)
    else:
        _fill(out, seeds, index, rows, stream)


def _buffers(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reused temporaries [7, size] int64 (the last: 0, 1, ...) and [8, size] fp32: a loop allocates nothing a step."""
    cache = _scratch.__dict__.setdefault("cache", {})
    held = cache.get(device)
    if held is None or held[0].shape[1] < size:
        with lasting():
            ints = torch.empty((7, size), dtype=torch.int64, device=device)
            torch.arange(size, out=ints[6], device=device)
            held = cache[device] = (ints, torch.empty((8, size), dtype=torch.float32, device=device))
    return held


@torch.no_grad()
def _fill(out: Tensor, seeds: Tensor, index: Tensor, rows: Tensor, stream: int) -> None:
    """Writes `normals` into out [k, B, n] in passes of at most CHUNK counters a thread."""
    k, batch, n = out.shape
    quads = (n + 3) // 4
    pairs = k * batch
    k0 = (seeds & MASK).expand(k, batch).reshape(pairs, 1)
    k1 = (seeds >> 32).expand(k, batch).reshape(pairs, 1)
    c1 = rows.view(k, 1).expand(k, batch).reshape(pairs, 1)
    c3 = index.expand(k, batch).reshape(pairs, 1)
    flat = out.view(pairs, n)
    most = CHUNK * min(8, torch.get_num_threads())
    wide = min(quads, most)
    tall = max(1, min(pairs, most // wide))
    for p in range(0, pairs, tall):
        q = min(pairs, p + tall)
        for a in range(0, quads, wide):
            b = min(quads, a + wide)
            fill_chunk(flat[p:q, 4 * a : min(n, 4 * b)], a, b - a, c1[p:q], stream, c3[p:q], k0[p:q], k1[p:q])


def words_chunk(
    first: int, quads: int, c1: Tensor, stream: int, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of counters first .. first + quads - 1 of some pairs [pairs, 1], in buffers the next call reuses.

    Words 1 and 3 may carry bits above 32.
    """
    pairs = k0.shape[0]
    size = pairs * quads
    ints, _ = _buffers(size, k0.device)
    w = [ints[i, :size].view(pairs, quads) for i in range(6)]
    x0, x1, x2, x3, p0, p1 = w
    torch.add(ints[6, :quads], first, out=x0[0])
    x0[1:].copy_(x0[:1].expand(pairs - 1, quads))
    x1.copy_(c1.expand(pairs, quads))
    x2.fill_(stream)
    x3.copy_(c3.expand(pairs, quads))
    for _ in range(10):
        torch.mul(x0, M0, out=p0)
        torch.mul(x2, M1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=x0)
        x0.bitwise_xor_(x1).bitwise_xor_(k0).bitwise_and_(MASK)
        torch.bitwise_right_shift(p0, 32, out=x2)
        x2.bitwise_xor_(x3).bitwise_xor_(k1).bitwise_and_(MASK)
        x1, p1 = p1, x1
        x3, p0 = p0, x3
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x0, x1, x2, x3


def fill_chunk(
    out: Tensor, first: int, quads: int, c1: Tensor, stream: int, c3: Tensor, k0: Tensor, k1: Tensor
) -> None:
    """Philox and Box-Muller of counters first .. first + quads - 1 of some pairs, with no allocation of that size."""
    pairs = k0.shape[0]
    size = pairs * quads
    x0, x1, x2, x3 = words_chunk(first, quads, c1, stream, c3, k0, k1)
    _, floats = _buffers(size, out.device)
    r, angle, s = (floats[i, :size].view(pairs, quads) for i in range(3))
    whole = out.shape[1] == 4 * quads
    lanes = out.unflatten(1, (quads, 4)) if whole else floats[4:8].view(-1)[: 4 * size].view(pairs, quads, 4)
    signed = floats[3, :size].view(torch.int32).view(pairs, quads)
    for lane, (i0, i1) in enumerate(((x0, x1), (x2, x3))):
        r.copy_(i0).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
        angle.copy_(signed.copy_(i1)).mul_(math.pi * 2.0**-31)
        torch.mul(r, torch.sin(angle, out=s), out=lanes[..., 2 * lane])
        torch.mul(r, torch.cos(angle, out=s), out=lanes[..., 2 * lane + 1])
    if not whole:
        out.copy_(lanes.flatten(1)[:, : out.shape[1]])
