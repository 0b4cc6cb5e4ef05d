"""A Sampler that is called again: what it keeps from call to call, and what it must not."""

import copy
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import solvers
from fastdiff.schedules import VP

PLAN = solvers.ddim(VP(), 3, prediction="x0")


def conditioned(x: Tensor, t: Tensor, c: Any = 0.0, y: Any = 0.0) -> Tensor:
    return torch.zeros_like(x) + c + y


def test_conditions_of_the_last_call_are_forgotten() -> None:
    """A name that a call does not give has the model's default, whatever calls came before."""
    sampler = fd.Sampler(conditioned, PLAN)
    for cond, want in (({"c": 1.0}, 1), (None, 0), ({"y": 3.0}, 3), ({}, 0)):
        assert sampler((2, 3), cond=cond).unique().tolist() == [want]


@pytest.mark.parametrize(
    ("batched", "calls"),
    [
        # u + 2 (c - u): 1 + 2 (2 - 1), then 0 + 2 (2 - 0)
        (False, [({"c": 2.0}, {"c": 0.0, "y": 1.0}, 3), ({"c": 2.0}, {"c": 0.0}, 4)]),
        # 0 + 2 (4 - 0), then 1 + 2 (2 - 1)
        (True, [({"c": 2.0, "y": 2.0}, {"c": 0.0, "y": 0.0}, 8), ({"y": 2.0}, {"y": 1.0}, 3)]),
    ],
)
def test_guided_conditions_of_the_last_call_are_forgotten(batched: bool, calls: list[tuple[Any, Any, int]]) -> None:
    sampler = fd.Sampler(conditioned, PLAN)
    for cond, uncond, want in calls:
        given = [{name: torch.full((2, 1), v) for name, v in values.items()} for values in (cond, uncond)]
        got = sampler((2, 3), cond=given[0], uncond=given[1], guidance=2.0, batched_guidance=batched)
        assert got.unique().tolist() == [want]


def test_the_cache_of_runs_is_bounded() -> None:
    sampler = fd.Sampler(conditioned, PLAN, mode="eager")
    for n in range(1, 9):
        sampler((1, n))
    assert len(sampler._runs) == 4


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_another_plan_is_another_run(mode: str) -> None:
    """Of one length too: with x0 = t, ddim into a clean end returns its last time."""
    sampler = fd.Sampler(lambda x, t: torch.zeros_like(x) + t[:, None], PLAN, mode=mode)
    ends = []
    for spacing in ([0.9, 0.5, 0.1], [0.9, 0.5, 0.2], [0.9, 0.5, 0.1]):
        sampler.plan = solvers.ddim(VP(), 3, prediction="x0", spacing=spacing)
        ends.append(sampler((1, 1)).item())
    assert ends == pytest.approx([0.1, 0.2, 0.1])


@pytest.mark.parametrize("mode", ["auto", "eager", "compile"])
def test_another_model_is_the_one_that_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: (compiled.append(model), model)[1])
    models = [lambda x, t, v=v: torch.full_like(x, v) for v in (1.0, 2.0)]
    sampler, got = fd.Sampler(models[0], PLAN, mode=mode), []
    for model in (models[0], models[0], models[1], models[0]):
        sampler.model = model
        got.append(sampler((1, 1)).item())
    assert got == [1, 1, 2, 1] and len(compiled) == (3 if mode == "compile" else 0)


STOCHASTIC = solvers.dpmpp_2m_sde(VP(), 8)


def squashed(x: Tensor, t: Tensor) -> Tensor:
    time.sleep(1e-3)  # lets the other threads run
    return torch.tanh(x)


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_keys_are_those_of_the_call(mode: str) -> None:
    """Whatever the calls before left in the buffers: one seed, another first sample, a seed each, the first again."""
    sampler = fd.Sampler(squashed, STOCHASTIC, mode=mode)
    calls = [{"seed": 3}, {"seeds": [3, 9]}, {"seed": 3}, {"seed": 3, "first": 2}, {"seed": 9}, {"seed": 3}]
    got = [sampler((2, 5), **given) for given in calls]
    for given, x in zip(calls, got, strict=True):
        assert torch.equal(x, fd.Sampler(squashed, STOCHASTIC, mode=mode)((2, 5), **given)), given
    assert torch.equal(got[1][0], got[0][0]) and not torch.equal(got[1][1], got[0][1])
    assert torch.equal(got[3], fd.Sampler(squashed, STOCHASTIC, mode=mode)((4, 5), seed=3)[2:])


