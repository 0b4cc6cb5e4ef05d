"""Noise: known answers, one stream on every path, and the statistics of a normal."""

import math

import pytest
import torch

from fastdiff import ops, rng

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastdiff_kernels.philox import philox, philox_sample, sample_key  # noqa: E402 - needs triton

MASK = 0xFFFFFFFF
# Random123's known answers for philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = torch.tensor([0, 1, 2**32 + 17, 2**63 - 1])
INDEX = torch.tensor([0, 3, 2**31, 7])
TOLERANCE = 2e-6


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_known_answers(counter, key, want):
    got = rng.philox(*(torch.tensor(c) for c in counter), *(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in got) == want


@triton.jit
def integers_kernel(words_ptr, out_ptr, N: tl.constexpr, SPLIT: tl.constexpr):
    """Stores the four Philox words of each counter; words_ptr holds N counters, row, stream, index and the seed."""
    counter = tl.load(words_ptr + tl.arange(0, N)).to(tl.uint32)
    row = tl.load(words_ptr + N)
    stream = tl.load(words_ptr + N + 1)
    index = tl.load(words_ptr + N + 2)
    seed = tl.load(words_ptr + N + 3)
    if SPLIT:
        w = philox_sample(counter, sample_key(row, stream, index, seed))
    else:
        k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        w = philox(counter, row.to(tl.uint32), stream.to(tl.uint32), index.to(tl.uint32), k0, k1, 10)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * N + tl.arange(0, N), w[i].to(tl.int64))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", [*range(len(KNOWN)), "random"])
def test_kernel_integers(case, split, kernel_device):
    size = 64
    if case == "random":
        generator = torch.Generator().manual_seed(5)
        counter = torch.randint(0, 2**32, (size,), generator=generator)
        c1, c2, c3, k0, k1 = torch.randint(0, 2**32, (5,), generator=generator).tolist()
    else:
        (c0, c1, c2, c3), (k0, k1), _ = KNOWN[case]
        counter = torch.full((size,), c0)
    seed = k0 | k1 << 32
    seed = seed - 2**64 if seed >= 2**63 else seed
    words = torch.cat([counter, torch.tensor([c1, c2, c3, seed])]).to(kernel_device)
    out = torch.empty(4, size, dtype=torch.int64, device=kernel_device)
    integers_kernel[(1,)](words, out, N=size, SPLIT=split)
    want = torch.stack(rng.philox(counter, *(torch.tensor(v) for v in (c1, c2, c3, k0, k1))))
    assert torch.equal(out.cpu(), want)
    if case != "random":
        assert tuple(out[:, 0].tolist()) == KNOWN[case][2]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 19, 7), (3, 1003), (64, 64)])
def test_kernel_normals_equal_torch(shape, kernel_device):
    got = rng.normal(SEEDS.to(kernel_device), shape, row=11, stream=1, index=INDEX.to(kernel_device))
    want = rng.normals(SEEDS, INDEX, torch.tensor([11]), 1, math.prod(shape)).view(len(SEEDS), *shape)
    assert got.shape == (len(SEEDS), *shape)
    assert (got.cpu() - want).abs().max() <= TOLERANCE


