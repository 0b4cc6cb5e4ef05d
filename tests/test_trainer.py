"""The trainer: it learns, resumes bit for bit, writes whole files, averages and schedules as it says."""

import json
import math

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.training import ImportanceTimes, Trainer

CHAIN = fd.schedules.Betas(fd.schedules.linear_betas(100))
DATA = torch.randn(70, 3, generator=torch.Generator().manual_seed(0)) * 0.5 + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 3))

    def forward(self, x, t):
        return self.body(torch.cat([x, t[:, None].float() / 100], 1))


def make(times=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Net()

    def loss(net, x0, seeds, generator):
        t, w = (
            times.sample(len(x0), generator=generator)
            if times
            else (fd.training.uniform_times(len(x0), CHAIN, generator=generator), 1.0)
        )
        x_t = fd.ops.add_noise(x0, t, CHAIN, seeds=seeds)
        value = fd.ops.denoising_loss(net(x_t, t), x0, t, CHAIN, seeds, target="v")
        if times and net.training:
            times.update(t, value)
        return w * value

    state = {"times": times} if times else None
    given = {"epochs": 2, "batch": 16, "learning_rate": 3e-3, "held_out": DATA[:10], "state": state, **options}
    return Trainer(net, loss, DATA, **given)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in (*trainer.net.parameters(), *trainer.average.parameters())])


@pytest.mark.parametrize("importance", [False, True])
def test_resume_is_bit_for_bit(tmp_path, importance):
    """2 epochs at once = 1, then another process' worth of new objects that resumes and does the second."""

    def times():
        return ImportanceTimes(CHAIN, history=1) if importance else None

    whole = make(times(), folder=tmp_path / "a")
    history = whole.run()
    make(times(), folder=tmp_path / "b").run(until=1)
    again = make(times(), folder=tmp_path / "b")
    assert again.resume() and again.epoch == 1
    again.run()
    assert torch.equal(weights(again), weights(whole))
    kept = ("epoch", "step", "train", "validation", "learning_rate")
    assert [[h[k] for k in kept] for h in again.history] == [[h[k] for k in kept] for h in history]
    assert json.loads((tmp_path / "b" / "history.json").read_text()) == again.history
    assert history[1]["step"] == 2 * (70 // 16) and history[0]["validation"] is not None


def test_it_learns_and_two_runs_agree():
    one, two = (make(epochs=40, batch=35) for _ in range(2))
    history = one.run()
    two.run()
    assert torch.equal(weights(one), weights(two))
    assert history[-1]["train"] < 0.7 * history[0]["train"] and history[-1]["validation"] < history[0]["validation"]
    other = make(epochs=40, batch=35, seed=1)
    other.run(until=1)
    assert other.history[0]["train"] != history[0]["train"]


def test_schedule_and_average():
    trainer = make(epochs=5, batch=7, warmup=0.2)
    factors = [trainer._factor(k) for k in range(50)]
    assert factors[:10] == [(k + 1) / 10 for k in range(10)] and factors[10] == 1
    assert factors[30] == pytest.approx(0.5) and factors[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))
    want = None
    update = trainer.average.update_parameters

    def spy(net):
        nonlocal want
        n = int(trainer.average.n_averaged)
        now = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
        d = min(0.999, (1 + n) / (10 + n))
        want = now if n == 0 else d * want + (1 - d) * now
        update(net)

    trainer.average.update_parameters = spy
    trainer.run(until=1)
    got = torch.cat([p.detach().flatten() for p in trainer.average.parameters()]).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    net = trainer.averaged()
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_checkpoint_per_epoch_and_files(tmp_path):
    from safetensors.torch import load_file

    trainer = make(folder=tmp_path, keep=True, validate_every=2)
    trainer.run()
    names = {"checkpoint.safetensors", "history.json", "epoch_0001.safetensors", "epoch_0002.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert [h["validation"] is None for h in trainer.history] == [True, False]
    tensors = load_file(tmp_path / "epoch_0002.safetensors")
    assert torch.equal(tensors["net.body.0.weight"], trainer.net.body[0].weight)
    assert torch.equal(tensors["ema.module.body.0.weight"], trainer.average.module.body[0].weight)


def test_clipping_bounds_the_gradient():
    trainer = make(clip_norm=1e-3)
    trainer.run(until=1)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.net.parameters()))
    assert norm <= 1e-3 * (1 + 1e-4)


def test_bad_input(tmp_path):
    for options, error, text in (
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch": 2.0}, ValueError, "batch"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"warmup": 1.0}, ValueError, "warmup"),
        ({"held_out": [[1.0]]}, TypeError, "held_out"),
        ({"held_out": (DATA, DATA[:3])}, ValueError, "one length"),
        ({"held_out": DATA[:0]}, ValueError, "held_out must be None or hold at least one sample"),
        ({"keep": True}, ValueError, "folder"),
    ):
        with pytest.raises(error, match=text):
            make(**options)
    with pytest.raises(ValueError, match="folder or a path"):
        make().resume()
    assert make(folder=tmp_path).resume() is False
    make(folder=tmp_path).run(until=1)
    with pytest.raises(ValueError, match="another run"):
        make(folder=tmp_path, batch=35).resume()
    for other in ({"ema": 0.5}, {"warmup": 0.5}, {"clip_norm": 1.0}, {"weight_decay": 0.1}, {"betas": (0.8, 0.99)}):
        with pytest.raises(ValueError, match="another run"):
            make(folder=tmp_path, **other).resume()
    other = make(folder=tmp_path)
    other.net.body[0] = nn.Linear(4, 31)
    with pytest.raises(ValueError, match="another network"):
        other.resume()
