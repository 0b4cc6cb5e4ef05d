"""README's results, written from the newest stored measurements: never typed by hand.

    python -m fastdiff_bench.report [--check]

Reads bench/results/<machine>/<date>/{throughput,steps,codegen,demo,gpu,loops}.json and fills the text between the
README's markers; writes every row of what was measured into a README.md beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdiff_bench import steps, tables
from fastdiff_bench.cases import QUICK, SHAPES, TEXT
from fastdiff_bench.compare import comparison_text
from fastdiff_bench.environment import describe

__all__ = ["main", "render"]

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LARGE = (1 << 24) + 1  # elements; the page beside has the smaller ones
PLAIN = ("eager", "torch.compile")
PAGED = ("throughput.json", "roofline*.json")  # what the page beside results shows
# instructions per element asked for on sm_90: case prefix -> budget
ASKED = {
    "affine_step/r1/plain": 20,
    "affine_step/r1/noise": 56,
    "affine_step/r2/noise+guidance": 75,
    "affine_step/r4/noise+guidance": 100,
}


def newest(kind: str, root: Path = ROOT, *, gpu: bool | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest stored file of a kind, by its date folder; gpu: of a machine with one, or without."""
    files = sorted((root / "bench" / "results").glob(f"*/*/{kind}.json"), key=lambda p: (p.parent.name, p.parts))
    for path in reversed(files):
        data = json.loads(path.read_text())
        if gpu is None or ("gpu" in data["environment"]) == gpu:
            return path, data
    return None


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


def _measured_on(data: dict[str, Any]) -> str:
    copy = data["method"]["copy_gb_s"]
    return f"{describe(data['environment'])}; copy {copy:.1f} GB/s"


def _throughput(path: Path, data: dict[str, Any], root: Path) -> list[str]:
    """The quick rows at one shape; the page beside the result has all."""
    few = {(schedule, solver) for schedule, names in QUICK.items() for solver in names}
    sizes = (list(SHAPES["latent"]), list(TEXT))
    rows = [
        r for r in data["rows"]
        if (r["schedule"], r["solver"]) in few and (r["shape"] == sizes[0] or r["shape"][:2] == sizes[1])
    ]  # fmt: skip
    folder = path.parent.relative_to(root)
    where = "on a GPU" if data["environment"].get("gpu") else "on a CPU"
    stopped = not data.get("complete", True)
    every = tables.interrupted(data["rows"]) if stopped else f"all {len(data['rows'])} rows"
    return [
        f"us a step {where} with a model that does nothing, 50 steps, medians; times faster: fastdiff's fastest "
        f"against the fastest other ([{every}]({folder}/README.md), [method](bench/README.md)):",
        "", tables.throughput(rows), "", f"{_measured_on(data)}.", "",
    ]  # fmt: skip


def _plain_did(rows: list[dict[str, Any]]) -> str:
    """What the plain torch columns beside the categorical steps were."""
    if any(r.get("equal_work") for r in rows):
        return "beside the categorical steps plain torch's same row on the same bf16 buffers"
    return "beside the categorical steps plain torch in fp32, Graves et al.'s algorithm 9"


