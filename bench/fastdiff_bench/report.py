"""README's results, written from the newest stored measurements: never typed by hand.

    python -m fastdiff_bench.report [--check]

Reads bench/results/<machine>/<date>/{steps,codegen,demo,gpu}.json and fills the text between the README's markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdiff_bench import steps
from fastdiff_bench.environment import describe

__all__ = ["main", "render"]

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# instructions per element asked for on sm_90: case prefix -> budget
ASKED = {
    "affine_step/r1/plain": 20,
    "affine_step/r1/noise": 56,
    "affine_step/r2/noise+guidance": 75,
    "affine_step/r4/noise+guidance": 100,
}


def newest(kind: str, root: Path = ROOT) -> tuple[Path, dict[str, Any]] | None:
    """The newest stored file of a kind, by its date folder."""
    files = sorted((root / "bench" / "results").glob(f"*/*/{kind}.json"), key=lambda p: (p.parent.name, p.parts))
    return (files[-1], json.loads(files[-1].read_text())) if files else None


def _codegen(data: dict[str, Any]) -> list[str]:
    lines = [
        "Instructions per element of the step kernel as shipped, fp32 / bf16 model (sm_90, Triton "
        f"{data['triton']}; a spill, shared memory, a barrier or an fp32 access under 16 bytes counts as missed):",
        "",
        "| row | asked | measured | registers |",
        "|---|---|---|---|",
    ]
    reports = {r["case"]: r for r in data["reports"] if r["target"] == "sm_90"}
    for prefix, asked in ASKED.items():
        pair = [reports[f"{prefix}/{dtype}"] for dtype in ("fp32", "bf16")]
        dirty = any(r["spills"] or r["shared"] or r["barriers"] or r["narrow_accesses"] for r in pair)
        counts = " / ".join(f"{r['per_element']:.0f}" for r in pair)
        worst = max(r["per_element"] for r in pair)
        verdict = "" if worst <= asked and not dirty else " (missed)"
        slots, what = prefix.split("/")[1:]
        label = f"r = {slots[1:]}, {what.replace('+', ' and ').replace('plain', 'no noise')}"
        lines.append(f"| {label} | {asked} | {counts}{verdict} | {max(r['registers'] for r in pair)} |")
    return lines


def _demo(data: dict[str, Any]) -> list[str]:
    spiral = [r for r in data["rows"] if r["part"] == "spiral"]
    digits = [r for r in data["rows"] if r["part"] == "digits"]
    stochastic = ("ddpm", "euler_maruyama")
    ode = max(r["metrics"]["distance"] for r in spiral if r["solver"] not in stochastic)
    sde = max(r["metrics"]["distance"] for r in spiral if r["solver"] in stochastic)
    cover = max(r["metrics"]["coverage"] for r in spiral)
    confidence = min(r["metrics"]["confidence"] for r in digits)
    rare = min(r["metrics"]["rarest_class"] for r in digits)
    common = max(r["metrics"]["commonest_class"] for r in digits)
    missed = f" Missed: {'; '.join(data['missed'])}." if data["missed"] else ""
    return [
        f"Quality (`make demo`, {data['seconds']:.0f} s; the worst of all solvers, in brackets the target): spiral, "
        f"mean distance {ode:.4f} (<= 0.012) with ODE solvers at 40 evaluations, {sde:.4f} (<= 0.02) with "
        f"stochastic ones at 1000, curve to its nearest sample {cover:.4f} (<= 0.015); digits, a classifier's mean "
        f"confidence {confidence:.3f} (>= 0.85 of its value on real ones), class shares {100 * rare:.1f} to "
        f"{100 * common:.1f} % (4 to 18 %).{missed}"
    ]


def render(root: Path = ROOT) -> str:
    """The text between the README's result markers."""
    blocks: list[str] = []
    measured = newest("steps", root)
    if measured:
        data = measured[1]
        blocks += ["One step beyond the model, fp32, 50 steps, median us, theirs and ours in the same run:", ""]
        blocks += [steps.table(data["rows"]), "", f"{describe(data['environment'])}.", ""]
    compiled = newest("codegen", root)
    if compiled:
        blocks += [*_codegen(compiled[1]), ""]
    demo = newest("demo", root)
    if demo:
        blocks += [*_demo(demo[1]), ""]
    gpu = newest("gpu", root)
    blocks.append(
        f"GPU: {describe(gpu[1]['environment'])}; table in {gpu[0].parent.relative_to(root)}."
        if gpu
        else "GPU: not measured yet; `bench/gpu.sh` runs the GPU tests and measurements on a machine that has one."
    )
    return "\n".join(blocks)


def main(argv: list[str] | None = None) -> int:
    """Rewrites the README's results, or says whether they are current (--check)."""
    parser = argparse.ArgumentParser(description="Fill the README's results from stored measurements.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is not what would be written")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    new = f"{head}{BEGIN}\n{render()}\n{END}{rest.split(END, 1)[1]}"
    if args.check:
        if new != text:
            print("README.md: results are not current; run python -m fastdiff_bench.report", file=sys.stderr)
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
