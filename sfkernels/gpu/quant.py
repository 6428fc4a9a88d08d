"""Rows in 8 bits, each with a scale of its own.

Shapes: B batch, L tokens, C channels, S strips of a sample, R rows of a tile.

Bytes at C channels in a dtype of e bytes, a token: reads C·e, writes C + 4. Wan2.1-1.3B in
bfloat16, one chunk (4680 tokens, C = 1536), at the 4.3 TB/s an H200 copies: 5.0 us. Not measured on
a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch

CONVERTS = 89  # the first architecture with an instruction that rounds to e4m3


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _int8(x_RC):
    """Nearest integers for |x| ≤ 127: behind 1.5·2²³ a float32 has no bits for a fraction, and its
    last eight are those of the integer."""
    return (x_RC + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3(x_RC):
    """The bits of e4m3 for |x| ≤ 448, by integers."""
    bits_RC = x_RC.to(tl.int32, bitcast=True)
    size_RC = bits_RC & 0x7FFFFFFF
    # Three bits of the mantissa stay; the exponent's bias is 7 instead of 127.
    normal_RC = ((size_RC + 0x7FFFF + ((size_RC >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶, multiples of 2⁻⁹, which is the last bit of 2¹⁴.
    small_RC = (tl.abs(x_RC) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    size_RC = tl.where(size_RC < 0x3C800000, small_RC, normal_RC)
    return (size_RC | ((bits_RC >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    tokens,
    stride_xb,
    stride_xl,
    C: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    CONVERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip of a sample: every S-th tile of it. q_ptr: of bytes. CONVERTS: the processor has an
    instruction that rounds to e4m3."""
    strip, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    strips = tl.num_programs(0)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    largest_R1 = tl.full([BLOCK_ROWS, 1], LARGEST, tl.float32)
    for turn in tl.range(tl.cdiv(tokens, strips * BLOCK_ROWS), num_stages=STAGES):
        first = (turn * strips + strip) * BLOCK_ROWS
        token = first.to(tl.int64)
        mask_RC = (first + row_R1 < tokens) & (col_1C < C)
        # From a 64-bit offset on. Inside a tile 32 bits are enough, at half the registers.
        x_RC = x_ptr + (batch * stride_xb + token * stride_xl) + (row_R1 * stride_xl + col_1C)
        x_RC = tl.load(x_RC, mask_RC, 0.0).to(tl.float32)
        amax_R1 = tl.reduce(tl.abs(x_RC), 1, _larger)[:, None]
        # Rounded as PyTorch rounds; a / b alone is an approximation.
        scale_R1 = tl.div_rn(amax_R1, largest_R1)
        inverse_R1 = tl.div_rn(largest_R1, amax_R1)
        inverse_R1 = tl.where(inverse_R1 < float("inf"), inverse_R1, 0.0)
        # The bounds also keep product and rounding apart, which must not be one operation.
        x_RC = tl.minimum(tl.maximum(x_RC * inverse_R1, -LARGEST), LARGEST)
        if INTEGER:
            q_RC = _int8(x_RC)
        elif CONVERTS:
            q_RC = x_RC.to(tl.float8e4nv).to(tl.int8, bitcast=True)
        else:
            q_RC = _e4m3(x_RC)
        row = batch * tokens + token
        tl.store(q_ptr + row * C + (row_R1 * C + col_1C), q_RC, mask_RC)
        tl.store(scale_ptr + row + row_R1, scale_R1, first + row_R1 < tokens)


def quantize_rows(x_BLC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q, contiguous, and the scales of its rows."""
    batch, tokens, channels = x_BLC.shape
    q_BLC = torch.empty(x_BLC.shape, dtype=dtype, device=x_BLC.device)
    scale_BL = torch.empty(batch, tokens, dtype=torch.float32, device=x_BLC.device)
    setting = launch.rows("quantize_rows", x_BLC.device, channels)
    tiles = triton.cdiv(tokens, setting.rows)
    block = triton.next_power_of_2(channels)
    integer = dtype == torch.int8
    if not x_BLC.numel():
        return q_BLC, scale_BL
    launch.run(
        _quantize_rows_kernel,
        (launch.strips(setting, x_BLC.device, tiles, batch), batch),
        (x_BLC, q_BLC.view(torch.int8), scale_BL, tokens, *launch.outer_strides(x_BLC)),
        num_warps=setting.warps(block),
        C=channels,
        LARGEST=float(torch.iinfo(dtype).max if integer else torch.finfo(dtype).max),
        INTEGER=integer,
        # The interpreter does not round to the nearest.
        CONVERTS=x_BLC.device.type != "cpu" and launch.architecture(x_BLC.device) >= CONVERTS,
        BLOCK_ROWS=setting.rows,
        BLOCK_C=block,
        STAGES=setting.stages,
    )
    return q_BLC, scale_BL
