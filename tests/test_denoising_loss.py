"""The loss whose noise is drawn again: against textbook losses, its gradient, its memory, compiled, parallel."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdiff import ops, rng
from fastdiff.ops.denoising_loss import add_parts, loss_tile
from fastdiff.schedules import EDM, VE, VP, Betas, Flow, SubVP, linear_betas
from fastdiff.weighting import WeightOptions, target_weight

CHAIN = Betas(linear_betas(1000))
SEEDS = torch.tensor([3, 2**62 + 5, 8])
TARGETS = ("eps", "v", "x0", "score", "flow")
WEIGHTINGS = ("snr", "min_snr", "truncated_snr", "edm", "sigma2", "likelihood", "p2")
TOLERANCE, GRADIENT = 1e-6, 4e-6  # relative, fp32


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(shape, dtype=torch.float32, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times(schedule):
    return torch.tensor([0, 500, 999]) if schedule is CHAIN else torch.tensor([0.05, 0.4, 0.9])


def levels(schedule, t):
    f = (schedule.alpha, schedule.sigma, schedule.diffusion2)
    return (torch.from_numpy(np.asarray(g(t.double().numpy()), np.float64)) for g in f)


def textbook(m, x0, t, schedule, target, *, loss="l2", weight=None, row=0, delta=0.7, place="cpu"):
    """float64 with the noise materialised on the tested device, every target by its definition, F.* for the loss."""
    a, s, _ = (c.view(-1, *[1] * (m.dim() - 1)) for c in levels(schedule, t))
    n, x0 = rng.normal(SEEDS.to(place), m.shape[1:], row=row).cpu().double(), x0.double()
    v = (a * n - s * x0) / torch.sqrt(a**2 + s**2)
    goal = {"eps": n, "v": v, "x0": x0, "score": -n / s, "flow": n - x0}[target]
    function = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": lambda *p, **k: F.huber_loss(*p, delta=delta, **k)}[loss]
    mean = function(m.double(), goal, reduction="none").flatten(1).mean(1)
    return mean if weight is None else weight * mean


def check(schedule, target, device, shape, *, weight=None, **options):
    m, x0, t = data(shape), data(shape, seed=1), times(schedule)
    leaf = m.double().requires_grad_()
    kept = {k: options[k] for k in ("loss", "row") if k in options}
    want = textbook(leaf, x0, t, schedule, target, weight=weight, place=device, **kept)
    want.sum().backward()
    mine = m.to(device).requires_grad_()
    got = ops.denoising_loss(
        mine, x0.to(device), t.to(device), schedule, SEEDS.to(device), target=target, delta=0.7, **options
    )
    got.sum().backward()
    assert got.dtype == torch.float32 and got.shape == (3,)
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=TOLERANCE, atol=0)
    assert (mine.grad.cpu() - leaf.grad).abs().max() <= GRADIENT * leaf.grad.abs().max()


@pytest.mark.parametrize("schedule", [CHAIN, VP(), VE(0.01, 50.0), Flow(3.0)], ids=repr)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_textbook(schedule, target, loss, device):
    check(schedule, target, device, (3, 41), loss=loss, row=7)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 19, 7), (3, 1003), (2, 4097)])
def test_odd_shapes(shape, device):
    """1 element, part of a vector, more than one program of the kernel."""
    check(CHAIN, "v", device, shape)


def test_programs_of_large_samples(kernel_device, monkeypatch):
    """From 2^20 elements on a program reads four times as many."""
    monkeypatch.setattr(sys.modules["fastdiff.ops.denoising_loss"], "LARGE", 4097)
    for n, programs in ((4097, 5), (9001, 3)):
        assert -(-n // loss_tile(n)["BLOCK"]) == programs
        check(CHAIN, "v", kernel_device, (n,))


@pytest.mark.parametrize("tiles", [2, 128, 1000, 1025, 4099])
def test_sums_of_many_parts(tiles, kernel_device):
    """One warp's, and of more than 1024 four warps'; a sample's sum is the same alone and in a batch."""
    parts = torch.rand(3, tiles, generator=torch.Generator().manual_seed(tiles)).to(kernel_device)
    out, alone = torch.empty(3, device=kernel_device), torch.empty(1, device=kernel_device)
    add_parts(parts, out)
    add_parts(parts[1:2], alone)
    torch.testing.assert_close(out.double(), parts.double().sum(1), rtol=4e-7, atol=0)
    assert torch.equal(alone, out[1:2])


