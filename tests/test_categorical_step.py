"""categorical_step: kernel, C++ loop and eager chunks against float64, and the reference against theta-space code."""

import math
import sys

import pytest
import torch

from fastdiff import ops, rng
from fastdiff.gumbel import gumbel_of, gumbels, logistic_of
from fastdiff.ops._categorical import rows_of, vectors
from fastdiff.plan import ROW_HEADER, row_width
from tests.test_affine_step import make_table

TOLERANCE = 4e-6  # relative to the largest value of the state; of the next input, in [-1, 1], absolute
CASES = [(2, 37), (3, 19), (27, 20), (27, 19), (256, 5), (513, 3), (4096, 2)]  # K, tokens; 27 * 19 is odd
cases = pytest.mark.parametrize(("K", "tokens"), CASES)


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def width(K):
    return 1 if K == 2 else K


def plain_table(rows=3, slots=1, physical=None, seed=0):
    table = make_table(rows, slots, physical=physical, seed=seed)
    table[:, ROW_HEADER + slots * slots] = 2.5  # b of slot 0
    return table


def relative(got, want):
    assert torch.equal(got.isnan(), want.isnan())
    return float((got.double() - want).nan_to_num().abs().max() / want.nan_to_num().abs().max().clamp(min=1))


def run(device, state, m, table, row, *, copies=1, dtype=torch.float32, **options):
    """categorical_step on a device: the state, the model's next input and the classes, back on the CPU."""
    here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    state = state.clone().to(device)
    batch, *sample = state.shape[1:]
    x = torch.full((copies * batch, *sample), math.nan, dtype=dtype, device=device)
    classes = torch.full((batch, *sample[:-1]), -7, device=device)
    ops.categorical_step(state, m.to(device), table.to(device), row.to(device), model_in=x, classes=classes, **here)
    return state.cpu(), x.cpu(), classes.cpu()


