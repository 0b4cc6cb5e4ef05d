"""What one step costs beyond the model, against diffusers and k-diffusion in the same run.

    python -m fastdiff_bench.steps [--quick] [--json FILE]

The model returns a fixed tensor. Every row interleaves stock and fastdiff runs of 50 steps; medians are compared, and
the outputs of one run from the same start (and, for deterministic solvers, the whole loop) are compared before timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import schedules, solvers
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.peers import k_diffusion_sampling
from fastdiff_bench.timing import MALLOC

STEPS = 50
SHAPES = ((1, 4, 64, 64), (16, 4, 128, 128))
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Case(NamedTuple):
    """A stock sampler and the plan that does the same."""

    solver: str
    peer: str  # a diffusers scheduler, or k-diffusion's function
    config: dict[str, Any]
    options: dict[str, Any]
    target: tuple[float, float | None]  # asked for at the two shapes


CASES = (
    Case("ddim", "DDIMScheduler", {"clip_sample": False}, {}, (3, 2)),
    Case("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}, (5, 4)),
    Case("ddpm", "DDPMScheduler", {}, {"clip": (-1.0, 1.0)}, (3, 2)),
    Case("unipc", "UniPCMultistepScheduler", {}, {"order": 2}, (10, None)),
    Case("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, (4, None)),
    Case("deis", "DEISMultistepScheduler", {}, {"order": 2, "final": "min"}, (8, None)),
    Case("euler", "sample_euler", {}, {}, (4, None)),
    Case("dpmpp_2m", "sample_dpmpp_2m", {}, {}, (2.5, None)),
)


def _us(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) / STEPS * 1e6


def _diffusers(case: Case, out: Tensor) -> tuple[fd.Plan, Callable[[], object], Callable[[Tensor], Tensor]]:
    """The plan, what to do before a run (not timed), and the stock run from a start."""
    import diffusers

    chain = schedules.Betas(schedules.scaled_linear_betas(1000))
    plan = getattr(solvers, case.solver)(chain, STEPS, spacing="trailing", **case.options)
    scheduler = getattr(diffusers, case.peer)(timestep_spacing="trailing", **BETAS, **case.config)

    def stock(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return plan, partial(scheduler.set_timesteps, STEPS), stock


def _k_diffusion(case: Case, out: Tensor) -> tuple[fd.Plan, Callable[[], object], Callable[[Tensor], Tensor]]:
    """As _diffusers: the same rho ramp of sigmas, a denoiser as the model."""
    sampling = k_diffusion_sampling()
    if sampling is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion")
    edm = schedules.EDM(0.03, 14.6)
    plan = getattr(solvers, case.solver)(edm, STEPS, prediction="x0", **case.options)
    sigmas = sampling.get_sigmas_karras(STEPS, 0.03, 14.6)

    def stock(x: Tensor) -> Tensor:
        return getattr(sampling, case.peer)(lambda x, sigma: out, x, sigmas, disable=True)

    return plan, lambda: None, stock


def measure(case: Case, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Medians of us per step: stock, fastdiff auto, fastdiff eager (Philox noise), and the ratios."""
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    make = _k_diffusion if case.peer.startswith("sample_") else _diffusers
    plan, prepare, stock = make(case, out)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * plan.init_scale
    samplers = {mode: fd.Sampler(lambda x, t: out, plan, mode=mode) for mode in ("auto", "eager")}
    for sampler in samplers.values():
        sampler(shape, x_T=x_T)
    if not plan.stochastic:
        prepare()
        want = stock(x_T)
        for mode, sampler in samplers.items():
            gap = float((sampler(shape, x_T=x_T) - want).abs().max() / want.abs().max())
            if not gap <= 1e-5:  # NaN too
                raise RuntimeError(f"{case.solver} {mode} differs from {case.peer} by {gap:.1e}")
    times: dict[str, list[float]] = {"stock": [], "auto": [], "eager": []}
    with torch.no_grad():
        for _ in range(repeats):
            prepare()
            times["stock"].append(_us(partial(stock, x_T)))
            for mode, sampler in samplers.items():
                times[mode].append(_us(partial(sampler, shape, x_T=x_T)))
    row: dict[str, Any] = {"solver": case.solver, "peer": case.peer, "shape": list(shape), "repeats": repeats}
    for name, values in times.items():
        row[f"{name}_us"] = statistics.median(values)
        row[f"{name}_us_p10"], row[f"{name}_us_p90"] = (sorted(values)[int(q * (len(values) - 1))] for q in (0.1, 0.9))
    for mode in samplers:
        row[f"{mode}_ratio"] = statistics.median(a / b for a, b in zip(times["stock"], times[mode], strict=True))
    row["target"] = case.target[SHAPES.index(shape)]
    row["auto_step"] = "compiled" if next(iter(samplers["auto"]._runs.values())).run.compiled else "eager"
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| solver | against | shape | theirs us | ours us (auto) | times faster | asked | eager us | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        verdict = " (missed)" if r["target"] is not None and r["auto_ratio"] < r["target"] else ""
        peer = f"k-diffusion {r['peer']}" if r["peer"].startswith("sample_") else f"diffusers {r['peer']}"
        lines.append(
            f"| {r['solver']} | {peer} | {tuple(r['shape'])} | {r['stock_us']:.0f} | {r['auto_us']:.0f} | "
            f"{r['auto_ratio']:.1f}{verdict} | {r['target'] or '-'} | {r['eager_us']:.0f} | {r['eager_ratio']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="Step cost beyond the model, against diffusers and k-diffusion.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if any(os.environ.get(k) != v for k, v in MALLOC.items()):  # glibc reads them at start: page faults off the clock
        os.execve(
            sys.executable, [sys.executable, "-m", "fastdiff_bench.steps", *(argv or sys.argv[1:])], os.environ | MALLOC
        )
    env = environment()
    rows = []
    for shape in SHAPES:
        for case in CASES:
            repeats = (7 if args.quick else 41) if shape[0] == 1 else (3 if args.quick else 11)
            try:
                rows.append(measure(case, shape, repeats))
            except ModuleNotFoundError as error:
                print(f"{case.solver} against {case.peer}: skipped, {error}", file=sys.stderr)
                continue
            print(
                f"{case.solver} against {case.peer} {shape}: {rows[-1]['auto_ratio']:.2f}x", file=sys.stderr, flush=True
            )
    print(table(rows))
    print(describe(env))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
