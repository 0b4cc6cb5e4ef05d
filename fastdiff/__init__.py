"""fastdiff: sampling from diffusion models, score models and flows at one kernel per model evaluation."""

from fastdiff import correctors, ops, rng, schedules, solvers, training
from fastdiff.classifier_guidance import classifier_guidance
from fastdiff.correctors import predictor_corrector
from fastdiff.flow_map import flow_map
from fastdiff.inpaint import inpaint
from fastdiff.integrations.diffusers import accelerate, restore
from fastdiff.likelihood import drift, log_likelihood
from fastdiff.plan import Plan
from fastdiff.probe import probe
from fastdiff.sampler import Sampler, Trajectory, sample
from fastdiff.unrolled import Unrolled

__all__ = [
    "Plan",
    "Sampler",
    "Trajectory",
    "Unrolled",
    "accelerate",
    "classifier_guidance",
    "correctors",
    "drift",
    "flow_map",
    "inpaint",
    "log_likelihood",
    "ops",
    "predictor_corrector",
    "probe",
    "restore",
    "rng",
    "sample",
    "schedules",
    "solvers",
    "training",
]
__version__ = "0.1.0"
