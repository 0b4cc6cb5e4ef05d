"""Registration of the noise fill kernel; the public function is `fastdiff.rng.normal`."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import _dispatch


def _launch(out: Tensor, seeds: Tensor, index: Tensor, rows: Tensor, stream: int) -> None:
    """Fills out [k, B, n] fp32 with the normals of (seeds [B], index [B], rows [k])."""
    k, batch, n = out.shape
    if out.numel() == 0:
        return
    args = (out, seeds.contiguous(), index.contiguous(), rows.contiguous(), n, batch, _dispatch.FIRST, stream)
    for first in range(0, k, _dispatch.GRID_LIMIT):
        part = (out[first:], *args[1:3], args[3][first:], *args[4:])
        _dispatch.launch(
            _dispatch.kernels("philox").normal_kernel, part, n, batch, depth=min(_dispatch.GRID_LIMIT, k - first)
        )


_dispatch.register("normal(Tensor(a!) out, Tensor seeds, Tensor index, Tensor rows, int stream) -> ()", _launch)
