"""Which diffusers schedulers are accelerated, class by class, found by trying.

python -m fastdiff.integrations.diffusers.coverage          prints the table of docs/drop-in.md
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastdiff.integrations.diffusers import accelerate
from fastdiff.integrations.diffusers.reading import BATCHED_TIME, refusal
from fastdiff.integrations.diffusers.usual import takes_past

__all__ = ["Row", "rows", "schedulers", "table"]

STEPS = 8
MADE: dict[str, dict[str, Any]] = {  # what their constructors cannot do without
    "AmusedScheduler": {"mask_token_id": 7},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
CALLED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {  # what their set_timesteps cannot do without
    "SCMScheduler": ((STEPS,), {"intermediate_timesteps": None}),
    "HeliosScheduler": ((STEPS,), {"stage_index": 0}),
    "HeliosDMDScheduler": ((STEPS,), {"stage_index": 0}),
}
TOKENS = "its samples are tokens, not real numbers"
NOT: dict[str, str] = {  # the reason in words where trying only shows a symptom
    **dict.fromkeys(("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler"), TOKENS),
    **dict.fromkeys(("EntropyBoundScheduler", "VQDiffusionScheduler"), TOKENS),
    "ConsistencyDecoderScheduler": "at most two steps, and its decoder calls it with timesteps of its own",
    "HeliosScheduler": "its step also returns the state of the solver (scheduler_type euler is accelerated)",
    "HeliosDMDScheduler": "its step works on tensors given to it, stage by stage",
    "PiflowScheduler": "the model returns a policy with more channels than the sample",
}
STOCK_RUNS: dict[str, str] = {  # what of an accelerated class still takes the stock step
    "DDPMScheduler": "variance_type learned (the variance itself)",
    "DDPMParallelScheduler": "variance_type learned; batch_step_no_noise is stock's",
    "DDIMParallelScheduler": "batch_step_no_noise is stock's",
    "UnCLIPScheduler": "prev_timestep given as a tensor",
    "EDMEulerScheduler": "pred_original_sample given to step",
    "FlowMatchEulerDiscreteScheduler": "per_token_timesteps",
    "FlowMapEulerDiscreteScheduler": "r_timestep given as a tensor",
    "DDPMWuerstchenScheduler": "a timestep for every sample",
    "CogVideoXDPMScheduler": "a past other than the last step's",
}


class Row(NamedTuple):
    """name; state: probed | partly | not; slots of the default plan (0: none); why: the reason, or what is left."""

    name: str
    state: str
    slots: int
    why: str


def schedulers() -> Iterator[type]:
    """Every scheduler class of diffusers with a step, sorted by name."""
    import diffusers.schedulers as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("scheduling_") and "flax" not in module.name:
            try:
                members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            except ImportError:  # a class whose own dependency is missing
                continue
            found.update(
                {n: c for n, c in members.items() if inspect.isclass(c) and n.endswith("Scheduler") and _steps(c)}
            )
    return iter(found[name] for name in sorted(found))


def _steps(cls: type) -> bool:
    return cls.__module__.startswith("diffusers.schedulers.scheduling_") and callable(getattr(cls, "step", None))


def row(cls: Any) -> Row:
    """What happens to one class in its default configuration."""
    name = cls.__name__
    why = refusal(cls)
    if why is not None:
        return Row(name, "not", 0, why)
    try:
        scheduler = accelerate(cls(**MADE.get(name, {})))
        args, kwargs = CALLED.get(name, ((STEPS,), {}))
        scheduler.set_timesteps(*args, **kwargs)
        x, t = torch.full((1, 4, 2, 2), 0.5, dtype=torch.float32, device="cpu"), scheduler.timesteps[0]
        t = t.reshape(1) if name in BATCHED_TIME else t
        scheduler.step(*((x, None, t, None, x) if takes_past(cls) else (x, t, x)))
        kept = scheduler._fastdiff
        if kept.stock is not None:
            raise ValueError(kept.stock)
        slots = kept.run.reading.plan.slots
    except Exception as error:  # foreign code, tried
        text = NOT.get(name) or str(error).removeprefix(f"{name} is not a plan: ")
        return Row(name, "not", 0, f"stock step: {text.splitlines()[0]}")
    left = STOCK_RUNS.get(name, "")
    return Row(name, "partly" if left else "probed", slots, f"stock step: {left}" if left else "")


def rows() -> list[Row]:
    """All classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(cls) for cls in schedulers()]


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| class | accelerated | slots | remarks |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.state} | {r.slots or '-'} | {r.why or '-'} |" for r in found]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(rows()))
    sys.exit(0)
