"""A small trainer: AdamW, cosine with warm-up, an average of the weights, checkpoints that continue bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.caller import warn
from fastdiff.devices import widest
from fastdiff.files import write_atomic
from fastdiff.training import _checkpoint
from fastdiff.training._average import Average

__all__ = ["Trainer"]

Loss = Callable[..., Tensor]
CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.json"
FORMAT = 2  # of a checkpoint: the optimiser's state by name
SHOWN_EVERY = 20  # steps between looks at the loss for the progress bar
VALIDATION = -1  # in place of an epoch: the global generator's seed in validation


class Trainer:
    """Trains a network; every random number comes from (seed, epoch), so a resumed run is the run itself.

        learning rate at step k of N:  lr (k + 1) / W for k < W, then lr (1 + cos(pi (k - W) / (N - W))) / 2
        average' = d average + (1 - d) weights,   d = min(ema, (1 + k) / (10 + k)), from k = 1; at first the weights

    The average of 16-bit weights is kept in fp32. An epoch that was interrupted is done again: from the checkpoint
    before it, where the folder has it; else, with a warning, from the weights as they are.
    Args:
        net: trained in place.   data: Tensor [N, ...], or several of one N.
        loss: loss(net, *batch, seeds, generator) -> [B]: seeds int64 [B], new ones every step, for add_noise and
            denoising_loss; generator (CPU) for times.
        epochs, batch: an epoch is N // batch steps over a new permutation (at least one).
        learning_rate, weight_decay, betas: of AdamW.   warmup: W / N, rounded to steps.   ema: largest decay.
        clip_norm: largest norm of the gradient, > 0, or None.
        held_out: like data, for the validation loss of the averaged weights, every `validate_every` epochs and at the
            last, always with the same noise.
        folder: None, or where checkpoint.safetensors and history.json go after each epoch.   keep: also
            epoch_0001.safetensors, ... of every epoch.   state: objects with state_dict and load_state_dict of tensors
            that a checkpoint includes (ImportanceTimes).   seed.   progress: a bar with the loss (on a terminal).
    Raises: TypeError, ValueError for arguments that do not fit; ImportError: a folder without safetensors.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        data: Tensor | Sequence[Tensor],
        *,
        epochs: int,
        batch: int,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.1,
        ema: float = 0.999,
        clip_norm: float | None = None,
        held_out: Tensor | Sequence[Tensor] | None = None,
        validate_every: int = 1,
        folder: str | Path | None = None,
        keep: bool = False,
        state: Mapping[str, Any] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        if any(nn.parameter.is_lazy(p) for p in net.parameters()):
            raise ValueError("net has parameters without a shape (a lazy module): call it once first")
        if not callable(loss):
            raise TypeError(f"loss must be callable, loss(net, *batch, seeds, generator), got {type(loss).__name__}")
        self.net, self.loss = net, loss
        self.data, self.held_out = _tensors("data", data), _tensors("held_out", held_out)
        if not self.data or not len(self.data[0]):
            raise ValueError("data must hold at least one sample")
        if self.held_out and not len(self.held_out[0]):
            raise ValueError("held_out must be None or hold at least one sample")
        if self.held_out and len(self.held_out) != len(self.data):
            raise ValueError(f"held_out must be as many tensors as data, {len(self.data)}, got {len(self.held_out)}")
        if keep and folder is None:
            raise ValueError("keep=True needs a folder")
        self.epochs, self.batch = _count("epochs", epochs), _count("batch", batch)
        self.validate_every, self.seed = _count("validate_every", validate_every), _count("seed", seed, -math.inf)
        self.learning_rate = _number("learning_rate", learning_rate, 0.0, above=True)
        self.warmup = _number("warmup", warmup, 0.0, 1.0)
        self.clip_norm = None if clip_norm is None else _number("clip_norm", clip_norm, 0.0, above=True)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        one, two = (_number("betas", v, 0.0, 1.0) for v in betas)
        decay, most = _number("weight_decay", weight_decay, 0.0), _number("ema", ema, 0.0, 1.0)
        self.options = {"weight_decay": decay, "betas": [one, two], "ema": most}
        self.keep, self.state, self.progress = keep, _states(state), progress
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            _checkpoint.safetensors_torch()
            self.folder.mkdir(parents=True, exist_ok=True)
        self.steps_an_epoch = max(1, len(self.data[0]) // self.batch)
        self.parameters = dict(net.named_parameters())  # by the names of the optimiser's state in a checkpoint
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), self.learning_rate, betas=(one, two), weight_decay=decay
        )
        self.average = Average(net, most)
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.unsaved = False  # is there an epoch that the folder does not hold?

    def run(self, until: int | None = None) -> list[dict[str, Any]]:
        """Trains up to epoch `until` (default: all) and returns the history, one entry an epoch.

        An entry: epoch, step, train (mean loss), validation (or None), learning_rate (the last), seconds.
        Raises: ValueError: until is no int >= 0; an interrupted epoch's checkpoint does not fit any more.
        """
        last = self.epochs if until is None else min(_count("until", until, 0), self.epochs)
        if self.step != self.epoch * self.steps_an_epoch:
            self._rewind()
        if self.unsaved:  # an interruption while the last checkpoint was written
            self.save()
        from tqdm.auto import tqdm

        # disable=None: a bar on a terminal only
        total = (last - self.epoch) * self.steps_an_epoch
        with tqdm(total=total, desc="training", unit="step", disable=None if self.progress else True) as bar:
            while self.epoch < last:
                began = time.perf_counter()
                train = self._epoch(bar)
                epoch = self.epoch + 1
                due = epoch % self.validate_every == 0 or epoch == self.epochs
                entry = {
                    "epoch": epoch, "step": self.step, "train": train,
                    "validation": self.validate() if self.held_out and due else None,
                    "learning_rate": self.optimiser.param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - began, 3),
                }  # fmt: skip
                self.unsaved = self.folder is not None
                self.history.append(entry)
                self.epoch = epoch  # an epoch is over once its entry is there
                if self.unsaved:
                    self.save()
        return self.history

    def _rewind(self) -> None:
        """After an interruption: back to the beginning of the epoch, with the weights where they were kept."""
        epoch = self.epoch
        if self.folder is not None and epoch and (self.folder / CHECKPOINT).exists():
            if _checkpoint.read(self.folder / CHECKPOINT)[0]["epoch"] == epoch:
                self.resume()
        if self.step != epoch * self.steps_an_epoch:
            warn(
                f"epoch {epoch + 1} was interrupted and no checkpoint holds what was before: it is done again from the "
                "weights as they are, so this is not the run that it would have been"
            )
        self.step = epoch * self.steps_an_epoch

    def _epoch(self, bar: Any) -> float:  # noqa: ANN401 - tqdm
        generator = _generator(self.seed, self.epoch + 1)
        order = torch.randperm(len(self.data[0]), generator=generator, device="cpu")
        device = self.data[0].device
        total = torch.zeros((), dtype=widest(device), device=device)
        self.net.train()
        with _seeded(int(torch.randint(2**62, (), generator=generator, device="cpu")), device):  # of dropout, say
            for k in range(self.steps_an_epoch):
                pick = order[k * self.batch : (k + 1) * self.batch].to(device)
                seeds = torch.randint(2**62, (len(pick),), generator=generator, device="cpu").to(device)
                for group in self.optimiser.param_groups:
                    group["lr"] = self.learning_rate * self._factor(self.step)
                self.step += 1  # before anything changes: an interruption shows
                loss = self._losses(self.net, [v[pick] for v in self.data], seeds, generator).mean()
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if self.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
                self.optimiser.step()
                self.average.update_parameters(self.net)
                total += loss.detach()
                bar.update()
                if not bar.disable and k % SHOWN_EVERY == 0:
                    bar.set_postfix(epoch=self.epoch + 1, loss=f"{float(loss):.4g}")
        return float(total) / self.steps_an_epoch

    def _factor(self, step: int) -> float:
        steps = self.epochs * self.steps_an_epoch
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of the averaged weights on held_out, with the same times and noise every time.

        Raises: ValueError without held_out.
        """
        if not self.held_out:
            raise ValueError("validate needs held_out, which is None")
        generator = _generator(self.seed, 0)
        device, losses = self.data[0].device, []
        net = self.average.shown(self.net).eval()
        held = {name: copy.deepcopy(item.state_dict()) for name, item in self.state.items()}  # a loss may change them
        try:
            with _seeded(_mixed(self.seed, VALIDATION), device):
                for at in range(0, len(self.held_out[0]), self.batch):
                    part = [v[at : at + self.batch] for v in self.held_out]
                    seeds = torch.randint(2**62, (len(part[0]),), generator=generator, device="cpu").to(device)
                    losses.append(self._losses(net, part, seeds, generator))
        finally:
            for name, item in self.state.items():
                item.load_state_dict(held[name])
        return float(torch.cat(losses).to(widest(device)).mean())

    def _losses(self, net: nn.Module, part: Sequence[Tensor], seeds: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of every sample; one number is that of all."""
        made = self.loss(net, *part, seeds, generator)
        if not isinstance(made, Tensor) or not made.is_floating_point():
            raise TypeError(f"loss must return a floating point tensor [B], got {getattr(made, 'dtype', made)}")
        return made.expand(len(seeds)) if made.dim() == 0 else made.reshape(-1)

    def averaged(self) -> nn.Module:
        """The network with the averaged weights, in eval mode, without gradients.

        A copy where the weights are of 16 bits; else what the trainer goes on averaging: deepcopy it to keep it.
        """
        return self.average.shown(self.net).requires_grad_(False).eval()

    def save(self) -> None:
        """Writes the checkpoint and the history, each whole or not at all.   Raises: ValueError without a folder."""
        if self.folder is None:
            raise ValueError("save needs a folder, which is None")
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        names = list(self.parameters)
        for i, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{names[i]}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        for name, item in self.state.items():
            tensors |= {f"state.{name}.{k}": v for k, v in item.state_dict().items()}
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}  # tied weights apart
        about = {
            "epoch": self.epoch, "step": self.step, "history": self.history, "run": self._run(), "format": FORMAT,
        }  # fmt: skip
        data = _checkpoint.safetensors_torch().save(own, metadata={"fastdiff": json.dumps(about)})
        write_atomic(self.folder / CHECKPOINT, data)
        if self.keep:
            write_atomic(self.folder / f"epoch_{self.epoch:04d}.safetensors", data)
        # JSON has no NaN
        history = [
            {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in entry.items()}
            for entry in self.history
        ]
        write_atomic(self.folder / HISTORY, (json.dumps(history, indent=1, allow_nan=False) + "\n").encode())
        self.unsaved = False

    def resume(self, path: str | Path | None = None) -> bool:
        """Continues from a checkpoint (default: the folder's); False where there is none.

        Raises: ValueError, and nothing has changed, for a checkpoint of another run (other options, data size, network,
            dtype or state), for a damaged one, and for an old one of which the optimiser's order cannot be told.
        """
        if path is None and self.folder is None:
            raise ValueError("resume needs a folder or a path")
        path = Path(path) if path is not None else self.folder / CHECKPOINT  # type: ignore[operator]
        _checkpoint.safetensors_torch()
        if not path.exists():
            return False
        about, tensors = _checkpoint.read(path)
        if differences := _checkpoint.differing(about["run"], self._run()):
            raise ValueError(f"{path} belongs to another run: {differences}")
        net, ema = _checkpoint.part(tensors, "net."), _checkpoint.part(tensors, "ema.")
        own, average = self.net.state_dict(), self.average.state_dict()
        short = {f"module.{k}": v for k, v in own.items()}  # an average was in the weights' dtype at first
        wrong = _checkpoint.mismatches(net, own, also={}) or _checkpoint.mismatches(ema, average, also=short)
        if wrong:
            raise ValueError(f"{path} holds another network: {wrong}")
        whole = self.optimiser.state_dict()
        try:
            whole["state"] = _checkpoint.optimiser_state(
                _checkpoint.part(tensors, "optimiser."), self.parameters, by_name=about.get("format", 1) >= 2
            )
        except ValueError as error:
            raise ValueError(f"{path} cannot be continued: {error}") from error
        self._load_state(path, _checkpoint.part(tensors, "state."))
        self.net.load_state_dict(net)
        self.average.load_state_dict(ema)
        self.optimiser.load_state_dict(whole)
        self.epoch, self.step, self.history = about["epoch"], about["step"], about["history"]
        return True

    def _load_state(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Loads all of the state's objects or, where one refuses, none."""
        unknown = [k for k in tensors if not any(k.startswith(f"{name}.") for name in self.state)]
        if unknown:
            raise ValueError(f"{path} holds state that this run has not: {', '.join(unknown)}; give it as state=")
        before = {}
        try:
            for name, item in self.state.items():
                before[name] = {k: v.clone() for k, v in item.state_dict().items()}
                item.load_state_dict(_checkpoint.part(tensors, f"{name}."))
        except Exception as error:
            for name, saved in before.items():
                self.state[name].load_state_dict(saved)
            raise ValueError(f"{path} holds another state {name!r}: {error}") from error

    def _run(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs, "batch": self.batch, "samples": len(self.data[0]), "seed": self.seed,
            "learning_rate": self.learning_rate, "warmup": self.warmup, "clip_norm": self.clip_norm, **self.options,
        }  # fmt: skip


def _tensors(name: str, value: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    found = () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(v, Tensor) for v in found):
        raise TypeError(f"{name} must be a Tensor or a sequence of them, got {type(value).__name__}")
    if any(not v.dim() for v in found):
        raise ValueError(f"{name} must be [N, ...], got a 0-d tensor")
    if len({len(v) for v in found}) > 1:
        raise ValueError(f"{name} must have one length, got {[len(v) for v in found]}")
    return found


def _states(state: Mapping[str, Any] | None) -> dict[str, Any]:
    known = state is None or isinstance(state, Mapping)
    if not known or not all(hasattr(v, "state_dict") and hasattr(v, "load_state_dict") for v in (state or {}).values()):
        raise TypeError(f"state must be a dict of objects with state_dict and load_state_dict, got {state!r}")
    return dict(state or {})


def _count(name: str, value: object, low: float = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be an int{f' >= {low:g}' if low > -math.inf else ''}, got {value!r}")
    return int(value)


def _number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """A float in [low, high), or in (low, high) with above=True."""
    known = isinstance(value, Real) and not isinstance(value, bool)
    found = float(value) if known else math.nan  # type: ignore[arg-type]
    if not (low <= found < high and (found > low or not above)):
        allowed = f"a finite number {'>' if above else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return found


def _mixed(seed: int, epoch: int) -> int:
    """What seeds a generator: a CPU's uses 32 bits of it, so those of the seed above are hashed into them."""
    high = seed >> 32
    folded = int.from_bytes(hashlib.blake2b(str(high).encode(), digest_size=8).digest(), "big") if high else 0
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + folded) % 2**63


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each epoch, 0 being validation."""
    return torch.Generator().manual_seed(_mixed(seed, epoch))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generators have this seed; afterwards what they had."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
