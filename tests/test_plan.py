"""Plans: validation, derived facts, slot renaming, the packed table, the readable print."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastdiff import Plan, solvers
from fastdiff import schedules as S
from fastdiff.plan import ROW_HEADER, row_width

CHAIN = S.Betas(S.scaled_linear_betas(1000))


def random_plan(rng: np.random.Generator, slots: int, rows: int) -> Plan:
    """A plan from random tables whose first row reads slot 0 alone and whose later rows mix and shift slots."""
    A = rng.normal(size=(rows, slots, slots)) * (rng.random((rows, slots, slots)) < 0.6)
    A[0, :, 1:] = 0
    for k in range(1, rows):  # a shift register in half of the rows
        if slots > 2 and k % 2:
            A[k, 2:] = np.eye(slots)[1:-1]
    b, d, s = (rng.normal(size=(rows, slots)) * (rng.random((rows, slots)) < 0.7) for _ in range(3))
    for v in (b, d, s):
        if slots > 2:
            v[1::2, 2:] = 0
    one = np.ones(rows)
    return Plan("random", np.arange(rows), np.arange(rows), one, one, one, 0.5 * one, -0.7 * one, -2 * one, 2 * one,
                A, b, d, s, end=(1.0, 0.5))  # fmt: skip


def logical(plan: Plan, x: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    S_ = np.zeros((plan.slots, len(x)))
    S_[0] = x
    for k in range(plan.nfe):
        p = np.clip(plan.c_skip[k] * S_[0] + plan.c_out[k] * m[k], plan.lo[k], plan.hi[k])
        S_ = plan.A[k] @ S_ + np.outer(plan.b[k], p) + np.outer(plan.d[k], m[k]) + np.outer(plan.s[k], n[k])
    return S_[0]


def physical(plan: Plan, x: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The same rows on the packed table's physical places, absent slots full of NaN."""
    a, r = plan.allocate(), plan.slots
    P = np.full((a.physical, len(x)), np.nan)
    P[0] = x
    for k, row in enumerate(plan.packed().astype(np.float64)):
        body = row[ROW_HEADER:]
        A, (b, d, s, read, write) = body[: r * r].reshape(r, r), body[r * r : r * r + 5 * r].reshape(5, r)
        p = np.clip(row[0] * (P[0] + row[1] * m[k]), row[2], row[3])
        new = {}
        for i in range(r):
            if write[i] >= 0:
                y = b[i] * p + d[i] * m[k] + s[i] * n[k]
                for j in range(r):
                    if A[i, j] != 0:
                        assert read[j] >= 0
                        y = y + A[i, j] * P[int(read[j])]
                new[int(write[i])] = y
        for place, y in new.items():
            P[place] = y
    return P[0]


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(8))
def test_renaming_changes_nothing(slots: int, seed: int) -> None:
    rng = np.random.default_rng(seed * 10 + slots)
    plan = random_plan(rng, slots, 7)
    x, m, n = rng.normal(size=9), rng.normal(size=(7, 9)), rng.normal(size=(7, 9))
    want, got = logical(plan, x, m, n), physical(plan, x, m, n)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max() + 1e-5 * np.abs(want).max())


def test_a_shift_costs_nothing() -> None:
    # x' = x/2 + h2 ; h2' = h1, h1' = p: a three-slot shift register keeps two old predictions without moving them
    rows = 8
    A = np.zeros((rows, 3, 3))
    A[:, 0, 0], A[:, 2, 1] = 0.5, 1.0
    A[2:, 0, 2] = 1.0
    A[0, 2, 1] = 0.0
    b = np.zeros((rows, 3))
    b[:, 1] = 1.0
    zero, one = np.zeros((rows, 3)), np.ones(rows)
    plan = Plan(
        "shift", one, one, one, one, one, one, -one, -np.inf * one, np.inf * one, A, b, zero, zero, end=(1, 0.1)
    )
    a = plan.allocate()
    assert a.copies == 0 and a.physical == 3
    steady = plan.bytes_per_element()[3:-2]
    assert set(steady.tolist()) == {20}  # reads x, one old prediction and m, writes x and p


