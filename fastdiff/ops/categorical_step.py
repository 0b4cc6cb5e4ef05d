"""One row of a plan on categorical data: readout of the logits, Bayesian update, the network's next input."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.gumbel import gumbels
from fastdiff.ops._categorical import READOUTS, belief, check_logits, check_rows, check_width
from fastdiff.ops._dispatch import FLOATS, INTS, check_tensor, spread
from fastdiff.ops.affine_step import affine_step_ref
from fastdiff.plan import MAX_SLOTS, row_width


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
    Numerics: fp32; a NaN among a token's logits makes its state and model_in NaN and its class 0. A class agrees with
        categorical_step_ref in float64 except for ties within 4e-6.
    Source:  Graves et al. 2023, arXiv:2308.07037, section 6, on logits; Xue et al. 2024, arXiv:2404.15766.
    """
    _check(state, model_out, table, row, slots, readout, uncond, guidance, seeds, index, noise, gumbel, model_in,
           classes)  # fmt: skip
    if state[0].numel() == 0:
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
        m = u + spread(w, m) * (m - u)
    v, binary = m, sample[-1] == 1
    if readout == "sample":
        if gumbel is None:
            assert seeds is not None
            which = torch.zeros_like(seeds) if index is None else index
            gumbel = gumbels(seeds, which, row.long(), sample.numel(), logistic=binary).view(batch, *sample)
        v = m + gumbel.to(dtype)
    if binary:
        lost, k = v.isnan(), (v > 0)[..., 0].long()
        p = torch.tanh(0.5 * m) if readout == "mean" else (2 * k - 1).to(dtype)[..., None]
    else:
        lost = v.isnan().any(-1, keepdim=True)
        k = torch.where(lost[..., 0], 0, v.argmax(-1))
        named = k[..., None] == torch.arange(sample[-1], device=k.device)  # one_hot, which would look at the values
        p = torch.softmax(m, -1) if readout == "mean" else named.to(dtype)
    p = torch.where(lost, torch.nan, p)
    plain = table.to(dtype).clone()  # p as the model's output, taken as x0
    plain[:, :4] = torch.tensor([0.0, 1.0, -torch.inf, torch.inf], dtype=dtype, device=table.device)
    new, z, _ = affine_step_ref(
        state, p, plain, row, slots=slots, seeds=None if noise is not None else seeds, index=index, noise=noise
    )
    return new, belief(new[0]), k


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
    if not isinstance(slots, int) or not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be an int in 1..{MAX_SLOTS}, got {slots!r}")
    check_logits("model_out", model_out, shape=shape, like=state)
    check_tensor("table", table, dtypes=(torch.float32,), like=state, contiguous=True)
    width = row_width(slots)
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(f"table must be [N, {width}] for {slots} slots, got {tuple(table.shape)}")
    check_tensor("row", row, dtypes=INTS, like=state)
    if tuple(row.shape) not in ((1,), (batch,)):
        raise ValueError(f"row must have shape (1,) or ({batch},), got {tuple(row.shape)}")
    if not row.is_cuda and not torch.compiler.is_compiling() and row.numel():
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"row must be in 0..{table.shape[0] - 1}, got {low}..{high}")
    if (uncond is None) != (guidance is None):
        raise ValueError(
            f"uncond and guidance go together: uncond is {'None' if uncond is None else 'given'}, "
            f"guidance is {'None' if guidance is None else 'given'}"
        )
    if uncond is not None and guidance is not None:
        check_tensor("uncond", uncond, shape=shape, like=state)
        check_tensor("guidance", guidance, dtypes=(torch.float32,), like=state)
        fits = guidance.dim() == 2 and guidance.shape[0] in (1, table.shape[0]) and guidance.shape[1] in (1, batch)
        if guidance.numel() != 1 and not fits:
            raise ValueError(
                f"guidance must be one number or [{table.shape[0]} or 1, {batch} or 1], got {tuple(guidance.shape)}"
            )
    if gumbel is not None and readout != "sample":
        raise ValueError(f'gumbel goes with readout "sample", not with {readout!r}')
    if readout == "sample" and seeds is None and gumbel is None:
        raise ValueError('readout "sample" needs seeds (noise drawn in the kernel) or gumbel, got neither')
    if seeds is not None and noise is not None and (gumbel is not None or readout != "sample"):
        given = "noise is" if gumbel is None else "noise and gumbel are"
        raise ValueError(f"seeds would draw nothing: {given} given")
    if index is not None and seeds is None:
        raise ValueError("index goes with seeds, which is None")
    for name, x in (("seeds", seeds), ("index", index)):
        if x is not None:
            check_tensor(name, x, shape=(batch,), dtypes=(torch.int64,), like=state)
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
