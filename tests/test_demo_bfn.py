"""The demo's Bayesian flow networks: loops, judges, bits against entropies, a small run of every part."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdiff as fd

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from PIL import Image

from fastdiff.cli import main
from fastdiff.demo import bfn, bfn_classes, bfn_levels, bfn_nets, bfn_text, bfn_train, data, digits, nets, spiral
from fastdiff.demo.bfn_classes import ClassCase, plain_classes, sample_classes
from fastdiff.demo.measure import Case, sample_case
from tests.bfn_oracle import chi_square, posterior_logits

SCHEDULE = fd.schedules.BFNContinuous(0.05)


class Gaussian(nets.Preconditioned):
    """The exact eps of N(0, std^2) data."""

    def residual(self, x, features):
        return torch.zeros_like(x)


def test_the_flow_of_the_package_is_the_textbook_loop():
    got = sample_case(
        Gaussian(0.4), Case("bfn_solver", "BFN", SCHEDULE, 12, {"method": "bfn_solver2"}), (32, 2), seed=5
    )
    assert got.difference < 2e-5


def test_the_papers_continuous_loop_and_the_sampler_have_the_same_moments():
    case = Case("bfn_continuous", "BFN", SCHEDULE, 60)
    plan = case.plan()
    model = nets.PlanModel(Gaussian(0.4), plan)
    ours = fd.sample(model, plan, (20_000, 2), seed=1, mode="eager")
    from fastdiff.demo import plain

    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = plain.LOOPS["bfn_continuous"](
            model, plan.init_scale * torch.randn(20_000, 2), plain.trip(plan, SCHEDULE)
        )
    assert abs(ours.std() / theirs.std() - 1) < 0.02 and abs(ours.mean() - theirs.mean()) < 0.01


def test_the_papers_discrete_loop_reaches_the_prior():
    pi = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = plain_classes(posterior_logits(pi), (20_000, 2), fd.schedules.BFNDiscrete(4.0, 4), 10, 10)
        x = torch.distributions.Categorical(logits=posterior_logits(pi)(2 * theta - 1, None)).sample()
    assert abs(chi_square(x, pi.numpy())) < 4


def test_the_exact_network_takes_as_many_bits_as_the_entropy():
    pi = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    x = torch.multinomial(pi, 40_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(400, 100)
    bits = bfn_classes.total_bits(posterior_logits(pi), x, fd.schedules.BFNDiscrete(1.0, 4), times=40, seed=0)
    assert bits == pytest.approx(-(pi * pi.log2()).sum().item(), abs=0.02)


def test_sampling_measures_and_shows_the_first_samples():
    case = ClassCase("bfn_discrete", fd.schedules.BFNDiscrete(2.0, 5), 6)
    got = sample_classes(posterior_logits(torch.full((5,), 0.2)), case, (12, 3), seed=1, preview=4)
    assert got.x.shape == (12, 3) and torch.equal(got.trajectory.x0[-1], got.x[:4])
    assert min(got.us, got.us_plain, got.us_beyond_model, got.us_beyond_model_plain) > 0
    row = got.row("text", case, {"bits_per_character": 2.0}, [])
    assert row.schedule == "BFN, K = 5" and row.evaluations == 7


@pytest.mark.parametrize(("net", "shape"), [(bfn_nets.LevelNet, (2, 8, 8)), (bfn_nets.TextNet, (2, 20))])
def test_an_untrained_network_knows_what_the_token_itself_says(net, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net(17)
    theta = torch.softmax(torch.randn(*shape, 17, generator=torch.Generator().manual_seed(0)), dim=-1)
    got = model(2 * theta - 1, torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(torch.softmax(got, dim=-1), theta, atol=1e-5, rtol=1e-4)


def test_levels_are_the_pictures_own():
    images = data.digits(0).images[:50]
    levels = bfn_levels.levels_of(images)
    assert levels.min() == 0 and levels.max() == 16 and levels.shape == (50, 8, 8)
    torch.testing.assert_close(bfn_levels.images_of(levels), images)


def test_text_and_its_entropies():
    text = bfn_text.real_text()
    assert len(text) > bfn_text.ENOUGH and set(text) == set(bfn_text.ALPHABET) and "  " not in text
    assert bfn_text.text_of(bfn_text.classes_of(text[:100])) == text[:100]
    assert bfn_text.entropies("abababab" * 1000)[0] == pytest.approx(1, abs=1e-6)
    assert bfn_text.entropies("abababab" * 1000)[1] == pytest.approx(0, abs=1e-3)
    single, pair = bfn_text.entropies(text)
    shares = np.array(list(Counter(text).values())) / len(text)
    assert single == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-12) and pair < single < math.log2(27)
    assert bfn_text.known_words(["xx the cat yy"], {"the"}) == 0.5  # the cut words at the ends do not count


def test_text_without_the_reference(monkeypatch):
    real = bfn_text.importlib.import_module

    def missing(name):
        if name == "pydoc_data.topics":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(bfn_text.importlib, "import_module", missing)
    text = bfn_text.real_text()
    assert len(text) > bfn_text.ENOUGH and set(text) <= set(bfn_text.ALPHABET)


def test_times_are_spread_and_training_is_deterministic():
    t = bfn_train.spread_times(64, torch.Generator().manual_seed(0))
    assert sorted((t * 64).long().tolist()) == list(range(64))

    def fit(seed):
        levels = bfn_levels.levels_of(data.digits(0).images[:64])
        return bfn_train.fit(
            lambda: bfn_nets.LevelNet(17, 8), lambda net, g: bfn_levels._loss(levels, net, g), steps=4,
            learning_rate=1e-2, seed=seed, say=lambda line: None,
        )  # fmt: skip

    (one, a), (_, b), (_, c) = fit(0), fit(0), fit(1)
    assert a == b != c and not one.training


@pytest.mark.slow
def test_small_runs_write_everything_and_fail_their_targets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bfn, "STEPS", {"spiral": 5, "digits": 5})
    for module, name in ((bfn_levels, "TRAINING_STEPS"), (bfn_text, "TRAINING_STEPS")):
        monkeypatch.setattr(module, name, 5)
    for module in (spiral, digits):
        monkeypatch.setattr(module, "SAMPLES", 64)
    monkeypatch.setattr(bfn, "cases", lambda name: [replace(c, steps=12) for c in CASES[name]])
    few = [ClassCase("bfn_discrete", bfn_levels.SCHEDULE, 10)]
    monkeypatch.setattr(bfn_levels, "cases", lambda: few)
    monkeypatch.setattr(bfn_text, "cases", lambda: [replace(few[0], schedule=bfn_text.SCHEDULE)])
    assert main(["demo", "--only", "bfn,bfn_levels,bfn_text", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "targets missed" in err and "bits a character; entropy of order 0" in out and "    | " in out
    content = json.loads((tmp_path / "demo.json").read_text())
    assert [r["part"] for r in content["rows"]] == ["spiral", "spiral", "digits", "digits", "digits", "text"]
    assert content["pictures"] == ["bfn_spiral.png", "bfn_digits.png", "bfn_levels.png"]
    for name in content["pictures"]:
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name
    assert len((tmp_path / "bfn_text.txt").read_text().splitlines()) == 4 + bfn_text.SAMPLES


CASES = {name: bfn.cases(name) for name in ("spiral", "digits")}
