"""One row of a plan: everything between two model evaluations in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff.ops import _dispatch
from fastdiff.ops._dispatch import FLOATS, INTS, check_tensor, spread
from fastdiff.ops._row import check_guidance, check_row, check_seeds, check_table
from fastdiff.plan import ROW_HEADER, row_width

FIELDS = ("c_skip", "c_ratio", "lo", "hi", "c_in_next", "has_noise", "log_var_lo", "log_var_hi")


def affine_step(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor | int,
    *,
    slots: int,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scales: Tensor | None = None,
    bound: Tensor | None = None,
    variance: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
    model_in: Tensor | None = None,
    x0: Tensor | None = None,
) -> None:
    """Runs one row of a plan on the state, in place.

        m   = uncond + w (model_out - uncond)                      with guidance, else model_out
        m   = k_c model_out + k_d (model_out - k_u uncond)         with scales
        q   = c_skip (S_0 + c_ratio m)                             S_0 and m may nearly cancel
        q   = clamp(q, -bound, bound) / bound;  m = (q - c_skip S_0) / (c_skip c_ratio)     with bound
        p   = clamp(q, lo, hi)                                     a NaN stays NaN
        S'_i = sum_j A_ij S_j + b_i p + d_i m + s_i n
        model_in = c_in_next S'_0;  x0 = p

    Args:
        state: fp32 [P, B, *sample], contiguous: P physical slots. Logical slot j is read from slot read[j] and written
            to write[j] (-1: absent, taken as 0 or dropped); logical 0 is always physical 0.
        model_out: [B, *sample], fp32, bf16 or fp16 (made contiguous if it is not).
        table: fp32 [N, W] of `Plan.pack()`, W = row_width(slots): c_skip, c_ratio, lo, hi, c_in_next, has_noise,
            log_var_lo, log_var_hi, A (row-major over logical slots), b, d, s, read, write, padding.
        row: int32 or int64, [1] or one row a sample [B], on the device (on CUDA its range is not looked at); or one
            number, which the kernel then need not load first.
        slots: logical slots, 1 to 6.   uncond: like model_out.
        guidance: fp32 w, one number or [N or 1, B or 1]: per plan row, per sample.
        scales: fp32 [B, 3] of `guidance_scales`, in the place of guidance.   bound: fp32 [B] of `threshold_bound`.
        variance: v [B, *sample] of a learned variance: n is scaled by exp((f log_var_hi + (1 - f) log_var_lo) / 2),
            f = (v + 1) / 2.
        seeds, index: int64 [B]: n = rng.normal(seeds, sample, row=row, stream=stream, index=index), drawn in the kernel
            where has_noise is not 0 (index None is 0 each).   noise: n itself, [B, *sample]; not with seeds.
            With neither, column s is not used.
        model_in: output [B, *sample], or [2B, *sample] for batched guidance (two copies), any float dtype.
        x0: fp32 output [B, *sample].
    Returns: None; state, model_in and x0 are written.
    Raises:  TypeError, ValueError: a tensor of another dtype, shape, device or layout; guidance or scales without
        uncond or the reverse, both of them; seeds with noise; index without seeds; a row outside the table (CPU).
    Numerics: fp32 arithmetic with fused multiply-adds; equals affine_step_ref in float64 within 4e-6 relative.
    """
    _check(
        state,
        model_out,
        table,
        row,
        slots,
        uncond,
        guidance,
        scales,
        bound,
        variance,
        seeds,
        index,
        noise,
        model_in,
        x0,
    )
    if state[0].numel() == 0:
        return
    if _dispatch.kernels_for(state):
        torch.ops.fastdiff.affine_step(
            state, model_out, table, None if isinstance(row, int) else row, row if isinstance(row, int) else -1, slots,
            uncond, guidance, scales, bound, variance, seeds, index, stream, noise, model_in, x0,
        )  # fmt: skip
        return
    row = torch.tensor([row], device=state.device) if isinstance(row, int) else row
    new, x, p = affine_step_ref(
        state, model_out, table, row, slots=slots, uncond=uncond, guidance=guidance, scales=scales, bound=bound,
        variance=variance, seeds=seeds, index=index, stream=stream, noise=noise,
    )  # fmt: skip
    state.copy_(new)
    if model_in is not None:
        for half in model_in.split(state.shape[1]):
            half.copy_(x)
    if x0 is not None:
        x0.copy_(p)


def affine_step_ref(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    slots: int,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scales: Tensor | None = None,
    bound: Tensor | None = None,
    variance: Tensor | None = None,
    seeds: Tensor | None = None,
    index: Tensor | None = None,
    stream: int = rng.ROWS,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affine_step` in plain torch: functional, in the dtype of `state` (float32 or float64), without host syncs.

    Returns: the new state [P, B, *sample], model_in [B, *sample] and x0 [B, *sample], all of state's dtype.
    """
    physical, batch, sample, dtype = state.shape[0], state.shape[1], state.shape[2:], state.dtype
    row = row.long()
    c = table.to(dtype)[row]  # [1 or B, W]
    column = {name: spread(c[:, i], model_out) for i, name in enumerate(FIELDS)}
    r = slots
    A = c[:, ROW_HEADER : ROW_HEADER + r * r].view(-1, r, r)
    b, d, s, read, write = c[:, ROW_HEADER + r * r : ROW_HEADER + r * r + 5 * r].view(-1, 5, r).unbind(1)
    m = model_out.to(dtype)
    if uncond is not None and guidance is not None:
        w = guidance.to(dtype).reshape(-1, guidance.shape[-1] if guidance.dim() else 1)
        w = (w[row] if w.shape[0] > 1 else w).expand(-1, batch)  # [1 or B, B]
        w = w[0] if w.shape[0] == 1 else w.diagonal()
        u = uncond.to(dtype)
        m = u + spread(w, m) * (m - u)
    elif uncond is not None and scales is not None:
        k_c, k_d, k_u = (spread(k, m) for k in scales.to(dtype).unbind(1))
        m = k_c * m + k_d * (m - k_u * uncond.to(dtype))

    z = torch.zeros((), dtype=dtype, device=state.device)
    drawn = column["has_noise"] != 0
    if noise is not None:
        z = torch.where(drawn, noise.to(dtype), z)
    elif seeds is not None:
        z = torch.where(drawn, _row_noise(seeds, index, row, stream, sample).to(dtype), z)

    if variance is not None:
        low, high = column["log_var_lo"], column["log_var_hi"]
        z = z * torch.exp(0.25 * (low + high) + 0.25 * (high - low) * variance.to(dtype))

    everyone = torch.arange(batch, device=state.device)
    old = [state[0]]
    for j in range(1, r):
        at = read[:, j].long().expand(batch)
        old.append(torch.where(spread(at >= 0, m), state[at.clamp(min=0), everyone], torch.zeros_like(m)))
    p = column["c_skip"] * (old[0] + column["c_ratio"] * m)
    if bound is not None:
        limit = spread(bound.to(dtype), m)
        p = torch.clamp(p, -limit, limit) / limit
        c_out = column["c_skip"] * column["c_ratio"]
        m = torch.where(c_out != 0, (p - column["c_skip"] * old[0]) / c_out, m)
    p = torch.clamp(p, column["lo"], column["hi"])
    slabs = list(state.unbind(0))
    for i in range(r):
        y = sum(spread(A[:, i, j], m) * old[j] for j in range(r))
        y = y + spread(b[:, i], m) * p + spread(d[:, i], m) * m + spread(s[:, i], m) * z
        if i == 0:
            first = slabs[0] = y
            continue
        for k in range(physical):
            slabs[k] = torch.where(spread(write[:, i] == k, m), y, slabs[k])
    return torch.stack(slabs), column["c_in_next"] * first, p


