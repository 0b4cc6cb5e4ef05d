"""What one would write for masked diffusion without fastdiff: the loop of a plan of tokens in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff_bench.textbook import Model, compiled, drawn

__all__ = ["TokensTextbook", "likeliest"]


class TokensTextbook:
    """A plan's loop from masked tokens: softmax, a draw, topk or a coin for each token.

    How many tokens an order unmasks is known on the host, as in the loops that people write.
    Args: plan, model: as for fd.Sampler. compiled: a row through torch.compile.
    """

    def __init__(
        self, plan: fd.Plan, model: Model, *, compiled: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.plan, self.model, self.compiled = plan, model, compiled
        self.times = torch.from_numpy(plan.times.copy()).float().to(device)
        self.numbers = (
            torch.stack([torch.from_numpy(v.reshape(-1).copy()) for v in (plan.A, plan.b)], 1).float().to(device)
        )
        self.heat = plan.s[:, 0].tolist()
        if len(set(self.heat)) > 1 or plan.d.any() or len(set(plan.c_out)) > 1:
            raise ValueError(f"only plans of one temperature, top_p and block are written out, not {plan.name!r}")
        self.functions: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, x_T: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The tokens from x_T, [B, *D]."""
        x = x_T
        left = x_T[0].numel()
        for i in range(self.plan.nfe):
            m = self.model(x, self.times[i].expand(len(x)))
            kept = int(left * (1 - self.plan.b[i, 0]) + 1e-9)
            x = self._row(left - kept, m)(x, m, self.numbers[i])
            left = kept
        return x

    def _row(self, many: int, m: Tensor) -> Callable[..., Tensor]:
        key = many if self.plan.readout != "random" else -1
        if key not in self.functions:
            row = self._written(key)
            self.functions[key] = compiled(row, m.numel()) if self.compiled else row
        return self.functions[key]

    def _written(self, many: int) -> Callable[..., Tensor]:
        plan, mask, heat, share = self.plan, int(self.plan.mask), self.heat[0], float(self.plan.c_out[0])

        def row(x: Tensor, m: Tensor, c: Tensor) -> Tensor:
            if mask < plan.classes:
                m = torch.where(torch.arange(plan.classes, device=m.device) == mask, -torch.inf, m)
            p = m.float().softmax(-1)
            q = p if heat in (0, 1) else (m.float() / heat).softmax(-1)
            k = drawn(q if share == 1 else likeliest(q, share)) if heat else p.argmax(-1)
            masked = x == mask
            if plan.readout == "random":
                u = torch.rand(x.shape, device=x.device)
                return torch.where(masked & (u <= c[1]), k, torch.where(~masked & (u > c[0]), mask, x))
            sure = torch.where(masked, _sure(p, k, plan.readout), -torch.inf).flatten(1)
            at = sure.topk(many, -1).indices
            return x.flatten(1).scatter(1, at, k.flatten(1).gather(1, at)).view(x.shape)

        return row


def likeliest(p: Tensor, share: float) -> Tensor:
    """p without the classes before which, in their order, it sums to the share."""
    q, at = p.sort(-1, descending=True)
    gone = q.cumsum(-1) - q >= share
    return p.masked_fill(torch.zeros_like(gone).scatter(-1, at, gone), 0.0)


def _sure(p: Tensor, k: Tensor, order: str) -> Tensor:
    if order == "confidence":
        return p.gather(-1, k[..., None])[..., 0]
    if order == "margin":
        two = p.topk(2, -1).values
        return two[..., 0] - two[..., 1]
    return torch.special.xlogy(p, p).sum(-1)
