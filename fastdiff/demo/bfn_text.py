"""Discrete Bayesian flow: characters of a text that every Python brings, judged by bits per character."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections import Counter
from functools import partial
from math import log2
from pathlib import Path

import torch
from torch import nn

import fastdiff as fd
from fastdiff.demo.bfn_classes import ClassCase, ClassSampled, class_loss, sample_classes, total_bits
from fastdiff.demo.bfn_nets import TextNet
from fastdiff.demo.bfn_train import fit, spread_times
from fastdiff.demo.report import Part, Row
from fastdiff.demo.train import Say
from fastdiff.files import write_atomic

__all__ = ["cases", "entropies", "real_text", "run"]

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
SCHEDULE = fd.schedules.BFNDiscrete(0.75, len(ALPHABET))  # beta_1 of the paper's text8
LENGTH = 64
TRAINING_STEPS = 700
BATCH = 48
SAMPLES = 64
ENOUGH = 100_000  # characters
HELD_OUT = 0.1


def cases() -> list[ClassCase]:
    """What is sampled: the paper's sampler, and BFN-Solver's flow with half of the steps."""
    return [
        ClassCase("bfn_discrete", SCHEDULE, 100),
        ClassCase("bfn_solver", SCHEDULE, 50, {"method": "bfn_solver2"}),
    ]


def real_text() -> str:
    """Letters and single spaces of Python's language reference, as the interpreter's help() knows it.

    Where it is not installed: of the docstrings of the standard library.
    """
    try:
        pages = list(importlib.import_module("pydoc_data.topics").topics.values())
    except ModuleNotFoundError:
        names = (
            "argparse",
            "asyncio",
            "collections",
            "csv",
            "decimal",
            "difflib",
            "doctest",
            "email",
            "inspect",
            "logging",
        )
        modules = [importlib.import_module(n) for n in names]
        pages = [
            str(vars(v).get("__doc__"))
            for m in modules
            for v in (m, *vars(m).values())
            if isinstance(v, type(m) | type)
        ]
    return re.sub(r"[^a-z]+", " ", " ".join(pages).lower())


def classes_of(text: str) -> torch.Tensor:
    """Characters as classes, int64."""
    return torch.tensor([ALPHABET.index(c) for c in text])


def text_of(classes: torch.Tensor) -> str:
    """Classes as characters."""
    return "".join(ALPHABET[k] for k in classes.tolist())


def entropies(text: str) -> tuple[float, float]:
    """Bits a character of the letters' own shares (order 0), and of each letter given the one before it (order 1)."""

    def bits(counts: Counter[str]) -> float:
        total = sum(counts.values())
        return -sum(n / total * log2(n / total) for n in counts.values())

    single = bits(Counter(text))
    return single, bits(Counter(a + b for a, b in zip(text, text[1:], strict=False))) - single


def _pieces(text: str) -> torch.Tensor:
    """The text as classes [N, LENGTH]."""
    x = classes_of(text)
    return x[: len(x) // LENGTH * LENGTH].view(-1, LENGTH)


def _loss(x: torch.Tensor, net: nn.Module, generator: torch.Generator) -> torch.Tensor:
    first = torch.randint(len(x) - LENGTH, (BATCH, 1), generator=generator)
    seeds = torch.randint(2**62, (BATCH,), generator=generator)
    pieces = x[first + torch.arange(LENGTH)]
    return class_loss(net, pieces, spread_times(BATCH, generator), SCHEDULE, seeds).mean()


def known_words(lines: list[str], words: set[str]) -> float:
    """The share of letters in whole words that the text knows; the first and last word of a line may be cut."""
    inner = [w for line in lines for w in line.split(" ")[1:-1] if w]
    return sum(len(w) for w in inner if w in words) / max(1, sum(map(len, inner)))


def _judge(case: ClassCase, got: ClassSampled, words: set[str], chance: float, bits: dict[str, float]) -> Row:
    share = known_words([text_of(x) for x in got.x], words)
    missed = []
    if not share > 2 * chance:
        missed.append(f"text: {case.label}: {share:.0%} of the letters are in known words, by chance {chance:.0%}")
    return got.row("text", case, {"known_words": share, **bits}, missed)


def run(out: Path, *, seed: int, say: Say) -> Part:
    """Train, measure bits per character on text that was held out, print and write samples."""
    part, text = Part(), real_text()
    if len(text) < ENOUGH:
        raise ValueError(f"this Python brings too little text: {len(text)} characters, {ENOUGH} are needed")
    cut = int(len(text) * (1 - HELD_OUT))
    held = _pieces(text[cut:])
    order_0, order_1 = entropies(text)
    say(f"bfn_text: training on {cut} characters of Python's reference")
    net, loss = fit(
        partial(TextNet, len(ALPHABET)), partial(_loss, classes_of(text[:cut])), steps=TRAINING_STEPS,
        learning_rate=3e-3, seed=seed, say=say,
    )  # fmt: skip
    bits = total_bits(net, held, SCHEDULE, times=20, seed=seed)
    say(f"  held-out text: {bits:.3f} bits a character; entropy of order 0 {order_0:.3f}, of order 1 {order_1:.3f}")
    part.facts |= {"text_loss": loss, "text_bits_per_character": bits, "text_order_0_entropy": order_0}
    part.facts |= {"text_order_1_entropy": order_1}
    if not bits < order_0:
        part.missed.append(f"text: {bits:.3f} bits a character is not below the order-0 entropy {order_0:.3f}")
    words = set(text.split(" "))
    letters = torch.tensor([text.count(c) for c in ALPHABET], dtype=torch.float64)
    drawn = torch.multinomial(
        letters, SAMPLES * LENGTH, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    chance = known_words([text_of(x) for x in drawn.view(SAMPLES, LENGTH)], words)
    part.facts["text_known_words_by_chance"] = chance
    pages = [f"real: {text_of(held[i])}" for i in range(4)]
    for case in cases():
        got = sample_classes(net, case, (SAMPLES, LENGTH), seed=seed)
        row = _judge(case, got, words, chance, {"bits_per_character": bits, "order_0": order_0})
        part.rows.append(row)
        known = f"{row.metrics['known_words']:.0%} of the letters in known words (letters at random: {chance:.0%})"
        say(f"  {case.label}, {got.plan.nfe} evaluations: {known}, {got.us:.0f} us a step")
        lines = [text_of(x) for x in got.x]
        say(textwrap.indent("\n".join(lines[:6]), "    | "))
        pages += [f"{case.label}: {line}" for line in lines]
    write_atomic(out / "bfn_text.txt", ("\n".join(pages) + "\n").encode())
    return part