def _row_noise(seeds: Tensor, index: Tensor | None, row: Tensor, stream: int, sample: torch.Size) -> Tensor:
    """n [B, *sample] for one row [1] or one a sample [B]."""
    index = torch.zeros_like(seeds) if index is None else index
    return rng.row_normals(seeds, index, row, stream, sample.numel()).view(seeds.shape[0], *sample)


def _check(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor | int,
    slots: int,
    uncond: Tensor | None,
    guidance: Tensor | None,
    scales: Tensor | None,
    bound: Tensor | None,
    variance: Tensor | None,
    seeds: Tensor | None,
    index: Tensor | None,
    noise: Tensor | None,
    model_in: Tensor | None,
    x0: Tensor | None,
) -> None:
    check_tensor("state", state, dtypes=(torch.float32,), contiguous=True)
    if state.dim() < 2 or state.shape[0] < 1:
        raise ValueError(f"state must be [P, B, *sample] with P >= 1, got {tuple(state.shape)}")
    shape = tuple(state.shape[1:])
    batch = shape[0]
    check_tensor("model_out", model_out, shape=shape, like=state)
    check_table(table, slots, state)
    check_row(row, table, batch, state)
    if guidance is not None and scales is not None:
        raise ValueError("give guidance (a weight) or scales (what a rule made of it), not both")
    if (uncond is None) != (guidance is None and scales is None):
        raise ValueError(
            f"uncond and guidance (or scales) go together: uncond is {'None' if uncond is None else 'given'}, "
            f"guidance is {'None' if guidance is None and scales is None else 'given'}"
        )
    for name, x, size in (("scales", scales, (batch, 3)), ("bound", bound, (batch,))):
        if x is not None:
            check_tensor(name, x, shape=size, dtypes=(torch.float32,), like=state)
    if uncond is not None:
        check_tensor("uncond", uncond, shape=shape, like=state)
    if guidance is not None:
        check_guidance(guidance, table, batch, state)
    if seeds is not None and noise is not None:
        raise ValueError("give seeds (noise drawn in the kernel) or noise, not both")
    check_seeds(seeds, index, batch, state)
    if noise is not None:
        check_tensor("noise", noise, shape=shape, like=state)
    if variance is not None:
        check_tensor("variance", variance, shape=shape, like=state)
    if model_in is not None:
        check_tensor("model_in", model_in, dtypes=FLOATS, like=state, contiguous=True)
        if tuple(model_in.shape) not in (shape, (2 * batch, *shape[1:])):
            raise ValueError(f"model_in must be {shape} or {(2 * batch, *shape[1:])}, got {tuple(model_in.shape)}")
    if x0 is not None:
        check_tensor("x0", x0, shape=shape, dtypes=(torch.float32,), like=state, contiguous=True)


