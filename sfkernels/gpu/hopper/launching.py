"""Sizes, settings and TMA descriptors that the launches of all kernels in Gluon share. Shapes are
named as in attention.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sfkernels import launch
from sfkernels.gpu.attention import tile_setting
from sfkernels.gpu.hopper.work import FIELDS
from sfkernels.layout import Span

# Two consumers of M queries each: the rows of one wgmma.
M, CONSUMERS = gl.constexpr(64), gl.constexpr(2)
ITEM = gl.constexpr(FIELDS)
# Threads of both consumers, and of them and the loading warp.
BOTH, ALL = gl.constexpr(256), gl.constexpr(288)
# Registers of a thread. A program is given REGISTERS for each thread of 12 warps; its consumers
# take what the warpgroup of the loading warp leaves.
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, gl.constexpr(240), gl.constexpr(24)

_GLUON = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}
# Waits for all threads of a partition. Triton 3.6 has it by one name, 3.7 by the other.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


def hopper_setting(kernel: str, q_BLHD: Tensor) -> launch.Tile:
    setting = tile_setting(kernel, q_BLHD)
    assert setting.stationary == CONSUMERS.value * M.value and setting.warps == 4, setting
    # A tile of keys is kept until the next one is there; each buffer has a named barrier or two.
    assert 1 < setting.stages <= 4, setting
    return setting


def launch_specialised(
    kernel: Any,
    setting: launch.Tile,
    grid: Sequence[int],
    args: Sequence[Any],
    q_BLHD: Tensor,
    **meta: Any,
) -> None:
    """Launches a kernel with the arguments that all kernels here have in common."""
    launch.run(
        kernel,
        grid,
        args,
        num_warps=setting.warps,
        maxnreg=REGISTERS,
        H=q_BLHD.shape[2],
        D=q_BLHD.shape[3],
        N=setting.streamed,
        STAGES=setting.stages,
        **meta,
    )


def side_by_side(x_BLHD: Tensor) -> Tensor:
    """The tensor, copied if other memory lies between its samples: what comes behind the last tile
    of one is multiplied by zero, and might not be finite there."""
    (batch, tokens, heads, head_dim), (stride_b, stride_l, *_) = x_BLHD.shape, x_BLHD.stride()
    rows = stride_l >= heads * head_dim and stride_b % stride_l == 0  # else `describe` refuses it
    gaps = batch > 1 and stride_b > tokens * stride_l
    return x_BLHD.contiguous() if rows and gaps else x_BLHD


def seen_of(prefix_BPHD: Tensor | None, spans: Sequence[Span]) -> Tensor | None:
    """The prefix up to the end of what is seen: behind it TMA reads zeros, or the next sample."""
    return None if prefix_BPHD is None else side_by_side(prefix_BPHD[:, : spans[-1][1]])


def describe(name: str, x_BLHD: Tensor | None, box: int) -> tuple[Any, int]:
    """A TMA descriptor of the rows of all samples, whose boxes are `box` rows of one head; and how
    many rows a sample is apart from the next. Raises ValueError for tensors that TMA cannot read as
    such rows."""
    if x_BLHD is None:
        return None, 0
    if x_BLHD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {x_BLHD.dtype}: impl='gluon' takes bfloat16 and float16; use 'triton'"
        )
    batch, tokens, heads, head_dim = x_BLHD.shape
    stride_b, stride_l, stride_h, stride_d = x_BLHD.stride()
    stride_b = 0 if batch == 1 else stride_b
    if (
        stride_d != 1
        or (stride_h != head_dim and heads > 1)
        or stride_l < heads * head_dim
        or stride_l % 8
        or stride_b % stride_l
        or x_BLHD.data_ptr() % 16
    ):
        raise ValueError(
            f"{name} has strides {x_BLHD.stride()} and starts at byte {x_BLHD.data_ptr() % 16} of "
            f"16: for impl='gluon' the {heads} heads of {head_dim} of a token must lie side by "
            "side, tokens a multiple of 8 elements apart, samples a whole number of tokens apart, "
            "and the start be aligned to 16 bytes; call .contiguous() or use impl='triton'"
        )
    apart = stride_b // stride_l
    shape = [(batch - 1) * apart + tokens, heads * head_dim]
    layout = shared_layout(box, head_dim, x_BLHD.dtype)
    return TensorDescriptor(x_BLHD, shape, [stride_l, 1], [box, head_dim], layout), apart


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON[dtype])
