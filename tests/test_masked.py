"""Masked diffusion: its schedule, its plans, what they sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.readout import ORDERS

K, L = 5, 12
SCHEDULE = S.Masked(K)
KINDS = [S.Masked(K), S.Masked(K, 2, "cosine"), S.Masked(K, kind="polynomial", power=2.5)]
P = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.01], [0.04, 0.05, 0.20]])  # of two tokens


def independent(x: Tensor, t: Tensor) -> Tensor:
    assert x.dtype == torch.int64
    return P.log().expand(*x.shape, K)


def network(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Logits that depend on the neighbours, the time and a condition."""
    seen = torch.nn.functional.one_hot(x, K + 1).float() @ torch.linspace(-1, 1, K + 1)
    ramp = torch.arange(K, device=x.device) / K
    mixed = seen.roll(1, -1) + 0.5 * seen.roll(-1, -1) + t.view(-1, 1)
    given = torch.as_tensor(shift, device=x.device).view(-1, 1, 1)
    return 2 * torch.sin(3 * mixed[..., None] + 4 * ramp) + given * ramp


def of_joint(x: Tensor, t: Tensor) -> Tensor:
    """The exact conditionals of two tokens with the distribution JOINT; 3 is the mask."""
    p = JOINT.to(x.device)
    one, two = x[:, 0], x[:, 1]
    rows = torch.cat([p, p.sum(0, keepdim=True)])[one]  # of the second, given the first
    columns = torch.cat([p, p.sum(1, keepdim=True)], 1).T[two]
    return torch.stack([columns, rows], 1).log()


def mixing_network(sharp: float, size: int, mask: int, prompt: int) -> tuple[Callable[..., Tensor], Tensor]:
    """A network that mixes tokens, and where it starts: a prompt, then `size` masked ones; classes are 0..mask."""
    g, length = torch.Generator().manual_seed(6), prompt + size
    embedding, out = torch.randn(mask + 1, 16, generator=g), sharp * torch.randn(16, mask + 1, generator=g)
    mixing = 0.3 * torch.randn(length, length, generator=g)

    def net(x: Tensor, t: Tensor | None = None) -> Tensor:
        h = embedding[x]
        return torch.tanh(h + torch.einsum("lm,bmd->bld", mixing, h)) @ out

    x_T = torch.full((1, length), mask)
    x_T[:, :prompt] = torch.randint(0, mask, (1, prompt), generator=g)
    return net, x_T


def near(share: float, p: float, of: int) -> bool:
    return abs(share - p) <= 4 * math.sqrt(p * (1 - p) / of)


def test_a_temperature_for_every_row() -> None:
    heat = np.linspace(1, 0, 6)
    plan = solvers.unmask(SCHEDULE, 6, temperature=heat)
    assert np.array_equal(plan.s[:, 0], heat)
    x, kept = fd.sample(network, plan, (64, L), seed=3, trajectory=True)
    last = kept.x[-2] == K  # what the last row, at 0, makes its largest
    assert torch.equal(x[last], network(kept.x[-2], torch.full((64,), plan.times[-1])).argmax(-1)[last])


def test_sure_tokens_first_is_a_bias() -> None:
    """docs/tokens.md: the class with 0.3 takes 78 % of 16 places in eight rows."""
    x = fd.sample(independent, solvers.unmask(SCHEDULE, 8, order="confidence"), (1000, 16), seed=0)
    assert abs(float((x == 2).float().mean()) - 0.78) < 0.015


@pytest.mark.parametrize("mask", [K, 2])
@pytest.mark.parametrize(
    "options", [{}, {"remask": 1.0, "remask_most": 0.1}, {"blocks": 4}, {"temperature": 0.5}], ids=repr
)
def test_independent_tokens_have_their_distribution(options: dict[str, Any], mask: int) -> None:
    check_distribution(options, mask, (10, 1200))


def test_kernels_give_independent_tokens_their_distribution(kernel_device: torch.device) -> None:
    check_distribution({"remask": 0.3, "blocks": 2}, 2, (2, 1200))


