"""Solvers: pure functions (schedule, steps, **options) -> Plan. No tensors, no loop over a model.

Every solver takes the options of fastdiff.grid.GridOptions (prediction, clip, spacing, final, start, ...).
"""

from fastdiff.solvers.ddpm import ddim, ddpm, euler, euler_ancestral
from fastdiff.solvers.dpmpp import dpmpp_2m
from fastdiff.solvers.heun import heun
from fastdiff.solvers.sde import euler_maruyama, probability_flow

__all__ = [
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "probability_flow",
]
