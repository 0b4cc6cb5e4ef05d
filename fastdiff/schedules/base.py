"""What a noise schedule is: time -> (alpha, sigma) of x_t = alpha x0 + sigma eps, in float64, closed form."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch

from fastdiff.devices import has_float64
from fastdiff.transforms import readable

Made = TypeVar("Made", bound=Callable[..., torch.Tensor])
Method = TypeVar("Method", bound=Callable[..., Any])
OF_TIMES = ("alpha", "sigma", "alpha_sigma", "drift", "diffusion2", "logsnr", "beta", "gamma", "time_of_model")
Array = Any  # float64 np.ndarray or torch.Tensor: the two share the functions used here
FEW = 32  # numbers that are looked at sooner one by one than by torch's min and max


def quiet(t: Array) -> AbstractContextManager[object]:
    """Silences NumPy's warnings about limits that are meant (ln 0 = -inf); nothing for a tensor, so that it traces."""
    return nullcontext() if isinstance(t, torch.Tensor) else np.errstate(all="ignore")


def outside(t: torch.Tensor, largest: float) -> bool:
    """Is a time of a CPU tensor not in [0, largest]? NaN is not."""
    few = t.numel() <= FEW
    return not all([0 <= v <= largest for v in (t.tolist() if few else (t.min().item(), t.max().item()))])


def on_any_device(method: Method) -> Method:
    """A method of (self, t) that computes in float64; of times on a device without: on the CPU, the results as fp32."""

    @functools.wraps(method)
    def of_times(self: Any, t: Array) -> Array:
        if not isinstance(t, torch.Tensor) or has_float64(t.device):
            return method(self, t)
        made = method(self, t.cpu())
        there = [v.to(t.device, torch.float32) for v in (made if isinstance(made, tuple) else (made,))]
        return tuple(there) if isinstance(made, tuple) else there[0]

    return of_times  # type: ignore[return-value]


def of_its_dtype(method: Method) -> Method:
    """model_time of a tensor in the dtype that plans give: a tensor's own, fp32 for integers of a continuous time."""

    @functools.wraps(method)
    def model_time(self: Any, t: Array) -> Array:
        made = method(self, t)
        if not isinstance(t, torch.Tensor) or made.dtype == t.dtype:
            return made
        return made.to(t.dtype if t.is_floating_point() else torch.float32)

    return model_time  # type: ignore[return-value]


def xp_of(t: Array) -> Any:  # noqa: ANN401 - a module
    return torch if isinstance(t, torch.Tensor) else np


def positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def plain(schedule: object, *names: str) -> None:
    """Python's numbers in place of NumPy's, in whose own precision a schedule would go on computing."""
    for name in names:
        value = getattr(schedule, name)
        if isinstance(value, np.generic):
            object.__setattr__(schedule, name, value.item())


class Schedule(ABC):
    """A noise schedule: x_t = alpha(t) x0 + sigma(t) eps, noise at the largest t.

    sigma is the STANDARD DEVIATION of the noise. The forward SDE is dx = f(t) x dt + g(t) dW.
    """

    t_max: float = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if ("alpha" in own or "sigma" in own) and "alpha_sigma" not in own:  # an inherited one knows other formulas
            cls.alpha_sigma = Schedule.alpha_sigma  # type: ignore[method-assign]
        for name in OF_TIMES:
            if name in own:
                setattr(cls, name, on_any_device(own[name]))
        if "model_time" in own:
            cls.model_time = of_its_dtype(on_any_device(own["model_time"]))  # type: ignore[method-assign]

    def _time(self, t: Array) -> Array:
        """float64 time, refused outside [0, t_max] wherever looking at it costs no device sync."""
        if isinstance(t, torch.Tensor):
            t = t.to(torch.float64)
            flat = t if t.dim() == 1 else t.reshape(-1)
            bad = readable(t) and outside(flat, self.t_max)
        else:
            t = np.asarray(t, np.float64)
            bad = bool(np.any((t < 0) | (t > self.t_max) | np.isnan(t)))
        if bad:
            raise ValueError(f"t must be in [0, {self.t_max:g}] for {self}, got {t}")
        return t

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal scale alpha(t)."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise standard deviation sigma(t)."""

    @on_any_device
    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """alpha(t) and sigma(t) at once: schedules whose formulas share a part compute that part once."""
        return self.alpha(t), self.sigma(t)

    @abstractmethod
    def drift(self, t: Array) -> Array:
        """f(t) = d ln(alpha) / dt: the forward drift is f x."""

    @abstractmethod
    def diffusion2(self, t: Array) -> Array:
        """g(t)^2 = (sigma^2)' - 2 f sigma^2: the squared diffusion coefficient."""

    @abstractmethod
    def t_of(self, logsnr: Array) -> Array:
        """The time at which 2 ln(alpha / sigma) = logsnr (NumPy)."""

    @on_any_device
    def logsnr(self, t: Array) -> Array:
        """2 ln(alpha / sigma): +inf where sigma = 0, -inf where alpha = 0."""
        a, s = self.alpha_sigma(t)
        xp = xp_of(a)
        with quiet(a):
            return 2.0 * (xp.log(a) - xp.log(s))

    @of_its_dtype
    @on_any_device
    def model_time(self, t: Array) -> Array:
        """What the model receives as t, of a tensor in its own dtype (integers of a continuous schedule: float32)."""
        return self._time(t)

    @on_any_device
    def time_of_model(self, t: Array) -> Array:
        """The time at which the model receives t: model_time's inverse, float64.

        What a function of the model's t (log_prob of classifier_guidance, a callback) asks alpha and sigma for.
        """
        return self._time(t)

    def t_start(self, prediction: str | object = "eps") -> float:
        """The default first evaluation time."""
        return self.t_max

    def t_end(self, steps: int) -> float:
        """The default last evaluation time."""
        return 0.0
