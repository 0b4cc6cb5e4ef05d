"""fastdiff: sampling from diffusion models, score models and flows at one kernel per model evaluation."""

from fastdiff import ops, rng, schedules, solvers, training
from fastdiff.plan import Plan
from fastdiff.probe import probe
from fastdiff.sampler import Sampler, Trajectory, sample

__all__ = ["Plan", "Sampler", "Trajectory", "ops", "probe", "rng", "sample", "schedules", "solvers", "training"]
__version__ = "0.1.0"
