"""categorical_loss: kernel and chunks against float64, gradients against autograd, refusals."""

import math

import pytest
import torch

from fastdiff import ops

CASES = [(2, 37), (3, 19), (27, 20), (27, 19), (256, 5), (513, 3), (4096, 2), (20003, 2), (20004, 19)]
JOBS = [(2, 4099), (3, 701), (27, 301), (65, 70), (300, 22)]  # several jobs of the C++ loop


@pytest.fixture
def device(device_of_loops):
    return device_of_loops


def case(K, tokens, dtype=torch.float32, batch=2):
    g = torch.Generator().manual_seed(K)
    logits = (2 * torch.randn(batch, tokens, 1 if K == 2 else K, generator=g)).to(dtype)
    return logits, torch.randint(0, K, (batch, tokens), generator=g), torch.rand(batch, generator=g) + 0.2


def with_gradient(loss, logits, x, weight):
    logits, weight = logits.detach().requires_grad_(), weight.detach().requires_grad_()
    out = loss(logits, x, weight)
    scale = torch.arange(1.0, len(out) + 1, dtype=out.dtype, device=out.device)
    return (out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad((out * scale).sum(), (logits, weight))))


def test_worked_value():
    """x = [0, 1, 0], theta = [0.2, 0.6, 0.2], beta_1 = 4, t = 0.5, K = 3: K beta_1 t |e_x - theta|^2 = 1.44."""
    logits = torch.tensor([[[0.2, 0.6, 0.2]]], dtype=torch.float64).log()
    assert abs(float(ops.categorical_loss(logits, torch.tensor([[1]]), 3 * 4 * 0.5)) - 1.44) < 1e-14


def test_two_classes_are_the_two_channel_loss():
    logits, x, w = case(2, 9, torch.float64)
    both = torch.cat([-0.5 * logits, 0.5 * logits], -1)
    want = w * ((torch.softmax(both, -1) - torch.nn.functional.one_hot(x, 2)) ** 2).sum(-1).mean(1)
    assert float((ops.categorical_loss_ref(logits, x, w) - want).abs().max()) < 1e-14


