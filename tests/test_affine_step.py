"""The fused step: kernel against the float64 reference, the reference against the definition written out."""

import math

import pytest
import torch

from fastdiff import ops, rng
from fastdiff.plan import ROW_HEADER, row_width

TOLERANCE = 4e-6  # relative to the largest value
SHAPES = [(), (1,), (0,), (7,), (2, 19, 7), (3, 1003)]


def make_table(rows, slots, *, clip=False, noisy=True, physical=None, seed=0):
    """A random packed table [rows, W] fp32; read and write are random slots, some absent."""
    g = torch.Generator().manual_seed(seed)
    physical = physical or slots
    head = torch.randn(rows, ROW_HEADER, generator=g)
    head[:, 2], head[:, 3] = (-0.7, 0.9) if clip else (-math.inf, math.inf)
    head[:, 5] = float(noisy)
    body = torch.randn(rows, slots * slots + 3 * slots, generator=g)
    ends = torch.full((2, rows, slots), -1.0)
    for k in range(rows):
        for end in ends:
            order = 1 + torch.randperm(physical - 1, generator=g)[: slots - 1]
            end[k, 0] = 0
            end[k, 1:] = torch.where(torch.rand(slots - 1, generator=g) < 0.25, -1, order)
    table = torch.cat([head, body, ends[0], ends[1]], 1)
    return torch.nn.functional.pad(table, (0, row_width(slots) - table.shape[1]))


def poison(state, table, row):
    """NaN in every slot no sample of these rows reads."""
    slots = next(r for r in range(1, 7) if row_width(r) == table.shape[1])
    at = ROW_HEADER + slots * slots + 3 * slots
    for b, k in enumerate(row.expand(state.shape[1]).tolist()):
        used = set(table[k, at : at + slots].int().tolist())
        for p in range(state.shape[0]):
            if p not in used:
                state[p, b] = math.nan
    return state


def relative(got, want):
    """Largest error relative to the largest finite value; NaN must sit in the same places."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    if got.numel() == 0:
        return 0.0
    scale = want.nan_to_num(0).abs().max().clamp(min=1)
    return float(((got - want).nan_to_num(0).abs().max()) / scale)


def run(device, state, m, table, row, *, slots, model_in=None, x0=None, **tensors):
    """affine_step on a device; returns the state, model_in and x0 after it."""
    here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    state = state.clone().to(device)
    outs = [None if o is None else torch.full_like(o, math.nan, device=device) for o in (model_in, x0)]
    row = row if isinstance(row, int) else row.to(device)
    ops.affine_step(
        state, m.to(device), table.to(device), row, slots=slots, model_in=outs[0], x0=outs[1], **here
    )  # fmt: skip
    return state, *outs


def reference(state, m, table, row, *, slots, **tensors):
    """affine_step_ref in float64, with the float32 normals."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tensors.items()}
    return ops.affine_step_ref(state.double(), m.double(), table.double(), row, slots=slots, **wide)


