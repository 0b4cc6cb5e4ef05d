"""A small diffusers pipeline's denoising loop on a GPU: stock, compiled, accelerated, and as CUDA graphs.

    python -m fastdiff_bench.dropin_gpu [--steps 100] [--batch 1] [--device cuda] [--json FILE]

DDPM over a tiny UNet2DModel, milliseconds a loop, every way in turn within each repeat. The stock loop is the
pipeline's: unet, scheduler.step. torch.compile gets the network, then the network in CUDA graphs (reduce-overhead).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.files import write_atomic
from fastdiff_bench.environment import describe, environment

SIZE = 16


def network(device: str) -> Any:
    """A UNet of a fraction of a millisecond a call."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet.eval().to(device)


def pipeline_loop(unet: Callable[..., Any], scheduler: Any, steps: int, x: Tensor) -> Tensor:
    """The denoising loop of DDPMPipeline."""
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        m = unet(x, t, return_dict=False)[0]
        x = scheduler.step(m, t, x).prev_sample
    return x


def ways(steps: int, batch: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> a whole loop."""
    from diffusers import DDPMScheduler

    from fastdiff.integrations.diffusers import as_model

    unet, stock = network(device), DDPMScheduler()
    ours, fast = fd.accelerate(DDPMScheduler()), fd.accelerate(DDPMScheduler(), noise="philox")
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    plan, model = fd.probe(stock, steps=steps), as_model(unet)
    found: dict[str, Callable[[], Tensor]] = {
        "stock": lambda: pipeline_loop(unet, stock, steps, x),
        "accelerated": lambda: pipeline_loop(unet, ours, steps, x),
        "accelerated, philox": lambda: pipeline_loop(unet, fast, steps, x),
    }
    modes = ["eager"]
    if device == "cuda":
        compiled, graphed = torch.compile(unet), torch.compile(unet, mode="reduce-overhead")
        found["stock, torch.compile"] = lambda: pipeline_loop(compiled, stock, steps, x)
        found["stock, reduce-overhead"] = lambda: pipeline_loop(lambda *a, **k: _kept(graphed, a, k), stock, steps, x)
        modes += ["step_graph", "loop_graph"]
    for mode in modes:
        sampler = fd.Sampler(model, plan, mode=mode, device=device)
        found[f"Sampler, {mode}"] = lambda sampler=sampler: sampler(x.shape, x_T=x)  # type: ignore[misc]
    return found


def _kept(graphed: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor]:
    torch.compiler.cudagraph_mark_step_begin()
    return (graphed(*args, **kwargs)[0].clone(),)


def measure(steps: int, batch: int, device: str, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Median milliseconds of every way, and how many times faster than stock; after every repeat those so far."""
    found = ways(steps, batch, device)
    times: dict[str, list[float]] = {name: [] for name in found}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        for _ in range(2):
            for run in found.values():
                run()
        for _ in range(repeats):
            for name, run in found.items():
                wait()
                begin = time.perf_counter()
                run()
                wait()
                times[name].append((time.perf_counter() - begin) * 1e3)
            yield _rows(times, steps, batch)


def _rows(times: dict[str, list[float]], steps: int, batch: int) -> list[dict[str, Any]]:
    stock = statistics.median(times["stock"])
    return [
        {"name": n, "ms": statistics.median(v), "ratio": stock / statistics.median(v), "steps": steps, "batch": batch}
        for n, v in times.items()
    ]


def save(path: Path | None, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes the rows so far, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"environment": env, "rows": rows}, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="A small DDPM pipeline: stock, compiled, accelerated, as graphs.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs what a CPU can", file=sys.stderr)
        return 2
    env = environment()
    rows: list[dict[str, Any]] = []
    for rows in measure(args.steps, args.batch, args.device, args.repeats):
        save(args.json, env, rows)
    lines = ["| way | ms a loop | times faster than stock |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['ms']:.2f} | {r['ratio']:.2f} |" for r in rows]
    print("\n".join(lines))
    print(describe(env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
