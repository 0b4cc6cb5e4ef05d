"""Noising, loss and gradient of a batch, against randn + diffusers' add_noise + F.mse_loss + backward in the same run.

    python -m fastdiff_bench.training [--quick] [--json FILE]

Rows: stock maths eager and through torch.compile; ours as compiled loops (the default with a C++ compiler), eager, and
inside torch.compile. The model's output is a leaf, so nothing else is timed. Pairs alternate: stock with ours, the
compiled two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff as fd
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.single import restart, save, summarised

SHAPE = (256, 4, 32, 32)
ASKED = 1.8  # ours against stock, both as they come


def _variants(shape: tuple[int, ...], target: str) -> dict[str, Callable[[], Tensor]]:
    """What is timed: each returns the gradient of the mean loss with respect to the model's output."""
    import diffusers

    peer: Any = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    chain = fd.schedules.Betas(fd.schedules.linear_betas(1000))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, generator=generator)
    m = torch.randn(shape, generator=generator).requires_grad_()
    t = torch.randint(1000, shape[:1], generator=generator)
    seeds = torch.arange(shape[0])
    table: Tensor = peer.alphas_cumprod

    def done() -> Tensor:
        assert m.grad is not None
        grad, m.grad = m.grad, None
        return grad

    def stock() -> Tensor:
        noise = torch.randn(shape)
        peer.add_noise(x0, noise, t)
        goal = noise if target == "eps" else peer.get_velocity(x0, noise, t)
        F.mse_loss(m, goal).backward()
        return done()

    # two graphs each: between noising and loss there is the network
    def noising(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        a, s = (c.sqrt().view(-1, *[1] * (x0.dim() - 1)) for c in (table[t], 1 - table[t]))
        return a * x0 + s * noise, noise if target == "eps" else a * noise - s * x0

    compiled_noising, compiled_mse = torch.compile(noising, dynamic=False), torch.compile(F.mse_loss, dynamic=False)

    def stock_compiled() -> Tensor:
        compiled_mse(m, compiled_noising(x0, t)[1]).backward()
        return done()

    def ours() -> Tensor:
        fd.ops.add_noise(x0, t, chain, seeds=seeds)
        fd.ops.denoising_loss(m, x0, t, chain, seeds, target=target).mean().backward()
        return done()

    def eager() -> Tensor:
        with fd.ops.cpu_compiler(False):
            return ours()

    def add(x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        x_t = fd.ops.add_noise(x0, t, chain, seeds=seeds)
        assert isinstance(x_t, Tensor)
        return x_t

    def loss(m: Tensor, x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        return fd.ops.denoising_loss(m, x0, t, chain, seeds, target=target).mean()

    compiled_add, compiled_loss = (torch.compile(f, dynamic=False, fullgraph=True) for f in (add, loss))

    def ours_in_compile() -> Tensor:
        compiled_add(x0, t, seeds)
        compiled_loss(m, x0, t, seeds).backward()
        return done()

    return {
        "stock": stock, "stock_compiled": stock_compiled, "ours": ours, "ours_eager": eager,
        "ours_in_compile": ours_in_compile,
    }  # fmt: skip


def measure(target: str, repeats: int, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    """Medians in ms and ratios to the stock eager and compiled runs."""
    variants = _variants(shape, target)
    grads = {name: run() for name, run in variants.items()}
    for name in ("ours_eager", "ours_in_compile"):
        gap = float((grads[name] - grads["ours"]).abs().max() / grads["ours"].abs().max())
        if not gap <= 1e-5:  # NaN too
            raise RuntimeError(f"{name} differs from the compiled loops by {gap:.1e}")
    times: dict[str, list[float]] = {name: [] for name in variants}
    # stock and ours side by side: a variant of 30 ms in between leaves other contents in the cache
    for group in (("stock", "ours"), ("stock_compiled", "ours_in_compile"), ("ours_eager",)):
        for _ in range(repeats):
            for name in group:
                begin = time.perf_counter()
                variants[name]()
                times[name].append((time.perf_counter() - begin) * 1e3)
    row: dict[str, Any] = {"target": target, "shape": list(shape), "repeats": repeats, "asked": ASKED}
    for name, values in times.items():
        row |= summarised(f"{name}_ms", values)
    for name in ("ours", "ours_eager", "ours_in_compile"):
        for peer in ("stock", "stock_compiled"):
            ratios = (a / b for a, b in zip(times[peer], times[name], strict=True))
            row[f"{name}_ratio_{peer}"] = statistics.median(ratios)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| target | variant | ms | times faster than stock | than compiled stock |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        for name in ("stock", "stock_compiled", "ours", "ours_eager", "ours_in_compile"):
            ratios = [r.get(f"{name}_ratio_{peer}") for peer in ("stock", "stock_compiled")]
            cells = ["-" if v is None else f"{v:.2f}" for v in ratios]
            missed = f" (asked {r['asked']}: missed)" if name == "ours" and r["ours_ratio_stock"] < r["asked"] else ""
            lines.append(f"| {r['target']} | {name} | {r[f'{name}_ms']:.2f} | {cells[0]}{missed} | {cells[1]} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="Noising, loss and gradient, against diffusers and torch.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    restart("fastdiff_bench.training", argv)
    env = environment("cpu")
    rows = [measure(target, 9 if args.quick else 41) for target in ("eps", "v")]
    print(table(rows))
    print(describe(env))
    save(args.json, env, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
