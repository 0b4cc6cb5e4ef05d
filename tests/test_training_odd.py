"""Losses, times and the ideal model at odd inputs: twice differentiated, overflowing, very wide, far off, misused."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastdiff as fd
from fastdiff import ops, schedules
from fastdiff.ops import _dispatch
from fastdiff.training import ImportanceTimes
from fastdiff.training.bfn import interval
from fastdiff.training.bound import log_variance_range, vb_term

T = fd.training
F64 = torch.float64
CHAIN, VP = schedules.Betas(schedules.linear_betas(10)), schedules.VP()
CONTINUOUS, CLASSES = schedules.BFNContinuous(0.001), schedules.BFNDiscrete(3.0, 5)
LABELS = torch.tensor([[0, 3], [4, 1]])


def normal(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "denoising_loss": lambda m: ops.denoising_loss(m, None, 0.5, VP, [1, 2]),
    "gaussian_kl": lambda m: ops.gaussian_kl(torch.zeros(2, 10), torch.zeros(2, 10), m, torch.zeros(2, 10)),
    "vlb_loss": lambda m: T.vlb_loss(m.view(2, 2, 5), torch.zeros(2, 1, 5), 5, CHAIN, [1, 2]),
    "hybrid_loss": lambda m: T.hybrid_loss(m.view(2, 2, 5), torch.zeros(2, 1, 5), 5, CHAIN, [1, 2]),
    "bfn_discrete_loss": lambda m: T.bfn_discrete_loss(m.view(2, 2, 5), LABELS, 0.5, CLASSES),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loops", [True, False])
def test_a_second_derivative_of_given_inputs_is_refused(name: str, loops: bool) -> None:
    """The engine visits what leads to the inputs alone: the refusal must hang there."""
    with ops.cpu_compiler(loops):
        refused(LOSSES[name])


def refused(f: Callable[[Tensor], Tensor]) -> None:
    x = normal(2, 4, dtype=torch.float32)
    w = normal(4, 10, dtype=torch.float32, seed=1).requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        loss = f(x @ w).sum()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        return loss, gradient

    loss, gradient = both()
    (again,) = torch.autograd.grad(f(x @ w).sum(), w)
    assert torch.equal(gradient, again)
    v = torch.ones(4, 10, requires_grad=True)  # what the loss does not depend on has its derivative
    assert torch.equal(torch.autograd.grad((gradient * v).sum(), v, retain_graph=True)[0], gradient)
    with pytest.raises(RuntimeError, match="differentiate twice: this loss keeps its gradient"):
        torch.autograd.grad(loss + gradient.square().sum(), w)
    loss, gradient = both()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + gradient.square().sum()).backward(inputs=[w])
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.functional.hessian(lambda m: f(m).sum(), normal(2, 10, dtype=torch.float32))


@pytest.mark.parametrize("name", ["denoising_loss", "gaussian_kl", "bfn_discrete_loss"])
def test_the_incoming_gradient_is_a_source_too(name: str) -> None:
    """d/da of the gradient of sum a_b loss_b: it is linear in a, so a silent 0 would be wrong."""
    m = normal(2, 10, dtype=torch.float32).requires_grad_()
    a = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad((a * LOSSES[name](m)).sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(gradient.sum(), a)


@pytest.mark.parametrize("name", LOSSES)
def test_checkpointing_and_retained_graphs_keep_one_derivative(name: str) -> None:
    m = normal(2, 10, dtype=torch.float32).requires_grad_()
    (want,) = torch.autograd.grad(LOSSES[name](m).sum(), m)
    for reentrant in (False, True):
        loss = checkpoint(LOSSES[name], m, use_reentrant=reentrant).sum()
        m.grad = None
        loss.backward()
        assert torch.equal(m.grad, want)
    loss = LOSSES[name](m).sum()
    assert torch.equal(torch.autograd.grad(loss, m, retain_graph=True)[0], torch.autograd.grad(loss, m)[0])


def test_a_loss_on_classes_inside_a_transform() -> None:
    m = normal(2, 2, 5, dtype=torch.float32)

    def f(v: Tensor) -> Tensor:
        return T.bfn_discrete_loss(v, LABELS, 0.5, CLASSES).sum()

    leaf = m.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(m), want)
    each = torch.func.vmap(torch.func.grad(f))(torch.stack([m, -m]))
    torch.testing.assert_close(each, torch.stack([want, torch.func.grad(f)(-m)]))


@pytest.mark.compiled
@pytest.mark.parametrize("again", [True, False])
def test_a_kernels_loss_on_classes_compiles(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, traced on a CPU: the gradient made from the logits once more, or kept."""
    logits, x = normal(2, 3, 40, dtype=torch.float32), torch.arange(6).view(2, 3)
    leaf, traced = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = ops.categorical_loss(leaf, x)
    monkeypatch.setattr(_dispatch, "kernels_for", lambda x: True)
    monkeypatch.setattr(sys.modules[ops.categorical_loss.__module__], "_reads_again", lambda logits: again)
    torch._dynamo.reset()
    got = torch.compile(ops.categorical_loss, backend="aot_eager", fullgraph=True)(traced, x)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got.sum(), traced)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), leaf)[0])


