"""A row in fp32: p where x and m nearly cancel, and p put into the sums where that loses nothing."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import ops, schedules, solvers
from fastdiff.cpu import CompiledStep, EagerStep, posterior_into
from fastdiff.ops.posterior import _columns as posterior_columns
from fastdiff.plan import ROW_HEADER
from fastdiff.prediction import factored
from fastdiff.reference import reference_sample

CHAIN = schedules.Betas(schedules.cosine_betas(1000))
PLAN = solvers.ddim(CHAIN, 50)  # alpha of the first row is 5e-5: x0 = (x - sigma eps) / alpha
SHAPE = (2, 3, 517)
M = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
X0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
X = (PLAN.alpha[0] * X0.double() + PLAN.sigma[0] * M.double()).float()
U = 2.0**-24
OF_RATIO = abs(PLAN.c_out[0] - PLAN.c_skip[0] * PLAN.packed()[0, 1].astype(np.float64))  # what fp32 leaves of c_out


def columns(plan, k):
    """A_00, b_0, d_0 of a packed row."""
    row, r = plan.packed()[k].astype(np.float64), plan.slots
    at = ROW_HEADER + r * r
    return row[ROW_HEADER], row[at], row[at + r]


def eager(x0):
    slots = [X.clone()]
    EagerStep(PLAN, slots)(0, M, None, None, None, x0)
    return slots[0]


def compiled(x0):
    slots = [X.clone()]
    assert CompiledStep(PLAN, slots, copies=[])(0, M, None, None, None, x0)
    return slots[0]


def operation(x0, device="cpu"):
    state, seen = X.clone()[None].to(device), x0.to(device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    ops.affine_step(state, M.to(device), PLAN.pack(device), row, slots=1, x0=seen)
    x0.copy_(seen)
    return state[0].cpu()


def outer(x0, device):
    seen = x0.to(device)
    got = ops.outer_step(X.to(device), M.to(device), PLAN.pack(device), 0, slots=1, x0=seen)
    x0.copy_(seen)
    return got.cpu()


def check(run):
    """x' to the roundings of its terms and of p, which is what is left of 2e4 times x and m each."""
    x, m, x0 = X.double(), M.double(), torch.empty_like(X)
    p = PLAN.c_skip[0] * x + PLAN.c_out[0] * m
    want = PLAN.A[0, 0, 0] * x + PLAN.b[0, 0] * p
    assert PLAN.c_skip[0] > 2e4 and p.abs().max() < 10
    got = run(x0)
    assert OF_RATIO < 3e-5  # of 2e4: -sigma is a float plus 1e-9
    assert ((x0 - p).abs() <= 4 * U * p.abs() + OF_RATIO * m.abs()).all()
    scale = p.abs() + OF_RATIO * m.abs()
    assert ((got - want).abs() <= 4 * U * (PLAN.A[0, 0, 0] * x.abs() + PLAN.b[0, 0] * scale)).all()


def test_eager():
    check(eager)


def test_compiled(cpp_loops):
    check(compiled)


def test_operation():
    check(operation)


def test_kernel(kernel_device):
    check(lambda x0: operation(x0, kernel_device))


def test_outer_kernel(kernel_device):
    check(lambda x0: outer(x0, kernel_device))


def check_posterior(mean, x0, want):
    """x0 as in check(); the mean k_x0 x0 + k_xt x, where k_x0 is alpha of the index before (its beta is 0.999)."""
    off = 4 * U * want[3].abs() + OF_RATIO * M.abs()
    assert ((x0 - want[3]).abs() <= off).all()
    k_x0 = float(CHAIN.alpha(998))
    assert ((mean - want[0]).abs() <= k_x0 * (off + 4 * U * want[3].abs()) + 4 * U * X.abs()).all()


def test_posterior(device):
    """x0 and the mean of the last index, alpha 5e-5, as float64 has them."""
    t = 999
    want = ops.posterior_ref(X.double(), M.double(), t, CHAIN)
    got = [v.cpu().double() for v in ops.posterior(X.to(device), M.to(device), t, CHAIN)]
    assert want[3].abs().max() < 10
    check_posterior(got[0], got[3], want)