@pytest.mark.parametrize(
    ("plan", "bytes_", "slots"),
    [
        (solvers.ddim(CHAIN, 20), 12, 1),
        (solvers.ddpm(CHAIN, 20), 12, 1),
        (solvers.dpmpp_2m(CHAIN, 20), 20, 2),
        (solvers.heun(CHAIN, 20), 16, 2),
        (solvers.euler_maruyama(S.VP(), 20), 12, 1),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_bytes_per_element(plan: Plan, bytes_: int, slots: int) -> None:
    assert plan.slots == slots == plan.allocate().physical
    assert plan.bytes_per_element()[plan.nfe // 2] == bytes_
    assert plan.bytes_per_element(model_bytes=2)[plan.nfe // 2] == bytes_ - 2
    assert plan.bytes_per_element(guided=True)[plan.nfe // 2] == bytes_ + 4


def test_entry_rows() -> None:
    assert solvers.ddim(CHAIN, 5).entry_rows == [0, 1, 2, 3, 4]
    assert solvers.dpmpp_2m(CHAIN, 20).entry_rows == [0, 19]
    assert solvers.heun(CHAIN, 5).entry_rows == [0, 2, 4, 6, 8]


def test_packed_rows_are_aligned_and_exact() -> None:
    plan = solvers.heun(CHAIN, 4)
    table = plan.packed()
    assert table.dtype == np.float32 and table.shape == (7, row_width(2)) and row_width(2) % 4 == 0
    np.testing.assert_array_equal(table[:, 0], plan.c_skip.astype(np.float32))
    A, (b, d) = table[:, 8:12].reshape(7, 2, 2), table[:, 12:16].reshape(7, 2, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(A[:, :, 1], plan.A[:, :, 1].astype(np.float32))
    # p may be written out: what x and m are multiplied with in all stays
    of_x, of_m = plan.A[:, :, 0] + plan.b * plan.c_skip[:, None], plan.d + plan.b * plan.c_out[:, None]
    np.testing.assert_allclose(A[:, :, 0] + b * plan.c_skip[:, None], of_x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(d + b * plan.c_out[:, None], of_m, rtol=0, atol=1e-6)
    assert table[0, 4] == 1.0 and not table[:, 5].any()
    assert plan.pack("cpu") is plan.pack("cpu")
    assert torch.equal(plan.pack("cpu"), torch.from_numpy(table))
    assert np.all(solvers.ddpm(CHAIN, 4).packed()[:, 5] == [1, 1, 1, 0])


def test_a_changed_plan_packs_its_own_rows() -> None:
    """Whatever the plan it was made from has packed: its noise, and so its buffers, follow the new columns."""
    plan = solvers.ddpm(CHAIN, 4)
    plan.pack("cpu")
    changed = dataclasses.replace(plan, s=np.where(np.arange(4)[:, None] == 1, 0, plan.s))
    assert changed.pack("cpu")[:, 5].tolist() == [1, 0, 1, 0] and plan.pack("cpu")[:, 5].tolist() == [1, 1, 1, 0]
    assert torch.equal(changed.pack("cpu"), torch.from_numpy(changed.packed()))


def test_frozen() -> None:
    plan = solvers.ddim(CHAIN, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        plan.A[0] = 0


def test_print() -> None:
    text = str(solvers.dpmpp_2m(CHAIN, 4, clip=(-1, 1)))
    assert "dpmpp_2m" in text and "S1 = + p" in text and "p in [-1, 1]" in text and "999" in text
    assert text.count("\n") == 6
    assert "(976 rows)" in str(solvers.ddpm(CHAIN, 1000))
    assert repr(solvers.ddpm(CHAIN, 3)) == "Plan('ddpm(fixed_small)', nfe=3, slots=1, stochastic, end=(1.0, 0.0))"


def broken(**changes: object) -> None:
    dataclasses.replace(solvers.ddim(CHAIN, 4), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"A": np.ones((4, 1, 2))}, r"A must be \[N, r, r\]"),
        ({"A": np.zeros((0, 1, 1))}, "N >= 1"),
        ({"b": np.ones((4, 2))}, "b must have shape"),
        ({"times": np.arange(3)}, "times must have shape"),
        ({"draws": np.arange(3)}, "draws must have shape"),
        ({"c_skip": np.array([1, 1, np.nan, 1])}, "c_skip is not finite at row 2"),
        ({"A": np.full((4, 1, 1), np.inf)}, "A is not finite at row 0"),
        ({"init_scale": np.nan}, "init_scale is not finite"),
        ({"lo": np.ones(4), "hi": -np.ones(4)}, "lo <= hi"),
        ({"lo": np.full(4, np.nan)}, "lo <= hi"),
        ({"s": np.ones((4, 1)), "draws": np.ones(4)}, "the last row adds noise"),
        ({"s": np.array([[0], [1], [1], [0]])}, "row 1 adds noise .*, but draws none"),
        ({"b": np.full((4, 1), 0.5)}, "must return x0 itself"),
        ({"A": np.ones((4, 7, 7))}, "1 to 6 slots"),
    ],
)
def test_bad_tables(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        broken(**changes)


def test_first_row_may_read_slot_0_alone() -> None:
    plan = solvers.dpmpp_2m(CHAIN, 4)
    A = plan.A.copy()
    A[0, 0, 1] = 1.0
    with pytest.raises(ValueError, match="only 0 exists there"):
        dataclasses.replace(plan, A=A)
