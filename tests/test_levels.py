"""Coefficient rows: kernel and C++ loop against the schedules' formulas and the targets' definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff import schedules as S
from fastdiff.ops import _dispatch, _levels
from fastdiff.ops.add_noise import TARGETS
from tests.kernel_runs import on_kernels

SCHEDULES = [S.VP(), S.VP(1e-3, 0.5), S.SubVP(), S.VE(0.01, 348.0), S.Flow(), S.Flow(3.1), S.EDM(), S.EDM(0.0, 20.0)]
SCHEDULES += [S.Cosine(), S.BFNContinuous(0.02), S.BFNContinuous(0.999), S.BFNDiscrete(3.0, 27), S.BFNDiscrete(0.7, 2)]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
HALF = 2.0**-24 * (1 + 1e-6)  # of a number: half a unit in the last place of float32


@pytest.fixture(params=["loop", "kernel"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "loop":
        request.getfixturevalue("cpp_loops")
    on_gpu = request.param == "kernel" and torch.cuda.is_available()
    with on_kernels() if request.param == "kernel" else nullcontext():
        yield torch.device("cuda" if on_gpu else "cpu")


def times() -> Tensor:
    small = 2.0 ** -torch.arange(1, 60, 3, dtype=torch.float64)
    return torch.cat([torch.linspace(0, 1, 257, dtype=torch.float64), small, 1 - small])


def rounded(got: Tensor, want: Tensor) -> bool:
    """Are these float64 numbers rounded once to float32?"""
    got, want = got.cpu(), want.cpu()
    near = (got.double() - want).abs() <= (HALF * want.abs()).clamp_min(2.0**-150)
    return bool(torch.where(want.float().isfinite(), near, got == want.float()).all())


@schedules
@pytest.mark.parametrize("target", [None, *TARGETS])
def test_rows_are_the_formulas_rounded_once(schedule: S.Schedule, target: str | None, device: Any) -> None:
    t = times()
    alpha, sigma = schedule.alpha_sigma(t)
    pair = (alpha, sigma) if target is None else TARGETS[target](alpha, sigma)
    assert rounded(_levels.coefficients(schedule, t.to(device), "noise", target),
                   torch.stack([alpha, sigma, *pair], 1))  # fmt: skip
    if target is not None:
        want = torch.stack([*pair, torch.ones_like(t), torch.zeros_like(t)], 1)
        usual = pair[0].isfinite() & pair[1].isfinite()
        assert rounded(_levels.coefficients(schedule, t.to(device), "loss", target)[usual], want[usual])


@pytest.mark.parametrize("schedule", [S.BFNDiscrete(3.0, 27), S.BFNDiscrete(0.7, 2)], ids=str)
def test_rows_of_classes(schedule: S.BFNDiscrete, device: Any) -> None:
    """sigma = sqrt(K beta_1) u, of the one channel of two classes sqrt(2) times that; alpha = K beta_1 u^2."""
    t = times()
    u, scale = 1 - t, schedule.num_classes * schedule.beta_1
    sigma = math.sqrt(scale * (2 if schedule.num_classes == 2 else 1)) * u
    got = _levels.coefficients(schedule, t.to(device), "classes")
    assert rounded(got, torch.stack([scale * u * u, sigma] * 2, 1))


@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_times_of_any_dtype_and_outside(schedule: S.Schedule, dtype: torch.dtype, device: Any) -> None:
    """A time is what its dtype holds; outside [0, 1], and NaN, give NaN in every column."""
    t = torch.tensor([0.0, 0.3, -0.01, 0.7, 1.01, math.nan, math.inf, 1.0], dtype=dtype)
    got = _levels.coefficients(schedule, t.to(device), "noise", "v").cpu()
    outside = ~((t >= 0) & (t <= 1))
    assert got.isnan().all(1).tolist() == got.isnan().any(1).tolist() == outside.tolist()
    inside = t[~outside].double()
    alpha, sigma = schedule.alpha_sigma(inside)
    assert rounded(got[~outside], torch.stack([alpha, sigma, *TARGETS["v"](alpha, sigma)], 1))


def test_strided_times_and_none(device: Any) -> None:
    t = torch.linspace(0, 1, 600, device=device)
    got = _levels.coefficients(S.VP(), t[::2], "noise")
    assert torch.equal(got, _levels.coefficients(S.VP(), t, "noise")[::2])
    assert _levels.coefficients(S.VP(), t[:0], "noise").shape == (0, 4)


@dataclass(frozen=True)
class Twice(S.Flow):
    """A schedule of a person's own: another sigma under a known name."""

    def sigma(self, t: Any) -> Any:
        return 2.0 * super().sigma(t)


def test_what_runs_it(device: Any) -> None:
    """Known schedules by exact type, where kernels or loops run; not float64, not a subclass, not under a transform."""
    assert tuple(TARGETS) == _levels.TARGETS
    x = torch.zeros(3, 8, device=device)
    assert all(_levels.usable(s, x) for s in SCHEDULES)
    assert not _levels.usable(Twice(), x) and not _levels.usable(S.Betas([0.1, 0.2]), x)
    assert not _levels.usable(S.VP(), x.double()) and not _levels.usable(S.VP(), x, x.double())
    t = torch.tensor([0.2, 0.5, 0.9], device=device)
    noise = torch.ones_like(x)
    want = torch.tensor([0.8 + 0.4, 0.5 + 1.0, 0.1 + 1.8])[:, None].expand(3, 8)
    got = ops.add_noise(noise, t, Twice(), noise=noise)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)
    known = []
    torch.func.vmap(lambda v: known.append(_levels.usable(S.VP(), v)) or v)(x)
    assert known == [False]
    with ops.cpu_compiler(False):
        assert _levels.usable(S.VP(), x) == _dispatch.kernels_for(x)
