"""Attention in Gluon for Hopper (sm_90): launchers as in sfkernels.gpu, for head dims 64 and 128 in
bfloat16 and float16. Imported only where it is asked for, as not every Triton has this Gluon."""

from sfkernels.gpu.hopper.attention import attention_fwd, ring_attention
from sfkernels.gpu.hopper.attention_backward import attention_bwd

__all__ = ["attention_bwd", "attention_fwd", "ring_attention"]
