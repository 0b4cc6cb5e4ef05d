"""One operation at a time, over rotated buffers: plain torch, torch.compile of it, the library's call, and fastdiff's.

A kernel's work is the same for every column: the same noise drawn, the same results written. Compared before timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff as fd
from fastdiff import ops
from fastdiff.schedules import Betas, cosine_betas, linear_betas, scaled_linear_betas
from fastdiff_bench.cases import Case
from fastdiff_bench.textbook import Textbook, compiled
from fastdiff_bench.throughput import column_of
from fastdiff_bench.timing import graph_us, interleave, rotation, summary

__all__ = ["CHAINS", "MAKERS", "Work", "times"]

CHAINS = {"linear_betas": linear_betas, "scaled_linear_betas": scaled_linear_betas, "cosine_betas": cosine_betas}
CLASSES = 32
GRAPH_CALLS = 40
PIECE = 1 << 24
Column = Callable[..., object]


@dataclass
class Work:
    """One kernel at one size: columns called with one set of rotated buffers, `units` kernels' work in each call."""

    kernel: str
    schedule: str
    elements: int
    dtype: str
    bytes_per_element: float
    sets: Sequence[tuple[Any, ...]]
    columns: dict[str, Column]
    units: int = 1
    skipped: dict[str, str] = field(default_factory=dict)
    differs: dict[str, float] = field(default_factory=dict)

    def run(self, name: str) -> Callable[[], object]:
        """One pass over all sets."""
        column, sets = self.columns[name], self.sets

        def all_sets() -> None:
            for buffers in sets:
                column(*buffers)

        return all_sets


