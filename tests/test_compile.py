"""The operations trace without a graph break: torch.compile(fullgraph=True) gives what eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff import ops, solvers
from fastdiff import schedules as S
from fastdiff.training import hybrid_loss, prior_kl, vlb_loss

CHAIN = S.Betas(S.linear_betas(100))
X = torch.linspace(-2, 2, 60).view(3, 4, 5)
SEEDS = torch.arange(3)
INDEX = torch.tensor([1, 5, 99])
PLAN = solvers.ddpm(CHAIN, 10, clip=(-1, 1))


def one_row(x: torch.Tensor, t: torch.Tensor) -> Any:
    state = x[None].clone()
    ops.affine_step(state, 0.5 * x, PLAN.pack("cpu"), t[:1] * 0 + 3, slots=1, seeds=SEEDS)
    return state


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("fn", "t"),
    [
        (lambda x, t: ops.add_noise(x, t, CHAIN, seeds=SEEDS, target="v"), INDEX),
        (lambda x, t: ops.add_noise(x, t, S.Flow(3.0), seeds=SEEDS, target="flow"), torch.tensor([0.1, 0.5, 1.0])),
        (lambda x, t: ops.forward_step(x, t, CHAIN, seeds=SEEDS), INDEX),
        (lambda x, t: ops.posterior(x, 0.5 * x, t, CHAIN, clip=(-1, 1)), INDEX),
        (one_row, INDEX),
    ],
    ids=["add_noise-betas", "add_noise-flow", "forward_step", "posterior", "affine_step"],
)
def test_fullgraph(fn: Callable[..., Any], t: torch.Tensor) -> None:
    want, got = fn(X, t), torch.compile(fn, fullgraph=True)(X, t)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (want, got)), strict=True):
        assert (a - b).abs().max() <= 2e-6


BOTH = torch.cat([0.5 * X, 0.1 * X], 1)
OF_A_CHAIN: dict[str, Callable[[S.Betas], Any]] = {
    "add_noise": lambda c: ops.add_noise(X, INDEX, c, seeds=SEEDS, target="v"),
    "forward_step": lambda c: ops.forward_step(X, INDEX, c, seeds=SEEDS),
    "posterior": lambda c: ops.posterior(X, 0.5 * X, INDEX, c, clip=(-1, 1)),
    "denoising_loss": lambda c: ops.denoising_loss(0.5 * X, X, INDEX, c, SEEDS, weighting="min_snr"),
    "vlb_loss": lambda c: vlb_loss(BOTH, X, INDEX, c, SEEDS),
    "hybrid_loss": lambda c: hybrid_loss(BOTH, X, INDEX, c, SEEDS),
    "prior_kl": lambda c: prior_kl(X, c),
}


@pytest.mark.parametrize("fn", OF_A_CHAIN.values(), ids=list(OF_A_CHAIN))
def test_a_chain_nobody_has_used_compiles(fn: Callable[[S.Betas], Any]) -> None:
    """Its tables are made while tracing and held as constants; another chain gets its own."""
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    chains = [S.Betas(S.linear_betas(100)), S.Betas(S.cosine_betas(100))]
    for chain in (*chains, *chains):
        got, want = compiled(chain), fn(chain)
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    used = torch.compile(lambda: fn(chains[0]), fullgraph=True, backend=backend)
    used()
    assert len(sizes) == 3 and len(set(sizes)) == 1  # tables that are there and tables that were made: one graph