def check_distribution(options: dict[str, Any], mask: int, shape: tuple[int, int]) -> None:
    plan = solvers.unmask(S.Masked(K, mask), 8, **options)
    x = fd.sample(independent, plan, shape, seed=1)
    assert x.dtype == torch.int64
    p = P.double() ** (1 / options.get("temperature", 1.0))
    p[mask:][:1] = 0
    p /= p.sum()
    for k in range(K):
        assert near(float((x == k).float().mean()), float(p[k]), x.numel()), k


@pytest.mark.parametrize(
    ("steps", "options", "joint"),
    [(2, {"blocks": 2}, True), (1, {}, False), (1, {"order": "entropy"}, False), (256, {}, True)],
)
def test_two_tokens_have_their_joint_distribution(steps: int, options: dict[str, Any], joint: bool) -> None:
    """One after the other exactly; both in one step, as the product of the marginals. In 256 steps they rarely meet."""
    n = 10_000
    x = fd.sample(of_joint, solvers.unmask(S.Masked(3), steps, **options), (n, 2), seed=2)
    want = JOINT if joint else JOINT.sum(1, keepdim=True) * JOINT.sum(0)
    for i, j in itertools.product(range(3), range(3)):
        share = float(((x[:, 0] == i) & (x[:, 1] == j)).float().mean())
        assert near(share, float(want[i, j]), n), (i, j)
    assert float((JOINT - JOINT.sum(1, keepdim=True) * JOINT.sum(0)).abs().min()) > 0.01


def test_how_many_are_masked_after_each_row() -> None:
    n = 400
    for order in ORDERS:
        plan = solvers.unmask(S.Masked(K, kind="cosine"), 6, order=order)
        x, kept = fd.sample(network, plan, (n, L), seed=3, trajectory=True)
        masked = (kept.x == K).sum(-1)
        assert kept.x.dtype == kept.x0.dtype == torch.int64 and torch.equal(kept.x[-1], x)
        assert torch.equal(kept.x[1:], kept.x0) and bool((kept.x[0] == K).all())
        gone = np.append(plan.sigma, 0)
        if order == "random":
            assert all(
                near(float(m.float().mean() / L), g, n * L) for m, g in zip(masked[1:-1], gone[1:-1], strict=True)
            )
            continue
        count = float(L)
        for k in range(plan.nfe):
            count = math.floor(count * (1 - plan.b[k, 0]) + 1e-9)
            assert bool((masked[k + 1] == count).all()), (order, k)
        assert count == 0
        was, now = kept.x[:-1], kept.x[1:]
        assert bool(((was == now) | (was == K)).all())  # what is unmasked stays


