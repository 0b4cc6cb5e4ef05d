"""q(x_t | x_0) and training targets: kernel against reference, reference against closed forms."""

import math

import numpy as np
import pytest
import torch

from fastdiff import ops, rng, training
from fastdiff.schedules import VE, VP, Betas, Flow, SubVP, linear_betas

CHAIN = Betas(linear_betas(1000))
SEEDS = torch.tensor([3, 2**62 + 5, 8])
TARGETS = ("eps", "v", "x0", "score", "flow")
TOLERANCE = 4e-6  # relative to the largest value
SHAPES = [(), (1,), (0,), (7,), (2, 19, 7), (3, 1003)]


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(shape, dtype=torch.float32, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, want, tolerance=TOLERANCE):
    got, want = got.cpu().double(), want.cpu().double()
    assert got.shape == want.shape
    return got.numel() == 0 or bool((got - want).abs().max() <= tolerance * want.abs().max())


def test_closed_forms():
    """alpha_bar by its product, every target by its definition, on one sample in float64."""
    x0, n = data((5,), torch.float64), data((5,), torch.float64, seed=1)
    t = torch.tensor([0, 400, 999])
    for b in range(3):
        bar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(int(t[b]) + 1))
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        want = {
            "eps": n[b],
            "v": alpha * n[b] - sigma * x0[b],
            "x0": x0[b],
            "score": -n[b] / sigma,
            "flow": n[b] - x0[b],
        }
        for target in TARGETS:
            x_t, goal = ops.add_noise(x0, t, CHAIN, noise=n, target=target)
            assert torch.allclose(x_t[b], alpha * x0[b] + sigma * n[b], rtol=0, atol=1e-13)
            assert torch.allclose(goal[b], want[target], rtol=1e-12, atol=1e-12)


def test_v_is_normalised_where_alpha_sigma_are_not():
    """VE: alpha = 1, so v = (eps - sigma x0) / sqrt(1 + sigma^2)."""
    x0, n, t = data((4,), torch.float64), data((4,), torch.float64, 1), torch.tensor([0.2, 0.5, 1.0])
    schedule = VE(0.01, 50.0)
    sigma = torch.from_numpy(np.asarray(schedule.sigma(t.numpy())))[:, None]
    x_t, v = ops.add_noise(x0, t, schedule, noise=n, target="v")
    assert torch.allclose(x_t, x0 + sigma * n, rtol=1e-12)
    assert torch.allclose(v, (n - sigma * x0) / torch.sqrt(1 + sigma**2), rtol=1e-12)


