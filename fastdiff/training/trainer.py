"""A small trainer: AdamW, cosine with warm-up, an average of the weights, checkpoints that continue bit for bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastdiff.files import write_atomic

__all__ = ["Trainer"]

Loss = Callable[..., Tensor]
CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.json"
SHOWN_EVERY = 20  # steps between looks at the loss for the progress bar


class Trainer:
    """Trains a network; every random number comes from (seed, epoch), so a resumed run is the run itself.

        learning rate at step k of N:  lr (k + 1) / W for k < W = warmup N, then lr (1 + cos(pi (k - W) / (N - W))) / 2
        average' = d average + (1 - d) weights,   d = min(ema, (1 + k) / (10 + k)), from k = 1; at first the weights

    Args:
        net: trained in place.   data: Tensor [N, ...], or several of one N.
        loss: loss(net, *batch, seeds, generator) -> [B]: seeds int64 [B], new ones every step, for add_noise and
            denoising_loss; generator (CPU) for times.
        epochs, batch: an epoch is N // batch steps over a new permutation (at least one).
        learning_rate, weight_decay, betas: of AdamW.   warmup: share of all steps.   ema: largest decay.
        clip_norm: of the gradient, or None.
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
        self.net, self.loss = net, loss
        self.data, self.held_out = _tensors("data", data), _tensors("held_out", held_out)
        if not self.data or not len(self.data[0]):
            raise ValueError("data must hold at least one sample")
        if self.held_out and not len(self.held_out[0]):
            raise ValueError("held_out must be None or hold at least one sample")
        for name, value in (("epochs", epochs), ("batch", batch), ("validate_every", validate_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if not (learning_rate > 0 and weight_decay >= 0 and 0 <= warmup < 1 and 0 <= ema < 1):
            raise ValueError(
                "need learning_rate > 0, weight_decay >= 0, warmup and ema in [0, 1), got "
                f"{learning_rate!r}, {weight_decay!r}, {warmup!r}, {ema!r}"
            )
        if keep and folder is None:
            raise ValueError("keep=True needs a folder")
        self.epochs, self.batch, self.seed, self.progress = epochs, batch, seed, progress
        self.learning_rate, self.warmup, self.clip_norm = learning_rate, warmup, clip_norm
        self.options = {"weight_decay": weight_decay, "betas": list(betas), "ema": ema}
        self.validate_every, self.keep, self.state = validate_every, keep, dict(state or {})
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            _safetensors()
            self.folder.mkdir(parents=True, exist_ok=True)
        self.steps_an_epoch = max(1, len(self.data[0]) // batch)
        self.optimiser = torch.optim.AdamW(net.parameters(), learning_rate, betas=betas, weight_decay=weight_decay)
        self.average = AveragedModel(net, multi_avg_fn=_averager(ema))
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []

    def run(self, until: int | None = None) -> list[dict[str, Any]]:
        """Trains up to epoch `until` (default: all) and returns the history, one entry an epoch.

        An entry: epoch, step, train (mean loss), validation (or None), learning_rate (the last), seconds.
        """
        last = self.epochs if until is None else min(until, self.epochs)
        from tqdm.auto import tqdm

        # disable=None: a bar on a terminal only
        total = (last - self.epoch) * self.steps_an_epoch
        with tqdm(total=total, desc="training", unit="step", disable=None if self.progress else True) as bar:
            while self.epoch < last:
                began = time.perf_counter()
                train = self._epoch(bar)
                self.epoch += 1
                due = self.epoch % self.validate_every == 0 or self.epoch == self.epochs
                entry = {
                    "epoch": self.epoch, "step": self.step, "train": train,
                    "validation": self.validate() if self.held_out and due else None,
                    "learning_rate": self.optimiser.param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - began, 3),
                }  # fmt: skip
                self.history.append(entry)
                if self.folder is not None:
                    self.save()
        return self.history

    def _epoch(self, bar: Any) -> float:  # noqa: ANN401 - tqdm
        generator = _generator(self.seed, self.epoch + 1)
        order = torch.randperm(len(self.data[0]), generator=generator, device="cpu")
        device = self.data[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        self.net.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))  # of dropout, say
            for k in range(self.steps_an_epoch):
                pick = order[k * self.batch : (k + 1) * self.batch].to(device)
                seeds = torch.randint(2**62, (len(pick),), generator=generator, device="cpu").to(device)
                for group in self.optimiser.param_groups:
                    group["lr"] = self.learning_rate * self._factor(self.step)
                loss = self.loss(self.net, *(v[pick] for v in self.data), seeds, generator).mean()
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if self.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
                self.optimiser.step()
                self.average.update_parameters(self.net)
                self.step += 1
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
        """The mean loss of the averaged weights on held_out, with the same times and noise every time."""
        generator = _generator(self.seed, 0)
        device, losses = self.data[0].device, []
        self.average.eval()
        for at in range(0, len(self.held_out[0]), self.batch):
            part = [v[at : at + self.batch] for v in self.held_out]
            seeds = torch.randint(2**62, (len(part[0]),), generator=generator, device="cpu").to(device)
            losses.append(self.loss(self.average.module, *part, seeds, generator).reshape(-1))
        return float(torch.cat(losses).double().mean())

    def averaged(self) -> nn.Module:
        """The network with the averaged weights, in eval mode and without gradients."""
        net: nn.Module = self.average.module
        return net.requires_grad_(False).eval()

    def save(self) -> None:
        """Writes the checkpoint and the history, each whole or not at all."""
        assert self.folder is not None
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        for i, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        for name, item in self.state.items():
            tensors |= {f"state.{name}.{k}": v for k, v in item.state_dict().items()}
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}  # tied weights apart
        about = {"epoch": self.epoch, "step": self.step, "history": self.history, "run": self._run()}
        data = _safetensors().save(own, metadata={"fastdiff": json.dumps(about)})
        write_atomic(self.folder / CHECKPOINT, data)
        if self.keep:
            write_atomic(self.folder / f"epoch_{self.epoch:04d}.safetensors", data)
        write_atomic(self.folder / HISTORY, (json.dumps(self.history, indent=1) + "\n").encode())

    def resume(self, path: str | Path | None = None) -> bool:
        """Continues from a checkpoint (default: the folder's); False where there is none.

        Raises: ValueError for a checkpoint of another run: other options, data size or network.
        """
        if path is None and self.folder is None:
            raise ValueError("resume needs a folder or a path")
        path = Path(path) if path is not None else self.folder / CHECKPOINT  # type: ignore[operator]
        _safetensors()
        if not path.exists():
            return False
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("fastdiff", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if about.get("run") != self._run():
            raise ValueError(f"{path.name} belongs to another run: {about.get('run')}, this one is {self._run()}")

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.net.load_state_dict(part("net."))
            self.average.load_state_dict(part("ema."))
        except RuntimeError as error:
            raise ValueError(f"{path.name} holds another network: {str(error).splitlines()[0]}") from error
        whole = self.optimiser.state_dict()
        whole["state"] = {}
        for name, value in part("optimiser.").items():
            i, _, key = name.partition(".")
            whole["state"].setdefault(int(i), {})[key] = value
        self.optimiser.load_state_dict(whole)
        for name, item in self.state.items():
            item.load_state_dict(part(f"state.{name}."))
        self.epoch, self.step, self.history = about["epoch"], about["step"], about["history"]
        return True

    def _run(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs, "batch": self.batch, "samples": len(self.data[0]), "seed": self.seed,
            "learning_rate": self.learning_rate, "warmup": self.warmup, "clip_norm": self.clip_norm, **self.options,
        }  # fmt: skip


def _tensors(name: str, value: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    found = () if value is None else (value,) if isinstance(value, Tensor) else tuple(value)
    if not all(isinstance(v, Tensor) for v in found):
        raise TypeError(f"{name} must be a Tensor or a sequence of them, got {type(value).__name__}")
    if len({len(v) for v in found}) > 1:
        raise ValueError(f"{name} must have one length, got {[len(v) for v in found]}")
    return found


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each epoch, 0 being validation."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63
    return torch.Generator().manual_seed(mixed)


def _averager(most: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = torch.as_tensor(count).double()
        weight = 1 - torch.minimum(torch.full_like(n, most), (1 + n) / (10 + n))
        for a, b in zip(averaged, current, strict=True):
            a.lerp_(b.to(a.dtype), weight.to(a.device, a.dtype))

    return update


def _safetensors() -> Any:  # noqa: ANN401 - a module
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from None
    return safetensors.torch
