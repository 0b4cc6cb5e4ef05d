"""The code of the training pages runs, and gives what its comments say."""

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
    """The weighted loss of every sample, and gradients, a policy's too."""
    names = run("training.md")
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in names["policy"].parameters())
    assert names["loss"].shape == (64,) and all(p.grad.isfinite().all() for p in names["net"].parameters())
