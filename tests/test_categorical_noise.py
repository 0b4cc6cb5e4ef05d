"""categorical_noise: kernel and chunks against float64, the reference against the paper's y, statistics, refusals."""

import math

import pytest
import torch

from fastdiff import ops, rng
from fastdiff.schedules import VP, BFNDiscrete

CASES = [(2, 37), (3, 19), (27, 20), (27, 19), (256, 5), (513, 3), (4096, 2), (20003, 2)]


def case(K, tokens, batch=2):
    g = torch.Generator().manual_seed(K)
    schedule = BFNDiscrete(3.0 if K < 100 else 0.02, K)
    x = torch.randint(0, K, (batch, tokens), generator=g)
    return x, torch.linspace(0.1, 0.9, batch, dtype=torch.float64), schedule


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def here(device, *tensors):
    return [t.to(device) for t in tensors]


def test_reference_is_the_paper():
    """theta = softmax(y), y = beta (K e_x - 1) + sqrt(beta K) n with the bracketed one: float64, by hand."""
    K, u = 5, 0.6
    x, schedule = torch.tensor([[3, 0]]), BFNDiscrete(2.0, K)
    n = rng.normal([7], (2, K), row=4).double()
    e = torch.nn.functional.one_hot(x, K).double()
    y = 2.0 * u**2 * (K * e - 1) + math.sqrt(2.0 * u**2 * K) * n
    theta = torch.exp(y) / torch.exp(y).sum(-1, keepdim=True)
    got = ops.categorical_noise_ref(x, 1 - u, schedule, seeds=[7], row=4, out_dtype=torch.float64)
    assert float((got - (2 * theta - 1)).abs().max()) < 1e-12


def test_two_classes_are_the_difference():
    """K = 2: d has mean (2x - 1) K beta and variance 2 K beta, so tanh(d / 2) = 2 theta_1 - 1."""
    x, schedule = torch.tensor([[1, 0, 1]]), BFNDiscrete(2.0, 2)
    n = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = 2 * 2.0 * 0.25 * torch.nn.functional.one_hot(x, 2).double() + math.sqrt(2 * 2.0 * 0.25) * n
    diff = (n[..., 1:] - n[..., :1]) / math.sqrt(2)
    got = ops.categorical_noise_ref(x, 0.5, schedule, noise=diff, out_dtype=torch.float64)
    assert float((got[..., 0] - (2 * torch.softmax(z, -1)[..., 1] - 1)).abs().max()) < 1e-12


