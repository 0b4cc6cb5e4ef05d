"""fastdiff: sampling from diffusion models, score models and flows at one kernel per model evaluation."""

from fastdiff import schedules, solvers
from fastdiff.plan import Plan

__all__ = ["Plan", "schedules", "solvers"]
__version__ = "0.1.0"
