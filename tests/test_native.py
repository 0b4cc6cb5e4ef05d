"""The CPU's own loops of noise: against the reference, in any batch and position, on any number of threads."""

import pytest
import torch

from fastdiff import native, rng
from fastdiff.gumbel import gumbels_at
from fastdiff.ops import _fused

pytestmark = pytest.mark.usefixtures("cpp_loops")


def drawn(seeds, index, pairs, n, **options):
    out = torch.full((len(pairs), len(seeds), n), float("nan"))
    for stream in {s for s, _ in pairs}:
        at = [i for i, (s, _) in enumerate(pairs) if s == stream]
        made = torch.empty(len(at), len(seeds), n)
        native.fill(made, seeds, index, stream, torch.tensor([pairs[i][1] for i in at]), **options)
        out[at] = made
    return out


SEEDS, INDEX = torch.tensor([0, 7, 2**62 + 5, 2**63 - 1]), torch.tensor([0, 1, 3, 2**31 + 1])


@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 70000])
def test_equals_the_reference(n):
    got = drawn(SEEDS, INDEX, [(0, 1), (1, 0), (1, 49)], n)
    for i, (stream, row) in enumerate([(0, 1), (1, 0), (1, 49)]):
        want = rng.normals(SEEDS, INDEX, torch.tensor([row]), stream, n)[0]
        assert (got[i] - want).abs().max() <= 2e-6


@pytest.mark.parametrize("n", [1, 3, 256, 70001])
def test_the_eager_reference_is_the_same(n):
    """rng.normal takes the loop; its torch form in passes, without a compiler, gives the same numbers within 2e-6."""
    want = torch.empty(2, 4, n)
    rng._fill(want, SEEDS, INDEX, torch.tensor([3, 8]), 1)
    assert (rng.normal(SEEDS, (n,), row=torch.tensor([3, 8]), index=INDEX) - want).abs().max() <= 2e-6


def test_tails_and_ends():
    """4 million values against float64 Box-Muller on the same integers: 2e-6, far out too."""
    seeds, index = torch.tensor([11]), torch.tensor([0])
    n = 1 << 22
    got = drawn(seeds, index, [(1, 2)], n)[0, 0]
    want = rng.normals(seeds, index, torch.tensor([2]), 1, n)[0, 0]
    assert got.isfinite().all() and got.abs().max() > 4.8
    assert (got - want).abs().max() <= 2e-6
    assert abs(float(got.double().mean())) < 5 / n**0.5 and abs(float(got.double().var()) - 1) < 5 * (2 / n) ** 0.5