def test_reference_is_the_definition():
    """Two samples on different rows, by loops over scalars, float64."""
    slots, batch, n, w = 3, 2, 5, 1.7
    table = make_table(4, slots, clip=True, physical=4).double()
    g = torch.Generator().manual_seed(1)
    state = torch.randn(4, batch, n, generator=g, dtype=torch.float64)
    m, u = torch.randn(2, batch, n, generator=g, dtype=torch.float64)
    row, seeds = torch.tensor([2, 0]), torch.tensor([7, 8])
    got, model_in, x0 = ops.affine_step_ref(
        state, m, table, row, slots=slots, uncond=u, guidance=torch.tensor([[w]], dtype=torch.float64), seeds=seeds
    )
    for b in range(batch):
        k = int(row[b])
        c = table[k].tolist()
        noise = rng.normal([int(seeds[b])], (n,), row=k)[0].double().tolist()
        body = c[ROW_HEADER:]
        A, rest = body[: slots**2], body[slots**2 :]
        b_, d_, s_, read, write = (rest[i * slots : (i + 1) * slots] for i in range(5))
        want = state[:, b].clone()
        for e in range(n):
            old = [float(state[int(p), b, e]) if p >= 0 else 0.0 for p in read]
            mm = float(u[b, e]) + w * (float(m[b, e]) - float(u[b, e]))
            p = min(max(c[0] * (old[0] + c[1] * mm), c[2]), c[3])
            new = [
                sum(A[i * slots + j] * old[j] for j in range(slots)) + b_[i] * p + d_[i] * mm + s_[i] * noise[e]
                for i in range(slots)
            ]
            for i in range(slots):
                if write[i] >= 0:
                    want[int(write[i]), e] = new[i]
            assert abs(float(x0[b, e]) - p) < 1e-12
            assert abs(float(model_in[b, e]) - c[4] * new[0]) < 1e-12
        assert torch.allclose(got[:, b], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("clip", [False, True])
def test_random_rows(slots, clip, device):
    """Guidance, clamp, noise, permuted and absent slots, poisoned: against float64."""
    batch, sample, physical = 3, (2, 67), slots + 1
    table = make_table(5, slots, clip=clip, physical=physical, seed=slots)
    g = torch.Generator().manual_seed(slots)
    row = torch.tensor([slots % 5])
    state = poison(torch.randn(physical, batch, *sample, generator=g), table, row)
    m, u = torch.randn(2, batch, *sample, generator=g)
    extra = dict(
        slots=slots, uncond=u, guidance=torch.tensor([[2.5]]), seeds=torch.tensor([3, 2**62 + 1, 5]),
        index=torch.tensor([0, 2**31 + 3, 9]),
    )  # fmt: skip
    got = run(device, state, m, table, row, model_in=m, x0=m, **extra)
    for a, b in zip(got, reference(state, m, table, row, **extra), strict=True):
        assert relative(a, b) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, device):
    slots, batch = 2, 3
    table = make_table(2, slots)
    g = torch.Generator().manual_seed(2)
    state = torch.randn(slots, batch, *shape, generator=g)
    m, row, seeds = torch.randn(batch, *shape, generator=g), torch.tensor([1]), torch.tensor([4, 5, 6])
    got = run(device, state, m, table, row, slots=slots, seeds=seeds, model_in=m, x0=m)
    for a, b in zip(got, reference(state, m, table, row, slots=slots, seeds=seeds), strict=True):
        assert relative(a, b) <= TOLERANCE


