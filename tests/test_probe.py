"""probe against what it read: random tables, diffusers' schedulers lifted to float64, k-diffusion's samplers."""

from __future__ import annotations

import logging
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import schedules as S
from fastdiff import solvers
from fastdiff.reference import reference_sample
from tests.probe_cases import (
    CASES,
    LINEAR,
    NOCLIP,
    SD,
    SHAPE,
    TOLERANCE,
    Case,
    Table,
    V,
    far,
    increments,
    model,
    normals,
    response,
    run,
    shipped,
    tuple_sampler,
)


@pytest.mark.parametrize(("r", "unused"), [(1, (0, 0)), (2, (1, 0)), (3, (0, 0)), (3, (0, 2)), (4, (2, 1))])
def test_random_schedulers_are_recovered(r, unused):
    steps, scheduler = 14, Table(r, 14, seed=r, unused=unused)
    plan = fd.probe(scheduler, steps=steps)
    assert plan.slots == r and plan.nfe == steps and plan.init_scale == 3.0
    assert plan.times.tolist() == list(range(14, 0, -1)) and not hasattr(scheduler, "k")
    want = np.zeros((steps + 1, 1 + 2 * steps))
    state = np.zeros((r, 1 + 2 * steps))
    state[0, 0] = 1
    for k in range(steps):
        want[k] = state[0]
        state = scheduler.A[k] @ state
        state[:, 1 + k] += scheduler.d[k]
        state[:, 1 + steps + k] += scheduler.s[k]
    want[steps] = state[0]
    assert np.allclose(response(plan), want, rtol=1e-9, atol=1e-11)
    assert np.allclose(plan.c_in, 1 / (1 + 0.1 * plan.times), rtol=1e-12)
    drawn = steps * (1 + sum(unused))
    assert plan.draws.sum() == drawn - unused[1]  # those after the last one that counts change nothing
    pool, x = normals(), 3 * normals(1, seed=1)[0]
    source = iter(pool)
    y, kept = x, [torch.zeros_like(x)] * (r - 1)
    for k in range(steps):
        draws = [next(source) for _ in range(1 + sum(unused))]
        m, n = model(y / (1 + 0.1 * (14 - k)), 14 - k), draws[unused[0]]
        slots = [y, *kept]
        y, *kept = [
            sum(a * v for a, v in zip(row, slots, strict=True)) + c * m + e * n
            for row, c, e in zip(scheduler.A[k], scheduler.d[k], scheduler.s[k], strict=True)
        ]
    assert far(run(plan, x, pool), y) <= TOLERANCE
    source = iter(pool)
    ours = fd.sample(model, plan, SHAPE, x_T=x.float(), noise=lambda k, like: next(source).float())
    assert far(ours, y) <= 2e-4


def mixing_sampler(model, x, sigmas, noise_sampler=None, weight=0.3):
    """Two evaluations a step, noise in both, a third draw for nothing, a memory of the output before last."""
    old = torch.zeros_like(x)
    x = 0.5 * x
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        first = model(x, a.expand(len(x)))
        n = noise_sampler(a, b)
        middle = 0.7 * x + weight * first + 0.1 * a * n
        second = model(middle, ((a + b) / 2).expand(len(x)))
        noise_sampler(a, b)
        z = noise_sampler(a, b)
        x, old = 0.4 * x + 0.5 * second + 0.2 * first - 0.3 * old + 0.05 * n + 0.2 * b * z, first
    return x


def test_sampler_functions_are_recovered():
    sigmas = torch.linspace(9, 0, 8, dtype=torch.float64)
    plan = fd.probe(mixing_sampler, sigmas=sigmas, weight=0.4)
    pool, x = normals(), 9 * normals(1, seed=2)[0]
    source = iter(pool)
    want = mixing_sampler(model, x, sigmas, noise_sampler=lambda a, b: next(source), weight=0.4)
    assert plan.nfe == 14 and plan.slots == 3 and plan.init_scale == 9 and plan.draws.tolist() == [1, 2] * 7
    assert plan.c_in[0] == 0.5 and far(run(plan, x, pool), want) <= TOLERANCE
    plan = fd.probe(tuple_sampler, sigmas=sigmas, extra=1)
    assert plan.slots == 1 and plan.init_noise == pytest.approx(0.9) and plan.draws.sum() == 6
    assert np.allclose(plan.times, sigmas[:-1]) and not np.any(plan.c_skip) and np.all(plan.c_out == 1)


