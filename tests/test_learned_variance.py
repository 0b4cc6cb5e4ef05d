"""Learned-range variance as a plan: against diffusers, the definition, every execution, and guidance."""

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff import ops
from fastdiff.reference import reference_sample

CHAIN = fd.schedules.Betas(fd.schedules.cosine_betas(50))
SHAPE = (3, 2, 4, 4)


def model(x, t, scale=1.0):
    """Two planes that depend on x, t and a condition; v leaves [-1, 1] too."""
    t = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 50
    return torch.cat([scale * torch.tanh(x) * (0.5 + t), scale * 1.4 * torch.sin(3 * x + t)], 1)


def noise(k, like):
    n = torch.randn(like.shape, generator=torch.Generator().manual_seed(100 + k), dtype=torch.float64)
    return n.to(like.dtype)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("steps", "spacing"), [(50, "leading"), (10, "leading"), (25, "leading")])
def test_diffusers(steps, spacing, monkeypatch):
    """DDPMScheduler(variance_type="learned_range") in float64, respaced too."""
    scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = scheduling_ddpm.DDPMScheduler(
        50, trained_betas=CHAIN.betas, variance_type="learned_range", timestep_spacing=spacing, clip_sample=True
    )
    scheduler.alphas_cumprod = torch.from_numpy(CHAIN.alpha_bar.copy())
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    drawn = iter(range(steps))
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda shape, **kw: noise(next(drawn), torch.empty(shape).double())
    )
    x = start()
    for t in scheduler.timesteps:
        out = model(x, torch.full((3,), int(t)))
        x = scheduler.step(out, t, x).prev_sample
    plan = fd.solvers.ddpm(CHAIN, steps, variance="learned_range", spacing=spacing, clip=(-1.0, 1.0))
    assert plan.times.tolist() == scheduler.timesteps.tolist() and plan.end == (1.0, 0.0)
    got = reference_sample(model, plan, start(), noise)
    assert (got - x).abs().max() <= 1e-12 * x.abs().max()
    ours = fd.sample(model, plan, SHAPE, x_T=start().float(), noise=noise, mode="eager")
    assert (ours - x).abs().max() <= 2e-6 * max(1.0, x.abs().max().item())


def test_the_ends_of_the_range_are_the_fixed_variances():
    plans = {v: fd.solvers.ddpm(CHAIN, 12, variance=v) for v in ("fixed_small", "fixed_large", "learned_range")}
    learned = plans["learned_range"]
    noisy = learned.s[:, 0] != 0
    assert learned.learned_variance and noisy.tolist() == [True] * 11 + [False]
    for name, column in (("fixed_small", learned.log_var_lo), ("fixed_large", learned.log_var_hi)):
        np.testing.assert_allclose(np.exp(0.5 * column[noisy]), plans[name].s[noisy, 0], rtol=1e-13)
        assert not plans[name].learned_variance
        v = -1.0 if name == "fixed_small" else 1.0

        def both(x, t, v=v):
            return torch.cat([0.3 * x, torch.full_like(x, v)], 1)

        a = fd.sample(both, learned, SHAPE, seed=3, mode="eager")
        b = fd.sample(lambda x, t: 0.3 * x, plans[name], SHAPE, seed=3, mode="eager")
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_final_min_keeps_noise_on_the_last_row():
    plan = fd.solvers.ddpm(CHAIN, 6, variance="learned_range", final="min")
    assert plan.s[-1, 0] == 1 and np.isfinite(plan.log_var_lo).all()


@pytest.mark.parametrize("mode", ["eager", pytest.param("compile", marks=[pytest.mark.slow, pytest.mark.compiled])])
@pytest.mark.parametrize("batched", [True, False])
def test_modes_and_guidance(mode, batched):
    """m is guided, v is the conditional output's; Philox noise is rng.normal's."""
    plan = fd.solvers.ddpm(CHAIN, 8, variance="learned_range", clip=(-2.0, 2.0))

    def guided(x, t):
        c, u = model(x, t, 1.0), model(x, t, 0.25)
        m = u[:, :2] + 1.7 * (c[:, :2] - u[:, :2])
        return torch.cat([m, c[:, 2:]], 1)

    seeds = torch.arange(3)

    def philox(k, like):
        return fd.rng.normal([5] * 3, SHAPE[1:], row=k, index=seeds).to(like.dtype)

    want = reference_sample(guided, plan, start(), philox)
    got = fd.sample(
        model, plan, SHAPE, seed=5, x_T=start().float(), cond={"scale": torch.ones(3, 1, 1, 1)},
        uncond={"scale": torch.full((3, 1, 1, 1), 0.25)}, guidance=1.7, batched_guidance=batched, mode=mode,
    )  # fmt: skip
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()


def test_step_kernel(device):
    """One packed row with a variance plane, in-kernel and given noise, against float64."""
    plan = fd.solvers.ddpm(CHAIN, 8, variance="learned_range")
    table = plan.pack(device)
    x, out = start().float(), model(start().float(), torch.full((3,), 20))
    m, v = out.chunk(2, 1)
    seeds, row = torch.tensor([7, 8, 9]), torch.tensor([2])
    n = fd.rng.normal(seeds, SHAPE[1:], row=2)
    want = ops.affine_step_ref(
        x.double()[None], m.double(), plan.pack().double(), row, slots=1, noise=n.double(), variance=v.double()
    )[0]
    f = (v.double() + 1) / 2
    std = torch.exp(0.5 * (f * plan.log_var_hi[2] + (1 - f) * plan.log_var_lo[2]))
    plain = ops.affine_step_ref(x.double()[None], m.double(), plan.pack().double(), row, slots=1)[0]
    assert (want - plain - std * n.double()).abs().max() < 1e-6
    for source in ({"seeds": seeds.to(device)}, {"noise": n.to(device)}):
        state = x.to(device)[None].clone()
        ops.affine_step(state, m.to(device), table, row.to(device), slots=1, variance=v.to(device), **source)
        assert (state.cpu() - want).abs().max() <= 4e-6 * want.abs().max()


def test_bad_input():
    plan = fd.solvers.ddpm(CHAIN, 4, variance="learned_range")
    with pytest.raises(ValueError, match=r"two planes.*\(3, 4, 4, 4\), got \(3, 2, 4, 4\)"):
        fd.sample(lambda x, t: x.clone(), plan, SHAPE, mode="eager")
    with pytest.raises(ValueError, match="channel axis"):
        fd.sample(lambda x, t: x, plan, (3,), mode="eager")
    with pytest.raises(ValueError, match="fixed_small, fixed_large, learned_range"):
        fd.solvers.ddpm(CHAIN, 4, variance="learned")
    from dataclasses import replace

    with pytest.raises(ValueError, match="go together"):
        replace(plan, log_var_hi=None)
    with pytest.raises(ValueError, match="log_var_lo is not finite"):
        replace(plan, log_var_lo=np.full(4, -np.inf))
    with pytest.raises(ValueError, match="variance must have shape"):
        state = torch.zeros(1, *SHAPE)
        ops.affine_step(state, state[0], plan.pack(), torch.tensor([0]), slots=1, variance=torch.zeros(3, 4, 4, 4))
