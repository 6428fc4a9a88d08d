"""Norms of a DiT block and of a VAE as two kernels: [residual,] norm, modulation [, SiLU], and
their backward.

Shapes: B batch, L = F·N tokens, F frames of N tokens each, C channels, S strips of a frame,
R rows of a tile.

Bytes at C channels in a dtype of e bytes, a token: norm reads 1 and writes 1 row (2eC); with the
residual it reads x, y and writes x', out (4eC). Backward: reads dout, x and writes dx (3eC); with
the residual reads dout, dx', x', y and writes dx, dy (6eC). A row's statistics add 8 bytes, the
modulations are read once a strip and come from L2. Wan2.1-1.3B in bfloat16, one chunk (4680 tokens,
C = 1536), at the 4.3 TB/s an H200 copies: 6.7, 13.4, 10.0 and 20.1 us. What they take is in
bench/results/kernels-h200.json.

SiLU follows the RMSNorm of a VAE, whose rows are short (96 to 384 channels). A chunk at the full
resolution of Wan2.1's (12 frames of 480×832, C = 96, bfloat16) is 0.92 GB, which takes 0.43 ms to
read and write, 0.86 ms with a residual. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.partial_sums import empty_partials, sum_partials


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def load_rows(ptr, offset, stride, row_R1, col_1C, mask_RC):
    """Rows from a 64-bit offset on. Inside a tile 32 bits are enough, at half the registers."""
    return tl.load(ptr + offset + (row_R1 * stride + col_1C), mask_RC, 0.0).to(tl.float32)


@triton.jit
def load_modulation(ptr, batch, frame, stride_b, stride_f, col_1C, C: tl.constexpr):
    at = ptr + batch * stride_b + frame * stride_f
    return tl.load(at + col_1C, col_1C < C, 0.0).to(tl.float32)


@triton.jit
def _norm_fwd_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    stats_ptr,
    frame_tokens,
    eps,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gb,
    stride_gf,
    stride_cb,
    stride_cf,
    stride_hb,
    stride_hf,
    stride_ob,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip of a frame: every S-th tile of it."""
    strip, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    strips, frames = tl.num_programs(0), tl.num_programs(1)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    scale_1C = load_modulation(scale_ptr, batch, frame, stride_cb, stride_cf, col_1C, C)
    if PLUS_ONE:
        scale_1C += 1.0
    if HAS_SHIFT:
        shift_1C = load_modulation(shift_ptr, batch, frame, stride_hb, stride_hf, col_1C, C)
    if HAS_GATE:
        gate_1C = load_modulation(gate_ptr, batch, frame, stride_gb, stride_gf, col_1C, C)
    if HAS_BIAS:
        bias_1C = tl.load(bias_ptr + col_1C, col_1C < C, 0.0).to(tl.float32)

    for turn in tl.range(tl.cdiv(frame_tokens, strips * BLOCK_ROWS), num_stages=STAGES):
        first = (turn * strips + strip) * BLOCK_ROWS
        token = (frame * frame_tokens + first).to(tl.int64)
        mask_RC = (first + row_R1 < frame_tokens) & (col_1C < C)
        x_at = batch * stride_xb + token * stride_xl
        x_RC = load_rows(x_ptr, x_at, stride_xl, row_R1, col_1C, mask_RC)
        if HAS_BIAS:
            x_RC = tl.where(mask_RC, x_RC + bias_1C, 0.0)
        if HAS_RESIDUAL:
            residual_RC = (batch * frames * frame_tokens + token) * C + (row_R1 * C + col_1C)
            y_at = batch * stride_yb + token * stride_yl
            y_RC = load_rows(y_ptr, y_at, stride_yl, row_R1, col_1C, mask_RC)
            if HAS_GATE:
                y_RC *= gate_1C
            # The norm is that of the residual stream as stored, as it is in the backward pass.
            rounded_RC = (x_RC + y_RC).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + residual_RC, rounded_RC, mask_RC)
            x_RC = rounded_RC.to(tl.float32)
        row_at = stats_ptr + (batch * frames * frame_tokens + token + row_R1) * 2
        mean_R1 = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        if CENTRED:
            mean_R1 += (tl.sum(x_RC, 1) / C)[:, None]
            x_RC = tl.where(mask_RC, x_RC - mean_R1, 0.0)
        rstd_R1 = tl.rsqrt(tl.sum(x_RC * x_RC, 1) / C + eps)[:, None]
        tl.store(row_at, mean_R1, first + row_R1 < frame_tokens)
        tl.store(row_at + 1, rstd_R1, first + row_R1 < frame_tokens)
        normed_RC = x_RC * rstd_R1 * scale_1C
        if HAS_SHIFT:
            normed_RC += shift_1C
        if SILU:
            normed_RC *= tl.sigmoid(normed_RC)
        out_RC = batch * stride_ob + token * C + (row_R1 * C + col_1C)
        tl.store(out_ptr + out_RC, normed_RC.to(out_ptr.dtype.element_ty), mask_RC)


