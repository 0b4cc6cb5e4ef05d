"""fd.accelerate and fd.restore: what they make, what it saves as, what it refuses, what it returns."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fastdiff as fd
from tests.accelerate_cases import ALL, TOLERANCE, accelerated, far, float64, loop, make, start, stepping
from tests.probe_cases import shipped

diffusers = pytest.importorskip("diffusers")
ONE_EACH = {case.scheduler: name for name, case in reversed(ALL.items())}
SIGMA = diffusers.EulerDiscreteScheduler


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_it_is_the_stock_class_to_everyone_who_asks(name, tmp_path):
    case = ALL[name]
    cls = shipped(case)
    stock = cls(**case.config)
    ours = fd.accelerate(stock)
    assert isinstance(ours, cls) and type(ours) is not cls
    assert (type(ours).__name__, type(ours).__module__) == (cls.__name__, cls.__module__)
    for method in ("step", "set_timesteps", "scale_model_input", "add_noise", "set_begin_index"):
        assert hasattr(ours, method) == hasattr(stock, method)
        if hasattr(stock, method):
            assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(stock, method))
    assert ours.config == stock.config and getattr(ours, "order", 1) == getattr(stock, "order", 1)
    ours.set_timesteps(*((3,) if "timesteps" not in case.setup and "sigmas" not in case.setup else ()), **case.setup)
    stock.set_timesteps(*((3,) if "timesteps" not in case.setup and "sigmas" not in case.setup else ()), **case.setup)
    assert torch.equal(ours.timesteps, stock.timesteps)
    if isinstance(getattr(stock, "sigmas", None), torch.Tensor):
        assert torch.equal(ours.sigmas, stock.sigmas)
    ours.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    kept = [{k: v for k, v in s.config.items() if not k.startswith("_")} for s in (again, stock)]
    assert type(again) is cls and kept[0] == kept[1]
    assert type(cls.from_config(ours.config)) is cls
    other = type(ours).from_config(stock.config)
    assert fd.restore(other).__class__ is cls


@pytest.mark.parametrize("name", ONE_EACH.values())
def test_tuple_and_dictionary_say_the_same(name):
    case = ALL[name]
    results = []
    for return_dict in (True, False):
        ours, stock = accelerated(case, 5), make(case, 5)
        t = ours.timesteps[0]
        t = t.reshape(1) if "Wuerstchen" in case.scheduler else t
        x = start(stock)
        out = []
        for s in (ours, stock):
            noise = {"generator": torch.Generator().manual_seed(0)}
            noise = noise if "generator" in inspect.signature(s.step).parameters else {}
            s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else None
            torch.manual_seed(0)  # a tree's seed
            out.append(stepping(s)(0.3 * x, t, x, return_dict=return_dict, **noise))
        mine, theirs = out
        assert len(mine) == len(theirs)
        if return_dict:
            assert isinstance(mine, type(theirs)) and list(mine.keys()) == list(theirs.keys())
            assert mine.prev_sample is mine["prev_sample"] and torch.equal(mine[0], mine.prev_sample)
            mine, theirs = mine.to_tuple(), theirs.to_tuple()
        else:
            assert isinstance(mine, tuple)
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and far(a, b) <= 1e-5
        results.append(mine[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_restore_in_the_middle_of_a_loop_that_remembers(name):
    scheduler = fd.accelerate(getattr(diffusers, name)())
    scheduler.set_timesteps(6)
    x = torch.ones(1, 2, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        if i == 3:
            with pytest.raises(RuntimeError, match=f"{name} is in the middle of a loop whose past"):
                fd.restore(scheduler)
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
    assert type(fd.restore(scheduler)) is getattr(diffusers, name)
    scheduler.set_timesteps(6)
    assert type(fd.restore(scheduler)) is getattr(diffusers, name)


def test_accelerated_in_the_middle_of_a_loop_that_remembers():
    """Stock's step goes on, with stock's history, and the warning says why."""
    results = []
    for late in (False, True):
        scheduler, x = diffusers.DPMSolverMultistepScheduler(), torch.ones(1, 2, 4, 4)
        scheduler.set_timesteps(6)
        for i, t in enumerate(scheduler.timesteps):
            if late and i == 3:
                scheduler = fd.accelerate(scheduler)
                with pytest.warns(RuntimeWarning, match="accelerated in the middle of a loop, whose past a plan does"):
                    x = scheduler.step(0.1 * x, t, x).prev_sample
                continue
            x = scheduler.step(0.1 * x, t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_a_step_to_nothing():
    """IPNDM's single step ends at 0, whatever the sample: a row whose result is not a part of anything."""
    scheduler = fd.accelerate(diffusers.IPNDMScheduler())
    scheduler.set_timesteps(1)
    x = scheduler.step(torch.ones(1, 2, 4, 4), scheduler.timesteps[0], torch.ones(1, 2, 4, 4)).prev_sample
    assert torch.equal(x, torch.zeros_like(x)) and scheduler._fastdiff.stock is None