def test_blocks_go_from_left_to_right() -> None:
    plan = solvers.unmask(SCHEDULE, 6, blocks=3, order="confidence")
    x_T = torch.full((2, L), K)
    x_T[:, [1, 6, 7]] = torch.tensor([4, 0, 3])
    x_T[1, 11] = 1  # 9 masked tokens, and 8
    _, kept = fd.sample(network, plan, (2, L), seed=4, x_T=x_T, trajectory=True)
    for i, count in ((0, 9), (1, 8)):
        places = (x_T[i] == K).nonzero()[:, 0]
        groups = [places[torch.arange(count) * 3 // count == g] for g in range(3)]
        for g in range(3):
            done = kept.x[2 * (g + 1), i]
            assert bool((done[torch.cat(groups[: g + 1])] != K).all())
            assert all(bool((done[later] == K).all()) for later in groups[g + 1 :])
        assert torch.equal(kept.x[-1, i][x_T[i] != K], x_T[i][x_T[i] != K])


@pytest.mark.parametrize(("steps", "block"), [(24, 24), (12, 24), (12, 12), (24, 8), (4, 12)])
def test_low_confidence_remasking_by_hand(steps: int, block: int) -> None:
    """LLaDA's loop, block by block: every step the same number of the surest tokens becomes the likeliest classes."""
    size, mask, prompt = 24, 49, 5
    net, x = mixing_network(1.0, size, mask, prompt)
    x_T, each = x.clone(), steps * block // size
    for begin in range(prompt, prompt + size, block):
        for _ in range(each):
            logits = net(x).double()
            logits[..., mask] = -torch.inf
            p, k = logits.softmax(-1).max(-1)
            p[x != mask] = -1
            p[:, begin + block :] = -1
            surest = p[0].topk(block // each).indices
            x[0, surest] = k[0, surest]
    plan = solvers.unmask(S.Masked(50, mask), steps, order="confidence", temperature=0.0, blocks=size // block)
    assert torch.equal(fd.sample(net, plan, tuple(x.shape), x_T=x_T), x)


def test_what_is_given_stays() -> None:
    x_T = torch.full((64, L), K)
    x_T[:, ::3] = torch.arange(4)
    for options in ({"remask": 1.0}, {"order": "margin"}, {"blocks": 2, "remask": 0.5}):
        x = fd.sample(network, solvers.unmask(SCHEDULE, 8, **options), (64, L), seed=5, x_T=x_T)
        assert torch.equal(x[:, ::3], x_T[:, ::3]) and bool((x < K).all())
    whole = torch.zeros(2, L, dtype=torch.int64)
    assert torch.equal(fd.sample(network, solvers.unmask(SCHEDULE, 4), (2, L), x_T=whole), whole)


def test_from_the_middle() -> None:
    """x_init is masked as the first row expects; what is not masked stays."""
    plan = solvers.unmask(SCHEDULE, 10, start=6)
    assert plan.nfe == 4 and np.allclose(plan.sigma, [0.4, 0.3, 0.2, 0.1])
    x_init = torch.randint(0, K, (500, L), generator=torch.Generator().manual_seed(0))
    x, kept = fd.sample(independent, plan, (500, L), seed=6, x_init=x_init, trajectory=True)
    masked = kept.x[0] == K
    assert near(float(masked.float().mean()), 0.4, 500 * L)
    assert torch.equal(kept.x[0][~masked], x_init[~masked]) and torch.equal(x[~masked], x_init[~masked])
    again = fd.sample(independent, plan, (1, L), seed=6, first=7, x_init=x_init[7:8])
    assert torch.equal(again[0], x[7])


@pytest.mark.parametrize("order", ORDERS)
def test_every_way_gives_the_same_tokens(order: str, device: torch.device) -> None:
    plan = solvers.unmask(SCHEDULE, 6, order=order, blocks=2)
    shift = {"shift": torch.full((3,), 0.5)}, {"shift": torch.zeros(3)}
    guided = {"cond": shift[0], "uncond": shift[1], "guidance": 2.0}
    want = fd.sample(network, plan, (3, L), seed=7)
    for mode in ("auto", "eager"):
        sampler = fd.Sampler(network, plan, mode=mode, check_finite="raise")
        assert all(torch.equal(sampler((3, L), seed=7), want) for _ in range(2))
    assert torch.equal(fd.sample(network, plan, (1, L), seed=7, first=2)[0], want[2])
    assert torch.equal(fd.sample(network, plan, (3, L), seeds=[1, 7, 9])[1], want[0])
    assert torch.equal(fd.sample(network, plan, (3, L), seed=7, out_dtype=torch.int64), want)
    both = [fd.sample(network, plan, (3, L), seed=7, batched_guidance=b, **guided) for b in (True, False)]
    assert torch.equal(*both) and not torch.equal(both[0], want)
    flat, two = (fd.sample(independent, plan, (3, *size), seed=7) for size in ((L,), (2, L // 2)))
    assert two.shape == (3, 2, L // 2) and torch.equal(two.view(3, L), flat)


def test_guidance_combines_the_logits() -> None:
    plan = solvers.unmask(SCHEDULE, 4, order="entropy")
    cond, uncond = {"shift": torch.ones(2)}, {"shift": torch.zeros(2)}
    got = fd.sample(network, plan, (2, L), seed=8, cond=cond, uncond=uncond, guidance=3.0)
    want = fd.sample(lambda x, t: network(x, t) + 3 * (network(x, t, 1.0) - network(x, t)), plan, (2, L), seed=8)
    assert torch.equal(got, want)


@pytest.mark.compiled
def test_compiled_model() -> None:
    plan = solvers.unmask(SCHEDULE, 4, order="confidence")
    got = fd.sample(network, plan, (2, L), seed=9, mode="compile")
    assert torch.equal(got, fd.sample(network, plan, (2, L), seed=9))


def test_half_precision_network() -> None:
    plan = solvers.unmask(SCHEDULE, 4)
    net = torch.nn.Sequential(torch.nn.Embedding(K + 1, 8), torch.nn.Linear(8, K)).bfloat16()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    x = fd.sample(Net(), plan, (2, L), seed=9)
    assert x.dtype == torch.int64 and torch.equal(x, fd.sample(lambda x, t: net(x).float(), plan, (2, L), seed=9))


def test_callbacks_edit_tokens() -> None:
    plan, rows = solvers.unmask(SCHEDULE, 5, order="margin"), []

    def edit(row: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        rows.append((row, float(t[0]), x.dtype, torch.equal(x, x0)))
        if row == 4:
            return torch.where(x == 0, 1, x)
        x[:, 0] = 3  # in place
        return None

    x = fd.sample(network, plan, (2, L), seed=10, callback=edit)
    assert [r[0] for r in rows] == list(range(5)) and all(r[2:] == (torch.int64, True) for r in rows)
    assert bool((x[:, 0] == 3).all()) and not bool((x == 0).any())


def test_a_model_that_fails_is_seen() -> None:
    plan = solvers.unmask(SCHEDULE, 4)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        m = network(x, t)
        m[:, 3] = torch.nan
        return m

    x = fd.sample(broken, plan, (2, L), seed=11)
    assert bool((x[:, 3] == K).all()) and bool((x[:, 4:] < K).all())  # it stays masked
    with pytest.raises(ValueError, match="first at row 0 of 4"):
        fd.sample(broken, plan, (2, L), seed=11, check_finite="raise")
    with pytest.raises(ValueError, match=r"must return logits \[B, \*D, K\], \(2, 12, 5\), got \(2, 12, 6\)"):
        fd.sample(lambda x, t: torch.zeros(*x.shape, 6), plan, (2, L))


@pytest.mark.parametrize("where", ["all forbidden", "uncond NaN", "uncond forbidden"])
def test_tokens_that_stay_masked_are_reported(where: str) -> None:
    def broken(x: Tensor, t: Tensor, on: Tensor) -> Tensor:
        m = network(x, t)
        bad = {"all forbidden": on * 0 == 0, "uncond NaN": on == 0, "uncond forbidden": on == 0}[where].view(-1, 1, 1)
        here = torch.arange(L).view(1, -1, 1) == 3
        if where == "uncond forbidden":
            here = here & (torch.arange(K) == 1)
        return torch.where(bad & here, torch.nan if where == "uncond NaN" else -torch.inf, m)

    given = {"cond": {"on": torch.ones(2)}, "uncond": {"on": torch.zeros(2)}, "guidance": 1.5}
    x = fd.sample(broken, PLAN, (2, L), seed=12, **given)
    assert bool((x[:, 3] == K).all()) and bool((x[:, 4:] < K).all())
    row = 0 if where == "uncond NaN" else 3
    with pytest.raises(ValueError, match=f"first at row {row} of 4"):
        fd.sample(broken, PLAN, (2, L), seed=12, check_finite="raise", **given)


def test_a_callback_may_mask_again() -> None:
    """In any block, and what was given: it is unmasked by the rows that are left."""
    x_T = torch.full((2, L), K)
    x_T[:, 0] = 4

    def again(row: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        if row == 3:
            x[:, :2] = K

    for order in ("random", "entropy"):
        plan = solvers.unmask(SCHEDULE, 6, blocks=3, order=order)
        x = fd.sample(network, plan, (2, L), seed=13, x_T=x_T, callback=again)
        assert bool((x < K).all())
    with pytest.raises(ValueError, match="a callback left 105 among the tokens, which are 0..4 or the mask, 5"):
        fd.sample(network, PLAN, (2, L), callback=lambda row, t, x, x0: x + 100)


def test_an_empty_batch() -> None:
    x, kept = fd.sample(network, solvers.unmask(SCHEDULE, 4), (0, L), trajectory=True)
    assert x.shape == (0, L) and x.dtype == kept.x.dtype == torch.int64 and kept.x.shape == (5, 0, L)


TOKENS = torch.zeros(2, L, dtype=torch.int64)
PLAN = solvers.unmask(SCHEDULE, 4)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: S.Masked(1), ValueError, "num_classes must be >= 2, got 1"),
        (lambda: S.Masked(2.0), TypeError, "num_classes must be an integer, got 2.0"),
        (lambda: S.Masked(4, -2), ValueError, "mask must be in 0..2.*, got -2"),
        (lambda: S.Masked(4, kind="sine"), ValueError, "unknown kind 'sine'; valid: linear, cosine, polynomial"),
        (lambda: S.Masked(4, power=2.0), ValueError, "power belongs to kind 'polynomial'"),
        (lambda: S.Masked(4, kind="polynomial", power=0), ValueError, "power must be a finite number > 0"),
        (lambda: SCHEDULE.alpha(1.1), ValueError, r"t must be in \[0, 1\] for Masked"),
        (lambda: solvers.unmask(S.VP(), 4), TypeError, "unmask needs a schedule of type Masked, got VP"),
        (lambda: solvers.ddim(SCHEDULE, 4), TypeError, "got Masked"),
        (lambda: solvers.unmask(SCHEDULE, 0), ValueError, "steps must be >= 1"),
        (lambda: solvers.unmask(SCHEDULE, 4, order="best"), ValueError, "unknown order 'best'; valid: random"),
        (
            lambda: solvers.unmask(SCHEDULE, 4, temperature=-1),
            ValueError,
            r"temperature must be a number >= 0, or 4 of them",
        ),
        (lambda: solvers.unmask(SCHEDULE, 4, remask=1.5), ValueError, r"remask must be a number in \[0, 1\], got 1.5"),
        (
            lambda: solvers.unmask(SCHEDULE, 4, remask=0.1, order="margin"),
            ValueError,
            "remask goes with order 'random'",
        ),
        (lambda: solvers.unmask(SCHEDULE, 5, blocks=2), ValueError, "steps must be a multiple of blocks, got 5 and 2"),
        (lambda: solvers.unmask(SCHEDULE, 4, start=4), ValueError, "start must be < steps, 4"),
        (lambda: solvers.unmask(SCHEDULE, 4, start=1, blocks=2), ValueError, "goes with one block"),
        (lambda: solvers.unmask(SCHEDULE, 2, spacing=[0.5, 0.6]), ValueError, "spacing must be 2 decreasing times"),
        (lambda: fd.sample(network, PLAN, (4,)), ValueError, r"shape must be \(B, \*D\)"),
        (lambda: fd.sample(network, PLAN, (2, L), noise="torch"), ValueError, "draws noise='philox' only, got"),
        (lambda: fd.sample(network, PLAN, (2, L), x_T=torch.zeros(2, L)), TypeError, "x_T must be classes, an int64"),
        (
            lambda: fd.sample(network, PLAN, (2, L), x_T=TOKENS + 6),
            ValueError,
            "x_T must be in 0..4, or the mask, 5, got 6..6",
        ),
        (lambda: fd.sample(network, PLAN, (3, L), x_T=TOKENS), ValueError, "must have the shape asked for"),
        (lambda: fd.sample(network, PLAN, (2, L), x_init=TOKENS), ValueError, "x_init is lost where plan"),
        (
            lambda: fd.sample(network, solvers.unmask(SCHEDULE, 4, start=1), (2, L)),
            ValueError,
            "starts with some tokens known: give x_init, or x_T",
        ),
        (lambda: fd.sample(network, PLAN, (2, L), out_dtype=torch.float32), TypeError, "gives classes, int64"),
        (lambda: fd.sample(network, PLAN, (2, L), threshold=(0.9, 1.0)), ValueError, "no threshold"),
        (lambda: fd.sample(network, PLAN, (2, L), callback=lambda *a: a[2] * 0.5), TypeError, "a state of dtype"),
        (lambda: fd.drift(network, SCHEDULE), TypeError, "needs a fastdiff.schedules.Schedule, got Masked"),
        (lambda: solvers.unmask(SCHEDULE, 2, spacing="karras"), ValueError, "2 decreasing times in .*, got 'karras'"),
        (lambda: fd.inpaint(network, PLAN), ValueError, "give x_T, 5 where it is not known"),
        (lambda: fd.Unrolled(network, PLAN), ValueError, "unmasks tokens"),
        (lambda: fd.ops.cfg_plus_plus(PLAN, 0.5), ValueError, "CFG\\+\\+"),
    ],
)
def test_errors(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
