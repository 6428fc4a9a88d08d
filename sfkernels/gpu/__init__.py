"""Triton kernels with their launchers. The public functions are in sfkernels; a launcher takes
checked arguments, allocates its outputs and runs one or two kernels.

All but attention, convolutions and linear layers read each of their tensors once and write each
once. Every kernel computes in float32 and stores in the tensor's dtype.
"""

from sfkernels.gpu.attention import attention_fwd, combine_parts, ring_attention
from sfkernels.gpu.attention_backward import attention_bwd, row_delta
from sfkernels.gpu.convolution import causal_conv3d, upsampled_conv2d
from sfkernels.gpu.linear import linear
from sfkernels.gpu.norm import norm_bwd, norm_fwd
from sfkernels.gpu.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from sfkernels.gpu.quant import quantize_rows
from sfkernels.gpu.residual import gated_residual_bwd, gated_residual_fwd
from sfkernels.gpu.rope import rope_table, rotate_keys
from sfkernels.gpu.sampler import dmd_gradient, normal, sampler_step

__all__ = [
    "attention_bwd",
    "attention_fwd",
    "causal_conv3d",
    "combine_parts",
    "dmd_gradient",
    "gated_residual_bwd",
    "gated_residual_fwd",
    "linear",
    "norm_bwd",
    "norm_fwd",
    "normal",
    "qk_norm_rope_bwd",
    "qk_norm_rope_fwd",
    "quantize_rows",
    "ring_attention",
    "rope_table",
    "rotate_keys",
    "row_delta",
    "sampler_step",
    "upsampled_conv2d",
]