def test_twice_is_once_and_restore_leaves_nothing():
    stock = SIGMA()
    ours = fd.accelerate(stock)
    assert fd.accelerate(ours) is ours and not hasattr(stock, "_fastdiff")
    back = fd.restore(ours)
    assert type(back) is SIGMA and vars(back).keys() == vars(stock).keys()
    assert fd.restore(back) is back
    assert fd.accelerate(ours, noise="philox") is not ours


@pytest.mark.parametrize("name", ["dpmsolver++-2m", "unipc-2-zero", "ddpm-clip"])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_go_on_where_the_original_was(name, copier):
    case = ALL[name]
    ours = accelerated(case, 6)
    x = start(ours)
    noise = {"generator": torch.Generator().manual_seed(0)} if "ddpm" in name else {}
    if copier == "deepcopy":
        for t in ours.timesteps[:3]:
            x = ours.step(torch.tanh(x), t, x, **noise).prev_sample
        twin, rest = copy.deepcopy(ours), ours.timesteps[3:]
    else:
        twin, rest = pickle.loads(pickle.dumps(ours)), ours.timesteps
    assert type(twin) is type(ours) and twin is not ours
    a = b = x
    for t in rest:
        noise = [{"generator": torch.Generator().manual_seed(int(t))} if "ddpm" in name else {} for _ in "ab"]
        a = ours.step(torch.tanh(a), t, a, **noise[0]).prev_sample
        b = twin.step(torch.tanh(b), t.clone(), b, **noise[1]).prev_sample
    assert torch.equal(a, b)


@pytest.mark.parametrize("value", [3, "scheduler", None, object()])
def test_what_is_no_scheduler_is_refused(value):
    with pytest.raises(TypeError, match="a diffusers scheduler or a pipeline"):
        fd.accelerate(value)
    with pytest.raises(TypeError, match="a diffusers scheduler or a pipeline"):
        fd.restore(value)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="unknown noise 'gauss'"):
        fd.accelerate(SIGMA(), noise="gauss")
    with pytest.raises(ValueError, match="seed must be an int"):
        fd.accelerate(SIGMA(), seed=-1)


def test_a_step_of_another_kind_stays_stock_and_says_so():
    scheduler = diffusers.RePaintScheduler()
    with pytest.warns(RuntimeWarning, match="RePaintScheduler stays as it is: .*needs original_image, mask"):
        assert fd.accelerate(scheduler) is scheduler

    class Other(diffusers.DDIMScheduler):
        def step(self, model_output, sample, timestep):
            return super().step(model_output, timestep, sample)

    with pytest.warns(RuntimeWarning, match="its step takes model_output, sample, timestep, not model_output"):
        assert type(fd.accelerate(Other())) is Other


