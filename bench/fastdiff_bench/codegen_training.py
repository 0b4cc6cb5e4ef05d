"""The training kernels' cases for codegen: the loss by target and kind, the KL of two Gaussians, a learned variance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastdiff_bench.codegen import Case, _step, tile_of


def training_cases(lanes: int) -> Iterator[Case]:
    """The kernels of training, and the step with a second output plane."""
    yield from _levels(lanes)
    for dtype in ("fp32", "bf16"):
        yield from _sums(dtype, lanes)
        tile, warps = tile_of(lanes=lanes)
        types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(("g_ptr", "by_ptr"), "*fp32")
        types |= dict.fromkeys(("n", "first", "g_stride"), "i32") | {"factor": "fp32"}
        yield Case(
            f"scaled/{dtype}", "scaled", "scaled_kernel", types, tile, (dtype,), (dtype,), num_warps=warps, lanes=lanes
        )
        plain = _step(1, dtype, lanes=lanes)
        yield replace(
            plain, name=f"affine_step/r1/noise+guidance+variance/{dtype}",
            types=plain.types | {"variance_ptr": f"*{dtype}"}, loads=(*plain.loads, dtype),
        )  # fmt: skip


def _levels(lanes: int) -> Iterator[Case]:
    """A continuous schedule's coefficients: float64 arithmetic on one time a thread, what a batch needs once."""
    from fastdiff.ops._levels import BLOCK, KINDS

    types = {"t_ptr": "*fp32", "p_ptr": "*fp64", "out_ptr": "*fp32", "count": "i32"}
    for kind in KINDS:
        classes = kind.__name__ == "BFNDiscrete"
        constants: dict[str, Any] = {"KIND": kind.__name__, "BLOCK": BLOCK}
        constants |= {"GIVES": "classes", "TARGET": None} if classes else {"GIVES": "noise", "TARGET": "v"}
        yield Case(
            f"levels/{kind.__name__}/fp32", "levels", "levels_kernel", types, constants, (), (), scalars=5,
            num_warps=BLOCK // lanes, lanes=lanes,
        )  # fmt: skip


def _sums(dtype: str, lanes: int) -> Iterator[Case]:
    """Loss and KL with their gradients, one turn of their loop: the loss moves 8 bytes an fp32 element, 12 with x0."""
    from fastdiff.ops.denoising_loss import loss_tile
    from fastdiff.ops.gaussian_kl import SLOPE_SLOTS

    tile = {**loss_tile(1 << 18), "ALIGNED": True, "WIDE": False}
    warps = tile.pop("num_warps")
    tile |= {"BLOCK": tile["BLOCK"] // tile["PARTS"], "PARTS": 1}
    p = f"*{dtype}"
    types = {"model_ptr": p, "slope_ptr": p, "coef_ptr": "*fp32", "t_ptr": "*i64", "loss_ptr": "*fp32"}
    types |= {"scale_ptr": "*fp32", "seed_ptr": "*i64", "index_ptr": "*i64", "one_over_n": "fp32", "delta": "fp32"}
    types |= dict.fromkeys(("n", "first", "rows", "t_stride", "row", "stream", "tiles"), "i32")
    for name, kind, x0 in (("eps", 0, {}), ("v", 0, {"x0_ptr": p}), ("huber", 2, {"x0_ptr": p})):
        yield Case(
            f"denoising_loss/{name}/{dtype}", "denoising_loss", "denoising_loss_kernel", types | x0,
            {"KIND": kind, **tile}, (dtype,) * (1 + len(x0)), (dtype,), clamps=kind == 2, scalars=2, num_warps=warps,
            lanes=lanes,
        )  # fmt: skip
    types = {"mean1_ptr": p, "mean2_ptr": p, "log2_ptr": p, "log1_ptr": "*fp32", "one_over_n": "fp32"}
    types |= dict.fromkeys(("n", "first"), "i32")
    full = {"FULL1": False, "FULL2": True}
    yield Case(
        f"gaussian_kl/{dtype}", "gaussian_kl", "gaussian_kl_kernel", types | {"kl_ptr": "*fp32", "tiles": "i32"},
        {**full, **tile}, (dtype,) * 3, (), scalars=1, num_warps=warps, lanes=lanes,
    )  # fmt: skip
    types |= {"of_mean_ptr": p, "of_log_ptr": p, "g_ptr": "*fp32"}
    tile, warps = tile_of(SLOPE_SLOTS, lanes=lanes)
    yield Case(
        f"gaussian_kl_slopes/{dtype}", "gaussian_kl", "gaussian_kl_slopes_kernel", types, {**full, **tile},
        (dtype,) * 3, (dtype,) * 2, num_warps=warps, lanes=lanes,
    )  # fmt: skip
