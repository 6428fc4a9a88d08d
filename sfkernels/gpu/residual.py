"""The gated residual on its own, and its backward.

Shapes: B batch, L = F·N tokens, F frames of N tokens each, C channels, S strips of a frame, R rows
of a tile.

Bytes at C channels in a dtype of e bytes, a token: forward reads x and y and writes one row (3eC);
backward reads dout and y and writes dy (3eC). Wan2.1-1.3B in bfloat16, one chunk (4680 tokens,
C = 1536), at the 4.3 TB/s an H200 copies: 10.0 us each. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.norm import load_modulation, load_rows
from sfkernels.gpu.partial_sums import empty_partials, sum_partials


@triton.jit
def _gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    partial_ptr,
    frame_tokens,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gb,
    stride_gf,
    C: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One strip of a frame: every S-th tile of it. BACKWARD: x is dout, out is dy, and partial
    [S, B, F, C] takes the sums of dgate."""
    strip, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    strips, frames = tl.num_programs(0), tl.num_programs(1)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    gate_1C = load_modulation(gate_ptr, batch, frame, stride_gb, stride_gf, col_1C, C)
    dgate_1C = tl.zeros([1, BLOCK_C], tl.float32)
    for turn in range(tl.cdiv(frame_tokens, strips * BLOCK_ROWS)):
        first = (turn * strips + strip) * BLOCK_ROWS
        token = (frame * frame_tokens + first).to(tl.int64)
        mask_RC = (first + row_R1 < frame_tokens) & (col_1C < C)
        x_at = batch * stride_xb + token * stride_xl
        y_at = batch * stride_yb + token * stride_yl
        x_RC = load_rows(x_ptr, x_at, stride_xl, row_R1, col_1C, mask_RC)
        y_RC = load_rows(y_ptr, y_at, stride_yl, row_R1, col_1C, mask_RC)
        if BACKWARD:
            dgate_1C += tl.sum(x_RC * y_RC, 0)[None, :]
            out_RC = x_RC * gate_1C
        else:
            out_RC = x_RC + y_RC * gate_1C
        at_RC = (batch * frames * frame_tokens + token) * C + (row_R1 * C + col_1C)
        tl.store(out_ptr + at_RC, out_RC.to(out_ptr.dtype.element_ty), mask_RC)
    if BACKWARD:
        batches = tl.num_programs(2)
        tl.store(partial_ptr + ((strip * batches + batch) * frames + frame) * C + col_1C, dgate_1C,
                 col_1C < C)  # fmt: skip


def gated_residual_fwd(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor) -> Tensor:
    """x + gate·y [B, L, C]."""
    return _launch(x_BLC, y_BLC, gate_BFC, backward=False)[0]


def gated_residual_bwd(dout_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor) -> tuple[Tensor, Tensor]:
    """dy [B, L, C] and dgate, as gate."""
    dy_BLC, partial_1SBFC = _launch(dout_BLC, y_BLC, gate_BFC, backward=True)
    assert partial_1SBFC is not None
    return dy_BLC, sum_partials(partial_1SBFC, [gate_BFC])[0]


def _launch(
    x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor, backward: bool
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, channels = x_BLC.shape
    frames, block = gate_BFC.shape[1], triton.next_power_of_2(channels)
    setting = launch.rows("residual_norm_bwd" if backward else "adaln_fwd", x_BLC.device, channels)
    tiles = triton.cdiv(tokens // frames, setting.rows)
    strips = launch.strips(setting, x_BLC.device, tiles, frames * batch)
    out_BLC = torch.empty_like(x_BLC, memory_format=torch.contiguous_format)
    partial = None
    if backward:
        partial = empty_partials(1, strips, batch, frames, channels, x_BLC.device)
    launch.run(
        _gated_residual_kernel,
        (strips, frames, batch),
        (
            *(x_BLC, y_BLC, gate_BFC, out_BLC, partial, tokens // frames),
            *launch.outer_strides(x_BLC, y_BLC, gate_BFC),
        ),
        num_warps=setting.warps(block),
        C=channels,
        BACKWARD=backward,
        BLOCK_ROWS=setting.rows,
        BLOCK_C=block,
    )
    return out_BLC, partial
