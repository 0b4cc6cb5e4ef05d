"""unmask_step: kernel and CPU against a token-by-token oracle in float64, probabilities, order and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops, rng
from fastdiff.gumbel import gumbel_of
from fastdiff.ops.unmask_step import CHOICE, WINDOW, uniforms, windows
from fastdiff.plan import ROW_HEADER, row_width
from fastdiff.readout import ORDERS

B = 3
SEEDS, INDEX = rng.keys(5, batch=B)


@pytest.fixture
def device(device_of_loops: torch.device) -> torch.device:
    return device_of_loops


def table(
    *rows: tuple[float, float, float, float], c_skip: float = 0.0, hi: float = math.inf, c_out: float = 1.0
) -> Tensor:
    """Rows (A, b, d, s): keep, unmask, block, temperature; the scale of a score's noise, the score that is enough, the
    share of a nucleus."""
    made = torch.zeros(len(rows), row_width(1))
    made[:, ROW_HEADER : ROW_HEADER + 4] = torch.tensor(rows)
    made[:, 0], made[:, 1], made[:, 3] = c_skip, c_out, hi
    return made


ROWS = table((1.0, 0.5, 0, 1.0), (0.7, 0.4, 0, 0.0), (0.9, 0.6, 1, 0.7), (1.0, 1.0, 0, 1.0))


def case(K: int, length: int, mask: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of which two thirds are masked, their blocks, logits and others."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, K, (B, length), generator=g)
    tokens[torch.rand(B, length, generator=g) < 0.67] = mask
    group = torch.randint(-1, 2, (B, length), generator=g, dtype=torch.int32)
    m, u = (3 * torch.randn(B, length, K, generator=g) for _ in range(2))
    return tokens, group, m, u


def words(stream: int, row: int, sample: int, first: int, many: int) -> Tensor:
    """Philox words of `many` counters of a sample."""
    key = [torch.tensor(int(SEEDS[sample]) >> s & rng.MASK) for s in (0, 32)]
    at = (torch.tensor(v) for v in (row, stream, int(INDEX[sample])))
    return torch.stack(rng.philox(first + torch.arange(many), *at, *key), -1).flatten()


def noise_of_scores(row: int, sample: int, length: int) -> Tensor:
    """Gumbel numbers of stream 5, one a token."""
    return gumbel_of(words(CHOICE, row, sample, 0, -(-length // 4))[:length]).double()


def winner(z: Tensor, s: float, row: int, sample: int, d: int) -> int:
    """The class of token d: groups of 16 of its classes race, the running sum of the first one's reaches a share."""
    K = len(z)
    shift = d * K % 4
    groups = math.ceil((K + max(j * K % 4 for j in range(4))) / 16)
    counters = groups // 4 + 1
    drawn = words(2, row, sample, d * counters, counters).double() * 2.0**-32 + 2.0**-33
    share = ((z - z.max()) / s).exp()
    group = torch.tensor([(k + shift) // 16 for k in range(K)])
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, share)
    first = int((sums / -torch.log1p(-drawn[:groups])).argmax())
    members = (group == first).nonzero()[:, 0].tolist()
    so_far = 0.0
    for k in members:
        so_far += float(share[k])
        if so_far >= float(drawn[groups] * sums[first]):
            return k
    raise AssertionError("a share is at most 1")


def likeliest(z: Tensor, s: float, share: float) -> Tensor:
    """z without the classes that are not among the likeliest that hold a share: those above them hold it already."""
    p = torch.softmax(z / s, 0)
    return torch.stack([v if share == 1 or p[z > v].sum() < share else torch.tensor(-math.inf) for v in z])


def oracle(tokens: Tensor, m: Tensor, rows: Tensor, row: list[int], mask: int, order: str, group: Tensor) -> Tensor:
    """One token after the other, in Python's own numbers, from the definition."""
    length, K = m.shape[1:]
    new = tokens.clone()
    at = torch.tensor(row)
    u = uniforms(SEEDS, INDEX, at, CHOICE, length)
    for i in range(B):
        keep, unmask, block, s = rows[row[i], ROW_HEADER : ROW_HEADER + 4].tolist()
        heat, hi = float(rows[row[i], 0]), float(rows[row[i], 3])
        shake = noise_of_scores(row[i], i, length)
        scores: dict[int, float] = {}
        classes: dict[int, int] = {}
        for d in range(length):
            if group[i, d] != block:
                continue
            if tokens[i, d] != mask:
                if order == "random" and u[i, d] > keep:
                    new[i, d] = mask
                continue
            z = m[i, d].double().clone()
            if mask < K:
                z[mask] = -math.inf
            if z.isnan().any() or bool((z == -math.inf).all()):
                k = mask
            else:
                share = float(rows[row[i], 1])
                k = winner(likeliest(z, s, share), s, row[i], i, d) if s else int(z.argmax())
            classes[d] = k
            if k == mask:
                scores[d] = -1e300
                continue
            p = torch.softmax(z, 0)
            two = p.topk(2).values
            scores[d] = {
                "random": 0.0,
                "confidence": float(p[k].log() - (0 if heat else torch.log1p(-p[k]))),
                "margin": float((two[0] - two[1]).log() - (0 if heat else torch.log1p(two[1] - two[0]))),
                "entropy": float(torch.special.xlogy(p, p).sum()),
            }[order] + heat * float(shake[d])
        if order == "random":
            for d, k in classes.items():
                if u[i, d] <= unmask:
                    new[i, d] = k
            continue
        left = torch.tensor(float(len(scores))) * (1 - rows[row[i], ROW_HEADER + 1] + 2.0**-21)  # in fp32
        many = len(scores) - math.floor(float(left))
        before = 0.0
        for place, d in enumerate(sorted(scores, key=lambda d: (-scores[d], d))):
            sure = before >= hi if order == "entropy" else scores[d] > hi
            before += min(scores[d], 0.0)
            if place < many or sure:
                new[i, d] = classes[d]
    return new


def run(device: torch.device, tokens: Tensor, m: Tensor, rows: Tensor, row: Tensor, **options: Any) -> Tensor:
    """unmask_step on a device; the copies for the model are what the tokens are, whatever was there."""
    here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    got = tokens.clone().to(device)
    seen = torch.full_like(got.repeat(2, 1), -7)
    keys = {"seeds": SEEDS.to(device), "index": INDEX.to(device)}
    ops.unmask_step(got, m.to(device), rows.to(device), row.to(device), model_in=seen, **keys, **here)
    assert torch.equal(seen, got.repeat(2, 1))
    return got.cpu()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("K", "mask"), [(2, 2), (3, 0), (5, 5), (27, 26), (32, 32), (1000, 7)])
