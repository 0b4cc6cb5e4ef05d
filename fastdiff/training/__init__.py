"""Training: noisy data and its target in one pass, and the losses on what the network makes of them."""

from fastdiff.training.bfn import (
    bfn_continuous_loss,
    bfn_continuous_reconstruction,
    bfn_discrete_loss,
    bfn_discrete_reconstruction,
    bfn_discretised_loss,
    bfn_discretised_reconstruction,
)
from fastdiff.training.noising import add_noise

__all__ = [
    "add_noise",
    "bfn_continuous_loss",
    "bfn_continuous_reconstruction",
    "bfn_discrete_loss",
    "bfn_discrete_reconstruction",
    "bfn_discretised_loss",
    "bfn_discretised_reconstruction",
]
