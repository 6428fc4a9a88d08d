"""RMSNorm of queries and keys with 3-D RoPE and the append to a ring, and its backward.

Shapes: B batch, L = F·N tokens, C channels of one of q, k and v in heads of D, N norms of a row,
S strips, R rows of a tile.

Bytes at C channels in a dtype of e bytes, a token: forward reads q, k and v and writes them (6eC).
Backward reads dq, dk, dv, q and k before the norm and writes their gradients (8eC). Wan2.1-1.3B in
bfloat16, one chunk (4680 tokens, C = 1536), at the 4.3 TB/s an H200 copies: 20.1 and 26.8 us. What
they take is in bench/results/kernels-h200.json; norms of heads, and three projections in place of
one, are not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.dispatch import contiguous_like
from sfkernels.gpu.partial_sums import empty_partials, sum_partials
from sfkernels.gpu.rope import load_rotation, rotate


@triton.jit
def _load_weight(weight_ptr, col_1C, C: tl.constexpr, NORM: tl.constexpr):
    return tl.load(weight_ptr + col_1C % NORM, col_1C < C, 0.0).to(tl.float32)


@triton.jit
def _sums(x_RC, C: tl.constexpr, NORM: tl.constexpr):
    """Sums over all channels, [R, 1], or over each NORM of them, [R, BLOCK_C / NORM]."""
    if C == NORM:
        return tl.sum(x_RC, 1)[:, None]
    else:
        return tl.sum(tl.reshape(x_RC, [x_RC.shape[0], x_RC.shape[1] // NORM, NORM]), 2)


@triton.jit
def _times(x_RC, y_RN):
    """Product of channels with one number for each row, or for each of N parts of it."""
    if y_RN.shape[1] == 1:
        return x_RC * y_RN
    else:
        R: tl.constexpr = x_RC.shape[0]
        x_RND = tl.reshape(x_RC, [R, y_RN.shape[1], x_RC.shape[1] // y_RN.shape[1]])
        return tl.reshape(x_RND * y_RN[:, :, None], x_RC.shape)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q_in_ptr,
    k_in_ptr,
    v_in_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rstd_ptr,
    tokens,
    frame_tokens,
    slots,
    eps,
    stride_table,
    stride_slot,
    stride_qib,
    stride_qil,
    stride_kib,
    stride_kil,
    stride_vib,
    stride_vil,
    stride_kb,
    stride_kl,
    stride_vb,
    stride_vl,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RING: tl.constexpr,
    ROTATE_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip of a sample: every S-th tile of it. Of a frame whose slot is not one of the ring's
    `slots`, keys and values are not written. NORM: channels that a norm is over, C or D; 0 without
    norms."""
    strip, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    strips = tl.num_programs(0)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    table_ptr += batch * stride_table
    if NORM:
        q_weight_1C = _load_weight(q_weight_ptr, col_1C, C, NORM)
        k_weight_1C = _load_weight(k_weight_ptr, col_1C, C, NORM)

    for turn in tl.range(tl.cdiv(tokens, strips * BLOCK_ROWS), num_stages=STAGES):
        first = ((turn * strips + strip) * BLOCK_ROWS).to(tl.int64)
        mask_RC = (first + row_R1 < tokens) & (col_1C < C)
        q_in = q_in_ptr + batch * stride_qib + first * stride_qil
        k_in = k_in_ptr + batch * stride_kib + first * stride_kil
        v_in = v_in_ptr + batch * stride_vib + first * stride_vil
        q_RC = tl.load(q_in + (row_R1 * stride_qil + col_1C), mask_RC, 0.0).to(tl.float32)
        k_RC = tl.load(k_in + (row_R1 * stride_kil + col_1C), mask_RC, 0.0).to(tl.float32)
        v_RC = tl.load(v_in + (row_R1 * stride_vil + col_1C), mask_RC, 0.0)
        cos_RH, sin_RH = load_rotation(table_ptr, first, row_R1, col_1C, mask_RC, D)
        if NORM:
            q_rstd_RN = tl.rsqrt(_sums(q_RC * q_RC, C, NORM) / NORM + eps)
            k_rstd_RN = tl.rsqrt(_sums(k_RC * k_RC, C, NORM) / NORM + eps)
            q_RC = _times(q_RC, q_rstd_RN) * q_weight_1C
            k_RC = _times(k_RC, k_rstd_RN) * k_weight_1C
        q_RC = rotate(q_RC, cos_RH, sin_RH)
        if ROTATE_K:
            k_RC = rotate(k_RC, cos_RH, sin_RH)

        q_at = q_ptr + (batch * tokens + first) * C + (row_R1 * C + col_1C)
        tl.store(q_at, q_RC.to(q_ptr.dtype.element_ty), mask_RC)
        to_R1 = first + row_R1
        if HAS_RING:
            slot_at = slot_ptr + batch * stride_slot + to_R1 // frame_tokens
            slot_R1 = tl.load(slot_at, to_R1 < tokens, 0).to(tl.int64)
            to_R1 = slot_R1 * frame_tokens + to_R1 % frame_tokens
            mask_RC = mask_RC & (slot_R1 >= 0) & (slot_R1 < slots)
        elif NORM:
            N: tl.constexpr = C // NORM
            norm_1N = tl.arange(0, q_rstd_RN.shape[1])[None, :]
            rstd_at = rstd_ptr + (batch * tokens + to_R1) * (2 * N) + norm_1N
            tl.store(rstd_at, q_rstd_RN, (to_R1 < tokens) & (norm_1N < N))
            tl.store(rstd_at + N, k_rstd_RN, (to_R1 < tokens) & (norm_1N < N))
        k_at = k_ptr + batch * stride_kb + to_R1 * stride_kl + col_1C
        tl.store(k_at, k_RC.to(k_ptr.dtype.element_ty), mask_RC)
        tl.store(v_ptr + batch * stride_vb + to_R1 * stride_vl + col_1C, v_RC, mask_RC)


