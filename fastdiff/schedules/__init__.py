"""Noise schedules: time -> (alpha, sigma) of x_t = alpha x0 + sigma eps, in float64, closed form.

Every method takes a float or an array (-> float64 NumPy) or a torch tensor (-> float64 tensor on its device;
of a device without float64: computed on the CPU, fp32).
"""

from fastdiff.schedules.base import Schedule
from fastdiff.schedules.betas import (
    Betas,
    constant_betas,
    cosine_betas,
    exp_betas,
    laplace_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)
from fastdiff.schedules.bfn import BFNContinuous, BFNDiscrete
from fastdiff.schedules.continuous import EDM, Cosine, Flow, dynamic_shift
from fastdiff.schedules.masked import Masked
from fastdiff.schedules.sde import VE, VP, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "BFNContinuous",
    "BFNDiscrete",
    "Betas",
    "Cosine",
    "Flow",
    "Masked",
    "Schedule",
    "SubVP",
    "constant_betas",
    "cosine_betas",
    "dynamic_shift",
    "exp_betas",
    "laplace_betas",
    "linear_betas",
    "scaled_linear_betas",
    "sigmoid_betas",
    "zero_terminal_snr",
]
