"""Tokens drawn from the smallest set of the likeliest classes that holds a share (top-p): kernel, C++ and torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import race, solvers
from fastdiff import schedules as S
from fastdiff.ops.unmask_step import WINDOW
from fastdiff.readout import ORDERS
from fastdiff_bench.textbook_tokens import TokensTextbook
from tests.test_unmask_step import B, case, oracle, run, table

ROWS = table((1.0, 0.5, 0, 1.0), (0.7, 0.4, 0, 0.0), (0.9, 0.6, 1, 0.7), (1.0, 1.0, 0, 1.5), c_out=0.8)


@pytest.fixture
def device(device_of_loops: torch.device) -> torch.device:
    return device_of_loops


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("K", "mask"), [(2, 2), (3, 0), (27, 26), (32, 32), (1000, 7)])
def test_against_the_definition(K: int, mask: int, order: str, device: torch.device) -> None:
    tokens, group, m, _ = case(K, 13, mask)
    m[0, :2], m[1, 3:5], m[2, 1, 0], m[2, 3, :2] = math.nan, -math.inf, math.nan, math.inf
    for row in ([0, 0, 0], [1, 1, 1], [2, 0, 3]):
        want = oracle(tokens, m, ROWS, row, mask, order, group)
        got = run(device, tokens, m, ROWS, torch.tensor(row), mask=mask, order=order, group=group, nucleus=True)
        assert torch.equal(got, want), row


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_tokens_of_several_windows(order: str, device: torch.device) -> None:
    K = WINDOW + 1
    tokens, group, m, _ = case(K, 4, K, seed=1)
    tokens[0], group[0] = K, 0
    m[:, 2, -1] += 12  # in the last window
    want = oracle(tokens, m, ROWS, [0, 3, 0], K, order, group)
    got = run(device, tokens, m, ROWS, torch.tensor([0, 3, 0]), mask=K, order=order, group=group, nucleus=True)
    assert torch.equal(got, want)


def test_guidance(device: torch.device) -> None:
    K, w = 27, torch.tensor([[1.5, 0.5, 2.0]])
    tokens, group, m, u = case(K, 11, K)
    combined = u.double() + w.double().view(-1, 1, 1) * (m.double() - u.double())
    want = oracle(tokens, combined, ROWS, [0, 0, 0], K, "random", group)
    given = {"uncond": u, "guidance": w, "group": group, "mask": K, "nucleus": True}
    assert torch.equal(run(device, tokens, m, ROWS, torch.tensor([0]), **given), want)


def test_scores_are_of_all_classes(device: torch.device) -> None:
    """A class of 0.5 beside sixty small ones is less sure than one of 0.6 beside one, though each is drawn alone."""
    p = torch.zeros(2, 64)
    p[0], p[0, 40] = 0.5 / 63, 0.5
    p[1, 3], p[1, 5] = 0.6, 0.4  # in one group
    m = p.log().expand(B, 2, 64)
    got = run(device, torch.full((B, 2), 64), m, table((1.0, 0.5, 0, 1.0), c_out=0.4), torch.tensor([0]), mask=64,
              order="confidence", nucleus=True)  # fmt: skip
    assert got.tolist() == [[64, 3]] * B


@pytest.mark.parametrize(("share", "kept"), [(0.35, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 5), (0.95, 5)])
def test_probabilities(share: float, kept: int, device: torch.device) -> None:
    """Of 0.4, 0.3, 0.1, 0.1, 0.1 those before which less than the share is; equal ones together. Four deviations."""
    p = torch.tensor([0.1, 0.3, 0.1, 0.4, 0.1])
    m = (2 * p.log()).expand(B, 1500, 5)
    m = torch.cat([m, torch.full((B, 1500, 1), torch.finfo().min)], -1)  # a class forbidden by a large number
    rows = table((1.0, 1.0, 0, 2.0), c_out=share)
    got = run(device, torch.full((B, 1500), 6), m, rows, torch.tensor([0]), mask=6, nucleus=True)
    likely = torch.where(p >= p.sort(descending=True).values[kept - 1], p, 0.0)
    for k, q in enumerate((likely / likely.sum()).tolist()):
        share_of_k = float((got == k).float().mean())
        assert abs(share_of_k - q) <= 4 * math.sqrt(q * (1 - q) / got.numel())


def test_the_usual_way() -> None:
    """Sorted, classes whose sum so far is above p removed, but for the first of them."""
    m = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(2)).double()
    for p in (0.05, 0.5, 0.9, 0.999):
        z, at = m.sort(descending=True)
        removed = z.softmax(-1).cumsum(-1) > p
        removed[:, 1:] = removed[:, :-1].clone()
        removed[:, 0] = False
        want = m.masked_fill(torch.zeros_like(removed).scatter(1, at, removed), -math.inf)
        least = race.nucleus(m, torch.ones(64).double(), torch.full((64,), p).double())
        assert torch.equal(m.masked_fill(m < least[:, None], -math.inf), want)


def test_plans() -> None:
    """A share that the largest class alone holds is temperature 0; rows may differ; a share of 1 changes nothing."""
    schedule, shape = S.Masked(27), (4, 24)
    m = torch.randn(4, 24, 27, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m + 0.1 * x[..., None]

    def drawn(**options: object) -> Tensor:
        return fd.sample(model, solvers.unmask(schedule, 6, **options), shape, seed=0)  # type: ignore[arg-type]

    assert torch.equal(drawn(top_p=1e-6), drawn(temperature=0.0))
    assert torch.equal(drawn(top_p=1.0), drawn()) and not torch.equal(drawn(top_p=0.5), drawn())
    assert torch.equal(drawn(top_p=[1.0] * 6), drawn()) and not torch.equal(drawn(top_p=[1.0] * 5 + [0.1]), drawn())
    assert "of its likeliest classes, which hold c_out" in str(solvers.unmask(schedule, 6, top_p=0.9))


def test_what_one_would_write() -> None:
    """The benchmark's loop in plain torch draws from the same classes, as often. Four standard deviations of both."""
    p, shape = torch.tensor([0.1, 0.35, 0.08, 0.4, 0.07]), (4, 2000)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return p.log().expand(*shape, 5)

    plan = solvers.unmask(S.Masked(5), 2, top_p=0.8)
    loop = TokensTextbook(plan, model)(torch.full(shape, 5))
    ours = fd.sample(model, plan, shape, seed=0)
    assert set(ours.unique().tolist()) == set(loop.unique().tolist()) == {0, 1, 3}
    for k in (0, 1, 3):
        a, b = (float((v == k).float().mean()) for v in (ours, loop))
        assert abs(a - b) <= 4 * math.sqrt(2 * a * (1 - a) / ours.numel())


@pytest.mark.parametrize("top_p", [0.0, 1.5, -0.1, math.nan, "0.9", [0.5, 0.5]])
def test_refusals(top_p: object) -> None:
    with pytest.raises(ValueError, match="top_p must be"):
        solvers.unmask(S.Masked(27), 6, top_p=top_p)  # type: ignore[arg-type]
