"""Training: noisy data and its target in one pass, and the losses on what the network makes of them."""

from fastdiff.training.noising import add_noise

__all__ = ["add_noise"]