@triton.jit
def _rope_norm_bwd_strip(
    dout_ptr,
    x_ptr,
    weight_ptr,
    table_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    tokens,
    stride_dl,
    stride_xl,
    stride_dxl,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The backward pass of q or k for every S-th tile of a sample, and its sum of dweight."""
    strip, strips = tl.program_id(0), tl.num_programs(0)
    row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
    col_1C = tl.arange(0, BLOCK_C)[None, :]
    if NORM:
        N: tl.constexpr = C // NORM
        BLOCK_N: tl.constexpr = 1 if C == NORM else BLOCK_C // NORM
        norm_1N = tl.arange(0, BLOCK_N)[None, :]
        weight_1C = _load_weight(weight_ptr, col_1C, C, NORM)
        dweight_1C = tl.zeros([1, BLOCK_C], tl.float32)
    for turn in tl.range(tl.cdiv(tokens, strips * BLOCK_ROWS), num_stages=STAGES):
        first = ((turn * strips + strip) * BLOCK_ROWS).to(tl.int64)
        mask_RC = (first + row_R1 < tokens) & (col_1C < C)
        dout_at = dout_ptr + first * stride_dl + (row_R1 * stride_dl + col_1C)
        dout_RC = tl.load(dout_at, mask_RC, 0.0).to(tl.float32)
        cos_RH, sin_RH = load_rotation(table_ptr, first, row_R1, col_1C, mask_RC, D)
        dx_RC = rotate(dout_RC, cos_RH, -sin_RH)  # the transposed rotation
        if NORM:
            x_at = x_ptr + first * stride_xl + (row_R1 * stride_xl + col_1C)
            x_RC = tl.load(x_at, mask_RC, 0.0).to(tl.float32)
            rstd_at = rstd_ptr + (first + row_R1) * (2 * N) + norm_1N
            rstd_RN = tl.load(rstd_at, (first + row_R1 < tokens) & (norm_1N < N), 0.0)
            x_RC = _times(x_RC, rstd_RN)
            dweight_1C += tl.sum(dx_RC * x_RC, 0)[None, :]
            dx_RC *= weight_1C
            dx_RC -= _times(x_RC, _sums(dx_RC * x_RC, C, NORM) / NORM)
            dx_RC = _times(dx_RC, rstd_RN)
        dx_at = dx_ptr + first * stride_dxl + (row_R1 * stride_dxl + col_1C)
        tl.store(dx_at, dx_RC.to(dx_ptr.dtype.element_ty), mask_RC)
    if NORM:
        tl.store(partial_ptr + col_1C, dweight_1C, col_1C < C)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_in_ptr,
    k_in_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    rstd_ptr,
    dq_in_ptr,
    dk_in_ptr,
    dv_in_ptr,
    partial_ptr,
    tokens,
    stride_table,
    stride_out,
    stride_dqb,
    stride_dql,
    stride_dkb,
    stride_dkl,
    stride_dvb,
    stride_dvl,
    stride_qib,
    stride_qil,
    stride_kib,
    stride_kil,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip of q, k or v of a sample. partial [2, S, B, C] takes the sums of dq_weight and
    dk_weight. stride_out: from one row of what is written to the next."""
    strip, batch, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    strips, batches = tl.num_programs(0), tl.num_programs(1)
    table_ptr += batch * stride_table
    out_at = batch * tokens * stride_out
    rstd_ptr += batch * tokens * (2 * C // NORM if NORM else 0)
    partial_ptr += (strip * batches + batch) * C
    if part == 0:
        _rope_norm_bwd_strip(dq_ptr + batch * stride_dqb, q_in_ptr + batch * stride_qib,
                             q_weight_ptr, table_ptr, rstd_ptr, dq_in_ptr + out_at, partial_ptr,
                             tokens, stride_dql, stride_qil, stride_out,
                             C, D, NORM, BLOCK_ROWS, BLOCK_C, STAGES)  # fmt: skip
    elif part == 1:
        _rope_norm_bwd_strip(dk_ptr + batch * stride_dkb, k_in_ptr + batch * stride_kib,
                             k_weight_ptr, table_ptr, rstd_ptr + (C // NORM if NORM else 0),
                             dk_in_ptr + out_at, partial_ptr + strips * batches * C,
                             tokens, stride_dkl, stride_kil, stride_out,
                             C, D, NORM, BLOCK_ROWS, BLOCK_C, STAGES)  # fmt: skip
    else:
        row_R1 = tl.arange(0, BLOCK_ROWS)[:, None]
        col_1C = tl.arange(0, BLOCK_C)[None, :]
        dv_ptr += batch * stride_dvb
        for turn in tl.range(tl.cdiv(tokens, strips * BLOCK_ROWS), num_stages=STAGES):
            first = ((turn * strips + strip) * BLOCK_ROWS).to(tl.int64)
            mask_RC = (first + row_R1 < tokens) & (col_1C < C)
            dv_at = dv_ptr + first * stride_dvl + (row_R1 * stride_dvl + col_1C)
            to_at = dv_in_ptr + out_at + first * stride_out + (row_R1 * stride_out + col_1C)
            tl.store(to_at, tl.load(dv_at, mask_RC, 0.0), mask_RC)


def qk_norm_rope_fwd(
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor | None,
    v_ring_BSHD: Tensor | None,
    slot_F: Tensor | None,
    eps: float,
    rotate_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q [B, L, H, D]; k, v: new tensors like it, or the rings they were written into; and without
    a ring 1/σ of each norm of q and k for the backward pass, [B, L, 2·norms] float32."""
    three, norm = _parts(qkv_BLC, k_BLC, v_BLC), _norm(q_weight_C)
    batch, tokens, channels = three[0].shape
    head_dim = 2 * table_LP2.shape[-2]
    if 0 < norm < channels and norm & (norm - 1):
        raise ValueError(
            f"norms of heads of {norm} channels: impl='triton' takes a power of two; use "
            "impl='reference'"
        )
    q_BLHD = qkv_BLC.new_empty(batch, tokens, channels // head_dim, head_dim)
    k_BSHD = torch.empty_like(q_BLHD) if k_ring_BSHD is None else k_ring_BSHD
    v_BSHD = torch.empty_like(q_BLHD) if v_ring_BSHD is None else v_ring_BSHD
    rstd_BLN, frame_tokens, slots = None, 1, 0
    if slot_F is None:
        norms = channels // norm if norm else 0
        rstd_BLN = qkv_BLC.new_empty(batch, tokens, 2 * norms, dtype=torch.float32)
    else:
        slot_F, frame_tokens = slot_F.contiguous(), tokens // slot_F.shape[-1]
        slots = k_BSHD.shape[1] // frame_tokens
    block = triton.next_power_of_2(channels)
    setting = launch.rows("qk_norm_rope_fwd", qkv_BLC.device, channels)
    tiles = triton.cdiv(tokens, setting.rows)
    launch.run(
        _qk_norm_rope_fwd_kernel,
        (launch.strips(setting, qkv_BLC.device, tiles, batch), batch),
        (
            *(*three, q_weight_C, k_weight_C, table_LP2, slot_F, q_BLHD, k_BSHD, v_BSHD),
            *(rstd_BLN, tokens, frame_tokens, slots, eps),
            *(launch.of_sample(table_LP2, 4), launch.of_sample(slot_F, 2)),
            *launch.outer_strides(*three, k_BSHD, v_BSHD),
        ),
        num_warps=setting.warps(block),
        C=channels,
        D=head_dim,
        NORM=norm,
        HAS_RING=slot_F is not None,
        ROTATE_K=rotate_k,
        BLOCK_ROWS=setting.rows,
        BLOCK_C=block,
        STAGES=setting.stages,
    )
    return q_BLHD, k_BSHD, v_BSHD, rstd_BLN


def _parts(qkv_BLC: Tensor, k_BLC: Tensor | None, v_BLC: Tensor | None) -> Sequence[Tensor]:
    """q, k and v, as they are or as views of the fused projection."""
    if k_BLC is None or v_BLC is None:
        return qkv_BLC.chunk(3, dim=-1)
    return qkv_BLC, k_BLC, v_BLC


def _norm(weight_C: Tensor | None) -> int:
    """Number of channels that a norm is over; 0 without norms."""
    return 0 if weight_C is None else weight_C.shape[0]


def qk_norm_rope_bwd(
    dq_BLHD: Tensor,
    dk_BLHD: Tensor,
    dv_BLHD: Tensor,
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    rstd_BLN: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of qkv to k_weight, None for what is."""
    q_in, k_in, _ = _parts(qkv_BLC, k_BLC, v_BLC)
    norm = _norm(q_weight_C)
    batch, tokens, channels = q_in.shape
    inputs = qkv_BLC, k_BLC, v_BLC
    dqkv, dk, dv = (t if t is None else contiguous_like(t) for t in inputs)
    assert dqkv is not None
    outs = _parts(dqkv, dk, dv)
    block = triton.next_power_of_2(channels)
    setting = launch.rows("qk_norm_rope_bwd", qkv_BLC.device, channels)
    tiles = triton.cdiv(tokens, setting.rows)
    strips = launch.strips(setting, qkv_BLC.device, tiles, 3 * batch)
    partial_2SB1C = empty_partials(2, strips, batch, 1, channels if norm else 0, qkv_BLC.device)
    launch.run(
        _qk_norm_rope_bwd_kernel,
        (strips, batch, 3),
        (
            *(dq_BLHD, dk_BLHD, dv_BLHD, q_in, k_in, q_weight_C, k_weight_C, table_LP2, rstd_BLN),
            *(*outs, partial_2SB1C, tokens, launch.of_sample(table_LP2, 4), outs[0].stride(1)),
            *launch.outer_strides(dq_BLHD, dk_BLHD, dv_BLHD, q_in, k_in),
        ),
        num_warps=setting.warps(block),
        C=channels,
        D=2 * table_LP2.shape[-2],
        NORM=norm,
        BLOCK_ROWS=setting.rows,
        BLOCK_C=block,
        STAGES=setting.stages,
    )
    if q_weight_C is None or k_weight_C is None:
        return dqkv, dk, dv, None, None
    # Of a norm of each head every head adds to the gradient, as every strip does.
    partial = partial_2SB1C.view(2, -1, batch if norm == channels else 1, 1, norm)
    dq_weight_C, dk_weight_C = sum_partials(partial, (q_weight_C, k_weight_C))
    return dqkv, dk, dv, dq_weight_C, dk_weight_C
