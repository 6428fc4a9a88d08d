"""Kernels for streaming video from autoregressive diffusion models."""

from sfkernels import layers
from sfkernels.attention import (
    Prefix,
    block_causal_attention,
    cross_attention,
    ring_attention,
)
from sfkernels.convolution import causal_conv3d, upsampled_conv2d
from sfkernels.kv_cache import RingKVCache
from sfkernels.layout import BlockLayout
from sfkernels.linear import linear
from sfkernels.norm import adaln, gated_adaln, gated_layer_norm, layer_norm, rms_norm, rms_norm_silu
from sfkernels.quant import quantize_rows
from sfkernels.residual import gated_residual
from sfkernels.rope import qk_norm_rope, qk_norm_rope_append, rope_table, rotate_keys
from sfkernels.sampler import Noise, dmd_gradient, euler_step, normal, sampler_step

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "Noise",
    "Prefix",
    "RingKVCache",
    "adaln",
    "block_causal_attention",
    "causal_conv3d",
    "cross_attention",
    "dmd_gradient",
    "euler_step",
    "gated_adaln",
    "gated_layer_norm",
    "gated_residual",
    "layer_norm",
    "layers",
    "linear",
    "normal",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "quantize_rows",
    "ring_attention",
    "rms_norm",
    "rms_norm_silu",
    "rope_table",
    "rotate_keys",
    "sampler_step",
    "upsampled_conv2d",
]
