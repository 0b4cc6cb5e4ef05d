"""The textbook loop as one CUDA graph: what plain torch needs to launch once a loop, as fastdiff's loop_graph does."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.graph import _capture
from fastdiff_bench.textbook import Textbook

__all__ = ["Graphed"]


class Graphed:
    """A Textbook's loop, captured at the first call and replayed; noise is drawn by torch's own generator inside it.

    Raises: RuntimeError where the model or a row cannot be captured.
    """

    def __init__(self, loop: Textbook) -> None:
        self.loop = loop
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The final state from x_T; with a generator the loop itself runs, since a graph is bound to its own."""
        if generator is not None:
            return self.loop(x_T, generator)
        if self.graph is None:
            self.x = x_T.clone()
            self.graph = _capture(self._rows, lambda: None, x_T.device)
        self.x.copy_(x_T)
        self.graph.replay()
        return self.end.clone()

    def _rows(self) -> None:
        self.end = self.loop(self.x)
