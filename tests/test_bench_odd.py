"""What a sceptic tries: peers given more work than they need, options that nothing reads, models of all kinds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff as fd
from fastdiff_bench import kernels
from fastdiff_bench.kernels_categorical import textbook_step
from fastdiff_bench.textbook import Textbook, drawn
from fastdiff_bench.textbook_tokens import TokensTextbook

CPU = torch.device("cpu")


class Done(TorchDispatchMode):
    """The names of the operations done, and how many random numbers but normal ones they drew."""

    def __init__(self):
        super().__init__()
        self.names, self.random = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in ("rand", "rand_like", "uniform_", "exponential_", "multinomial"):
            self.random += sum(v.numel() for v in tree_leaves(out))
        return out


def _flow():
    plan = fd.solvers.bfn_discrete(fd.schedules.BFNDiscrete(3.0, 5), 4)
    out = torch.randn(4, 9, 5)
    return (lambda: Textbook(plan, lambda x, t: out)(torch.zeros(4, 9, 5))), plan.nfe


def _tokens(**options):
    plan = fd.solvers.unmask(fd.schedules.Masked(5), 4, order="confidence", **options)
    out = torch.randn(4, 9, 5)
    return (lambda: TokensTextbook(plan, lambda x, t: out)(torch.full((4, 9), 5))), plan.nfe


def _row():
    step, m = textbook_step(3.0, 1.0), torch.randn(4, 9, 5)
    return (lambda: step(torch.zeros(1, 4, 9, 5), m, m)), 1


def _unmask():
    work = kernels.MAKERS["unmask_step"]("masked", 36 * 256, torch.float32, CPU, ["torch"])
    return (lambda: work.columns["torch"](*work.sets[0])), 1


@pytest.mark.parametrize("made", [_flow, _tokens, lambda: _tokens(temperature=0.5), _row, _unmask])
def test_plain_torch_draws_one_number_a_token_for_a_class(made):
    """On a CPU K exponentials a token were most of its step."""
    run, rows = made()
    with torch.no_grad(), Done() as done:
        run()
    assert done.random == 36 * rows


def test_plain_torchs_classes_have_their_shares():
    theta = torch.tensor([0.0, 0.2, 0.0, 0.3, 0.5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        k = drawn((theta * 7).expand(40_000, 5))  # what does not sum to 1 is scaled
    shares = k.bincount(minlength=5) / len(k)
    assert len(shares) == 5 and float((shares - theta).abs().max()) < 0.01 and not shares[theta == 0].any()


@pytest.mark.parametrize("elements", [1, 8, 1 << 12])
def test_plain_torch_thresholds_without_sorting_all(elements):
    work = kernels.MAKERS["threshold"]("any", elements, torch.float32, CPU, ["torch"])
    x = work.sets[0][0]
    with Done() as done:
        got = work.columns["torch"](x)
    assert "sort" not in done.names
    s = torch.quantile(x.abs(), 0.995, dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(got, x.clamp(-s, s) / s, rtol=2e-6, atol=2e-6)
