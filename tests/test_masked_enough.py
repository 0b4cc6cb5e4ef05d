"""Masked diffusion by sure tokens: thresholds, rows that find nothing to do, noise on the scores."""

from __future__ import annotations

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
from fastdiff.masked import MaskedRun
from fastdiff.plan import ROW_HEADER
from fastdiff.readout import ORDERS
from tests import replay
from tests.replay import device_path  # noqa: F401 - a fixture
from tests.test_masked import SCHEDULE, K, L, mixing_network, near, network
from tests.test_unmask_step import B, case, oracle, run, table


@pytest.fixture
def device(device_of_loops: torch.device) -> torch.device:
    return device_of_loops


class Counted:
    """A model that counts its calls."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        return self.model(x, t, **cond)


def of(p: list[float]) -> Callable[..., Tensor]:
    """Logits whose largest probability at token d is p[d], the rest even over the other classes."""
    top = torch.tensor(p, dtype=torch.float64)
    rest = ((1 - top) / (K - 1)).log()[:, None].repeat(1, K)
    rest[:, 2] = top.log()
    return lambda x, t: rest.float().expand(*x.shape, K)


@pytest.mark.parametrize("c_skip", [0.0, 0.7, 5.0])
@pytest.mark.parametrize(
    ("order", "hi"),
    [
        ("confidence", -1.0),
        ("confidence", -3.0),
        ("margin", -0.5),
        ("entropy", -0.9),
        ("entropy", -4.0),
        ("entropy", 0.0),
    ],
)
def test_noise_on_scores_and_scores_that_are_enough(order: str, hi: float, c_skip: float, device: torch.device) -> None:
    """Rows that would take one token or a quarter of them take more, of which each sample has its own number."""
    tokens, group, m, _ = case(27, 41, 27, seed=3)
    m[0, :2], m[1, 3:5] = math.nan, -math.inf
    rows = table((1.0, 0.02, 0, 1.0), (1.0, 0.25, 1, 0.0), c_skip=c_skip, hi=hi)
    more = 0
    for row in (0, 1):
        want = oracle(tokens, m, rows, [row] * B, 27, order, group)
        got = run(device, tokens, m, rows, torch.tensor([row]), mask=27, order=order, group=group)
        assert torch.equal(got, want), row
        fewer = table(*rows[:, ROW_HEADER : ROW_HEADER + 4].tolist(), c_skip=c_skip)
        least = run(device, tokens, m, fewer, torch.tensor([row]), mask=27, order=order, group=group)
        more += int((got != least).sum())
    assert more > 0 or (order, hi) == ("entropy", 0.0)
    if c_skip:  # the noise has changed the order
        calm = table((1.0, 0.25, 0, 0.0))
        shaken = table((1.0, 0.25, 0, 0.0), c_skip=c_skip)
        both = [run(device, tokens, m, v, torch.tensor([0]), mask=27, order=order, group=group) for v in (calm, shaken)]
        assert not torch.equal(*both) and torch.equal(*((v == 27).sum(1) for v in both))


def test_the_threshold_itself_is_not_above_it(device: torch.device) -> None:
    """Two classes of 1/2 have the score ln 1 = 0."""
    m, tokens = torch.zeros(B, 8, 2), torch.full((B, 8), 2)
    for hi, count in ((0.0, 1), (-1e-6, 8)):
        got = run(device, tokens, m, table((1.0, 1 / 8, 0, 0.0), hi=hi), torch.tensor([0]), mask=2, order="confidence")
        assert (got != 2).sum(1).tolist() == [count] * B


def test_sure_tokens_cost_no_entropy(device: torch.device) -> None:
    """All with an infinite logit, and the one after them, have a sum of 0 before them; noise does not move them."""
    m = torch.zeros(B, 8, 3)
    m[:, [2, 5, 7], 1] = math.inf
    tokens = torch.full((B, 8), 3)
    got = run(device, tokens, m, table((1.0, 0.0, 0, 0.0), hi=0.0), torch.tensor([0]), mask=3, order="entropy")
    assert [(row != 3).nonzero()[:, 0].tolist() for row in got] == [[0, 2, 5, 7]] * B
    for order in ORDERS[1:]:
        rows = table((1.0, 3 / 8, 0, 0.0), c_skip=1e30)
        got = run(device, tokens, m, rows, torch.tensor([0]), mask=3, order=order)
        assert [(row != 3).nonzero()[:, 0].tolist() for row in got] == [[2, 5, 7]] * B


@pytest.mark.parametrize(("block", "threshold"), [(24, 0.5), (24, 0.9), (8, 0.5), (12, 0.2)])
def test_threshold_decoding_by_hand(block: int, threshold: float) -> None:
    """Fast-dLLM's loop: all masked tokens of a block above the threshold, or the surest; as many calls of the model."""
    size, mask, prompt = 24, 49, 5
    net, x = mixing_network(2.5, size, mask, prompt)
    x_T, calls = x.clone(), 0
    for begin in range(prompt, prompt + size, block):
        while bool((x[:, begin : begin + block] == mask).any()):
            logits, calls = net(x).double(), calls + 1
            logits[..., mask] = -torch.inf
            p, k = logits.softmax(-1).max(-1)
            p[x != mask] = -1
            p[:, begin + block :] = -1
            taken = p > threshold
            taken[0, p[0].argmax()] = True
            x = torch.where(taken, k, x)
    plan = solvers.unmask(
        S.Masked(50, mask), size, order="confidence", temperature=0.0, blocks=size // block, threshold=threshold
    )
    model = Counted(net)
    assert torch.equal(fd.sample(model, plan, tuple(x.shape), x_T=x_T), x)
    assert model.calls == calls < size


