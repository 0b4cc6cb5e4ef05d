"""The code of the pages on training and conditions runs, and gives what its comments say."""

import math
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def run():
    def of(page: str) -> dict[str, object]:
        names: dict[str, object] = {}
        blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
        assert blocks
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for block in blocks:
                exec(block, names)  # noqa: S102 - the project's own pages
        return names

    return of


def test_flows_of_classes(run):
    """A loss in bits near an untrained network's, gradients, and classes of the shape asked for."""
    names = run("bfn.md")
    loss, classes = names["loss"], names["classes"]
    assert loss.shape == (16,) and bool((loss > 0).all())
    assert all(p.grad.abs().sum() > 0 for p in names["net"].parameters())
    assert classes.shape == (4, 32) and classes.dtype == torch.int64
    assert 0 <= int(classes.min()) <= int(classes.max()) < 27


def test_training(run):
    """The weighted loss of every sample, and gradients, a policy's too; Karras et al.'s is the squared error of F.

    Its target is (x0 - c_skip x_t) / c_out, which a plan's own c_skip and c_out of that sigma give.
    """
    names = run("training.md")
    with torch.no_grad():
        skip, out = names["data"] ** 2 / names["root"] ** 2, names["sigma"] * names["data"] / names["root"]
        target = (names["x0"] - skip * names["x_t"]) / out
        squares = (names["net"](names["x_t"] / names["root"]) - target).square().mean(1)
    assert torch.allclose(names["loss"].detach(), squares, rtol=2e-3)  # fp32: x0 - c_skip x_t cancels at low sigma
    for k, time in enumerate(names["edm_plan"].times):
        sigma = math.exp(4 * time)
        root = (sigma**2 + 0.25) ** 0.5
        assert names["edm_plan"].c_skip[k] == pytest.approx(0.25 / root**2, rel=1e-6)
        assert names["edm_plan"].c_out[k] == pytest.approx(0.5 * sigma / root, rel=1e-6)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in names["policy"].parameters())
    assert names["loss"].shape == (64,) and all(p.grad.isfinite().all() for p in names["net"].parameters())


def test_tokens(run):
    """The bound's loss and its gradients; ids, of which the prompt is kept."""
    names = run("tokens.md")
    assert names["loss"].shape == (16,) and bool((names["loss"] >= 0).all())
    assert bool((names["loss"][1:] > 0).all())  # at t >= 1/16 a token of 32 is masked, this seed's
    assert all(p.grad.abs().sum() > 0 for p in names["net"].parameters())
    ids = names["ids"]
    assert ids.dtype == torch.int64 and 0 <= int(ids.min()) <= int(ids.max()) < 27
    assert ids[:, :5].tolist() == [[7, 4, 11, 11, 14]] * 4 and len(set(ids[:, 5:].flatten().tolist())) > 5


def test_conditioning(run):
    """Known numbers and tokens are there; a measured sum has its posterior, within five standard errors and 1 %."""
    names = run("conditioning.md")
    x, text, total = names["x"], names["text"], names["total"].double()
    assert float((x[:, :4] - names["known"][:, :4]).abs().max()) <= 2e-6 and bool((x[:, 4:].std(0) > 0.3).all())
    assert text[:, :5].tolist() == [[7, 4, 11, 11, 14]] * 4 and len(set(text[:, 5:].flatten().tolist())) > 5
    mean, std = 2 / (1 + 0.1**2 / 2), (1 / (1 / 2 + 1 / 0.1**2)) ** 0.5
    assert abs(float(total.mean()) - mean) <= 5 * std / 64 + 0.01 * std
    assert abs(float(total.std()) / std - 1) <= 5 / 8192**0.5 + 0.01
