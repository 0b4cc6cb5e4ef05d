"""The kernels that any model takes: the step, noising, the posterior, the loss; and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff as fd
from fastdiff import ops
from fastdiff.commands.options import one_line
from fastdiff_bench import kernels_categorical, kernels_samples
from fastdiff_bench.cases import PEERS, Case
from fastdiff_bench.textbook import Textbook, compiled
from fastdiff_bench.throughput import column_of
from fastdiff_bench.timing import rotation
from fastdiff_bench.work import CHAINS, Column, Work, chain_of, finish, gap, graded, library, randn, shape, times

__all__ = ["CHAINS", "MAKERS", "Work", "times"]


def affine_step(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], *,
                solver: str = "ddim") -> Work:  # fmt: skip
    """A plan's rows on a model output that stands still: on a CPU whole loops, on a GPU the kernel of a middle row."""
    steps = 50 if device.type == "cuda" or elements <= 1 << 18 else 8 if elements <= 1 << 24 else 2
    case = Case(schedule, solver, steps)
    plan, shape = case.plan(), (1, elements)
    size = torch.finfo(dtype).bits // 8
    moved = float(plan.bytes_per_element(model_bytes=size)[plan.nfe // 2]) + (size if size < 4 else 0)
    work = Work("affine_step", schedule, elements, str(dtype), moved, [()], {}, plan.nfe)
    out = randn(shape, device, dtype, 0)
    model = lambda x, t: out  # noqa: E731
    x_T = randn(shape, device, torch.float32, 1) * plan.init_scale
    if device.type == "cuda":
        return _affine_kernel(work, plan, dtype, device, names)
    want: Tensor | None = None  # the first column's end: a large state leaves no room for all of them
    for name in sorted(names, key=lambda name: name != "fastdiff eager"):
        column = column_of(name, case, plan, model, dtype, device)
        if isinstance(column, str):
            work.skipped[name] = column
            continue
        column.prepare()
        try:
            end = column.run(x_T, None)
        except Exception as error:
            if name not in PEERS or isinstance(error, torch.OutOfMemoryError):
                raise
            work.skipped[name] = f"it failed: {one_line(error)}"
            continue
        want = end if want is None else want
        if not plan.stochastic:
            work.differs[name] = gap(end, want)
        del end
        work.columns[name] = partial(column.run, x_T, None)
        work.prepare[name] = column.prepare
    work.columns = {name: work.columns[name] for name in names if name in work.columns}
    return work


def _affine_kernel(work: Work, plan: fd.Plan, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    k, n = plan.nfe // 2, work.elements
    work.units = 1
    table, row = plan.pack(device), torch.full((1,), k, dtype=torch.int32, device=device)
    seeds, index = fd.rng.keys(0, batch=1, device=device)
    low = dtype != torch.float32
    sets = []
    for i in range(rotation(int(n * work.bytes_per_element), device)):
        state = torch.randn(plan.allocate().physical, 1, n, device=device)
        sets.append((state, randn((1, n), device, dtype, i), torch.empty(1, n, device=device, dtype=dtype)))
    work.sets = sets
    eager, fused = (
        Textbook(plan, lambda x, t: x, compiled=c, dtype=dtype, device=device) for c in (False, True)
    )  # fmt: skip

    def torch_row(state: Tensor, m: Tensor, copy: Tensor) -> object:
        noise = torch.randn_like(state[0]) if eager.rows[k].noisy else None
        return eager.row(k, list(state[: plan.slots]), m, noise)[2]

    def compiled_row(state: Tensor, m: Tensor, copy: Tensor) -> object:
        return fused.compiled_row(k, list(state[: plan.slots]), m)[2]

    def kernel(at: Tensor | int, state: Tensor, m: Tensor, copy: Tensor) -> None:
        ops.affine_step(
            state, m, table, at, slots=plan.slots, model_in=copy if low else None,
            seeds=seeds if plan.stochastic else None, index=index if plan.stochastic else None,
        )  # fmt: skip

    found: dict[str, Column] = {
        "torch": torch_row,
        "torch.compile": compiled_row,
        "fastdiff eager": partial(kernel, row),
    }
    work.columns = {name: found[name] for name in names if name in found}
    if "fastdiff eager" in names:  # a loop graph's rows know their number, as torch's do
        work.columns["fastdiff loop_graph"] = partial(kernel, k)
    if not plan.stochastic:
        state, m, copy = sets[0]
        state = state.clone()
        want = torch_row(state, m, copy)
        assert isinstance(want, Tensor)
        for name, at in (("fastdiff eager", row), ("fastdiff loop_graph", k)):
            mine = state.clone()
            kernel(at, mine, m, copy)
            work.differs[name] = gap(copy if low else mine[0], want)
    return work


def add_noise(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """x_t = alpha x0 + sigma n, the noise drawn in the call; reads x0, writes x_t."""
    chain, (batch, n) = chain_of(schedule), shape(elements)
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
    seeds = torch.arange(batch, device=device)
    steps = torch.arange(1000)
    alpha, sigma = (c(steps).float().to(device)[:, None] for c in (chain.alpha, chain.sigma))
    size = torch.finfo(dtype).bits // 8
    sets = [(randn((batch, n), device, dtype, i),) for i in range(rotation(2 * size * elements, device))]
    work = Work("add_noise", schedule, elements, str(dtype), 2 * size, sets, {})

    def textbook(x0: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        return (alpha[t] * x0 + sigma[t] * noise).to(x0.dtype)

    def ours(x0: Tensor) -> object:
        return ops.add_noise(x0, t, chain, seeds=seeds)

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    library(work, names, found, "diffusers", lambda peer: lambda x0: peer.add_noise(x0, torch.randn_like(x0), t))
    return finish(work, names, found, ours, device, lambda x0, n: ops.add_noise(x0, t, chain, noise=n), textbook,
                   compiles=True)  # fmt: skip


def add_noise_flow(
    schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Work:
    """The same of a continuous schedule, whose levels are made of the times in the call: x_t = (1 - t) x0 + t n."""
    flow, (batch, n) = fd.schedules.Flow(), shape(elements)
    t = torch.linspace(0.05, 0.95, batch, device=device)
    seeds = torch.arange(batch, device=device)
    size = torch.finfo(dtype).bits // 8
    sets = [(randn((batch, n), device, dtype, i),) for i in range(rotation(2 * size * elements, device))]
    work = Work("add_noise_flow", schedule, elements, str(dtype), 2 * size, sets, {})

    def textbook(x0: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        level = t[:, None]
        return ((1 - level) * x0 + level * noise).to(x0.dtype)

    def ours(x0: Tensor) -> object:
        return ops.add_noise(x0, t, flow, seeds=seeds)

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    return finish(work, names, found, ours, device, lambda x0, n: ops.add_noise(x0, t, flow, noise=n), textbook,
                   compiles=True)  # fmt: skip


def posterior(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """Mean and x0 of the DDPM posterior, clamped; reads x_t and the model's output, writes two tensors."""
    chain, (batch, n) = chain_of(schedule), shape(elements)
    t = torch.randint(1, 1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
    betas = torch.from_numpy(chain.betas.copy()).to(device)
    ab = torch.cumprod(1 - betas, 0)
    before = torch.cat([ab.new_ones(1), ab[:-1]])
    columns = [ab.rsqrt(), (1 / ab - 1).sqrt(), before.sqrt() * betas / (1 - ab),
               (1 - betas).sqrt() * (1 - before) / (1 - ab)]  # fmt: skip
    tables = [c.float()[:, None] for c in columns]
    size = torch.finfo(dtype).bits // 8
    count = rotation(4 * size * elements, device)
    sets = [
        (randn((batch, n), device, dtype, 2 * i), randn((batch, n), device, dtype, 2 * i + 1)) for i in range(count)
    ]
    work = Work("posterior", schedule, elements, str(dtype), 4 * size, sets, {})

    def textbook(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = (table[t] for table in tables)
        x0 = (a * x - b * m).clamp(-1, 1)
        return (c * x0 + d * x).to(x.dtype), x0.to(x.dtype)

    def ours(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return ops.posterior(x, m, t, chain, "eps", (-1.0, 1.0))

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    for i, part in ((0, 0), (1, 3)):
        off = gap(ours(*sets[0])[part], textbook(*sets[0])[i])
        work.differs["fastdiff eager"] = max(off, work.differs.get("fastdiff eager", 0.0))
    return finish(work, names, found, ours, device, compiles=True)


def denoising_loss(
    schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Work:
    """Noising, the loss against eps and its gradient: reads x0 and the output, writes x_t and the gradient."""
    chain, (batch, n) = chain_of(schedule), shape(elements)
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
    seeds = torch.arange(batch, device=device)
    steps = torch.arange(1000)
    alpha, sigma = (c(steps).float().to(device)[:, None] for c in (chain.alpha, chain.sigma))
    size = torch.finfo(dtype).bits // 8
    count = rotation(4 * size * elements, device)
    sets = [
        (randn((batch, n), device, dtype, 2 * i), randn((batch, n), device, dtype, 2 * i + 1).requires_grad_())
        for i in range(count)
    ]
    work = Work("denoising_loss", schedule, elements, str(dtype), 4 * size, sets, {})

    def maths(x0: Tensor, m: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0) if noise is None else noise
        return (alpha[t] * x0 + sigma[t] * noise).to(x0.dtype), F.mse_loss(m.float(), noise.float())

    compiled_maths = compiled(maths, elements)

    def ours(x0: Tensor, m: Tensor) -> Tensor:
        ops.add_noise(x0, t, chain, seeds=seeds)
        return ops.denoising_loss(m, x0, t, chain, seeds).mean()

    found = {
        "torch": graded(lambda x0, m: maths(x0, m)[1], 1),
        "torch.compile": graded(lambda x0, m: compiled_maths(x0, m)[1], 1),
    }
    drawn = fd.rng.normal(seeds, (n,), device=device)
    want = graded(lambda x0, m: maths(x0, m, drawn)[1], 1)(*sets[0])
    got = graded(ours, 1)(*sets[0])
    assert isinstance(got, tuple) and isinstance(want, tuple)
    work.differs["fastdiff eager"] = gap(got[0], want[0])
    return finish(work, names, found, graded(ours, 1), device, compiles=True)


MAKERS: dict[str, Callable[..., Work]] = {
    "affine_step": affine_step,
    "add_noise": add_noise,
    "add_noise_flow": add_noise_flow,
    "posterior": posterior,
    **{name: getattr(kernels_categorical, name) for name in kernels_categorical.__all__},
    "denoising_loss": denoising_loss,
    **{name: getattr(kernels_samples, name) for name in kernels_samples.__all__},
}
