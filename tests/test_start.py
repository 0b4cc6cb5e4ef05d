"""Plans that begin in the middle: what is left is what the whole plan does there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers

WARM = 3  # rows until a multistep method has its past
MAKERS: dict[str, Callable[..., fd.Plan]] = {
    "dpmpp_2m": solvers.dpmpp_2m, "dpmpp_3m": solvers.dpmpp_3m, "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde, "deis": solvers.deis, "unipc": solvers.unipc, "ddim": solvers.ddim,
    "dpm_solver": lambda *a, **o: solvers.dpm_solver(*a, kind="multistep", order=3, **o),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("final", ["zero", "min"])
def test_the_last_rows_of_a_long_plan(name: str, final: str) -> None:
    """20 steps are not few, though 10 of them are left: none of these falls to first order at its end."""
    for schedule in (S.VP(), S.EDM(), S.Betas(S.linear_betas(1000))):
        whole, rest = (MAKERS[name](schedule, 20, final=final, start=k) for k in (0, 10))
        assert rest.nfe == whole.nfe - 10 and rest.slots == whole.slots
        for column in ("A", "b", "d", "s"):
            a, b = getattr(whole, column)[10 + WARM :], getattr(rest, column)[WARM:]
            np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12, err_msg=column)


def test_churn_is_a_share_of_all_steps() -> None:
    """sigma rises to (1 + s_churn / 20) sigma, whatever start= skips."""
    for start in (0, 10, 15):
        plan = solvers.edm_stochastic(S.EDM(), 20, s_churn=4.0, s_max=50.0, start=start)
        at = S.EDM().sigma(np.linspace(1, 0, 20))[start:]
        inside = at <= 50
        np.testing.assert_allclose(plan.times[::2][inside] / at[inside], 1.2, rtol=1e-9)


def test_few_steps_fall_to_first_order() -> None:
    """Of 14, as published: the last row of 2M to the last level reads no earlier x0."""
    few, enough = (solvers.dpmpp_2m(S.VP(), n, final="min") for n in (14, 15))
    assert few.A[-1, 0, 1] == 0 and enough.A[-1, 0, 1] != 0