def times(work: Work, device: torch.device, *, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """us of the kernel's work: interleaved passes; on a GPU replays of a graph of passes where it can be captured."""
    calls = len(work.sets) * work.units
    if device.type != "cuda":
        runs = {name: work.run(name) for name in work.columns}
        spent = interleave(runs, rounds=rounds, seconds=seconds, device=device)
        return {name: summary([1e6 * v / calls for v in values]) for name, values in spent.items()}
    out = {}
    for name, column in work.columns.items():
        bodies = [partial(column, *buffers) for buffers in work.sets]
        repeat = max(1, GRAPH_CALLS // len(bodies)) if work.elements < 1 << 24 else 1
        try:
            out[name] = summary([v / work.units for v in graph_us(bodies * repeat)])
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            spent = interleave({name: work.run(name)}, rounds=rounds, seconds=seconds, device=device)
            out[name] = summary([1e6 * v / calls for v in spent[name]])
            work.skipped[f"{name}, graph timing"] = f"not capturable, timed by the clock: {str(error).splitlines()[0]}"
    return out


def _gap(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value, in float64 pieces: 2^28 elements are 2 GiB each time."""
    pairs = zip(got.reshape(-1).split(PIECE), want.reshape(-1).split(PIECE), strict=True)
    parts = [torch.stack([(a.double() - b.double()).abs().max(), b.double().abs().max()]) for a, b in pairs]
    difference, scale = torch.stack(parts).amax(0)
    return float(difference / scale.clamp_min(1e-30))


def _shape(elements: int) -> tuple[int, int]:
    batch = 8 if elements >= 64 else 1
    return batch, elements // batch


def _randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _chain(schedule: str) -> Betas:
    return Betas(CHAINS[schedule](1000))


def affine_step(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str], *,
                solver: str = "ddim") -> Work:  # fmt: skip
    """A plan's rows on a model output that stands still: on a CPU whole loops, on a GPU the kernel of a middle row."""
    case = Case(schedule, solver, 50 if elements <= 1 << 18 else 8 if elements <= 1 << 24 else 2)
    plan, shape = case.plan(), (1, elements)
    size = torch.finfo(dtype).bits // 8
    moved = float(plan.bytes_per_element(model_bytes=size)[plan.nfe // 2]) + (size if size < 4 else 0)
    work = Work("affine_step", schedule, elements, str(dtype), moved, [()], {}, plan.nfe)
    out = _randn(shape, device, dtype, 0)
    model = lambda x, t: out  # noqa: E731
    x_T = _randn(shape, device, torch.float32, 1) * plan.init_scale
    if device.type == "cuda":
        return _affine_kernel(work, plan, dtype, device, names)
    want: Tensor | None = None  # the first column's end: a large state leaves no room for all of them
    for name in sorted(names, key=lambda name: name != "fastdiff eager"):
        column = column_of(name, case, plan, model, dtype, device)
        if isinstance(column, str):
            work.skipped[name] = column
            continue
        column.prepare()
        end = column.run(x_T, None)
        want = end if want is None else want
        if not plan.stochastic:
            work.differs[name] = _gap(end, want)
        del end

        def call(column: Any = column) -> object:
            column.prepare()
            return column.run(x_T, None)

        work.columns[name] = call
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
        sets.append((state, _randn((1, n), device, dtype, i), torch.empty(1, n, device=device, dtype=dtype)))
    work.sets = sets
    eager, fused = (
        Textbook(plan, lambda x, t: x, compiled=c, dtype=dtype, device=device) for c in (False, True)
    )  # fmt: skip

    def torch_row(state: Tensor, m: Tensor, copy: Tensor) -> Tensor:
        noise = torch.randn_like(state[0]) if eager.rows[k].noisy else None
        x = eager._row(k, list(state[: plan.slots]), m.float(), noise)[1][0]
        assert x is not None
        return x.to(dtype) if low else x

    def compiled_row(state: Tensor, m: Tensor, copy: Tensor) -> object:
        x = fused._compiled_row(k, list(state[: plan.slots]), m)[1][0]
        assert x is not None
        return x.to(dtype) if low else x

    def kernel(state: Tensor, m: Tensor, copy: Tensor) -> None:
        ops.affine_step(
            state, m, table, row, slots=plan.slots, model_in=copy if low else None,
            seeds=seeds if plan.stochastic else None, index=index if plan.stochastic else None,
        )  # fmt: skip

    found: dict[str, Column] = {"torch": torch_row, "torch.compile": compiled_row, "fastdiff eager": kernel}
    work.columns = {name: found[name] for name in names if name in found}
    if not plan.stochastic:
        state, m, copy = sets[0]
        state = state.clone()
        want = torch_row(state, m, copy)
        kernel(state, m, copy)
        work.differs["fastdiff eager"] = _gap(copy if low else state[0], want)
    return work


def add_noise(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """x_t = alpha x0 + sigma n, the noise drawn in the call; reads x0, writes x_t."""
    chain, (batch, n) = _chain(schedule), _shape(elements)
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
    seeds = torch.arange(batch, device=device)
    steps = torch.arange(1000)
    alpha, sigma = (c(steps).float().to(device)[:, None] for c in (chain.alpha, chain.sigma))
    size = torch.finfo(dtype).bits // 8
    sets = [(_randn((batch, n), device, dtype, i),) for i in range(rotation(2 * size * elements, device))]
    work = Work("add_noise", schedule, elements, str(dtype), 2 * size, sets, {})

    def textbook(x0: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        return (alpha[t] * x0 + sigma[t] * noise).to(x0.dtype)

    def ours(x0: Tensor) -> object:
        return ops.add_noise(x0, t, chain, seeds=seeds)

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    _library(work, names, found, "diffusers", lambda peer: lambda x0: peer.add_noise(x0, torch.randn_like(x0), t))
    return _finish(work, names, found, ours, device, lambda x0, n: ops.add_noise(x0, t, chain, noise=n), textbook,
                   compiles=True)  # fmt: skip


def posterior(schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> Work:
    """Mean and x0 of the DDPM posterior, clamped; reads x_t and the model's output, writes two tensors."""
    chain, (batch, n) = _chain(schedule), _shape(elements)
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
        (_randn((batch, n), device, dtype, 2 * i), _randn((batch, n), device, dtype, 2 * i + 1)) for i in range(count)
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
        gap = _gap(ours(*sets[0])[part], textbook(*sets[0])[i])
        work.differs["fastdiff eager"] = max(gap, work.differs.get("fastdiff eager", 0.0))
    return _finish(work, names, found, ours, device, compiles=True)


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
        state.copy_(_randn(state.shape, device, torch.float32, i))
        sets.append((state, _randn(shape, device, dtype, i + 1), ops.categorical_buffer(shape, dtype, device)))
    work = Work("categorical_step", schedule, elements, str(dtype), moved, sets, {})
    b, s = float(plan.b[k, 0]), float(plan.s[k, 0])

    def textbook(state: Tensor, m: Tensor, seen: Tensor, readout: str = "sample") -> Tensor:
        z = state[0]
        theta = m.float().softmax(-1)
        drawn = theta / torch.empty_like(theta).exponential_() if readout == "sample" else theta
        z = z + b * F.one_hot(drawn.argmax(-1), classes)
        z = z + s * torch.randn_like(z) if readout == "sample" else z
        return (2 * z.softmax(-1) - 1).to(m.dtype)

    def ours(state: Tensor, m: Tensor, seen: Tensor) -> None:
        ops.categorical_step(
            state, m, table, row, slots=plan.slots, readout="sample", seeds=seeds, index=index, model_in=seen
        )

    found: dict[str, Column] = {"torch": textbook, "torch.compile": compiled(textbook, elements)}
    state, m, seen = sets[0][0].clone(), sets[0][1], torch.empty_like(sets[0][2])
    want = textbook(state, m, seen, "argmax")
    still = torch.zeros(shape, device=device)
    ops.categorical_step(state, m, table, row, slots=plan.slots, readout="argmax", noise=still, model_in=seen)
    work.differs["fastdiff eager"] = _gap(seen, want)
    return _finish(work, names, found, ours, device, compiles=True)


def denoising_loss(
    schedule: str, elements: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> Work:
    """Noising, the loss against eps and its gradient: reads x0 and the output, writes x_t and the gradient."""
    chain, (batch, n) = _chain(schedule), _shape(elements)
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
    seeds = torch.arange(batch, device=device)
    steps = torch.arange(1000)
    alpha, sigma = (c(steps).float().to(device)[:, None] for c in (chain.alpha, chain.sigma))
    size = torch.finfo(dtype).bits // 8
    count = rotation(4 * size * elements, device)
    sets = [
        (_randn((batch, n), device, dtype, 2 * i), _randn((batch, n), device, dtype, 2 * i + 1).requires_grad_())
        for i in range(count)
    ]
    work = Work("denoising_loss", schedule, elements, str(dtype), 4 * size, sets, {})

    def maths(x0: Tensor, m: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0) if noise is None else noise
        return (alpha[t] * x0 + sigma[t] * noise).to(x0.dtype), F.mse_loss(m.float(), noise.float())

    compiled_maths = compiled(maths, elements)

    def graded(loss: Callable[[Tensor, Tensor], Tensor]) -> Column:
        def call(x0: Tensor, m: Tensor) -> Tensor:
            with torch.enable_grad():
                return torch.autograd.grad(loss(x0, m), m)[0]

        return call

    def ours(x0: Tensor, m: Tensor) -> Tensor:
        ops.add_noise(x0, t, chain, seeds=seeds)
        return ops.denoising_loss(m, x0, t, chain, seeds).mean()

    found = {
        "torch": graded(lambda x0, m: maths(x0, m)[1]),
        "torch.compile": graded(lambda x0, m: compiled_maths(x0, m)[1]),
    }
    drawn = fd.rng.normal(seeds, (n,), device=device)
    want = graded(lambda x0, m: maths(x0, m, drawn)[1])(*sets[0])
    got = graded(ours)(*sets[0])
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    work.differs["fastdiff eager"] = _gap(got, want)
    return _finish(work, names, found, graded(ours), device, compiles=True)


def _library(work: Work, names: Sequence[str], found: dict[str, Column], name: str,
             make: Callable[[Any], Column]) -> None:  # fmt: skip
    if name not in names:
        return
    try:
        import diffusers
    except ModuleNotFoundError:
        work.skipped[name] = "diffusers is not installed: pip install diffusers"
        return
    config = {"linear_betas": "linear", "scaled_linear_betas": "scaled_linear", "cosine_betas": "squaredcos_cap_v2"}
    found[name] = make(diffusers.DDPMScheduler(beta_schedule=config[work.schedule]))


def _finish(work: Work, names: Sequence[str], found: dict[str, Column], ours: Column, device: torch.device,
            given: Callable[..., Any] | None = None, textbook: Column | None = None, *,
            compiles: bool = False) -> Work:  # fmt: skip
    """fastdiff's columns: eager, and on a CPU the compiled loops its operations choose by themselves."""

    def eager(*buffers: Any) -> object:  # noqa: ANN401
        with ops.cpu_compiler(False):
            return ours(*buffers)

    found["fastdiff eager"] = eager if device.type == "cpu" else ours
    if device.type == "cpu" and compiles:
        found["fastdiff compiled"] = ours
    if given is not None and textbook is not None:
        x0 = work.sets[0][0]
        noise = _randn(x0.shape, device, x0.dtype, 9)
        want = textbook(x0, noise)
        assert isinstance(want, Tensor)
        work.differs["fastdiff eager"] = _gap(given(x0, noise), want)
    work.columns = {name: found[name] for name in names if name in found}
    return work


MAKERS: dict[str, Callable[..., Work]] = {
    "affine_step": affine_step,
    "add_noise": add_noise,
    "posterior": posterior,
    "categorical_step": categorical_step,
    "denoising_loss": denoising_loss,
}