def test_posterior_compiled(cpp_loops):
    mean, x0, variance = torch.empty_like(X), torch.empty_like(X), torch.empty(2, X.shape[0])
    coef = torch.from_numpy(np.stack([c.numpy() for c in posterior_columns(CHAIN, "eps")], 1)).float()[999:]
    assert posterior_into(X, M, coef, None, (-float("inf"), float("inf")), mean, x0, variance)
    want = ops.posterior_ref(X.double(), M.double(), 999, CHAIN)
    check_posterior(mean, x0, want)


def test_bound_of_thresholding(device):
    """The largest |x0| of the sample, where 1e-7 of c_skip x would be 2e-3."""
    x, m = 4 * X.double() - 3 * M, M.double()  # x0 in [-4, 4]
    x = x.float()
    want = (PLAN.c_skip[0] * x.double() + PLAN.c_out[0] * m).abs().flatten(1).amax(1)
    assert (want > 2).all()
    table, row = PLAN.pack(device), torch.zeros(1, dtype=torch.int64, device=device)
    got = ops.threshold_bound(x.to(device), 1.0, model_out=M.to(device), table=table, row=row).cpu()
    assert ((got - want).abs() <= 4 * U * want + OF_RATIO * M.abs().flatten(1).amax(1)).all()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "flow"])
@pytest.mark.parametrize("schedule", [CHAIN, schedules.VE(), schedules.Flow(), schedules.EDM()], ids=repr)
def test_the_ratio_is_the_conversion(schedule, prediction):
    """p of a packed row is c_skip x + c_out m to fp32; where it is the model's output alone, exactly that."""
    t = None if schedule is CHAIN else 0.9 * schedule.t_max
    plan = solvers.ddim(schedule, 20, prediction=prediction, t_start=t)
    c_skip, c_ratio = plan.packed()[:, :2].astype(np.float64).T
    x, m = 1.7, np.float64(np.float32(-0.3))
    got, want = c_skip * (x + c_ratio * m), plan.c_skip * x + plan.c_out * m
    bound = 2 * U * (np.abs(plan.c_skip * x) + np.abs(plan.c_out * m))
    assert np.all(np.abs(got - want) <= bound)
    if prediction == "x0":
        assert np.all(c_skip == 2.0**-80)
        fp32 = np.float32(c_skip) * (np.float32(c_ratio) * np.float32(m) + np.float32(x))
        np.testing.assert_array_equal(fp32, np.float32(m))


def test_a_skip_too_small_to_matter_does_not_overflow():
    """Of v prediction at zero terminal SNR: cos(pi / 2) is 6e-17, and smaller numbers come with other schedules."""
    for c_skip in (6e-17, 1e-30, 1e-45, -1e-40, 0.0):
        skip, c_ratio = (np.float32(c) for c in factored(np.array([c_skip]), np.array([-1.0])))
        p = skip * (np.float32(3.0) + c_ratio * np.float32(2.5))
        np.testing.assert_allclose(p, -2.5, rtol=2e-7)


@pytest.mark.parametrize(("solver", "limit"), [("ddim", 1e-6), ("dpmpp_2m", 1e-6), ("unipc", 1.5e-6), ("heun", 1e-4)])
@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_whole_loops_of_the_cosine_chain(solver, limit, mode):
    """Data N(0, 1/4) and its exact noise prediction rounded to fp32; heun's first derivative is taken at alpha 5e-5."""
    plan = getattr(solvers, solver)(CHAIN, 20)
    data = 0.25 * plan.alpha**2
    eps = dict(zip(plan.times.tolist(), plan.sigma / (data + plan.sigma**2), strict=False))

    def model(x, t):
        return (x.double() * eps[t[0].item()]).float().to(x.dtype)

    x_T = torch.randn(2, 999, generator=torch.Generator().manual_seed(5))
    want = reference_sample(model, plan, x_T.double(), lambda k, like: like)
    got = fd.Sampler(model, plan, mode=mode)(tuple(x_T.shape), x_T=x_T)
    assert (got - want).abs().max() <= limit * want.abs().max()