@pytest.mark.parametrize(("K", "tokens"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(K, tokens, dtype, device):
    """The loss, its gradient to the logits (rounded once to their dtype) and to the weight."""
    logits, x, w = case(K, tokens, dtype)
    want = with_gradient(ops.categorical_loss_ref, logits.double(), x, w.double())
    got = with_gradient(ops.categorical_loss, logits.to(device), x.to(device), w.to(device))
    assert got[1].dtype == dtype
    cut = device.type == "cpu" and ops._dispatch.kernels_for(logits)  # Triton's interpreter cuts where it should round
    ulp = 2e-6 if dtype == torch.float32 else 2.0**-6 if cut else 2.0**-7  # stored, then scaled: two roundings
    for a, b, tolerance in zip(got, want, (2e-6, ulp, 2e-6), strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) <= tolerance


def test_strides_and_axes(device):
    """Padded and transposed logits, also of several windows; several axes; one weight; with and without a gradient."""
    g = torch.Generator().manual_seed(0)
    for logits in (
        torch.randn(2, 3, 4, 32, generator=g)[..., :27],
        torch.randn(2, 4, 3, 27, generator=g).transpose(1, 2),
        torch.randn(2, 1, 2, 20008, generator=g)[..., :20003],
    ):
        x = torch.randint(0, 27, logits.shape[:-1], generator=g)
        want = ops.categorical_loss_ref(logits.double(), x, 2.0)
        got = ops.categorical_loss(logits.to(device), x.to(device), 2.0).cpu()
        assert float((got - want).abs().max()) <= 2e-6
        graded = with_gradient(lambda m, x, w: ops.categorical_loss(m, x, w), logits.to(device), x.to(device),
                               torch.tensor([2.0], device=device))  # fmt: skip
        exact = with_gradient(ops.categorical_loss_ref, logits.double(), x, torch.tensor([2.0], dtype=torch.float64))
        assert float((graded[1] - exact[1]).abs().max() / exact[1].abs().max()) <= 2e-6


@pytest.mark.parametrize("K", [2, 27])
def test_a_sums_gradient_is_one_number_for_all_samples(K, device):
    """Its stride over samples is 0: sample by sample the gradient of each one's own loss."""
    logits, x, _ = (v.to(device) for v in case(K, 5, batch=3))
    (all_of,) = torch.autograd.grad(ops.categorical_loss(logits.requires_grad_(), x).sum(), logits)
    for b in range(3):
        own = logits[b : b + 1].detach().requires_grad_()
        assert torch.equal(torch.autograd.grad(ops.categorical_loss(own, x[b : b + 1])[0], own)[0], all_of[b : b + 1])


@pytest.mark.parametrize("K", [2, 27])
def test_samples_without_axes_are_samples_of_one_token(K, device):
    logits, x, w = case(K, 1)
    one = with_gradient(ops.categorical_loss, logits[:, 0].to(device), x[:, 0].to(device), w.to(device))
    for loss in (ops.categorical_loss_ref, ops.categorical_loss):
        many = with_gradient(loss, logits, x, w)
        flat = with_gradient(loss, logits[:, 0], x[:, 0], w)
        for a, b, c in zip(one, many, flat, strict=True):
            torch.testing.assert_close(a, b.view_as(a), rtol=2e-6, atol=1e-7)
            assert torch.equal(b.view_as(c), c)


def test_near_the_truth_no_digits_are_lost(device, request):
    """A confident network: the error 2 (1 - p)^2 keeps its relative precision."""
    exact = "eager" not in request.node.name  # adds the others up; 1 - p in fp32 is 6e-8 of 1.2e-4, squared
    for logits in (torch.tensor([[[9.0, 0.0, -40.0, -40.0]]]), torch.tensor([[[-9.0]]])):
        p = torch.softmax(logits.double(), -1)[0, 0]
        want = float((1 - p[0]) ** 2 + (p[1:] ** 2).sum()) if len(p) > 1 else 2 / (1 + math.exp(9)) ** 2
        got = float(ops.categorical_loss(logits.to(device), torch.zeros(1, 1, dtype=torch.int64, device=device)))
        assert abs(got / want - 1) < (1e-6 if exact else 2e-3)
    if exact:  # the gradient too, number by number, and two classes, the second true
        x, w = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
        for logits in (torch.tensor([[[9.0, 0.0, -4.0]]]), torch.tensor([[[-9.0]]]), torch.tensor([[[3.0]]])):
            grad = with_gradient(ops.categorical_loss, logits.to(device), x.to(device), w.to(device))[1]
            want = with_gradient(ops.categorical_loss_ref, logits.double(), x, w.double())[1]
            assert float((grad / want - 1).abs().max()) < 2e-6
        logits, x = torch.tensor([[[9.0]]], device=device), torch.ones(1, 1, dtype=torch.int64, device=device)
        got = float(ops.categorical_loss(logits, x))
        assert abs(got * (1 + math.exp(9)) ** 2 / 2 - 1) < 1e-6
        grad = float(with_gradient(ops.categorical_loss, logits, x, w.to(device))[1])
        assert abs(grad * (1 + math.exp(-9)) * (1 + math.exp(9)) ** 2 / -4 - 1) < 2e-6


def test_extremes(device):
    """-inf forbids classes (a whole window of them too); a NaN logit gives NaN; large logits do not overflow."""
    for K in (5, 9000, 20000):
        logits = torch.full((1, 2, K), -math.inf)
        logits[0, :, -1], logits[0, 1, 0] = 3e4, 3e4
        x = torch.tensor([[K - 1, 0]])
        out, grad, _ = with_gradient(
            ops.categorical_loss, logits.to(device), x.to(device), torch.ones(1, device=device)
        )
        assert abs(float(out) - 0.25) < 1e-6 and grad.isfinite().all()
        logits[0, 0, 1] = math.nan
        assert bool(ops.categorical_loss(logits.to(device), x.to(device)).isnan())


@pytest.mark.parametrize("K", [9000, 20003])
def test_a_window_of_forbidden_classes_beside_small_logits(K, device):
    """-200 and -201 among classes of -inf: what counts is their difference."""
    logits = torch.full((1, 1, K), -math.inf)
    logits[0, 0, 0], logits[0, 0, 1] = -200.0, -201.0
    x, p = torch.ones(1, 1, dtype=torch.int64), 1 / (1 + math.exp(1))
    out, grad, _ = with_gradient(ops.categorical_loss, logits.to(device), x.to(device), torch.ones(1, device=device))
    assert abs(float(out) / (2 * (1 - p) ** 2) - 1) < 1e-6
    slope = 4 * p * (1 - p) ** 2  # of 2 (1 - p)^2
    assert abs(float(grad[0, 0, 0]) / slope - 1) < 2e-6 and abs(float(grad[0, 0, 1]) / -slope - 1) < 2e-6
    assert not grad[0, 0, 2:].any()


def test_batch_invariance(device):
    logits, x, w = (v.to(device) for v in case(27, 7, batch=6))
    whole = ops.categorical_loss(logits, x, w)
    for pick in ([4], [5, 0, 3]):
        assert torch.equal(ops.categorical_loss(logits[pick], x[pick], w[pick]), whole[pick])


def test_the_loss_may_be_changed_in_place(device):
    logits, x, _ = (v.to(device) for v in case(5, 4))
    logits.requires_grad_()
    once, twice = (ops.categorical_loss(logits, x) for _ in range(2))
    twice *= 2
    (want,), (got,) = (torch.autograd.grad(loss.sum(), logits) for loss in (2 * once, twice))
    assert torch.equal(got, want) and torch.equal(twice, 2 * once)


def test_gradcheck():
    for K in (2, 5):
        logits, x, w = case(K, 3, torch.float64)
        logits, w = logits.requires_grad_(), w.double().requires_grad_()
        for loss in (ops.categorical_loss_ref, ops.categorical_loss):
            assert torch.autograd.gradcheck(lambda m, v, loss=loss, x=x: loss(m, x, v), (logits, w))


@pytest.mark.parametrize("K", [2, 27])
def test_one_full_size_tensor_is_kept(K):
    """Between forward and backward autograd holds one tensor of the logits' size, in their dtype."""
    logits, x, w = case(K, 8, torch.bfloat16)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.categorical_loss(logits, x, w)
    large = [t for t in kept if t.numel() >= logits.numel() and t.is_floating_point()]
    assert [t.dtype for t in large] == [torch.bfloat16]


@pytest.mark.parametrize(
    ("K", "dtype", "again"),
    [(2, torch.float32, False), (27, torch.float32, True), (27, torch.bfloat16, False), (65, torch.bfloat16, True)],
)
def test_what_a_kernel_keeps(K, dtype, again, kernel_device):
    """The logits themselves and four numbers a token, or a gradient of its own: one tensor of that size either way."""
    logits, x, _ = (v.to(kernel_device) for v in case(K, 8, dtype))
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.categorical_loss(logits, x)
    (large,) = [t for t in kept if t.numel() >= logits.numel() and t.is_floating_point() and t.dim() == 3]
    assert (large.data_ptr() == logits.data_ptr()) == again and large.dtype == dtype
    assert [tuple(t.shape) for t in kept if t.dim() == 2 and t.is_floating_point()] == [(16, 4)] * again


@pytest.mark.compiled
@pytest.mark.parametrize("K", [2, 27])
def test_compiles(K):
    logits, x, w = case(K, 8)
    compiled = torch.compile(ops.categorical_loss, fullgraph=True)
    for a, b in zip(
        with_gradient(compiled, logits, x, w), with_gradient(ops.categorical_loss, logits, x, w), strict=True
    ):
        assert float((a - b).abs().max()) <= 2e-6


def test_registration(kernel_device):
    logits, x, _ = (v.to(kernel_device) for v in case(27, 4))
    errors = torch.empty(2, 1, device=kernel_device)
    token, scale = torch.empty(8, 4, device=kernel_device), torch.ones(2, device=kernel_device)
    for op, args in (
        (torch.ops.fastdiff.categorical_loss.default, (logits, x, errors, None, token)),
        (torch.ops.fastdiff.categorical_gradient.default, (logits, x, token, scale, torch.empty_like(logits))),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_classes_outside_are_nan_in_the_kernel(kernel_device):
    for K in (2, 27):
        logits, x = torch.zeros(2, 3, 1 if K == 2 else K, device=kernel_device), torch.zeros(2, 3, dtype=torch.int64)
        x[1, 2] = K
        errors = torch.empty(2, 1, device=kernel_device)
        torch.ops.fastdiff.categorical_loss(logits, x.to(kernel_device), errors, None, None)
        assert errors.isnan().flatten().tolist() == [False, True]
    for K, programs in ((27, 1), (20003, 1)):
        logits, x = torch.zeros(2, 3, K, device=kernel_device), torch.zeros(2, 3, dtype=torch.int64)
        x[1, 2], x[1, 1] = K, -1
        errors, token = torch.empty(2, programs, device=kernel_device), torch.empty(6, 4, device=kernel_device)
        grad, scale, x = torch.empty_like(logits), torch.ones(2, device=kernel_device), x.to(kernel_device)
        torch.ops.fastdiff.categorical_loss(logits, x, errors, None, token)
        torch.ops.fastdiff.categorical_gradient(logits, x, token, scale, grad)
        assert errors.isnan().flatten().tolist() == [False, True]
        assert (
            grad.isnan().all(-1).flatten().tolist()
            == grad.isnan().any(-1).flatten().tolist()
            == [False] * 4 + [True] * 2
        )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(2, 3, 2)}, ValueError, "1 for K = 2"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, "got 0"),
        ({"logits": torch.zeros(2)}, ValueError, r"\[B, \*D, K'\]"),
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "int64"),
        ({"x": torch.zeros(2, 3)}, TypeError, "int64, got float32"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, ValueError, r"\(2, 3\)"),
        ({"x": torch.full((2, 3), 5)}, ValueError, r"0..4 for K = 5, got 5..5"),
        ({"x": torch.full((2, 3), -1)}, ValueError, "got -1..-1"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, ValueError, "meta"),
        ({"weight": torch.zeros(3)}, ValueError, r"\(2,\), got \(3,\)"),
        ({"weight": "1"}, TypeError, "number or a tensor"),
        ({"weight": torch.zeros(2, dtype=torch.int64)}, TypeError, "int64"),
    ],
)
def test_bad_input(change, error, text):
    args = {"logits": torch.zeros(2, 3, 5), "x": torch.zeros(2, 3, dtype=torch.int64), "weight": 1.0, **change}
    with pytest.raises(error, match=text):
        ops.categorical_loss(**args)


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize(("K", "tokens"), JOBS)
def test_the_loop_in_many_jobs(K, tokens):
    logits, x, w = case(K, tokens)
    want = with_gradient(ops.categorical_loss_ref, logits.double(), x, w.double())
    for a, b in zip(with_gradient(ops.categorical_loss, logits, x, w), want, strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) <= 2e-6
