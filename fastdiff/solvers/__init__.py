"""Solvers: pure functions (schedule, steps, **options) -> Plan. No tensors, no loop over a model.

Every solver takes the options of fastdiff.grid.GridOptions (prediction, clip, spacing, final, start, ...).
"""

from fastdiff.solvers.adams import deis, ipndm, lms
from fastdiff.solvers.ddpm import ddim, ddpm, euler, euler_ancestral
from fastdiff.solvers.dpm2 import dpm2, dpm2_ancestral, dpmpp_2s_ancestral
from fastdiff.solvers.dpm_solver import dpm_solver
from fastdiff.solvers.dpmpp import dpmpp_2m, dpmpp_3m
from fastdiff.solvers.heun import heun
from fastdiff.solvers.pndm import plms
from fastdiff.solvers.sde import euler_maruyama, probability_flow
from fastdiff.solvers.unipc import unipc

__all__ = [
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "ipndm",
    "lms",
    "plms",
    "probability_flow",
    "unipc",
]
