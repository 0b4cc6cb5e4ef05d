"""The trainer at odd moments: interruptions, foreign and damaged checkpoints, 16-bit weights, bad options."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.training import ImportanceTimes, Trainer
from fastdiff.training import trainer as module
from fastdiff.training.trainer import CHECKPOINT

CHAIN = fd.schedules.Betas(fd.schedules.linear_betas(100))
DATA = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers of one shape, registered in an order."""

    def __init__(self, order: str = "ab") -> None:
        super().__init__()
        layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
        for name in order:
            setattr(self, name, layers[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def narrow() -> nn.Module:
    """Every parameter of its own shape."""
    return nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))


def loss(net: nn.Module, x0: Tensor, seeds: Tensor, generator: torch.Generator) -> Tensor:
    t = fd.training.uniform_times(len(x0), CHAIN, generator=generator)
    x_t = fd.ops.add_noise(x0, t, CHAIN, seeds=seeds)
    return fd.ops.denoising_loss(net(x_t), x0, t, CHAIN, seeds)


def make(net: Callable[[], nn.Module] = Two, loss: Any = loss, **options: Any) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = net()
    dtype = next(made.parameters()).dtype
    return Trainer(made, loss, DATA.to(dtype), **{"epochs": 4, "batch": 5, "progress": False, **options})


def everything(trainer: Trainer) -> dict[str, Tensor]:
    parts = {"net": trainer.net.state_dict(), "ema": trainer.average.state_dict()}
    found = {f"{part}.{k}": v.clone() for part, tensors in parts.items() for k, v in tensors.items()}
    for name, p in trainer.net.named_parameters():
        found |= {f"optimiser.{name}.{k}": v.clone() for k, v in trainer.optimiser.state.get(p, {}).items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_16_bits_moves(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights that jump from 0 to 1 and stay: the average is 1 - prod d_k, as float64 has it."""
    trainer = make(lambda: Two().to(dtype), ema=0.999, folder=tmp_path, held_out=DATA[:7].to(dtype))
    weight = trainer.net.a.weight.data
    weight.fill_(0)
    trainer.average.update_parameters(trainer.net)
    weight.fill_(1)
    rest = 1.0
    for k in range(1, 3000):
        trainer.average.update_parameters(trainer.net)
        rest *= min(0.999, (1 + k) / (10 + k))
    got = trainer.average.module.a.weight
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full_like(got, 1 - rest), rtol=0, atol=1e-4)
    shown = trainer.averaged()
    assert all(p.dtype == dtype and not p.requires_grad for p in shown.parameters()) and not shown.training
    assert torch.equal(shown.a.weight, got.to(dtype))
    assert math.isfinite(trainer.validate())

    trainer.save()
    tensors = load_file(tmp_path / CHECKPOINT)
    assert tensors["ema.module.a.weight"].dtype == torch.float32 and tensors["net.a.weight"].dtype == dtype
    again = make(lambda: Two().to(dtype), ema=0.999, folder=tmp_path)
    assert again.resume() and same(everything(again), everything(trainer))


def older(path: Path, names: list[str], dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint as the first release did: the optimiser's state by position, the average in `dtype`."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fastdiff"])
    about.pop("format")
    found = {}
    for k, v in load_file(path).items():
        kind, _, rest = k.partition(".")
        if kind == "optimiser":
            owner, _, key = rest.rpartition(".")
            k = f"optimiser.{names.index(owner)}.{key}"
        short = kind == "ema" and dtype is not None and v.dtype.is_floating_point
        found[k] = v.to(dtype) if short else v
    save_file(found, path, metadata={"fastdiff": json.dumps(about)})


def test_an_old_checkpoint_is_read_where_its_order_is_sure(tmp_path: Path) -> None:
    trainer = make(lambda: narrow().bfloat16(), folder=tmp_path)
    trainer.run(until=2)
    before = everything(trainer)
    older(tmp_path / CHECKPOINT, list(trainer.parameters), torch.bfloat16)
    again = make(lambda: narrow().bfloat16(), folder=tmp_path)
    assert again.resume()
    after = everything(again)
    assert after["ema.module.0.weight"].dtype == torch.float32
    before = {k: v.bfloat16().float() if "ema" in k and v.dim() else v for k, v in before.items()}
    assert same(before, after)

    trainer = make(folder=tmp_path / "twins")
    trainer.run(until=1)
    older(tmp_path / "twins" / CHECKPOINT, list(trainer.parameters))
    again = make(folder=tmp_path / "twins")
    before = everything(again)
    with pytest.raises(ValueError, match=r"by position, and of parameters of one shape \(a.weight, a.bias"):
        again.resume()
    assert same(before, everything(again))


def test_momentum_follows_its_parameter(tmp_path: Path) -> None:
    """Registered in another order, the same network goes on as itself."""
    trainer = make(folder=tmp_path)
    trainer.run(until=2)
    other = make(lambda: Two("ba"), folder=tmp_path)
    assert other.resume() and same(everything(trainer), everything(other))


class Counted:
    """Interrupts a training step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, net: nn.Module, *given: Any) -> Tensor:
        if net.training:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return loss(net, *given)


def test_an_interrupted_epoch_is_done_again(tmp_path: Path) -> None:
    whole = make(folder=tmp_path / "whole")
    want = whole.run()
    broken = make(loss=Counted(7), folder=tmp_path / "broken")  # in the second of 4 epochs of 4 steps
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = broken.run()
    assert same(everything(whole), everything(broken)) and broken.step == 16
    assert [h["learning_rate"] for h in got] == [h["learning_rate"] for h in want]


@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupted_epoch_without_a_checkpoint_goes_on_from_its_weights(at: int) -> None:
    want = [h["learning_rate"] for h in make().run()]
    trainer = make(loss=Counted(at))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.warns(RuntimeWarning, match=f"epoch {1 + at // 4} was interrupted and no checkpoint"):
        got = trainer.run()
    assert [h["learning_rate"] for h in got] == want and [h["step"] for h in got] == [4, 8, 12, 16]


def refuses(trainer: Trainer, text: str, path: Path | None = None) -> None:
    """resume() raises, with the path, and leaves everything as it was."""
    times = trainer.state.get("times")
    before, state = everything(trainer), times.state_dict() if times else {}
    with pytest.raises(ValueError, match=text) as caught:
        trainer.resume(path)
    assert str(path or trainer.folder) in str(caught.value)
    assert same(before, everything(trainer)) and trainer.epoch == trainer.step == 0 and not trainer.history
    assert same(state, times.state_dict() if times else {})


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (lambda: Two().double(), "another network: a.weight is float32 there, float64 here, a.bias"),
        (lambda: Two().bfloat16(), "a.weight is float32 there, bfloat16 here"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "0.weight is missing, 0.bias is missing, a.bias is unknown here"),
        (lambda: nn.Linear(8, 8), "weight is missing"),
    ],
)
def test_another_network_is_refused_whole(tmp_path: Path, net: Callable[[], nn.Module], text: str) -> None:
    make(folder=tmp_path).run(until=1)
    refuses(make(net, folder=tmp_path), text)