def test_a_calls_own_seeds_take_the_place_of_a_default_seed() -> None:
    """And the other way round; nothing at all is seed 0."""
    of = {key: fd.sample(squashed, STOCHASTIC, (2, 5), **{key: v}) for key, v in (("seed", 3), ("seeds", [3, 9]))}
    for default, other in ({"seed": 3}, {"seeds": [3, 9]}), ({"seeds": [3, 9]}, {"seed": 3}):
        sampler = fd.Sampler(squashed, STOCHASTIC, **default)
        for given in ({}, other, {}):
            assert torch.equal(sampler((2, 5), **given), of[next(iter(given or default))])
    nothing = fd.Sampler(squashed, STOCHASTIC)((2, 5))
    assert torch.equal(nothing, fd.sample(squashed, STOCHASTIC, (2, 5), seed=0))


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_threads_share_a_sampler(mode: str) -> None:
    sampler = fd.Sampler(squashed, STOCHASTIC, mode=mode)
    want = [sampler((2, 8), seed=i) for i in range(4)]
    got: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: sampler((2, 8), seed=i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(4))


def test_a_sampler_that_its_own_model_calls_is_refused_and_stays_usable() -> None:
    sampler = fd.Sampler(squashed, STOCHASTIC)
    want = sampler((2, 8), seed=1)
    sampler.model = lambda x, t: sampler((2, 8), seed=3)
    with pytest.raises(RuntimeError, match="called by its own model or callback: give that a Sampler of its own"):
        sampler((2, 8), seed=1)
    sampler.model = squashed
    inner: list[Tensor] = []
    fd.Sampler(squashed, STOCHASTIC)((2, 8), callback=lambda k, t, x, x0: inner.append(sampler((2, 8), seed=1)))
    assert len(inner) == STOCHASTIC.nfe and all(torch.equal(x, want) for x in inner)


def test_a_run_that_raised_leaves_nothing_behind() -> None:
    sampler = fd.Sampler(squashed, STOCHASTIC)
    want = sampler((2, 8), seed=1)

    def stopped(x: Tensor, t: Tensor) -> Tensor:
        if t[0] < 0.5:
            raise KeyboardInterrupt
        return torch.tanh(x)

    sampler.model = stopped
    with pytest.raises(KeyboardInterrupt):
        sampler((2, 8), seed=1)
    sampler.model = squashed
    assert torch.equal(sampler((2, 8), seed=1), want)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_copy_of_a_used_sampler_has_buffers_of_its_own(way: Callable[[fd.Sampler], fd.Sampler]) -> None:
    sampler = fd.Sampler(squashed, STOCHASTIC, seed=4)
    want = sampler((2, 8))
    other = way(sampler)
    assert torch.equal(other((2, 8)), want)
    assert not {id(run) for run in other._runs.values()} & {id(run) for run in sampler._runs.values()}
    assert torch.equal(sampler((2, 8)), want)


def test_a_model_runs_without_gradients_whatever_surrounds_the_sampler() -> None:
    seen: list[bool] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return 0.1 * x

    sampler = fd.Sampler(model, PLAN)
    for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with around():
            fd.sample(model, PLAN, (2, 3))
            sampler((2, 3))
    assert len(seen) == 2 * 3 * 2 * 3 and not any(seen)


def test_in_inference_mode_and_out() -> None:
    sampler = fd.Sampler(lambda x, t: 0.1 * x, PLAN, mode="eager")
    with torch.inference_mode():
        a = sampler((2, 4), seed=1)
    assert torch.equal(a, sampler((2, 4), seed=1)) and not a.requires_grad


def test_a_seed_takes_the_place_of_a_samplers_generator() -> None:
    plan, shape = solvers.ddpm(VP(), 4), (2, 3)
    sampler = fd.Sampler(lambda x, t: 0.3 * x, plan, noise="torch", generator=torch.Generator().manual_seed(1))
    assert torch.equal(sampler(shape, seed=4), sampler(shape, seed=4))
    mine = fd.Sampler(lambda x, t: 0.3 * x, plan, noise="torch", seed=4)
    given = [mine(shape, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*given) and not torch.equal(given[0], mine(shape))