def test_kernel_rows_and_out(kernel_device):
    rows = torch.tensor([3, 0, 2**32 - 1])
    out = torch.full((3, 4, 5, 2), math.nan, device=kernel_device)
    got = rng.normal(SEEDS.to(kernel_device), (5, 2), row=rows.to(kernel_device), out=out)
    assert got is out
    want = rng.normals(SEEDS, torch.zeros_like(SEEDS), rows, 1, 10).view(3, 4, 5, 2)
    assert (got.cpu() - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("block", [128, 512, 2048])
def test_block_size_does_not_change_noise(block, kernel_device, monkeypatch):
    """Every tile shape gives the same bits."""
    n, seeds = 4099, SEEDS[:2].to(kernel_device)
    want = rng.normal(seeds, (n,))
    tile = {"BLOCK": block, "PARTS": 2 if block > 512 else 1, "num_warps": 1 if block == 128 else 4}
    monkeypatch.setattr(ops._dispatch, "tiling", lambda n, batch, **_: dict(tile))
    assert torch.equal(rng.normal(seeds, (n,)), want)


@pytest.mark.parametrize("n", [1, 6, 4096, 2 * 4 * rng.CHUNK + 5])
def test_chunks_equal_the_expression(n):
    """Eager torch in passes, bit for bit the one traceable expression."""
    rows = torch.tensor([0, 9])
    batch = SEEDS if n < 10_000 else SEEDS[2:3]
    index = INDEX[: len(batch)]
    got = torch.empty(2, len(batch), n)
    rng._fill(got, batch, index, rows, 1)
    assert torch.equal(got, rng.normals(batch, index, rows, 1, n))


def test_element_is_lane_of_counter():
    """Element e of row, stream, index is lane e % 4 of counter e // 4, by the definition written out."""
    seed, row, stream, index, e = 2**40 + 3, 6, 2, 9, 13
    words = rng.philox(*(torch.tensor(v) for v in (e // 4, row, stream, index, seed & MASK, seed >> 32)))
    i0, i1 = (int(w) for w in words[2 * (e % 4 // 2) : 2 * (e % 4 // 2) + 2])
    angle = (i1 - 2**32 if i1 >= 2**31 else i1) * math.pi * 2**-31
    want = math.sqrt(-2 * math.log(i0 * 2**-32 + 2**-33)) * (math.cos(angle) if e % 2 else math.sin(angle))
    got = rng.normal([seed], (20,), row=row, stream=stream, index=[index])[0, e]
    assert abs(float(got) - want) <= TOLERANCE


def test_batch_invariance(device):
    """A sample is the same bits alone, in a batch of 7 or 64, and in any order."""
    seeds = (torch.arange(64) * 7919 + 5).to(device)
    whole = rng.normal(seeds, (33,), row=4)
    assert torch.equal(rng.normal(seeds[:7], (33,), row=4), whole[:7])
    assert torch.equal(rng.normal(seeds[5:6], (33,), row=4), whole[5:6])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(rng.normal(seeds[order], (33,), row=4), whole[order])
    assert torch.equal(rng.normal(seeds.tolist(), (33,), row=4, device=device), whole)


def test_streams_rows_and_samples_differ():
    base = rng.normal([5], (64,))
    for other in (
        rng.normal([6], (64,)),
        rng.normal([5], (64,), row=1),
        rng.normal([5], (64,), stream=0),
        rng.normal([5], (64,), index=[1]),
    ):
        assert not torch.isclose(base, other).any()


def test_normals_are_normal():
    """Moments, tails and Kolmogorov-Smirnov on 2^20 values; the bounds are 5 standard errors."""
    stats = pytest.importorskip("scipy.stats")
    n = 1 << 20
    z = rng.normal([42], (n,))[0].double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert 4.5 < z.abs().max() <= math.sqrt(2 * 33 * math.log(2)) + 1e-6


def test_compiled_expression():
    """make_fx sees no Python data dependence: other seeds and rows go through the same graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda s, i, r: rng.normals(s, i, r, 1, 10))(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    args = (SEEDS[2:3], INDEX[1:2], torch.tensor([8]))
    assert torch.equal(graph(*args), rng.normals(*args, 1, 10))


def test_keys():
    assert rng.keys(seed=5, first=2**32 - 2, batch=2)[1].tolist() == [2**32 - 2, 2**32 - 1]  # the last one of all
    seeds, index = rng.keys(seed=5, first=3, batch=4)
    assert seeds.tolist() == [5] * 4 and index.tolist() == [3, 4, 5, 6]
    seeds, index = rng.keys(seeds=[5, 8], batch=2)
    assert seeds.tolist() == [5, 8] and index.tolist() == [0, 0]
    assert torch.equal(rng.normal(*rng.keys(seed=5, batch=1)[:1], (8,)), rng.normal([5], (8,)))
    for kwargs, error, text in (
        ({"batch": 1}, ValueError, "neither"),
        ({"seed": 1, "seeds": [1], "batch": 1}, ValueError, "both"),
        ({"seeds": [1], "batch": 2}, ValueError, "got 1 for a batch of 2"),
        ({"seeds": [1], "first": 2, "batch": 1}, ValueError, "first"),
        ({"seed": 1, "first": -1, "batch": 1}, ValueError, "-1"),
        ({"seed": 1, "first": 2**32 - 1, "batch": 2}, ValueError, r"0\.\.2\*\*32 - batch, got 4294967295"),
        ({"seed": -1, "batch": 1}, ValueError, "got -1"),
        ({"seed": 2**63, "batch": 1}, ValueError, "2\\*\\*63 - 1"),
        ({"seed": 1.5, "batch": 1}, TypeError, "float"),
        ({"seed": True, "batch": 0, "seeds": None}, TypeError, "bool"),
    ):
        with pytest.raises(error, match=text):
            rng.keys(**kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([-1], (2,)), {}, ValueError, "got -1"),
        (([0.5], (2,)), {}, TypeError, "float"),
        ((5, (2,)), {}, TypeError, "list of ints"),
        ((torch.tensor([1.0]), (2,)), {}, TypeError, "float32"),
        ((torch.tensor([[1]]), (2,)), {}, ValueError, r"\[B\]"),
        (([1], (-2,)), {}, ValueError, "negative"),
        (([1], (2,)), {"row": -1}, ValueError, "row"),
        (([1], (2,)), {"row": 2**32}, ValueError, "row"),
        (([1], (2,)), {"row": torch.tensor(1.0)}, ValueError, "row"),
        (([1], (2,)), {"stream": -1}, ValueError, "stream"),
        (([1], (2,)), {"index": [1, 2]}, ValueError, "index"),
        (([1], (2,)), {"out": torch.empty(2)}, ValueError, r"\(1, 2\)"),
        (([1], (2,)), {"out": torch.empty(1, 2, dtype=torch.float64)}, ValueError, "float64"),
        (([1], (2,)), {"out": torch.empty(1, 4)[:, ::2]}, ValueError, "not contiguous"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        rng.normal(*args, **kwargs)


def test_empty(device):
    assert rng.normal([1, 2], (0, 3), device=device).shape == (2, 0, 3)
    assert rng.normal([], (3,), device=device).shape == (0, 3)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """A sample of more than 2^31 elements: the last ones are those of their own counters."""
    n = 2**31 + 4096
    z = rng.normal([3], (n,), device="cuda")[0]
    seed, zero = torch.tensor([3]), torch.tensor(0)
    counter = torch.arange(n // 4 - 16, n // 4)
    words = rng.philox(counter, zero, torch.tensor(1), zero, seed, zero)
    want = torch.stack([*rng.box_muller(*words[:2]), *rng.box_muller(*words[2:])], -1).view(-1)
    assert (z[-64:].cpu() - want).abs().max() <= TOLERANCE
