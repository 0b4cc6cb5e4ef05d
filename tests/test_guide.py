"""Guidance rules and dynamic thresholding: kernel against reference, reference against the formulas of the papers."""

import math

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import ops, schedules, solvers

TOLERANCE = 4e-6
RULES = {
    "cfg": {},
    "rescale": {"rescale": 0.6},
    "apg": {"eta": 0.3},
    "apg-norm": {"eta": 0.0, "norm_threshold": 2.5},
    "zero_star": {},
}


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def data(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape, dtype=torch.float32):
    """A conditional output and an unconditional one near it."""
    c = data(*shape, dtype=torch.float64)
    return c.to(dtype), (c + 0.3 * data(*shape, seed=1, dtype=torch.float64) + 0.05).to(dtype)


def close(got, want, tolerance=TOLERANCE):
    got, want = got.cpu().double(), want.cpu().double()
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())


def call(case, *args, function=ops.guide):
    return function(*args, rule=case.split("-")[0], **RULES[case])


def by_the_paper(case, c, u, w):
    """One sample, NumPy float64."""
    options, d = RULES[case], c - u
    if case == "cfg":
        return u + w * d
    if case == "rescale":
        g = u + w * d
        return options["rescale"] * g * c.std() / g.std() + (1 - options["rescale"]) * g
    if case.startswith("apg"):
        r = options.get("norm_threshold", 0)
        d = d * min(1, r / np.linalg.norm(d)) if r else d
        unit = c / np.linalg.norm(c)
        parallel = (d * unit).sum() * unit
        return c + (w - 1) * (d - parallel + options["eta"] * parallel)
    s = (c * u).sum() / ((u**2).sum() + 1e-8)
    return (1 - w) * s * u + w * c


@pytest.mark.parametrize("case", RULES)
def test_reference_is_the_formula(case):
    c, u = pair(3, 2, 5, 4, dtype=torch.float64)
    w = torch.tensor([1.0, 3.0, 7.5], dtype=torch.float64)
    got = call(case, c, u, w, function=ops.guide_ref)
    for b in range(3):
        want = by_the_paper(case, c[b].numpy(), u[b].numpy(), float(w[b]))
        assert np.allclose(got[b].numpy(), want, rtol=1e-12, atol=1e-12)


SHAPES = [(1,), (7,), (2, 19, 7), (1, 4, 31, 33), (0,), (3, 4099)]  # the last in pieces
RULES_AND_SHAPES = [(c, s) for c in RULES for s in SHAPES if (c, s) != ("rescale", (1,))]  # one has no deviation


@pytest.mark.parametrize(("case", "shape"), RULES_AND_SHAPES)
def test_against_float64(case, shape, device):
    c, u = pair(3, *shape)
    for w in (4.0, torch.tensor([1.0, 3.0, 7.5])):
        want = call(case, c.double(), u.double(), w, function=ops.guide_ref)
        got = call(case, c.to(device), u.to(device), w.to(device) if isinstance(w, torch.Tensor) else w)
        assert got.numel() == 0 or close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RULES)
def test_low_precision_and_strides(case, dtype, device):
    c, u = (v.transpose(1, 2) for v in pair(2, 6, 8, dtype=dtype))
    want = call(case, c.double(), u.double(), 3.0, function=ops.guide_ref)
    got = call(case, c.to(device), u.to(device), 3.0)
    assert got.dtype == dtype
    assert bool(((got.cpu().double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 2e-5).all())


@pytest.mark.parametrize("size", [700, 2800])
@pytest.mark.parametrize("case", RULES)
def test_a_sample_is_the_same_in_every_batch(case, size, device):
    c, u = (v.to(device) for v in pair(5, 3, size))
    w = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0], device=device)
    together = call(case, c, u, w)
    for b in range(5):
        assert torch.equal(call(case, c[b : b + 1], u[b : b + 1], w[b : b + 1])[0], together[b])


@pytest.mark.parametrize("case", RULES)
def test_no_guidance_and_compile(case):
    c, u = pair(2, 3, 8)
    if case == "cfg" or case.startswith("apg"):
        assert torch.equal(call(case, c, u, 1.0), c)
    w = torch.tensor([3.0, 5.0])
    compiled = torch.compile(lambda c, u, w: call(case, c, u, w), fullgraph=True, backend="aot_eager")
    assert close(compiled(c, u, w), call(case, c, u, w))
    gradient = torch.autograd.grad(call(case, c.requires_grad_(), u, w).sum(), c)[0]
    assert bool(torch.isfinite(gradient).all())


def test_zero_star_of_nothing(device):
    """s = <c, 0> / 1e-8 = 0: m = w c; and where |u|^2 is 1e-8, s is half of <c, u> / |u|^2."""
    c = pair(1, 4)[0].to(device)
    assert close(ops.guide(c, 0 * c, 3.0, rule="zero_star"), 3 * c)
    u = torch.tensor([[1e-4, 0.0, 0.0, 0.0]], device=device)
    s = 0.5 * c[:, :1] / 1e-4
    assert close(ops.guide(c, u, 3.0, rule="zero_star"), s * u + 3 * (c - s * u))


