"""What a model is given beside x and t: a condition, what stands for none, what is shared, in one batch and in two."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd

VP = fd.schedules.VP()
PLAN = fd.solvers.ddim(VP, 4, spacing="logsnr")
SHAPE = (3, 4)
PASSES = pytest.mark.parametrize("batched", [True, False], ids=["one batch", "two passes"])


def model(x: Tensor, t: Tensor, y: Tensor | None = None, z: Tensor | float = 0.0) -> Tensor:
    return 0.3 * x + (0.0 if y is None else y.view(-1, 1)) + z


def sampled(batched: bool, cond: Any, uncond: Any, net: Any = model, guidance: float = 2.0) -> Tensor:
    made = fd.sample(net, PLAN, SHAPE, cond=cond, uncond=uncond, guidance=guidance, batched_guidance=batched, seed=1)
    assert isinstance(made, Tensor)
    return made


@PASSES
@pytest.mark.parametrize("uncond", ["nothing", "the same"])
def test_guidance_that_would_do_nothing_is_refused(batched: bool, uncond: str) -> None:
    cond = {"y": torch.ones(3), "z": 1.0}
    second = {} if uncond == "nothing" else {"y": cond["y"]}
    with pytest.raises(ValueError, match=r"uncond changes nothing in cond \(y, z\), so guidance would do nothing"):
        sampled(batched, cond, second)
    with pytest.raises(ValueError, match="uncond changes nothing in cond"):
        fd.Unrolled(model, PLAN, guidance=2.0)(torch.zeros(SHAPE), cond=cond, uncond=second)
    assert sampled(batched, cond, second, guidance=1.0).shape == SHAPE  # which is none


def test_what_uncond_does_not_name_is_conds() -> None:
    """None, where there is no condition, takes two calls."""
    y, z = torch.ones(3), torch.tensor([0.1, 0.2, 0.3]).view(3, 1)
    both, apart = (sampled(b, {"y": y, "z": z}, {"y": torch.zeros(3)}) for b in (True, False))
    whole = sampled(False, {"y": y, "z": z}, {"y": None, "z": z})
    assert torch.equal(both, apart) and torch.equal(both, whole)


class Output(OrderedDict[str, Tensor]):
    """A model's output as others have it: its entries are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@PASSES
def test_a_dictionary_of_its_own_class_stays_one(batched: bool) -> None:
    def net(x: Tensor, t: Tensor, encoded: Output) -> Tensor:
        assert type(encoded) is Output
        return 0.3 * x + encoded.last

    cond, uncond = (Output(last=torch.full(SHAPE, v)) for v in (1.0, 0.0))
    expected = sampled(batched, {"z": cond["last"]}, {"z": uncond["last"]})
    assert torch.equal(sampled(batched, {"encoded": cond}, {"encoded": uncond}, net), expected)


class Stern(dict[str, Tensor]):
    def __init__(self, value: Tensor) -> None:
        super().__init__(of=value)


def test_one_that_cannot_be_made_again_is_refused() -> None:
    cond, uncond = Stern(torch.ones(3)), Stern(torch.zeros(3))
    with pytest.raises(ValueError, match=r"cond\['y'\] and uncond\['y'\] cannot be joined into one batch of 2 x 3"):
        sampled(True, {"y": cond}, {"y": uncond})


@PASSES
def test_a_number_for_all_and_equal_tables(batched: bool) -> None:
    """A tensor [1] that both calls are given is one number; ids of another length are shared where they are equal."""

    def net(x: Tensor, t: Tensor, y: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        assert scale.shape == (1,) and ids.shape == (7, 2)
        return 0.3 * x + y.view(-1, 1) * scale + ids.sum()

    y, scale = torch.ones(3), torch.tensor([0.5])
    cond = {"y": y, "scale": scale, "ids": torch.ones(7, 2)}
    got = sampled(batched, cond, {"y": 0 * y, "ids": torch.ones(7, 2)}, net)
    assert torch.allclose(got, sampled(batched, {"y": 0.5 * y, "z": 14.0}, {"y": 0 * y}), rtol=1e-6)
    if batched:
        with pytest.raises(ValueError, match=r"cond\['ids'\] and uncond\['ids'\] cannot be joined"):
            sampled(True, cond, {"y": 0 * y, "ids": torch.zeros(7, 2)}, net)


SCHEDULES = [VP, fd.schedules.Flow(), fd.schedules.Flow(3.0), fd.schedules.EDM()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_log_probability_at_the_models_time(schedule: fd.schedules.Schedule) -> None:
    """N(0, I) data whose sum is 2 +- 0.1: the posterior's mean and variance, within five standard errors."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a, s = (v.float()[:, None] for v in schedule.alpha_sigma(schedule.time_of_model(t)))
        return x * s / (a**2 + s**2)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        a, s = (v.float() for v in schedule.alpha_sigma(schedule.time_of_model(t)))
        size = a**2 + s**2  # E[x0 | x] = a x / size, Var[x0 | x] = s^2 / size
        return -((2 - a / size * (x[:, 0] + x[:, 1])) ** 2) / (2 * (2 * s**2 / size + 0.1**2))

    start = 0.998 if isinstance(schedule, fd.schedules.Flow) else None  # eps says nothing at alpha = 0
    plan = fd.solvers.dpmpp_2m(schedule, 60, spacing="logsnr", t_start=start, t_end=1e-3)
    z = fd.sample(fd.classifier_guidance(eps, plan, log_prob), plan, (4096, 2), seed=0)
    total = z.double().sum(1)  # type: ignore[union-attr]
    mean, var = 2 / (1 + 0.1**2 / 2), 1 / (1 / 2 + 1 / 0.1**2)
    assert abs(float(total.mean()) - mean) <= 5 * (var / 4096) ** 0.5
    assert abs(float(total.var()) / var - 1) <= 5 * (2 / 4096) ** 0.5
