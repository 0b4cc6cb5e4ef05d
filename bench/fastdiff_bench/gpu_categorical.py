"""categorical_step on a GPU: bandwidth for K = 2 .. 262,144 beside the same row in plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, schedules, solvers
from fastdiff_bench.kernels_categorical import textbook_step
from fastdiff_bench.textbook import compiled
from fastdiff_bench.work import gap

__all__ = ["categorical_rows"]

CLASSES = (2, 3, 27, 256, 4096, 16384, 50257, 262144)
QUICK = (2, 27, 4096, 50257)
ELEMENTS = 1 << 25
ROW = 3
GAP = 2e-2  # of two bf16 outputs
Timer = Callable[[Sequence[Callable[[], object]]], float]
Set = tuple[Tensor, Tensor, Tensor]  # state, logits, the model's next input


def _plain_rows(K: int, plan: fd.Plan, sets: list[Set], graph_us: Timer) -> Iterator[dict[str, Any]]:
    """The same row on the same buffers in plain torch, timed in the same way; nothing where it computes another."""
    textbook = textbook_step(float(plan.b[ROW, 0]), float(plan.s[ROW, 0]))
    state, m, seen = sets[0][0].clone(), sets[0][1], torch.empty_like(sets[0][2])
    _, want = textbook(state, m, seen, "argmax")
    table, row = plan.pack(m.device), torch.tensor([ROW], device=m.device)
    still = torch.zeros(m.shape, device=m.device)
    ops.categorical_step(state, m, table, row, slots=1, readout="argmax", noise=still, model_in=seen)
    differs = gap(seen, want)
    if not differs <= GAP:  # NaN too
        return
    for name, step in (("eager", textbook), ("torch.compile", compiled(textbook, m.numel()))):
        us = graph_us([partial(step, *s) for s in sets])
        what = {"what": f"plain step K={K} {name}", "elements": m.numel(), "us": us}
        yield {**what, "equal_work": True, "differs": differs}


def categorical_rows(
    copy: float, graph_us: Timer, *, quick: bool = False, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """us and GB/s of a step with bf16 logits and input, 12 bytes an element, which split rows exceed.

    Args: copy: the copy bandwidth, GB/s.   graph_us: us of a call from replays of one graph of calls.
          quick: half of the numbers of classes.
    """
    for K in QUICK if quick else CLASSES:
        width = 1 if K == 2 else K
        batch, tokens = 8, max(1, ELEMENTS // (8 * width))
        plan = solvers.bfn_discrete(schedules.BFNDiscrete(0.02 / K, K), 20)
        table, row = plan.pack(device), torch.tensor([ROW], device=device)
        seeds, index = rng.keys(0, batch=batch, device=device)
        sets: list[Set] = []
        for _ in range(2):
            state = torch.zeros(1, batch, tokens, width, device=device)
            m = torch.randn(batch, tokens, width, device=device).bfloat16()
            sets.append((state, m, torch.empty_like(m)))

        def call(state: Tensor, m: Tensor, x: Tensor, *, keys: tuple[Tensor, ...], table: Tensor, row: Tensor) -> None:
            ops.categorical_step(
                state, m, table, row, slots=1, readout="sample", seeds=keys[0], index=keys[1], model_in=x
            )

        us = graph_us([partial(call, *s, keys=(seeds, index), table=table, row=row) for s in sets])
        moved = float(plan.bytes_per_element(model_bytes=m.element_size())[ROW]) * batch * tokens * width
        rate = moved / us / 1e3
        entry = {"what": f"categorical step K={K}", "elements": batch * tokens * width, "us": us}
        yield {**entry, "gb_s": rate, "of_copy": rate / copy}
        yield from _plain_rows(K, plan, sets, graph_us)
        del sets
        torch.cuda.empty_cache()
