"""One row of a plan of tokens: masked ones become classes, at random or the surest first, or others masked again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import native, race, rng
from fastdiff.devices import widest
from fastdiff.gumbel import gumbel_of
from fastdiff.native import TYPES
from fastdiff.ops import _dispatch, _fused
from fastdiff.ops._categorical import Rows, row_stride, rows_of, vectors, with_rows
from fastdiff.ops._dispatch import FLOATS, check_tensor, weight_strides
from fastdiff.ops._row import check_guidance, check_row, check_seeds, check_table
from fastdiff.plan import ROW_HEADER, row_width
from fastdiff.readout import ORDERS

CHOICE = 5  # the stream that chooses tokens
LOWEST, HIGHEST = -3.0e38, 3.0e38  # the scores of tokens that cannot be read out, and of infinite logits
ROUNDING = 2.0**-21  # what fp32 may take from 1 - b
WIDTH = row_width(1)
WINDOW = 1 << 13  # positions of a token that a program reads at once, 16 a thread
CHUNK = 1 << 20  # logits that are read at once on a CPU


def unmask_step(
    tokens: Tensor,
    model_out: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    mask: int,
    order: str = "random",
    group: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    seeds: Tensor,
    index: Tensor | None = None,
    model_in: Tensor | None = None,
    nucleus: bool = False,
) -> None:
    """Runs one row of a plan of tokens, in place.

        m = uncond + w (model_out - uncond)          with guidance, else model_out; of the mask itself -inf
        k drawn from softmax(m / s)                  by fastdiff.race; argmax m where s = 0, ties to the first class;
                                                     with nucleus of its likeliest classes, which hold c_out (top-p)
        random:  mask -> k where u <= b;             k -> mask where u > A;   u uniform in (0, 1]
        else:    of M masked tokens all but floor(M (1 - b)) become k: those with the largest score, ties to the first:
                 confidence ln(p_k / (1 - p_k)), margin q = p_1 - p_2 as ln(q / (1 - q)), entropy sum p ln p;
                 and so do all whose score is above hi (of entropy: before which the scores sum to hi or more);
                 with c_skip > 0 the scores are ln p_k, ln q and sum p ln p, plus c_skip g', g' Gumbel noise

    A, b, d, s, c_skip, c_out, hi are the row's; p = softmax(m). Tokens of another group than d stay what they are.
    Args:
        tokens: int64 [B, *D], classes 0..K-1 or mask; contiguous.   model_out: [B, *D, K], fp32, bf16 or fp16 logits,
            any strides.   uncond: like model_out.   table, row: [N, W] of a plan with one slot, int [1] or [B].
        mask: the id of a masked token, whose own logit, if there is one, counts as -inf.   order: "random",
            "confidence", "margin" or "entropy".
        group: int32 [B, *D], the block of a token, negative where it is given; None is 0 everywhere.
        guidance: fp32, one number or [N or 1, B or 1].   seeds, index: int64 [B]: k is drawn by numbers of stream 2,
            u and g' are those of stream 5, one a token.
        model_in: int64 output [B, *D], or [2B, *D] (two copies): what the model sees next.
        nucleus: whether c_out is looked at: whether some row of the table has c_out < 1.
    Returns: None; tokens and model_in are written.
    Raises:  TypeError, ValueError: a tensor of another dtype, shape, device or layout; an unknown order; guidance
        without uncond or the reverse; a negative mask; a row outside the table (on the CPU).
    Numerics: fp32; a token with a NaN among its logits, or with none above -inf, stays masked; one with an infinite
        logit is the surest. Classes agree with unmask_step_ref in float64 but for ties within 4e-6.
    Source:  Sahoo et al. 2024, arXiv:2406.07524, eq. 7; Wang et al. 2025, arXiv:2503.00307; Chang et al. 2022,
        arXiv:2202.04200; Holtzman et al. 2019, arXiv:1904.09751 (top-p).
    """
    _check(tokens, model_out, table, row, mask, order, group, uncond, guidance, seeds, index, model_in)
    if tokens.numel() == 0:
        return
    if group is None:
        group = torch.zeros(tokens.shape, dtype=torch.int32, device=tokens.device)
    if _dispatch.kernels_for(tokens):
        torch.ops.fastdiff.unmask_step(
            tokens, model_out, table, row, mask, ORDERS.index(order), group, uncond, guidance, seeds, index, model_in,
            nucleus,
        )  # fmt: skip
        return
    _step_on_cpu(tokens, model_out, table, row, mask, order, group, uncond, guidance, seeds, index, model_in, nucleus)


def unmask_step_ref(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, *, mask: int, order: str = "random",
    group: Tensor | None = None, uncond: Tensor | None = None, guidance: Tensor | None = None, seeds: Tensor,
    index: Tensor | None = None, nucleus: bool = False, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`unmask_step` in plain torch: functional, the logits in `dtype` (float32 or float64), without host syncs.

    Returns: the new tokens, int64 [B, *D].
    """
    if group is None:
        group = torch.zeros(tokens.shape, dtype=torch.int32, device=tokens.device)
    return _step(
        tokens, model_out, table, row, mask, order, group, uncond, guidance, seeds, index, nucleus, every=True,
        dtype=dtype,
    )  # fmt: skip