def test_zero_star_of_little(device):
    """Where |u| is 1e-3 of |c|, s is 1e3 and only s u is of c's size: nothing cancels."""
    c, u = pair(3, 1000)
    u = 1e-3 * u
    want = np.stack(
        [by_the_paper("zero_star", a, b, 5.0) for a, b in zip(c.double().numpy(), u.double().numpy(), strict=True)]
    )
    assert close(ops.guide(c.to(device), u.to(device), 5.0, rule="zero_star"), torch.from_numpy(want))


@pytest.mark.parametrize("size", [300, 9000])
def test_rescale_far_from_zero(size, device):
    """The std of numbers 300 from 0, of numbers in two places, and beside an outlier: squares do not cancel."""
    c, u = pair(3, size)
    c[0], u[0] = c[0] + 300, u[0] + 300
    c[1, size // 2 :] += 200
    c[2, 0] += 50
    d, g = c.double(), u.double() + 4 * (c.double() - u.double())
    want = d.std(1) / g.std(1)
    got = ops.guidance_scales(c.to(device), u.to(device), 4.0, rule="rescale", rescale=1.0)[:, 0]
    assert torch.allclose(got.cpu().double(), want, rtol=5e-7, atol=0)


def test_two_dtypes(device):
    """The output has the first one's."""
    c, u = (v.to(device) for v in pair(2, 300))
    for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        got = ops.guide(c.to(a), u.to(b), 3.0, rule="apg")
        want = ops.guide_ref(c.to(a).double(), u.to(b).double(), 3.0, rule="apg")
        assert got.dtype == a
        assert ((got.double() - want).abs() <= torch.finfo(a).eps * want.abs() + TOLERANCE * want.abs().max()).all()


def test_nan_stays_in_its_sample(device):
    c, u = (v.to(device) for v in pair(2, 40))
    c[0, 3] = math.nan
    for case in RULES:
        got = call(case, c, u, 3.0)
        assert got[0, 3].isnan() and not got[1].isnan().any()


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((X, X[:2], 2.0), {}, ValueError, r"\(3, 4\), got \(2, 4\)"),
        (([0.0], X, 2.0), {}, TypeError, "list"),
        ((X, X.int(), 2.0), {}, TypeError, "int32"),
        ((X, X.to("meta"), 2.0), {}, ValueError, "meta"),
        ((X, X, 2.0), {"rule": "best"}, ValueError, "cfg, rescale, apg, zero_star"),
        ((X, X, math.nan), {}, ValueError, "finite"),
        ((X, X, "3"), {}, ValueError, "number"),
        ((X, X, torch.zeros(2)), {}, ValueError, r"\[B\] = \[3\]"),
        ((X, X, 2.0), {"rule": "rescale", "rescale": 1.5}, ValueError, "0..1"),
        ((X, X, 2.0), {"rule": "apg", "eta": math.inf}, ValueError, "eta"),
        ((X, X, 2.0), {"rule": "apg", "norm_threshold": -1.0}, ValueError, ">= 0"),
        ((torch.tensor(1.0), torch.tensor(1.0), 2.0), {}, ValueError, "0-d"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.guide(*args, **kwargs)


def test_interval():
    """Guidance in the middle of the run only; sampling reads the column."""
    plan = solvers.euler(schedules.Flow(), 10, prediction="flow")
    chosen = ops.guidance_interval(plan, 4.0, 0.7, 0.3)
    inside = (plan.t >= 0.3) & (plan.t <= 0.7)
    assert inside.any() and not inside.all()
    assert chosen.guidance.tolist() == np.where(inside, 4.0, 1.0).tolist() and plan.guidance is None
    model = lambda x, t, y: x * 0.3 + y[:, None]  # noqa: E731
    options = {"cond": {"y": torch.tensor([1.0])}, "uncond": {"y": torch.tensor([0.5])}, "seed": 3}
    column = torch.tensor(chosen.guidance)[:, None]
    got = fd.sample(model, chosen, (2, 3), **options)
    assert torch.equal(got, fd.sample(model, plan, (2, 3), guidance=column, **options))
    counted = ops.guidance_interval(plan, np.int64(4), np.float32(0.75), np.float64(0.25))
    assert counted.guidance.tolist() == np.where((plan.t >= 0.25) & (plan.t <= 0.75), 4.0, 1.0).tolist()
    for args, text in (
        ((math.nan, 0, 1), "w must"),
        ((True, 0, 1), "w must"),
        ((2.0, "a", 1), "start"),
        ((2.0, 0, math.inf), "end"),
    ):
        with pytest.raises(ValueError, match=text):
            ops.guidance_interval(plan, *args)
