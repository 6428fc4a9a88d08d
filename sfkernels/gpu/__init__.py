"""Triton kernels with their launchers. The public functions are in sfkernels; a launcher takes
checked arguments, allocates its outputs and runs one or two kernels.

Every kernel reads each of its tensors once and writes each once, computes in float32 and stores in
the tensor's dtype.
"""

from sfkernels.gpu.norm import norm_bwd, norm_fwd
from sfkernels.gpu.rope import qk_norm_rope_bwd, qk_norm_rope_fwd, rope_table
from sfkernels.gpu.sampler import dmd_gradient, normal, sampler_step

__all__ = [
    "dmd_gradient",
    "norm_bwd",
    "norm_fwd",
    "normal",
    "qk_norm_rope_bwd",
    "qk_norm_rope_fwd",
    "rope_table",
    "sampler_step",
]