@pytest.mark.parametrize("schedule", [CHAIN, VP(), SubVP(), Flow(3.0)], ids=repr)
@pytest.mark.parametrize("target", [None, *TARGETS])
def test_against_float64(schedule, target, device):
    """In-kernel noise is rng.normal(seeds, sample, row=0, stream=1); everything else to fp32 rounding."""
    x0 = data((3, 41))
    t = torch.tensor([0, 500, 999]) if schedule is CHAIN else torch.tensor([0.01, 0.4, 1.0])
    n = rng.normal(SEEDS, (3, 41), row=0, stream=1).double()
    want = ops.add_noise_ref(x0.double(), t if schedule is CHAIN else t.double(), schedule, noise=n, target=target)
    got = ops.add_noise(x0.to(device), t.to(device), schedule, seeds=SEEDS.to(device), target=target)
    if target is None:
        assert close(got, want)
    else:
        assert close(got[0], want[0]) and close(got[1], want[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, device):
    x0, t = data(shape), torch.tensor([5, 0, 999])
    index = torch.tensor([4, 0, 2**31 + 1])
    n = rng.normal(SEEDS, shape, row=3, stream=1, index=index)
    want = ops.add_noise_ref(x0.double(), t, CHAIN, noise=n.double(), target="v")
    got = ops.add_noise(
        x0.to(device), t.to(device), CHAIN, seeds=SEEDS.to(device), index=index.to(device), row=3, target="v"
    )
    assert close(got[0], want[0]) and close(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, device):
    x0, t = data((5, 13), dtype), torch.tensor([100, 300, 900])
    n = rng.normal(SEEDS, (5, 13))
    want = ops.add_noise_ref(x0.double(), t, CHAIN, noise=n.double(), target="v")
    got = ops.add_noise(x0.to(device), t.to(device), CHAIN, seeds=SEEDS.to(device), target="v")
    ulp = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert bool(((a.cpu().double() - b).abs() <= ulp * b.abs() + TOLERANCE * b.abs().max()).all())
    wide = ops.add_noise(x0.to(device), t.to(device), CHAIN, seeds=SEEDS.to(device), out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and close(wide, want[0])


def test_strided_input_given_noise_and_scalar_time(device):
    x0, n = data((6, 5)).transpose(1, 2), data((6, 5), seed=2).transpose(1, 2)
    want = ops.add_noise_ref(x0.double(), 250, CHAIN, noise=n.double())
    assert close(ops.add_noise(x0.to(device), 250, CHAIN, noise=n.to(device)), want)
    assert close(ops.add_noise(x0.to(device), torch.tensor(250, device=device), CHAIN, noise=n.to(device)), want)
    want = ops.add_noise_ref(x0.double(), 0.3, VP(), noise=n.double())
    assert close(ops.add_noise(x0.to(device), 0.3, VP(), noise=n.to(device)), want)


def test_batch_invariance(device):
    x0 = torch.randn(64, 33, generator=torch.Generator().manual_seed(3)).to(device)
    seeds, t = (torch.arange(64) * 5 + 1).to(device), (torch.arange(64) * 15).to(device)
    whole = ops.add_noise(x0, t, CHAIN, seeds=seeds)
    for pick in (slice(0, 7), slice(9, 10), torch.randperm(64, generator=torch.Generator().manual_seed(4)).to(device)):
        assert torch.equal(ops.add_noise(x0[pick], t[pick], CHAIN, seeds=seeds[pick]), whole[pick])


def test_gradient(device):
    """d x_t / d x0 = alpha, d v / d x0 = -sigma; the values are those of the call without a gradient."""
    x0 = data((7,)).to(device).requires_grad_()
    t = torch.tensor([10, 400, 999], device=device)
    x_t, v = ops.add_noise(x0, t, CHAIN, seeds=SEEDS.to(device), target="v")
    (gradient,) = torch.autograd.grad(x_t.sum() + 2 * v.sum(), x0)
    alpha, sigma = (torch.from_numpy(np.asarray(f(t.cpu().numpy()))) for f in (CHAIN.alpha, CHAIN.sigma))
    assert close(gradient, (alpha - 2 * sigma)[:, None].expand(3, 7))
    plain = ops.add_noise(x0.detach(), t, CHAIN, seeds=SEEDS.to(device), target="v")
    assert close(x_t.detach(), plain[0]) and close(v.detach(), plain[1])


def test_marginal_statistics():
    """x_t of a constant has mean alpha and standard deviation sigma, within 5 standard errors."""
    n = 1 << 18
    x_t = ops.add_noise(torch.ones(1, n), 600, CHAIN, seeds=[1])[0].double()
    alpha, sigma = float(CHAIN.alpha(600)), float(CHAIN.sigma(600))
    assert abs(x_t.mean() - alpha) < 5 * sigma / math.sqrt(n)
    assert abs(x_t.std() / sigma - 1) < 5 / math.sqrt(2 * n)


def test_training_entry(device):
    x0, t = data((4,)).to(device), torch.tensor([1, 2, 3], device=device)
    for target in TARGETS:
        got = training.add_noise(x0, t, CHAIN, seeds=SEEDS.to(device), target=target, row=9)
        want = ops.add_noise(x0, t, CHAIN, seeds=SEEDS.to(device), target=target, row=9)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="needs a target"):
        training.add_noise(x0, t, CHAIN, seeds=SEEDS.to(device), target=None)


def test_registration(kernel_device):
    x = torch.randn(2, 8, device=kernel_device)
    seeds, t = torch.tensor([1, 2], device=kernel_device), torch.tensor([0, 1], device=kernel_device)
    coef = torch.rand(2, 4, device=kernel_device)
    for args in (
        (x, None, coef, t, seeds, seeds, 0, 1, torch.empty_like(x), torch.empty_like(x)),
        (x, x.clone(), coef, None, None, None, 0, 1, torch.empty_like(x), None),
    ):
        torch.library.opcheck(torch.ops.fastdiff.add_noise.default, args, test_utils=("test_schema", "test_faketensor"))


def test_time_out_of_range_is_nan_in_the_kernel(kernel_device):
    """Where the host does not look (CUDA), a wrong index gives NaN, not a value."""
    from fastdiff.ops import _noising

    coef = torch.ones(10, 4, device=kernel_device)
    t = torch.tensor([-1, 4, 10], device=kernel_device)
    out, target = _noising.run_kernel(
        data((5,)).to(kernel_device), coef, t, SEEDS.to(kernel_device), torch.zeros_like(SEEDS).to(kernel_device), 0, 1,
        None, torch.float32, True,
    )  # fmt: skip
    for y in (out, target):
        assert y.isnan().all(1).tolist() == [True, False, True]


def test_times_out_of_range_are_nan_where_the_host_does_not_look():
    """A continuous schedule's in compiled code, as on CUDA."""
    t, seeds = torch.tensor([-0.1, 0.5, 1.1, math.nan]), torch.arange(4)
    noise = torch.compile(lambda x, t: ops.add_noise(x, t, VP(), seeds=seeds), fullgraph=True, backend="aot_eager")
    assert noise(torch.zeros(4, 3), t).isnan().all(1).tolist() == [True, False, True, True]
    assert noise(torch.zeros(4, 3), t).isnan().any(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize(("schedule", "bad"), [(CHAIN, 1000), (CHAIN, -1), (VP(), 1.1), (VP(), math.nan)])
def test_a_number_out_of_range_is_refused_on_every_device(schedule, bad):
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="t must be in 0"):
            ops.add_noise(torch.zeros(3, 4, device=device), bad, schedule, seeds=torch.arange(3, device=device))


X = torch.zeros(3, 4)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize(("schedule", "good", "bad"), [(CHAIN, 7, -1), (CHAIN, 7, 1000), (VP(), 0.5, -0.1),
                                                       (VP(), 0.5, 1.1), (VP(), 0.5, math.nan)])  # fmt: skip
def test_one_time_out_of_range(schedule, good, bad, count):
    t = torch.full((count,), good)
    t[1] = bad
    x = torch.zeros(count, 2)
    with pytest.raises(ValueError, match=r"t must be in 0\.\."):
        ops.add_noise(x, t, schedule, seeds=torch.arange(count))
    if schedule is not CHAIN:
        with pytest.raises(ValueError, match="t must be in"):
            schedule.sigma(t)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([1.0], 0, CHAIN), {}, TypeError, "list"),
        ((X.int(), 0, CHAIN), {}, TypeError, "int32"),
        ((torch.tensor(1.0), 0, CHAIN), {}, ValueError, "0-d"),
        ((X, 0, "vp"), {}, TypeError, "str"),
        ((X, 0.5, CHAIN), {}, TypeError, "integer index"),
        ((X, torch.zeros(3), CHAIN), {}, TypeError, "float32"),
        ((X, 1, VP()), {}, TypeError, "floating point"),
        ((X, True, CHAIN), {}, TypeError, "bool"),
        ((X, "0", CHAIN), {}, TypeError, "str"),
        ((X, 1000, CHAIN), {}, ValueError, "0..999"),
        ((X, torch.tensor([0, 1, -1]), CHAIN), {}, ValueError, "got -1..1"),
        ((X, 1.5, VP()), {}, ValueError, "1.5"),
        ((X, math.nan, VP()), {}, ValueError, "nan"),
        ((X, torch.tensor([1, 2]), CHAIN), {}, ValueError, r"\(3,\), got \(2,\)"),
        ((X, torch.zeros(3, dtype=torch.int64, device="meta"), CHAIN), {}, ValueError, "meta"),
        ((X, 0, CHAIN), {"target": "noise"}, ValueError, "eps, v, x0, score, flow"),
        ((X, 0, CHAIN), {"seeds": None}, ValueError, "neither"),
        ((X, 0, CHAIN), {"noise": X}, ValueError, "both"),
        ((X, 0, CHAIN), {"seeds": [1, 2]}, ValueError, r"\(3,\), got \(2,\)"),
        ((X, 0, CHAIN), {"seeds": [1, 2, -3]}, ValueError, "got -3"),
        ((X, 0, CHAIN), {"index": torch.zeros(3)}, TypeError, "index"),
        ((X, 0, CHAIN), {"seeds": None, "noise": X, "index": SEEDS}, ValueError, "index goes with seeds"),
        ((X, 0, CHAIN), {"seeds": None, "noise": X[:2]}, ValueError, "noise"),
        ((X, 0, CHAIN), {"row": -1}, ValueError, "row"),
        ((X, 0, CHAIN), {"stream": 2**32}, ValueError, "stream"),
        ((X, 0, CHAIN), {"out_dtype": torch.int64}, TypeError, "out_dtype"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.add_noise(*args, **{"seeds": [1, 2, 3], **kwargs})


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """More than 2^31 elements in one sample: the tail equals the reference on the tail."""
    n = 2**31 + 8192
    x0 = torch.ones(1, n, device="cuda", dtype=torch.bfloat16)
    got = ops.add_noise(x0, 300, CHAIN, seeds=[6])[0, -64:].float()
    z = rng.normal([6], (n,), device="cuda")[0, -64:]
    want = float(CHAIN.alpha(300)) + float(CHAIN.sigma(300)) * z
    assert (got - want).abs().max() <= 0.02