def _launch(
    state: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor | None,
    number: int,
    slots: int,
    uncond: Tensor | None,
    guidance: Tensor | None,
    scales: Tensor | None,
    bound: Tensor | None,
    variance: Tensor | None,
    seeds: Tensor | None,
    index: Tensor | None,
    stream: int,
    noise: Tensor | None,
    model_in: Tensor | None,
    x0: Tensor | None,
) -> None:
    batch, n = state.shape[1], state.shape[2:].numel()
    w = guidance if scales is None else scales
    w_row = w_batch = 0
    if w is not None:
        w = w.contiguous()
        w_row, w_batch = _dispatch.weight_strides(w)
    if seeds is not None and index is None:
        index = torch.zeros_like(seeds)
    copies = 0 if model_in is None else model_in.shape[0] // batch
    args = (
        state,
        model_out.contiguous(),
        None if uncond is None else uncond.contiguous(),
        model_in,
        x0,
        None if noise is None else noise.contiguous(),
        table,
        number if row is None else row.contiguous(),
        w,
        None if bound is None else bound.contiguous(),
        None if variance is None else variance.contiguous(),
        None if seeds is None else seeds.contiguous(),
        None if index is None else index.contiguous(),
        n,
        batch,
        _dispatch.FIRST,
        0 if row is None else int(row.numel() > 1),
        w_row,
        w_batch,
        stream,
    )
    _dispatch.launch(
        _dispatch.kernels("affine_step").affine_step_kernel,
        args,
        n,
        batch,
        slots=slots,
        SLOTS=slots,
        HEADER=ROW_HEADER,
        WIDTH=row_width(slots),
        NOISE=1 if seeds is not None else 2 if noise is not None else 0,
        GUIDED=0 if uncond is None else 1 if scales is None else 2,
        COPIES=copies,
    )


_dispatch.register(
    "affine_step(Tensor(a!) state, Tensor model_out, Tensor table, Tensor? row, int number, int slots, Tensor? uncond, "
    "Tensor? guidance, Tensor? scales, Tensor? bound, Tensor? variance, Tensor? seeds, Tensor? index, int stream, "
    "Tensor? noise, Tensor(b!)? model_in, Tensor(c!)? x0) -> ()",
    _launch,
)


def advance(row: Tensor, times: Tensor, t: Tensor) -> None:
    """Moves a step graph on by one row: row += 1 and t[:] = times[row] (past the end: the last time again).

    Args:    row: int32 or int64 [1].   times: [N] of t's dtype, one a plan row.   t: [B], the model's time, written.
    Raises:  TypeError, ValueError for tensors of another dtype, shape, device or layout.
    """
    check_tensor("row", row, shape=(1,), dtypes=INTS)
    kinds = (torch.float32, torch.int64)
    check_tensor("times", times, dtypes=kinds, like=row)
    check_tensor("t", t, dtypes=kinds, like=row, contiguous=True)
    if times.dim() != 1 or times.numel() == 0 or t.dim() != 1:
        raise ValueError(f"times must be [N] with N >= 1 and t [B], got {tuple(times.shape)} and {tuple(t.shape)}")
    if times.dtype != t.dtype:
        raise TypeError(f"times and t must have one dtype, got {times.dtype} and {t.dtype}")
    if _dispatch.kernels_for(row):
        torch.ops.fastdiff.advance(row, times, t)
    else:
        new, at = advance_ref(row, times, t)
        row.copy_(new)
        t.copy_(at)


def advance_ref(row: Tensor, times: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """`advance` in plain torch: returns the new row [1] and t [B]."""
    new = row + 1
    return new, times[new.long().clamp(max=times.shape[0] - 1)].expand_as(t)


def _launch_advance(row: Tensor, times: Tensor, t: Tensor) -> None:
    kernel, batch = _dispatch.kernels("affine_step").advance_kernel, t.shape[0]
    block = min(1024, max(128, 1 << max(batch - 1, 0).bit_length()))
    # one warp: another could read the row after this one has written it
    tile = {"BLOCK": block, "STEPS": -(-batch // block), "num_warps": 1}
    with torch.cuda.device_of(row):
        kernel[(1,)](row, times.contiguous(), t, times.shape[0], batch, **tile, enable_fp_fusion=False)


_dispatch.register("advance(Tensor(a!) row, Tensor times, Tensor(b!) t) -> ()", _launch_advance)
