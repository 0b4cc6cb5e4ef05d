"""The class table of docs/drop-in.md is what trying every scheduler gives, and each accelerated class is tested."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.accelerate_cases import ALL

pytest.importorskip("diffusers")
DOCS = Path(__file__).parents[1] / "docs" / "drop-in.md"


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("torchsde")  # two classes cannot be imported without it
    from fastdiff.integrations.diffusers import coverage

    return coverage.rows()


def test_the_table_is_what_trying_gives(rows):
    from fastdiff.integrations.diffusers.coverage import table

    assert table(rows) in DOCS.read_text(), "python -m fastdiff.integrations.diffusers.coverage prints the table"


def test_every_accelerated_class_is_compared_with_stock_in_three_configurations(rows):
    cases = Counter(case.scheduler for name, case in ALL.items())
    assert {r.name: cases[r.name] for r in rows if r.state != "not" and cases[r.name] < 3} == {}
    assert len([r for r in rows if r.state != "not"]) >= 34


def test_the_table_knows_every_class_with_a_step(rows):
    import diffusers

    listed = {r.name for r in rows}
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        own = getattr(cls, "__module__", "").startswith("diffusers.schedulers.scheduling_")
        if own and callable(getattr(cls, "step", None)):
            assert name in listed
