"""A small diffusers pipeline's denoising loop on a GPU: stock, compiled, accelerated, and as CUDA graphs.

    python -m fastdiff_bench.dropin_gpu [--steps 100] [--batch 1] [--device cuda] [--json FILE]

DDPM over a tiny UNet2DModel, milliseconds a loop, every way in turn within each repeat; set_timesteps is not timed. The
stock loop is the pipeline's: unet, scheduler.step. torch.compile gets the network, then the network in CUDA graphs
(reduce-overhead). Before timing the ends are compared; a way that computes something else is not timed and says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff.commands.options import INTERRUPTED
from fastdiff_bench.dropin import FAR
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.single import save
from fastdiff_bench.throughput import exact_fp32
from fastdiff_bench.work import gap

SIZE = 16
STOCK, OURS = "stock", "Sampler, eager"


class Way(NamedTuple):
    """A whole loop, run(generator); what precedes it, not timed; whose draws it can repeat: stock's, or OURS' own."""

    run: Callable[[torch.Generator | None], Tensor]
    prepare: Callable[[], object] = lambda: None
    like: str = STOCK


def network(device: str) -> Any:
    """A UNet of a fraction of a millisecond a call."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet.eval().to(device)


def pipeline(unet: Callable[..., Any], scheduler: Any, steps: int, start: Tensor, like: str = STOCK) -> Way:
    """The denoising loop of DDPMPipeline."""

    def run(generator: torch.Generator | None) -> Tensor:
        x = start
        for t in scheduler.timesteps:
            m = unet(x, t, return_dict=False)[0]
            x = scheduler.step(m, t, x, generator=generator).prev_sample
        return x

    return Way(run, partial(scheduler.set_timesteps, steps, device=start.device), like)


def sampler_loop(sampler: fd.Sampler, start: Tensor, like: str = STOCK) -> Way:
    """The same plan by a Sampler: with a generator it draws as stock does, else by itself."""

    def run(generator: torch.Generator | None) -> Tensor:
        draws: dict[str, Any] = {} if generator is None else {"noise": "torch", "generator": generator}
        return sampler(start.shape, x_T=start, **draws)

    return Way(run, like=like)


def ways(steps: int, batch: int, device: str) -> dict[str, Way]:
    """Name -> a whole loop."""
    from diffusers import DDPMScheduler

    from fastdiff.integrations.diffusers import as_model

    unet, stock = network(device), DDPMScheduler()
    ours, fast = fd.accelerate(DDPMScheduler()), fd.accelerate(DDPMScheduler(), noise="philox")
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    plan, model = fd.probe(stock, steps=steps), as_model(unet)
    found = {
        STOCK: pipeline(unet, stock, steps, x),
        "accelerated": pipeline(unet, ours, steps, x),
        "accelerated, philox": pipeline(unet, fast, steps, x, OURS),
    }
    if device == "cuda":
        compiled, graphed = torch.compile(unet), torch.compile(unet, mode="reduce-overhead")
        found["stock, torch.compile"] = pipeline(compiled, stock, steps, x)
        found["stock, reduce-overhead"] = pipeline(lambda *a, **k: _kept(graphed, a, k), stock, steps, x)
    found[OURS] = sampler_loop(fd.Sampler(model, plan, mode="eager", device=device), x)
    for mode in ("step_graph", "loop_graph") if device == "cuda" else ():
        found[f"Sampler, {mode}"] = sampler_loop(fd.Sampler(model, plan, mode=mode, device=device), x, OURS)
    return found


def _kept(graphed: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor]:
    torch.compiler.cudagraph_mark_step_begin()
    return (graphed(*args, **kwargs)[0].clone(),)


def differences(found: Mapping[str, Way], device: str) -> dict[str, float]:
    """By how much each end differs: from stock's with torch's draws; with Philox's from OURS', its difference added."""

    def end(name: str, seed: int | None) -> Tensor:
        found[name].prepare()
        return found[name].run(None if seed is None else torch.Generator(device).manual_seed(seed))

    gaps: dict[str, float] = {}
    for like, seed in ((STOCK, 3), (OURS, None)):
        names = [name for name, way in found.items() if way.like == like]
        want = end(like, seed) if names else None
        for name in names:
            assert want is not None
            gaps[name] = gap(end(name, seed), want) + gaps.get(like, 0.0)
    return gaps


def measure(found: Mapping[str, Way], device: str, repeats: int) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of every way; after every repeat those so far."""
    times: dict[str, list[float]] = {name: [] for name in found}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for i in range(repeats + 1):  # the first one warms up
        for name, way in found.items():
            way.prepare()
            wait()
            begin = time.perf_counter()
            way.run(None)
            wait()
            times[name] += [(time.perf_counter() - begin) * 1e3] if i else []
        if i:
            yield times


def rows_of(times: Mapping[str, list[float]], **more: object) -> list[dict[str, Any]]:
    """Median milliseconds of every way, and how many times faster than stock."""
    stock = statistics.median(times[STOCK])
    return [
        {"name": name, "ms": statistics.median(v), "ratio": stock / statistics.median(v), **more}
        for name, v in times.items()
    ]


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
    exact_fp32()
    env = environment(args.device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        found = ways(args.steps, args.batch, args.device)
        gaps = differences(found, args.device)
        skipped = {
            name: f"its result differs by {off:.1e}: not the same computation, not timed"
            for name, off in gaps.items() if not off <= FAR  # NaN too
        }  # fmt: skip
        same = {name: way for name, way in found.items() if name not in skipped}
        stopped = False
        try:
            for times in measure(same, args.device, args.repeats):
                rows = rows_of(times, steps=args.steps, batch=args.batch)
                save(args.json, env, rows, differs=gaps, skipped=skipped)
        except KeyboardInterrupt:
            stopped = True
    done = min(map(len, times.values())) if rows else 0
    lines = [f"interrupted: {done} of {args.repeats} repeats", ""] if stopped else []
    lines += ["| way | ms a loop | times faster than stock |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['ms']:.2f} | {r['ratio']:.2f} |" for r in rows]
    lines += [f"{name}: {why}" for name, why in skipped.items()]
    print("\n".join(lines))
    print(describe(env))
    return INTERRUPTED if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