def _step_on_cpu(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, mask: int, order: str, group: Tensor,
    uncond: Tensor | None, guidance: Tensor | None, seeds: Tensor, index: Tensor | None, model_in: Tensor | None,
    nucleus: bool,
) -> None:  # fmt: skip
    if _by_loop(tokens, model_out, table, row, mask, order, group, uncond, guidance, seeds, index, model_in, nucleus):
        return
    every = torch.compiler.is_compiling()
    new = _step(tokens, model_out, table, row, mask, order, group, uncond, guidance, seeds, index, nucleus, every=every)
    tokens.copy_(new)
    if model_in is not None:
        for half in model_in.split(len(tokens)):
            half.copy_(new)


def _by_loop(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, mask: int, order: str, group: Tensor,
    uncond: Tensor | None, guidance: Tensor | None, seeds: Tensor, index: Tensor | None, model_in: Tensor | None,
    nucleus: bool,
) -> bool:  # fmt: skip
    """The C++ loop; False where it does not run."""
    given = [
        v for v in (tokens, model_out, table, row, group, uncond, guidance, seeds, index, model_in) if v is not None
    ]
    if not (_fused.wanted(model_out) and native.usable(*given)):
        return False
    batch, length, width = len(tokens), tokens[0].numel(), model_out.shape[-1]
    m, u = model_out.detach().contiguous(), None if uncond is None else uncond.detach().contiguous()
    w = None if guidance is None else guidance.contiguous()
    w_row, w_each = (0, 0) if w is None else weight_strides(w)
    which = torch.zeros_like(seeds) if index is None else index.contiguous()
    return native.run(
        "unmask", "unmask_row", tokens, group, m, u, w, table, row.long().contiguous(), seeds.contiguous(), which,
        model_in, 0 if model_in is None else len(model_in) // batch, mask, ORDERS.index(order), batch, length, width,
        WIDTH, ROW_HEADER, w_row, w_each, int(row.numel() > 1), int(nucleus), TYPES[m.dtype],
        TYPES[(m if u is None else u).dtype], native.threads(m.numel(), heavy=True),
    )  # fmt: skip