def lifted(name):
    """A diffusers scheduler module with every float32 read as float64."""
    diffusers = pytest.importorskip("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    source = pathlib.Path(diffusers.__file__).parent / "schedulers" / f"scheduling_{name}.py"
    text = source.read_text().replace("torch.float32", "torch.float64").replace("np.float32", "np.float64")
    text = text.replace(".float()", ".double()")
    module = types.ModuleType(f"diffusers.schedulers.probed_{name}")
    module.__package__, module.__file__ = "diffusers.schedulers", str(source)
    sys.modules[module.__name__] = module
    exec(compile(text, module.__name__, "exec"), module.__dict__)
    return module


def planes(x, t):
    """A model with a second plane, inside and outside [-1, 1]."""
    m = model(x, t)
    return torch.cat([m, 1.4 * torch.sin(3 * x)], 1)


def stock(case, steps, x, pool, edit=lambda k, x: x, model=model):
    """The scheduler's own loop in float64: the result and how many normals it drew."""
    module, drawn = lifted(case.module), []
    module.randn_tensor = draw = lambda *args, **kwargs: drawn.append(0) or pool[len(drawn) - 1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        s = getattr(module, case.scheduler)(**case.config)
        s.set_timesteps(*(() if steps is None else (steps,)), **case.setup)
        if hasattr(s, "noise_sampler"):
            s.noise_sampler = increments(draw)
        ends = case.module in ("ddpm_wuerstchen", "scm")  # the last time is where the last step arrives
        for k, t in enumerate(s.timesteps[: -1 if ends else None]):
            t = t[None] if case.module == "ddpm_wuerstchen" else t
            seen = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            x = edit(k, s.step(model(seen, t), t, x, **case.step, return_dict=False)[0])
    finally:
        torch.set_default_dtype(before)
    return x, len(drawn)


def steps_of(case):
    if "timesteps" in case.setup or "sigmas" in case.setup:
        return None
    return 6 if case.module in ("lcm", "tcd") else 12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_diffusers(name):
    case = CASES[name]
    pytest.importorskip("diffusers")
    scheduler, steps = shipped(case)(**case.config), steps_of(case)
    plan = fd.probe(scheduler, steps=steps, step_options=case.step, **case.setup)
    pool, x = normals(), plan.init_scale * normals(1, seed=3)[0]
    want, drawn = stock(case, steps, x, pool)
    assert far(run(plan, x, pool), want) <= TOLERANCE
    assert plan.draws.sum() == drawn
    assert case.slots in (None, plan.slots)
    source = iter(pool)
    ours = fd.sample(model, plan, SHAPE, x_T=x.float(), noise=lambda k, like: next(source).float())
    assert far(ours, want) <= 3e-6


@pytest.mark.parametrize(
    "case",
    [
        Case("ddpm", "DDPMScheduler", {**SD, "variance_type": "learned_range"}, 1),
        Case("ddpm", "DDPMScheduler", {**LINEAR, **V, **NOCLIP, "variance_type": "learned_range",
                                       "timestep_spacing": "trailing"}, 1),
        Case("ddpm_parallel", "DDPMParallelScheduler", {**SD, **V, "variance_type": "learned_range"}, 1),
        Case("unclip", "UnCLIPScheduler", {"variance_type": "learned_range"}, 1),
    ],
    ids=["ddpm", "ddpm-trailing", "ddpm-parallel-v", "unclip"],
)  # fmt: skip
def test_learned_variances(case):
    pytest.importorskip("diffusers")
    plan = fd.probe(shipped(case)(**case.config), steps=12)
    assert plan.learned_variance and plan.slots == 1
    pool, x = normals(), plan.init_scale * normals(1, seed=3)[0]
    want, drawn = stock(case, 12, x, pool, model=planes)
    source = iter(pool)
    assert far(reference_sample(planes, plan, x, lambda k, like: next(source)), want) <= TOLERANCE
    assert plan.draws.sum() == drawn
    source = iter(pool)
    ours = fd.sample(planes, plan, SHAPE, x_T=x.float(), noise=lambda k, like: next(source).float())
    assert far(ours, want) <= 3e-6


def test_a_second_plane_that_is_no_variance():
    """Added to the state, or scaling the noise in another way: refused for its own reason."""

    class Two(Table):
        def __init__(self, use):
            super().__init__(1, 6, seed=1)
            self.use = use

        def step(self, m, t, x):
            m, v = m.chunk(2, 1)
            return (self.use(x, m, v, torch.randn(x.shape)),)

    for use in (lambda x, m, v, n: 0.5 * x + m + v, lambda x, m, v, n: 0.5 * x + m + (2 + v) * n):
        with pytest.raises(ValueError, match="is not a plan"):
            fd.probe(Two(use), steps=6)
    with pytest.raises(ValueError, match="NoneType"):
        fd.probe(shipped(CASES["ddpm-clip"])(variance_type="learned"), steps=6)


def test_enough_configurations():
    assert len(CASES) >= 60 and len({c.scheduler for c in CASES.values()}) >= 25


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "solver", "config", "native", "scaled"),
    [
        ("ddim-noclip", "ddim", {"timestep_spacing": "trailing", "clip_sample": False}, {}, False),
        ("euler-eps", "euler", {"timestep_spacing": "trailing"}, {}, True),
        ("heun-eps", "heun", {"timestep_spacing": "trailing"}, {}, True),
        ("dpmsolver++-2m", "dpmpp_2m", {"timestep_spacing": "trailing"}, {}, False),
    ],
)
def test_tables_equal_native_ones(name, solver, config, native, scaled, prediction):
    pytest.importorskip("diffusers")
    scheduler = shipped(CASES[name])(**LINEAR, **config, prediction_type=prediction)
    probed = fd.probe(scheduler, steps=20)
    kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    plan = getattr(solvers, solver)(S.Betas(S.linear_betas(1000)), 20, prediction=kind, spacing="trailing", **native)
    theirs, ours = response(probed), response(plan)
    if scaled:  # they carry x / alpha
        alpha = np.append(plan.alpha, plan.end[0])
        ours = ours / alpha[:, None]
        ours[:, 0] *= plan.alpha[0]
    size = np.abs(ours).max(axis=1, keepdims=True)
    assert np.abs((theirs - ours) / size).max() <= TOLERANCE
    assert probed.end == (1.0, 0.0) and probed.slots == plan.slots
    assert np.allclose(probed.alpha * (plan.alpha if scaled else 1), plan.alpha, rtol=1e-9)