def test_as_diffusers_does() -> None:
    """One row: the tokens that its schedulers of text models commit, by threshold and count, and by entropies."""
    diffusers = pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(3)
    m = 4 * torch.randn(3, 16, 40, generator=g)
    tokens = torch.full((3, 16), 40)

    def first_row(order: str, steps: int, threshold: float) -> Tensor:
        plan = solvers.unmask(S.Masked(40), steps, order=order, temperature=0.0, threshold=threshold)
        _, kept = fd.sample(lambda x, t: m, plan, (3, 16), trajectory=True)
        return kept.x[1] != 40

    for threshold, steps in ((0.5, 16), (0.9, 4), (0.999, 4), (0.3, 8)):
        theirs = diffusers.BlockRefinementScheduler(block_length=16, num_inference_steps=steps, threshold=threshold)
        theirs.set_timesteps(steps)
        committed = theirs.step(m, 0, tokens, mask_token_id=40, temperature=0.0, return_dict=False)[1]
        assert torch.equal(first_row("confidence", steps, threshold), committed), threshold
    for bound in (0.0, 0.1, 1.0, 5.0):
        theirs = diffusers.EntropyBoundScheduler(entropy_bound=bound, t_min=1.0, t_max=1.0, num_inference_steps=16)
        theirs.set_timesteps(16)
        accepted = theirs.step(m, 16, tokens, return_dict=False)[1]
        assert torch.equal(first_row("entropy", 16, bound), accepted), bound


def test_entropies_are_added_up() -> None:
    """Tokens of entropy H = ln K: rows take floor(bound / H) + 1 of them, so 12 are done in 4 rows at 2.5 H."""
    for bound, calls in ((0.0, 12), (0.5, 12), (1.0, 6), (2.5, 4), (11.5, 1)):
        model = Counted(lambda x, t: torch.zeros(*x.shape, K))
        # ln K in fp32 is above ln K: of a whole multiple take a little more
        plan = solvers.unmask(SCHEDULE, L, order="entropy", threshold=bound * math.log(K) * (1 + 1e-6))
        assert bool((fd.sample(model, plan, (2, L), seed=1) < K).all())
        assert model.calls == calls, bound


def test_a_threshold_is_a_probability() -> None:
    """Of confidences 0.3 ... 0.85 in steps of 0.05 those above it go first; margins are p - (1 - p) / 4."""
    p = [0.3 + 0.05 * d for d in range(L)]
    for order, above in (("confidence", lambda q: q > 0.62), ("margin", lambda q: q - (1 - q) / (K - 1) > 0.62)):
        plan = solvers.unmask(SCHEDULE, L, order=order, threshold=0.62, temperature=0.0)
        _, kept = fd.sample(of(p), plan, (1, L), trajectory=True)
        assert (kept.x[1][0] != K).tolist() == [above(q) for q in p]
        assert (-torch.diff((kept.x[:, 0] == K).sum(1))).tolist()[1:4] == [1, 1, 1]  # then one by one