@pytest.mark.parametrize(("K", "tokens"), CASES)
@pytest.mark.parametrize("given", [False, True])
def test_against_float64(K, tokens, given, device):
    x, t, schedule = case(K, tokens)
    noise = torch.randn(2, tokens, 1 if K == 2 else K, generator=torch.Generator().manual_seed(1))
    seeds, index = torch.tensor([5, 2**62 + 3]), torch.tensor([0, 2**31 + 1])
    draws = dict(noise=noise) if given else dict(seeds=seeds, index=index, row=2**31 + 7)
    want, z = ops.categorical_noise_ref(x, t, schedule, **draws, out_dtype=torch.float64, return_logits=True)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in draws.items()}
    got, logits = ops.categorical_noise(*here(device, x, t), schedule, **options, return_logits=True)
    assert float((got.cpu() - want).abs().max()) <= 4e-6
    assert float((logits.cpu() - z).abs().max() / z.abs().max()) <= 4e-6
    low = ops.categorical_noise(*here(device, x, t), schedule, **options, out_dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and float((low.cpu().double() - want).abs().max()) <= 2.0**-8 + 4e-6


@pytest.mark.parametrize("K", [2, 27])
def test_shapes_and_one_time(K, device):
    """Samples of several axes, transposed classes, a scalar t; t = 1 is uniform theta."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, K, (2, 4, 3), generator=g).transpose(1, 2)
    schedule = BFNDiscrete(3.0, K)
    got = ops.categorical_noise(x.to(device), 0.5, schedule, seeds=[1, 2]).cpu()
    flat = ops.categorical_noise(x.reshape(2, -1).to(device), 0.5, schedule, seeds=[1, 2]).cpu()
    assert torch.equal(got.flatten(1, 2), flat)
    start = ops.categorical_noise(x.to(device), 1.0, schedule, seeds=[1, 2]).cpu()
    assert float((start - (2 / K - 1)).abs().max()) < 1e-7


def test_batch_invariance(device):
    x, _, schedule = case(27, 7, batch=6)
    t, seeds = torch.full((6,), 0.4), torch.arange(6)
    whole = ops.categorical_noise(*here(device, x, t), schedule, seeds=seeds.to(device)).cpu()
    for pick in (torch.tensor([4]), torch.randperm(6)):
        part = ops.categorical_noise(*here(device, x[pick], t[pick]), schedule, seeds=seeds[pick].to(device)).cpu()
        assert torch.equal(part, whole[pick])


def test_empty(device):
    """No sample, or no token, gives an empty input."""
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape, dtype=torch.int64, device=device)
        got = ops.categorical_noise(x, 0.5, BFNDiscrete(1.0, 5), seeds=[1] * shape[0], return_logits=True)
        assert [v.shape for v in got] == [(*shape, 5)] * 2


def test_largest_case_is_finite(device):
    """K = 262,144, beta_1 = 16, t_bfn = 1, bf16."""
    x = torch.tensor([[12345]], device=device)
    got = ops.categorical_noise(x, 0.0, BFNDiscrete(16.0, 262144), seeds=[1], out_dtype=torch.bfloat16).cpu()
    assert got.isfinite().all() and int(got[0, 0].float().argmax()) == 12345


def test_classes_outside_are_nan_in_the_kernel(kernel_device):
    """Where looking would wait for the device: the token is NaN, its neighbours are not."""
    for K in (2, 27):
        n = torch.zeros(1, 3, 1 if K == 2 else K, device=kernel_device)
        x, coef = torch.tensor([[0, K, 1]], device=kernel_device), torch.ones(1, 4, device=kernel_device)
        out = torch.empty_like(n)
        torch.ops.fastdiff.categorical_noise(x, n, coef, None, None, 0, out, None)
        assert out[0].isnan().all(-1).tolist() == [False, True, False]


def test_registration(kernel_device):
    x, coef = torch.zeros(2, 3, dtype=torch.int64, device=kernel_device), torch.ones(2, 4, device=kernel_device)
    seeds = torch.arange(2, device=kernel_device)
    out = torch.empty(2, 3, 5, device=kernel_device)
    args = (x, None, coef, seeds, seeds, 3, out, torch.empty_like(out))
    torch.library.opcheck(
        torch.ops.fastdiff.categorical_noise.default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.compiled
def test_compiles():
    x, t, schedule = case(27, 8)
    seeds = torch.tensor([1, 2])

    def noised(x, t, seeds):
        return ops.categorical_noise(x, t, schedule, seeds=seeds)

    got = torch.compile(noised, fullgraph=True)(x, t, seeds)
    assert float((got - noised(x, t, seeds)).abs().max()) <= 4e-6


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 3)}, TypeError, "int64, got float32"),
        ({"x": torch.tensor(3)}, ValueError, "batch axis"),
        ({"x": torch.tensor([[0, 5], [1, 1]])}, ValueError, r"0..4 for K = 5, got 0..5"),
        ({"x": torch.tensor([[0, -1], [1, 1]])}, ValueError, "got -1..1"),
        ({"t": 1.5}, ValueError, "1.5"),
        ({"t": 1}, TypeError, "floating"),
        ({"t": torch.zeros(3)}, ValueError, r"\(2,\)"),
        ({"schedule": VP()}, TypeError, "BFNDiscrete, got VP"),
        ({"seeds": None}, ValueError, "either seeds or noise"),
        ({"seeds": [1]}, ValueError, r"\(2,\)"),
        ({"noise": torch.zeros(2, 2, 5)}, ValueError, "both"),
        ({"seeds": None, "noise": torch.zeros(2, 2, 4)}, ValueError, r"\(2, 2, 5\)"),
        ({"row": -1}, ValueError, "row"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype"),
    ],
)
def test_bad_input(change, error, text):
    args = {"x": torch.tensor([[0, 4], [1, 1]]), "t": 0.5, "schedule": BFNDiscrete(1.0, 5), "seeds": [1, 2], **change}
    with pytest.raises(error, match=text):
        ops.categorical_noise(args.pop("x"), args.pop("t"), args.pop("schedule"), **args)


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize(("K", "tokens"), [(2, 4099), (3, 701), (27, 301), (65, 70), (300, 22)])
def test_the_loop_in_many_jobs(K, tokens):
    """Jobs that leave a rest, and that start within a Philox counter."""
    x, t, schedule = case(K, tokens)
    draws = dict(seeds=torch.tensor([5, 2**62 + 3]), index=torch.tensor([0, 2**31 + 1]), row=9)
    want = ops.categorical_noise_ref(x, t, schedule, **draws, out_dtype=torch.float64, return_logits=True)
    for a, b in zip(ops.categorical_noise(x, t, schedule, **draws, return_logits=True), want, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 4e-6


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize(("K", "tokens"), [(2, 1), (2, 7), (3, 2), (5, 8), (27, 4)])
def test_small_samples_share_a_draw(K, tokens):
    """A time and a seed each: equal to float64, and each sample bit for bit what it is alone."""
    batch, g = 71, torch.Generator().manual_seed(K)
    x, t = torch.randint(0, K, (batch, tokens), generator=g), torch.rand(batch, generator=g)
    schedule, seeds = BFNDiscrete(1.5, K), torch.randint(2**62, (batch,), generator=g)
    got = ops.categorical_noise(x, t, schedule, seeds=seeds, row=4)
    want = ops.categorical_noise_ref(x, t, schedule, seeds=seeds, row=4, out_dtype=torch.float64)
    assert float((got - want).abs().max()) <= 4e-6
    for b in (0, 35, batch - 1):
        part = slice(b, b + 1)
        assert torch.equal(ops.categorical_noise(x[part], t[part], schedule, seeds=seeds[part], row=4), got[part])


def test_seeds_with_strides(device):
    seeds, index = torch.arange(12).view(6, 2)[:, 1], torch.arange(18).view(6, 3)[:, 2]
    x, schedule = torch.arange(6)[:, None] % 5, BFNDiscrete(1.5, 5)
    got = ops.categorical_noise(*here(device, x), 0.5, schedule, seeds=seeds.to(device), index=index.to(device)).cpu()
    want = ops.categorical_noise_ref(x, 0.5, schedule, seeds=seeds, index=index, out_dtype=torch.float64)
    assert float((got - want).abs().max()) <= 4e-6
