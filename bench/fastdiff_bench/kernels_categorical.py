"""The kernels of classes: the step, noising and the loss of Bayesian flows, and masked diffusion's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff as fd
from fastdiff import ops
from fastdiff_bench.textbook import compiled, drawn
from fastdiff_bench.textbook_tokens import likeliest
from fastdiff_bench.timing import rotation
from fastdiff_bench.work import Column, Work, finish, gap, graded, randn

__all__ = ["categorical_loss", "categorical_noise", "categorical_step", "unmask_step"]

CLASSES = 32
VOCABULARY = 256  # of masked tokens


def categorical_step(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], *,
                     classes: int = CLASSES) -> Work:  # fmt: skip
    """A row of a discrete Bayesian flow: a class drawn, the logits moved, 2 theta - 1 written for the model."""
    plan = fd.solvers.bfn_discrete(fd.schedules.BFNDiscrete(3.0, classes), 20)
    k, tokens = plan.nfe // 2, max(1, elements // classes)
    shape = (1, tokens, classes)
    table, row = plan.pack(device), torch.full((1,), k, dtype=torch.int32, device=device)
    seeds, index = fd.rng.keys(0, batch=1, device=device)
    size = torch.finfo(dtype).bits // 8
    moved = float(plan.bytes_per_element(model_bytes=size)[k])
    sets = []
    for i in range(rotation(int(moved * elements), device)):
        state = ops.categorical_buffer((plan.allocate().physical, *shape), torch.float32, device)
        state.copy_(randn(state.shape, device, torch.float32, i))
        sets.append((state, randn(shape, device, dtype, i + 1), ops.categorical_buffer(shape, dtype, device)))
    work = Work("categorical_step", schedule, elements, str(dtype), moved, sets, {})
    textbook = textbook_step(float(plan.b[k, 0]), float(plan.s[k, 0]))

    def ours(state: Tensor, m: Tensor, seen: Tensor) -> None:
        ops.categorical_step(
            state, m, table, row, slots=plan.slots, readout="sample", seeds=seeds, index=index, model_in=seen
        )

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    state, m, seen = sets[0][0].clone(), sets[0][1], torch.empty_like(sets[0][2])
    _, want = textbook(state, m, seen, "argmax")
    still = torch.zeros(shape, device=device)
    ops.categorical_step(state, m, table, row, slots=plan.slots, readout="argmax", noise=still, model_in=seen)
    work.differs["fastdiff eager"] = gap(seen, want)
    return finish(work, names, found, ours, device, compiles=True)


def textbook_step(b: float, s: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The row in plain torch: the new state, and the model's next input. One channel is two classes, p = 1 or -1."""

    def textbook(state: Tensor, m: Tensor, seen: Tensor, readout: str = "sample") -> tuple[Tensor, Tensor]:
        z, m32, sampled = state[0], m.float(), readout == "sample"
        if m.shape[-1] == 1:
            p = 2.0 * (torch.rand_like(m32) < m32.sigmoid() if sampled else m32 > 0) - 1
        else:
            theta = m32.softmax(-1)
            p = F.one_hot(drawn(theta) if sampled else theta.argmax(-1), m.shape[-1])
        z = z + b * p
        z = z + s * torch.randn_like(z) if sampled else z
        return z, (torch.tanh(z / 2) if m.shape[-1] == 1 else 2 * z.softmax(-1) - 1).to(m.dtype)

    return textbook


def categorical_noise(
    schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Work:
    """Classes noised to the network's input: reads a class a token, writes K numbers, the noise drawn in the call."""
    flow, (batch, tokens) = fd.schedules.BFNDiscrete(3.0, CLASSES), _tokens(elements)
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64, device=device)
    seeds = torch.arange(batch, device=device)
    alpha, sigma = (c(t).float().view(batch, 1, 1) for c in (flow.alpha, flow.sigma))
    moved = torch.finfo(dtype).bits // 8 + 8 / CLASSES
    sets = [(_classes((batch, tokens), device, i),) for i in range(rotation(int(moved * elements), device))]
    work = Work("categorical_noise", schedule, elements, str(dtype), moved, sets, {})

    def textbook(x: Tensor, noise: Tensor | None = None) -> Tensor:
        e = F.one_hot(x, CLASSES).float()
        z = alpha * e + sigma * (torch.randn_like(e) if noise is None else noise)
        return (2 * z.softmax(-1) - 1).to(dtype)

    def ours(x: Tensor, noise: Tensor | None = None) -> object:
        return ops.categorical_noise(x, t, flow, seeds=None if noise is not None else seeds, noise=noise,
                                     out_dtype=dtype)  # fmt: skip

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    noise = randn((batch, tokens, CLASSES), device, torch.float32, 9)
    got = ours(sets[0][0], noise)
    assert isinstance(got, Tensor)
    work.differs["fastdiff eager"] = gap(got, textbook(sets[0][0], noise))
    return finish(work, names, found, ours, device, compiles=True)


