"""Few-step samplers of distilled models: LCM, TCD and multistep consistency. One evaluation a step, one slot."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Unpack

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Betas, Schedule
from fastdiff.solvers.multistep_sde import fraction

__all__ = ["consistency", "lcm", "tcd"]

GRID = ("spacing", "sigmas", "t_start", "t_end")
BOUNDARY = 2.0  # 1 / sigma_data of the boundary condition


def _distilled_times(schedule: Schedule, steps: int, original_steps: int, options: GridOptions) -> GridOptions:
    """On a chain, the default grid: `steps` of the `original_steps` times the student was distilled on."""
    if isinstance(original_steps, bool) or not isinstance(original_steps, int | np.integer) or original_steps < 1:
        raise ValueError(f"original_steps must be an integer >= 1, got {original_steps!r}")
    own = any(options.get(name) is not None for name in GRID)
    if own or not isinstance(schedule, Betas) or not isinstance(steps, int | np.integer) or steps < 1:
        return options
    T = len(schedule.betas)
    if steps > (count := min(original_steps, T)):
        raise ValueError(f"steps must be <= {count}, the times the model was distilled on, got {steps}")
    trained = (np.arange(count, 0, -1) * (T // count) - 1).astype(np.float64)
    t = trained[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(np.int64)]
    chosen = np.append(t, 0.0) if options.get("final") == "min" else t
    return GridOptions(**{**options, "spacing": chosen})  # type: ignore[typeddict-item]


def lcm(
    schedule: Schedule, steps: int, *, original_steps: int = 50, timestep_scaling: float | None = None,
    **options: Unpack[GridOptions],
) -> Plan:  # fmt: skip
    """Latent consistency sampling: the student's x0, noised again to the next level.

        f = c_out p + c_skip x,   c_skip = 1 / (k^2 + 1),  c_out = k / sqrt(k^2 + 1),  k = 2 timestep_scaling t
        x' = alpha' f + sigma' n

    Args:
        original_steps: on a chain, the default grid takes `steps` of so many equidistant times. timestep_scaling: of
        the boundary; default 10 on a chain, else inf (f = p). The rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot; as good as the student, it has no order. No noise on the row that ends clean.
    Source: Luo et al. 2023, arXiv:2310.04378, algorithm 3; boundary: Song et al. 2023, arXiv:2303.01469, eq. 5.
    """
    scaling = (10.0 if isinstance(schedule, Betas) else np.inf) if timestep_scaling is None else timestep_scaling
    if isinstance(scaling, bool) or not isinstance(scaling, Real) or not scaling > 0:
        raise ValueError(f"timestep_scaling must be > 0, got {timestep_scaling!r}")
    grid = make_grid(schedule, steps, _distilled_times(schedule, steps, original_steps, options))
    if np.isfinite(scaling):
        k = BOUNDARY * scaling * grid.at.t
        skip, out = 1 / (1 + k * k), k / np.sqrt(1 + k * k)
    else:
        skip, out = 0 * grid.at.t, 1 + 0 * grid.at.t
    alpha = grid.alpha[1:]
    return Plan.of("lcm", grid.at, alpha * skip, alpha * out, s=grid.sigma[1:], end=grid.end)


def tcd(
    schedule: Schedule, steps: int, *, gamma: float = 0.3, original_steps: int = 50, **options: Unpack[GridOptions]
) -> Plan:
    """Trajectory consistency distillation: along the trajectory below the next level, then noise up to it.

        t_s = (1 - gamma) t'  (whole where a chain's t' is),   x_s = alpha_s p + sigma_s eps
        x' = (alpha'/alpha_s) x_s + sqrt(sigma'^2 - (alpha'/alpha_s)^2 sigma_s^2) n

    Args: gamma: in [0, 1]; 0 is deterministic (ddim), 1 noises x0 again (lcm). original_steps: see lcm; the rest:
        fastdiff.grid.GridOptions. final="min" ends at t = 0, as diffusers; "zero" returns p.
    Returns: Plan, nfe = steps, 1 slot, order 1 at gamma = 0.
    Source: Zheng et al. 2024, arXiv:2402.19159, algorithm 2 (strategic stochastic sampling).
    """
    gamma = fraction("gamma", gamma)
    grid = make_grid(schedule, steps, _distilled_times(schedule, steps, original_steps, options))
    n = len(grid.at.t) - grid.clean
    at, chain = grid.t[1 : n + 1], isinstance(schedule, Betas)
    below = np.where(chain & (at == np.floor(at)), np.floor((1 - gamma) * at), (1 - gamma) * at)
    with np.errstate(divide="ignore"):
        lam = np.append(np.log(schedule.alpha(below)) - np.log(schedule.sigma(below)), grid.lam[n + 1 :])
    alpha, sigma = grid.alpha[1:], grid.sigma[1:]
    with np.errstate(invalid="ignore"):
        fall = np.where(lam == grid.lam[1:], 0, grid.lam[1:] - lam)  # <= 0
    A = sigma * np.exp(fall) / grid.sigma[:-1]
    b = -alpha * np.expm1(grid.lam[:-1] - lam)
    return Plan.of(f"tcd(gamma={gamma:g})", grid.at, A, b, s=sigma * np.sqrt(-np.expm1(2 * fall)), end=grid.end)


def consistency(schedule: Schedule, steps: int, *, floor: float | None = None, **options: Unpack[GridOptions]) -> Plan:
    """Multistep consistency sampling: x0 in one evaluation, noised again to the next level.

        x' = alpha' (p + sqrt(r'^2 - floor^2) n),   y = x/alpha, r = sigma/alpha

    With prediction="edm" the model is the raw network F of a consistency model, with its boundary at r = floor:
        p = d^2 / ((r - floor)^2 + d^2) y + (r - floor) d / sqrt(r^2 + d^2) F(c_in x, ln(r) / 4),  d = sigma_data
    Args: floor: the level at which the model's x0 lives, default the schedule's lowest sigma/alpha; spacing: default
        "trailing" (t_max down to t_max / steps), without t_start and t_end; the rest: fastdiff.grid.GridOptions.
    Returns: Plan, nfe = steps, 1 slot; as good as the model, no order. draws: one a row; a single row without s: none.
    Source: Song et al. 2023, arXiv:2303.01469, algorithm 1 and appendix C.
    """
    if all(options.get(name) is None for name in GRID):
        options["spacing"] = "trailing"
    grid = make_grid(schedule, steps, options)
    low = float(schedule.sigma(0.0) / schedule.alpha(0.0)) if floor is None else float(floor)
    if not 0 <= low < np.inf:
        raise ValueError(f"floor must be a finite number >= 0, got {floor!r}")
    at = grid.at
    if options.get("prediction") == "edm":
        given = options.get("sigma_data")
        data = float(getattr(schedule, "sigma_data", 0.5) if given is None else given)
        r, sign = at.sigma / at.alpha, options.get("sign", 1)
        skip, out = data**2 / ((r - low) ** 2 + data**2), (r - low) * data / np.sqrt(r * r + data**2)
        at = replace(at, convert=at.convert._replace(c_skip=skip / at.alpha, c_out=sign * out))
    s = np.sqrt(np.maximum(grid.sigma[1:] ** 2 - (grid.alpha[1:] * low) ** 2, 0))
    plan = Plan.of("consistency", at, 0 * at.t, grid.alpha[1:], s=s, end=grid.end)
    return replace(plan, draws=np.where(s != 0, 1, int(plan.nfe > 1)))