def test_the_stream_of_noise_is_that_of_both_terms() -> None:
    out, x0, t = normal(2, 4, 5), normal(2, 2, 5, seed=1).clamp(-1, 1), torch.tensor([3, 0])
    x_t = ops.add_noise(x0, t, CHAIN, seeds=[1, 2], stream=5)
    simple = ops.denoising_loss(out[:, :2], x0, t, CHAIN, [1, 2], stream=5)
    bound = 10 * vb_term(out, x0, x_t, t, CHAIN, stop_mean=True)
    torch.testing.assert_close(T.vlb_loss(out, x0, t, CHAIN, [1, 2], stream=5), bound)
    got = T.hybrid_loss(out, x0, t, CHAIN, [1, 2], stream=5, weight=1.0)
    torch.testing.assert_close(got, simple + bound)


@pytest.mark.parametrize(("t", "v"), [(1, 300.0), (1, 1e4), (0, -300.0)])
def test_the_other_term_may_overflow(t: int, v: float) -> None:
    """A sample's gradient is that of its own term: of a wide one's KL d ln s^2 / 2, of a narrow one's full bin 0."""
    long = schedules.Betas(schedules.linear_betas(1000))
    out = torch.tensor([[[0.2], [v]]]).requires_grad_()
    x0, x_t = torch.tensor([[[0.2]]]), torch.tensor([[[0.3]]])
    loss = vb_term(out, x0, x_t, t, long, prediction="x0")
    (gradient,) = torch.autograd.grad(loss.sum(), out)
    low, high = (float(c) for c in log_variance_range(long, torch.tensor([t])))
    slope = 0.25 * (high - low) / math.log(2) if t else 0.0
    assert loss.isfinite().all() and gradient[0, 0, 0] == 0
    assert float(gradient[0, 1, 0]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("log_scale", [30.0, 32.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_wide_gaussian_has_its_density_in_a_bin(log_scale: float, dtype: torch.dtype) -> None:
    """p = 2 w N(x; mean, s^2) as s grows: -ln p = ln s + ln(255 sqrt(2 pi) / 2)."""
    x = torch.tensor([[0.5 / 127.5]], dtype=dtype)
    s = torch.full((1, 1), log_scale, dtype=dtype, requires_grad=True)
    nll = ops.decoder_nll(x, torch.zeros_like(x), s)
    assert float(nll.detach()) == pytest.approx(log_scale + math.log(255 * math.sqrt(2 * math.pi) / 2), rel=1e-7)
    assert float(torch.autograd.grad(nll.sum(), s)[0]) == pytest.approx(1.0, rel=1e-6)


def test_where_the_decoder_changes_its_formula() -> None:
    """Around half a bin of 1e-3 std both are the integral of the density, here by Gauss-Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    for mean in (0.0, 0.7, 40.0):
        for log_scale in np.linspace(1.2, 1.6, 9):
            s = math.exp(log_scale)
            u = (0.5 / 127.5 - mean + nodes / 255) / s
            want = -math.log(float((weights * np.exp(-u * u / 2)).sum()) / (255 * s * math.sqrt(2 * math.pi)))
            given = [torch.tensor([[v]], dtype=F64) for v in (0.5 / 127.5, mean, log_scale)]
            assert float(ops.decoder_nll(*given)) == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("log_std", [-1e4, -100.0, -38.0, -30.0, -25.0, 89.0, 700.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_log_std_beyond_all_numbers_has_a_gradient(log_std: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 1), 0.125, dtype=dtype)
    for f in (
        lambda m: T.bfn_discretised_loss(m, x, x, 0.0, CONTINUOUS, bins=8),
        lambda m: T.bfn_discretised_loss(m, x, x, 1.0, CONTINUOUS, bins=8, steps=4, seeds=[1]),
        lambda m: T.bfn_discretised_reconstruction(m, x, x, CONTINUOUS, bins=8),
        lambda m: T.bfn_discretised_reconstruction(m, x, x, CONTINUOUS, bins=8, prediction="x0"),
    ):
        for mean in (0.0, 0.9):  # of eps: far from x's bin, too
            m = torch.tensor([[[mean], [log_std]]], dtype=dtype).requires_grad_()
            loss = f(m)
            assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), m)[0].isfinite().all()
    if log_std <= -38:  # all mass in x's own bin, whose centre x is
        assert float(T.bfn_discretised_loss(m, x, x, 0.0, CONTINUOUS, bins=8).detach()) == 0


def test_nothing_is_said_of_data_that_are_not_numbers() -> None:
    x = torch.tensor([[[math.nan]], [[0.125]]])
    loss = T.bfn_discretised_reconstruction(torch.zeros(2, 2, 1), x, torch.zeros(2, 1, 1), CONTINUOUS, bins=8)
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(1, 300), (3, 128, 128)])
def test_a_discretised_loss_does_not_depend_on_the_batch(shape: tuple[int, ...]) -> None:
    x = (normal(4, *shape, dtype=torch.float32).clamp(-0.9, 0.9) * 128).round() / 128
    out = normal(4, 2 * shape[0], *shape[1:], dtype=torch.float32, seed=1)

    def loss(pick: slice) -> Tensor:
        return T.bfn_discretised_loss(out[pick], x[pick], x[pick], 0.5, schedules.BFNContinuous(0.02), bins=64)

    assert torch.equal(torch.cat([loss(slice(i, i + 1)) for i in range(4)]), loss(slice(None)))


def test_samples_without_tokens() -> None:
    logits, x = torch.zeros(2, 0, 5, requires_grad=True), torch.zeros(2, 0, dtype=torch.int64)
    for options in ({}, {"steps": 2, "seeds": [1, 2]}):
        loss = T.bfn_discrete_loss(logits, x, 0.5, CLASSES, **options)
        assert loss.tolist() == [0, 0]
        loss.sum().backward()


def test_times_of_many_steps() -> None:
    """fp32 holds t to 2^-25, so between two of 10^6 steps there is a time that is none's beginning; NumPy's n too."""
    for n in (np.int64(1000), 10**6):
        t = T.step_times(100, n, generator=torch.Generator().manual_seed(0))
        i, _ = interval(t, CLASSES, n)
        assert torch.equal(((1 - (i - 1) / int(n)).float()), t)
    with pytest.raises(ValueError, match="the beginning of a step"):
        interval(torch.tensor([0.5000005], dtype=F64), CLASSES, 10**6)
    logits, x = torch.zeros(2, 2, 5), LABELS
    want = T.bfn_discrete_loss(logits, x, 0.5, CLASSES, steps=10, seeds=[1, 2])
    assert torch.equal(T.bfn_discrete_loss(logits, x, 0.5, CLASSES, steps=np.int64(10), seeds=[1, 2]), want)


def test_numpy_times() -> None:
    x = normal(2, 3, dtype=torch.float32)
    for t, schedule in ((np.int64(3), CHAIN), (np.float32(0.5), VP), (np.float64(0.5), VP)):
        want = ops.add_noise(x, t.item(), schedule, seeds=[1, 2])
        assert torch.equal(ops.add_noise(x, t, schedule, seeds=[1, 2]), want)
    with pytest.raises(TypeError, match="got bool"):
        ops.add_noise(x, np.bool_(True), CHAIN, seeds=[1, 2])  # type: ignore[arg-type]


# times


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e200])
def test_importance_times_survive_a_loss(bad: float) -> None:
    times = ImportanceTimes(CHAIN, history=2)
    losses = torch.arange(1.0, 11.0, dtype=F64)
    for _ in range(2):
        times.update(torch.arange(10), losses)
    times.update(torch.tensor([3, 3]), torch.full((2,), bad, dtype=F64))
    want = losses.clone()
    if math.isfinite(bad):
        want[3] = bad
    want = 0.999 * want / want.sum() + 0.001 / 10
    torch.testing.assert_close(times.probabilities(), want)
    times.losses[0, 0] = math.nan  # as an older release has kept it
    assert torch.equal(times.probabilities(), torch.full((10,), 0.1, dtype=F64))


def test_importance_times_take_the_good_of_a_batch() -> None:
    """Bad losses take no place: the last `history` good ones of a bin stay."""
    times = ImportanceTimes(CHAIN, history=2)
    t, bad = torch.tensor([1, 1, 1, 1, 2]), math.nan
    times.update(t, torch.tensor([1.0, bad, 2.0, 3.0, bad]))
    assert sorted(times.losses[1].tolist()) == [2, 3] and times.counts.tolist() == [0, 3, *[0] * 8]


@pytest.mark.parametrize(
    ("schedule", "mean"),
    [(VP, -4.0), (VP, -6.0), (schedules.Flow(), -9.0), (schedules.Flow(), 6.0), (schedules.Cosine(), -8.0)],
)
def test_log_normal_times_have_no_heap_at_an_endless_end(schedule: schedules.Schedule, mean: float) -> None:
    """The levels are the normals they came from, to fp32's times: no two in ten thousand are one time."""
    count = 10000
    t = T.log_normal_times(count, schedule, mean=mean, generator=torch.Generator().manual_seed(0))
    drawn = mean + 1.2 * torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=F64)
    level = -0.5 * torch.from_numpy(schedule.logsnr(t.double().numpy()))
    assert float((level - drawn).abs().max()) < (1e-6 if mean < 0 else 0.01)
    assert int(t.unique(return_counts=True)[1].max()) <= (2 if mean < 0 else 20)


# the ideal model


def direct(x: Tensor, data: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """ln q and E[x0 | x] by differences, in float64."""
    part = -((x[:, None] - alpha * data[None]) ** 2).flatten(2).sum(2) / (2 * sigma**2) - math.log(len(data))
    mean = (torch.softmax(part, 1) @ data.flatten(1)).view_as(x)
    return torch.logsumexp(part, 1) - x[0].numel() * math.log(sigma * math.sqrt(2 * math.pi)), mean


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.2, 20.0])
def test_images_of_sixteen_bits_each_twice(sigma: float) -> None:
    pixels = torch.randint(65536, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    data = pixels.double().repeat(2, 1, 1, 1)
    x = data[:4] + sigma * normal(4, 3, 16, 16)
    density, mean = direct(x, data, 1.0, sigma)
    model = T.ideal_model(data, schedules.EDM(), "x0")
    assert float((model(x, torch.full((4,), sigma, dtype=F64)) - mean).abs().max()) < 1e-6
    if sigma == 0.002:
        got = T.log_density(x, data, 0.0, schedules.EDM())
        assert torch.allclose(got, density, rtol=1e-9, atol=0)


def test_an_offset_costs_no_digits() -> None:
    data = normal(50, 2, 8) + 1e4
    for t in (0.01, 0.3):
        alpha, sigma = (float(v) for v in VP.alpha_sigma(np.float64(t)))
        x = alpha * data[:5] + sigma * normal(5, 2, 8, seed=1)
        density, mean = direct(x, data, alpha, sigma)
        assert torch.allclose(T.log_density(x, data, t, VP), density, rtol=1e-9, atol=0)
        want = (alpha * mean - x) / sigma**2
        assert float((T.score(x, data, t, VP) - want).abs().max()) < 1e-9 * float(want.abs().max())


def test_where_nothing_is_noise() -> None:
    """sigma = 0: the nearest point; what is divided by sigma is 0 there and infinite elsewhere."""
    data = torch.tensor([[1.1], [-1.3], [-1.3]], dtype=F64)
    x = torch.tensor([[1.1], [-1.2]], dtype=F64)
    for prediction, want in {
        "x0": [1.1, -1.3], "eps": [0, math.inf], "v": [0, math.inf], "score": [0, -math.inf], "flow": [-1.1, math.inf],
    }.items():  # fmt: skip
        got = T.ideal_model(data, VP, prediction)(x, 0.0)[:, 0]
        assert got.tolist() == pytest.approx(want)
    shown = 2 * x  # c_in = 1 / sigma_data
    assert T.ideal_model(data, VP, "edm")(shown, -math.inf).tolist() == [[0], [-math.inf]]


def test_the_ideal_model_takes_one_time() -> None:
    data, x = normal(4, 3), normal(2, 3, seed=1)
    model = T.ideal_model(data, VP)
    want = model(x, torch.full((2,), 0.5))
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(model(x, t), want)


NAN = torch.tensor([math.nan, 0.5])
X, C0 = torch.zeros(2, 3), torch.zeros(2, 2, 5)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: T.hybrid_loss(X, X, 0, CHAIN, [1, 2], target="v"), TypeError, "give prediction='v'"),
    (lambda: T.prior_kl(torch.tensor(1.0), CHAIN), ValueError, "x0 must have a batch axis"),
    (lambda: T.bits_per_dim(lambda x, t: x, torch.tensor(1.0), CHAIN), ValueError, "x0 must have a batch axis"),
    (lambda: T.bits_per_dim(lambda x, t: x, X, CHAIN, clip=3), ValueError, "clip must be .* got 3"),  # type: ignore[arg-type]
    (lambda: T.vlb_loss(X, X, 0, CHAIN, [1, 2], clip=3), ValueError, "clip must be .* got 3"),  # type: ignore[arg-type]
    (lambda: T.bfn_discrete_loss(C0, LABELS, 0.5, CLASSES, row=-1), ValueError, "give steps"),
    (lambda: T.bfn_discrete_loss(C0, LABELS, 0.5, CLASSES, index=torch.zeros(2).long()), ValueError, "give steps"),
    (lambda: T.bfn_discrete_loss(C0, LABELS, 0.5, CLASSES, steps=0), ValueError, "integer >= 1, got 0"),
    (lambda: T.bfn_discrete_loss(C0, LABELS, 0.5, CLASSES, steps=2.0), ValueError, "got 2.0"),  # type: ignore[arg-type]
    (lambda: T.bfn_discrete_loss(C0, LABELS, 0.5, CLASSES, steps=True), ValueError, "got True"),
    (lambda: ImportanceTimes(CHAIN).update(torch.tensor([99, -5]), torch.ones(2)), ValueError, r"0..9.*got -5..99"),
    (lambda: ImportanceTimes(VP).update(NAN, torch.ones(2)), ValueError, "got nan"),
    (lambda: ImportanceTimes(CHAIN).update(NAN, torch.ones(2)), TypeError, "an integer index .* got torch.float32"),
    (lambda: ImportanceTimes(VP).update(torch.tensor([1]), torch.ones(1)), TypeError, "floating point"),
    (lambda: ImportanceTimes(VP).update([0.5], torch.ones(1)), TypeError, "t must be a Tensor"),  # type: ignore[arg-type]
    (lambda: ImportanceTimes(CHAIN).load_state_dict({}), ValueError, "holds losses, counts, got nothing"),
    (
        lambda: ImportanceTimes(CHAIN).load_state_dict(ImportanceTimes(CHAIN, history=1).state_dict()),
        ValueError,
        r"shape \(10, 10\), got \(10, 1\)",
    ),
    (lambda: T.ideal_model(X, VP, sigma_data=0.0), ValueError, "sigma_data must be None or a finite number > 0"),
    (lambda: T.ideal_model(X, VP, sigma_data=-1.0), ValueError, "got -1.0"),
    (lambda: T.ideal_model(X, VP, weights=torch.tensor([1.0, math.inf])), ValueError, "finite and > 0"),
    (lambda: T.ideal_model(X, VP)(X, torch.zeros(3)), ValueError, r"shape \(2,\), got \(3,\)"),
    (lambda: T.ideal_model(X, VP)(X, torch.zeros(2, 1)), ValueError, r"got \(2, 1\)"),
    (lambda: T.ideal_model(X, VP)(X, "a"), TypeError, "a number or a tensor"),  # type: ignore[arg-type]
    (lambda: T.ideal_model(X, VP)(X, 5.0), ValueError, "a model time of VP.* got 5..5"),
    (lambda: T.ideal_model(X, schedules.Flow())(X, torch.tensor([0.5, 1.5])), ValueError, "got 0.5..1.5"),
    (lambda: T.ideal_model(X, schedules.EDM())(X, -1.0), ValueError, "got -1..-1"),
    (lambda: T.ideal_model(X, VP)(X, math.nan), ValueError, "got nan"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
