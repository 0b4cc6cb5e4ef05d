"""categorical_step on a GPU: bandwidth for K = 2 .. 262,144 beside the plain update, eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops, rng, schedules, solvers
from fastdiff_bench.categorical import plain_step

CLASSES = (2, 3, 27, 256, 4096, 16384, 50257, 262144)
QUICK = (2, 27, 4096, 50257)
ELEMENTS = 1 << 25
Timer = Callable[[Sequence[Callable[[], object]]], float]


def _event_us(run: Callable[[], object], repeats: int = 10) -> float:
    """us of a call in a row of calls: torch's own categorical draw need not be capturable."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats


def categorical_rows(copy: float, graph_us: Timer, *, quick: bool = False) -> list[dict[str, Any]]:
    """us and GB/s of a step with bf16 logits and input (12 bytes an element, 16 for split rows), as fastdiff_bench.gpu.

    Args: copy: the copy bandwidth, GB/s.   graph_us: us of a call from replays of one graph of calls.
          quick: half of the numbers of classes.
    """
    rows = []
    for K in QUICK if quick else CLASSES:
        width = 1 if K == 2 else K
        batch, tokens = 8, max(1, ELEMENTS // (8 * width))
        plan = solvers.bfn_discrete(schedules.BFNDiscrete(0.02 / K, K), 20)
        table, row = plan.pack("cuda"), torch.tensor([3], device="cuda")
        seeds, index = rng.keys(0, batch=batch, device="cuda")
        sets = []
        for _ in range(2):
            state = torch.zeros(1, batch, tokens, width, device="cuda")
            m = torch.randn(batch, tokens, width, device="cuda").bfloat16()
            sets.append((state, m, torch.empty_like(m)))

        def call(state: Tensor, m: Tensor, x: Tensor, *, keys: tuple[Tensor, ...], table: Tensor, row: Tensor) -> None:
            ops.categorical_step(
                state, m, table, row, slots=1, readout="sample", seeds=keys[0], index=keys[1], model_in=x
            )

        us = graph_us([partial(call, *s, keys=(seeds, index), table=table, row=row) for s in sets])
        moved = (16 if K > 16384 else 12) * batch * tokens * width
        rate = moved / us / 1e3
        entry = {"what": f"categorical step K={K}", "elements": batch * tokens * width, "us": us}
        rows.append({**entry, "gb_s": rate, "of_copy": rate / copy})
        logits = torch.randn(batch, tokens, K, device="cuda")
        theta = torch.softmax(torch.randn_like(logits), -1)
        for name, step in (("eager", plain_step), ("torch.compile", torch.compile(plain_step))):
            us = _event_us(partial(step, theta, logits, 0.02 / K))
            rows.append({"what": f"plain step K={K} {name}", "elements": logits.numel(), "us": us})
        del sets, logits, theta
        torch.cuda.empty_cache()
    return rows
