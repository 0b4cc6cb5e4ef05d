"""Models of two times: an exact flow map is sampled exactly, whatever the number of steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.flow_map import _rising

MEAN, STD = 0.7, 0.5  # of Gaussian data
SHAPE = (3, 2, 5)


def spread(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def deviation(t: Tensor) -> Tensor:
    return torch.sqrt(((1 - t) * STD) ** 2 + t**2)


def moved(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Where the probability flow of N(MEAN, STD^2) data takes x_t at time r, x_t = (1 - t) x0 + t n."""
    return (1 - r) * MEAN + deviation(r) / deviation(t) * (x - (1 - t) * MEAN)


def mean_flow(x: Tensor, t: Tensor, r: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    t, r = spread(t, x), spread(r, x)
    return (x - moved(x, t, r)) / (t - r) + shift


@pytest.mark.parametrize("mode", ["eager", "auto", pytest.param("compile", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_mean_flow_is_exact_in_any_number_of_steps(steps: int, mode: str) -> None:
    plan = solvers.euler(S.Flow(3.0), steps, prediction="flow")  # a shifted grid
    x, seen = fd.sample(fd.flow_map(mean_flow, plan), plan, SHAPE, seed=2, mode=mode, trajectory=True)
    start = seen.x[0].double()
    for k, r in enumerate([*plan.times[1:], 0.0]):
        want = moved(start, torch.tensor(1.0), torch.tensor(r))
        torch.testing.assert_close(seen.x[k + 1].double(), want, rtol=0, atol=5e-6)
    assert torch.equal(x, seen.x[-1])


def test_the_model_sees_both_times() -> None:
    """Each row's own time and the next row's, for every sample, both halves of guidance, and the length of a step."""
    plan, seen = solvers.euler(S.Flow(), 4, prediction="flow"), []

    def model(x: Tensor, t: Tensor, r: Tensor, shift: Tensor) -> Tensor:
        seen.append((t.clone(), r.clone()))
        return mean_flow(x, t, r, shift)

    shifts = {"cond": {"shift": torch.ones(3, 1, 1)}, "uncond": {"shift": torch.zeros(3, 1, 1)}}
    fd.sample(fd.flow_map(model, plan), plan, SHAPE, seed=0, guidance=2.0, **shifts)
    times = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    for k, (t, r) in enumerate(seen):
        assert t.tolist() == [times[k]] * 6 and r.tolist() == [times[k + 1]] * 6
    short = fd.flow_map(lambda x, t, r: x * spread(t - r, x), plan)
    torch.testing.assert_close(
        short(torch.ones(2, 3), torch.tensor([0.75, 0.3])), torch.tensor([[0.25] * 3, [0.05] * 3])
    )


def test_ends() -> None:
    """A plan that stops early: r of the last row is `end`."""
    plan = solvers.euler(S.Flow(), 4, prediction="flow", final="min", t_end=0.2)
    r = []
    fd.sample(fd.flow_map(lambda x, t, s: r.append(float(s[0])) or x, plan, end=0.2), plan, (1, 2), seed=0)
    np.testing.assert_allclose(r, [*plan.times[1:], 0.2], rtol=1e-6)


def test_the_times_live_as_long_as_the_plan() -> None:
    """A captured graph reads them: many other plans later they are the same tensor."""
    seen: list[int] = []

    def model(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return x

    plan = solvers.euler(S.Flow(), 4, prediction="flow")
    for _ in range(2):
        fd.flow_map(model, plan)(torch.zeros(1, 2), torch.ones(1))
        seen.append(_rising(plan, 0.0, torch.device("cpu")).data_ptr())
        for steps in range(2, 300):
            other = solvers.euler(S.Flow(), steps, prediction="flow")
            fd.flow_map(model, other)(torch.zeros(1, 2), torch.ones(1))
    assert seen[0] == seen[1]


def test_two_ends_of_one_plan_are_two_tables() -> None:
    plan = solvers.euler(S.Flow(), 4, prediction="flow", final="min", t_end=0.2)
    ends = [fd.flow_map(lambda x, t, r: r, plan, end=end)(torch.zeros(1, 2), torch.tensor(plan.times[-1:]))
            for end in (np.float32(0.2), 0.1)]  # fmt: skip
    np.testing.assert_allclose(torch.cat(ends), [0.2, 0.1], rtol=1e-6)


class Timed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 5)

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.layer(x) * spread(t - r, x)


def test_a_module_stays_one() -> None:
    """Its parameters, dtype and state are the flow map's: samplers, optimizers, copies and pickles see them."""
    plan, net = solvers.euler(S.Flow(), 4, prediction="flow"), Timed().bfloat16()
    mapped = fd.flow_map(net, plan)
    assert dict(mapped.named_parameters()).keys() == {"model.layer.weight", "model.layer.bias"}
    x = fd.sample(mapped, plan, SHAPE, seed=1)
    again = pickle.loads(pickle.dumps(fd.Sampler(mapped, plan)))  # noqa: S301 - made here
    assert torch.equal(again(SHAPE, seed=1), x)
    assert len(list(fd.Unrolled(mapped, plan).parameters())) == 2


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fd.flow_map(3, solvers.euler(S.Flow(), 4, prediction="flow")), TypeError, "must be callable"),
        (lambda: fd.flow_map(mean_flow, "euler"), TypeError, "must be a fastdiff.Plan"),
        (lambda: fd.flow_map(mean_flow, solvers.euler(S.Flow(), 4, prediction="flow", final="min", t_end=0.2)),
         ValueError, r"stops early, at alpha, sigma = \(0.8, 0.2\): give end="),
        (lambda: fd.flow_map(mean_flow, solvers.euler(S.Flow(), 4, prediction="flow"), end=-np.inf), ValueError,
         "finite number.*got -inf"),
        (lambda: fd.flow_map(mean_flow, solvers.euler(S.Flow(), 4, prediction="flow"), end="0"), ValueError, "got '0'"),
    ],
)  # fmt: skip
def test_arguments(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (solvers.ddim(S.Betas(S.linear_betas(100)), 3), r"ddim\(eta=0\) has 99"),
        (solvers.restart(S.EDM(0.002, 80.0), 6), r"restart\S* has 80"),
        (solvers.euler(S.Flow(), 2000, prediction="flow", t_end=0.001), "fall from row to row to 0.002"),
    ],
    ids=["integers", "rising", "below_the_end"],
)
def test_errors(plan: fd.Plan, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fd.flow_map(mean_flow, plan, end=0.002)
