"""What a model's output means, as numbers: x0 = c_skip x + c_out m and eps = e_skip x + e_out m."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["NO_SKIP", "PREDICTIONS", "Conversion", "Prediction", "conversion", "factored"]

Array = np.ndarray
NO_SKIP = 2.0**-80


class Conversion(NamedTuple):
    """Coefficients [N] float64 that turn (x, model output) into x0 and eps, and scale the model's input."""

    c_skip: Array
    c_out: Array
    e_skip: Array
    e_out: Array
    c_in: Array


def _eps(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    return 1 / a, -s / a, 0 * s, 1 + 0 * s


def _x0(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    return 0 * a, 1 + 0 * a, 1 / s, -a / s


def _v(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    norm2 = a * a + s * s
    return a / norm2, -s / np.sqrt(norm2), s / norm2, a / np.sqrt(norm2)


def _score(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    return 1 / a, s * s / a, 0 * s, -s


def _flow(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    return 1 / (a + s), -s / (a + s), 1 / (a + s), a / (a + s)


def _edm(a: Array, s: Array, data: float) -> tuple[Array, ...]:
    r2 = (s / a) ** 2 + data * data
    skip, out = data * data / r2 / a, s / a * data / np.sqrt(r2)
    return skip, out, (1 - a * skip) / s, -a * out / s


PREDICTIONS: dict[str, Callable[[Array, Array, float], tuple[Array, ...]]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "score": _score,
    "flow": _flow,
    "edm": _edm,
}

Prediction = str | Callable[[Array, Array], tuple[Array, Array]]


def conversion(
    prediction: Prediction, alpha: Array, sigma: Array, *, sigma_data: float = 0.5, sign: int = 1
) -> Conversion:
    """The conversion of one prediction type at noise levels (alpha, sigma).

        eps:   x0 = (x - sigma m) / alpha                     score: m = -eps / sigma
        v:     m = (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2)
        flow:  m = eps - x0                                   x0:    x0 = m
        edm:   the raw network F of Karras et al.: D(y; r) = c_skip y + c_out F, y = x / alpha, r = sigma / alpha

    Args:
        prediction: one of PREDICTIONS, or a function (alpha [N], sigma [N]) -> (c_skip [N], c_out [N]).
        alpha, sigma: [N] float64. sigma_data: the data's std (edm). sign: -1 for models that return -m.
    Returns: Conversion of [N] float64 arrays.
    Raises: ValueError for an unknown name, a sign that is not +-1, or coefficients that are not finite (a row of
        zero signal with eps or score: logsnr < -30).
    Source: Salimans and Ho 2022, arXiv:2202.00512 (v); Karras et al. 2022, arXiv:2206.00364, table 1 (edm).
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    with np.errstate(divide="ignore", invalid="ignore"):
        if callable(prediction):
            skip, out = (np.broadcast_to(np.asarray(c, np.float64), alpha.shape) for c in prediction(alpha, sigma))
            e_skip, e_out = (1 - alpha * skip) / sigma, -alpha * out / sigma
        elif isinstance(prediction, str) and prediction in PREDICTIONS:
            skip, out, e_skip, e_out = PREDICTIONS[prediction](alpha, sigma, sigma_data)
        else:
            raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}, or a function")
        hopeless = 2 * (np.log(alpha) - np.log(sigma)) < -30
        if prediction in ("eps", "score", "edm") and np.any(hopeless):
            raise ValueError(
                f"prediction {prediction!r} cannot start from zero signal: logsnr < -30 at row "
                f"{int(np.flatnonzero(hopeless)[0])} (zero terminal SNR); use v, x0 or flow prediction, or t_start"
            )
        c_in = 1 / (alpha * np.sqrt((sigma / alpha) ** 2 + sigma_data**2)) if prediction == "edm" else 1 + 0 * alpha
    if not (np.all(np.isfinite(skip)) and np.all(np.isfinite(out))):
        raise ValueError(f"prediction {prediction!r} gives c_skip or c_out that are not finite on this grid")
    return Conversion(skip, sign * out, e_skip, sign * e_out, c_in)


def factored(c_skip: Array, c_out: Array) -> tuple[Array, Array]:
    """c_skip and c_ratio [N] float64: c_skip x + c_out m = c_skip (x + c_ratio m).

    Where x and m nearly cancel, as of a noise prediction at the noisy end, the right side is accurate in fp32, the
    left side by 1 / alpha less. A c_skip below NO_SKIP is taken as that: x is rounded away beside m.
    """
    skip = np.where(np.abs(c_skip) < NO_SKIP, NO_SKIP, c_skip)
    return skip, c_out / skip