def test_a_network_with_one_shape_more_is_refused_whole(tmp_path: Path) -> None:
    """Its first tensors would fit."""
    make(narrow, folder=tmp_path).run(until=1)
    other = make(narrow, folder=tmp_path)
    other.net[2].bias = nn.Parameter(torch.zeros(9))
    refuses(other, r"another network: 2.bias has shape \(8,\) there, \(9,\) here")


def test_the_optimisers_state_must_fit(tmp_path: Path) -> None:
    make(folder=tmp_path).run(until=1)
    tensors = load_file(tmp_path / CHECKPOINT)
    from safetensors import safe_open

    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    for change, text in (
        (lambda v: v.update({"optimiser.c.weight.exp_avg": torch.zeros(8)}), "'c.weight', which is no parameter here"),
        (
            lambda v: v.update({"optimiser.a.bias.exp_avg": torch.zeros(1)}),
            r"exp_avg of a.bias is float32 \(1,\) there",
        ),
        (lambda v: v.pop("optimiser.a.bias.exp_avg"), "the optimiser's state of a.bias is .*: not all of it"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / CHECKPOINT, metadata=metadata)
        refuses(make(folder=tmp_path), text)


def test_another_run_is_named(tmp_path: Path) -> None:
    make(folder=tmp_path).run(until=1)
    refuses(
        make(folder=tmp_path, batch=6, ema=0.5), r"another run: batch is 5 there, 6 here, ema is 0.999 there, 0.5 here$"
    )


def test_state_must_fit(tmp_path: Path) -> None:
    def with_times(history: int = 10, **options: Any) -> Trainer:
        return make(state={"times": ImportanceTimes(CHAIN, history=history)}, **options)

    make(folder=tmp_path / "none").run(until=1)
    with_times(folder=tmp_path / "ten").run(until=1)
    refuses(with_times(1, folder=tmp_path / "ten"), r"another state 'times': losses must have shape \(100, 1\)")
    refuses(with_times(folder=tmp_path / "none"), "another state 'times': a state holds losses, counts, got nothing")
    refuses(make(folder=tmp_path / "ten"), "state that this run has not: times.counts, times.losses; give it as state=")
    both = {"times": ImportanceTimes(CHAIN), "more": ImportanceTimes(CHAIN)}
    both["times"].losses += 1
    refuses(make(folder=tmp_path / "ten", state=both), "another state 'more'")


@pytest.mark.parametrize("size", [0, 5, 50, -10])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, size: int) -> None:
    make(folder=tmp_path).run(until=1)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:size])
    refuses(make(folder=tmp_path), "is damaged or no checkpoint|is empty", path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name, metadata in (("plain", None), ("list", {"fastdiff": "[]"}), ("half", {"fastdiff": '{"epoch": 1}'})):
        save_file({"a": torch.zeros(2)}, tmp_path / name, metadata=metadata)
        refuses(make(), "no checkpoint of a Trainer", tmp_path / name)
    save_file({"a": torch.zeros(2)}, tmp_path / "text", metadata={"fastdiff": "no JSON"})
    refuses(make(), "damaged or no checkpoint", tmp_path / "text")
    refuses(make(), "is a folder, not a checkpoint", tmp_path)


def test_all_bits_of_a_seed_count() -> None:
    """A CPU's generator takes 32 of them; small seeds keep the numbers that they had."""

    def first(seed: int, epoch: int = 1) -> float:
        return float(torch.rand((), generator=module._generator(seed, epoch)))

    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**64, 2**100, -1, 2**32 - 1]
    assert len({first(s) for s in seeds}) == len(seeds)
    old = torch.Generator().manual_seed((3 * 0x9E3779B97F4A7C15 + 2 * 0xBF58476D1CE4E5B9) % 2**63)
    assert first(3, 2) == float(torch.rand((), generator=old))