def reference(state, m, table, row, **options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return ops.categorical_step_ref(state.double(), m.double(), table.double(), row, **wide)


def agree(got, want, copies=1, ulp=0.0):
    (state, x, k), (want_state, want_x, want_k) = got, want
    assert torch.equal(k, want_k)
    assert relative(state, want_state) <= TOLERANCE
    for half in x.split(len(want_x)):
        assert float((half.double() - want_x).abs().max()) <= TOLERANCE + ulp


def widened(tensors):
    return [v.double() if v.is_floating_point() else v for v in tensors]


def random_case(K, tokens, slots=1, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed + K)
    state = 2 * torch.randn(slots + 1, batch, tokens, width(K), generator=g)
    m, u = 1.5 * torch.randn(2, batch, tokens, width(K), generator=g)
    seeds, index = torch.tensor([3, 2**62 + 1, 5])[:batch], torch.tensor([0, 2**31 + 3, 9])[:batch]
    return state, m, u, dict(slots=slots, seeds=seeds, index=index)


def test_reference_is_the_paper_in_theta_space():
    """One step by loops over classes, in theta and float64: theta' ~ theta exp(y), y = a (K e_k - 1) + sqrt(a K) n."""
    K, tokens, a = 4, 5, 0.19
    state, m, _, options = random_case(K, tokens, batch=1)
    table = torch.zeros(1, row_width(1), dtype=torch.float64)
    table[0, [4, 5, 8, 9, 11]] = torch.tensor([1.0, 1.0, 1.0, a * K, math.sqrt(a * K)], dtype=torch.float64)
    z, x, k = ops.categorical_step_ref(
        state[:1].double(), m.double(), table, torch.tensor([0]), readout="sample", **options
    )
    n = rng.normal(options["seeds"], (tokens, K), index=options["index"])[0].double()
    g = gumbels(options["seeds"], options["index"], torch.tensor([0]), tokens * K)[0].view(tokens, K).double()
    for d in range(tokens):
        theta = [math.exp(v) for v in state[0, 0, d].tolist()]
        perturbed = [float(m[0, d, j]) + float(g[d, j]) for j in range(K)]
        hit = perturbed.index(max(perturbed))
        y = [a * (K * (j == hit) - 1) + math.sqrt(a * K) * float(n[d, j]) for j in range(K)]
        theta = [t * math.exp(v) for t, v in zip(theta, y, strict=True)]
        want = [2 * t / sum(theta) - 1 for t in theta]
        assert int(k[0, d]) == hit
        assert float((x[0, d] - torch.tensor(want, dtype=torch.float64)).abs().max()) < 1e-13


def test_two_classes_are_the_difference_of_two_logits():
    """K = 2 in one channel equals the two-channel algebra: d = z_1 - z_0, noise (n_1 - n_0) = sqrt(2) n."""
    tokens, A, b, s = 9, 0.9, 1.7, 0.6
    state, m, _, _ = random_case(2, tokens, batch=1)
    n, gumbel = torch.randn(2, 1, tokens, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = torch.zeros(1, row_width(1), dtype=torch.float64)
    table[0, [4, 5, 8, 9, 11]] = torch.tensor([1.0, 1.0, A, b, math.sqrt(2) * s], dtype=torch.float64)
    d, x, k = ops.categorical_step_ref(
        state[:1].double(), m.double(), table, torch.tensor([0]), slots=1, readout="sample", noise=n, gumbel=gumbel
    )
    z = torch.stack([-0.5 * state[0].double(), 0.5 * state[0].double()], -1)[..., 0, :]
    hit = (m.double() + gumbel > 0)[..., 0].long()
    two = torch.stack([-n, n], -1)[..., 0, :] / math.sqrt(2)
    z = A * z + b * torch.nn.functional.one_hot(hit, 2).double() + s * two
    assert torch.equal(k, hit)
    assert float((d[0, ..., 0] - (z[..., 1] - z[..., 0])).abs().max()) < 1e-14
    assert float((x[..., 0] - (2 * torch.softmax(z, -1)[..., 1] - 1)).abs().max()) < 1e-14


@cases
@pytest.mark.parametrize("readout", ["sample", "argmax", "mean"])
def test_against_float64(K, tokens, readout, device):
    state, m, _, options = random_case(K, tokens)
    args = (state[:1], m, plain_table(seed=K), torch.tensor([1]))
    agree(run(device, *args, readout=readout, **options), reference(*args, readout=readout, **options))


@pytest.mark.parametrize(("K", "slots"), [(2, 3), (27, 2), (16, 3), (27, 6), (513, 3)])
def test_slots_guidance_and_copies(K, slots, device):
    """Permuted and absent slots, a weight a sample, one row a sample, two copies in bf16."""
    tokens, batch = 8, 3
    state, m, u, options = random_case(K, tokens, slots, batch)
    table, row = plain_table(4, slots, slots + 1, seed=slots), torch.tensor([2, 0, 3], dtype=torch.int32)
    read = ROW_HEADER + slots * slots + 3 * slots
    for b, k in enumerate(row.tolist()):
        used = table[k, read : read + slots].int().tolist()
        for p in range(slots + 1):
            if p not in used:
                state[p, b] = math.nan
    options |= dict(uncond=u, guidance=torch.tensor([[1.5, 0.0, 3.0]]), readout="sample")
    args = (state, m, table, row)
    got = run(device, *args, copies=2, dtype=torch.bfloat16, **options)
    agree(got, reference(*args, **options), ulp=2.0**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype, device):
    state, m, _, options = random_case(27, 12)
    args = (state[:1], m.to(dtype), plain_table(), torch.tensor([0]))
    got = run(device, *args, dtype=dtype, readout="sample", **options)
    agree(got, reference(*args, readout="sample", **options), ulp=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize(("K", "tokens", "readout"), [(20003, 4, "sample"), (16384, 1, "sample"), (16389, 2, "mean")])
def test_long_rows(K, tokens, readout, device):
    """Rows of several windows, dense and not, with guidance; one window just full."""
    state, m, u, options = random_case(K, tokens)
    options |= dict(uncond=u, guidance=torch.tensor(1.7), readout=readout)
    args = (state[:1], m, plain_table(), torch.tensor([2]))
    agree(run(device, *args, **options), reference(*args, **options))


def test_strided_rows(device):
    """Padded rows of state, logits and next input, transposed logits, and samples of several axes."""
    g = torch.Generator().manual_seed(0)
    table, row, options = plain_table(), torch.tensor([1]), dict(slots=1, readout="sample", seeds=torch.tensor([1, 2]))
    for K in (27, 28):
        padded = [torch.randn(1, 2, 3, 4, 32, generator=g)[..., :K] for _ in range(2)]
        m, x = torch.randn(2, 4, 3, K, generator=g).transpose(1, 2), torch.full((2, 3, 4, 48), math.nan)[..., :K]
        want = reference(padded[0], m, table, row, **options)
        state, classes = padded[0].to(device), torch.zeros(2, 3, 4, dtype=torch.int64, device=device)
        x = x.to(device)
        here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        ops.categorical_step(state, m.to(device), table.to(device), row.to(device), model_in=x, classes=classes, **here)
        agree((state.cpu(), x.cpu(), classes.cpu()), want)


def test_given_noise(device):
    """noise and gumbel given equal those drawn; has_noise = 0 reads neither."""
    state, m, _, options = random_case(27, 8)
    seeds, index = options["seeds"], options["index"]
    args = (state[:1], m, plain_table(), torch.tensor([1]))
    want = run(device, *args, readout="sample", **options)
    noise = rng.normal(seeds, (8, 27), row=1, index=index)
    gumbel = gumbels(seeds, index, torch.tensor([1]), 8 * 27).view(2, 8, 27)
    for given in (dict(noise=noise), dict(gumbel=gumbel)):
        agree(run(device, *args, readout="sample", **options, **given), widened(want))
    got = run(device, *args, slots=1, readout="sample", noise=noise, gumbel=gumbel)
    agree(got, widened(want))
    args[2][:, 5] = 0
    quiet = run(device, *args, slots=1, readout="argmax")
    assert torch.equal(run(device, *args, slots=1, readout="argmax", noise=noise * math.nan)[0], quiet[0])


def test_nan_and_infinity(device):
    """A NaN logit makes its token NaN and class 0; -inf forbids classes; ties go to the first class."""
    for K in (2, 27, 28, 100, 16401):  # the last in windows, the NaN in another than the first
        state, m, _, options = random_case(K, 4, batch=1)
        m = torch.zeros_like(m)
        m[0, 1, -1] = math.nan
        if K > 2:
            m[0, 2, :-1] = -math.inf
        for readout in ("sample", "argmax", "mean"):
            z, x, k = run(device, state[:1], m, plain_table(), torch.tensor([0]), readout=readout, **options)
            assert z[0, 0].isnan().all(-1).tolist() == x[0].isnan().all(-1).tolist() == [False, True, False, False]
            assert int(k[0, 1]) == 0 and (K == 2 or int(k[0, 2]) == K - 1)
            assert readout == "sample" or k[0, [0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("K", [2, 27, 513])
def test_guided_classes_stay_forbidden(K, device):
    """A class of -inf in both outputs is never drawn, whatever w, and changes nothing of the others."""
    state, m, u, options = random_case(K, 6)
    among = torch.arange(width(K)) % 3 == 0  # of two classes: class 1
    options |= dict(guidance=torch.tensor([[4.0, -1.0]]))  # one a sample
    args = (state[:1], plain_table(), torch.tensor([0]))
    for readout in ("sample", "argmax", "mean"):
        barred = [torch.where(among, -math.inf, v) for v in (m, u)]
        low = [torch.where(among, -1e4, v) for v in (m, u)]
        got, want = (run(device, args[0], c, *args[1:], readout=readout, uncond=d, **options) for c, d in (barred, low))
        assert not (among[got[2]] if K > 2 else got[2]).any()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("K", [2, 27, 513])
def test_batch_invariance(K, device):
    """A sample's bits are the same alone, in a batch, and in another order."""
    state, m, _, options = random_case(K, 7, batch=1)
    state, m = (torch.randn(*s[:-3], 9, 7, width(K)) for s in (state[:1].shape, m.shape))
    seeds, row = torch.arange(9) * 31 + 2, torch.tensor([1])

    def step(pick):
        return run(device, state[:, pick], m[pick], plain_table(), row, slots=1, readout="sample", seeds=seeds[pick])

    whole = step(torch.arange(9))
    for pick in (torch.arange(3), torch.tensor([5]), torch.randperm(9)):
        z, x, k = step(pick)
        assert torch.equal(z, whole[0][:, pick]) and torch.equal(x, whole[1][pick]) and torch.equal(k, whole[2][pick])


@pytest.mark.parametrize("K", [2, 3, 27, 100])
def test_frequencies_are_categorical(K, device):
    """Classes of equal tokens against softmax: chi-square below its 0.9999 quantile (normal approximation)."""
    tokens = 1000
    g = torch.Generator().manual_seed(K)
    logits = torch.randn(1, 1, width(K), generator=g) * (0.5 if K == 100 else 1)  # two numbers of a class, or more
    logits = logits.expand(1, tokens, width(K))
    state = torch.zeros(1, 1, tokens, width(K))
    args = (state, logits, plain_table(), torch.tensor([0]))
    _, _, k = run(device, *args, slots=1, readout="sample", seeds=torch.tensor([11]))
    p = torch.softmax(logits[0, 0].double(), -1) if K > 2 else torch.sigmoid(logits[0, 0, 0].double())
    p = p if K > 2 else torch.tensor([1 - p, p], dtype=torch.float64)
    want = tokens * p
    chi2 = float(((torch.bincount(k.flatten(), minlength=K) - want) ** 2 / want).sum())
    limit = K - 1 + 4.5 * math.sqrt(2 * (K - 1)) + 8
    assert chi2 < limit < float((tokens / K - want).square().div(want).sum())  # what equal frequencies would give


def test_extremes_of_the_maps():
    """Open intervals: the largest and smallest words give finite numbers, symmetric for the logistic ones."""
    i = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    g, x = gumbel_of(i), logistic_of(i)
    assert g.isfinite().all() and x.isfinite().all() and torch.equal(x, -x.flip(0))
    v = (i.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-v))
    assert float((g[:4] - exact[:4]).abs().max()) < 2e-6 and float(g[0]) > 22.8


def test_no_overflow_at_the_largest_case(device):
    """K = 262,144, beta_1 = 16, one step (accuracy 16), bf16: finite, and theta sums to 1."""
    K = 262144
    g = torch.Generator().manual_seed(0)
    m = (4 * torch.randn(1, 1, K, generator=g)).bfloat16()
    table = torch.zeros(1, row_width(1))
    table[0, [4, 5, 8, 9, 11]] = torch.tensor([1.0, 1.0, 1.0, 16.0 * K, math.sqrt(16.0 * K)])
    z, x, k = run(
        device, torch.zeros(1, 1, 1, K), m, table, torch.tensor([0]), dtype=torch.bfloat16, slots=1, readout="sample",
        seeds=torch.tensor([1]),
    )  # fmt: skip
    assert z.isfinite().all() and x.isfinite().all() and int(x[0, 0].float().argmax()) == int(k)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_rows_of_a_program_do_not_change_a_class_or_a_state(rows, kernel_device, monkeypatch):
    state, m, _, options = random_case(27, 16)
    args = (state[:1], m, plain_table(), torch.tensor([0]))
    want = run(kernel_device, *args, readout="sample", **options)
    shape = rows_of(27, 16)._replace(rows=rows)
    module = sys.modules["fastdiff.ops.categorical_step"]  # the package's attribute is the function
    monkeypatch.setattr(module, "rows_of", lambda *_, **__: shape)
    got = run(kernel_device, *args, readout="sample", **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])


def test_windows():
    """Every K fits its windows at any start, and only dense or 4-aligned tensors are read as vectors."""
    for K in (3, 4, 5, 6, 7, 27, 29, 30, 31, 32, 512, 513, 16381, 16384, 16385, 50257, 262144):
        cut = rows_of(K, 100)
        worst = max(d * K % 4 for d in range(4))
        assert cut.cols * cut.pieces >= K + worst and cut.rows * cut.cols <= 1 << 14
    assert vectors(28, 3, [28, 32]) and not vectors(28, 3, [28, 30])
    assert vectors(27, 4, [27, 27]) and not vectors(27, 4, [27, 32]) and not vectors(27, 3, [27])


def test_registration(kernel_device):
    """The registered operation's schema names what it writes, and it has a fake implementation."""
    state, m, _, options = random_case(27, 4)
    x, k = torch.empty(2, 4, 27), torch.zeros(2, 4, dtype=torch.int64)
    args = (state[:1].clone(), m, plain_table(), torch.tensor([1]), 1, 0, None, None, options["seeds"], None, None,
            None, x, k)  # fmt: skip
    args = tuple(a.to(kernel_device) if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(
        torch.ops.fastdiff.categorical_step.default, args, test_utils=("test_schema", "test_faketensor")
    )


def good(K=5):
    return dict(
        state=torch.zeros(1, 4, 6, K), model_out=torch.zeros(4, 6, K), table=plain_table(), row=torch.tensor([0]),
        slots=1, readout="sample", seeds=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"state": torch.zeros(1, 4, 6, 5, dtype=torch.float64)}, TypeError, "float64"),
        ({"state": torch.zeros(1, 4, 5, 6).transpose(2, 3)}, ValueError, "evenly spaced rows"),
        ({"state": torch.zeros(1, 4, 6, 10)[..., ::2]}, ValueError, "evenly spaced rows"),
        ({"state": torch.zeros(4, 5)}, ValueError, r"\[P, B, \*D, K'\]"),
        ({"state": torch.zeros(1, 4, 6, 2)}, ValueError, "1 for K = 2"),
        ({"state": torch.zeros(1, 4, 6, 0)}, ValueError, "got 0"),
        ({"model_out": torch.zeros(4, 6, 4)}, ValueError, r"\(4, 6, 5\), got \(4, 6, 4\)"),
        ({"model_out": torch.zeros(4, 6, 5, dtype=torch.int64)}, TypeError, "int64"),
        ({"model_out": torch.zeros(4, 6, 5, device="meta")}, ValueError, "meta"),
        ({"readout": "softmax"}, ValueError, "valid: sample, argmax, mean"),
        ({"slots": 2}, ValueError, "2 slots"),
        ({"slots": 7}, ValueError, "1..6"),
        ({"row": torch.tensor([3])}, ValueError, r"0..2, got 3..3"),
        ({"row": torch.tensor([0.0])}, TypeError, "float32"),
        ({"row": torch.tensor([0, 1])}, ValueError, r"\(1,\) or \(4,\)"),
        ({"uncond": torch.zeros(4, 6, 5)}, ValueError, "go together"),
        ({"guidance": torch.ones(1, 1)}, ValueError, "go together"),
        ({"uncond": torch.zeros(4, 6, 5), "guidance": torch.ones(2, 1)}, ValueError, "3 or 1, 4 or 1"),
        ({"seeds": None}, ValueError, "needs seeds"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\)"),
        ({"seeds": None, "gumbel": torch.zeros(4, 6, 5), "index": torch.zeros(4).long()}, ValueError, "index goes"),
        ({"readout": "mean", "gumbel": torch.zeros(4, 6, 5)}, ValueError, "gumbel goes with"),
        ({"noise": torch.zeros(4, 6, 5), "gumbel": torch.zeros(4, 6, 5)}, ValueError, "would draw nothing"),
        ({"noise": torch.zeros(4, 6, 1)}, ValueError, "noise"),
        ({"model_in": torch.zeros(3, 6, 5)}, ValueError, r"\(8, 6, 5\), got \(3, 6, 5\)"),
        ({"model_in": torch.zeros(4, 6, 5, dtype=torch.int64)}, TypeError, "int64"),
        ({"model_in": torch.zeros(4, 5, 6).mT}, ValueError, "evenly spaced rows"),
        ({"classes": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "int32"),
        ({"classes": torch.zeros(4, 6, 1, dtype=torch.int64)}, ValueError, r"\(4, 6\)"),
    ],
)
def test_bad_input(change, error, text):
    args = {**good(), **change}
    positional = [args.pop(k) for k in ("state", "model_out", "table", "row")]
    with pytest.raises(error, match=text):
        ops.categorical_step(*positional, **args)


def test_buffer():
    assert ops.categorical_buffer((2, 3, 27), torch.bfloat16).shape == (2, 3, 27)
    with pytest.raises(ValueError, match="last dimension"):
        ops.categorical_buffer(())