@pytest.mark.parametrize("schedule", [CHAIN, VP(), SubVP(), EDM(sigma_data=0.7)], ids=repr)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_are_those_of_x0(schedule, name, device):
    """A named weight w is defined by w |x0-hat - x0|^2 with x0-hat converted from the prediction."""
    t = times(schedule)
    a, s, g2 = levels(schedule, t)
    snr, data_std = (a / s) ** 2, 0.7 if isinstance(schedule, EDM) else 0.5
    w = {
        "snr": snr, "min_snr": snr.clamp(max=5.0), "truncated_snr": snr.clamp(min=1.0), "edm": snr + data_std**-2,
        "sigma2": snr, "likelihood": g2 * snr / s**2, "p2": snr / (0.5 + snr) ** 1.3,
    }[name]  # fmt: skip
    c_out = {
        "eps": s / a, "x0": 1 + 0 * a, "v": s / torch.sqrt(a**2 + s**2), "score": s**2 / a, "flow": s / (a + s),
    }  # fmt: skip
    for target in TARGETS:
        check(schedule, target, device, (5,), weight=w * c_out[target] ** 2, weighting=name, p2=(0.5, 1.3))


def test_weight_identities():
    """The forms papers give: eps with SNR is plain; v with min-SNR is min(SNR, 5) / (SNR + 1); score with sigma^2."""
    m, t = data((9,)), times(CHAIN)
    a, s, g2 = levels(CHAIN, t)

    def ratio(target, name):
        named, plain = (ops.denoising_loss(m, m, t, CHAIN, SEEDS, target=target, weighting=w) for w in (name, None))
        return (named / plain).double()

    snr = (a / s) ** 2
    torch.testing.assert_close(ratio("eps", "snr"), 1 + 0 * a, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio("eps", "min_snr"), snr.clamp(max=5.0) / snr, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio("v", "min_snr"), snr.clamp(max=5.0) / (snr + 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio("score", "sigma2"), s**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio("score", "likelihood"), g2, rtol=1e-6, atol=0)


def test_weights_at_the_ends_are_their_limits():
    """alpha = 0: min-SNR on eps is 1, on v 0; sigma = 0: min-SNR on x0 is gamma, P2 on x0 1. No 0 / 0."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def at(name, target):
        return target_weight(name, target, Flow(), ends, WeightOptions()).tolist()

    assert at("min_snr", "eps")[1] == 1 and at("min_snr", "v") == [0, 0] and at("min_snr", "x0") == [5, 0]
    assert at("p2", "x0") == [1, 0] and at("p2", "eps")[1] == 1 and at("truncated_snr", "v") == [1, 1]
    assert at("truncated_snr", "eps")[1] == math.inf
    square = WeightOptions(p2_gamma=2.0)  # SNR / (1 + SNR)^2, 0 at both ends
    assert all(target_weight("p2", v, Flow(), ends, square).tolist() == [0, 0] for v in ("x0", "v", "flow"))


def test_custom_weights_and_their_gradient(device):
    m = data((4,)).to(device)
    w = torch.tensor([0.0, 2.5, 7.0], device=device, requires_grad=True)
    t, seeds = times(CHAIN).to(device), SEEDS.to(device)
    plain = ops.denoising_loss(m, None, t, CHAIN, seeds)
    got = ops.denoising_loss(m, None, t, CHAIN, seeds, weighting=w)
    assert torch.equal(got.detach(), w.detach() * plain)
    got.sum().backward()
    assert torch.equal(w.grad, plain)


def test_float64_and_gradcheck():
    """1e-12 against the textbook, and numerical derivatives in model_out and x0, for every target and loss."""
    m, x0 = data((4,), torch.float64).requires_grad_(), data((4,), torch.float64, 1).requires_grad_()
    t = torch.tensor([5, 400, 900])
    for target in TARGETS:
        for loss in ("l2", "l1", "huber"):
            options = {"target": target, "loss": loss, "delta": 0.7}
            got = ops.denoising_loss(m, x0, t, CHAIN, SEEDS, **options)
            assert got.dtype == torch.float64
            want = textbook(m, x0, t, CHAIN, target, loss=loss)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
            torch.testing.assert_close(
                ops.denoising_loss_ref(m, x0, t, CHAIN, SEEDS, **options), want, rtol=1e-12, atol=0
            )
            kept = (m, x0) if target in ("x0", "v", "flow") else (m,)
            assert torch.autograd.gradcheck(
                lambda *p, options=options: ops.denoising_loss(
                    p[0], p[1] if len(p) > 1 else None, t, CHAIN, SEEDS, **options
                ),
                kept,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, device):
    m, x0, t = data((37,), dtype), data((37,), dtype, 1), times(CHAIN)
    want = ops.denoising_loss_ref(m.double(), x0.double(), t, CHAIN, SEEDS, target="v")
    leaf = m.to(device).requires_grad_()
    got = ops.denoising_loss(leaf, x0.to(device), t.to(device), CHAIN, SEEDS.to(device), target="v")
    torch.testing.assert_close(got.detach().cpu().double(), want, rtol=TOLERANCE, atol=0)
    got.sum().backward()
    assert leaf.grad.dtype == dtype


def test_regenerated_noise_is_the_added_noise(device):
    """Bit for bit: with x0 = 0 at sigma = 1, x_t is n; with m = 0 and n = 64 elements, the gradient is -n / 32."""
    x0 = torch.zeros(3, 64, device=device)
    seeds, t = SEEDS.to(device), torch.ones(3, device=device)
    x_t, eps = ops.add_noise(x0, t, Flow(), seeds=seeds, target="eps", row=5)
    m = x0.clone().requires_grad_()
    ops.denoising_loss(m, None, t, Flow(), seeds, row=5).sum().backward()
    assert torch.equal(m.grad * -32, eps) and torch.equal(x_t, eps)


def test_a_sample_is_the_same_alone(device):
    shape = (12, 2000)
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    t, seeds = (torch.arange(12) * 80).to(device), (torch.arange(12) + 9).to(device)
    whole = ops.denoising_loss(m, m, t, CHAIN, seeds, target="v", weighting="min_snr")
    for pick in (slice(0, 1), slice(3, 9), torch.tensor([11, 2, 5], device=device)):
        part = ops.denoising_loss(m[pick], m[pick], t[pick], CHAIN, seeds[pick], target="v", weighting="min_snr")
        assert torch.equal(part, whole[pick])


@pytest.mark.parametrize("target", ["eps", "v"])
def test_only_the_gradient_is_saved(target, device):
    """Between loss and backward lives one full-size tensor, rho'."""
    packed = []
    m, x0 = data((50,)).to(device).requires_grad_(), data((50,)).to(device)
    t, seeds = times(CHAIN).to(device), SEEDS.to(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: packed.append(v.shape) or v, lambda v: v):
        loss = ops.denoising_loss(m, x0, t, CHAIN, seeds, target=target, weighting="min_snr")
    assert [s for s in packed if s.numel() >= 50] == [m.shape]
    first = torch.autograd.grad(loss.sum(), m, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss.sum(), m)[0], first)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_noising_on_kernels_saves_nothing(target, kernel_device):
    packed = []
    x0 = data((50,)).to(kernel_device).requires_grad_()
    t, seeds = times(CHAIN).to(kernel_device), SEEDS.to(kernel_device)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: packed.append(v.shape) or v, lambda v: v):
        ops.add_noise(x0, t, CHAIN, seeds=seeds, target=target)
    assert packed and all(s.numel() < 50 for s in packed)


