"""The binned readout's cases for codegen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff_bench.codegen import Case

__all__ = ["binned_cases"]


def binned_cases(dtype: str, tile: dict[str, Any], warps: int, lanes: int) -> Iterator[Case]:
    """A Gaussian per element read out as a sampled bin (fused), or as the mean of all (a loop over their edges)."""
    types = {"x_ptr": "*fp32", "model_ptr": f"*{dtype}", "coef_ptr": "*fp32", "row_ptr": "*i32", "out_ptr": "*fp32"}
    types |= {**dict.fromkeys(("n", "first", "row_stride", "stream", "bins"), "i32"), "width": "fp32"}
    seeds = {"seed_ptr": "*i64", "index_ptr": "*i64"}
    for name, sampled in (("sample", True), ("mean", False)):
        yield Case(
            f"binned/{name}/{dtype}", "binned", "binned_kernel", types | (seeds if sampled else {}),
            {"SAMPLED": sampled, **tile, "PARTS": 1 if sampled else 2}, ("fp32", dtype, dtype), ("fp32",),
            clamps=sampled, num_warps=warps, lanes=lanes,
        )  # fmt: skip
