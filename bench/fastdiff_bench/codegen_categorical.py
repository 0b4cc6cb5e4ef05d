"""The categorical kernels' cases for codegen: K = 2 (pairs), dense rows of any K, rows of one program, split rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff_bench.codegen import Case, tile_of

TOKENS = 1 << 16
SCALARS = (
    "K", "n", "tokens", "first", "row_stride", "w_row_stride", "w_batch_stride", "slot_stride", "copy_stride",
    "state_row", "model_row", "uncond_row", "in_row", "plane", "coef_stride", "row", "programs", "logits_row",
)  # fmt: skip
INTS = dict.fromkeys(SCALARS, "i32")
SEEDS = {"seed_ptr": "*i64", "index_ptr": "*i64"}
PLAN = {"table_ptr": "*fp32", "row_ptr": "*i32"}
STEPS = ((3, 1), (27, 1), (256, 1), (512, 1), (1024, 1), (4096, 1), (5003, 1), (16384, 1), (27, 2), (256, 3), (4096, 2))


def _rows(num_classes: int, lanes: int, *, heavy: bool = False) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Constexprs, fields of the case, and the windows of a row."""
    from fastdiff.ops._categorical import rows_of

    rows = rows_of(num_classes, TOKENS, heavy=heavy, lanes=lanes)
    constants = {"ROWS": rows.rows, "COLS": rows.cols, "QUADS": num_classes % 4 == 0, "VECTOR": True, "WIDE": False}
    if rows.pieces > 1:
        constants |= {"PIECES": rows.pieces, "WIDEST": rows.widest}
    fields: dict[str, Any] = {"num_warps": rows.num_warps, "lanes": lanes}
    fields["divisible"] = ("n", "K") if num_classes % 16 == 0 else ("n",)
    return constants, fields, rows.pieces


def _plan(slots: int, readout: int = 0) -> dict[str, Any]:
    from fastdiff.plan import ROW_HEADER, row_width

    return {"SLOTS": slots, "HEADER": ROW_HEADER, "WIDTH": row_width(slots), "READOUT": readout, "GUIDED": False}


def _stored(
    num_classes: int, constants: dict[str, Any], fields: dict[str, Any], stores: tuple[str, ...]
) -> dict[str, Any]:
    """Dense rows of K not a multiple of 4 end inside a vector: their stores are single numbers, all loads are not."""
    if num_classes % 4 == 0:
        return {"stores": stores}
    elements = constants["ROWS"] * constants["COLS"] // (fields["lanes"] * fields["num_warps"])
    return {"stores": (), "scalars": len(stores) * elements}


def _steps(model: str, lanes: int) -> Iterator[Case]:
    types = {"state_ptr": "*fp32", "model_ptr": f"*{model}", "model_in_ptr": f"*{model}", **PLAN, **SEEDS, **INTS}
    for num_classes, slots in STEPS:
        constants, fields, _ = _rows(num_classes, lanes, heavy=slots > 1)
        several = f"+r{slots}" if slots > 1 else ""
        yield Case(
            f"categorical_step/k{num_classes}{several}/{model}", "categorical_step", "categorical_rows_kernel", types,
            {**_plan(slots), "NOISE": 1, "GUMBEL": 1, "COPIES": 1, **constants}, loads=(model,) + ("fp32",) * slots,
            **_stored(num_classes, constants, fields, ("fp32",) * slots + (model,)), **fields,
        )  # fmt: skip
    constants, fields, _ = _rows(256, lanes)
    yield Case(
        f"categorical_step/mean/{model}", "categorical_step", "categorical_rows_kernel", types,
        {**_plan(1, 2), "NOISE": 1, "GUMBEL": 0, "COPIES": 1, **constants}, loads=(model, "fp32"),
        stores=("fp32", model), **fields,
    )  # fmt: skip
    tile, warps = tile_of(lanes=lanes)
    yield Case(
        f"categorical_step/k2/{model}", "categorical_pair", "categorical_pair_kernel", types,
        {**_plan(1), "NOISE": 1, "GUMBEL": 1, "COPIES": 1, **tile}, loads=(model, "fp32"), stores=("fp32", model),
        num_warps=warps, lanes=lanes,
    )  # fmt: skip
    for num_classes in (50257, 262144):
        yield from _split(num_classes, model, types, lanes)


