"""What an accelerated scheduler's step costs on the CPU, against the stock one in the same run.

    python -m fastdiff_bench.dropin [--quick] [--only NAME ...] [--json FILE]

Every row interleaves stock and accelerated loops of 50 steps at (1, 4, 64, 64) with a fixed model output, the way a
pipeline calls them (return_dict=False). Before timing, both loops run once from one start with one generator and their
results are compared (of Philox noise: those of the same rows on stock's noise). set_timesteps is timed to the end of
the first step: first in the process, and again.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff_bench.environment import describe, environment
from fastdiff_bench.single import restart, save, summarised

SHAPE, STEPS = (1, 4, 64, 64), 50
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FAR = 2e-4  # 50 steps, x0 clipped at low alpha: a sanity check, the tests hold the tight bounds


class Case(NamedTuple):
    """A scheduler, its configuration, step's arguments, the ratio asked for (None: not slower), accelerate's noise."""

    name: str
    scheduler: str
    config: dict[str, Any] = {}
    step: dict[str, Any] = {}
    target: float | None = None
    noise: str = "torch"


TREE = {**BETAS, "noise_sampler_seed": 0}
CASES = (
    Case("DDPM", "DDPMScheduler", BETAS, {}, 2.0),
    Case("DDIM", "DDIMScheduler", {**BETAS, "clip_sample": False}, {}, 2.5),
    Case("DDIM, clipped", "DDIMScheduler", BETAS, {}, 2.5),
    Case("DPM++ 2M", "DPMSolverMultistepScheduler", BETAS, {}, 4.0),
    Case("UniPC", "UniPCMultistepScheduler", BETAS, {}, 8.0),
    Case("Euler", "EulerDiscreteScheduler", BETAS, {}, 1.5),
    Case("Euler, churn", "EulerDiscreteScheduler", BETAS, {"s_churn": 4.0}),
    Case("Euler ancestral", "EulerAncestralDiscreteScheduler", BETAS),
    Case("Heun", "HeunDiscreteScheduler", BETAS),
    Case("DPM++ 3M", "DPMSolverMultistepScheduler", {**BETAS, "solver_order": 3}),
    Case("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
    Case("DPM++ 2S", "DPMSolverSinglestepScheduler", BETAS),
    Case("DEIS", "DEISMultistepScheduler", BETAS),
    Case("PNDM", "PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
    Case("IPNDM", "IPNDMScheduler"),
    Case("KDPM2", "KDPM2DiscreteScheduler", BETAS),
    Case("KDPM2 ancestral", "KDPM2AncestralDiscreteScheduler", BETAS),
    Case("LMS", "LMSDiscreteScheduler", BETAS),
    Case("SA-Solver", "SASolverScheduler", BETAS),
    Case("LCM", "LCMScheduler"),
    Case("TCD", "TCDScheduler"),
    Case("flow Euler", "FlowMatchEulerDiscreteScheduler"),
    Case("flow Heun", "FlowMatchHeunDiscreteScheduler"),
    Case("flow LCM", "FlowMatchLCMScheduler"),
    Case("EDM Euler", "EDMEulerScheduler"),
    Case("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler"),
    Case("DDIM inverse", "DDIMInverseScheduler", BETAS),
    Case("DPM++ inverse", "DPMSolverMultistepInverseScheduler", BETAS),
    Case("CogVideoX DDIM", "CogVideoXDDIMScheduler"),
    Case("CogVideoX DPM", "CogVideoXDPMScheduler"),
    Case("CogVideoX DPM, Philox noise", "CogVideoXDPMScheduler", noise="philox"),
    Case("DPM++ SDE", "DPMSolverSDEScheduler", TREE),
    Case("DPM++ SDE, Philox noise", "DPMSolverSDEScheduler", TREE, noise="philox"),
    Case("cosine DPM++ 2M SDE", "CosineDPMSolverMultistepScheduler"),
    Case("cosine DPM++ 2M SDE, Philox noise", "CosineDPMSolverMultistepScheduler", noise="philox"),
)


def _prepare(scheduler: Any) -> None:
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # as pipelines do
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True  # no warning; the scaling itself is not part of step


def _loop(scheduler: Any, out: Tensor, x: Tensor, step: dict[str, Any], seed: int | None = None) -> Tensor:
    if seed is not None and "generator" in inspect.signature(scheduler.step).parameters:
        step = {**step, "generator": torch.Generator().manual_seed(seed)}
    call = _stepping(scheduler)
    for t in scheduler.timesteps:
        x = call(out, t, x, return_dict=False, **step)[0]
    return x


def _stepping(scheduler: Any) -> Callable[..., Any]:
    """step(m, t, x); of CogVideoX with the last x0 and the time before, as its pipeline hands them on."""
    if "timestep_back" not in inspect.signature(scheduler.step).parameters:
        return scheduler.step  # type: ignore[no-any-return]
    past: tuple[Any, Any] = (None, None)

    def call(m: Tensor, t: Tensor, x: Tensor, **options: Any) -> Any:
        nonlocal past
        made = scheduler.step(m, past[0], t, past[1], x, **options)
        past = made[1], t
        return made

    return call


def _us(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) / calls * 1e6


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians of us a step, stock and accelerated, their ratio, and what set_timesteps and a first step cost."""
    import diffusers

    stock = getattr(diffusers, case.scheduler)(**case.config)
    ours = fd.accelerate(stock, noise=case.noise)
    out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * float(getattr(stock, "init_noise_sigma", 1.0))
    begin = time.perf_counter()
    _prepare(ours)
    _stepping(ours)(out, ours.timesteps[0], x, **case.step)
    first = time.perf_counter() - begin
    again = []
    for _ in range(5):
        begin = time.perf_counter()
        _prepare(ours)
        _stepping(ours)(out, ours.timesteps[0], x, **case.step)
        again.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    _prepare(stock)
    plain = time.perf_counter() - begin
    results = []
    for s in (stock, ours if case.noise == "torch" else fd.accelerate(stock)):
        _prepare(s)
        results.append(_loop(s, out, x, case.step, seed=5))
    gap = float((results[1] - results[0]).abs().max() / results[0].abs().max())
    if not gap <= FAR or ours._fastdiff.stock:
        raise RuntimeError(f"{case.name}: {ours._fastdiff.stock or f'differs from stock by {gap:.1e}'}")
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(repeats):
        for name, s in (("stock", stock), ("ours", ours)):
            _prepare(s)
            if s is ours:  # the plan is found before the clock starts, as it is in a pipeline's second picture
                _stepping(s)(out, s.timesteps[0], x, **case.step)
                _prepare(s)
            times[name].append(_us(lambda s=s: _loop(s, out, x, case.step), len(s.timesteps)))  # type: ignore[misc]
    row: dict[str, Any] = {"name": case.name, "scheduler": case.scheduler, "target": case.target, "repeats": repeats}
    for name, values in times.items():
        row |= summarised(f"{name}_us", values)
    row["ratio"] = statistics.median(a / b for a, b in zip(times["stock"], times["ours"], strict=True))
    row |= {"first_ms": first * 1e3, "again_ms": statistics.median(again) * 1e3, "stock_set_ms": plain * 1e3}
    return row | {"gap": gap}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| scheduler | stock us | accelerated us | times faster | asked | first set_timesteps + step ms | again ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        least = r["target"] or 0.9
        verdict = " (missed)" if r["ratio"] < least else ""
        lines.append(
            f"| {r['name']} | {r['stock_us']:.1f} | {r['ours_us']:.1f} | {r['ratio']:.2f}{verdict} | "
            f"{r['target'] or 'not slower'} | {r['first_ms']:.0f} | {r['again_ms']:.2f} "
            f"(stock's own set_timesteps {r['stock_set_ms']:.2f}) |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="Accelerated diffusers schedulers against stock ones, CPU.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    restart("fastdiff_bench.dropin", argv)
    warnings.simplefilter("ignore", FutureWarning)
    unknown = set(args.only or ()) - {c.name for c in CASES}
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; valid: {', '.join(c.name for c in CASES)}")
    import diffusers

    with torch.no_grad():
        warm = fd.accelerate(diffusers.EulerDiscreteScheduler(num_train_timesteps=10))
        warm.set_timesteps(2)  # imports and the first probe of a process are not a schedule's cost
        warm.step(torch.zeros(1, 1, 2, 2), warm.timesteps[0], torch.zeros(1, 1, 2, 2))
        rows = []
        for case in CASES:
            if args.only and case.name not in args.only:
                continue
            rows.append(measure(case, 9 if args.quick else 41))
            print(f"{case.name}: {rows[-1]['ratio']:.2f}x", file=sys.stderr, flush=True)
    env = environment("cpu")
    print(table(rows))
    print(describe(env))
    save(args.json, env, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
