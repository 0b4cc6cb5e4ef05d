"""DDIM inversion: from data to the noise that DDIM maps back to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.prediction import Conversion, conversion
from fastdiff.schedules import Schedule

__all__ = ["ddim_inversion"]

SEEN = ("current", "next")


def ddim_inversion(schedule: Schedule, steps: int, *, seen: str = "current", **options: Unpack[GridOptions]) -> Plan:
    """DDIM upward: Euler on the probability flow from data to noise, over ddim's own grid reversed.

        x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps,   sigma'/alpha' > sigma/alpha

    Give the data as x_T (taken as the state at the lowest level) or x_init (times its alpha): no noise is added.
    final="zero" starts from clean data, where eps must not need a division by sigma: eps, v or flow prediction;
    "min" starts at t_end. With clip, p is clamped and eps is the model's own.
    Args: seen: which time the model is given, of the level it starts from ("current") or goes to ("next", as
        diffusers; always so on clean data); the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot, order 1; plan.end is the noisy level. ddim returns the data to O(1/steps).
    Source: Song et al. 2021, arXiv:2010.02502, section 4.3; Dhariwal and Nichol 2021, arXiv:2105.05233, appendix F.
    """
    if seen not in SEEN:
        raise ValueError(f"unknown seen {seen!r}; valid: {', '.join(SEEN)}")
    prediction = options.get("prediction", "eps")
    if options.get("final", "zero") == "zero" and prediction not in ("eps", "v", "flow"):
        raise ValueError(
            f"prediction {prediction!r} has no eps on clean data: use final='min', or eps, v or flow prediction"
        )
    grid = make_grid(schedule, steps, options)
    t, alpha, sigma = (v[::-1] for v in (grid.t, grid.alpha, grid.sigma))
    n = len(t) - 1
    known = np.where(np.isnan(t), t[1], t)  # clean data have no time of their own
    at, above = grid.points(known[:n]), grid.points(known[1:])
    if grid.clean:
        pure = conversion(prediction, np.ones(1), np.zeros(1), sign=options.get("sign", 1))
        convert = Conversion(*(np.append(u, v[1:]) for u, v in zip(pure, at.convert, strict=True)))
        at = replace(at, alpha=alpha[:n], sigma=sigma[:n], lam=grid.lam[:0:-1], convert=convert)
    if seen == "next":
        at = replace(at, times=above.times)
    e_skip, e_out = at.convert.e_skip, at.convert.e_out
    if options.get("clip") is None:
        k = sigma[1:] - sigma[:n] * alpha[1:] / alpha[:n]
        A, b, d = alpha[1:] / alpha[:n] + k * e_skip, np.zeros(n), k * e_out
    else:
        A, b, d = sigma[1:] * e_skip, alpha[1:], sigma[1:] * e_out
    end = (float(alpha[-1]), float(sigma[-1]))
    return Plan.of("ddim_inversion", at, A, b, d=d, end=end, init_scale=0.0)
