"""Measurements on one CUDA GPU: bandwidth of the step, launches and microseconds of null-model loops, a small policy.

    python -m fastdiff_bench.gpu --out DIR

Prints one table last and writes DIR/gpu.json. Anything under 50 us is timed by replaying a graph of many calls over
rotated buffers larger than the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import ops, rng, schedules, solvers
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.gpu_categorical import categorical_rows

DEVICE = "cuda"
L2_TIMES = 4
REPEATS = 7


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one call, from replays of one graph that holds all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def _buffers(bytes_each: int) -> int:
    """How many rotated sets make a working set of several caches, at least 2."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(200, L2_TIMES * cache // max(1, bytes_each) + 1))


def copy_bandwidth() -> float:
    """Device-to-device copy of 1 GiB, GB/s read + written."""
    a = torch.randn(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / graph_us([lambda: b.copy_(a)] * 5) / 1e3


def step_row(
    name: str, plan: fd.Plan, n: int, dtype: torch.dtype, copy: float, *, noise: bool, guided: bool
) -> dict[str, Any]:
    """One affine_step on a state of n elements: us, GB/s of the bytes it must move, share of the copy bandwidth."""
    k = plan.nfe // 2
    table, row = plan.pack(DEVICE), torch.full((1,), k, dtype=torch.int32, device=DEVICE)
    seeds, index = rng.keys(0, batch=1, device=DEVICE)
    model_bytes = torch.finfo(dtype).bits // 8
    moved = n * float(plan.bytes_per_element(model_bytes=model_bytes, guided=guided)[k])
    w = torch.full((1, 1), 2.0, device=DEVICE) if guided else None
    sets = []
    for _ in range(_buffers(int(moved))):
        state = torch.randn(plan.allocate().physical, 1, n, device=DEVICE)
        m, u = (torch.randn(1, n, device=DEVICE).to(dtype) for _ in range(2))
        copy_out = torch.empty(1, n, device=DEVICE, dtype=dtype) if dtype != torch.float32 else None
        sets.append((state, m, u if guided else None, copy_out))
    if dtype != torch.float32:
        moved += n * model_bytes

    def call(buffers: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
        state, m, u, copy_out = buffers
        ops.affine_step(
            state, m, table, row, slots=plan.slots, uncond=u, guidance=w, model_in=copy_out,
            seeds=seeds if noise else None, index=index if noise else None,
        )  # fmt: skip

    repeat = 1 if moved > 1e8 else max(1, 40 // len(sets))
    us = graph_us([partial(call, s) for s in sets] * repeat)
    rate = moved / us / 1e3
    return {"what": f"step {name} {str(dtype)[6:]}", "elements": n, "us": us, "gb_s": rate, "of_copy": rate / copy}


def _wall_us(run: Callable[[], object], rows: int) -> float:
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / rows * 1e6)
    return statistics.median(times)


def null_model_rows() -> list[dict[str, Any]]:
    """us a step of whole loops with a model that returns a fixed tensor, per mode."""
    chain, shape = schedules.Betas(schedules.scaled_linear_betas(1000)), (1, 4, 64, 64)
    out = torch.randn(shape, device=DEVICE)
    rows = []
    for name in ("ddim", "dpmpp_2m", "ddpm"):
        plan = getattr(solvers, name)(chain, 100)
        for mode in ("eager", "step_graph", "loop_graph"):
            sampler = fd.Sampler(lambda x, t: out, plan, mode=mode, device=DEVICE)
            us = _wall_us(partial(sampler, shape), 100)
            rows.append({"what": f"null model {name} {mode}", "elements": out.numel(), "us": us})
    return rows


class Policy(nn.Module):
    """A small conditional 1-D conv net over action chunks [B, horizon, action]."""

    def __init__(self, action: int = 7, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.inp = nn.Conv1d(action, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.body = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))
        self.out = nn.Conv1d(width, action, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inp(x.transpose(1, 2)) + self.time(t.float()[:, None] / 1000)[:, :, None]
        for layer in self.body:
            h = h + torch.nn.functional.silu(layer(h))
        return self.out(h).transpose(1, 2)


def policy_rows() -> list[dict[str, Any]]:
    """100 DDPM steps of a policy-size model: diffusers eager, then every fastdiff mode."""
    shape, steps = (1, 16, 7), 100
    model = Policy().to(DEVICE).eval().requires_grad_(False)
    plan = solvers.ddpm(schedules.Betas(schedules.cosine_betas(100)), steps, clip=(-1.0, 1.0))
    rows = []
    try:
        import diffusers

        scheduler: Any = diffusers.DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
        scheduler.set_timesteps(steps)

        def stock() -> Tensor:
            x = torch.randn(shape, device=DEVICE)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.to(DEVICE).expand(1)), t, x).prev_sample
            return x

        rows.append({"what": "policy, 100 DDPM steps, diffusers eager", "elements": 112, "us": _wall_us(stock, steps)})
    except ImportError:
        print("diffusers is not installed: no stock row", file=sys.stderr)
    for mode in ("eager", "step_graph", "loop_graph"):
        sampler = fd.Sampler(model, plan, mode=mode, device=DEVICE)
        us = _wall_us(partial(sampler, shape), steps)
        rows.append({"what": f"policy, 100 DDPM steps, fastdiff {mode}", "elements": 112, "us": us})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measures everything and writes DIR/gpu.json; the table comes last."""
    parser = argparse.ArgumentParser(description="GPU measurements of fastdiff.")
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("fastdiff_bench.gpu needs a CUDA device; none is visible", file=sys.stderr)
        return 2
    env = environment()
    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = [{"what": "copy 1 GiB", "elements": 1 << 28, "gb_s": copy, "of_copy": 1.0}]
    chain = schedules.Betas(schedules.scaled_linear_betas(1000))
    cases = [
        ("ddim", solvers.ddim(chain, 20), False, False),
        ("ddpm", solvers.ddpm(chain, 20, clip=(-1, 1)), True, False),
        ("dpmpp_2m+guidance", solvers.dpmpp_2m(chain, 20), False, True),
    ]
    for exponent in (16, 24, 26) if args.quick else (16, 20, 22, 24, 26, 28):
        for name, plan, noise, guided in cases:
            for dtype in (torch.float32, torch.bfloat16):
                rows.append(step_row(name, plan, 1 << exponent, dtype, copy, noise=noise, guided=guided))
    rows += null_model_rows() + policy_rows() + categorical_rows(copy, graph_us)
    env["after"] = environment().get("throttle_reasons")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
    print("| what | elements | us | GB/s | of copy |\n|---|---|---|---|---|")
    for r in rows:
        us, rate = (f"{r[k]:.2f}" if k in r else "" for k in ("us", "gb_s"))
        print(f"| {r['what']} | {r['elements']} | {us} | {rate} | {100 * r['of_copy']:.0f} % |" if "of_copy" in r
              else f"| {r['what']} | {r['elements']} | {us} | {rate} | |")  # fmt: skip
    print(describe(env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