def test_gradient_to_x0(device):
    """d loss / d x0 through the target, also where model_out needs none."""
    m, x0 = data((6,)).to(device), data((6,), seed=1).to(device).requires_grad_()
    t, seeds = times(CHAIN).to(device), SEEDS.to(device)
    for target in ("v", "x0", "flow"):
        got = torch.autograd.grad(ops.denoising_loss(m, x0, t, CHAIN, seeds, target=target).sum(), x0)[0]
        leaf = x0.detach().cpu().double().requires_grad_()
        want = torch.autograd.grad(textbook(m.cpu(), leaf, t.cpu(), CHAIN, target).sum(), leaf)[0]
        assert (got.cpu() - want).abs().max() <= GRADIENT * want.abs().max()


def test_nan_and_empty(device):
    m = data((4,)).to(device)
    m[1, 2] = math.nan
    for loss in ("l2", "l1", "huber"):
        leaf = m.clone().requires_grad_()
        got = ops.denoising_loss(leaf, None, times(CHAIN).to(device), CHAIN, SEEDS.to(device), loss=loss)
        got.sum().backward()
        assert got.isnan().tolist() == [False, True, False] and leaf.grad.isnan().sum() == 1
    empty = ops.denoising_loss(data((0,)).to(device), None, times(CHAIN).to(device), CHAIN, SEEDS.to(device))
    assert empty.isnan().all()
    none = ops.denoising_loss(torch.zeros(0, 4, device=device), None, 3, CHAIN, SEEDS[:0].to(device))
    assert none.shape == (0,)


def test_autocast():
    """Under autocast the model's bf16 output meets an fp32 loss, and its gradient returns in bf16."""
    net, x = torch.nn.Linear(8, 8), data((8,))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        got = ops.denoising_loss(out, x, times(CHAIN), CHAIN, SEEDS, target="v").mean()
    assert out.dtype == torch.bfloat16 and got.dtype == torch.float32
    got.backward()
    want = textbook(out.detach(), x, times(CHAIN), CHAIN, "v").mean()
    torch.testing.assert_close(got.detach().double(), want, rtol=TOLERANCE, atol=0)
    assert net.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("schedule", "target"), [(CHAIN, "eps"), (VP(), "v")], ids=repr)
