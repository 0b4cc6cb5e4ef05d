"""Bandwidth of the step kernels on one CUDA GPU: noise, guidance, dtypes, sizes, numbers of classes.

    python -m fastdiff_bench.gpu --out DIR

Prints one table last and writes DIR/gpu.json. Anything under 50 us is timed by replaying a graph of many calls over
rotated buffers larger than the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import ops, rng, schedules, solvers
from fastdiff_bench import timing
from fastdiff_bench.energy import Meter, throttled
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.gpu_categorical import categorical_rows
from fastdiff_bench.single import save

DEVICE = "cuda"


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one call, from replays of one graph that holds all of them."""
    return statistics.median(timing.graph_us(calls))


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
    for _ in range(timing.rotation(int(moved), torch.device(DEVICE))):
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


def rows(copy: float, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every measurement, as it is made."""
    yield {"what": "copy", "elements": 1 << 26, "gb_s": copy, "of_copy": 1.0}
    chain = schedules.Betas(schedules.scaled_linear_betas(1000))
    cases = [
        ("ddim", solvers.ddim(chain, 20), False, False),
        ("ddpm", solvers.ddpm(chain, 20, clip=(-1, 1)), True, False),
        ("dpmpp_2m+guidance", solvers.dpmpp_2m(chain, 20), False, True),
    ]
    for exponent in (16, 24, 26) if quick else (16, 20, 22, 24, 26, 28):
        for name, plan, noise, guided in cases:
            for dtype in (torch.float32, torch.bfloat16):
                yield step_row(name, plan, 1 << exponent, dtype, copy, noise=noise, guided=guided)
    yield from categorical_rows(copy, graph_us, quick=quick)


def main(argv: list[str] | None = None) -> int:
    """Measures everything and writes DIR/gpu.json; the table comes last."""
    parser = argparse.ArgumentParser(description="GPU measurements of fastdiff.")
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("fastdiff_bench.gpu needs a CUDA device; none is visible", file=sys.stderr)
        return 2
    env, meter = environment(DEVICE), Meter(torch.device(DEVICE))
    copy = timing.copy_bandwidth(torch.device(DEVICE))
    found: list[dict[str, Any]] = []
    for row in rows(copy, quick=args.quick):
        found.append(row | {"throttled": throttled(meter.state())})
        save(args.out / "gpu.json", env, found)
    print("| what | elements | us | GB/s | of copy |\n|---|---|---|---|---|")
    for r in found:
        us, rate = (f"{r[k]:.2f}" if k in r else "" for k in ("us", "gb_s"))
        share = f"{100 * r['of_copy']:.0f} %" if "of_copy" in r else ""
        print(f"| {r['what']} | {r['elements']} | {us} | {rate} | {share}{' (throttled)' * r['throttled']} |")
    print(describe(env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