@pytest.mark.parametrize("shape", ["0-d", (1, 1), (1, 3), (4, 1), (4, 3)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_guidance_and_rows(shape, per_sample, device):
    """A weight for all, per sample, per plan row, or both; one row for all or one a sample."""
    batch, slots = 3, 2
    table = make_table(4, slots, seed=3)
    g = torch.Generator().manual_seed(4)
    state = torch.randn(slots, batch, 11, generator=g)
    m, u = torch.randn(2, batch, 11, generator=g)
    w = torch.tensor(1.5) if shape == "0-d" else torch.rand(*shape, generator=g) * 4
    row = torch.tensor([3, 0, 2] if per_sample else [2], dtype=torch.int32)
    extra = dict(slots=slots, uncond=u, guidance=w, seeds=torch.tensor([1, 2, 3]))
    got = run(device, state, m, table, row, **extra)[0]
    assert relative(got, reference(state, m, table, row, **extra)[0]) <= TOLERANCE
    full = (w.view(1, 1) if w.dim() == 0 else w).expand(4, 3)
    for b in range(batch):  # each sample alone, with its own row and number
        k = row[b : b + 1] if per_sample else row
        alone = dict(
            slots=slots, uncond=u[b : b + 1], guidance=full[int(k), b].clone(), seeds=extra["seeds"][b : b + 1]
        )
        single = run(device, state[:, b : b + 1], m[b : b + 1], table, k, **alone)[0]
        assert relative(single[:, 0], got[:, b]) <= 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [1, 2])
def test_low_precision_model(dtype, copies, device):
    """Model output and input in low precision: the state is that of the upcast output, model_in within one ulp."""
    batch, slots = 2, 2
    table = make_table(2, slots, clip=True, seed=5)
    g = torch.Generator().manual_seed(5)
    state = torch.randn(slots, batch, 3, 21, generator=g)
    m, u = torch.randn(2, batch, 3, 21, generator=g).to(dtype)
    row, w = torch.tensor([1]), torch.tensor([[3.0]])
    model_in = torch.empty(copies * batch, 3, 21, dtype=dtype)
    got, x, _ = run(device, state, m, table, row, slots=slots, uncond=u, guidance=w, model_in=model_in)
    new, want, _ = reference(state, m, table, row, slots=slots, uncond=u, guidance=w)
    assert relative(got, new) <= TOLERANCE
    ulp = torch.finfo(dtype).eps
    for half in x.cpu().double().split(batch):
        error = (half - want).abs()
        assert bool((error <= ulp * want.abs() + TOLERANCE * want.abs().max()).all())


def test_noise_choices(device):
    """In-kernel noise equals the same noise given; has_noise = 0 draws nothing, even where the buffer is NaN."""
    slots, batch = 2, 2
    table = make_table(3, slots, seed=6)
    g = torch.Generator().manual_seed(6)
    state, m = torch.randn(slots, batch, 9, generator=g), torch.randn(batch, 9, generator=g)
    row, seeds = torch.tensor([2]), torch.tensor([11, 12])
    inside = run(device, state, m, table, row, slots=slots, seeds=seeds)[0]
    n = rng.normal(seeds, (9,), row=2)
    given = run(device, state, m, table, row, slots=slots, noise=n)[0]
    assert relative(inside, given) <= TOLERANCE
    other = run(device, state, m, table, row, slots=slots, seeds=seeds, stream=2)[0]
    assert not torch.isclose(inside, other).all()
    table[:, 5] = 0
    silent = run(device, state, m, table, row, slots=slots)[0]
    assert torch.isfinite(silent).all()
    for kwargs in ({"seeds": seeds}, {"noise": torch.full_like(n, math.nan)}):
        assert torch.equal(run(device, state, m, table, row, slots=slots, **kwargs)[0], silent)


def test_nan_prediction_survives_the_clamp(device):
    table = make_table(1, 1, clip=True, noisy=False)
    m = torch.zeros(1, 8)
    m[0, 3] = math.nan
    state, _, x0 = run(device, torch.zeros(1, 1, 8), m, table, torch.tensor([0]), slots=1, x0=m)
    assert x0.isnan().cpu().tolist() == [[e == 3 for e in range(8)]] and bool(state[0, 0, 3].isnan())


def test_batch_invariance(device):
    """A sample's bits are the same alone, in a batch of 7, of 64, and in another order."""
    slots, n = 2, 37
    table = make_table(2, slots, clip=True, seed=7)
    g = torch.Generator().manual_seed(7)
    state, m = torch.randn(slots, 64, n, generator=g), torch.randn(64, n, generator=g)
    seeds, row = torch.arange(64) * 31 + 2, torch.tensor([1])

    def step(pick):
        return run(device, state[:, pick], m[pick], table, row, slots=slots, seeds=seeds[pick])[0]

    whole = step(torch.arange(64))
    order = torch.randperm(64, generator=g)
    for pick in (torch.arange(7), torch.tensor([5]), order):
        assert torch.equal(step(pick), whole[:, pick.to(whole.device)])


@pytest.mark.parametrize("block", [128, 512, 2048])
def test_block_size_does_not_change_a_bit(block, kernel_device, monkeypatch):
    slots, table = 3, make_table(1, 3, clip=True, seed=8)
    g = torch.Generator().manual_seed(8)
    state, m = torch.randn(slots, 2, 2055, generator=g), torch.randn(2, 2055, generator=g)
    args = (kernel_device, state, m, table, torch.tensor([0]))
    want = run(*args, slots=slots, seeds=torch.tensor([1, 2]))[0]
    tile = {"BLOCK": block, "PARTS": block // 512 or 1, "num_warps": 1 if block == 128 else 4}
    monkeypatch.setattr(ops._dispatch, "tiling", lambda n, batch, **_: dict(tile))
    assert torch.equal(run(*args, slots=slots, seeds=torch.tensor([1, 2]))[0], want)


def test_non_contiguous_inputs(device):
    """Strided model outputs and noise give what their contiguous copies give."""
    table = make_table(1, 1, seed=9)
    g = torch.Generator().manual_seed(9)
    state = torch.randn(1, 2, 6, 5, generator=g)
    m, u, n = (torch.randn(2, 5, 6, generator=g).transpose(1, 2) for _ in range(3))
    w, row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])[:, ::2], torch.tensor([0])
    got = run(device, state, m, table, row, slots=1, uncond=u, guidance=w, noise=n)[0]
    assert relative(got, reference(state, m, table, row, slots=1, uncond=u, guidance=w, noise=n)[0]) <= TOLERANCE