@torch.no_grad()
def _step(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, mask: int, order: str, group: Tensor,
    uncond: Tensor | None, guidance: Tensor | None, seeds: Tensor, index: Tensor | None, nucleus: bool, *, every: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The new tokens. every: read all of them, with the same operations whatever they hold."""
    batch, length = len(tokens), tokens[0].numel()
    held, blocks = tokens.reshape(batch, length), group.reshape(batch, length)
    at = row.long().expand(batch)
    keep, b, block, s = table[at][:, ROW_HEADER : ROW_HEADER + 4, None].unbind(1)  # [B, 1]
    heat, share, hi = table[at, 0, None], table[at, 1, None], table[at, 3, None]
    which = torch.zeros_like(seeds) if index is None else index
    free = blocks == block.int()
    chosen = free & (held == mask)
    if order == "random":
        u = uniforms(seeds, which, at, CHOICE, length)
        again = free & (held != mask) & (u > keep)
        chosen = chosen & (u <= b)
    flat = torch.arange(batch * length, device=tokens.device) if every else chosen.view(-1).nonzero()[:, 0]
    logits = (model_out, uncond) if uncond is not None else (model_out,)
    wide = [v.reshape(batch * length, -1) for v in logits]
    w = None
    if guidance is not None:
        w = guidance.reshape(-1, guidance.shape[-1] if guidance.dim() else 1)
        w = (w[at] if w.shape[0] > 1 else w.expand(batch, -1)).to(dtype)
        w = w[:, 0] if w.shape[1] == 1 else w.diagonal()
    hit = torch.full((batch * length,), mask, dtype=torch.int64, device=tokens.device)
    score = torch.full((batch * length,), -torch.inf, dtype=dtype, device=tokens.device)
    for part in [flat] if every else flat.split(max(1, CHUNK // wide[0].shape[1])):
        sample, d = part // length, part % length
        m = wide[0][part].to(dtype)
        if w is not None:
            v = wide[1][part].to(dtype)
            m = torch.where(m == v, m, v + w[sample, None] * (m - v))
        if mask < m.shape[1]:
            m[:, mask] = -torch.inf
        k, known = _first_largest(m, mask)
        scale = s[sample, 0].to(dtype)
        if every or bool((scale != 0).any()):
            drawn = race.numbers(seeds[sample], which[sample], at[sample], d, m.shape[1])
            scale = torch.where(scale == 0, 1.0, scale)
            v = m
            if nucleus:
                least = race.nucleus(m, scale, share[sample, 0].to(dtype))
                v = m.masked_fill(m < least[:, None], -torch.inf)
            one = race.classes(v, scale, d, *drawn)
            k = torch.where(known & (s[sample, 0] != 0), one, k)
        hit[part] = k
        if order != "random":
            sure = torch.where(m.amax(1) == torch.inf, HIGHEST, _score(m, k, order))
            score[part] = torch.where(known & (sure >= LOWEST), sure.clamp_max(HIGHEST), LOWEST)
    hit, score = hit.view(batch, length), score.view(batch, length)
    if order == "random":
        new = torch.where(again, mask, torch.where(chosen, hit, held))
    else:
        if every or bool((heat != 0).any()):
            noise = gumbel_of(_words(seeds, which, at, CHOICE, length)).to(dtype)
            score = _shaken(score, heat, noise, order)
        score = torch.where(chosen, score, -torch.inf)
        masked = chosen.sum(1, keepdim=True)
        kept = torch.floor(masked.float() * (1.0 - b + ROUNDING))
        places = score.argsort(dim=1, descending=True, stable=True)
        ranks = places.argsort(dim=1)
        sure = score > hi
        if order == "entropy":
            spent = score.gather(1, places)[:, :-1].clamp_max(0.0)
            spent = spent.cumsum(1, dtype=widest(spent.device))
            sure = torch.nn.functional.pad(spent, (1, 0)).gather(1, ranks) >= hi
        new = torch.where(chosen & ((ranks < masked - kept) | sure), hit, held)
    return new.view(tokens.shape)


def uniforms(seeds: Tensor, index: Tensor, rows: Tensor, stream: int, n: int) -> Tensor:
    """Uniform numbers in (0, 1]: i 2^-32 + 2^-33 of Philox's words. seeds, index, rows int64 [B] -> fp32 [B, n]."""
    return _words(seeds, index, rows, stream, n).to(torch.float32) * 2.0**-32 + 2.0**-33


def _words(seeds: Tensor, index: Tensor, rows: Tensor, stream: int, n: int) -> Tensor:
    counter = torch.arange((n + 3) // 4, device=seeds.device)
    c2 = torch.full((), stream, dtype=torch.int64, device=seeds.device)
    words = rng.philox(counter, rows[:, None], c2, index[:, None], (seeds & rng.MASK)[:, None], (seeds >> 32)[:, None])
    return torch.stack(words, -1).flatten(-2)[:, :n]


def _first_largest(v: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """The first of the largest, or the mask where a number is NaN or all are -inf; and where there is one."""
    top = v.amax(1, keepdim=True)
    each = torch.arange(v.shape[1], device=v.device)
    k = torch.where(v < top, v.shape[1], each).amin(1)
    known = (top > -torch.inf)[:, 0]
    return torch.where(known, k, mask), known


def _score(m: Tensor, k: Tensor, order: str) -> Tensor:
    """How sure tokens are, [T]: sums leave out the class they are relative to, so that nothing cancels."""
    top, first = m.max(1, keepdim=True)
    k = k.clamp_max(m.shape[1] - 1)[:, None] if order == "confidence" else first
    e = torch.exp(m - top).scatter(1, k, 0.0)
    rest = e.sum(1)
    if order == "confidence":
        return m.gather(1, k)[:, 0] - top[:, 0] - torch.log(rest)
    if order == "margin":
        gap = e.amax(1)
        return torch.log((1.0 - gap) / (rest + gap))
    weighted = torch.where(e > 0, e * (m - top), 0.0).sum(1)
    return weighted / (1.0 + rest) - torch.log1p(rest)


def _shaken(score: Tensor, heat: Tensor, noise: Tensor, order: str) -> Tensor:
    """Scores with noise: those that are ln(p / (1 - p)) as ln p. The surest and the least sure are what they are."""
    if order != "entropy":
        plain = score.clamp_max(0.0) - torch.log1p(torch.exp(-score.abs()))
    else:
        plain = score
    fixed = (heat == 0) | (score == HIGHEST) | (score == LOWEST)
    return torch.where(fixed, score, (plain + heat * noise).clamp(LOWEST, HIGHEST))


def _check(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, mask: int, order: str, group: Tensor | None,
    uncond: Tensor | None, guidance: Tensor | None, seeds: Tensor, index: Tensor | None, model_in: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("tokens", tokens, dtypes=(torch.int64,), contiguous=True)
    if tokens.dim() < 2:
        raise ValueError(f"tokens must be [B, *D], got {tuple(tokens.shape)}")
    shape = tuple(tokens.shape)
    check_tensor("model_out", model_out, dtypes=FLOATS, like=tokens)
    if model_out.shape[:-1] != shape or model_out.shape[-1] < 2:
        raise ValueError(f"model_out must be {shape} and K >= 2 logits, got {tuple(model_out.shape)}")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; valid: {', '.join(ORDERS)}")
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < 2**31:
        raise ValueError(f"mask must be an integer in 0..2**31 - 1, got {mask!r}")
    if not isinstance(row, Tensor):
        raise TypeError(f"row must be an int Tensor [1] or [B], got {type(row).__name__}")
    check_table(table, 1, tokens)
    check_row(row, table, shape[0], tokens)
    if (uncond is None) != (guidance is None):
        raise ValueError(
            f"uncond and guidance go together: uncond is {'None' if uncond is None else 'given'}, "
            f"guidance is {'None' if guidance is None else 'given'}"
        )
    if uncond is not None:
        check_tensor("uncond", uncond, shape=model_out.shape, like=tokens)
    if guidance is not None:
        check_guidance(guidance, table, shape[0], tokens)
    if group is not None:
        check_tensor("group", group, shape=shape, dtypes=(torch.int32,), like=tokens, contiguous=True)
    if seeds is None:
        raise ValueError("an unmask step needs seeds, got None")
    check_seeds(seeds, index, shape[0], tokens)
    if model_in is not None:
        check_tensor("model_in", model_in, dtypes=(torch.int64,), like=tokens, contiguous=True)
        if tuple(model_in.shape) not in (shape, (2 * shape[0], *shape[1:])):
            raise ValueError(f"model_in must be {shape} or {(2 * shape[0], *shape[1:])}, got {tuple(model_in.shape)}")


def windows(num_classes: int, tokens: int, *, lanes: int = 32) -> Rows:
    """The windows of tokens of K classes: a program reads all of a token, the wide ones a window at a time."""
    rows = rows_of(num_classes, tokens, lanes=lanes)
    if rows.cols < race.GROUP:
        rows = rows_of(race.GROUP, tokens, lanes=lanes)
    if rows.cols * rows.pieces <= WINDOW:
        return rows
    return Rows(1, WINDOW, -(-(num_classes + 3) // WINDOW), WINDOW // 16 // lanes)


def _launch(
    tokens: Tensor, model_out: Tensor, table: Tensor, row: Tensor, mask: int, order: int, group: Tensor,
    uncond: Tensor | None, guidance: Tensor | None, seeds: Tensor, index: Tensor | None, model_in: Tensor | None,
    nucleus: bool,
) -> None:  # fmt: skip
    batch, length, width = len(tokens), tokens[0].numel(), model_out.shape[-1]
    guidance = None if guidance is None else guidance.contiguous()
    w_row, w_batch = (0, 0) if guidance is None else weight_strides(guidance)
    index = torch.zeros_like(seeds) if index is None else index.contiguous()
    seeds, row = seeds.contiguous(), row.contiguous()
    model_out, uncond = with_rows(model_out), None if uncond is None else with_rows(uncond)
    strides = [row_stride(v) or 0 for v in (model_out, uncond) if v is not None]
    rows = windows(width, length, lanes=64 if torch.version.hip else 32)
    picked = seen = None
    if order:
        picked = torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device)
        seen = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    copies = 0 if model_in is None else len(model_in) // batch
    row_step, plan = int(row.numel() > 1), {"HEADER": ROW_HEADER, "WIDTH": WIDTH, "COPIES": copies}
    shape: dict[str, Any] = {"ROWS": rows.rows, "COLS": rows.cols, "PIECES": rows.pieces, "QUADS": width % 4 == 0}
    shape |= {"VECTOR": vectors(width, length, strides), "WIDE": rows.reach(length, max([width, *strides])) >= 2**31}
    kernels = _dispatch.kernels("unmask_step")
    args: tuple[object, ...] = (tokens, group, model_out, uncond, model_in, picked, seen, table, row, guidance, seeds)
    args = (*args, index, width, length, _dispatch.FIRST, mask, row_step, w_row, w_batch, tokens.numel(), strides[0])
    _dispatch.run(
        kernels.unmask_read_kernel, (*args, strides[-1]), -(-length // rows.rows), batch, ORDER=order,
        GUIDED=uncond is not None, NUCLEUS=nucleus, num_warps=rows.num_warps, **plan, **shape,
    )  # fmt: skip
    if order:
        args = (tokens, model_in, picked, seen, table, row, length, _dispatch.FIRST, row_step, tokens.numel())
        _dispatch.run(
            kernels.unmask_place_kernel, args, -(-length // 32), batch, ORDER=order, ROWS=32, COLS=64, num_warps=4,
            **plan,
        )  # fmt: skip


_dispatch.register(
    "unmask_step(Tensor(a!) tokens, Tensor model_out, Tensor table, Tensor row, int mask, int order, Tensor group, "
    "Tensor? uncond, Tensor? guidance, Tensor seeds, Tensor? index, Tensor(b!)? model_in, bool nucleus) -> ()",
    _launch,
)
