"""ComfyUI's ancestral samplers of a flow: steps of the ODE to a lower sigma, then noise up to the next one."""

from __future__ import annotations

import numpy as np

from fastdiff.grid import GridOptions, make_grid
from fastdiff.plan import Plan
from fastdiff.schedules import Flow
from fastdiff.solvers.multistep_sde import nonnegative

__all__ = ["KINDS", "flow_ancestral"]

KINDS = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
BELOW_ONE = 0.9999  # 2S's middle of a step from sigma = 1, where lam is infinite


def flow_ancestral(kind: str, levels: np.ndarray, eta: float, s_noise: float) -> Plan:
    """The plan of x = (1 - sigma) x0 + sigma n over noise levels, on a denoiser's x0.

        down = sigma' (1 + eta (sigma'/sigma - 1)),   r = (1 - sigma') / (1 - down)
        x' = r y + s_noise sqrt(sigma'^2 - (r down)^2) n,   y: the ODE's step from sigma to down, by
        euler_ancestral:     y = (down/sigma) x + (1 - down/sigma) p
        dpm_2_ancestral:     y = x + (down - sigma) (z - p_z) / m,   z: Euler's step to m = sqrt(sigma down)
        dpmpp_2s_ancestral:  y = (down/sigma) x + (1 - down/sigma) p_z,   z: to the m in the middle of ln((1-m)/m)

    Args: kind: one of KINDS. levels: [n + 1] sigma, decreasing, in [0, 1]; a final 0 is a clean end, x' = p. eta >= 0,
        so small that down > 0.
    Returns: Plan, one row a step (euler) or two, the last one alone where it ends clean.
    Raises: ValueError: eta negative or too large, s_noise negative.
    Source: ComfyUI, k_diffusion/sampling.py, the functions that end in _RF.
    """
    nonnegative(eta=eta, s_noise=s_noise)
    clean = levels[-1] == 0
    given: GridOptions = {"prediction": "x0", "sigmas": levels[:-1], "final": "zero"} if clean else {
        "prediction": "x0", "sigmas": levels, "final": "min"}  # fmt: skip
    grid = make_grid(Flow(), len(levels) - 1, given)
    steps = len(levels) - 1 - clean
    sigma, to = levels[:steps], levels[1 : steps + 1]
    down = to * (1 + eta * (to / sigma - 1))
    if np.any(down <= 0):
        raise ValueError(f"eta must be below {np.min(1 / (1 - to / sigma)):g} for these sigmas, got {eta!r}")
    ratio = (1 - to) / (1 - down)
    fresh = s_noise * np.sqrt(np.maximum(to**2 - (ratio * down) ** 2, 0))
    stages = 1 if kind == "euler_ancestral" else 2
    n = stages * steps + clean
    A, b, s = np.zeros((n, stages, stages)), np.zeros((n, stages)), np.zeros((n, stages))
    t = np.empty(n)
    t[-1] = levels[steps - 1 + clean]
    last = np.arange(stages - 1, stages * steps, stages)
    s[last, 0] = fresh
    if stages == 1:
        t[last], A[last, 0, 0], b[last, 0] = sigma, ratio * down / sigma, ratio * (1 - down / sigma)
    else:
        first = last - 1
        middle = np.sqrt(sigma * down)
        if kind == "dpmpp_2s_ancestral":
            with np.errstate(divide="ignore"):
                odds = np.sqrt((1 - sigma) / sigma * (1 - down) / down)
            middle = np.where(sigma == 1, BELOW_ONE, 1 / (1 + odds))
        t[first], t[last] = sigma, middle
        A[first, 0, 0], b[first, 0], A[first, 1, 0] = middle / sigma, 1 - middle / sigma, 1
        if kind == "dpmpp_2s_ancestral":
            A[last, 0, 1], b[last, 0] = ratio * down / sigma, ratio * (1 - down / sigma)
        else:
            slope = ratio * (down - sigma) / middle
            A[last, 0, 1], A[last, 0, 0], b[last, 0] = ratio, slope, -slope
    if clean:
        b[-1, 0] = 1
    return Plan.of(f"flow {kind}(eta={eta:g})", grid.points(t), A, b, s=s, end=grid.end)
