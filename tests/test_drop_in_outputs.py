"""What programs do with a step's result, whose second entry is made when it is first read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")
X = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)


def results(return_dict):
    """The stock result and the accelerated one."""
    for scheduler in (diffusers.DDIMScheduler(), fd.accelerate(diffusers.DDIMScheduler())):
        scheduler.set_timesteps(3)
        yield scheduler.step(torch.tanh(X), scheduler.timesteps[0], X, return_dict=return_dict)


USES = {
    "stack": torch.stack,
    "cat, a keyword": lambda pair: torch.cat(pair, dim=1),
    "list +=": lambda pair: torch.stack(add([X], pair)),
    "tuple +": lambda pair: torch.stack((X, *pair) + pair + (X,)),
    "+ tuple": lambda pair: torch.stack((X,) + pair),  # noqa: RUF005
    "times": lambda pair: torch.stack(2 * pair + pair * 2),
    "made again": lambda pair: torch.stack(tuple(type(pair)(v + 1 for v in pair))),
}


def add(values, pair):
    values += pair
    return values


@pytest.mark.parametrize("use", USES)
def test_a_pair_is_a_tuple_of_tensors(use):
    stock, ours = (USES[use](pair) for pair in results(False))
    assert torch.allclose(stock, ours, rtol=0, atol=1e-5)


def test_an_output_made_of_an_output():
    for change in (lambda out: dataclasses.replace(out, prev_sample=X), lambda out: type(out)(X, out[1])):
        stock, ours = (change(out) for out in results(True))
        assert list(ours.keys()) == list(stock.keys()) == ["prev_sample", "pred_original_sample"]
        assert torch.equal(ours[0], X) and torch.allclose(ours.to_tuple()[1], stock[1], rtol=0, atol=1e-5)
    assert [list(type(out)(X).keys()) for out in results(True)] == [["prev_sample"]] * 2
