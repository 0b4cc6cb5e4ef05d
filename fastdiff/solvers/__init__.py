"""Solvers: pure functions (schedule, steps, **options) -> Plan. No tensors, no loop over a model.

Every solver takes the options of fastdiff.grid.GridOptions (prediction, clip, spacing, final, start, ...).
"""

from fastdiff.solvers.adams import deis, gradient_estimation, ipndm, lms
from fastdiff.solvers.bfn import bfn_continuous, bfn_discrete, bfn_discretised
from fastdiff.solvers.bfn_solver import bfn_solver
from fastdiff.solvers.consistency import consistency, lcm, tcd
from fastdiff.solvers.ddpm import ddim, ddpm, euler, euler_ancestral
from fastdiff.solvers.dpm2 import dpm2, dpm2_ancestral, dpmpp_2s_ancestral
from fastdiff.solvers.dpm_solver import dpm_solver
from fastdiff.solvers.dpmpp import dpmpp_2m, dpmpp_3m
from fastdiff.solvers.dpmpp_sde import dpmpp_sde
from fastdiff.solvers.edm import edm_stochastic
from fastdiff.solvers.er_sde import er_sde
from fastdiff.solvers.heun import heun
from fastdiff.solvers.inversion import ddim_inversion
from fastdiff.solvers.multistep_sde import dpmpp_2m_sde, dpmpp_3m_sde
from fastdiff.solvers.pndm import plms
from fastdiff.solvers.restart import restart
from fastdiff.solvers.sa_solver import sa_solver
from fastdiff.solvers.score_sde import ancestral, langevin, reverse_diffusion
from fastdiff.solvers.sde import euler_maruyama, probability_flow
from fastdiff.solvers.seeds import seeds
from fastdiff.solvers.unipc import unipc
from fastdiff.solvers.unmask import unmask

__all__ = [
    "ancestral",
    "bfn_continuous",
    "bfn_discrete",
    "bfn_discretised",
    "bfn_solver",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "edm_stochastic",
    "er_sde",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "gradient_estimation",
    "heun",
    "ipndm",
    "langevin",
    "lcm",
    "lms",
    "plms",
    "probability_flow",
    "restart",
    "reverse_diffusion",
    "sa_solver",
    "seeds",
    "tcd",
    "unipc",
    "unmask",
]
