"""What a graph reads of a call's conditions: tensors are filled in, and nothing it would not see change is taken."""

from __future__ import annotations

import enum
import itertools
import warnings
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from tests.replay import PLANS, SHAPE, close, device_path, model  # noqa: F401 - one is a fixture


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
@pytest.mark.parametrize("batched", [True, False])
def test_conditions_and_weights_are_filled_in(mode: str, batched: bool, request: pytest.FixtureRequest) -> None:
    plan = PLANS["dpmpp_2m"]
    cases = list(itertools.product((0.0, 1.0), (1.5, 3.0)))

    def options(c: float, w: float) -> dict[str, Any]:
        return {"cond": {"shift": torch.full((3,), c)}, "uncond": {"shift": torch.full((3,), 0.5)}, "guidance": w}

    want = [fd.sample(model, plan, SHAPE, seed=1, **options(c, w)) for c, w in cases]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode=mode, batched_guidance=batched)
    given = [options(c, w) for c, w in cases]
    for one, expected in zip(given, want, strict=True):
        assert close(sampler(SHAPE, seed=1, **one), expected)
    for one, (c, _) in zip(given, cases, strict=True):  # the caller's tensors are left alone
        assert torch.equal(one["cond"]["shift"], torch.full((3,), c))
    assert len(sampler._runs) == 1  # one capture serves them all


def nested(x: Tensor, t: Tensor, added: dict[str, Any]) -> Tensor:
    return model(x, t, added["shift"] * added["by"][0])


@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
@pytest.mark.parametrize("batched", [True, False])
def test_tensors_inside_conditions_are_filled_in(mode: str, batched: bool, request: pytest.FixtureRequest) -> None:
    plan = PLANS["dpmpp_2m"]

    def options(c: float) -> dict[str, Any]:
        shifts = torch.full((3,), c), torch.full((3,), 0.5)
        cond, uncond = ({"added": {"shift": shift, "by": [torch.full((3,), 2.0)]}} for shift in shifts)
        return {"cond": cond, "uncond": uncond, "guidance": 2.0, "batched_guidance": batched}

    want = [fd.sample(nested, plan, SHAPE, seed=1, **options(c)) for c in (0.0, 1.0)]
    assert not close(want[0], want[1])
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(nested, plan, mode=mode)
    given = options(0.0)
    got = [sampler(SHAPE, seed=1, **given)]
    given["cond"]["added"]["shift"] = torch.full((3,), 1.0)
    got.append(sampler(SHAPE, seed=1, **given))
    assert close(got[0], want[0]) and close(got[1], want[1]) and len(sampler._runs) == 1


@dataclass
class Scale:
    shift: Any


class Slotted:
    __slots__ = ("shift",)

    def __init__(self, shift: Any) -> None:  # noqa: ANN401 - a tensor or a number
        self.shift = shift


@dataclass(frozen=True)
class Frozen:
    shift: Any


@pytest.mark.parametrize(
    "make",
    [
        Scale,
        Slotted,
        Frozen,
        lambda v: SimpleNamespace(shift=v),
        lambda v: UserDict(shift=v),
        lambda v: {"in": Scale(v)},
    ],
)
@pytest.mark.parametrize("mode", ["step_graph", "loop_graph"])
def test_what_hides_in_objects_is_never_read_as_it_was(make: Any, mode: str, request: pytest.FixtureRequest) -> None:
    def by_object(x: Tensor, t: Tensor, given: Any) -> Tensor:
        given = given["in"] if type(given) is dict else given
        return model(x, t, given["shift"] if isinstance(given, UserDict) else given.shift)

    plan, hidden, other = PLANS["ddpm"], make(torch.full((3,), 0.25)), torch.full((3,), 0.75)
    want = fd.sample(model, plan, SHAPE, seed=1, cond={"shift": other})
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(by_object, plan, mode=mode)
    with pytest.warns(
        RuntimeWarning, match=r"condition 'given' holds a (Scale|Slotted|Frozen|SimpleN|UserD)\w*, whose"
    ):
        sampler(SHAPE, seed=1, cond={"given": hidden})
    inner = hidden["in"] if type(hidden) is dict else hidden
    if isinstance(inner, UserDict):
        inner["shift"] = other
    else:
        object.__setattr__(inner, "shift", other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the frozen one is another condition now
        assert close(sampler(SHAPE, seed=1, cond={"given": hidden}), want)


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("make", [Scale, Slotted])
def test_a_number_in_an_object_may_change(make: Any) -> None:
    def by_object(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return model(x, t, given.shift)

    sampler, hidden = fd.Sampler(by_object, PLANS["ddpm"], mode="loop_graph"), make(0.25)
    with pytest.warns(RuntimeWarning, match="whose changes a graph would not see"):
        first = sampler(SHAPE, seed=1, cond={"given": hidden})
        hidden.shift = 0.75
        second = sampler(SHAPE, seed=1, cond={"given": hidden})
    assert (first - second).abs().max() > 0.1


@pytest.mark.usefixtures("device_path")
def test_an_object_that_holds_itself_ends() -> None:
    class Ring:
        def __init__(self) -> None:
            self.other = self

        def __hash__(self) -> int:
            return 1

    sampler = fd.Sampler(lambda x, t, given: model(x, t), PLANS["ddpm"], mode="step_graph")
    with pytest.warns(RuntimeWarning, match="condition 'given' holds a Ring, whose changes"):
        sampler(SHAPE, seed=1, cond={"given": Ring()})


class Kind(enum.Enum):
    ODE = 0.25


@pytest.mark.parametrize("given", [Kind.ODE, Frozen(0.25), torch.float32, nn.Identity(), torch.tanh, None, "a", 1.5])
@pytest.mark.usefixtures("device_path")
def test_values_that_stay_as_they_are_take_a_graph(given: Any) -> None:
    def ignores(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return model(x, t)

    sampler = fd.Sampler(ignores, PLANS["ddpm"], mode="step_graph")
    sampler(SHAPE, seed=1, cond={"given": given})
    assert next(iter(sampler._runs.values())).graph is not None


@pytest.mark.usefixtures("device_path")
def test_equal_numbers_of_two_types_are_two_conditions() -> None:
    def typed(x: Tensor, t: Tensor, flag: bool | int) -> Tensor:
        return model(x, t, 0.5 if flag is True else 0.25)

    sampler = fd.Sampler(typed, PLANS["ddpm"], mode="loop_graph")
    one, other = sampler(SHAPE, seed=1, cond={"flag": 1}), sampler(SHAPE, seed=1, cond={"flag": True})
    assert (one - other).abs().max() > 0.01


def test_a_condition_changes_sides(request: pytest.FixtureRequest) -> None:
    plan, shift = PLANS["dpmpp_2m"], {"shift": torch.full((3,), 0.5)}
    none = {"shift": 0.0}
    calls: list[dict[str, Any]] = [{"cond": shift, "uncond": none}, {"cond": none, "uncond": shift}]
    want = [fd.sample(model, plan, SHAPE, guidance=2.0, batched_guidance=False, **c) for c in calls]
    request.getfixturevalue("device_path")
    sampler = fd.Sampler(model, plan, mode="step_graph", guidance=2.0, batched_guidance=False)
    assert all(close(sampler(SHAPE, **c), w) for c, w in zip(calls, want, strict=True))
