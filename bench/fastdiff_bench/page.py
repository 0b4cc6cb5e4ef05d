"""One self-contained HTML page of a result: environment, tables, pictures as data URIs. No scripts, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.files import write_atomic
from fastdiff_bench import plots, tables
from fastdiff_bench.compare import comparison_text
from fastdiff_bench.environment import describe

__all__ = ["write_report"]

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 92rem; padding: 0 1.2rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.sub, li, figcaption { color: #555; } p.warn { color: #9c2f1f; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
th { background: #f6f6f6; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr:hover td { background: #f4f9fd; } td.lost { color: #9c2f1f; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; border: 1px solid #eee; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12.5px; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1.2rem; font-size: 13px; } dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def _table(markdown: str) -> str:
    """A Markdown table as HTML."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines()]
    head, body = lines[0], lines[2:]
    rows = "".join(
        "<tr>" + "".join(f"<td{' class=lost' if '(' in c else ''}>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in body
    )
    return (
        f"<div class=scroll><table><thead><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in head)}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " "))
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _facts(values: dict[str, Any]) -> str:
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_fact(v))}</dd>" for k, v in values.items())
    return f"<dl>{items}</dl>"


def _fact(value: Any) -> str:  # noqa: ANN401 - anything JSON holds
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def page(data: dict[str, Any], pictures: Sequence[Path]) -> str:
    """The HTML of a result of the main table, with or without roofline points."""
    rows = data.get("rows", [])
    parts = [f"<p class=sub>{html.escape(describe(data['environment']))}</p>"]
    if not data.get("complete", True):
        parts.append("<p class=warn>This run was interrupted: the rows below are those measured before.</p>")
    if any(r.get("throttled") for r in rows):
        parts.append("<p class=warn>The GPU was throttled in the rows marked so.</p>")
    if rows:
        parts += [
            "<h2>Time of a step</h2>",
            f"<p class=sub>us a step, one model evaluation included ({html.escape(data['method']['model'])}); median "
            "of interleaved rounds. steps/s is of fastdiff's fastest column; times faster: that column against the "
            "fastest of the others.</p>",
            _table(tables.throughput(rows)), _notes(tables.footnotes(rows)),
            "<h2>What a step moves, launches and holds</h2>",
            "<p class=sub>fastdiff's fastest column / the first peer. More than 100 % of the copy bandwidth: the state "
            "stays in cache.</p>",
            _table(tables.details(rows)),
        ]  # fmt: skip
    if data.get("roofline"):
        parts += [
            "<h2>Kernels by size</h2>",
            "<p class=sub>us of a kernel's work; GB/s of the bytes it must move, by fastdiff's fastest column.</p>",
            _table(tables.roofline(data["roofline"], data["method"]["copy_gb_s"])),
        ]
    if data.get("comparison"):
        parts += ["<h2>Against stored results</h2>", f"<pre>{html.escape(comparison_text(data['comparison']))}</pre>"]
    if pictures:
        parts += ["<h2>Pictures</h2>", *map(_picture, pictures)]
    facts = {**data["environment"], **data.get("method", {}), "started": data.get("started", "")}
    facts |= {f"{k}, {when}": v for when in ("before", "after") for k, v in data.get(f"state_{when}", {}).items()}
    parts += ["<h2>Environment and method</h2>", _facts(facts)]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastdiff bench</title><style>{STYLE}</style><h1>fastdiff bench</h1>{''.join(parts)}</html>\n"
    )


def write_report(data: dict[str, Any], folder: Path) -> Path:
    """Writes the PNGs and report.html into a folder; returns the page's path."""
    pictures = plots.plot_throughput(data["rows"], folder) if data.get("rows") else []
    if data.get("roofline"):
        m = data["method"]
        pictures += plots.plot_roofline(
            data["roofline"], folder, copy_gb_s=m["copy_gb_s"], floor_us=m["launch_floor_us"]
        )
    return write_atomic(folder / "report.html", page(data, pictures).encode())
