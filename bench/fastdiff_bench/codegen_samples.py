"""The cases of codegen for kernels that look at a whole sample: guidance rules and dynamic thresholding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastdiff_bench.codegen import Case


def sample_cases(dtype: str, tile: dict[str, Any], warps: int, lanes: int) -> Iterator[Case]:
    """What is found of a sample, by one program or in pieces, and what is then done with every element."""
    yield from _guide(dtype, tile, warps, lanes)
    yield from _threshold(dtype, tile, warps, lanes)


def _reduction(name: str, module: str, kernel: str, types: dict[str, str], dtypes: tuple[str, ...],
               lanes: int, scalars: int, *, vector: int = 4, **constants: Any) -> Case:  # fmt: skip
    """A kernel that reads a whole sample in turns of one tile."""
    from fastdiff.ops._dispatch import whole_sample

    tile = whole_sample(1 << 18)
    warps = tile.pop("num_warps") * 32 // lanes
    tile = {**tile, "ALIGNED": True, "WIDE": False, **constants}
    return Case(
        name, module, kernel, types, tile, dtypes, (), scalars=scalars, num_warps=warps, lanes=lanes, vector=vector
    )


def _guide(dtype: str, tile: dict[str, Any], warps: int, lanes: int) -> Iterator[Case]:
    """What a guidance rule makes of one sample, and the combination outside a step."""
    from fastdiff.ops.guide import RULES

    both = {"c_ptr": f"*{dtype}", "u_ptr": f"*{dtype}", "n": "i32", "first": "i32", "scales_ptr": "*fp32"}
    types = {**both, "row_ptr": "*i32", "w_ptr": "*fp32", **dict.fromkeys(("w_row_stride", "w_batch_stride"), "i32")}
    types |= {"a": "fp32", "r": "fp32", "pieces": "i32", "piece": "i32"}
    for rule in RULES[1:]:
        number, near = RULES.index(rule), 2 if rule == "rescale" else 0  # two numbers that its sums are taken about
        case = partial(_reduction, module="guide", kernel="scales_kernel", lanes=lanes, RULE=number)
        yield case(f"guide/{rule}/{dtype}", types=types, dtypes=(dtype,) * 2, scalars=3 + near, PHASE=0, WIDEST=1)
        parted = types | {"part_ptr": "*fp32"}
        name = f"guide/{rule}/pieces/{dtype}"
        yield case(name, types=parted, dtypes=(dtype,) * 2, scalars=5 + near, PHASE=1, WIDEST=1)
        if dtype == "fp32":
            yield case(f"guide/{rule}/finish/{dtype}", types=parted, dtypes=(), scalars=13, PHASE=2, WIDEST=1024)
    types = {**both, "out_ptr": f"*{dtype}", "stride": "i32"}
    yield Case(
        f"guide/combine/{dtype}", "guide", "combine_kernel", types, {"RULE": RULES.index("apg"), **tile},
        (dtype,) * 2, (dtype,), scalars=2, num_warps=warps, lanes=lanes,
    )  # fmt: skip


def _threshold(dtype: str, tile: dict[str, Any], warps: int, lanes: int) -> Iterator[Case]:
    """The quantile of one sample's x0 (five passes), and the clamp outside a step."""
    names = ("n", "first", "width", "w_row_stride", "w_batch_stride", "k")
    types = {"x_ptr": "*fp32", "model_ptr": f"*{dtype}", "uncond_ptr": f"*{dtype}", "table_ptr": "*fp32"}
    types |= {"row_ptr": "*i32", "w_ptr": "*fp32", "bound_ptr": "*fp32", **dict.fromkeys(names, "i32")}
    types |= {"fraction": "fp32", "maximum": "fp32"}
    tiles = ("fp32", dtype, dtype) * 5
    types |= {"piece": "i32"}
    bound = partial(_reduction, module="threshold", kernel="bound_kernel", lanes=lanes, vector=8, SCALED=True)
    yield bound(f"threshold/bound/{dtype}", types=types, dtypes=tiles, scalars=1, STAGE=6)
    for stage, name in ((0, "first digit"), (3, "last digit"), (4, "extremes"), (5, "last")):
        found, read = types | {"found_ptr": "*i32"}, tiles[:3] if stage < 5 else ()
        yield bound(f"threshold/bound/{name}/{dtype}", types=found, dtypes=read, scalars=1, STAGE=stage)
    types = {"x_ptr": f"*{dtype}", "bound_ptr": "*fp32", "out_ptr": f"*{dtype}", "n": "i32", "first": "i32"}
    yield Case(
        f"threshold/clamp/{dtype}", "threshold", "threshold_kernel", types, tile,
        (dtype,), (dtype,), clamps=True, num_warps=warps, lanes=lanes,
    )  # fmt: skip
