"""An operation's launches, repeated: which argument is which changing tensor, and when the operation runs again."""

from __future__ import annotations

import pytest
import torch

from fastdiff.ops import _dispatch
from fastdiff.ops._relaunch import Relaunch


class Compiled:
    """What Triton's compiled kernels offer: compiled[grid](*args)."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


class Operation:
    """Launches a kernel on (state, m, a temporary, u or None, 7), after a copy of m where asked."""

    def __init__(self, copies=False):
        self.kernel, self.runs, self.copies = Compiled(), 0, copies
        self.state, self.temporary = torch.zeros(8), None

    def __call__(self, m, u):
        self.runs += 1
        self.temporary = torch.zeros(4)
        given = m.clone() if self.copies else m
        calls = getattr(_dispatch._recorded, "calls", None)
        if calls is not None:
            calls.append(_dispatch.Call(self.kernel, (3, 2, 1), [self.state, given, self.temporary, u, 7]))


def outputs(count=1, size=8, dtype=torch.float32):
    return [torch.zeros(size, dtype=dtype) for _ in range(count)]


def repeat(relaunch, op, m, u=None, name="op"):
    relaunch(name, lambda: op(m, u), (m, u))


def test_pointers_of_the_changing_tensors_and_of_no_other():
    relaunch, op = Relaunch(), Operation()
    m, other, u, w = outputs(4)
    for a, b in ((m, u), (other, w), (m, w)):
        repeat(relaunch, op, a, b)
    kept = [op.state.data_ptr(), op.temporary.data_ptr()]
    want = [(kept[0], a.data_ptr(), kept[1], b.data_ptr(), 7) for a, b in ((other, w), (m, w))]
    assert op.runs == 1 and op.kernel.launched == [((3, 2, 1), args) for args in want]


@pytest.mark.parametrize(
    "different",
    [
        lambda: (outputs(dtype=torch.bfloat16)[0], None, "op"),
        lambda: (torch.zeros(9)[1:], None, "op"),  # not aligned
        lambda: (outputs(size=4)[0], None, "op"),
        lambda: (torch.zeros(16)[::2], None, "op"),
        lambda: (*outputs(2), "op"),
        lambda: (outputs()[0], None, "another"),
    ],
    ids=["dtype", "alignment", "shape", "strides", "one tensor more", "operation"],
)
def test_another_kind_runs_the_operation_once(different):
    relaunch, op = Relaunch(), Operation()
    repeat(relaunch, op, outputs()[0])
    m, u, name = different()
    for runs in (2, 2):
        repeat(relaunch, op, m, u, name)
        assert op.runs == runs


@pytest.mark.parametrize("copies", [True, False], ids=["copied first", "one tensor twice"])
def test_what_cannot_be_repeated_runs_every_time(copies):
    relaunch, op = Relaunch(), Operation(copies)
    m = outputs()[0]
    for _ in range(3):
        repeat(relaunch, op, m, None if copies else m)
    assert op.runs == 3 and not op.kernel.launched


def test_an_output_that_is_a_fixed_buffer_does_not_move_the_buffer():
    relaunch, op = Relaunch(), Operation()
    for m in (op.state, *outputs(2)):
        repeat(relaunch, op, m)
    assert op.runs == 3 and not op.kernel.launched


def test_recording_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), _dispatch.recording() as calls:
        raise ZeroDivisionError
    assert _dispatch._recorded.calls is None and calls == []