def test_the_share_of_a_row_is_the_least() -> None:
    plan = solvers.unmask(SCHEDULE, 3, order="confidence", threshold=0.99)
    model = Counted(of([0.5] * L))
    _, kept = fd.sample(model, plan, (1, L), trajectory=True)
    assert (kept.x[:, 0] == K).sum(1).tolist() == [12, 8, 4, 0] and model.calls == 3


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 47),
        ({"order": "entropy"}, 5),  # one of 5 masked tokens a row
        ({"order": "confidence", "blocks": 3}, 5),
        ({"order": "margin", "threshold": 0.3, "blocks": 2}, 5),
    ],
    ids=repr,
)
def test_idle_rows_change_nothing(options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, trajectories and callbacks are those of the rows that were run; the model is called less."""
    plan = solvers.unmask(SCHEDULE, 48, **options)
    x_T = torch.full((2, L), K)
    x_T[:, 2:9] = 1
    results, calls = [], []
    for idle in (MaskedRun.idle, lambda run, k: False):
        monkeypatch.setattr(MaskedRun, "idle", idle)
        model, rows = Counted(network), []
        x, kept = fd.sample(
            model, plan, (2, L), seed=3, x_T=x_T, trajectory=True, check_finite="raise",
            callback=lambda k, t, x, x0, rows=rows: rows.append((k, float(t[0]), x.clone())),
        )  # fmt: skip
        results.append((x, kept.x, kept.x0, torch.stack([r[2] for r in rows])))
        assert [r[:2] for r in rows] == [(k, pytest.approx(plan.times[k])) for k in range(48)]
        calls.append(model.calls)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert calls[0] <= most and calls[1] == 48


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize(("order", "threshold"), [("confidence", 0.5), ("margin", 0.3), ("entropy", 2.0)])
def test_graphs_skip_idle_rows(order: str, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step_graph replays the rows that an eager run evaluates; a loop_graph is one replay of all. The same tokens."""
    plan = solvers.unmask(SCHEDULE, 24, order=order, threshold=threshold, blocks=2)
    model, played = Counted(lambda x, t: 3 * torch.sin(2.0 * x.roll(1, -1)[..., None] + torch.arange(K))), []
    want = {seed: fd.sample(model, plan, (2, L), seed=seed, mode="eager") for seed in (4, 5)}
    rows, again = model.calls, replay.Replay.replay
    assert rows < 2 * 16
    monkeypatch.setattr(replay.Replay, "replay", lambda graph: (played.append(graph), again(graph)))
    for mode, each in (("step_graph", rows), ("loop_graph", 2)):
        sampler = fd.Sampler(model, plan, mode=mode)
        sampler((2, L), seed=7)
        played.clear()
        assert all(torch.equal(sampler((2, L), seed=seed), x) for seed, x in want.items())
        assert len(played) == each + 2, mode  # the start is a graph, too


def test_rows_that_remask_are_never_idle() -> None:
    model = Counted(network)
    fd.sample(model, solvers.unmask(SCHEDULE, 20, remask=0.2), (1, 2), seed=0)
    assert model.calls >= 19  # but the last, which masks nothing again


def test_what_a_callback_masks_is_unmasked() -> None:
    """Long after all was done."""

    def again(row: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        if row == 30:
            x[:, 3] = K

    model = Counted(of([0.9] * L))
    plan = solvers.unmask(SCHEDULE, 36, order="confidence", threshold=0.5, temperature=0.0)
    x = fd.sample(model, plan, (2, L), seed=0, callback=again)
    assert bool((x < K).all()) and model.calls == 2


def test_tokens_that_stay_masked_are_reported() -> None:
    """Though the last row, of another block, has nothing to do."""

    def broken(x: Tensor, t: Tensor) -> Tensor:
        m = network(x, t)
        m[:, 3] = -torch.inf
        return m

    plan = solvers.unmask(SCHEDULE, 36, order="confidence", threshold=0.01, blocks=2)
    assert fd.sample(broken, plan, (1, L), seed=0).tolist()[0].count(K) == 1
    with pytest.raises(ValueError, match="first at row 35 of 36"):
        fd.sample(broken, plan, (1, L), seed=0, check_finite="raise")


@pytest.mark.parametrize(
    ("order", "weight"),
    [
        ("confidence", lambda p, c: p ** (1 / c)),
        ("margin", lambda p, c: (p - (1 - p) / (K - 1)) ** (1 / c)),
        ("entropy", lambda p, c: math.exp((p * math.log(p) + (1 - p) * math.log((1 - p) / (K - 1))) / c)),
    ],
)
@pytest.mark.parametrize("heat", [0.5, 2.0])
def test_noise_on_scores_is_a_choice_by_weight(order: str, weight: Callable[..., float], heat: float) -> None:
    """The first of four tokens, by Gumbel's maximum: token d with probability w_d / sum w. Four standard deviations."""
    p, n = [0.3, 0.5, 0.7, 0.9], 8000
    plan = solvers.unmask(SCHEDULE, 4, order=order, temperature=0.0, choice_temperature=heat)
    _, kept = fd.sample(of(p), plan, (n, 4), seed=5, trajectory=True)
    first = (kept.x[1] != K).float()
    assert bool((first.sum(1) == 1).all())
    want = np.array([weight(q, heat) for q in p])
    for share, q in zip(first.mean(0).tolist(), want / want.sum(), strict=True):
        assert near(share, float(q), n), (share, q)


def test_a_choice_temperature_for_every_row() -> None:
    """MaskGIT's falls to 0: the last rows take the surest."""
    heat = 100.0 * (np.arange(4) < 2)
    plan = solvers.unmask(SCHEDULE, 4, order="confidence", choice_temperature=heat, temperature=0.0)
    assert np.array_equal(plan.c_skip, heat) and plan.stochastic
    _, kept = fd.sample(of([0.3, 0.5, 0.7, 0.9]), plan, (200, 4), seed=6, trajectory=True)
    third = (kept.x[3] != K).float() - (kept.x[2] != K).float()
    left = torch.where(kept.x[2] == K, torch.arange(4), -1).amax(1)
    assert torch.equal(third.argmax(1), left)
    assert len({tuple(r) for r in (kept.x[2] != K).tolist()}) == 6  # any two of four before


def test_what_the_plan_says_of_itself() -> None:
    plan = solvers.unmask(SCHEDULE, 4, order="confidence", threshold=0.9)
    assert np.allclose(plan.hi, math.log(9)) and not plan.clamped
    assert "so do tokens that are sure enough, by hi" in str(plan) and "s 1  hi 2.1972" in str(plan)
    assert "p in [" not in str(plan)
    shaken = solvers.unmask(SCHEDULE, 4, order="confidence", choice_temperature=2.0)
    assert "by confidence, becomes k, their scores with c_skip times Gumbel noise" in str(shaken)
    assert np.array_equal(solvers.unmask(SCHEDULE, 4, order="entropy", threshold=0.3).hi, np.full(4, -0.3))
    assert np.array_equal(plan.packed()[:, [0, 3]], np.float32([[0, math.log(9)]] * 4))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threshold": 0.9}, "go with an order of sure tokens, got order='random'"),
        ({"choice_temperature": 1.0}, "go with an order of sure tokens"),
        ({"order": "margin", "threshold": 1.0}, r"threshold of order 'margin' is a probability in \(0, 1\), got 1.0"),
        ({"order": "confidence", "threshold": True}, "is a probability in .*, got True"),
        ({"order": "entropy", "threshold": -0.1}, "threshold of order 'entropy' is nats >= 0, got -0.1"),
        ({"order": "entropy", "threshold": math.nan}, "is nats >= 0, got nan"),
        ({"order": "entropy", "threshold": math.inf}, "is nats >= 0, got inf"),
        ({"order": "entropy", "choice_temperature": [1.0]}, "choice_temperature must be a number >= 0, or 4 of them"),
        ({"order": "margin", "threshold": 0.5, "choice_temperature": 1.0}, "a score with noise has no threshold"),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        solvers.unmask(SCHEDULE, 4, **given)
