"""Results as Markdown tables: for the terminal, the HTML page and the README, from the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastdiff_bench.cases import COLUMNS, GPU_PEERS, PEERS

__all__ = [
    "best",
    "details",
    "first_peer",
    "footnotes",
    "interrupted",
    "label",
    "markdown",
    "number",
    "roofline",
    "throughput",
]


FEW = 4  # rows a footnote names one by one


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, aligned: bool = False) -> str:
    """A Markdown table; aligned: padded for a terminal."""
    cells = [list(head), *[list(r) for r in rows]]
    if aligned:
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        cells = [
            [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in cells
        ]
        rule = ["-" * w for w in widths]
    else:
        rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(r) + " |" for r in [cells[0], rule, *cells[1:]])


def number(value: float | None, digits: int = 3) -> str:
    """Three digits that matter; '-' for what was not measured."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def label(row: dict[str, Any]) -> list[str]:
    """Schedule with its options, solver and size of a row."""
    return [row["schedule"], row["solver"], "x".join(map(str, row["shape"])), row["dtype"]]


def interrupted(found: Sequence[Any], what: str = "rows") -> str:
    """Of a run that was stopped: how much it measured before."""
    return f"interrupted: {len(found)} {what}"


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns any row was timed in, in the table's order."""
    return [c for c in COLUMNS if any(c in r["us"] for r in rows)]


def throughput(rows: Sequence[dict[str, Any]], *, aligned: bool = False, steps: bool = True) -> str:
    """us a step of every column; steps/s and times faster of fastdiff's fastest; rows it loses are marked."""
    names = columns(rows)
    head = ["schedule", "solver", "shape", "dtype", *names, *(["steps/s"] if steps else []), "times faster"]
    body = []
    for r in rows:
        fastest = best(r)
        cells = [number(r["us"][n]["median"]) if n in r["us"] else "" for n in names]
        rivals = [v["median"] for n, v in r["us"].items() if not n.startswith("fastdiff")]
        faster = ""
        if fastest and rivals:
            ratio = min(rivals) / r["us"][fastest]["median"]
            faster = number(ratio) + (" (slower)" if ratio < 1 else "") + (" (throttled)" if r.get("throttled") else "")
        rate = [number(r["steps_per_s"][fastest]) if fastest else ""] if steps else []
        body.append([*label(r), *cells, *rate, faster])
    return markdown(head, body, aligned=aligned)


DETAILS = {"launches": "launches", "syncs": "host waits", "host_us": "host us", "peak_mib": "peak MiB", "joules": "J"}


def details(rows: Sequence[dict[str, Any]], *, aligned: bool = False) -> str:
    """Times of a step, what it moves, launches, waits for, holds, burns: fastdiff's fastest column / the first peer."""
    shown = [k for k in DETAILS if any(r.get(k) for r in rows)]
    head = ["schedule", "solver", "shape", "dtype", "us, p10 to p90", "B/element", "GB/s", "of copy"]
    head += [DETAILS[k] for k in shown]
    body = []
    for r in rows:
        fastest, peer = best(r), first_peer(r)
        share = f"{100 * r['of_copy']:.0f} %" if r.get("of_copy") else "-"
        spans = [f"{number(t['p10'])} to {number(t['p90'])}" for t in map(r["us"].get, (fastest, peer)) if t]
        cells = [" / ".join(spans), number(r["bytes_per_element"]), number(r.get("gb_s")), share]
        for k in shown:
            pair = [number(r.get(k, {}).get(n)) for n in (fastest, peer) if n is not None]
            cells.append(" / ".join(pair))
        body.append([*label(r), *cells])
    return markdown(head, body, aligned=aligned)


def footnotes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why cells are empty, each reason once; what a graph was captured of; rows whose times vary much."""
    why: dict[str, dict[str, list[str]]] = {}
    for r in rows:
        notes = {n: v for n, v in r.get("names", {}).items() if n in GPU_PEERS}
        for column, reason in (r["skipped"] | r.get("not_measured", {}) | notes).items():
            why.setdefault(reason, {}).setdefault(column, []).append(f"{r['schedule']} {r['solver']}")
    lines = []
    for reason, found in why.items():
        everywhere = all(len(v) == len(rows) for v in found.values())
        which = sorted({x for v in found.values() for x in v})
        where = "" if everywhere else f" ({', '.join(which) if len(which) <= FEW else f'{len(which)} of the solvers'})"
        lines.append(f"{', '.join(found)}: {reason}{where}")
    wide = [r for r in rows if spread(r) > 0.5]
    if wide:
        named = ", ".join(" ".join(label(r)[:3]) for r in wide) if len(wide) <= FEW else f"{len(wide)} rows"
        lines.append(f"p10 to p90 spans more than half of the median in {named}: this machine was not quiet")
    return lines


def spread(row: dict[str, Any]) -> float:
    """(p90 - p10) / median of fastdiff's fastest column."""
    fastest = best(row)
    t = row["us"].get(fastest) if fastest else None
    return (t["p90"] - t["p10"]) / t["median"] if t else 0.0


def best(row: dict[str, Any]) -> str | None:
    """The fastest of fastdiff's columns."""
    ours = [n for n in row["us"] if n.startswith("fastdiff")]
    return min(ours, key=lambda n: row["us"][n]["median"], default=None)


def first_peer(row: dict[str, Any]) -> str | None:
    """The first column of another's."""
    return next((n for n in PEERS if n in row["us"]), None)


def roofline(found: Sequence[dict[str, Any]], copy_gb_s: float, *, aligned: bool = False) -> str:
    """us of every column at the sizes measured; GB/s and share of the copy bandwidth of fastdiff's fastest."""
    keys = list(dict.fromkeys((p["kernel"], p["dtype"], p["elements"]) for p in found))
    names = [c for c in dict.fromkeys(p["column"] for p in found)]
    body = []
    for key in keys:
        some = {p["column"]: p for p in found if (p["kernel"], p["dtype"], p["elements"]) == key}
        ours = [p for name, p in some.items() if name.startswith("fastdiff")]
        fastest = min(ours, key=lambda p: p["us"]["median"], default=None)
        cells = [number(some[n]["us"]["median"]) if n in some else "" for n in names]
        rate = [number(fastest["gb_s"]), f"{100 * fastest['gb_s'] / copy_gb_s:.0f} %"] if fastest else ["", ""]
        body.append([key[0], key[1], f"2^{key[2].bit_length() - 1}", *cells, *rate])
    return markdown(["kernel", "dtype", "elements", *names, "GB/s", "of copy"], body, aligned=aligned)
