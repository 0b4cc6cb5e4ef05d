"""Two results of the same machine side by side: what got slower, and what repeats.

A row's figure is how many times faster than the first peer it is, from interleaved rounds: a busy machine slows both
sides. It is flagged only where it moved by more than 10 % and each run's median lies outside the other's p10 to p90.
On a machine that others share, their work only ever adds: the p10 of both sides repeat better and are given beside.
"""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["FLAG", "STABLE", "compare", "comparison_text"]

FLAG = 0.10
STABLE = 0.15


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return (row["schedule"], row["solver"], tuple(row["shape"]), row["dtype"], row["steps"], row.get("against"))


def _outside(value: float, interval: dict[str, float]) -> bool:
    return not interval["p10"] <= value <= interval["p90"]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Every column of fastdiff both runs have: times faster then and now, and whether that is more than noise."""
    before = {key(r): r for r in old["rows"]}
    found = []
    for row in new["rows"]:
        other = before.get(key(row))
        if other is None:
            continue
        for name, b in row.get("times_faster", {}).items():
            a = other.get("times_faster", {}).get(name)
            if a is None or not name.startswith("fastdiff"):
                continue
            change = b["median"] / a["median"] - 1
            real = abs(change) > FLAG and _outside(b["median"], a) and _outside(a["median"], b)
            us = [r["us"][name]["median"] for r in (other, row)]
            peer = row["against"]
            then, now = (r["us"][peer]["p10"] / r["us"][name]["p10"] for r in (other, row))
            found.append({
                "row": " ".join([row["schedule"], row["solver"], "x".join(map(str, row["shape"])), row["dtype"]]),
                "column": name, "before": a, "after": b, "us": us, "change": change, "quiet_change": now / then - 1,
                "real": real,
            })  # fmt: skip
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Slower and faster columns, and how well two runs repeat: median |change|, share within 15 %, unstable ones."""
    found = changes(old, new)
    size, quiet = ([abs(c[k]) for c in found] for k in ("change", "quiet_change"))
    return {
        "columns": len(found),
        "quiet_median_change": statistics.median(quiet) if quiet else None,
        "quiet_within": sum(s <= STABLE for s in quiet) / len(quiet) if quiet else None,
        "slower": [c for c in found if c["real"] and c["change"] < 0],
        "faster": [c for c in found if c["real"] and c["change"] > 0],
        "median_change": statistics.median(size) if size else None,
        "within": sum(s <= STABLE for s in size) / len(size) if size else None,
        "unstable": [c for c in found if abs(c["change"]) > STABLE],
        "commits": [d["environment"].get("commit") for d in (old, new)],
        "machines": [_machine(d["environment"]) for d in (old, new)],
    }


def _machine(env: dict[str, Any]) -> str | None:
    """The board, or the processor and its vector instructions."""
    where = env.get("gpu") or env.get("cpu")
    return f"{where}, {env['vectors']}" if "vectors" in env and not env.get("gpu") else where


def _line(c: dict[str, Any]) -> str:
    before, after = (f"{v['median']:.2f} ({v['p10']:.2f} to {v['p90']:.2f})" for v in (c["before"], c["after"]))
    us = f"{c['us'][0]:.1f} us, {c['us'][1]:.1f} us"
    return f"  {c['row']}, {c['column']}: {before} times faster, now {after}: {100 * c['change']:+.0f} % ({us})"


def comparison_text(found: dict[str, Any]) -> str:
    """For a terminal."""
    if not found["columns"]:
        return "compared: the two results have no row in common"
    lines = [
        f"compared {found['columns']} columns of {found['commits'][0]} and {found['commits'][1]}: median change "
        f"{100 * found['median_change']:.1f} %, {100 * found['within']:.0f} % of them within {100 * STABLE:.0f} %"
    ]
    if found.get("quiet_median_change") is not None:
        lines.append(
            "of the quietest tenth of each (p10 of both sides): median change "
            f"{100 * found['quiet_median_change']:.1f} %, {100 * found['quiet_within']:.0f} % of them within "
            f"{100 * STABLE:.0f} %"
        )
    if len(set(found["machines"])) > 1:
        lines.append(f"the machines differ: {found['machines'][0]}; {found['machines'][1]}")
    for name in ("slower", "faster"):
        lines += (
            [f"{name} (beyond {100 * FLAG:.0f} % and beyond both intervals):", *map(_line, found[name])]
            if found[name]
            else []
        )
    rest = [c for c in found["unstable"] if not c["real"]]
    lines += ["unstable (beyond 15 % but within an interval; both runs):", *map(_line, rest)] if rest else []
    if not found["slower"]:
        lines.append("nothing is slower")
    return "\n".join(lines)