def _gpu_kernels(data: dict[str, Any], least: int = LARGE) -> list[str]:
    """The kernels on states of at least so many elements; plain torch's times where they were measured beside them."""
    peers = {r["what"]: r for r in data["rows"]}
    copy = max(r["gb_s"] for r in data["rows"] if r["what"] == "copy")
    lines = [
        f"Kernels on {data['environment']['gpu']}: GB/s of the bytes they must move, beside a copy's "
        f"{copy:.0f}; {_plain_did(data['rows'])}:",
        "",
        "| kernel | elements | us | GB/s | of copy | of a copy of as many bytes | plain torch us | torch.compile us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        what, elements = r["what"], r["elements"]
        if not what.startswith(("step", "categorical step")) or elements < least:
            continue
        same = f"{100 * r['of_same_copy']:.0f} %" if "of_same_copy" in r else ""
        plain = [peers.get(f"{what.replace('categorical', 'plain')} {how}") for how in PLAIN]
        times = " | ".join(f"{p['us']:.0f}" if p else "" for p in plain)
        lines.append(
            f"| {what} | {elements} | {r['us']:.1f} | {r['gb_s']:.0f} | {100 * r['of_copy']:.0f} % | {same} | {times} |"
        )
    return [*lines, "", f"{describe(data['environment'])}."]


def details(data: dict[str, Any]) -> list[str]:
    """Every row of one stored result."""
    parts = ["", f"{_measured_on(data)}."]
    if not data.get("complete", True):
        points = data.get("roofline")
        parts += ["", f"{tables.interrupted(points, 'points') if points else tables.interrupted(data['rows'])}."]
    if data.get("rows"):
        parts += ["", "## us a step", "", tables.throughput(data["rows"]), ""]
        parts += [f"- {line}" for line in tables.footnotes(data["rows"])]
        parts += ["", "## What a step moves, launches and holds (fastdiff's fastest column / the first peer)", ""]
        parts += [tables.details(data["rows"])]
    if data.get("comparison"):
        found = data["comparison"]
        parts += ["", "## Repeatability", "", "```", comparison_text(found), "```"]
    if data.get("roofline"):
        floor, copy = data["method"]["launch_floor_us"], data["method"]["copy_gb_s"]
        said = (
            "us of a kernel's work over rotated buffers; GB/s of the bytes it must move, by fastdiff's fastest column"
        )
        parts += ["", "## Kernels by size", "", f"{said}; launch floor {tables.number(floor)} us.", ""]
        parts += [tables.roofline(data["roofline"], copy)]
    return parts


def loops(data: dict[str, Any]) -> list[str]:
    """A diffusers pipeline's loop, every way to run it: a sentence, and a table."""
    first = data["rows"][0]
    each = "; ".join(f"{r['name']} {r['ms']:.1f}" for r in data["rows"])
    lines = [
        f"A diffusers pipeline's loop on {data['environment'].get('gpu', 'a CPU')}, DDPM over a small UNet, "
        f"{first['steps']} steps, batch {first['batch']}, the model included, ms: {each}.",
        "", "| way | ms a loop | times faster than stock |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r['name']} | {r['ms']:.1f} | {r['ratio']:.2f} |" for r in data["rows"]]
    return [*lines, "", f"{describe(data['environment'])}."]


def page(folder: Path) -> str:
    """The page beside the results of a folder: throughput.json, the rooflines and their pictures, the GPU's."""
    parts = ["# Results", "", "Method: bench/README.md. Generated by fastdiff_bench.report."]
    for name in PAGED:
        for path in sorted(folder.glob(name)):
            parts += details(json.loads(path.read_text()))
    if (folder / "gpu.json").exists():
        parts += ["", "## Bandwidth", "", *_gpu_kernels(json.loads((folder / "gpu.json").read_text()), 0)]
    if (folder / "loops.json").exists():
        parts += ["", "## Loops", "", *loops(json.loads((folder / "loops.json").read_text()))]
    for path in sorted(folder.glob("roofline*.png")):
        parts += ["", f"![us against elements, with the floors]({path.name})"]
    return "\n".join(parts) + "\n"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """The pages that belong beside stored results."""
    results = root / "bench" / "results"
    folders = sorted({path.parent for name in PAGED for path in results.glob(f"*/*/{name}")})
    return {folder / "README.md": page(folder) for folder in folders}


def render(root: Path = ROOT) -> str:
    """The text between the README's result markers."""
    blocks: list[str] = []
    measured = newest("throughput", root, gpu=False)
    if measured:
        blocks += _throughput(*measured, root)
    elif older := newest("steps", root):
        data = older[1]
        blocks += ["One step beyond the model, fp32, 50 steps, median us, theirs and ours in the same run:", ""]
        blocks += [steps.table(data["rows"]), "", f"{describe(data['environment'])}.", ""]
    compiled = newest("codegen", root)
    if compiled:
        blocks += [*_codegen(compiled[1]), ""]
    demo = newest("demo", root)
    if demo:
        blocks += [*_demo(demo[1]), ""]
    gpu = newest("throughput", root, gpu=True)
    if gpu:
        blocks += _throughput(*gpu, root)
        if kernels := newest("gpu", root):
            blocks += [*_gpu_kernels(kernels[1]), ""]
        if pipeline := newest("loops", root):
            blocks += [loops(pipeline[1])[0]]
    else:
        blocks.append(
            "GPU: not measured yet; `bench/gpu.sh` runs the GPU tests and measurements on a machine that has one."
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
    wanted = {readme: new, **pages()}
    if args.check:
        stale = [p for p, content in wanted.items() if not p.exists() or p.read_text() != content]
        for path in stale:
            print(f"{path.relative_to(ROOT)}: not current; run python -m fastdiff_bench.report", file=sys.stderr)
        return int(bool(stale))
    for path, content in wanted.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
