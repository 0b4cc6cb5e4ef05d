"""A result's bits do not depend on how many threads the CPU's C++ loops were given."""

import pytest
import torch

import fastdiff as fd
from fastdiff import native, ops, schedules, solvers

pytestmark = pytest.mark.usefixtures("cpp_loops")
SHAPE = (5, 3, 9001)  # more than one thread's worth, the last block of a sample a part of one
SEEDS = torch.arange(5) + 3
CHAIN = schedules.Betas(schedules.linear_betas(1000))
T = torch.tensor([0, 10, 400, 700, 999])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def guided(rule):
    return lambda: [ops.guide(normal(*SHAPE), normal(*SHAPE, seed=1), torch.arange(5) + 1.5, rule=rule)]


def with_gradient(function, *leaves):
    leaves = [v.requires_grad_() for v in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def kl():
    mean, log_variance = normal(*SHAPE), normal(*SHAPE, seed=1)
    return with_gradient(lambda m, v: ops.gaussian_kl(mean, log_variance, m, v), normal(*SHAPE, seed=2), normal(*SHAPE))


def denoising():
    x0 = normal(*SHAPE, seed=1)
    return with_gradient(lambda m: ops.denoising_loss(m, x0, T, CHAIN, SEEDS, target="v"), normal(*SHAPE))


def binned(readout):
    row = torch.zeros(1, dtype=torch.int64)
    seeds = {"seeds": SEEDS} if readout == "sample" else {}
    model_out = 0.3 * normal(5, 6, 9001)
    x, coef = 0.3 * normal(*SHAPE), torch.tensor([[0.5, -0.6]])
    return lambda: [ops.binned_readout(x, model_out, coef, row, bins=32, readout=readout, **seeds)]


def classes():
    return torch.randint(27, (5, 999), generator=torch.Generator().manual_seed(0))


def categorical(K):
    x = classes() % K
    logits = normal(5, 999, 1 if K == 2 else K)

    def run():
        noisy = ops.categorical_noise(x, torch.linspace(0.1, 0.9, 5), schedules.BFNDiscrete(2.0, K), seeds=SEEDS)
        return [noisy, *with_gradient(lambda v: ops.categorical_loss(v, x), logits.clone())]

    return run


def sampled(plan, shape, dtype=torch.float32):
    def model(x, t):
        return 0.3 * x + 0.1

    return lambda: [fd.sample(model, plan, shape, seed=4, dtype=dtype, device="cpu")]


CASES = {
    **{f"guide-{rule}": guided(rule) for rule in ("cfg", "rescale", "apg", "zero_star")},
    "threshold": lambda: [ops.threshold(3 * normal(*SHAPE), 0.9)],
    "gaussian_kl": kl,
    "denoising_loss": denoising,
    "add_noise": lambda: ops.add_noise(normal(*SHAPE), T, CHAIN, seeds=SEEDS, target="v"),
    "binned-sample": binned("sample"),
    "binned-mean": binned("mean"),
    "categorical-2": categorical(2),
    "categorical-27": categorical(27),
    "ddpm": sampled(solvers.ddpm(CHAIN, 4), SHAPE),
    "dpmpp_2m": sampled(solvers.dpmpp_2m(schedules.VP(), 4), SHAPE, torch.bfloat16),
    "unipc": sampled(solvers.unipc(CHAIN, 4), SHAPE),
    "bfn_discrete": sampled(solvers.bfn_discrete(schedules.BFNDiscrete(2.0, 27), 4), (5, 999)),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_threads(case):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert native.threads(5 * 3 * 9001) == threads
            results.append(CASES[case]())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