def test_a_derivative_is_the_models_output():
    """Flow matching with v: (x - p) / sigma is m itself, exactly."""
    plan = solvers.heun(schedules.Flow(), 5, prediction="flow")
    kept = plan.packed()[:-1:2, ROW_HEADER + 2 : ROW_HEADER + 8]  # A_10, A_11, b_0, b_1, d_0, d_1
    np.testing.assert_allclose(kept[:, [0, 1, 3]], 0, atol=1e-12)
    np.testing.assert_allclose(kept[:, 5] / kept[0, 5], 1, rtol=2e-7)


@pytest.mark.parametrize("k", [5, 20, 49])
def test_the_sums_of_a_row(k):
    """ddim in closed form: x' = a' / a x + (s' - s a' / a) eps, with a, s before and a', s' after the row."""
    a, s = PLAN.alpha[k], PLAN.sigma[k]
    after, noise = (PLAN.alpha[k + 1], PLAN.sigma[k + 1]) if k < 49 else (1.0, 0.0)
    A, b, d = columns(PLAN, k)
    assert b == 0
    np.testing.assert_allclose([A, d], [after / a, noise - s * after / a], rtol=2e-7)


@pytest.mark.parametrize("plan", [PLAN, solvers.ddim(CHAIN, 50, clip=(-1, 1))], ids=["noisy end", "clamp"])
def test_p_stays_apart(plan):
    """Without a clamp m also has what the fp32 c_ratio leaves over; a clamped p is what it is."""
    A, b, d = columns(plan, 0)
    rest = 0.0 if plan.clamped else plan.c_out[0] - plan.c_skip[0] * plan.packed()[0, 1].astype(np.float64)
    np.testing.assert_allclose([A, b, d], [plan.A[0, 0, 0], plan.b[0, 0], plan.b[0, 0] * rest], rtol=2e-7)
    assert b != 0 and abs(d) < 1e-6


def test_a_slot_that_is_p_stays_p():
    """dpmpp_2m keeps its prediction: stored as computed, an exchange of buffers on a CPU."""
    plan = solvers.dpmpp_2m(CHAIN, 10)
    kept = plan.packed()[3, ROW_HEADER + 4 : ROW_HEADER + 8]  # b_0, b_1, d_0, d_1
    assert kept[0] == 0 and kept[1] == plan.b[3, 1] == 1 and kept[2] != 0 and kept[3] == 0


def test_classes_keep_p_apart():
    plan = solvers.bfn_discrete(schedules.BFNDiscrete(3.0, 27), 10)
    np.testing.assert_array_equal([columns(plan, k)[1] for k in range(11)], plan.b[:, 0].astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: exp
def test_a_gpus_exponential_overflows_to_infinity(kernel_device):
    """The kernel as a GPU has it: what rounding lost is put back, but not into infinity."""
    kernels, triton = pytest.importorskip("fastdiff_kernels.gaussian_kl"), pytest.importorskip("triton")
    if kernel_device.type == "cpu" and [int(v) for v in triton.__version__.split(".")[:2]] < [3, 9]:
        pytest.skip("the interpreter of Triton before 3.9 rounds the product of an fma")
    log1 = torch.tensor([[0.6, 60.0, 87.0, 89.5, 95.0, 100.0, 120.0, 300.7]], device=kernel_device)
    zero = torch.zeros_like(log1)
    out, of_mean, of_log = torch.empty_like(log1[:, :1]), torch.empty_like(log1), torch.empty_like(log1)
    options = {"BLOCK": 128, "PARTS": 1, "ALIGNED": True, "WIDE": False, "FULL1": True, "FULL2": True, "MATH": "cuda"}
    kernels.gaussian_kl_kernel[(1, 1)](zero, log1, zero, zero, out, 8, 0, 1, 0.125, **options)
    assert out.item() == math.inf
    kernels.gaussian_kl_slopes_kernel[(1, 1)](
        zero, log1, zero, zero, torch.full_like(log1[0, :1], 8.0), of_mean, of_log, 8, 0, 0.125, **options
    )
    want = -0.5 * torch.expm1(log1.double()).float()
    assert of_log[0, 3:].isneginf().all() and torch.allclose(of_log[0, :3], want[0, :3], rtol=5e-7, atol=0)