def test_step_before_set_timesteps_is_an_error():
    for cls in (SIGMA, diffusers.DPMSolverMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        ours, x = fd.accelerate(cls()), torch.zeros(1, 3, 8, 8)
        with pytest.raises(RuntimeError, match="before set_timesteps"):
            ours.step(x, ours.timesteps[0], x)


def test_ddpm_runs_its_training_chain_without_set_timesteps_as_stock_does():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for wrap in (lambda s: s, fd.accelerate):
        scheduler, y = wrap(diffusers.DDPMScheduler(num_train_timesteps=20)), x
        generator = torch.Generator().manual_seed(1)
        for t in reversed(range(20)):
            y = scheduler.step(torch.tanh(y), t, y, generator=generator).prev_sample
        results.append(y)
    assert far(*results) <= 1e-5


def test_more_steps_than_planned_is_an_error():
    ours = accelerated(ALL["euler-eps"], 3)
    x = start(ours)
    for t in ours.timesteps:
        ours.step(ours.scale_model_input(x, t), t, x)
    with pytest.raises(RuntimeError, match="all 3 steps of this schedule are done"):
        ours.step(x, ours.timesteps[-1], x)
    ours.set_timesteps(3)
    ours.step(x, ours.timesteps[0], x)


@pytest.mark.parametrize("name", ["ddpm-clip", "euler-eps", "dpmsolver++-2m", "ddim-clip"])
@pytest.mark.parametrize("t", [401, 17.5, torch.tensor(12345)])
def test_a_timestep_of_another_schedule_is_an_error(name, t):
    ours = accelerated(ALL[name], 4)
    x = start(ours)
    with pytest.raises(ValueError, match="not in the schedule"):
        ours.step(x, t, x)
    first = ours.timesteps[0]
    ours.step(x, first, x)
    with pytest.raises(ValueError, match="not in the schedule"):
        ours.step(x, t, x)


def test_shapes_that_would_broadcast_are_errors():
    for name in ("euler-eps", "ddpm-clip", "dpmsolver++-2m"):
        ours, x = accelerated(ALL[name], 4), torch.zeros(2, 3, 8, 8)
        with pytest.raises(ValueError, match=r"model_output has shape \(1, 3, 8, 8\), sample \(2, 3, 8, 8\)"):
            ours.step(x[:1], ours.timesteps[0], x)
        ours.step(x, ours.timesteps[0], x)
        with pytest.raises(ValueError, match="must be the same"):
            ours.step(x, ours.timesteps[1], x[:1])
    multi = accelerated(ALL["dpmsolver++-2m"], 4)
    multi.step(x, multi.timesteps[0], x)
    with pytest.raises(ValueError, match="changed its shape"):
        multi.step(x[:1], multi.timesteps[1], x[:1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_samples_that_are_no_floats_are_errors(dtype):
    ours, x = accelerated(ALL["euler-eps"], 4), torch.zeros(2, 3, 8, 8)
    with pytest.raises(TypeError, match="sample must be floating point"):
        ours.step(x, ours.timesteps[0], x.to(dtype))
    with pytest.raises(TypeError, match="model_output must be floating point"):
        ours.step(x.to(dtype), ours.timesteps[0], x)
    with pytest.raises(TypeError, match="sample must be a torch.Tensor"):
        ours.step(x, ours.timesteps[0], x.numpy())


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [([0.2, 0.5, 1.0], "must not increase"), ([1.0, float("nan"), 0.2], "must be finite"), ([], "n >= 1")],
)
def test_bad_sigmas_are_errors(sigmas, message):
    for cls in (diffusers.FlowMatchEulerDiscreteScheduler, SIGMA):
        with pytest.raises(ValueError, match=message):
            fd.accelerate(cls()).set_timesteps(sigmas=sigmas)


def test_no_steps_are_an_error():
    for name in ONE_EACH.values():
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
            fd.accelerate(shipped(ALL[name])()).set_timesteps(0)


def test_options_may_change_between_steps_only_where_nothing_is_carried():
    ddim, x = accelerated(ALL["ddim-noclip"], 4), torch.ones(1, 3, 4, 4)
    stock = make(ALL["ddim-noclip"], 4)
    for k, t in enumerate(stock.timesteps):
        got, want = (
            s.step(x, t, x, eta=0.2 * k, generator=torch.Generator().manual_seed(k)).prev_sample for s in (ddim, stock)
        )
        assert far(got, want) <= 1e-6
    lms = accelerated(ALL["lms"], 4)
    lms.step(x, lms.timesteps[0], x)
    with pytest.raises(ValueError, match="changed from {} to {'order': 2} in the middle of a loop"):
        lms.step(x, lms.timesteps[1], x, order=2)


def test_positional_and_unknown_arguments_of_step():
    ours, stock = accelerated(ALL["ddim-noclip"], 4), make(ALL["ddim-noclip"], 4)
    x = torch.ones(1, 3, 4, 4)
    got, want = (s.step(x, s.timesteps[0], x, 0.5, False, torch.Generator().manual_seed(0))[0] for s in (ours, stock))
    assert far(got, want) <= 1e-6
    with pytest.raises(TypeError, match="unexpected argument 'sigma'"):
        ours.step(x, ours.timesteps[1], x, sigma=3)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"])
def test_a_learned_variance(name):
    """The model's second plane scales the noise, element by element."""
    cls = getattr(diffusers, name)

    def run(s, dtype=torch.float32):
        s.set_timesteps(4)
        x, generator = torch.linspace(-1, 1, 96, dtype=dtype).reshape(2, 3, 4, 4), torch.Generator().manual_seed(0)
        for t in s.timesteps:
            x = s.step(torch.tanh(torch.cat([x, 0.3 * x], dim=1)), t, x, generator=generator).prev_sample
        return x

    ours = fd.accelerate(cls(variance_type="learned_range"))
    got, old = run(ours), run(cls(variance_type="learned_range"))
    with float64(cls()):
        want = run(cls(variance_type="learned_range"), torch.float64)
    assert far(got, want) <= max(TOLERANCE, far(old, want) + TOLERANCE) and ours._fastdiff.stock is None


@pytest.mark.parametrize(("variance", "channels"), [("fixed_small", 6), ("learned_range", 3)])
def test_a_variance_that_is_not_learned_meets_stocks_own_error(variance, channels):
    scheduler = fd.accelerate(diffusers.DDPMScheduler(variance_type=variance))
    scheduler.set_timesteps(4)
    x, m = torch.ones(2, 3, 4, 4), torch.ones(2, channels, 4, 4)
    with (
        pytest.warns(RuntimeWarning, match="do not agree on a learned variance"),
        pytest.raises((RuntimeError, TypeError)),
    ):
        scheduler.step(m, scheduler.timesteps[0], x)


def test_one_schedule_after_another():
    for name in ("unipc-2-zero", "ddpm-clip"):
        case = ALL[name]
        ours = accelerated(case, 9)
        x = start(ours)
        loop(ours, case, x)
        ours.set_timesteps(5)
        assert far(loop(ours, case, x).x[-1], loop(make(case, 5), case, x).x[-1]) <= 1e-5
