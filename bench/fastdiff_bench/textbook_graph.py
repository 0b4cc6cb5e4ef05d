"""The textbook loop as one CUDA graph: what plain torch needs to launch once a loop, as fastdiff's loop_graph does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.graph import CaptureError, _capture
from fastdiff_bench.textbook import Textbook
from fastdiff_bench.textbook_tokens import TokensTextbook

__all__ = ["Graphed"]


class Graphed:
    """The first of some plain loops that can be captured, captured at the first call and replayed.

    Noise is drawn by torch's own generator inside it.
    Raises: CaptureError where none can be.
    """

    def __init__(self, loops: Sequence[Textbook | TokensTextbook]) -> None:
        self.loops = list(loops)
        self.loop = self.loops[0]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The final state from x_T; with a generator the loop itself runs, since a graph is bound to its own."""
        if generator is not None:
            return self.loop(x_T, generator)
        if self.graph is None:
            self.x = x_T.clone()
            self.graph = self._captured()
        self.x.copy_(x_T)
        self.graph.replay()
        return self.end.clone()

    def _captured(self) -> torch.cuda.CUDAGraph:
        while True:
            self.loop = self.loops.pop(0)
            try:
                return _capture(self._rows, lambda: None, self.x.device)
            except CaptureError:
                if not self.loops:
                    raise

    def note(self) -> str:
        """Which loop it is."""
        return "" if self.loop.compiled else "of the eager rows"

    def _rows(self) -> None:
        self.end = self.loop(self.x)
