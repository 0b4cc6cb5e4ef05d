"""README's results, written from the newest stored measurements: never typed by hand.

    python -m fastdiff_bench.report [--check]

Reads bench/results/<machine>/<date>/{throughput,roofline*,codegen,demo,gpu,loops,loop-unet1d}.json and fills the text
between the README's markers; writes every row of what was measured into a README.md beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdiff_bench import tables
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
NULL_MODEL_US = {"fastdiff eager": 25.0, "fastdiff step_graph": 8.0, "fastdiff loop_graph": 3.0}  # asked for on a GPU
ASKED_US = ", ".join(f"{name} <= {us:g}" for name, us in NULL_MODEL_US.items())
POLICY = {"diffusers": 4.0, "torch.compile": 1.5}  # asked for: times faster a policy network's loop


def load(path: Path) -> dict[str, Any]:
    """A stored result. Old ones name the machine's GPU where the CPU was measured: there it is left out."""
    data: dict[str, Any] = json.loads(path.read_text())
    if data.get("method", {}).get("device") == "cpu":
        data["environment"].pop("gpu", None)
    return data


def newest(kind: str, root: Path = ROOT, *, gpu: bool | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest stored file of a kind, by its date folder; gpu: measured on one, or on a CPU."""
    files = sorted((root / "bench" / "results").glob(f"*/*/{kind}.json"), key=lambda p: (p.parent.name, p.parts))
    for path in reversed(files):
        data = load(path)
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
    facts, asked = data["facts"], ""
    if "asked_class" in facts:
        kept, seen = (100 * facts[name] for name in ("completed_class_pull", "asked_class"))
        asked = (
            f"; with an upper half given {kept:.0f} % keep the class (>= 65 %), of classes asked for {seen:.0f} % are "
            "seen as them (>= 95 %)"
        )
    missed = f" Missed: {'; '.join(data['missed'])}." if data["missed"] else ""
    return [
        f"Quality (`make demo`, {data['seconds']:.0f} s; the worst of all solvers, in brackets the target): spiral, "
        f"mean distance {ode:.4f} (<= 0.012) with ODE solvers at 40 evaluations, {sde:.4f} (<= 0.02) with "
        f"stochastic ones at 1000, curve to its nearest sample {cover:.4f} (<= 0.015); digits, a classifier's mean "
        f"confidence {confidence:.3f} (>= 0.85 of its value on real ones), class shares {100 * rare:.1f} to "
        f"{100 * common:.1f} % (4 to 18 %){asked}.{missed}"
    ]


def _measured_on(data: dict[str, Any]) -> str:
    copy = data["method"]["copy_gb_s"]
    return f"{describe(data['environment'])}; copy {copy:.1f} GB/s"


def _throughput(path: Path, data: dict[str, Any], root: Path) -> list[str]:
    """The quick rows at one shape; the page beside the result has all."""
    few = {(schedule, solver) for schedule, names in QUICK.items() for solver in names}
    gpu = "gpu" in data["environment"]
    sizes = (list(SHAPES["latent"]), list(TEXT))
    rows = [
        r for r in data["rows"]
        if (r["schedule"], r["solver"]) in few and (r["shape"] == sizes[0] or r["shape"][:2] == sizes[1])
    ]  # fmt: skip
    folder = path.parent.relative_to(root)
    stopped = not data.get("complete", True)
    every = tables.interrupted(data["rows"]) if stopped else f"all {len(data['rows'])} rows"
    return [
        f"us a step on a {'GPU' if gpu else 'CPU'} with a model that does nothing, 50 steps, medians; times faster: "
        f"fastdiff's fastest against the fastest other ([{every}]({folder}/README.md), [method](bench/README.md))"
        f"{f'; asked: {ASKED_US}' if gpu else ''}:",
        "", _marked(rows) if gpu else tables.throughput(rows), "",
        f"{_measured_on(data)}.", *_slower(path.parent.parent, root), "",
    ]  # fmt: skip


def _marked(rows: list[dict[str, Any]]) -> str:
    """The table with what misses NULL_MODEL_US marked."""
    lines = tables.throughput(rows).splitlines()
    names = lines[0].split(" | ")
    for at, row in enumerate(rows, 2):
        cells = lines[at].split(" | ")
        for name, asked in NULL_MODEL_US.items():
            if name in row["us"] and row["us"][name]["median"] > asked:
                cells[names.index(name)] += " (missed)"
        lines[at] = " | ".join(cells)
    return "\n".join(lines)


def lost(points: list[dict[str, Any]]) -> tuple[list[list[str]], int, int]:
    """Where another is faster than fastdiff's fastest column.

    Returns: the kernel, dtype, elements, us, other and its us at the largest size of each kernel and dtype; how many
    sizes of all; how many there are.
    """
    sizes: dict[tuple[str, str, int], dict[str, float]] = {}
    for p in points:
        sizes.setdefault((p["kernel"], p["dtype"], p["elements"]), {})[p["column"]] = p["us"]["median"]
    largest = {(kernel, dtype): n for kernel, dtype, n in sorted(sizes)}
    rows, slower, compared = [], 0, 0
    for (kernel, dtype, n), us in sizes.items():
        others = {name: v for name, v in us.items() if not name.startswith("fastdiff")}
        ours = [v for name, v in us.items() if name not in others]
        if not ours or not others:
            continue
        compared += 1
        if min(others.values()) >= min(ours):
            continue
        slower += 1
        if n == largest[kernel, dtype]:
            other = min(others, key=others.__getitem__)
            two = [tables.number(v) for v in (min(ours), others[other])]
            rows.append([kernel, dtype, f"2^{n.bit_length() - 1}", two[0], other, two[1]])
    return rows, slower, compared


def _slower(machine: Path, root: Path) -> list[str]:
    """One line: the kernels of a machine's newest rooflines that are slower than another's."""
    newest_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    # a file of some kernels measures again what the day's roofline.json has
    for path in sorted(machine.glob("*/roofline*.json"), key=lambda p: (p.parent, p.stem != "roofline", p)):
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for point in load(path)["roofline"]:
            found.setdefault((point["kernel"], point["dtype"]), []).append(point)
        newest_of |= found
    rows, slower, sizes = lost([p for points in newest_of.values() for p in points])
    if not sizes:
        return []
    few = "; ".join(f"{k} {dtype} {n} {us} us ({other} {theirs})" for k, dtype, n, us, other, theirs in rows)
    where = f"[{sizes} sizes of kernels]({machine.relative_to(root)})"
    return [f"Another is faster at {slower} of {where}; at the largest: {few or 'nowhere'}."]


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
        "| kernel | elements | us | GB/s | of copy | plain torch us | torch.compile us |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        what, elements = r["what"], r["elements"]
        if not what.startswith(("step", "categorical step")) or elements < least:
            continue
        share = f"{100 * r['of_copy']:.0f} %{' (throttled)' if r.get('throttled') else ''}"
        plain = [peers.get(f"{what.replace('categorical', 'plain')} {how}") for how in PLAIN]
        times = " | ".join(f"{p['us']:.0f}" if p else "" for p in plain)
        lines.append(f"| {what} | {elements} | {r['us']:.1f} | {r['gb_s']:.0f} | {share} | {times} |")
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
        rows, slower, sizes = lost(data["roofline"])
        parts += ["", f"Another is faster at {slower} of {sizes} sizes{'; at the largest:' if rows else '.'}"]
        head = ["kernel", "dtype", "elements", "us", "fastest other", "its us"]
        parts += ["", tables.markdown(head, rows)] if rows else []
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
    lines += [f"\n{name}: {why}." for name, why in data.get("skipped", {}).items()]
    return [*lines, "", f"{describe(data['environment'])}."]


def policy(data: dict[str, Any]) -> list[str]:
    """A line a row of a policy network's loop: ms, and how many times faster than those it was asked to be."""
    lines = []
    for r in data["rows"]:
        us = {name: v["median"] for name, v in r["us"].items()}
        ours = tables.best(r)
        if ours is None:
            continue
        faster = []
        for name, asked in POLICY.items():
            ratio = us[name] / us[ours] if name in us else None
            said = "not measured" if ratio is None else tables.number(ratio) + (" (missed)" if ratio < asked else "")
            faster.append(f"{name} {said} (asked {asked:g})")
        lines.append(
            f"A policy network's loop ({data['method']['model']}, {r['solver']}, {r['steps']} steps, "
            f"{'x'.join(map(str, r['shape']))}, {r['dtype']}) on {data['environment'].get('gpu', 'a CPU')}, the model "
            f"included: {ours} {us[ours] * r['nfe'] / 1e3:.2f} ms; times faster than {', than '.join(faster)}."
        )
    return lines


def page(folder: Path) -> str:
    """The page beside the results of a folder: throughput.json, the rooflines and their pictures, the GPU's."""
    parts = ["# Results", "", "Method: bench/README.md. Generated by fastdiff_bench.report."]
    for name in PAGED:
        for path in sorted(folder.glob(name)):
            parts += details(load(path))
    if (folder / "gpu.json").exists():
        parts += ["", "## Bandwidth", "", *_gpu_kernels(load(folder / "gpu.json"), 0)]
    if (folder / "loops.json").exists():
        parts += ["", "## Loops", "", *loops(load(folder / "loops.json"))]
    if (folder / "loop-unet1d.json").exists():
        parts += ["", *policy(load(folder / "loop-unet1d.json"))]
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
    compiled = newest("codegen", root)
    if compiled:
        blocks += [*_codegen(compiled[1]), ""]
    demo = newest("demo", root)
    if demo:
        blocks += [*_demo(demo[1]), ""]
    gpu = newest("throughput", root, gpu=True)
    if gpu:
        blocks += _throughput(*gpu, root)
        if kernels := newest("gpu", root, gpu=True):
            blocks += [*_gpu_kernels(kernels[1]), ""]
        if pipeline := newest("loops", root, gpu=True):
            blocks += [loops(pipeline[1])[0]]
        if network := newest("loop-unet1d", root, gpu=True):
            blocks += policy(network[1])
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