def _split(num_classes: int, model: str, types: dict[str, str], lanes: int) -> Iterator[Case]:
    constants, fields, _ = _rows(num_classes, lanes)
    types = {**types, "part_ptr": "*fp32", "hits_ptr": "*i32"}
    name = "split" if num_classes % 4 == 0 else "split-dense"
    del constants["ROWS"]
    whole = {**constants, "ROWS": 1}
    read = {k: v for k, v in constants.items() if k != "WIDEST"}
    stored = _stored(num_classes, whole, fields, ("fp32",))
    stored["scalars"] = stored.get("scalars", 0) + 6  # what the windows of a token leave behind
    yield Case(
        f"categorical_step/{name}-read/{model}", "categorical_split", "categorical_read_kernel", types,
        {"READOUT": 0, "GUMBEL": 1, "GUIDED": False, **read}, loads=(model,), stores=(), scalars=3, **fields,
    )  # fmt: skip
    yield Case(
        f"categorical_step/{name}-update/{model}", "categorical_split", "categorical_update_kernel", types,
        {**_plan(1), "NOISE": 1, **constants}, loads=("fp32",), **stored, **fields,
    )  # fmt: skip
    stored = _stored(num_classes, whole, fields, (model,))
    stored["scalars"] = stored.get("scalars", 0) + 4
    yield Case(
        f"categorical_step/{name}-write/{model}", "categorical_split", "categorical_write_kernel", types,
        {"COPIES": 1, **constants}, loads=("fp32",), **stored, **fields,
    )  # fmt: skip


def _training(dtype: str, lanes: int) -> Iterator[Case]:
    from fastdiff.ops._categorical import NARROW
    from fastdiff.ops.categorical_loss import WHOLE

    p = f"*{dtype}"
    tile, warps = tile_of(lanes=lanes)
    classes = {"x_ptr": "*i64", **INTS}
    noise = {**classes, "coef_ptr": "*fp32", "out_ptr": p, **SEEDS}
    loss = {**classes, "logits_ptr": p, "error_ptr": "*fp32", "one_over_tokens": "fp32"}
    reads = {**loss, "token_ptr": "*fp32"}
    gradient = {**reads, "scale_ptr": "*fp32", "scale_stride": "i32", "grad_ptr": p}
    whole = {"PHASE": 0, "PIECES": 1, "WIDEST": 1}
    for num_classes in (27, 256, 4096, 16384):
        constants, fields, _ = _rows(num_classes, lanes)
        stored = _stored(num_classes, constants, fields, (dtype,))
        stored["scalars"] = stored.get("scalars", 0) + 2
        rows = {**fields, "indices": 16, **stored}
        yield Case(f"categorical_noise/k{num_classes}/{dtype}", "categorical_noise", "categorical_noise_kernel", noise,
                   {**whole, **constants}, loads=(), **rows)  # fmt: skip
        name, again = f"k{num_classes}/{dtype}", num_classes > NARROW or dtype == "fp32"
        types, read = (
            (reads, {**rows, "stores": (), "scalars": 8})
            if again
            else ({**loss, "grad_ptr": p}, {**rows, "scalars": 16})
        )
        yield Case(f"categorical_loss/{name}", "categorical_loss", "categorical_loss_kernel", types,
                   {**whole, **constants}, loads=(dtype,), **read)  # fmt: skip
        if again:
            yield Case(f"categorical_gradient/{name}", "categorical_loss", "categorical_gradient_kernel", gradient,
                       {**whole, **constants}, loads=(dtype,), **{**rows, "scalars": rows["scalars"] + 20})  # fmt: skip
    constants, fields, pieces = _rows(50257, lanes)
    reads["part_ptr"] = "*fp32"
    yield Case(f"categorical_loss/k50257/{dtype}", "categorical_loss", "categorical_loss_kernel", reads, constants,
               loads=(dtype,), stores=(), scalars=4, indices=16, **fields)  # fmt: skip
    widest = constants["WIDEST"]
    parts = {"PIECES": pieces, "WIDEST": widest, "ROWS": WHOLE, "COLS": widest}
    yield Case(f"categorical_error/k50257/{dtype}", "categorical_loss", "categorical_error_kernel", reads, parts,
               loads=(), stores=(), scalars=3 * 4 + 8, indices=16, num_warps=4, lanes=lanes)  # fmt: skip
    # int64 classes are read as two 16-byte vectors
    yield Case(f"categorical_noise/k2/{dtype}", "categorical_noise", "categorical_pair_noise_kernel", noise, tile,
               loads=("fp32", "fp32"), stores=(dtype,), num_warps=warps, lanes=lanes)  # fmt: skip


