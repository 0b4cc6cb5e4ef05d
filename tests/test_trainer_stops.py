"""A trainer that is stopped where an epoch ends, and what a loss may return."""

import pytest
import torch

import fastdiff as fd


def test_an_interruption_while_validating_does_the_epoch_again(tmp_path):
    """Its entry and its checkpoint are there in the end."""
    calls = []

    def of(folder, stop):
        def loss(net, x, seeds, generator):
            calls.append(net.training)
            if stop and not net.training and calls.count(False) == 2:
                raise KeyboardInterrupt
            return net(x).square().mean(1)

        torch.manual_seed(0)
        net, data = torch.nn.Linear(2, 2), torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
        return fd.training.Trainer(
            net, loss, data, held_out=data, epochs=3, batch=8, folder=folder, keep=True, progress=False
        )

    trainer = of(tmp_path / "stopped", True)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.warns(RuntimeWarning, match="epoch 1 was interrupted"):
        history = trainer.run()
    assert [(e["epoch"], e["step"]) for e in history] == [(1, 2), (2, 4), (3, 6)]
    assert sorted(p.name for p in (tmp_path / "stopped").glob("epoch_*")) == [
        f"epoch_{k:04d}.safetensors" for k in (1, 2, 3)
    ]


def test_a_checkpoint_that_was_interrupted_is_written_by_the_next_run(tmp_path, monkeypatch):
    def loss(net, x, seeds, generator):
        return net(x).square().mean(1)

    data = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    trainer = fd.training.Trainer(
        torch.nn.Linear(2, 2), loss, data, epochs=2, batch=8, folder=tmp_path, keep=True, progress=False
    )
    with monkeypatch.context() as m:
        m.setattr(trainer, "save", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    trainer.run(1)
    assert (tmp_path / "epoch_0001.safetensors").exists()


def test_one_number_is_the_loss_of_all():
    """A loss that is a mean counts a short last batch by its samples: of 20 values 16 are 1 and 4 are 11."""
    data = torch.ones(20, 1)
    data[16:] = 11.0
    for reduced in (lambda v: v, torch.mean):
        trainer = fd.training.Trainer(
            torch.nn.Linear(1, 1), lambda net, x, seeds, g, r=reduced: r((0 * net(x) + x)[:, 0]), data, epochs=1,
            batch=16, held_out=data, progress=False,
        )  # fmt: skip
        assert trainer.validate() == pytest.approx(3.0)
    trainer.loss = lambda *args: None
    with pytest.raises(TypeError, match=r"loss must return a floating point tensor \[B\], got None"):
        trainer.run()


def test_validating_leaves_the_state_of_the_loss_alone():
    """ImportanceTimes that the loss updates: held-out losses do not enter, and a validation can be done again.

    Nor where it is interrupted.
    """
    schedule, stop = fd.schedules.VP(), []
    times = fd.training.ImportanceTimes(schedule, bins=4, history=3)

    def loss(net, x, seeds, generator):
        t, w = times.sample(len(x), generator=generator)
        made = fd.ops.denoising_loss(
            net(fd.ops.add_noise(x, t, schedule, seeds=seeds)), x, t, schedule, seeds, target="x0"
        )
        times.update(t, made)
        if stop:
            raise KeyboardInterrupt
        return w * made

    data = torch.randn(84, 4, generator=torch.Generator().manual_seed(0))
    trainer = fd.training.Trainer(
        torch.nn.Linear(4, 4), loss, data[:64], held_out=data[64:], epochs=2, batch=16, state={"times": times},
        progress=False,
    )  # fmt: skip
    trainer.run()
    before = times.losses.clone()
    assert len({trainer.validate() for _ in range(3)}) == 1
    assert torch.equal(times.losses, before)
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        trainer.validate()
    assert torch.equal(times.losses, before)
