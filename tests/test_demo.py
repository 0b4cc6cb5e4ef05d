"""The demo's parts: data, judges, networks, textbook loops, report; and a small run of the whole."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import fastdiff as fd

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from PIL import Image

from fastdiff import demo
from fastdiff.cli import main
from fastdiff.demo import conditions, data, denoising, digits, nets, plain, plots, report, spiral, train
from fastdiff.demo.measure import Case, sample_case

VP = fd.schedules.VP()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian(nets.Preconditioned):
    """The exact eps of N(0, std^2) data: the preconditioning with nothing left to learn."""

    def residual(self, x, features):
        return torch.zeros_like(x)


def test_spiral_is_the_one_described():
    x = data.spiral(4000, generator())
    y = (x + 1 / 8) * 4 * math.pi
    t = y.norm(dim=1)
    assert 1.5 * math.pi - 1e-4 <= t.min() and t.max() <= 4.5 * math.pi + 1e-4 and x.abs().max() < 1.01
    torch.testing.assert_close(y, torch.stack([t * t.cos(), t * t.sin()], dim=1), atol=1e-4, rtol=0)


def test_distance_and_coverage_judge():
    x = data.spiral(2000, generator())
    assert data.distance_to_spiral(x).max() < 1e-3 and data.spiral_coverage(x) < 0.004
    noise = torch.randn(2000, 2, generator=generator())
    assert 0.45 < data.distance_to_spiral(noise).mean() < 0.6
    half = x[x[:, 0] > 0]  # perfect samples of half of the curve
    assert data.distance_to_spiral(half).mean() < 1e-3 and data.spiral_coverage(half) > 0.1


def test_nearest_point_of_the_spiral():
    """Newton's point is a minimum: closer than 80,000 points of the curve, orthogonal to it, ends included."""
    x = 0.7 * torch.randn(300, 2, generator=generator(3), dtype=torch.float64)
    points, distance = data.nearest_on_spiral(x)
    t = torch.linspace(data.T_LOW, data.T_HIGH, 80_000, dtype=torch.float64)
    want = torch.cdist(x, data._spiral_at(t)).amin(dim=1)
    assert (distance <= want + 1e-12).all() and (want - distance).max() < 1e-5
    assert torch.cdist(points, data._spiral_at(t)).amin(dim=1).max() < 2e-4
    on, zero = data.nearest_on_spiral(data._spiral_at(t[::500]))
    assert zero.max() < 1e-12 and on.shape == (160, 2)
    assert data.nearest_on_spiral(x[:0])[1].shape == (0,)


def test_ways_to_denoise():
    """At low noise the straight line, the mean of the data and the exact posterior agree with each other."""
    points = data.spiral(20_000, generator())
    y, found = denoising.denoised(points, Gaussian(0.45), 0.01)
    assert y.shape == (140, 2) and set(found) == {"straight line", "ideal", "network"}
    assert (found["straight line"] - found["ideal"]).norm(dim=1).mean() < 0.005
    level = torch.tensor(0.01)
    torch.testing.assert_close(found["network"], y * 0.45**2 / (0.45**2 + level**2), rtol=1e-5, atol=1e-6)


def test_digits_are_split_without_overlap():
    got = data.digits(0)
    assert got.images.shape == (1437, 1, 8, 8) and len(got.held_images) == 360
    assert got.images.min() == -1 and got.images.max() == 1
    assert got.nearest(got.images[:20]).max() < 1e-3 and got.nearest(got.held_images).min() > digits.HALF_GRAY_LEVEL


def test_log_density_is_the_mixture_of_the_noised_points():
    points, x = data.spiral(50, generator()), torch.randn(30, 2, generator=generator(1))
    alpha, sigma = 0.7, 0.3
    one = torch.distributions.Normal(alpha * points.double(), sigma)
    want = one.log_prob(x.double()[:, None]).sum(dim=2).exp().mean(dim=1).log()
    torch.testing.assert_close(plots.log_density(x, points, alpha, sigma).double(), want, atol=2e-4, rtol=0)
    # far away the sum of the probabilities themselves underflows
    assert torch.isfinite(plots.log_density(torch.full((1, 2), 50.0), points, 1.0, 0.05)).all()


