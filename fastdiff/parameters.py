"""What a network's parameters say of its input."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["parameter_of", "seen_by"]


def parameter_of(model: object) -> Tensor | None:
    """A module's first floating point parameter, which says its device and dtype."""
    if isinstance(model, nn.Module):
        return next((p for p in model.parameters() if p.is_floating_point()), None)
    return None


def seen_by(model: object, x: Tensor) -> Tensor:
    """x in the dtype of a module's parameters; as it is for a function, or where 8 bits are how weights are stored."""
    parameter = parameter_of(model)
    return x if parameter is None or parameter.dtype.itemsize == 1 else x.to(parameter.dtype)