@triton.jit
def _norm_bwd_kernel(
    dresidual_ptr,
    dout_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    stats_ptr,
    dx_ptr,
    dy_ptr,
    partial_ptr,
    frame_tokens,
    stride_rb,
    stride_rl,
    stride_db,
    stride_dl,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gb,
    stride_gf,
    stride_cb,
    stride_cf,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip of a frame: every S-th tile of it. partial [K, S, B, F, C] takes the strip's sums
    of dscale, and of dshift and dgate where there are such. KEEP: modulations stay in registers;
    else each tile reads them anew, from L1."""
    strip, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    strips, frames, batches = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    dscale_1C = tl.zeros([1, BLOCK_C], tl.float32)
    dshift_1C = tl.zeros([1, BLOCK_C], tl.float32)
    dgate_1C = tl.zeros([1, BLOCK_C], tl.float32)
    if KEEP:
        scale_1C = load_modulation(scale_ptr, batch, frame, stride_cb, stride_cf, col_1C, C)
        if HAS_GATE:
            gate_1C = load_modulation(gate_ptr, batch, frame, stride_gb, stride_gf, col_1C, C)

    for turn in tl.range(tl.cdiv(frame_tokens, strips * BLOCK_ROWS), num_stages=STAGES):
        first = (turn * strips + strip) * BLOCK_ROWS
        token = (frame * frame_tokens + first).to(tl.int64)
        mask_RC = (first + row_R1 < frame_tokens) & (col_1C < C)
        out_RC = (batch * frames * frame_tokens + token) * C + (row_R1 * C + col_1C)
        x_at = batch * stride_xb + token * stride_xl
        x_RC = load_rows(x_ptr, x_at, stride_xl, row_R1, col_1C, mask_RC)
        dout_at = batch * stride_db + token * stride_dl
        dout_RC = load_rows(dout_ptr, dout_at, stride_dl, row_R1, col_1C, mask_RC)
        if HAS_RESIDUAL:
            dresidual_at = batch * stride_rb + token * stride_rl
            dresidual_RC = load_rows(
                dresidual_ptr, dresidual_at, stride_rl, row_R1, col_1C, mask_RC
            )
            if HAS_GATE:
                y_at = batch * stride_yb + token * stride_yl
                y_RC = load_rows(y_ptr, y_at, stride_yl, row_R1, col_1C, mask_RC)

        row_at = stats_ptr + (batch * frames * frame_tokens + token + row_R1) * 2
        rstd_R1 = tl.load(row_at + 1, first + row_R1 < frame_tokens, 0.0)
        if CENTRED:
            x_RC -= tl.load(row_at, first + row_R1 < frame_tokens, 0.0)
        normed_RC = tl.where(mask_RC, x_RC * rstd_R1, 0.0)
        if not KEEP:
            scale_1C = load_modulation(scale_ptr, batch, frame, stride_cb, stride_cf, col_1C, C)
        if SILU:
            into_RC = normed_RC * scale_1C
            sigmoid_RC = tl.sigmoid(into_RC)
            dout_RC *= sigmoid_RC * (1.0 + into_RC * (1.0 - sigmoid_RC))
        dscale_1C += tl.sum(dout_RC * normed_RC, 0)[None, :]
        if HAS_SHIFT:
            dshift_1C += tl.sum(dout_RC, 0)[None, :]
        dnormed_RC = dout_RC * (1.0 + scale_1C if PLUS_ONE else scale_1C)
        if CENTRED:
            along_R, mean_R = tl.reduce((dnormed_RC * normed_RC, dnormed_RC), 1, _add_both)
            dx_RC = dnormed_RC - normed_RC * (along_R / C)[:, None] - (mean_R / C)[:, None]
        else:
            along_R = tl.sum(dnormed_RC * normed_RC, 1)
            dx_RC = dnormed_RC - normed_RC * (along_R / C)[:, None]
        dx_RC *= rstd_R1
        if HAS_RESIDUAL:
            dx_RC += dresidual_RC
            if HAS_GATE:
                if not KEEP:
                    gate_1C = load_modulation(
                        gate_ptr, batch, frame, stride_gb, stride_gf, col_1C, C
                    )
                dgate_1C += tl.sum(dx_RC * y_RC, 0)[None, :]
                dy_RC = dx_RC * gate_1C
                tl.store(dy_ptr + out_RC, dy_RC.to(dy_ptr.dtype.element_ty), mask_RC)
        tl.store(dx_ptr + out_RC, dx_RC.to(dx_ptr.dtype.element_ty), mask_RC)

    sums = batches * frames * C
    partial_at = partial_ptr + ((strip * batches + batch) * frames + frame) * C + col_1C
    tl.store(partial_at, dscale_1C, col_1C < C)
    if HAS_SHIFT:
        partial_at += strips * sums
        tl.store(partial_at, dshift_1C, col_1C < C)
    if HAS_GATE:
        tl.store(partial_at + strips * sums, dgate_1C, col_1C < C)


def norm_fwd(
    x_BLC: Tensor,
    y_BLC: Tensor | None,
    gate_BFC: Tensor | None,
    scale_BFC: Tensor,
    shift_BFC: Tensor | None,
    eps: float,
    centred: bool,
    plus_one: bool,
    silu: bool = False,
    bias_C: Tensor | None = None,
    before_BPC: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x' = x + gate·y (None without y), out = norm(x')·(plus_one + scale) + shift, and what the
    backward pass needs of each row, [B, L, 2] float32: its mean (0 if not centred) and 1/σ. silu:
    out is SiLU of that. bias: is added to x. before [B, P, C]: is copied in front of out, which is
    [B, P + L, C] then."""
    grid, constants = _plan(
        "fwd", y_BLC is not None, x_BLC, gate_BFC, scale_BFC, shift_BFC, centred, plus_one, silu
    )
    batch, tokens, channels = x_BLC.shape
    rows = 0 if before_BPC is None else before_BPC.shape[1]
    all_BLC = x_BLC.new_empty(batch, rows + tokens, channels)
    out_BLC = all_BLC[:, rows:]
    if before_BPC is not None:
        all_BLC[:, :rows] = before_BPC
    residual_BLC = None if y_BLC is None else x_BLC.new_empty(x_BLC.shape)
    stats_BL2 = torch.empty(batch, tokens, 2, dtype=torch.float32, device=x_BLC.device)
    launch.run(
        _norm_fwd_kernel,
        grid,
        (
            *(x_BLC, y_BLC, bias_C, gate_BFC, scale_BFC, shift_BFC, residual_BLC, out_BLC),
            *(stats_BL2, tokens // grid[1], eps),
            *launch.outer_strides(x_BLC, y_BLC, gate_BFC, scale_BFC, shift_BFC),
            all_BLC.stride(0),
        ),
        **constants,
        HAS_BIAS=bias_C is not None,
    )
    return residual_BLC, all_BLC, stats_BL2


def norm_bwd(
    dresidual_BLC: Tensor | None,
    dout_BLC: Tensor,
    x_BLC: Tensor,
    y_BLC: Tensor | None,
    gate_BFC: Tensor | None,
    scale_BFC: Tensor,
    shift_BFC: Tensor | None,
    stats_BL2: Tensor,
    centred: bool,
    plus_one: bool,
    silu: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """dx, dy, dgate, dscale, dshift; x is the x' of the forward pass where that had a residual.
    Without a gate dy is dx, and None is returned for it."""
    residual = dresidual_BLC is not None
    grid, constants = _plan(
        "bwd", residual, x_BLC, gate_BFC, scale_BFC, shift_BFC, centred, plus_one, silu
    )
    strips, frames, batch = grid
    dx_BLC = torch.empty_like(x_BLC, memory_format=torch.contiguous_format)
    dy_BLC = None if gate_BFC is None else torch.empty_like(dx_BLC)
    modulations = [m for m in (scale_BFC, shift_BFC, gate_BFC) if m is not None]
    partial_KSBFC = empty_partials(
        len(modulations), strips, batch, frames, x_BLC.shape[2], x_BLC.device
    )
    launch.run(
        _norm_bwd_kernel,
        grid,
        (
            *(dresidual_BLC, dout_BLC, x_BLC, y_BLC, gate_BFC, scale_BFC, stats_BL2),
            *(dx_BLC, dy_BLC, partial_KSBFC, x_BLC.shape[1] // frames),
            *launch.outer_strides(dresidual_BLC, dout_BLC, x_BLC, y_BLC, gate_BFC, scale_BFC),
        ),
        **constants,
        KEEP=constants["STAGES"] > 1,
    )
    dscale_BFC, *others = sum_partials(partial_KSBFC, modulations)
    dshift_BFC = others.pop(0) if shift_BFC is not None else None
    dgate_BFC = others.pop(0) if gate_BFC is not None else None
    return dx_BLC, dy_BLC, dgate_BFC, dscale_BFC, dshift_BFC


def _plan(
    way: str,
    residual: bool,
    x_BLC: Tensor,
    gate_BFC: Tensor | None,
    scale_BFC: Tensor,
    shift_BFC: Tensor | None,
    centred: bool,
    plus_one: bool,
    silu: bool,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid, (strips, frames, batch), and the constants of both kernels. Forms that move
    different numbers of bytes have settings of their own."""
    batch, tokens, channels = x_BLC.shape
    frames = max(m.shape[1] for m in (gate_BFC, scale_BFC, shift_BFC) if m is not None)
    form = "residual_norm" if residual else "adaln" if plus_one else "norm"
    form = "norm_silu" if silu else form
    setting = launch.rows(f"{form}_{way}", x_BLC.device, channels)
    tiles = triton.cdiv(tokens // frames, setting.rows)
    strips = launch.strips(setting, x_BLC.device, tiles, frames * batch)
    block = triton.next_power_of_2(channels)
    return (strips, frames, batch), {
        "num_warps": setting.warps(block),
        "C": channels,
        "HAS_RESIDUAL": residual,
        "HAS_GATE": gate_BFC is not None,
        "HAS_SHIFT": shift_BFC is not None,
        "CENTRED": centred,
        "PLUS_ONE": plus_one,
        "SILU": silu,
        "BLOCK_ROWS": setting.rows,
        "BLOCK_C": block,
        "STAGES": setting.stages,
    }
