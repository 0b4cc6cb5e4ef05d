"""NVIDIA's machine code, read: its instructions, and how often a program waits for memory before it can write.

A load's latency on an idle GPU is most of a small kernel's time; loads that wait for one another add theirs up.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WORDS = {"128": 4, "64": 2}  # registers of a load


class Instruction(NamedTuple):
    """One line: guarded by a predicate or not, the operation with its suffixes, its operands."""

    predicated: bool
    op: str
    operands: tuple[str, ...]


def instructions(text: str) -> list[Instruction]:
    """The instructions of a dump, in their order, without padding."""
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);", text, re.M)
    return [Instruction(bool(p), op, tuple(x.strip() for x in rest.split(","))) for p, op, rest in lines if op != "NOP"]


def round_trips(code: list[Instruction]) -> int:
    """Waits for global memory before the first store: loads that are in flight together are one.

    An instruction that reads a register some load still fills waits for that load and, counted so, for all before it.
    Both sides of a branch are counted.
    """
    pending: set[int] = set()
    waits = 0
    for _, op, operands in code:
        store = op.startswith("STG")
        writes = bool(operands) and operands[0].startswith(
            "R"
        )  # else what comes first is read: an address, a predicate
        read = {n for operand in operands[writes:] for n in _registers(operand)}
        if store:
            read |= _all(op, operands[1])
        if read & pending:
            waits, pending = waits + 1, set()
        if store:
            break
        if op.startswith("LDG"):
            pending |= _all(op, operands[0])
    return waits


def _all(op: str, operand: str) -> set[int]:
    """The registers of a load's result or a store's data, by the width in its name."""
    words = next((n for width, n in WORDS.items() if f".{width}" in op), 1)
    return {first + i for first in _registers(operand) for i in range(words)}


def _registers(operand: str) -> list[int]:
    """Those an operand names; a 64-bit address or pair is two."""
    found = []
    for number, wide in re.findall(r"(?<![UA-Z])R(\d+)(?:\.reuse)?(\.64)?", operand):
        found += [int(number), int(number) + 1] if wide else [int(number)]
    return found