def test_a_clamp_is_recovered():
    pytest.importorskip("diffusers")
    plan = fd.probe(shipped(CASES["ddpm-clip"])(**LINEAR, clip_sample_range=1.5), steps=10)
    want = solvers.ddpm(S.Betas(S.linear_betas(1000)), 10, clip=(-1.5, 1.5), spacing="leading")
    for field in ("c_skip", "c_out", "lo", "hi", "A", "b", "d", "s", "alpha", "sigma", "times"):
        assert np.allclose(getattr(plan, field), getattr(want, field), rtol=1e-9, atol=1e-12), field


@pytest.mark.parametrize("name", ["unipc-2-zero", "ddim-noclip", "heun-eps", "dpmsolver++-2m", "pndm"])
def test_edits(name):
    """A hook that changes x between steps: the plan follows the stock solver, and UniPC's own copy of x costs bytes."""
    pytest.importorskip("diffusers")
    case = CASES[name]
    plan, plain = (fd.probe(shipped(case)(**case.config), steps=12, edits=edits) for edits in (True, False))
    pool, x = normals(), plan.init_scale * normals(1, seed=4)[0]

    def edit(k, x):
        return x + 0.3 * pool[k] if k in (1, 2, 5) else x

    want, _ = stock(case, 12, x, pool, edit)
    assert far(run(plan, x, pool, edit), want) <= TOLERANCE
    if name == "unipc-2-zero":
        assert far(run(plain, x, pool, edit), want) > 1e-3
        assert plan.slots == 3 and (plain.bytes_per_element()[5], plan.bytes_per_element()[5]) == (24, 28)
    assert plan.slots == {"pndm": 6}.get(name, plain.slots)


def test_a_step_with_a_memory_of_its_own():
    """The wrapper of docs/probe.md: a step that takes its last x0 and the time before."""
    diffusers = pytest.importorskip("diffusers")
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    text = (pathlib.Path(__file__).parents[1] / "docs" / "probe.md").read_text()
    names = {"diffusers": diffusers, "fd": fd, "config": config}
    exec(text.split("```python\n")[2].split("```")[0].replace("steps=50", "steps=10"), names)
    plan, wrapped = names["plan"], names["Remembering"](config)
    pool, x = normals(), normals(1, seed=4)[0]
    wrapped.inner = lifted("dpm_cogvideox").CogVideoXDPMScheduler.from_config(config)
    module, drawn = sys.modules[type(wrapped.inner).__module__], []
    module.randn_tensor = lambda *args, **kwargs: drawn.append(0) or pool[len(drawn) - 1]
    wrapped.set_timesteps(10)
    y = x
    for t in wrapped.timesteps:
        y = wrapped.step(model(y, t), t, y)[0]
    assert plan.slots == 2 and plan.draws.sum() == len(drawn)
    assert far(run(plan, x, pool), y) <= TOLERANCE


@pytest.mark.parametrize("trained", [37, 36, 38])
def test_a_table_as_long_as_the_basis_is_none(trained):
    """Of 37 numbers while the scheduler was made, when a basis for three rows would have as many."""
    diffusers = pytest.importorskip("diffusers")
    for make in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler):
        plan = fd.probe(make(num_train_timesteps=trained), steps=3)
        ours = fd.accelerate(make(num_train_timesteps=trained))
        ours.set_timesteps(3)
        ours.step(torch.ones(1, 1, 2, 2), ours.timesteps[0], torch.ones(1, 1, 2, 2))
        assert plan.nfe == 3 and ours._fastdiff.stock is None
