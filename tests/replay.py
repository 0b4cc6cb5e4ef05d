"""A device's path without a device: a stand-in for graphs, and the fixture that has CPU tensors take that path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from fastdiff import graph as graphs
from fastdiff import request as requests
from fastdiff import run as runs
from fastdiff import schedules as S
from fastdiff import solvers

CHAIN = S.Betas(S.scaled_linear_betas(1000))
SHAPE = (3, 2, 5)
PLANS = {
    "ddpm": solvers.ddpm(CHAIN, 12, clip=(-1, 1)),
    "heun": solvers.heun(S.EDM(), 6, prediction="edm"),
    "dpmpp_2m": solvers.dpmpp_2m(CHAIN, 12, prediction="v"),
    "one-row": solvers.ddim(CHAIN, 1),
}


def model(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    time = t.view(-1, 1, 1).to(x.dtype) / 1000
    return torch.tanh(1.3 * x + time) + (shift.view(-1, 1, 1) if isinstance(shift, Tensor) else shift)


class Replay(TorchDispatchMode):
    """A stand-in for a captured graph: replaying makes torch's operations again on the same memory, and no Python.

    As in a capture, the host may not read a tensor.
    """

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.REFUSED:
            raise graphs.CaptureError(f"{func} is not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [v for v in tree_leaves(made) if isinstance(v, Tensor)]))
        return made

    @staticmethod
    def node(function: Callable[..., None]) -> Callable[..., None]:
        """The function as one operation, which on a device is a kernel."""

        def run(*args: Any) -> None:
            mode = _get_current_dispatch_mode()
            with _disable_current_modes():
                function(*args)
            if isinstance(mode, Replay):
                mode.calls.append((function, args, {}, []))

        return run

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                made = [v for v in tree_leaves(func(*args, **kwargs)) if isinstance(v, Tensor)]
                for old, new in zip(results, made, strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                        old.copy_(new)


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the path of a device: rows by index tensor, noise in the step, graphs allowed."""

    def capture(body: Callable[[], None], rewind: Callable[[], None], device: torch.device) -> Replay:
        for _ in range(graphs.WARM_UPS):
            rewind()
            body()
        rewind()
        with Replay() as recorded:
            body()
        return recorded

    monkeypatch.setattr(runs, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(requests, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "pays", lambda *args: True)
    for op in ("affine_step", "categorical_step", "unmask_step"):  # on a device nobody looks at a row's number
        module = importlib.import_module(f"fastdiff.ops.{op}")
        monkeypatch.setattr(module, "check_row", lambda *args: None)
        if hasattr(module, "_step_on_cpu"):
            monkeypatch.setattr(module, "_step_on_cpu", Replay.node(module._step_on_cpu))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())