@pytest.mark.parametrize(
    "schedule", [VP, fd.schedules.EDM(0.01, 80.0), fd.schedules.Betas(fd.schedules.linear_betas(9))]
)
def test_plan_model_knows_the_noise_level_of_every_row(schedule):
    plan = fd.solvers.heun(schedule, 5)
    seen = []

    class Spy(Gaussian):
        def forward(self, x, alpha, sigma):
            seen.append((alpha, sigma))
            return super().forward(x, alpha, sigma)

    fd.sample(nets.PlanModel(Spy(1.0), plan), plan, (3, 2), mode="eager")
    assert len(seen) == plan.nfe
    for row, (alpha, sigma) in enumerate(seen):
        np.testing.assert_allclose(alpha, np.full(3, plan.alpha[row]), rtol=1e-6)
        np.testing.assert_allclose(sigma, np.full(3, plan.sigma[row]), rtol=1e-6)


def test_preconditioning_depends_on_the_ratio_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.SpiralNet(0.5)
    x, a, s = torch.randn(6, 2, generator=generator()), torch.full((6,), 0.3), torch.full((6,), 0.6)
    torch.testing.assert_close(net(x, a, s), net(x / 0.3, a / 0.3, s / 0.3))
    assert not torch.allclose(net(x, a, s), net(x, a, s / 2), atol=1e-2)


DETERMINISTIC = [
    Case("ddim", "linear betas", fd.schedules.Betas(fd.schedules.linear_betas(1000)), 12),
    Case("euler", "Cosine", fd.schedules.Cosine(), 12),
    Case("probability_flow", "VP", VP, 12, {"spacing": "logsnr"}),
    Case("heun", "EDM", fd.schedules.EDM(0.01, 80.0), 12),
    Case("dpmpp_2m", "VP", VP, 12, {"spacing": "logsnr"}),
]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda c: c.label)
def test_sampler_and_textbook_loop_give_the_same_samples(case):
    net = Gaussian(0.4)
    got = sample_case(net, case, (32, 2), seed=5)
    assert got.difference < 2e-5 * max(1.0, got.plan.init_scale / 10)
    assert min(got.us, got.us_plain, got.us_beyond_model, got.us_beyond_model_plain) > 0
    assert got.trajectory.x.shape == (got.plan.nfe + 1, 32, 2)


@pytest.mark.parametrize("solver", ["ddpm", "euler_maruyama"])
def test_stochastic_textbook_loop_and_sampler_reach_the_data(solver):
    std, case = 0.4, Case(solver, "VP", VP, 200)
    plan, net = case.plan(), Gaussian(std)
    model = nets.PlanModel(net, plan)
    ours = fd.sample(model, plan, (4000, 2), seed=1, mode="eager")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = plain.LOOPS[solver](model, torch.randn(4000, 2), plain.trip(plan, VP))
    assert abs(ours.std() / theirs.std() - 1) < 0.03
    for x in (ours, theirs):  # both carry the bias of 200 first-order steps
        assert abs(x.std().item() / std - 1) < 0.08 and abs(x.mean().item()) < 0.03


def test_training_is_deterministic_and_learns():
    points = data.spiral(1000, generator())
    recipe = replace(spiral.RECIPE, steps=60, batch=128)
    fit = partial(train.fit_denoiser, partial(nets.SpiralNet, 0.45, 32), points, say=lambda line: None)
    (one, loss), (two, _), (other, _) = fit(recipe, seed=0), fit(recipe, seed=0), fit(recipe, seed=1)
    x, a, s = points[:50], torch.ones(50), torch.full((50,), 0.5)
    assert torch.equal(one(x, a, s), two(x, a, s)) and not torch.equal(one(x, a, s), other(x, a, s))
    _, first = fit(replace(recipe, steps=20), seed=0)
    assert loss < first


def row(**changes):
    base = report.Row("spiral", "VP", "ddim", "default", 40, 12.0, 15.0, 3.0, 4.0, {"distance": 0.01})
    return replace(base, **changes)


