"""The operations: each checks its arguments, then runs one Triton kernel (CUDA) or its plain torch reference (CPU)."""

from fastdiff.ops import normal as _normal  # noqa: F401 - registers the fill kernel
from fastdiff.ops._categorical import categorical_buffer
from fastdiff.ops._dispatch import use_kernels
from fastdiff.ops._fused import cpu_compiler
from fastdiff.ops.add_noise import add_noise, add_noise_ref
from fastdiff.ops.affine_step import advance, advance_ref, affine_step, affine_step_ref
from fastdiff.ops.binned import binned_readout, binned_readout_ref
from fastdiff.ops.categorical_loss import categorical_loss, categorical_loss_ref
from fastdiff.ops.categorical_noise import categorical_noise, categorical_noise_ref
from fastdiff.ops.categorical_step import categorical_step, categorical_step_ref
from fastdiff.ops.denoising_loss import denoising_loss, denoising_loss_ref
from fastdiff.ops.forward_step import forward_step, forward_step_ref
from fastdiff.ops.gaussian_kl import decoder_nll, gaussian_kl, gaussian_kl_ref
from fastdiff.ops.guidance_columns import cfg_plus_plus, guidance_interval
from fastdiff.ops.guide import guidance_scales, guidance_scales_ref, guide, guide_ref
from fastdiff.ops.outer_step import outer_step, outer_step_ref
from fastdiff.ops.posterior import posterior, posterior_ref
from fastdiff.ops.threshold import threshold, threshold_bound, threshold_bound_ref, threshold_ref
from fastdiff.ops.unmask_step import unmask_step, unmask_step_ref

__all__ = [
    "add_noise",
    "add_noise_ref",
    "advance",
    "advance_ref",
    "affine_step",
    "affine_step_ref",
    "binned_readout",
    "binned_readout_ref",
    "categorical_buffer",
    "categorical_loss",
    "categorical_loss_ref",
    "categorical_noise",
    "categorical_noise_ref",
    "categorical_step",
    "categorical_step_ref",
    "cfg_plus_plus",
    "cpu_compiler",
    "decoder_nll",
    "denoising_loss",
    "denoising_loss_ref",
    "forward_step",
    "forward_step_ref",
    "gaussian_kl",
    "gaussian_kl_ref",
    "guidance_interval",
    "guidance_scales",
    "guidance_scales_ref",
    "guide",
    "guide_ref",
    "outer_step",
    "outer_step_ref",
    "posterior",
    "posterior_ref",
    "threshold",
    "threshold_bound",
    "threshold_bound_ref",
    "threshold_ref",
    "unmask_step",
    "unmask_step_ref",
    "use_kernels",
]
