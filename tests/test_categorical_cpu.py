"""categorical_step on a CPU: the C++ loop's jobs, shared draws and far-out numbers, and what a step needs in memory."""

import subprocess
import sys

import pytest
import torch

from fastdiff import ops
from fastdiff.categorical_cpu import CHUNK, CompiledStep, chunks
from fastdiff.plan import row_width
from tests.test_categorical_step import agree, plain_table, random_case, reference, run, width


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("K", "tokens", "readout"),
    [(2, 4099, "sample"), (3, 701, "sample"), (27, 301, "sample"), (27, 301, "mean"), (64, 70, "sample"),
     (65, 70, "mean"), (300, 22, "argmax"), (2053, 3, "sample"), (2559, 3, "sample")],
)  # fmt: skip
def test_the_loop_in_many_jobs(K, tokens, readout, threads):
    """Jobs that leave a rest, tokens that fill no lanes, jobs that start within a Philox counter: equal to float64."""
    state, m, u, options = random_case(K, tokens)
    slots, seeds, index = options["slots"], options["seeds"], options["index"]
    table, row, w = plain_table(), torch.tensor([1]), torch.tensor([[2.0, 0.5]])
    classes, x = torch.zeros(2, tokens, dtype=torch.int64), torch.empty(4, tokens, width(K))
    step = CompiledStep(new := state[:1].clone(), x, classes, table, slots)
    step.operands.threads = threads
    assert step(readout, row, m, uncond=u, guidance=w, seeds=seeds, index=index)
    agree((new, x, classes), reference(state[:1], m, table, row, readout=readout, uncond=u, guidance=w, **options))


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_every_number_of_classes(dtype):
    """Up to 64 classes, 16 tokens lie beside each other, and the 5 left over; classes of more lie behind each other."""
    g = torch.Generator().manual_seed(0)
    for K in range(2, 66):
        x = torch.randint(0, K, (2, 37), generator=g)
        logits = torch.randn(2, 37, width(K), generator=g).to(dtype).requires_grad_()
        loss = ops.categorical_loss(logits, x)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        exact = logits.detach().double().requires_grad_()
        want = ops.categorical_loss_ref(exact, x)
        (slope,) = torch.autograd.grad(want.sum(), exact)
        assert float(((loss - want) / want).abs().max()) < 2e-6, K
        tolerance = 2e-6 if dtype == torch.float32 else 2.0**-7  # stored, then scaled: two roundings
        assert float((grad - slope).abs().max() / slope.abs().max()) < tolerance, K
        assert torch.equal(ops.categorical_loss(logits.detach(), x), loss)  # no gradient is made for it


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize(("K", "tokens"), [(2, 1), (2, 7), (3, 2), (5, 8), (27, 2), (27, 4)])
def test_small_samples_share_a_draw(K, tokens):
    """A weight and a seed each: equal to float64, and each sample bit for bit what it is alone."""
    batch, g = 71, torch.Generator().manual_seed(K + tokens)
    state = torch.randn(1, batch, tokens, width(K), generator=g)
    m, u = torch.randn(2, batch, tokens, width(K), generator=g)
    seeds, index = torch.randint(2**62, (batch,), generator=g), torch.randint(2**31, (batch,), generator=g)
    options = dict(slots=1, readout="sample", seeds=seeds, index=index, uncond=u)
    options["guidance"] = torch.linspace(0.0, 3.0, batch)[None]
    args, here = (state, m, plain_table(), torch.tensor([1])), torch.device("cpu")
    got = run(here, *args, **options)
    agree(got, reference(*args, **options))
    for b in (0, 35, batch - 1):
        one = {name: v[b : b + 1] for name, v in options.items() if name in ("seeds", "index", "uncond")}
        one["guidance"] = options["guidance"][:, b : b + 1]
        alone = run(here, state[:, b : b + 1], m[b : b + 1], *args[2:], **(options | one))
        assert all(torch.equal(a, v[..., b : b + 1, :, :] if v.dim() > 2 else v[b : b + 1])
                   for a, v in zip(alone, got, strict=True))  # fmt: skip


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize("w", [1.5, [1.5], [[1.5, 0.5]], [[1.5], [2.5], [0.5]], [[0.0, 1.0], [1.5, 2.0], [2.0, 0.5]]])
def test_the_weights_of_the_loop(w):
    """One for all, one a sample, one a row of the table, and both."""
    state, m, u, options = random_case(27, 5)
    options |= dict(uncond=u, guidance=torch.tensor(w), readout="mean")
    args = (state[:1], m, plain_table(), torch.tensor([1]))
    agree(run(torch.device("cpu"), *args, **options), reference(*args, **options))


@pytest.mark.usefixtures("cpp_loops")
@pytest.mark.parametrize("K", [2, 27, 100])
def test_the_loop_far_out(K):
    """Logits whose exponentials over- and underflow: the softmax of float64 within 4e-6 and no NaN."""
    g = torch.Generator().manual_seed(K)
    m = torch.randn(1, 64, width(K), generator=g) * torch.logspace(-6, 3, 64).view(1, -1, 1)
    table = torch.zeros(1, row_width(1))
    table[0, [4, 8, 9]] = torch.tensor([1.0, 1.0, 1.0])  # S'0 = S0 + p
    args, options = (m[None].clone(), m, table, torch.tensor([0])), dict(slots=1, readout="mean")
    got, want = run(torch.device("cpu"), *args, **options), reference(*args, **options)
    agree(got, want)
    if K == 2:  # tanh to full precision near 0
        small = want[1].abs() < 0.01
        assert small.any() and float(((got[1].double() / want[1] - 1).abs())[small].max()) < 1e-6


def test_chunks_cover_everything_once():
    for batch, tokens, K in ((3, 7, 27), (1, 100003, 27), (2, 3, 262144), (5000, 1, 4096), (1, 9, 1), (7, 40000, 3)):
        seen = torch.zeros(batch, tokens, dtype=torch.int64)
        for c in chunks(batch, tokens, K):
            seen[c.b0 : c.b1, c.d0 : c.d1] += 1
            b, d = c.size
            assert c.d0 * K % 4 == 0 and (b == 1 or d == tokens) and b * d * K <= max(CHUNK, 4 * K) <= 1 << 20
        assert bool((seen == 1).all())


PEAK = """
import resource, sys, torch
from fastdiff import categorical_cpu, ops
{without}
from fastdiff.plan import row_width
torch.set_num_threads(1)
K, tokens = 4096, 8192
table = torch.zeros(1, row_width(1)); table[0, [4, 5, 8, 9, 11]] = 1.0
state, m = torch.zeros(1, 1, tokens, K), torch.zeros(1, tokens, K, dtype=torch.bfloat16)
x, k = torch.zeros(1, tokens, K, dtype=torch.bfloat16), torch.zeros(1, tokens, dtype=torch.int64)
def step(n):
    ops.categorical_step(state[:, :, :n], m[:, :n], table, torch.tensor([0]), slots=1, readout="sample",
                         seeds=torch.tensor([1]), model_in=x[:, :n], classes=k[:, :n])
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(tokens)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("without", ["", "categorical_cpu.function = lambda *_: None"], ids=["loop", "eager"])
def test_memory_is_that_of_a_chunk(without):
    """The peak of the process grows by less than 32 MiB in a step on 2^25 elements (128 MiB a fp32 temporary)."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(without=without)], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout) < 32 * 1024