def test_table_shows_misses_and_gaps():
    lines = report.table([row(), row(part="digits", metrics={"confidence": 0.9}, missed=["too low"])]).splitlines()
    assert lines[0].split()[:5] == ["data", "schedule", "solver", "spacing", "evals"]
    assert lines[2].endswith("ok") and "0.0100" in lines[2] and lines[3].endswith("MISSED") and "0.900" in lines[3]


def test_judges_name_what_was_missed():
    case = Case("ddim", "VP", VP, 4)
    got = sample_case(Gaussian(0.4), case, (200, 2), seed=0)
    judged = spiral._judge(case, got)
    assert any("distance" in line for line in judged.missed) and "ddim / VP" in judged.missed[0]
    real = data.digits(0)

    def sure(x):
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 10) * 50.0

    copies = replace(got, x=real.images[:100])
    missed = digits._judge(case, copies, real, sure, 1.0).missed
    assert any("copies" in line for line in missed) and any("class shares" in line for line in missed)
    unsure = digits._judge(case, copies, real, lambda x: torch.zeros(len(x), 10), 1.0).missed
    assert any("confidence" in line for line in unsure)


def test_schedules_part(tmp_path, capsys):
    assert main(["demo", "--only", "schedules", "--out", str(tmp_path / "new" / "out"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "new" / "out" / "demo.json").read_text())
    assert content["pictures"] == ["schedules.png"] and content["machine"]["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "new" / "out" / "schedules.png") as picture:
        assert min(picture.size) > 500 and np.asarray(picture).std() > 20


@pytest.mark.slow
def test_small_run_writes_everything_and_fails_its_targets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spiral, "RECIPE", replace(spiral.RECIPE, steps=5))
    monkeypatch.setattr(digits, "RECIPE", replace(digits.RECIPE, steps=5))
    monkeypatch.setattr(spiral, "SAMPLES", 200)
    monkeypatch.setattr(digits, "SAMPLES", 64)
    few = [Case("ddpm", "VP", VP, 20), Case("probability_flow", "VP", VP, 12, {"spacing": "logsnr"})]
    monkeypatch.setattr(spiral, "cases", lambda: few)
    monkeypatch.setattr(digits, "cases", lambda: few)
    threads = torch.get_num_threads()
    assert main(["demo", "--only", "digits,spiral", "--out", str(tmp_path)]) == 1
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "targets missed: spiral: ddpm / VP: distance" in err
    assert "training" in out and "MISSED" in out
    content = json.loads((tmp_path / "demo.json").read_text())
    assert [r["part"] for r in content["rows"]] == ["spiral", "spiral", "digits", "digits"]
    assert content["missed"] and all(r["us_per_step"] > 0 for r in content["rows"])
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {"demo.json", *content["pictures"]} and len(content["pictures"]) == 13
    for name in content["pictures"]:
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name
            if name.endswith(".gif"):
                assert picture.n_frames >= 12


def test_the_pull_is_the_log_probability_of_what_is_known():
    """-sum of d^2 / (2 var) over the known rows alone, var = sigma^2 / (alpha^2 + sigma^2) = sigma^2 of VP; a class's
    is its logarithm."""
    t, target = torch.tensor([0.3, 0.8]), torch.zeros(2, 1, 8, 8)
    off = torch.full_like(target, 0.5)
    off[..., conditions.ROWS :, :] = 7.0
    want = -conditions.ROWS * 8 * 0.25 / (2 * VP.sigma(t).float() ** 2)
    torch.testing.assert_close(conditions._agreement(off, t, target), want, rtol=1e-5, atol=0)
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    got = conditions._log_class(lambda x: logits, target[:1], torch.tensor([1]))
    assert abs(float(got) - (2 - math.log(math.e + math.e**2 + math.e**0.5))) < 1e-6
    assert conditions._share(lambda x: logits.expand(2, 3), target, torch.tensor([1, 0])) == 0.5


def test_a_seed_out_of_range_is_refused_before_anything_is_trained(tmp_path, capsys):
    assert main(["demo", "--only", "schedules", "--seed", "-4", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "a seed must be in 0 .. 2**63 - 1, got -4" in err and not (tmp_path / "out").exists()


def test_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    assert main(["demo", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "scikit-learn" in err and "fastdiff-samplers[demo]" in err
