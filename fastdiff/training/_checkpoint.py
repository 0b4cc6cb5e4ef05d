"""A trainer's checkpoint: a safetensors file read whole, and compared before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["differing", "mismatches", "optimiser_state", "part", "read", "safetensors_torch"]

SHOWN = 5  # differences that a message lists


def safetensors_torch() -> Any:  # noqa: ANN401 - a module
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from None
    return safetensors.torch


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says about its run, and its tensors.   Raises: ValueError, with its path, for another file."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint; give the file")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty, not a checkpoint")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("fastdiff", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    wanted = {"epoch": int, "step": int, "history": list, "run": dict}
    if not isinstance(about, dict) or not all(isinstance(about.get(k), kind) for k, kind in wanted.items()):
        raise ValueError(f"{path} is no checkpoint of a Trainer: it does not say {', '.join(wanted)}")
    return about, tensors


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def listed(parts: Iterable[str]) -> str:
    found = list(parts)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The options that are not the same, "batch is 16 there, 35 here, ..."; "" where all are."""
    names = [*here, *(k for k in there if k not in here)]
    missing = object()
    pairs = {k: (there.get(k, missing), here.get(k, missing)) for k in names}
    shown = {k: ["unknown" if v is missing else repr(v) for v in pair] for k, pair in pairs.items()}
    return listed(f"{k} is {shown[k][0]} there, {shown[k][1]} here" for k, (a, b) in pairs.items() if a != b)


def mismatches(there: Mapping[str, Tensor], here: Mapping[str, Tensor], *, also: Mapping[str, Tensor]) -> str:
    """What keeps tensors from taking the place of others: names, shapes, dtypes; `also`: whose dtype will do too."""
    found = [f"{k} is missing" for k in here if k not in there]
    found += [f"{k} is unknown here" for k in there if k not in here]
    for k in (k for k in here if k in there):
        a, b = there[k], here[k]
        if a.shape != b.shape:
            found.append(f"{k} has shape {tuple(a.shape)} there, {tuple(b.shape)} here")
        elif a.dtype not in (b.dtype, also[k].dtype if k in also else b.dtype):
            found.append(f"{k} is {str(a.dtype)[6:]} there, {str(b.dtype)[6:]} here")
    return listed(found)


def optimiser_state(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, by_name: bool
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state by position, as load_state_dict takes it, of tensors `<parameter>.<key>`.

    by_name=False: `<position>.<key>`, as files were written at first.
    Raises: ValueError where one fits no parameter, or where positions may be those of another order.
    """
    names = list(parameters)
    if not by_name and tensors:
        shapes = [tuple(p.shape) for p in parameters.values()]
        twins = [n for n, s in zip(names, shapes, strict=True) if shapes.count(s) > 1]
        if twins:
            raise ValueError(
                "an older release kept the optimiser's state by position, and of parameters of one shape "
                f"({listed(twins)}) nothing tells whose it is; train on with that release, or anew from its weights"
            )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        known = owner in parameters if by_name else owner.isdigit() and int(owner) < len(names)
        if not known:
            raise ValueError(f"it has optimiser state of {owner!r}, which is no parameter here")
        at = names.index(owner) if by_name else int(owner)
        own = parameters[names[at]]
        if value.dim() and (value.shape != own.shape or value.dtype != own.dtype):
            raise ValueError(
                f"the optimiser's {key} of {names[at]} is {str(value.dtype)[6:]} {tuple(value.shape)} there, "
                f"{str(own.dtype)[6:]} {tuple(own.shape)} here"
            )
        state.setdefault(at, {})[key] = value
    for at, entry in state.items():
        if not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys():
            raise ValueError(f"the optimiser's state of {names[at]} is {', '.join(entry)}: not all of it")
    return state