def categorical_loss(
    schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Work:
    """The squared error of softmax and its gradient: reads logits and classes, writes a gradient like the logits."""
    batch, tokens = _tokens(elements)
    size = torch.finfo(dtype).bits // 8
    moved = 2 * size + 8 / CLASSES
    sets = [
        (_classes((batch, tokens), device, i), randn((batch, tokens, CLASSES), device, dtype, i).requires_grad_())
        for i in range(rotation(int(moved * elements), device))
    ]
    work = Work("categorical_loss", schedule, elements, str(dtype), moved, sets, {})

    def textbook(x: Tensor, logits: Tensor) -> Tensor:
        return ((logits.float().softmax(-1) - F.one_hot(x, CLASSES)) ** 2).sum(-1).mean()

    def ours(x: Tensor, logits: Tensor) -> Tensor:
        return ops.categorical_loss(logits, x).mean()

    columns = {"torch": graded(textbook, 1), "torch.compile": graded(compiled(textbook, elements), 1)}
    got, want = (graded(f, 1)(*sets[0]) for f in (ours, textbook))
    assert isinstance(got, tuple) and isinstance(want, tuple)
    work.differs["fastdiff eager"] = gap(got[0], want[0])
    return finish(work, names, columns, graded(ours, 1), device, compiles=True)


def unmask_step(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], *,
                classes: int = VOCABULARY, top_p: float = 1.0) -> Work:  # fmt: skip
    """A row of masked diffusion: half of the tokens are masked, a fourth of them becomes classes, the surest first.

    top_p: the share of its probability that a token is drawn from, which plain torch sorts for.

    The logits of masked tokens have to be read, and 36 bytes a token: itself and its copy, its block, a class and a
    score written and read. Both columns put the tokens back as they were.
    """
    tokens = max(4, elements // classes)
    half = (tokens + 1) // 2
    plan = fd.solvers.unmask(fd.schedules.Masked(classes), 8, order="confidence", top_p=top_p)
    greedy = fd.solvers.unmask(fd.schedules.Masked(classes), 8, order="confidence", temperature=0.0)
    row = torch.full((1,), 4, dtype=torch.int32, device=device)  # b = 1/4
    many = half - int(half * 0.75)
    seeds, index = fd.rng.keys(0, batch=1, device=device)
    group = torch.zeros((1, tokens), dtype=torch.int32, device=device)
    start = torch.full((1, tokens), 1, dtype=torch.int64, device=device)
    start[:, ::2] = classes
    moved = torch.finfo(dtype).bits // 8 / 2 + 36 / classes
    sets = [
        (start.clone(), randn((1, tokens, classes), device, dtype, i))
        for i in range(rotation(int(moved * elements), device))
    ]
    work = Work("unmask_step", schedule, elements, str(dtype), moved, sets, {})

    def textbook(held: Tensor, m: Tensor, draws: bool = True) -> Tensor:
        held.copy_(start)
        p = m.float().softmax(-1)
        k = drawn(p if top_p == 1 else likeliest(p, top_p)) if draws else p.argmax(-1)
        sure = torch.where(held == classes, p.gather(-1, k[..., None])[..., 0], -1.0)
        at = sure.topk(many, -1).indices
        return held.scatter(1, at, k.gather(1, at))

    def ours(held: Tensor, m: Tensor, by: fd.Plan = plan) -> Tensor:
        held.copy_(start)
        ops.unmask_step(held, m, by.pack(device), row, mask=classes, order="confidence", group=group, seeds=seeds,
                        index=index, nucleus=top_p < 1)  # fmt: skip
        return held

    columns: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    held, m = sets[0]
    work.differs["fastdiff eager"] = gap(ours(held, m, greedy).clone(), textbook(held, m, False))
    return finish(work, names, columns, ours, device, compiles=True)


def _tokens(elements: int) -> tuple[int, int]:
    batch = 8 if elements >= 64 * CLASSES else 1
    return batch, max(1, elements // (batch * CLASSES))


def _classes(shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator(device).manual_seed(seed), device=device)
