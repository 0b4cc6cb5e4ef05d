"""The CPU's own loop of normals: against the reference, in any batch and position, on any number of threads."""

import pytest
import torch

from fastdiff import rng
from fastdiff.native import normal_filler


@pytest.fixture(scope="module")
def fill():
    found = normal_filler()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def drawn(fill, seeds, index, pairs, n):
    streams, rows = (torch.tensor(v) for v in zip(*pairs, strict=True))
    out = torch.full((len(pairs), len(seeds), n), float("nan"))
    fill(seeds, index, streams, rows, out)
    return out


@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 70000])
def test_equals_the_reference(fill, n):
    seeds, index = torch.tensor([0, 7, 2**62 + 5, 2**63 - 1]), torch.tensor([0, 1, 3, 2**31 + 1])
    got = drawn(fill, seeds, index, [(0, 1), (1, 0), (1, 49)], n)
    for i, (stream, row) in enumerate([(0, 1), (1, 0), (1, 49)]):
        want = rng.normals(seeds, index, torch.tensor([row]), stream, n)[0]
        assert (got[i] - want).abs().max() <= 2e-6


def test_tails_and_ends(fill):
    """4 million values against float64 Box-Muller on the same integers: 2e-6, far out too."""
    seeds, index = torch.tensor([11]), torch.tensor([0])
    n = 1 << 22
    got = drawn(fill, seeds, index, [(1, 2)], n)[0, 0]
    want = rng.normals(seeds, index, torch.tensor([2]), 1, n)[0, 0]
    assert got.isfinite().all() and got.abs().max() > 4.8
    assert (got - want).abs().max() <= 2e-6
    assert abs(float(got.double().mean())) < 5 / n**0.5 and abs(float(got.double().var()) - 1) < 5 * (2 / n) ** 0.5


def test_a_number_does_not_depend_on_what_is_drawn_beside_it(fill):
    seeds, index = torch.arange(5) + 3, torch.arange(5) * 2
    whole = drawn(fill, seeds, index, [(1, 4), (1, 5)], 20000)
    assert torch.equal(drawn(fill, seeds[2:3], index[2:3], [(1, 5)], 20000)[0, 0], whole[1, 2])
    assert torch.equal(drawn(fill, seeds[1:3], index[1:3], [(1, 4)], 517)[0], whole[0, 1:3, :517])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(drawn(fill, seeds, index, [(1, 4), (1, 5)], 20000), whole)
    finally:
        torch.set_num_threads(threads)


def test_noising_in_the_same_loop(fill):
    seeds, index = torch.arange(3), torch.arange(3)
    x, coef = torch.randn(3, 1000), torch.rand(3, 4)
    n = drawn(fill, seeds, index, [(1, 6)], 1000)[0]
    out = torch.empty(1, 3, 1000)
    fill(seeds, index, torch.tensor([1]), torch.tensor([6]), out, x, coef)
    want = coef[:, :1].double() * x.double() + coef[:, 1:2].double() * n.double()
    assert (out[0].double() - want).abs().max() <= 1e-6
