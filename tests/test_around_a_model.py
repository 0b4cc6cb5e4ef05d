"""Networks of other dtypes outside of fd.sample, code that a caller compiles, and messages about plain mistakes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd

VP = fd.schedules.VP()
CHAIN = fd.schedules.Betas(fd.schedules.linear_betas(20))
PLAN = fd.solvers.ddim(VP, 3, spacing="logsnr")


class Net(torch.nn.Module):
    """A linear eps, told t: float32 numbers that bfloat16 holds."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 4, dtype=dtype)
        with torch.no_grad():
            self.line.weight.copy_(0.5 * torch.eye(4))
            self.line.bias.fill_(0.25)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.line(x)
        return out


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_sees_its_own(dtype: torch.dtype) -> None:
    """As fd.sample shows it: the results of float32, to bfloat16's rounding of x and of the output."""
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    of, plain = Net(dtype), Net(torch.float32)
    assert torch.allclose(fd.drift(of, VP)(0.5, X), fd.drift(plain, VP)(0.5, X), atol=bound, rtol=bound)
    wide = fd.drift(plain, VP)(0.5, X.double())
    assert wide.dtype == torch.float64 and torch.allclose(wide.float(), fd.drift(plain, VP)(0.5, X), atol=1e-6)
    options: dict[str, Any] = {"variance": "fixed_small", "progress": False}
    got, want = (fd.training.bits_per_dim(m, X, CHAIN, **options).total for m in (of, plain))
    assert torch.allclose(got.double(), want.double(), rtol=bound)


def test_weights_of_eight_bits_say_nothing_of_the_input() -> None:
    class Stored(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return x @ self.line.weight.to(x.dtype).T + self.line.bias.to(x.dtype)

    stored = Stored(torch.float32)
    for p in stored.parameters():
        p.data = p.data.to(torch.float8_e4m3fn)
    assert torch.equal(fd.drift(stored, VP)(0.5, X), fd.drift(Net(torch.float32), VP)(0.5, X))  # 0.5 and 0.25 are exact
    with pytest.raises(TypeError, match="got torch.float8_e4m3fn of its parameters"):
        fd.sample(stored, PLAN, (2, 4))
    assert fd.sample(stored, PLAN, (2, 4), dtype=torch.float32).shape == (2, 4)  # type: ignore[union-attr]


def test_the_likelihood_of_a_float64_network() -> None:
    got, want = (fd.log_likelihood(Net(d), VP, X, rtol=1e-6, atol=1e-6) for d in (torch.float64, torch.float32))
    assert torch.allclose(got, want, atol=1e-3)


def test_a_float64_network_is_refused_by_a_sampler() -> None:
    with pytest.raises(TypeError, match=r"got torch.float64 of its parameters: model.float\(\), or dtype="):
        fd.sample(Net(torch.float64), PLAN, (2, 4))
    with pytest.raises(TypeError, match=r"must be one of .*, got torch.float64$"):
        fd.sample(Net(torch.float32), PLAN, (2, 4), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 8, 8)])
def test_sampling_inside_of_compiled_code(shape: tuple[int, ...]) -> None:
    """The graph breaks at the loop, which runs as it always does."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    torch.compiler.reset()
    expected = fd.sample(net, PLAN, shape, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.compile(lambda: fd.sample(net, PLAN, shape, seed=1) * 2, backend="eager")()
    assert torch.equal(got, 2 * expected)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_an_accelerated_step_inside_of_compiled_code(name: str) -> None:
    """From the first one on, which reads the schedule, and without a word of the compiler."""
    diffusers = pytest.importorskip("diffusers")
    torch.compiler.reset()
    stock = getattr(diffusers, name)(num_train_timesteps=37)
    results = []
    for scheduler, wrap in ((fd.accelerate(stock), torch.compile), (fd.accelerate(stock), lambda f, backend: f)):
        scheduler.set_timesteps(3)
        x = X.reshape(2, 1, 2, 2)
        step = wrap(lambda m, t, x, s=scheduler: s.step(m, t, x, return_dict=False)[0], backend="eager")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Dynamo")
            for t in scheduler.timesteps:
                x = step(0.3 * x, t, x)
        assert scheduler._fastdiff.stock is None
        results.append(x)
    assert torch.equal(*results)


def test_options_that_change_inside_of_compiled_code() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.compiler.reset()
    results = []
    for wrap in (torch.compile, lambda f, backend: f):
        scheduler = fd.accelerate(diffusers.DDIMScheduler(num_train_timesteps=41))
        scheduler.set_timesteps(3)
        step = wrap(
            lambda x, t, eta, s=scheduler: s.step(0.3 * x, t, x, eta=eta, variance_noise=0 * x + 1, return_dict=False)[
                0
            ],
            backend="eager",
        )
        x = X.reshape(2, 1, 2, 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Dynamo")
            for t, eta in zip(scheduler.timesteps, (0.0, 0.5, 0.5), strict=True):
                x = step(x, t, eta)
        results.append(x)
    assert torch.equal(*results)


def test_what_a_mistake_is_told() -> None:
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(TypeError, match=r"got a class: DDIMScheduler\(...\)"):
        fd.accelerate(diffusers.DDIMScheduler)

    class Pipeline:
        scheduler = diffusers.DDIMScheduler()

        def __call__(self) -> None:
            pass

    with pytest.raises(TypeError, match="probe needs a scheduler, got Pipeline: give its .scheduler"):
        fd.probe(Pipeline(), steps=6)
    if not torch.backends.cuda.is_built():
        with pytest.raises(ValueError, match="device 'cuda' is none of this torch: Torch not compiled with CUDA"):
            fd.sample(Net(torch.float32), PLAN, (2, 4), device="cuda")


def test_a_warning_points_at_the_line_that_called(tmp_path: Any) -> None:
    """Of a sampler, of fd.sample, of accelerate and of an accelerated step."""
    diffusers = pytest.importorskip("diffusers")

    def nan(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.nan

    stock = diffusers.DPMSolverMultistepScheduler(thresholding=True, algorithm_type="dpmsolver++", solver_order=1)
    ours = fd.accelerate(diffusers.VQDiffusionScheduler(num_vec_classes=8))
    ours.set_timesteps(3)
    calls: list[Any] = [
        lambda: fd.Sampler(nan, PLAN, check_finite="warn")((2, 4)),
        lambda: fd.sample(nan, PLAN, (2, 4), check_finite="warn"),
        lambda: fd.accelerate(diffusers.RePaintScheduler()),
        lambda: ours.step(torch.zeros(1, 8, 4), ours.timesteps[0], torch.zeros(1, 4, dtype=torch.int64)),
    ]
    assert fd.accelerate(stock) is not stock
    for call in calls:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                call()
            except Exception:  # what stock makes of these tensors
                assert call is calls[-1]
        assert [w.filename for w in seen if w.category is RuntimeWarning] == [__file__]