@pytest.mark.parametrize("slots", [1, 3])
def test_a_row_by_its_number(slots, device):
    """Bit for bit the row that a tensor names, its noise and weight included."""
    table, g = make_table(4, slots, seed=12), torch.Generator().manual_seed(12)
    state, m = torch.randn(slots, 3, 37, generator=g), torch.randn(3, 37, generator=g)
    u, w = torch.randn(3, 37, generator=g), torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    options = dict(slots=slots, uncond=u, guidance=w, seeds=torch.arange(3))
    for k in (0, 2, 3):
        got = run(device, state, m, table, k, **options)[0]
        assert torch.equal(got, run(device, state, m, table, torch.tensor([k]), **options)[0])
    with pytest.raises(ValueError, match="row must be in 0..3, got 4"):
        run(device, state, m, table, 4, **options)


def test_more_samples_than_a_grid_axis(kernel_device, monkeypatch):
    """Batches beyond the grid's second axis run in several launches with the same result."""
    table, g = make_table(1, 2, seed=10), torch.Generator().manual_seed(10)
    state, m, seeds = torch.randn(2, 5, 3, generator=g), torch.randn(5, 3, generator=g), torch.arange(5)
    x = torch.empty(10, 3)
    want = run(kernel_device, state, m, table, torch.tensor([0]), slots=2, seeds=seeds, model_in=x)
    monkeypatch.setattr(ops._dispatch, "GRID_LIMIT", 2)
    got = run(kernel_device, state, m, table, torch.tensor([0]), slots=2, seeds=seeds, model_in=x)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_more_samples_than_a_kernel_counts(kernel_device):
    """2^31 of them would wrap around: refused before anything is launched."""
    kernel = ops._dispatch.kernels("affine_step").affine_step_kernel
    with pytest.raises(ValueError, match="at most 2147418113 samples, got 2147483648"):
        ops._dispatch.run(kernel, (torch.empty(1, device=kernel_device),), 1, 2**31)


