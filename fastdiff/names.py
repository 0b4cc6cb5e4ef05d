"""Schedules, solvers and models by name: "vp:beta_max=12", "linear_betas:T=100", "dpmpp_2m", "net.py:model"."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fastdiff as fd

__all__ = ["assignments", "load_model", "make_schedule", "pick", "schedule_names", "solver_names"]

CHAIN_LENGTH = 1000


def solver_names() -> list[str]:
    """The solvers the command line knows: fastdiff.solvers.__all__."""
    return list(fd.solvers.__all__)


def _schedule_makers() -> dict[str, Callable[..., Any]]:
    """Names of the command line -> makers: schedule classes in lower case, and the functions that give betas."""
    makers: dict[str, Callable[..., Any]] = {}
    for name in fd.schedules.__all__:
        thing = getattr(fd.schedules, name)
        if not inspect.isclass(thing):
            if "T" in inspect.signature(thing).parameters:
                makers[name] = thing
        elif thing not in (fd.schedules.Schedule, fd.schedules.Betas):
            makers[name.lower()] = thing
    return makers


def schedule_names() -> list[str]:
    """The schedules the command line knows, made from fastdiff.schedules.__all__."""
    return sorted(_schedule_makers())


def pick(kind: str, name: str, valid: Sequence[str]) -> str:
    """The name, if it is valid; else ValueError with the valid ones."""
    if name not in valid:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")
    return name


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return float(text)  # inf is no literal
    except ValueError:
        return text


def assignments(kind: str, texts: Sequence[str], valid: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as a dictionary; values are Python literals, else text."""
    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{kind}: expected KEY=VALUE, got {text!r}")
        pick(kind, name.strip(), valid)
        out[name.strip()] = _value(value.strip())
    return out


def check_types(kind: str, given: Mapping[str, Any], annotations: Mapping[str, object]) -> None:
    """Refuses text for a number, and all but true and false for those: Python would take any text for true."""
    for name, value in given.items():
        words = set(re.findall(r"\w+", str(annotations.get(name))))
        if "bool" in words and not isinstance(value, bool):
            raise ValueError(f"{kind}: {name} must be true or false, got {value!r}")
        if isinstance(value, str) and words & {"int", "float"} and "str" not in words:
            raise ValueError(f"{kind}: {name} must be made of numbers, got {value!r}")


def make_schedule(text: str) -> fd.schedules.Schedule:
    """A schedule from NAME or NAME:KEY=VALUE,..., e.g. "vp:beta_max=12" or "linear_betas:T=100" (T defaults to 1000).

    Raises: ValueError for unknown names and keys, and for values the schedule refuses.
    """
    makers = _schedule_makers()
    name, _, rest = text.partition(":")
    make = makers[pick("schedule", name, sorted(makers))]
    parameters = inspect.signature(make).parameters
    given = assignments(f"option of schedule {name}", [p for p in rest.split(",") if p], list(parameters))
    check_types(f"schedule {name}", given, {n: p.annotation for n, p in parameters.items()})
    if not inspect.isclass(make):
        given.setdefault("T", CHAIN_LENGTH)
    lacking = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if lacking:
        raise ValueError(f"schedule {name} needs {', '.join(lacking)}: write {name}:{lacking[0]}=...")
    made = make(**given)
    return made if inspect.isclass(make) else fd.schedules.Betas(made)


def _imported(path: Path) -> ModuleType:
    """A Python file as a module: of its package where it lies in one, else with its folder on sys.path."""
    root, names = path.parent, [] if path.name == "__init__.py" else [path.stem]
    while (root / "__init__.py").is_file():
        root, names = root.parent, [root.name, *names]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    taken = getattr(sys.modules.get(names[0]), "__file__", None)  # by another package of that name
    own = taken is None or Path(taken).resolve() == root / names[0] / "__init__.py"
    if path.parent != root and own and all(name.isidentifier() for name in names):
        return importlib.import_module(".".join(names))
    spec = importlib.util.spec_from_file_location(f"_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_model(text: str) -> Callable[..., Any]:
    """The callable of "path.py:name"; ValueError where there is none."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"--model must be path.py:function, got {text!r}")
    path = Path(where)
    if not path.is_file():
        raise ValueError(f"--model: there is no file {where!r}")
    try:
        module = _imported(path.resolve())
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model: cannot import {where!r}: {type(error).__name__}: {error}") from error
    model = getattr(module, name, None)
    if inspect.isclass(model):
        raise ValueError(f"--model: {name!r} of {where!r} is a class: name an instance of it, or a function")
    if not callable(model):
        callables = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"--model: {where!r} has no callable {name!r}; it has: {', '.join(callables) or 'none'}")
    return model