def test_torch_compile_fullgraph(schedule, target):
    m, x0, t = data((40,)), data((40,), seed=1), times(schedule)

    def step(m, x0, t, seeds):
        x_t = ops.add_noise(x0, t, schedule, seeds=seeds)
        return x_t, ops.denoising_loss(m, x0, t, schedule, seeds, target=target, weighting="min_snr")

    a, b = (m.clone().requires_grad_() for _ in range(2))
    want_x, want = step(a, x0, t, SEEDS)
    got_x, got = torch.compile(step, fullgraph=True)(b, x0, t, SEEDS)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    assert (got_x - want_x).abs().max() <= 4e-6 * want_x.abs().max()
    want.sum().backward()
    got.sum().backward()
    assert (a.grad - b.grad).abs().max() <= GRADIENT * a.grad.abs().max()


def test_opcheck(kernel_device):
    """The registered operations: schema, fake tensors, and tracing with static and dynamic shapes."""
    d = kernel_device
    table, t = torch.rand(10, 4, device=d), torch.tensor([1, 9, 4], device=d)
    seeds, index = SEEDS.to(d), torch.zeros(3, dtype=torch.int64, device=d)
    x = data((5,)).to(d)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for x0 in (None, x):
        outs = torch.zeros(3, device=d), torch.zeros_like(x), torch.zeros(3, device=d)
        args = (x, x0, table, t, seeds, index, 0, 1, 2, 0.5, *outs)
        torch.library.opcheck(torch.ops.fastdiff.denoising_loss.default, args, test_utils=tests)
    args = (x, None, table, t, seeds, index, 0, 1, torch.zeros_like(x), torch.zeros_like(x))
    torch.library.opcheck(torch.ops.fastdiff.add_noise.default, args, test_utils=tests)


@pytest.mark.gpu
def test_no_host_sync():
    m = data((64,)).cuda().requires_grad_()
    t, seeds = torch.tensor([1, 2, 3]).cuda(), SEEDS.cuda()
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            ops.add_noise(m.detach(), t, CHAIN, seeds=seeds)
            ops.denoising_loss(m, None, t, CHAIN, seeds, weighting="min_snr").mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


X = torch.zeros(3, 4)


def test_no_second_derivative():
    """The gradient is kept, not how it came about: differentiating it again is refused instead of being wrong."""
    m, g = torch.randn(3, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = ops.denoising_loss(m, None, 500, CHAIN, SEEDS)
    (gradient,) = torch.autograd.grad(loss, m, g, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([1.0], None, 0, CHAIN), {}, TypeError, "list"),
        ((X.int(), None, 0, CHAIN), {}, TypeError, "int32"),
        ((torch.tensor(1.0), None, 0, CHAIN), {}, ValueError, "0-d"),
        ((X, X[:2], 0, CHAIN), {}, ValueError, r"x0 must have shape \(3, 4\), got \(2, 4\)"),
        ((X, None, 0, CHAIN), {"target": "v"}, ValueError, "needs x0"),
        ((X, X, 0, CHAIN), {"target": "noise"}, ValueError, "eps, v, x0, score, flow"),
        ((X, X, 0, CHAIN), {"weighting": "minsnr"}, ValueError, "snr, min_snr, truncated_snr"),
        ((X, X, 0, CHAIN), {"weighting": torch.ones(2)}, ValueError, "weighting must have shape"),
        ((X, X, 0, CHAIN), {"loss": "mse"}, ValueError, "l2, l1, huber"),
        ((X, X, 0, CHAIN), {"delta": 0.0}, ValueError, "delta"),
        ((X, X, 0, CHAIN), {"gamma": math.inf}, ValueError, "gamma"),
        ((X, X, 0, CHAIN), {"sigma_data": -1.0}, ValueError, "sigma_data"),
        ((X, X, 0, CHAIN), {"p2": (1.0,)}, ValueError, "p2"),
        ((X, X, 0, CHAIN), {"p2": 1.0}, ValueError, "p2"),
        ((X, X, torch.tensor([1, 2]), CHAIN), {}, ValueError, r"\(3,\), got \(2,\)"),
        ((X, X, 1000, CHAIN), {}, ValueError, "0..999"),
        ((X, X, 0.5, CHAIN), {}, TypeError, "integer index"),
        ((X, X, 1, VP()), {}, TypeError, "floating point"),
        ((X, X, 1.5, VP()), {}, ValueError, "1.5"),
        ((X, X, 0, "vp"), {}, TypeError, "str"),
        ((X, X, 0, CHAIN), {"seeds": [1, 2]}, ValueError, r"\(3,\), got \(2,\)"),
        ((X, X, 0, CHAIN), {"seeds": [1, 2, -3]}, ValueError, "got -3"),
        ((X, X, 0, CHAIN), {"row": -1}, ValueError, "row"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.denoising_loss(*args, **{"seeds": [1, 2, 3], **kwargs})