def test_against_the_definition(K: int, mask: int, order: str, device: torch.device) -> None:
    tokens, group, m, _ = case(K, 13, mask)
    m[0, :2], m[1, 3:5], m[2, 1, 0] = math.nan, -math.inf, math.nan
    for row in ([0, 0, 0], [1, 1, 1], [2, 0, 3]):
        want = oracle(tokens, m, ROWS, row, mask, order, group)
        at = torch.tensor(row[:1] if len(set(row)) == 1 else row, dtype=torch.int32)
        got = run(device, tokens, m, ROWS, at, mask=mask, order=order, group=group)
        assert torch.equal(got, want), row
        assert not torch.equal(got, tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("K", [WINDOW + 1, 20_004])
def test_tokens_of_several_windows(K: int, order: str, device: torch.device) -> None:
    assert windows(K, 4).pieces > 1
    tokens, group, m, _ = case(K, 4, K, seed=1)
    tokens[0], group[0] = K, 0
    m[:, 2, -1] += 30  # in the last window
    m[0, 1, 5] = math.nan  # in the first
    want = oracle(tokens, m, ROWS, [0, 3, 0], K, order, group)
    got = run(device, tokens, m, ROWS, torch.tensor([0, 3, 0]), mask=K, order=order, group=group)
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_scores_do_not_depend_on_where_the_largest_is(order: str, device: torch.device) -> None:
    """Surer and surer tokens, every second one back to front: the largest in the first window or in the last."""
    z = torch.randn(WINDOW + 1, generator=torch.Generator().manual_seed(4)).sort().values
    m = torch.stack([(3 + 0.1 * i) * (z.flip(0) if i % 2 else z) for i in range(8)]).expand(B, 8, -1).contiguous()
    tokens = torch.full((B, 8), WINDOW + 1)
    rows = table((1.0, 0.5, 0, 0.0))
    got = run(device, tokens, m, rows, torch.tensor([0]), mask=WINDOW + 1, order=order)
    assert (got != WINDOW + 1).tolist() == [[False] * 4 + [True] * 4] * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_and_layouts(dtype: torch.dtype, device: torch.device) -> None:
    """Both outputs in the model's dtype, padded rows or transposed: the definition on the combined logits."""
    K, w = 27, torch.tensor([[1.5, 0.5, 2.0]])
    tokens, group, m, u = case(K, 11, K)
    m, u = m.to(dtype), u.to(dtype)
    combined = u.double() + w.double().view(-1, 1, 1) * (m.double() - u.double())
    padded = torch.zeros(B, 11, 32, dtype=dtype)[..., :K].copy_(m)
    crossed = u.transpose(0, 1).contiguous().transpose(0, 1)
    for order in ORDERS:
        want = oracle(tokens, combined, ROWS, [0, 0, 0], K, order, group)
        for a, b in ((m, u), (padded, crossed)):
            given = {"uncond": b, "guidance": w, "group": group, "mask": K, "order": order}
            assert torch.equal(run(device, tokens, a, ROWS, torch.tensor([0]), **given), want)


def test_a_class_forbidden_by_both_stays_forbidden(device: torch.device) -> None:
    tokens, m = torch.full((B, 40), 4), torch.zeros(B, 40, 4)
    m[..., 1] = -math.inf
    got = run(device, tokens, m, ROWS, torch.tensor([3]), mask=4, uncond=m.clone(), guidance=torch.tensor([2.0]))
    assert set(got.flatten().tolist()) == {0, 2, 3}


def test_weights_by_row(device: torch.device) -> None:
    tokens, _, m, u = case(5, 11, 5)
    w = torch.tensor([[0.0], [3.0], [1.0], [1.0]]).expand(4, B).contiguous()
    got = run(device, tokens, m, ROWS, torch.tensor([1]), mask=5, order="margin", uncond=u, guidance=w)
    want = run(device, tokens, u + 3 * (m - u), ROWS, torch.tensor([1]), mask=5, order="margin")
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_order_of_sure_tokens(order: str, device: torch.device) -> None:
    """Tokens whose probabilities differ by 1e-9 only, all near 1, are still told apart; equals go by position."""
    K, length = 3, 12
    gaps = 20.0 + torch.tensor([3.0, 9, 1, 7, 7, 2, 8, 0, 5, 7, 4, 6]) / 10
    m = torch.stack([gaps, torch.zeros(length), torch.full((length,), -40.0)], -1).expand(B, length, K).contiguous()
    tokens = torch.full((B, length), K)
    got = run(device, tokens, m, table((1.0, 0.25, 0, 0.0)), torch.tensor([0]), mask=K, order=order)
    first = sorted(range(length), key=lambda d: (-float(gaps[d]), d))[:3]
    assert (got != K)[0].nonzero()[:, 0].tolist() == sorted(first) == [1, 3, 6]
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_many_tokens_rank_exactly(order: str, device: torch.device) -> None:
    K, length = 2, 300
    tokens, _, m, _ = case(K, length, K)
    group = torch.zeros_like(tokens, dtype=torch.int32)
    for b in (0.0, 0.3, 1.0):
        rows = table((1.0, b, 0, 0.0))
        got = run(device, tokens, m, rows, torch.tensor([0]), mask=K, order=order, group=group)
        assert torch.equal(got, oracle(tokens, m, rows, [0] * B, K, order, group))
        masked = (tokens == K).sum(1)
        assert torch.equal((got == K).sum(1), torch.tensor([math.floor(n * (1 - b) + 1e-9) for n in masked.tolist()]))


@pytest.mark.parametrize(("M", "rows"), [(9, 3), (24, 3), (33, 11), (66, 11)])
def test_shares_that_fp32_rounds(M: int, rows: int, device: torch.device) -> None:
    """1 - 1/3 in fp32 is less than 2/3: of 9 tokens a third is still 3."""
    m = torch.randn(B, M, 2, generator=torch.Generator().manual_seed(6))
    got = run(
        device, torch.full((B, M), 2), m, table((1.0, 1 / rows, 0, 0.0)), torch.tensor([0]), mask=2, order="margin"
    )
    assert ((got != 2).sum(1) == M // rows).all()


@pytest.mark.parametrize("order", ORDERS[1:])
def test_infinite_logits_are_the_surest(order: str, device: torch.device) -> None:
    """fp16 that overflowed, or a class that is forced; NaN is the least sure and stays masked."""
    m = torch.randn(B, 8, 3, generator=torch.Generator().manual_seed(5))
    m[:, 2, 1:], m[:, 5, 0], m[:, 6] = math.inf, math.inf, math.nan  # of several the first
    tokens = torch.full((B, 8), 3)
    for b, chosen in ((0.25, [2, 5]), (1.0, [0, 1, 2, 3, 4, 5, 7])):
        got = run(device, tokens, m, table((1.0, b, 0, 1.0)), torch.tensor([0]), mask=3, order=order)
        assert [(row != 3).nonzero()[:, 0].tolist() for row in got] == [chosen] * B
        assert (got[:, 2] == 1).all() and (got[:, 5] == 0).all()


def test_entropies_near_zero_are_told_apart(device: torch.device) -> None:
    """1.0646e-6 and 1.0577e-6 nats."""
    rare = math.log(2.9e-8)
    m = torch.tensor([[0, rare, rare, -60.0], [0, math.log(6e-8), -60.0, -60.0]]).expand(B, 2, 4).contiguous()
    tokens = torch.full((B, 2), 4)
    got = run(device, tokens, m, table((1.0, 0.5, 0, 0.0)), torch.tensor([0]), mask=4, order="entropy")
    assert got.tolist() == [[4, 0]] * B


def test_more_tokens_than_fp32_counts(cpp_loops: None) -> None:
    """Of 2^24 + 3 tokens a row with b = 0 takes none."""
    tokens = torch.full((1, 2**24 + 3), 2)
    ops.unmask_step(tokens, torch.zeros(1, 1, 2).expand(1, 2**24 + 3, 2), table((1.0, 0.0, 0, 0.0)), torch.tensor([0]),
                    mask=2, order="confidence", seeds=SEEDS[:1])  # fmt: skip
    assert bool((tokens == 2).all())


@pytest.mark.parametrize("mask", [7, 60_000])
def test_a_mask_far_beyond_the_classes(mask: int, device: torch.device) -> None:
    for order in ORDERS:
        tokens, group, m, _ = case(5, 13, 5)
        want = run(device, tokens, m, ROWS, torch.tensor([0]), mask=5, order=order, group=group)
        far = torch.where(tokens == 5, mask, tokens)
        got = run(device, far, m, ROWS, torch.tensor([0]), mask=mask, order=order, group=group)
        assert torch.equal(torch.where(got == mask, 5, got), want)


def test_batch_and_position_do_not_matter(device: torch.device) -> None:
    tokens, group, m, _ = case(27, 11, 27)
    for order in ORDERS:
        whole = run(device, tokens, m, ROWS, torch.tensor([0]), mask=27, order=order, group=group)
        for i in range(B):
            one = tokens[i : i + 1].clone().to(device)
            keys = {"seeds": SEEDS[i : i + 1].to(device), "index": INDEX[i : i + 1].to(device)}
            ops.unmask_step(one, m[i : i + 1].to(device), ROWS.to(device), torch.tensor([0], device=device), mask=27,
                            order=order, group=group[i : i + 1].to(device), **keys)  # fmt: skip
            assert torch.equal(one.cpu()[0], whole[i])


def test_offsets_of_64_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.ops._categorical import Rows

    tokens, group, m, u = case(5, 11, 5)
    given = {"mask": 5, "group": group, "uncond": u, "guidance": torch.tensor([1.5])}
    want = [run(device, tokens, m, ROWS, torch.tensor([0]), order=order, **given) for order in ORDERS]
    monkeypatch.setattr(Rows, "reach", lambda *_: 2**31)
    got = [run(device, tokens, m, ROWS, torch.tensor([0]), order=order, **given) for order in ORDERS]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_reference_compiles_to_what_runs() -> None:
    tokens, group, m, _ = case(27, 11, 27)
    for order in ORDERS:
        want = run(torch.device("cpu"), tokens, m, ROWS, torch.tensor([0]), mask=27, order=order, group=group)
        given = {"mask": 27, "order": order, "group": group, "seeds": SEEDS, "index": INDEX}
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(ops.unmask_step_ref(tokens, m, ROWS, torch.tensor([0]), dtype=dtype, **given), want)


def test_shapes_of_several_axes_and_none(device: torch.device) -> None:
    tokens, _, m, _ = case(5, 12, 5)
    flat = run(device, tokens, m, ROWS, torch.tensor([0]), mask=5)
    got = tokens.view(B, 3, 4).clone().to(device)
    keys = {"seeds": SEEDS.to(device), "index": INDEX.to(device)}
    ops.unmask_step(
        got, m.view(B, 3, 4, 5).to(device), ROWS.to(device), torch.tensor([0], device=device), mask=5, **keys
    )
    assert torch.equal(got.cpu().view(B, 12), flat)
    none = torch.zeros(0, 4, dtype=torch.int64, device=device)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    logits = torch.zeros(0, 4, 5, device=device)
    ops.unmask_step(none, logits, ROWS.to(device), torch.tensor([0], device=device), mask=5, seeds=empty)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"tokens": torch.zeros(B, 11)}, TypeError, "tokens must be int64"),
        ({"tokens": torch.zeros(11, dtype=torch.int64)}, ValueError, r"tokens must be \[B, \*D\]"),
        ({"tokens": torch.zeros(11, B, dtype=torch.int64).T}, ValueError, "must be contiguous"),
        ({"model_out": torch.zeros(B, 10, 5)}, ValueError, r"and K >= 2 logits, got \(3, 10, 5\)"),
        ({"model_out": torch.zeros(B, 11, 5, dtype=torch.float64)}, TypeError, "model_out must be"),
        ({"order": "best"}, ValueError, "unknown order 'best'; valid: random, confidence"),
        ({"mask": -1}, ValueError, r"mask must be an integer in 0..2\*\*31 - 1, got -1"),
        ({"row": 2}, TypeError, r"row must be an int Tensor \[1\] or \[B\], got int"),
        ({"mask": True}, ValueError, "got True"),
        ({"table": torch.zeros(4, 8)}, ValueError, r"table must be \[N, 16\]"),
        ({"row": torch.tensor([4])}, ValueError, r"row must be in 0..3, got 4..4"),
        ({"uncond": torch.zeros(B, 11, 5)}, ValueError, "guidance is None"),
        ({"guidance": torch.ones(1)}, ValueError, "uncond is None"),
        ({"group": torch.zeros(B, 11, dtype=torch.int64)}, TypeError, "group must be int32"),
        ({"seeds": None}, ValueError, "needs seeds, got None"),
        ({"seeds": SEEDS[:2]}, ValueError, r"seeds must have shape \(3,\)"),
        ({"model_in": torch.zeros(B, 11)}, TypeError, "model_in must be int64"),
        ({"model_in": torch.zeros(4, 11, dtype=torch.int64)}, ValueError, r"model_in must be \(3, 11\) or \(6, 11\)"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], said: str) -> None:
    tokens, _, m, _ = case(5, 11, 5)
    given: dict[str, Any] = {"tokens": tokens, "model_out": m, "table": ROWS, "row": torch.tensor([0])}
    given = {**given, "mask": 5, "seeds": SEEDS, **change}
    placed = [given.pop(name) for name in ("tokens", "model_out", "table", "row")]
    with pytest.raises(error, match=said):
        ops.unmask_step(*placed, **given)
