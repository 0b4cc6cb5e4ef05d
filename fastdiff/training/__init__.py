"""Training: noisy data and its target in one pass, and the losses on what the network makes of them."""

from fastdiff.training.bfn import (
    bfn_continuous_loss,
    bfn_continuous_reconstruction,
    bfn_discrete_loss,
    bfn_discrete_reconstruction,
    bfn_discretised_loss,
    bfn_discretised_reconstruction,
)
from fastdiff.training.bound import BitsPerDim, bits_per_dim, hybrid_loss, prior_kl, vlb_loss
from fastdiff.training.marginals import ideal_model, log_density, score
from fastdiff.training.masked import mask_tokens, masked_loss
from fastdiff.training.noising import add_noise
from fastdiff.training.times import (
    ImportanceTimes,
    log_normal_times,
    logit_normal_times,
    low_discrepancy_times,
    step_times,
    uniform_times,
)
from fastdiff.training.trainer import Trainer
from fastdiff.training.transition import transition, transition_log_prob

__all__ = [
    "BitsPerDim",
    "ImportanceTimes",
    "Trainer",
    "add_noise",
    "bfn_continuous_loss",
    "bfn_continuous_reconstruction",
    "bfn_discrete_loss",
    "bfn_discrete_reconstruction",
    "bfn_discretised_loss",
    "bfn_discretised_reconstruction",
    "bits_per_dim",
    "hybrid_loss",
    "ideal_model",
    "log_density",
    "log_normal_times",
    "logit_normal_times",
    "low_discrepancy_times",
    "mask_tokens",
    "masked_loss",
    "prior_kl",
    "score",
    "step_times",
    "transition",
    "transition_log_prob",
    "uniform_times",
    "vlb_loss",
]
