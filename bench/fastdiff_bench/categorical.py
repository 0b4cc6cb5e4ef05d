"""One step on classes on the CPU against the plain eager update, in the same run.

    python -m fastdiff_bench.categorical [--quick] [--json FILE]

Plain: softmax, Categorical sample, one_hot, normal, exp, product with theta, normalise, 2 theta - 1, each a call, with
torch's generator; the same function through torch.compile beside it. fastdiff: the C++ loop (what sampling uses by
default) and eager chunks (what it uses without a compiler), with Philox noise. Medians of interleaved calls; the two
paths are compared first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops, rng, schedules, solvers
from fastdiff.categorical_cpu import CompiledStep
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.single import restart, save, summarised

# classes, samples, tokens of a sample, times faster that are asked for
CASES = ((2, 256, 2048, None), (27, 256, 256, 3.0), (256, 16, 512, None), (4096, 4, 128, 3.0), (262144, 1, 4, None))


def plain_step(theta: Tensor, logits: Tensor, accuracy: float) -> tuple[Tensor, Tensor]:
    """The update as Graves et al. 2023 write it (algorithm 9), an operation a line."""
    K = logits.shape[-1]
    p = torch.softmax(logits, -1)
    k = torch.distributions.Categorical(probs=p, validate_args=False).sample()
    e = torch.nn.functional.one_hot(k, K)
    y = accuracy * (K * e - 1) + (accuracy * K) ** 0.5 * torch.randn_like(theta)
    theta = torch.exp(y) * theta
    theta = theta / theta.sum(-1, keepdim=True)
    return theta, 2 * theta - 1


def _us(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def measure(K: int, batch: int, tokens: int, asked: float | None, *, repeats: int) -> dict[str, Any]:
    """Medians of us a step."""
    width, g = (1 if K == 2 else K), torch.Generator().manual_seed(0)
    accuracy = 0.02 / K  # small enough for the plain update not to overflow
    plan = solvers.bfn_discrete(schedules.BFNDiscrete(accuracy, K), 20)
    table, row = plan.pack(), torch.tensor([3])
    seeds, index = rng.keys(0, batch=batch)
    m = torch.randn(batch, tokens, width, generator=g)
    state, x = torch.zeros(1, batch, tokens, width), torch.empty(batch, tokens, width)
    classes = torch.empty(batch, tokens, dtype=torch.int64)
    step = CompiledStep(state, x, classes, table, 1)

    def compiled() -> None:
        if not step("sample", row, m, seeds=seeds, index=index):
            raise RuntimeError("the CPU compiler is not usable")

    def eager() -> None:
        with ops.cpu_compiler(False):
            ops.categorical_step(
                state, m, table, row, slots=1, readout="sample", seeds=seeds, index=index, model_in=x, classes=classes
            )

    compiled()
    first, k = state.clone(), classes.clone()
    state.zero_()
    eager()
    if not torch.equal(k, classes) or float((state - first).abs().max()) > 1e-5 * float(first.abs().max()):
        raise RuntimeError(f"K = {K}: the compiled step differs from the eager one")
    logits = torch.randn(batch, tokens, K, generator=g)
    theta = torch.softmax(torch.randn(batch, tokens, K, generator=g), -1)
    fused = torch.compile(plain_step)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_step(theta, logits, accuracy), "plain_compiled": lambda: fused(theta, logits, accuracy),
        "compiled": compiled, "eager": eager,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(_us(run))
    result: dict[str, Any] = {"K": K, "batch": batch, "tokens": tokens, "repeats": repeats, "asked": asked}
    for name, values in times.items():
        result |= summarised(f"{name}_us", values)
    for name in ("plain_compiled", "compiled", "eager"):
        result[f"{name}_ratio"] = result["plain_us"] / result[f"{name}_us"]
    return result


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| K | tokens | plain us | plain compiled us | fastdiff us | times faster | asked | eager us | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        missed = " (missed)" if r["asked"] and r["compiled_ratio"] < r["asked"] else ""
        lines.append(
            f"| {r['K']} | {r['batch']} x {r['tokens']} | {r['plain_us']:.0f} | {r['plain_compiled_us']:.0f} | "
            f"{r['compiled_us']:.0f} | {r['compiled_ratio']:.1f}{missed} | {r['asked'] or '-'} | {r['eager_us']:.0f} | "
            f"{r['eager_ratio']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="A step on classes against the plain eager update, on the CPU.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    restart("fastdiff_bench.categorical", argv)
    env = environment("cpu")
    rows: list[dict[str, Any]] = []
    for K, batch, tokens, asked in CASES:
        rows.append(measure(K, batch, tokens, asked, repeats=5 if args.quick else 21))
        print(f"K = {K}: {rows[-1]['compiled_ratio']:.1f}x", file=sys.stderr, flush=True)
    print(table_of(rows))
    print(describe(env))
    save(args.json, env, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