def words_of(n):
    """The uint32 words behind n draws of seed 11, row 2."""
    key = torch.tensor([11])
    of = rng.philox(torch.arange(n // 4), torch.tensor([2]), torch.tensor([rng.CATEGORICAL]), key * 0, key, key * 0)
    return torch.stack(of, -1).flatten()


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_gumbel_and_logistic_numbers(kind):
    """4 million against float64 logarithms of the same words: 4e-6 absolute, and relative where the size is above 1."""
    n = 1 << 22
    got = drawn(torch.tensor([11]), torch.tensor([0]), [(rng.CATEGORICAL, 2)], n, kind=kind)[0, 0].double()
    word = words_of(n)
    v = (word.double() + 0.5) * 2.0**-32
    if kind == "gumbel":
        v = word.float() * (2.0**-32 - 2.0**-56) + 2.0**-33  # fp32 by definition: the largest word stays below 1
        want = -torch.log(-torch.log1p(-v.double()))
    else:
        want = torch.log(v) - torch.log1p(-v)
    assert got.isfinite().all() and got.max() > 14
    assert ((got - want).abs() / want.abs().clamp_min(1)).max() <= 4e-6


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_gumbel_equals_the_traceable_expression(kind):
    args = (SEEDS.view(-1, 1), INDEX.view(-1, 1), torch.tensor([[6]]))
    want = gumbels_at(torch.arange(250) + 17, *args, 999, logistic=kind == "logistic")
    got = drawn(SEEDS, INDEX, [(rng.CATEGORICAL, 6)], 999, kind=kind, first=17)[0]
    assert ((got - want).abs() / want.abs().clamp_min(1)).max() <= 8e-6  # each is within 4e-6 of the exact number


def test_a_row_each_sample():
    rows = torch.tensor([5, 0, 9, 5])
    out = torch.empty(1, 4, 301)
    native.fill(out, SEEDS, INDEX, 1, rows, paired=True)
    for b in range(4):
        assert torch.equal(out[0, b], drawn(SEEDS[b : b + 1], INDEX[b : b + 1], [(1, int(rows[b]))], 301)[0, 0])


@pytest.mark.parametrize("kind", ["normal", "gumbel", "logistic"])
def test_a_number_does_not_depend_on_what_is_drawn_beside_it(kind):
    seeds, index = torch.arange(5) + 3, torch.arange(5) * 2
    whole = drawn(seeds, index, [(1, 4), (1, 5)], 20000, kind=kind)
    assert torch.equal(drawn(seeds[2:3], index[2:3], [(1, 5)], 20000, kind=kind)[0, 0], whole[1, 2])
    assert torch.equal(drawn(seeds[1:3], index[1:3], [(1, 4)], 517, kind=kind)[0], whole[0, 1:3, :517])
    assert torch.equal(drawn(seeds, index, [(1, 4)], 517, kind=kind, first=25)[0], whole[0, :, 100:617])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(drawn(seeds, index, [(1, 4), (1, 5)], 20000, kind=kind), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", native.KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 32, 100, 128, 129])
def test_small_samples_share_a_draw(n, kind):
    """Bit for bit what each gives alone, from any counter on, and with a row each."""
    batch = 67
    seeds, index = torch.arange(batch) * 2**50 + 5, torch.arange(batch) * 3**17
    whole = drawn(seeds, index, [(0, 1), (1, 9)], n, kind=kind)
    long = drawn(seeds, index, [(0, 1), (1, 9)], 300, kind=kind)  # a sample alone
    assert torch.equal(whole, long[..., :n])
    later = drawn(seeds, index, [(0, 1)], n, kind=kind, first=7)
    assert torch.equal(later[0], long[0, :, 28 : 28 + n])
    out, rows = torch.empty(1, batch, n), torch.arange(batch) % 5
    native.fill(out, seeds, index, 1, rows, kind=kind, paired=True)
    for row in range(5):
        assert torch.equal(out[0, rows == row], drawn(seeds, index, [(1, row)], n, kind=kind)[0, rows == row])


@pytest.mark.parametrize("n", [2, 100])
def test_noising_and_loss_of_small_samples(n):
    """Samples that share a draw: each result is that of the sample alone."""
    batch = 37
    seeds, index, g = torch.arange(batch) + 11, torch.arange(batch) * 7, torch.Generator().manual_seed(n)
    x, m, coef = (torch.randn(batch, k, generator=g) for k in (n, n, 4))
    out, loss, slope, scale = torch.empty(batch, n), torch.empty(batch), torch.empty(batch, n), torch.empty(batch)
    assert _fused.noised(x, coef, None, seeds, index, 3, 1, [out])
    assert _fused.loss_and_slopes(m, x, coef, None, seeds, index, 3, 1, 0, 1.0, loss, slope, scale)
    assert torch.equal(scale, coef[:, 2] / n)
    for b in range(batch):
        part, a, c, d, e = slice(b, b + 1), torch.empty(1, n), torch.empty(1), torch.empty(1, n), torch.empty(1)
        assert _fused.noised(x[part], coef[part], None, seeds[part], index[part], 3, 1, [a])
        keys = seeds[part], index[part], 3, 1
        assert _fused.loss_and_slopes(m[part], x[part], coef[part], None, *keys, 0, 1.0, c, d, e)
        assert torch.equal(a[0], out[b]) and torch.equal(c[0], loss[b]) and torch.equal(d[0], slope[b])


def test_every_loop_builds():
    assert native.build() == ["binned", "categorical", "gaussian_kl", "guide", "noise", "step", "threshold", "unmask"]


@pytest.mark.parametrize("t", [[4], [4, 0, 4]], ids=str)
def test_rows_of_a_table(t):
    """A table's rows at t are those of the table that t picked, for one t and one a sample; no index is 0 each."""
    seeds, table, t = torch.arange(3), torch.rand(5, 4), torch.tensor(t)
    x, m = torch.randn(3, 300), torch.randn(3, 300)
    out, loss, slope, scale = torch.empty(2, 3, 300), torch.empty(2, 3), torch.empty(2, 3, 300), torch.empty(2, 3)
    for i, (coef, at, index) in enumerate([(table, t, None), (table[t], None, seeds * 0)]):
        assert _fused.noised(x, coef, at, seeds, index, 3, 1, [out[i]])
        given = m, x, coef, at, seeds, index, 3, 1, 0, 1.0
        assert _fused.loss_and_slopes(*given, loss[i], slope[i], scale[i])
    assert all(torch.equal(v[0], v[1]) for v in (out, loss, slope, scale))
    assert (loss > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_noising_in_the_same_loop(given: torch.dtype, dtype: torch.dtype):
    """x_t, and x_t with a target, from the very normals that `fill` gives."""
    seeds, index, row, stream = torch.arange(3), torch.arange(3) * 5, 6, 1
    x, coef = torch.randn(3, 1000).to(given), torch.rand(3, 4)
    n = drawn(seeds, index, [(stream, row)], 1000)[0].double()
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for count in (1, 2):
        outs = [torch.full((3, 1000), torch.nan, dtype=dtype) for _ in range(count)]
        assert _fused.noised(x, coef, None, seeds, index, row, stream, outs)
        for i, out in enumerate(outs):
            want = coef[:, 2 * i, None].double() * x.double() + coef[:, 2 * i + 1, None].double() * n
            assert ((out.double() - want).abs() <= 1e-6 + unit * want.abs()).all()


def test_traced_functionalised_and_fake_tensors_take_the_expression():
    """Where memory is not a tensor's own, the numbers come from traceable operations."""
    from torch.fx.experimental.proxy_tensor import make_fx

    draw = lambda seeds: rng.row_normals(seeds, seeds * 0, torch.tensor([3]), 1, 50)  # noqa: E731
    seeds = torch.tensor([4, 5])
    traced = make_fx(draw)(seeds)
    assert (traced(torch.tensor([8, 9])) - draw(torch.tensor([8, 9]))).abs().max() <= 2e-6
    assert (torch.func.vmap(lambda s: draw(s[None])[0])(seeds) - draw(seeds)).abs().max() <= 2e-6
