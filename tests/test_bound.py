"""The variational bound: its Gaussian terms against integrals, the learned variance, bits per dimension."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

import fastdiff as fd
from fastdiff import native, ops, rng
from fastdiff.schedules import VP, Betas, cosine_betas, linear_betas
from fastdiff.training import bound

CHAIN = Betas(linear_betas(1000))
STD = 0.6


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_is_the_integral():
    m1, v1, m2, v2 = 0.3, -1.2, -0.4, 0.5
    p, q = norm(m1, math.exp(v1 / 2)), norm(m2, math.exp(v2 / 2))
    want = quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -8, 8, epsabs=1e-13)[0]
    one = [torch.full((2, 3), v, dtype=torch.float64) for v in (m1, v1, m2, v2)]
    got = ops.gaussian_kl(*one)
    assert got.shape == (2,) and abs(got[0] - want) < 1e-12
    assert ops.gaussian_kl(one[0], one[1], one[0], one[1]).tolist() == [0, 0]
    assert ops.gaussian_kl(*(v.float() for v in one)).dtype == torch.float32
    near = ops.gaussian_kl(one[0].float(), one[1].float(), one[0].float(), one[1].float() + 1e-3)
    assert abs(near[0] / (1e-6 / 4) - 1) < 2e-3  # d^2 / 4, which 1 + d - e^d would lose in fp32
    d = torch.tensor([1e-6, -1e-4, 0.02, 0.2499, -0.2501, 3.0])[:, None]
    want = sum(d.double() ** k / float(math.factorial(k)) for k in range(2, 30)) / 2
    for dtype, tolerance in ((torch.float32, 2e-7), (torch.float64, 1e-13)):
        zero = torch.zeros(6, 1, dtype=dtype)
        torch.testing.assert_close(
            ops.gaussian_kl_ref(zero, d.to(dtype), zero, zero).double(), want[:, 0], rtol=tolerance, atol=0
        )


@pytest.mark.parametrize("shape", [(7,), (2, 19, 7), (4097,)])
@pytest.mark.parametrize("full", [(True, True), (False, True), (False, False)])
def test_kl_kernel_and_gradients(shape, full, device_of_loops):
    """Values to 2e-6 and gradients to 4e-6 of float64, equal Gaussians nearby included; a sample alone is the same."""
    one = tuple(1 for _ in shape)
    values = [data(3, *shape), data(3, *(shape if full[0] else one), seed=1), data(3, *shape, seed=2)]
    values.append(data(3, *(shape if full[1] else one), seed=3))
    if full[0] and full[1]:
        values[3][1] = values[1][1] + 1e-3 * values[0][1]  # where e^d - 1 - d cancels
        values[2][1] = values[0][1]
    values = [v.float() for v in values]
    wide = [v.double() for v in values]
    for v in wide[2:]:
        v.requires_grad_()
    want = ops.gaussian_kl_ref(*wide)
    mine = [v.to(device_of_loops) for v in values[:2]] + [v.to(device_of_loops).requires_grad_() for v in values[2:]]
    got = ops.gaussian_kl(*mine)
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=2e-6, atol=0)
    weight = torch.tensor([1.0, 3.0, -2.0])
    wants = torch.autograd.grad((weight.double() * want).sum(), wide[2:])
    gots = torch.autograd.grad((weight.to(device_of_loops) * got).sum(), mine[2:])
    for a, b in zip(gots, wants, strict=True):
        assert (a.cpu() - b).abs().max() <= 4e-6 * b.abs().max()
    assert torch.equal(ops.gaussian_kl(*(v[1:2] for v in mine)), got[1:2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: exp
def test_kl_far_apart(device_of_loops):
    """Closed forms where e^d, d and the distance are large, small or overflow fp32."""
    for d in (-200.0, -30.0, -0.51, -0.499, -0.26, -0.24, 1e-3, 0.1, 0.24, 0.26, 0.499, 0.51, 20.0, 85.0, 86.0, 100.0):
        for apart, log2 in ((0.0, 0.0), (3.0, -80.0), (0.5, 95.0)):
            log1 = d + log2
            want = 0.5 * (math.expm1(d) - d + apart**2 * math.exp(-log2)) if d < 89 else math.inf
            values = [torch.full((2, 5), v).to(device_of_loops) for v in (apart, log1, 0.0, log2)]
            got = ops.gaussian_kl(*values).cpu()
            # the series below 1/2 leaves 5e-8 and some roundings out; else a last place of e^d is 8e-7
            rtol = 4e-7 if abs(d) < 0.5 and apart == 0 else 2e-6
            slack = 6e-8 * (abs(log1) + abs(log2)) * abs(math.expm1(min(d, 1.0)))  # d itself is rounded
            assert got.isinf().all() if want > 3.4e38 else ((got - want).abs() <= rtol * want + slack).all()


@pytest.mark.parametrize("far", [79.5, 80.5, 95.0, -78.0, math.inf, math.nan])
def test_a_far_element_leaves_its_neighbours_their_bits(far, device_of_loops):
    """A block whose exponents are all near 0 takes shorter exponentials; one log-variance that is not changes no other
    element's gradient, and nothing of another block's or sample's."""
    means = [torch.randn(2, 600, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    log1, log2 = (20 * torch.rand(2, 600, generator=torch.Generator().manual_seed(k)) - 10 for k in (2, 3))
    changed = log2.clone()
    changed[0, 301] = far

    def slopes(logs):
        m2, l2 = (v.clone().to(device_of_loops).requires_grad_() for v in (means[1], logs))
        kl = ops.gaussian_kl(means[0].to(device_of_loops), log1.to(device_of_loops), m2, l2)
        return [v.cpu() for v in (kl, *torch.autograd.grad(kl.sum(), (m2, l2)))]

    others = torch.ones(2, 600, dtype=torch.bool)
    others[0, 301] = False
    (kl, *was), (kl_now, *now) = slopes(log2), slopes(changed)
    assert kl[1] == kl_now[1]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(was, now, strict=True))
    want = ops.gaussian_kl_ref(means[0].double(), log1.double(), means[1].double(), changed.double())
    torch.testing.assert_close(kl_now.double(), want, rtol=2e-6, atol=0, equal_nan=True)


def test_kl_opcheck(kernel_device):
    x = torch.randn(3, 5, device=kernel_device)
    given, zero = (x, x[:, 0].contiguous(), x + 1, x), torch.zeros(3, device=kernel_device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastdiff.gaussian_kl.default, (*given, zero), test_utils=tests)
    for outs in ((torch.zeros_like(x), torch.zeros_like(x)), (None, torch.zeros_like(x))):
        slopes = torch.ops.fastdiff.gaussian_kl_slopes.default
        torch.library.opcheck(slopes, (*given, zero + 1, *outs), test_utils=tests)


@pytest.mark.parametrize("full", [True, False])
def test_kl_gradients_have_their_own_types(full, device_of_loops):
    """One rounding of a bf16 mean's gradient; a fp32 log-variance's is not rounded to the mean's type; each alone."""
    m1, m2 = data(3, 700).to(torch.bfloat16), data(3, 700, seed=1).to(torch.bfloat16)
    l1, l2 = data(3, 700, seed=2).float(), data(3, 700 if full else 1, seed=3).float()
    weight = torch.tensor([1.0, 3.0, -2.0])
    wide = [v.double().requires_grad_() for v in (m1, l1, m2, l2)]
    of_mean, of_log = torch.autograd.grad((weight * ops.gaussian_kl_ref(*wide)).sum(), wide[2:])
    cut = ops._dispatch.kernels_for(torch.zeros(1))  # Triton's interpreter cuts where it should round
    for wanted in ((True, True), (True, False), (False, True)):
        mine = [v.to(device_of_loops) for v in (m1, l1, m2, l2)]
        asked = [v.requires_grad_() for v, w in zip(mine[2:], wanted, strict=True) if w]
        got = list(torch.autograd.grad((weight.to(device_of_loops) * ops.gaussian_kl(*mine)).sum(), asked))
        if wanted[1]:
            of = got.pop().cpu()
            assert of.dtype == torch.float32 and (of - of_log).abs().max() <= 4e-6 * of_log.abs().max()
        if wanted[0]:
            of = got.pop().cpu()
            ulp = 2**-7 if cut else 2**-8
            assert of.dtype == torch.bfloat16 and ((of - of_mean).abs() <= ulp * of_mean.abs() + 1e-9).all()


def test_kl_backward_without_loops(monkeypatch):
    """Backward where no loop may run: the slopes in plain torch, of what forward saved."""
    values = [data(2, 9, seed=i).float() for i in range(3)] + [data(2, 1, seed=3).float()]
    wide = [v.double().requires_grad_() for v in values]
    want = torch.autograd.grad(ops.gaussian_kl_ref(*wide).sum(), wide[2:])
    for v in values[2:]:
        v.requires_grad_()
    kl = ops.gaussian_kl(*values)
    monkeypatch.setattr(native, "run", None)  # no loop is called
    with ops.cpu_compiler(False):
        got = torch.autograd.grad(kl.sum(), values[2:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("loops", [True, False])
def test_kl_under_function_transforms(loops):
    """Forward and backward derivatives and a batched call are the closed forms' own."""
    m1, l1, m2, l2 = values = [data(2, 9, seed=i).float() for i in range(4)]
    slope = (m2 - m1) * torch.exp(-l2) / 9
    with ops.cpu_compiler(loops):
        of_mean = torch.func.grad(lambda m: ops.gaussian_kl(m1, l1, m, l2).sum())(m2)
        torch.testing.assert_close(of_mean, slope)
        kl, along = torch.func.jvp(lambda m: ops.gaussian_kl(m1, l1, m, l2), (m2,), (torch.ones_like(m2),))
        torch.testing.assert_close(along, slope.sum(1))
        torch.testing.assert_close(kl, ops.gaussian_kl(*values))
        twice = torch.func.vmap(lambda m: ops.gaussian_kl(m1, l1, m, l2))(torch.stack([m2, m1]))
        torch.testing.assert_close(twice, torch.stack([kl, ops.gaussian_kl(m1, l1, m1, l2)]))
        with torch.autograd.forward_ad.dual_level():
            dual = ops.gaussian_kl(m1, l1, torch.autograd.forward_ad.make_dual(m2, torch.ones_like(m2)), l2)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope.sum(1))


@pytest.mark.parametrize("log_scale", [-7.0, -5.0, -2.0, 0.0, 2.0])
@pytest.mark.parametrize("mean", [-1.2, -0.013, 0.999, 1.7])
def test_decoder_sums_to_one(log_scale, mean):
    """Over the 256 bins, in float64 and from float32 arguments; finite with a gradient everywhere."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    m = torch.full_like(x, mean).requires_grad_()
    s = torch.full((1,), log_scale, dtype=torch.float64, requires_grad=True)
    nll = ops.decoder_nll(x, m, s)
    assert abs(torch.exp(-nll).sum().item() - 1) < 1e-12
    g = torch.autograd.grad(nll.sum(), (m, s))
    assert all(torch.isfinite(v).all() for v in (nll, *g))
    single = ops.decoder_nll(x.float(), m.detach().float(), s.detach().float())
    assert abs(torch.exp(-single.double()).sum().item() - 1) < 2e-4 if log_scale == -7 else 2e-5


def test_decoder_is_the_mass_of_a_bin():
    """Against scipy in the middle, at both ends, and where the tanh approximation fails (log-scale -7, far away)."""
    w = 1 / 255
    for k, mean, log_scale in ((100, -0.2, -3.0), (0, -0.9, -2.0), (255, 0.7, -1.0)):
        x, s = -1 + 2 * w * k, math.exp(log_scale)
        low = -math.inf if k == 0 else x - w
        high = math.inf if k == 255 else x + w
        want = -math.log(norm.cdf(high, mean, s) - norm.cdf(low, mean, s))
        one = (torch.tensor([[v]], dtype=torch.float64) for v in (x, mean, log_scale))
        assert abs(ops.decoder_nll(*one).item() - want) < 1e-10
    far = ops.decoder_nll(*(torch.tensor([[v]], dtype=torch.float64) for v in (0.0, 0.02, -7.0)))
    want = -norm.logcdf((w - 0.02) * math.exp(7.0)) - math.log(
        -math.expm1(norm.logcdf((-w - 0.02) * math.exp(7.0)) - norm.logcdf((w - 0.02) * math.exp(7.0)))
    )
    assert abs(far.item() - want) < 1e-8 and far.item() > 150
    density = ops.decoder_nll(*(torch.tensor([[v]], dtype=torch.float64) for v in (0.1, -0.3, -0.5)), bins=0)
    assert abs(density.item() + norm.logpdf(0.1, -0.3, math.exp(-0.5))) < 1e-13


@pytest.mark.parametrize(("x", "edge"), [(0.0, 1 / 255), (-1.0, 1 / 255 - 1), (1.0, 1 - 1 / 255)])
def test_decoder_gradient_of_a_narrow_scale(x, edge):
    """-ln Phi(-z) = z^2 / 2 + ..., z = (mean - edge) / s at the nearest edge: its derivative is (mean - edge) / s^2."""
    mean = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    data, log_scale = (torch.tensor([[v]], dtype=torch.float64) for v in (x, -20.0))
    (grad,) = torch.autograd.grad(ops.decoder_nll(data, mean, log_scale).sum(), mean)
    assert grad.item() == pytest.approx((0.3 - edge) * math.exp(40.0), rel=1e-12)


def test_decoder_gradcheck():
    x = torch.tensor([[-1.0, -0.5, 0.25, 1.0]], dtype=torch.float64)
    m, s = data(1, 4).requires_grad_(), (data(1, 4, seed=1) - 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: ops.decoder_nll(x, m, s), (m, s))


def test_log_variance_range_of_a_respaced_chain():
    """Respaced betas give their own beta~ and beta: 1 - ab_t / ab_prev."""
    keep = np.arange(49, 1000, 50)
    bar = CHAIN.alpha_bar[keep]
    previous = np.append(1.0, bar[:-1])
    betas = 1 - bar / previous
    low, high = bound.log_variance_range(Betas(betas), torch.arange(20))
    np.testing.assert_allclose(high.exp(), betas, rtol=1e-12)
    want = betas * (1 - previous) / (1 - bar)
    want[0] = want[1]
    np.testing.assert_allclose(low.exp(), want, rtol=1e-10)


@pytest.mark.parametrize("t", [1, 300, 999])
def test_learned_bound_is_the_integrated_kl(t):
    """The term of one pixel against a numerical integral of q ln(q / p), in bits."""
    x0, x_t = torch.tensor([[[0.4]]], dtype=torch.float64), torch.tensor([[[-0.8]]], dtype=torch.float64)
    out = torch.tensor([[[0.3], [0.2]]], dtype=torch.float64)
    got = bound.vb_term(out, x0, x_t, t, CHAIN).item()
    bar, before, beta = CHAIN.alpha_bar[t], CHAIN.alpha_bar[t - 1], CHAIN.betas[t]
    small = beta * (1 - before) / (1 - bar)

    def mean(x0):
        return math.sqrt(before) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * -0.8

    hat = (-0.8 - math.sqrt(1 - bar) * 0.3) / math.sqrt(bar)
    f = (0.2 + 1) / 2
    q, p = (
        norm(mean(0.4), math.sqrt(small)),
        norm(mean(hat), math.exp(0.5 * (f * math.log(beta) + (1 - f) * math.log(small)))),
    )
    reach = 12 * q.std()
    want = quad(
        lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), q.mean() - reach, q.mean() + reach, epsabs=1e-13, limit=200
    )[0]
    assert abs(got - want / math.log(2)) < 1e-9 * max(1, abs(want))


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_low_precision_data_against_float64(variance):
    """Of the same bf16 numbers: the means differ by less than a rounding to bf16, which must not come before that."""
    chain, seen, outs = Betas(linear_betas(1000)[::50]), [], []
    x0 = data(3, 2, 40).clamp(-1, 1).bfloat16()

    def model(x, t):
        width = 4 if variance == "learned_range" else 2
        seen.append(x)
        outs.append((0.9 * rng.normal([1, 2, 3], (width, 40), row=int(t[0]))).bfloat16())
        return outs[-1]

    got = fd.training.bits_per_dim(model, x0, chain, variance=variance, progress=False)
    for k, x_t, out in zip(range(19, -1, -1), seen, outs, strict=True):
        assert x_t.dtype == out.dtype == torch.bfloat16
        given = out.double(), x0.double(), x_t.double(), torch.full((3,), k), chain
        want = bound.vb_term(*given, variance=variance, clip=(-1.0, 1.0))
        torch.testing.assert_close(got.terms[k].double(), want, rtol=2e-5, atol=0)
        hat = ops.posterior_ref(given[2], given[0][:, :2], k, chain, "eps", (-1.0, 1.0))[3]
        torch.testing.assert_close(
            got.mse[k].double(), (hat - given[1]).square().flatten(1).mean(1), rtol=2e-5, atol=1e-12
        )


def test_bits_per_dim_of_samples_without_axes():
    """Those of samples of one element."""
    chain, x0 = Betas(linear_betas(1000)[::100]), data(4).clamp(-1, 1)
    options = {"variance": "fixed_large", "progress": False}
    got = fd.training.bits_per_dim(lambda x, t: 0.9 * x, x0, chain, **options)
    want = fd.training.bits_per_dim(lambda x, t: 0.9 * x, x0[:, None], chain, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hybrid_stops_the_gradient_of_the_mean():
    """L_hybrid = L_simple + 0.001 L_vlb: d/d mean is L_simple's, d/d v is 0.001 L_vlb's; L_vlb = T times a term."""
    x0, out = data(3, 2, 4).clamp(-1, 1), data(3, 4, 4, seed=1).requires_grad_()
    t, seeds = torch.tensor([0, 400, 999]), torch.tensor([4, 5, 6])
    hybrid = fd.training.hybrid_loss(out, x0, t, CHAIN, seeds)
    simple = ops.denoising_loss(out[:, :2], x0, t, CHAIN, seeds)
    vlb = fd.training.vlb_loss(out, x0, t, CHAIN, seeds)
    x_t = ops.add_noise(x0, t, CHAIN, seeds=seeds)
    torch.testing.assert_close(vlb, 1000 * bound.vb_term(out, x0, x_t, t, CHAIN))
    torch.testing.assert_close(hybrid, simple + 0.001 * vlb)
    (g,) = torch.autograd.grad(hybrid.sum(), out, retain_graph=True)
    (gs,) = torch.autograd.grad(simple.sum(), out)
    (gv,) = torch.autograd.grad(vlb.sum(), out)
    torch.testing.assert_close(g[:, :2], gs[:, :2])
    torch.testing.assert_close(g[:, 2:], 0.001 * gv[:, 2:])
    assert gv[:, :2].abs().sum() > 0


def exact(schedule):
    """eps and the exact reverse variance of N(0, STD^2) data, as a learned_range model."""

    def model(x, t):
        a, s = (torch.as_tensor(f(t.numpy()))[:, None, None] for f in (schedule.alpha, schedule.sigma))
        r2 = (a * STD) ** 2 + s**2
        low, high = (c[:, None, None] for c in bound.log_variance_range(schedule, t))
        # x_{t-1} | x_t of Gaussian data: variance r'^2 beta / r^2, r'^2 = alpha'^2 STD^2 + sigma'^2
        beta = torch.from_numpy(schedule.betas.copy())[t][:, None, None]
        before = (a**2 / (1 - beta)) * STD**2 + 1 - a**2 / (1 - beta)
        f = (torch.log(before * beta / r2) - low) / (high - low).clamp(min=1e-12)
        return torch.cat([s * x / r2, (2 * f - 1).expand_as(x)], 1)

    return model


def test_bits_per_dim_of_gaussian_data_is_its_entropy():
    """Continuous data with the exact model: mean -ln p = ln(STD sqrt(2 pi e)), nearly."""
    chain = Betas(cosine_betas(400))
    x0 = STD * data(64, 1, 60)
    got = fd.training.bits_per_dim(exact(chain), x0, chain, bins=0, clip=None, progress=False)
    want = (0.5 * (x0.flatten(1) / STD).square().mean(1) + math.log(STD * math.sqrt(2 * math.pi))) / math.log(2)
    assert got.terms.shape == (400, 64) and torch.equal(got.total, got.prior + got.terms.sum(0))
    entropy = math.log(STD * math.sqrt(2 * math.pi * math.e)) / math.log(2)
    assert abs(want.mean() - entropy) < 0.03
    assert 0 <= got.total.mean() - want.mean() < 0.02  # the bound is above, by the discretisation of the chain
    assert (got.mse >= 0).all() and got.mse[0].mean() < 1e-2


def test_bits_per_dim_of_discrete_data():
    """On 256 levels the bound is above the entropy of the rounded Gaussian, ln(255 / 2) more than the density's."""
    chain = Betas(cosine_betas(400))
    x0 = ((0.25 * data(64, 1, 60)).clamp(-1, 1) * 127.5).round() / 127.5
    global STD
    kept, STD = STD, 0.25
    try:
        got = fd.training.bits_per_dim(exact(chain), x0, chain, progress=False)
    finally:
        STD = kept
    want = (math.log(0.25 * math.sqrt(2 * math.pi * math.e)) + math.log(255 / 2)) / math.log(2)
    assert -0.03 < got.total.mean() - want < 0.1


def test_prior_kl_and_progress(capsys):
    x0 = torch.full((2, 1, 3), 0.5)
    a2 = CHAIN.alpha_bar[-1]
    want = 0.5 * (0.25 * a2 + (1 - a2) - 1 - math.log(1 - a2)) / math.log(2)
    np.testing.assert_allclose(fd.training.prior_kl(x0.double(), CHAIN), want, rtol=1e-9)
    short = Betas(linear_betas(5))
    fd.training.bits_per_dim(lambda x, t: x, x0, short, variance="fixed_large")
    assert "bits per dimension" in capsys.readouterr().err


X = torch.zeros(2, 1, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.gaussian_kl(X, X, X[:1], X), ValueError, "mean2"),
        (lambda: ops.gaussian_kl(X, torch.zeros(5), X, X), ValueError, "log_variance1 must broadcast"),
        (lambda: ops.decoder_nll(X, X, X, bins=1), ValueError, "bins"),
        (lambda: ops.decoder_nll(X.int(), X, X), TypeError, "int32"),
        (lambda: bound.vb_term(X, X, X.int(), 3, CHAIN, variance="fixed_small"), TypeError, "x_t.*int32"),
        (lambda: fd.training.vlb_loss(X, X, 3, CHAIN, [1, 2]), ValueError, r"\(2, 2, 3\), got \(2, 1, 3\)"),
        (lambda: fd.training.vlb_loss(X, X, 3, CHAIN, [1, 2], variance="learned"), ValueError, "learned_range"),
        (lambda: fd.training.vlb_loss(X, X, 1000, CHAIN, [1, 2], variance="fixed_small"), ValueError, "0..999"),
        (lambda: fd.training.hybrid_loss(X, None, 3, CHAIN, [1, 2]), TypeError, "x0 must be a torch.Tensor"),
        (lambda: fd.training.bits_per_dim(lambda x, t: x, X, VP()), TypeError, "needs Betas"),
        (lambda: fd.training.prior_kl(X, VP()), TypeError, "needs Betas"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
