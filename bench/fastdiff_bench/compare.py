"""Two results of the same machine side by side: what got slower, and what repeats.

A row's figure is how many times faster than the others it is, from interleaved rounds: a busy machine slows both
sides. It is flagged only where it moved by more than 10 % and each run's median lies outside the other's p10 to p90.
On a machine that others share, their work only ever adds: the p10 of both sides repeat better and are given beside.
Rows and columns that only the old result has are listed, and so are rows whose others are not the same ones.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

__all__ = ["FLAG", "STABLE", "compare", "comparison_text"]

FLAG = 0.10
STABLE = 0.15


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return (row["schedule"], row["solver"], tuple(row["shape"]), row["dtype"], row["steps"])


def _name(row: dict[str, Any]) -> str:
    return " ".join([row["schedule"], row["solver"], "x".join(map(str, row["shape"])), row["dtype"]])


def _outside(value: float, interval: dict[str, float]) -> bool:
    return not interval["p10"] <= value <= interval["p90"]


def _others(row: dict[str, Any], figure: str) -> float:
    """us of those a row is compared with: their geometric mean."""
    return statistics.geometric_mean(row["us"][name][figure] for name in row["against"].split(", "))


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    now = {key(r): r for r in new["rows"]}
    return [(r, now[key(r)]) for r in old["rows"] if key(r) in now]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Every column of fastdiff both runs have: times faster then and now, and whether that is more than noise."""
    found = []
    for then, now in _pairs(old, new):
        if then.get("against") != now.get("against"):
            continue
        for name, b in now.get("times_faster", {}).items():
            a = then.get("times_faster", {}).get(name)
            if a is None or not name.startswith("fastdiff"):
                continue
            change = b["median"] / a["median"] - 1
            before, after = (_others(r, "p10") / r["us"][name]["p10"] for r in (then, now))
            found.append({
                "row": _name(now), "column": name, "before": a, "after": b, "change": change,
                "us": [r["us"][name]["median"] for r in (then, now)],
                "others_us": [_others(r, "median") for r in (then, now)], "quiet_change": after / before - 1,
                "real": abs(change) > FLAG and _outside(b["median"], a) and _outside(a["median"], b),
            })  # fmt: skip
    return found


def missing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The rows that only the old result has, and of the others the columns."""
    now = {key(r): r for r in new["rows"]}
    found = [_name(r) for r in old["rows"] if key(r) not in now]
    for then, row in _pairs(old, new):
        gone = [name for name in then["us"] if name not in row["us"]]
        found += [f"{_name(then)}: {', '.join(gone)}"] if gone else []
    return found


def other_peers(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Against whom rows were measured then and now, where that is not the same."""
    against = [tuple(r.get("against", "nobody") for r in pair) for pair in _pairs(old, new)]
    return [f"{n} rows: against {a}, now {b}" for (a, b), n in Counter(against).items() if a != b]


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Slower and faster columns, and how well two runs repeat: median |change|, share within 15 %, unstable ones."""
    found = changes(old, new)
    size, quiet = ([abs(c[k]) for c in found] for k in ("change", "quiet_change"))
    return {
        "columns": len(found),
        "missing": missing(old, new),
        "other_peers": other_peers(old, new),
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
    if "others_us" in c:
        us += f"; the others {c['others_us'][0]:.1f} us, {c['others_us'][1]:.1f} us"
    return f"{c['row']}, {c['column']}: {before} times faster, now {after}: {100 * c['change']:+.0f} % ({us})"


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    """A title with its lines below it, where there are any."""
    below = [f"  {line}" for line in lines]
    return [title, *below] if below else []


def comparison_text(found: dict[str, Any]) -> str:
    """For a terminal."""
    apart = _listed("not measured now:", found.get("missing", []))
    apart += _listed("not compared:", found.get("other_peers", []))
    if not found["columns"]:
        return "\n".join(["compared: the two results have no column in common", *apart])
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
        lines += _listed(f"{name} (beyond {100 * FLAG:.0f} % and beyond both intervals):", map(_line, found[name]))
    rest = [c for c in found["unstable"] if not c["real"]]
    lines += _listed("unstable (beyond 15 % but within an interval; both runs):", map(_line, rest))
    lines += apart
    if not found["slower"]:
        lines.append("nothing is slower")
    return "\n".join(lines)
