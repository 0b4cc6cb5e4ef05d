"""Pictures of results: a step's time by schedule and solver, times faster, rooflines. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff_bench.cases import DISCRETE
from fastdiff_bench.tables import columns, label

__all__ = ["plot_roofline", "plot_throughput", "pyplot"]

COLORS = {
    "torch": "#9a9a9a", "torch.compile": "#4c4c4c", "torch graph": "#1b1b1b",
    "diffusers": "#d08b2c", "k-diffusion": "#a05a9c",
    "fastdiff eager": "#9ccbe6", "fastdiff compiled": "#1f77b4", "fastdiff step_graph": "#2ca02c",
    "fastdiff loop_graph": "#0b5d1e", "fastdiff": "#1f77b4", "kernel": "#0b5d1e",
}  # fmt: skip
INSTALL = "plots need matplotlib: pip install 'fastdiff-samplers[bench]'"


def pyplot() -> Any:  # noqa: ANN401 - the module
    """matplotlib.pyplot without a display; ValueError with the install line where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError(INSTALL) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_throughput(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One chart a shape and dtype: us a step of every column, p10 to p90 as a line, schedules apart."""
    plt, made = pyplot(), []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        own = row["schedule"].startswith(DISCRETE)
        shape = "classes " if own else ""
        groups.setdefault((shape + "x".join(map(str, row["shape"])), row["dtype"]), []).append(row)
    for (shape, dtype), some in groups.items():
        names = columns(some)
        height = 1.1 + 0.13 * sum(len(r["us"]) + 1 for r in some)
        fig, axis = plt.subplots(figsize=(9, max(2.4, height)), layout="constrained")
        middles, top = [], 0.0
        for row in some:
            shown = [n for n in names if n in row["us"]]
            middles.append(top + (len(shown) - 1) / 2)
            for name in shown:
                v = row["us"][name]
                # no bars: on a logarithmic axis they begin nowhere
                axis.plot([v["p10"], v["p90"]], [top, top], color=COLORS[name], linewidth=1.2)
                axis.plot([v["median"]], [top], marker="o", markersize=5, color=COLORS[name])
                top += 1
            top += 1
        axis.set_yticks(middles, [" ".join(label(r)[:2]) for r in some])
        axis.set_ylim(top - 0.6, -0.8)
        axis.set_xscale("log")
        axis.set_xlabel("us a step (log scale; point: median, line: p10 to p90)")
        axis.set_title(f"one step, {shape}, {dtype}", loc="left", fontsize=11)
        axis.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        patches = [plt.Rectangle((0, 0), 1, 1, color=COLORS[n]) for n in names]
        fig.legend(patches, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
        path = folder / f"step_{shape.replace(' ', '_')}_{dtype}.png"
        fig.savefig(path, dpi=110)
        plt.close(fig)
        made.append(path)
    return made


def plot_roofline(points: Sequence[dict[str, Any]], folder: Path, *, copy_gb_s: float, floor_us: float) -> list[Path]:
    """One panel a kernel and dtype: us against elements, the launch floor and the bandwidth floor drawn in."""
    plt = pyplot()
    dtypes = sorted({p["dtype"] for p in points}, key=("fp32", "bf16", "fp16").index)
    panels = [(k, d) for k in dict.fromkeys(p["kernel"] for p in points) for d in dtypes]
    panels = [x for x in panels if any((p["kernel"], p["dtype"]) == x for p in points)]
    across = len(dtypes) if len(dtypes) > 1 else min(2, len(panels))
    down = -(-len(panels) // across)
    size = (4.8 * across + 0.4, 3.1 * down + 0.9)
    fig, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (kernel, dtype) in zip(axes.flat, panels, strict=False):
        some = [p for p in points if (p["kernel"], p["dtype"]) == (kernel, dtype)]
        for name in dict.fromkeys(p["column"] for p in some):
            line = sorted((p["elements"], p["us"]["median"]) for p in some if p["column"] == name)
            handles[name] = axis.plot(*zip(*line, strict=True), marker="o", markersize=3, color=COLORS[name])[0]
        elements = sorted({p["elements"] for p in some})
        floor = [some[0]["bytes_per_element"] * n / copy_gb_s / 1e3 for n in elements]
        handles["bandwidth floor"] = axis.plot(elements, floor, color="#c0392b", linestyle="--", linewidth=1)[0]
        handles["launch floor"] = axis.axhline(floor_us, color="#c0392b", linestyle=":", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(bottom=min(floor_us, min(p["us"]["median"] for p in some)) / 2)
        axis.set_title(f"{kernel}, {dtype}, {some[0]['bytes_per_element']:.0f} B/element", loc="left", fontsize=10)
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_ylabel("us")
        axis.set_xlabel("elements")
    drawn = list(handles)
    fig.legend(handles.values(), drawn, loc="outside lower center", ncols=2 * across, frameon=False, fontsize=9)
    path = folder / "roofline.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return [path]
