"""What fd.sample refuses and what it says then, and what it does with values that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from tests.test_sampler import PLANS, Conditional, elementwise


@pytest.mark.parametrize("mode", ["warn", "raise", "off"])
@pytest.mark.parametrize("where", [3, 12])
def test_check_finite(mode: str, where: int) -> None:
    plan, calls = PLANS["heun"], []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(0)
        out = elementwise(x, t)
        return (
            out.index_fill(1, torch.tensor([2]), torch.nan if where == 3 else torch.inf)
            if len(calls) == where + 1
            else out
        )

    if mode == "raise":
        with pytest.raises(ValueError, match=f"not finite, first at row {where} of 13"):
            fd.sample(model, plan, (2, 4), check_finite=mode)
    elif mode == "warn":
        with pytest.warns(RuntimeWarning, match=f"first at row {where} of 13"):
            x = fd.sample(model, plan, (2, 4), check_finite=mode)
    if mode != "raise":
        x = fd.sample(model, plan, (2, 4), check_finite="off") if mode == "off" else x
        assert not torch.isfinite(x).all()  # NaN is not hidden by a clamp or a fused loop
    assert len(calls) == 13  # read once, at the end


def test_nan_passes_the_clamp() -> None:
    x = fd.sample(lambda x, t: torch.full_like(x, torch.nan), PLANS["ddpm"], (1, 4))
    assert torch.isnan(x).all()


MODEL: Any = elementwise
PLAN = PLANS["heun"]
UPWARD = fd.solvers.ddim_inversion(fd.schedules.VP(), 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: fd.sample("net", PLAN, (1, 2)), TypeError, "model must be callable"),
        (lambda: fd.sample(MODEL, "ddim", (1, 2)), TypeError, "plan must be a fastdiff.Plan"),
        (lambda: fd.sample(MODEL, PLAN, 3), TypeError, "shape must be a sequence of integers"),
        (lambda: fd.sample(MODEL, PLAN, ()), ValueError, r"shape must be \(B, ...\)"),
        (lambda: fd.sample(MODEL, PLAN, (2.5, 2)), ValueError, r"shape must be \(B, ...\)"),
        (lambda: fd.sample(MODEL, PLAN, (-1, 2)), ValueError, "integers >= 0"),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), mode="fast"),
            ValueError,
            "valid: auto, eager, compile, step_graph, loop_graph",
        ),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), mode="step_graph"), ValueError, "needs a CUDA device"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), mode="loop_graph"), ValueError, "needs a CUDA device"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), noise="normal"), ValueError, "valid: philox, torch"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), check_finite="yes"), ValueError, "valid: off, warn, raise"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), seed=-1), ValueError, r"2\*\*63"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), seed=2**63), ValueError, r"2\*\*63"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), seed=1.5), TypeError, "seed must be an int"),
        (lambda: fd.sample(MODEL, PLAN, (2, 2), seeds=[1]), ValueError, "one seed a sample"),
        (lambda: fd.sample(MODEL, PLAN, (2, 2), seed=0, seeds=[1, 2]), ValueError, "either seed or seeds, got both"),
        (
            lambda: fd.sample(MODEL, PLAN, (2, 2), noise="torch", seed=0, generator=torch.Generator()),
            ValueError,
            "either a generator or seed and seeds",
        ),
        (
            lambda: fd.sample(
                MODEL, fd.solvers.euler(fd.schedules.Flow(), 3, prediction="v"), (2, 2), x_init=torch.ones(2, 2)
            ),
            ValueError,
            "x_init is lost where plan 'euler' starts",
        ),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), noise="torch", seed=1, first=2),
            ValueError,
            "first goes with noise='ph",
        ),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), noise="torch", generator=torch.Generator(), first=2),
            ValueError,
            "starts at its seed; got first=2",
        ),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), first=-1), ValueError, "first must be"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), generator=torch.Generator()), ValueError, "noise='torch' only"),
        (lambda: fd.sample(MODEL, PLAN, (3, 2), noise="torch", generator=[torch.Generator()] * 2), ValueError, "or 3"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), noise="torch", generator=5), TypeError, "generator must be"),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), x_T=torch.zeros(1, 3)),
            ValueError,
            r"x_T must have the shape asked for, \(1, 2\)",
        ),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), x_T=torch.zeros(1, 2, dtype=torch.int64)), TypeError, "floating point"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), x_T=[[0, 0]]), TypeError, "x_T must be a Tensor"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), x_T=torch.zeros(1, 2, device="meta")), ValueError, "meta"),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), x_T=torch.zeros(1, 2), x_init=torch.zeros(1, 2)),
            ValueError,
            "not both",
        ),
        (lambda: fd.sample(MODEL, UPWARD, (1, 2)), ValueError, "'ddim_inversion' starts from data, .* x_init, or x_T"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), guidance=2.0), ValueError, "guidance needs uncond"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), uncond={}), ValueError, "without guidance"),
        (lambda: fd.sample(MODEL, PLAN, (2, 2), uncond={}, guidance=[1.0, 2.0, 3.0]), ValueError, r"\(2,\) per sample"),
        (lambda: fd.sample(MODEL, PLAN, (2, 2), uncond={}, guidance=float("nan")), ValueError, "finite"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), cond=[1]), TypeError, "cond must be a dict"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), callback=3), TypeError, "callback must be callable"),
        (
            lambda: fd.sample(MODEL, PLAN, (1, 2), callback=lambda *a: torch.zeros(3)),
            ValueError,
            "callback must return a state",
        ),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), callback=lambda *a: 3), TypeError, "None or a Tensor"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), dtype=torch.float64), TypeError, "dtype, the model's input type"),
        (lambda: fd.sample(MODEL, PLAN, (1, 2), out_dtype=torch.int64), TypeError, "out_dtype must be"),
        (lambda: fd.Sampler(MODEL, PLAN, stepz=3), TypeError, "unknown option 'stepz'; valid: seed"),
        (lambda: fd.Sampler(MODEL, PLAN)((1, 2), steps=3), TypeError, "unknown option 'steps'"),
        (
            lambda: fd.sample(lambda x, t: x[:, :1], PLAN, (1, 2)),
            ValueError,
            r"shape of its input, \(1, 2\), got \(1, 1\)",
        ),
        (lambda: fd.sample(lambda x, t: (x,), PLAN, (1, 2)), TypeError, "must return a Tensor, got tuple"),
        (lambda: fd.sample(lambda x, t: x.double(), PLAN, (1, 2)), TypeError, "got torch.float64"),
        (lambda: fd.sample(lambda x, t: x.mul_(2), PLAN, (1, 2)), ValueError, "in place"),
        (lambda: fd.sample(MODEL, PLANS["ddpm"], (1, 2), noise=lambda row, like: 0), TypeError, "must return a Tensor"),
        (
            lambda: fd.sample(MODEL, PLANS["ddpm"], (1, 2), noise=lambda row, like: torch.zeros(3)),
            ValueError,
            "must return shape",
        ),
        (
            lambda: fd.sample(
                Conditional(),
                PLAN,
                (2, 2),
                cond={"shift": torch.zeros(2)},
                uncond={"shift": torch.zeros(3)},
                guidance=2.0,
            ),
            ValueError,
            "cannot be joined",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=text):
        call()