def test_validation_has_the_same_noise_whatever_the_program_drew() -> None:
    def of_global(net: nn.Module, x0: Tensor, seeds: Tensor, generator: torch.Generator) -> Tensor:
        return (net(x0) * torch.randn(x0.shape)).sum(1)

    trainer = make(loss=of_global, held_out=DATA[:7])
    one = trainer.validate()
    before = torch.random.get_rng_state()
    assert trainer.validate() == one and torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert trainer.validate() == one


def test_history_is_json_whatever_the_loss(tmp_path: Path) -> None:
    def lost(net: nn.Module, x0: Tensor, *_: Any) -> Tensor:
        return net(x0).mean(1) * math.nan

    make(loss=lost, folder=tmp_path, held_out=DATA[:7]).run(until=1)

    def refuse(name: str) -> float:
        raise AssertionError(name)

    (entry,) = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert entry["train"] is None and entry["validation"] is None and entry["step"] == 4


def test_numpy_options(tmp_path: Path) -> None:
    given = {"seed": 3, "learning_rate": 1e-3, "ema": 0.5, "epochs": 2, "batch": 5}
    kinds = {"seed": np.int64, "learning_rate": np.float64, "ema": np.float32, "epochs": np.int32, "batch": np.int64}
    trainer = make(folder=tmp_path, **{k: kinds[k](v) for k, v in given.items()})
    trainer.run(until=1)
    plain = make(folder=tmp_path, **given)
    assert plain.resume() and same(everything(plain), everything(trainer))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        *(
            ({"clip_norm": v}, ValueError, "clip_norm must be a finite number > 0")
            for v in (0.0, -1, math.nan, math.inf)
        ),
        *(({"clip_norm": v}, ValueError, "clip_norm") for v in (True, "1")),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be a finite number > 0, got inf"),
        ({"learning_rate": "1e-3"}, ValueError, "learning_rate"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be a finite number >= 0"),
        ({"ema": 1.0}, ValueError, "ema must be a finite number >= 0 and < 1, got 1.0"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"seed": 1.5}, ValueError, "seed must be an int, got 1.5"),
        ({"seed": "a"}, ValueError, "seed must be an int, got 'a'"),
        ({"held_out": (DATA, DATA)}, ValueError, "held_out must be as many tensors as data, 1, got 2"),
        ({"held_out": torch.tensor(1.0)}, ValueError, "0-d"),
        ({"loss": None}, TypeError, "loss must be callable"),
        ({"state": [3]}, TypeError, "state must be a dict of objects with state_dict and load_state_dict"),
        ({"state": {"times": 3}}, TypeError, "state must be a dict of objects with"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(**options)


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got NoneType"):
        Trainer(None, loss, DATA, epochs=1, batch=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data must be a Tensor or a sequence of them, got int"):
        Trainer(Two(), loss, 3, epochs=1, batch=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save needs a folder"):
        make().save()
    with pytest.raises(ValueError, match="validate needs held_out"):
        make().validate()
    for until in (-1, 1.5, "2", True):
        with pytest.raises(ValueError, match="until must be an int >= 0, got"):
            make().run(until)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a lazy module.*: call it once first"):
        Trainer(torch.nn.LazyLinear(2), loss, DATA, epochs=1, batch=1)


def test_integers_among_the_parameters() -> None:
    """A count is no number to average: the average has it as it is."""
    net = Two()
    net.seen = torch.nn.Parameter(torch.tensor([0]), requires_grad=False)

    def counting(net: torch.nn.Module, *given: Any) -> Tensor:
        net.get_parameter("seen").add_(1)
        return loss(net, *given)

    trainer = Trainer(net, counting, DATA, epochs=1, batch=len(DATA) // 4, progress=False)
    trainer.run()
    assert trainer.averaged().get_parameter("seen").tolist() == [4]


def test_the_average_begins_as_the_weights() -> None:
    """After one step it is they themselves, however far the first ones were."""
    trainer = make(epochs=1, batch=len(DATA), learning_rate=0.1)
    trainer.run()
    assert trainer.step == 1
    for name, p in trainer.net.named_parameters():
        assert torch.equal(trainer.average.module.get_parameter(name), p)
