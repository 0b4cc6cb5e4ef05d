"""One row of a plan on categorical data: readout of the logits, Bayesian update, the network's next input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.categorical_cpu import CompiledStep, chunks, step_in_chunks
from fastdiff.cpu import host_row
from fastdiff.gumbel import gumbels
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._categorical import (
    READOUTS,
    belief,
    check_logits,
    check_rows,
    check_width,
    row_stride,
    rows_of,
    vectors,
    with_rows,
)
from fastdiff.ops._dispatch import FLOATS, check_tensor, spread
from fastdiff.ops._row import check_guidance, check_row, check_seeds, check_table
from fastdiff.ops.affine_step import FIELDS, affine_step_ref
from fastdiff.plan import ROW_HEADER, row_width
from fastdiff.prediction import NO_SKIP

AS_X0 = {"c_skip": NO_SKIP, "c_ratio": 1 / NO_SKIP, "lo": -torch.inf, "hi": torch.inf}


def categorical_step(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    slots: int,
    readout: str,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    gumbel: Tensor | None = None,
    model_in: Tensor | None = None,
    classes: Tensor | None = None,
) -> None:
    """Runs one row of a plan on logits of categorical data, in place.

        m  = uncond + w (model_out - uncond)                     with guidance, else model_out
        k  = argmax(m + gumbel)    readout "sample", else argmax(m); ties to the first class
        p  = onehot(k)             "sample", "argmax";  p = softmax(m) for "mean"
        S'_i = sum_j A_ij S_j + b_i p + s_i n
        model_in = 2 softmax(S'_0) - 1;  classes = k

    K = 2 has one channel: the state is z_1 - z_0, model_out the logit of class 1, p = 1 or -1 (tanh(m / 2) for "mean"),
    gumbel a logistic number, model_in = tanh(S'_0 / 2); the plan's s carries the sqrt(2) of a difference.

    Args:
        state: fp32 [P, B, *D, K'], K' = K (1 for K = 2): P physical slots as in affine_step; rows evenly spaced
            (contiguous, or from categorical_buffer).
        model_out: [B, *D, K'], fp32, bf16 or fp16 logits, any strides.   uncond: like model_out.
        table, row, slots, guidance: as in affine_step; of the row, c_skip, c_out, lo, hi, c_in_next and d are not used.
        readout: "sample", "argmax" or "mean".
        seeds, index: int64 [B]: n = rng.normal(seeds, (*D, K'), row=row, stream=1, index=index) where the row has
            noise, and the Gumbel noise of stream 2 (fastdiff.gumbel), drawn in the kernel.
        noise: n itself, gumbel: the Gumbel (K = 2: logistic) noise itself, [B, *D, K']; each replaces that draw.
        model_in: output [B, *D, K'], or [2B, *D, K'] for batched guidance (two copies), any float dtype.
        classes: int64 output [B, *D].
    Returns: None; state, model_in and classes are written.
    Raises:  TypeError, ValueError: a tensor of another dtype, shape, device or layout; K' = 0 or 2; an unknown readout;
        guidance without uncond or the reverse; readout "sample" without seeds or gumbel; index without seeds; seeds
        that nothing would use; a row outside the table (on the CPU).
    Numerics: fp32; a NaN among a token's logits makes its state and model_in NaN and its class 0; -inf forbids a class
        (with guidance: in both). A class agrees with categorical_step_ref in float64 except for ties within 4e-6.
    Source:  Graves et al. 2023, arXiv:2308.07037, section 6, on logits; Xue et al. 2024, arXiv:2404.15766.
    """
    _check(state, model_out, table, row, slots, readout, uncond, guidance, seeds, index, noise, gumbel, model_in,
           classes)  # fmt: skip
    if state[0].numel() == 0:
        return
    if _dispatch.kernels_for(state):
        torch.ops.fastdiff.categorical_step(
            state, model_out, table, row, slots, READOUTS.index(readout), uncond, guidance, seeds, index, noise, gumbel,
            model_in, classes,
        )  # fmt: skip
        return
    if not torch.compiler.is_compiling():
        _step_on_cpu(state, model_out, table, row, slots, readout, uncond, guidance, seeds, index, noise, gumbel,
                     model_in, classes)  # fmt: skip
        return
    new, x, k = categorical_step_ref(
        state, model_out, table, row, slots=slots, readout=readout, uncond=uncond, guidance=guidance, seeds=seeds,
        index=index, noise=noise, gumbel=gumbel,
    )  # fmt: skip
    state.copy_(new)
    if model_in is not None:
        for half in model_in.split(state.shape[1]):
            half.copy_(x)
    if classes is not None:
        classes.copy_(k)


def categorical_step_ref(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    slots: int,
    readout: str,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    gumbel: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`categorical_step` in plain torch: functional, in the dtype of `state` (float32 or float64), no host syncs.

    Returns: the new state [P, B, *D, K'], model_in [B, *D, K'], both of state's dtype, and classes int64 [B, *D].
    """
    batch, sample, dtype = state.shape[1], state.shape[2:], state.dtype
    m = model_out.to(dtype)
    if uncond is not None and guidance is not None:
        w = guidance.to(dtype).reshape(-1, guidance.shape[-1] if guidance.dim() else 1)
        w = (w[row.long()] if w.shape[0] > 1 else w).expand(-1, batch)  # [1 or B, B]
        w = w[0] if w.shape[0] == 1 else w.diagonal()
        u = uncond.to(dtype)
        m = torch.where(m == u, m, u + spread(w, m) * (m - u))  # two of -inf are a class forbidden by both
    v, binary = m, sample[-1] == 1
    if readout == "sample":
        if gumbel is None:
            assert seeds is not None
            which = torch.zeros_like(seeds) if index is None else index
            gumbel = gumbels(seeds, which, row.long(), sample.numel(), logistic=binary).view(batch, *sample)
        v = m + gumbel.to(dtype)
    if binary:
        top, k = v, (v > 0).long()
        p = (2 * k - 1).to(dtype)
    else:
        each = torch.arange(sample[-1], device=m.device)
        top = v.amax(-1, keepdim=True)
        # the first class that is not below the largest, and class 0 where that is NaN; as a minimum it vectorises
        k = torch.where(v < top, sample[-1], each).amin(-1, keepdim=True)
        p = (each == k).to(dtype)
    if readout == "mean":
        p = torch.tanh(0.5 * m) if binary else torch.softmax(m, -1)
    p = torch.where(top.isnan(), torch.nan, p)
    plain = table.to(dtype).clone()  # p as the model's output, taken as x0
    for name, value in AS_X0.items():
        plain[:, FIELDS.index(name)] = value
    plain[:, ROW_HEADER + slots * (slots + 1) : ROW_HEADER + slots * (slots + 2)] = 0
    new, _, _ = affine_step_ref(
        state, p, plain, row, slots=slots, seeds=None if noise is not None else seeds, index=index, noise=noise
    )
    return new, belief(new[0]), k[..., 0]


@torch.no_grad()
def _step_on_cpu(
    state: Tensor, model_out: Tensor, table: Tensor, row: Tensor, slots: int, readout: str, uncond: Tensor | None,
    guidance: Tensor | None, seeds: Tensor | None, index: Tensor | None, noise: Tensor | None, gumbel: Tensor | None,
    model_in: Tensor | None, classes: Tensor | None,
) -> None:  # fmt: skip
    """In place, by the C++ loop or else a chunk at a time."""
    given = {"uncond": uncond, "guidance": guidance, "seeds": seeds, "index": index, "noise": noise, "gumbel": gumbel}
    if _fused.wanted(model_out, row, *(v for v in given.values() if v is not None)) and CompiledStep(
        state, model_in, classes, table.contiguous(), slots
    )(readout, row, model_out, **given):
        return
    batch, width = state.shape[1], state.shape[-1]

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(x.shape[0], -1, width)

    held = state.view(*state.shape[:2], -1, width)
    copies = [] if model_in is None else list(model_in.view(-1, batch, held.shape[2], width))
    draws = None if seeds is None else (seeds, torch.zeros_like(seeds) if index is None else index)
    hits = None if classes is None else classes.view(batch, -1)
    parts = chunks(batch, held.shape[2], width, single=row.numel() > 1)
    for at in [row] if row.numel() == 1 else row.unique().view(-1, 1):
        w = None
        if guidance is not None:
            w = guidance.reshape(-1, guidance.shape[-1] if guidance.dim() else 1)
            w = (w[at.long()] if w.shape[0] > 1 else w).view(-1, 1, 1)
        step_in_chunks(
            host_row(table[int(at)].tolist(), slots), at.long(), held, flat(model_out), readout,  # type: ignore[arg-type]
            uncond=flat(uncond), w=w, draws=draws, noise=flat(noise), gumbel=flat(gumbel), copies=copies, classes=hits,
            parts=[p for p in parts if row.numel() == 1 or bool((row[p.b0 : p.b1] == at).all())],
        )  # fmt: skip


def _check(
    state: Tensor, model_out: Tensor, table: Tensor, row: Tensor, slots: int, readout: str, uncond: Tensor | None,
    guidance: Tensor | None, seeds: Tensor | None, index: Tensor | None, noise: Tensor | None, gumbel: Tensor | None,
    model_in: Tensor | None, classes: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("state", state, dtypes=(torch.float32,))
    if state.dim() < 3 or state.shape[0] < 1:
        raise ValueError(f"state must be [P, B, *D, K'] with P >= 1, got {tuple(state.shape)}")
    check_width("state", state.shape[-1])
    shape = tuple(state.shape[1:])
    batch = shape[0]
    check_rows("state", state, state.shape, state, (torch.float32,))
    if readout not in READOUTS:
        raise ValueError(f"unknown readout {readout!r}; valid: {', '.join(READOUTS)}")
    check_logits("model_out", model_out, shape=shape, like=state)
    check_table(table, slots, state)
    check_row(row, table, batch, state)
    if (uncond is None) != (guidance is None):
        raise ValueError(
            f"uncond and guidance go together: uncond is {'None' if uncond is None else 'given'}, "
            f"guidance is {'None' if guidance is None else 'given'}"
        )
    if uncond is not None:
        check_tensor("uncond", uncond, shape=shape, like=state)
    if guidance is not None:
        check_guidance(guidance, table, batch, state)
    if gumbel is not None and readout != "sample":
        raise ValueError(f'gumbel goes with readout "sample", not with {readout!r}')
    if readout == "sample" and seeds is None and gumbel is None:
        raise ValueError('readout "sample" needs seeds (noise drawn in the kernel) or gumbel, got neither')
    if seeds is not None and noise is not None and (gumbel is not None or readout != "sample"):
        given = "noise is" if gumbel is None else "noise and gumbel are"
        raise ValueError(f"seeds would draw nothing: {given} given")
    check_seeds(seeds, index, batch, state)
    for name, x in (("noise", noise), ("gumbel", gumbel)):
        if x is not None:
            check_tensor(name, x, shape=shape, like=state)
    if model_in is not None:
        check_tensor("model_in", model_in, dtypes=FLOATS, like=state)
        if tuple(model_in.shape) not in (shape, (2 * batch, *shape[1:])):
            raise ValueError(f"model_in must be {shape} or {(2 * batch, *shape[1:])}, got {tuple(model_in.shape)}")
        check_rows("model_in", model_in, model_in.shape, state, FLOATS)
    if classes is not None:
        check_tensor("classes", classes, shape=shape[:-1], dtypes=(torch.int64,), like=state, contiguous=True)


def _launch(
    state: Tensor, model_out: Tensor, table: Tensor, row: Tensor, slots: int, readout: int, uncond: Tensor | None,
    guidance: Tensor | None, seeds: Tensor | None, index: Tensor | None, noise: Tensor | None, gumbel: Tensor | None,
    model_in: Tensor | None, classes: Tensor | None,
) -> None:  # fmt: skip
    batch, width = state.shape[1], state.shape[-1]
    tokens = state.shape[2:-1].numel()
    w_row = w_batch = 0
    if guidance is not None and guidance.numel() > 1:
        guidance = guidance.contiguous()
        w_row = guidance.shape[1] if guidance.shape[0] > 1 else 0
        w_batch = 1 if guidance.shape[1] > 1 else 0
    if seeds is not None and index is None:
        index = torch.zeros_like(seeds)
    seeds, index, noise, gumbel = (None if v is None else v.contiguous() for v in (seeds, index, noise, gumbel))
    model_out, uncond = with_rows(model_out), None if uncond is None else with_rows(uncond)
    weights = (_dispatch.FIRST, int(row.numel() > 1), w_row, w_batch)
    row = row.contiguous()
    copies = 0 if model_in is None else model_in.shape[0] // batch
    slot_stride = batch * tokens * (row_stride(state) or 0)
    strides = [row_stride(v) or 0 for v in (state, model_out, uncond, model_in) if v is not None]
    at = iter(strides)
    state_row, model_row, uncond_row, in_row = (
        next(at) if v is not None else 0 for v in (state, model_out, uncond, model_in)
    )
    plan: dict[str, Any] = {"SLOTS": slots, "HEADER": ROW_HEADER, "WIDTH": row_width(slots), "READOUT": readout}
    plan |= {"NOISE": 2 if noise is not None else int(seeds is not None), "GUIDED": uncond is not None}
    drawn: dict[str, Any] = {"GUMBEL": 2 if gumbel is not None else int(readout == 0)}
    lanes = 64 if torch.version.hip else 32
    if width == 1:
        args: tuple[object, ...] = (state, model_out, uncond, model_in, classes, noise, gumbel, table, row, guidance)
        args = (*args, seeds, index, tokens, *weights, slot_stride, batch * tokens)
        kernel = _dispatch.kernels("categorical_pair").categorical_pair_kernel
        _dispatch.launch(kernel, args, tokens, batch, slots=slots, COPIES=copies, **plan, **drawn)
        return
    rows = rows_of(width, tokens, heavy=slots > 1, lanes=lanes)
    vector = vectors(width, tokens, [*strides, slot_stride] if width % 4 == 0 else strides)
    shape: dict[str, Any] = {"COLS": rows.cols, "QUADS": width % 4 == 0, "VECTOR": vector, "num_warps": rows.num_warps}
    shape["WIDE"] = rows.reach(tokens, max([width, *strides])) >= 2**31
    if rows.pieces == 1:
        args = (state, model_out, uncond, model_in, classes, noise, gumbel, table, row, guidance, seeds, index, width)
        args = (*args, tokens, *weights, slot_stride, batch * tokens * in_row, state_row, model_row, uncond_row, in_row)
        kernel = _dispatch.kernels("categorical_step").categorical_rows_kernel
        programs = -(-tokens // rows.rows)
        _dispatch.run(kernel, args, programs, batch, ROWS=rows.rows, COPIES=copies, **plan, **drawn, **shape)
        return
    kernels, programs, plane = (
        _dispatch.kernels("categorical_split"),
        tokens * rows.pieces,
        batch * tokens * rows.pieces,
    )
    part = torch.empty(4, plane, dtype=torch.float32, device=state.device)
    hits = torch.empty(plane, dtype=torch.int32, device=state.device)
    shape["PIECES"] = rows.pieces
    args = (model_out, uncond, gumbel, part, hits, row, guidance, seeds, index, width, tokens, *weights, plane)
    _dispatch.run(
        kernels.categorical_read_kernel, (*args, model_row, uncond_row), programs, batch, READOUT=readout,
        GUIDED=uncond is not None, **drawn, **shape,
    )  # fmt: skip
    args = (state, model_out, uncond, classes, noise, part, hits, table, row, guidance, seeds, index, width, tokens)
    args = (*args, *weights, slot_stride, plane, state_row, model_row, uncond_row)
    _dispatch.run(kernels.categorical_update_kernel, args, programs, batch, WIDEST=rows.widest, **plan, **shape)
    if model_in is not None:
        args = (
            state,
            model_in,
            part,
            width,
            tokens,
            _dispatch.FIRST,
            batch * tokens * in_row,
            plane,
            state_row,
            in_row,
        )
        kernel = kernels.categorical_write_kernel
        _dispatch.run(kernel, args, programs, batch, COPIES=copies, WIDEST=rows.widest, **shape)


_dispatch.register(
    "categorical_step(Tensor(a!) state, Tensor model_out, Tensor table, Tensor row, int slots, int readout, "
    "Tensor? uncond, Tensor? guidance, Tensor? seeds, Tensor? index, Tensor? noise, Tensor? gumbel, "
    "Tensor(b!)? model_in, Tensor(c!)? classes) -> ()",
    _launch,
)