def test_reference_is_differentiable_and_vectorises():
    table = make_table(1, 2, noisy=False, seed=11).double()
    state = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    m = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    row = torch.tensor([0])

    def step(s, out):
        return ops.affine_step_ref(s, out, table, row, slots=2)[0]

    assert torch.autograd.gradcheck(step, (state, m))
    states, outs = torch.randn(5, 2, 3, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    mapped = torch.vmap(step)(states, outs)
    assert torch.allclose(mapped, torch.stack([step(s, o) for s, o in zip(states, outs, strict=True)]))


def test_registration(kernel_device):
    """The registered operation's schema names what it writes, and it has a fake implementation."""
    table, state = make_table(2, 2).to(kernel_device), torch.randn(2, 3, 5, device=kernel_device)
    m, row = torch.randn(3, 5, device=kernel_device), torch.tensor([1], device=kernel_device)
    seeds, x = torch.arange(3, device=kernel_device), torch.empty(3, 5, device=kernel_device)
    args = (state, m, table, row, -1, 2, None, None, None, None, None, seeds, None, 1, None, x, torch.empty_like(x))
    torch.library.opcheck(torch.ops.fastdiff.affine_step.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("batch", [0, 1, 300, 5000])
def test_advance(dtype, batch, device):
    row = torch.tensor([0], dtype=torch.int32, device=device)
    times = torch.tensor([9, 7, 4], dtype=dtype, device=device)
    t = torch.zeros(batch, dtype=dtype, device=device)
    for k, want in ((1, 7), (2, 4), (3, 4)):
        ops.advance(row, times, t)
        assert row.tolist() == [k] and t.tolist() == [want] * batch


def good():
    table = make_table(3, 2)
    return dict(state=torch.zeros(2, 4, 5), model_out=torch.zeros(4, 5), table=table, row=torch.tensor([0]), slots=2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"state": torch.zeros(2, 4, 5, dtype=torch.float64)}, TypeError, "float64"),
        ({"state": torch.zeros(5, 4, 2).transpose(0, 2)}, ValueError, "contiguous"),
        ({"state": torch.zeros(3)}, ValueError, r"\[P, B, \*sample\]"),
        ({"model_out": torch.zeros(4, 6)}, ValueError, r"\(4, 5\), got \(4, 6\)"),
        ({"model_out": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "int32"),
        ({"model_out": [1.0]}, TypeError, "list"),
        ({"model_out": torch.zeros(4, 5, device="meta")}, ValueError, "meta"),
        ({"slots": 3}, ValueError, "3 slots"),
        ({"slots": 0}, ValueError, "1..6"),
        ({"slots": 7}, ValueError, "1..6"),
        ({"table": make_table(3, 2)[:, :-1]}, ValueError, "contiguous"),
        ({"row": torch.tensor([0.0])}, TypeError, "float32"),
        ({"row": torch.tensor([0, 1])}, ValueError, r"\(1,\) or \(4,\)"),
        ({"row": torch.tensor([3])}, ValueError, r"0..2, got 3..3"),
        ({"row": torch.tensor([-1])}, ValueError, "got -1"),
        ({"uncond": torch.zeros(4, 5)}, ValueError, "go together"),
        ({"guidance": torch.ones(1, 1)}, ValueError, "go together"),
        ({"uncond": torch.zeros(4, 5), "guidance": torch.ones(2, 1)}, ValueError, r"\[3 or 1, 4 or 1\], got \(2, 1\)"),
        ({"uncond": torch.zeros(4, 5), "guidance": torch.ones(4)}, ValueError, r"got \(4,\)"),
        ({"scales": torch.ones(4, 3)}, ValueError, "go together"),
        ({"uncond": torch.zeros(4, 5), "guidance": torch.ones(1), "scales": torch.ones(4, 3)}, ValueError, "not both"),
        ({"uncond": torch.zeros(4, 5), "scales": torch.ones(4)}, ValueError, r"scales must have shape \(4, 3\)"),
        ({"uncond": torch.zeros(4, 1), "scales": torch.ones(4, 3)}, ValueError, r"uncond must have shape \(4, 5\)"),
        ({"bound": torch.ones(3)}, ValueError, r"bound must have shape \(4,\), got \(3,\)"),
        ({"uncond": torch.zeros(4, 1), "guidance": torch.ones(1, 1)}, ValueError, "uncond"),
        ({"seeds": torch.zeros(4)}, TypeError, "int64, got float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\)"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, ValueError, "index goes with seeds"),
        ({"seeds": torch.zeros(4, dtype=torch.int64), "noise": torch.zeros(4, 5)}, ValueError, "not both"),
        ({"noise": torch.zeros(4, 6)}, ValueError, "noise"),
        ({"model_in": torch.zeros(3, 5)}, ValueError, r"\(8, 5\), got \(3, 5\)"),
        ({"model_in": torch.zeros(5, 4).T}, ValueError, "contiguous"),
        ({"x0": torch.zeros(4, 5, dtype=torch.bfloat16)}, TypeError, "bfloat16"),
    ],
)
def test_bad_input(change, error, text, device):
    args = {**good(), **change}
    positional = [args.pop(k) for k in ("state", "model_out", "table", "row")]
    if device.type != "cpu":
        pytest.skip("a GPU says what the CPU says")
    with pytest.raises(error, match=text):
        ops.affine_step(*positional, **args)


@pytest.mark.parametrize(
    ("row", "times", "t", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), torch.zeros(3), torch.zeros(2), ValueError, r"\(1,\)"),
        (torch.zeros(1), torch.zeros(3), torch.zeros(2), TypeError, "float32"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(0), torch.zeros(2), ValueError, "N >= 1"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(3), torch.zeros(2, dtype=torch.int64), TypeError, "one dtype"),
    ],
)
def test_advance_bad_input(row, times, t, error, text):
    with pytest.raises(error, match=text):
        ops.advance(row, times, t)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """More than 2^31 elements: the last sample equals the same sample stepped alone."""
    n, batch = 1 << 20, (1 << 11) + 2
    table, seeds = make_table(1, 1, seed=12).cuda(), torch.arange(batch, device="cuda")
    row = torch.tensor([0], device="cuda")
    state, m = torch.randn(1, batch, n, device="cuda"), torch.randn(batch, n, device="cuda", dtype=torch.bfloat16)
    alone = state[:, -1:].clone()
    ops.affine_step(state, m, table, row, slots=1, seeds=seeds)
    ops.affine_step(alone, m[-1:].contiguous(), table, row, slots=1, seeds=seeds[-1:])
    assert torch.equal(state[:, -1:], alone)