def _tokens(model: str, lanes: int) -> Iterator[Case]:
    """Rows that unmask: what an order needs of a token, in one window or in several."""
    from fastdiff.ops.unmask_step import windows
    from fastdiff.plan import ROW_HEADER, row_width
    from fastdiff.readout import ORDERS

    types = {
        "tokens_ptr": "*i64",
        "group_ptr": "*i32",
        "model_ptr": f"*{model}",
        **PLAN,
        **SEEDS,
        **INTS,
        "mask_id": "i32",
    }
    plan = {"HEADER": ROW_HEADER, "WIDTH": row_width(1), "COPIES": 0}
    low = () if model == "fp32" else ((27, 1), (4096, 0), (50257, 1), (126464, 2), (126464, 3))
    nuclei = () if model == "fp32" else ((4096, 0), (50257, 0), (126464, 1))
    plain = ((27, 0), (126464, 0), (126464, 1), *low)
    for num_classes, order, cut in (*((*case, False) for case in plain), *((*case, True) for case in nuclei)):
        rows = windows(num_classes, TOKENS, lanes=lanes)
        constants = {"ROWS": rows.rows, "COLS": rows.cols, "PIECES": rows.pieces, "QUADS": num_classes % 4 == 0}
        constants |= {"VECTOR": True, "WIDE": False, "ORDER": order, "GUIDED": False, "NUCLEUS": cut}
        scored = {"class_ptr": "*i32", "score_ptr": "*fp32"} if order else {}
        name = ORDERS[order] + "+nucleus" * cut
        yield Case(
            f"unmask_step/k{num_classes}+{name}/{model}", "unmask_step", "unmask_read_kernel",
            {**types, **scored}, {**plan, **constants}, loads=(model,), stores=(), scalars=16, indices=16,
            num_warps=rows.num_warps, lanes=lanes, divisible=("n", "K") if num_classes % 16 == 0 else ("n",),
        )  # fmt: skip
    if model == "fp32":
        scored = {"class_ptr": "*i32", "score_ptr": "*fp32"}
        for order, name in ((1, "place"), (3, "place+entropy")):
            yield Case(
                f"unmask_step/{name}/fp32", "unmask_step", "unmask_place_kernel", {**types, **scored},
                {**plan, "ORDER": order, "ROWS": 32, "COLS": 64}, loads=(), stores=(), scalars=40, indices=16,
                num_warps=4, lanes=lanes,
            )  # fmt: skip


def categorical_cases(lanes: int) -> Iterator[Case]:
    """The categorical kernels in the variants that matter, for warps of `lanes` threads."""
    for dtype in ("fp32", "bf16"):
        yield from _steps(dtype, lanes)
        yield from _tokens(dtype, lanes)
        yield from _training(dtype, lanes)
