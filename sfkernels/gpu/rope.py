"""The table of 3-D RoPE, and the rotation of keys by one.

Shapes: L = F·N tokens, S slots, C channels in heads of D, P = D/2 rotated pairs of a head, H = C/2
of all heads, R rows of a tile.

The table, 8P bytes a token, is written once a pass and read from L2 by all layers: one chunk of
Wan2.1-1.3B (4680 tokens, P = 64) takes 0.6 us at the 4.3 TB/s an H200 copies.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.dispatch import cached_tensors


@triton.jit
def _pairs(x_RC):
    """Even and odd channels, [R, C/2] each."""
    return tl.split(tl.reshape(x_RC, [x_RC.shape[0], x_RC.shape[1] // 2, 2]))


@triton.jit
def _from_pairs(even_RH, odd_RH):
    return tl.reshape(tl.join(even_RH, odd_RH), [even_RH.shape[0], 2 * even_RH.shape[1]])


@triton.jit
def _rope_table_kernel(
    frame_ptr,
    turns_ptr,
    table_ptr,
    tokens,
    height,
    width,
    P: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Angles in fixed point: position · turns is exact modulo one turn (2^64) at any position."""
    row_R1 = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    pair_1P = tl.arange(0, BLOCK_P)[None, :]
    frame_R1 = tl.load(frame_ptr + row_R1 // (height * width), row_R1 < tokens, 0).to(tl.int64)
    across_RP = tl.where(pair_1P < P - ACROSS, row_R1 // width % height, row_R1 % width)
    position_RP = tl.where(pair_1P < P - 2 * ACROSS, frame_R1, across_RP.to(tl.int64))
    phase_RP = position_RP * tl.load(turns_ptr + pair_1P, pair_1P < P, 0)

    # The nearest quarter turn, and what is left of it, in ±1/8 turn.
    quarter_RP = (phase_RP + (1 << 61)) >> 62
    angle_RP = (phase_RP - (quarter_RP << 62)).to(tl.float32) * 3.4061215800865545e-19  # 2π / 2^64
    # Polynomials (Cephes) good to an ulp in ±π/4: the library's functions go through float64 to
    # reduce angles that cannot occur here.
    square_RP = angle_RP * angle_RP
    sin_RP = -1.9515295891e-4 * square_RP + 8.3321608736e-3
    sin_RP = (sin_RP * square_RP - 1.6666654611e-1) * square_RP * angle_RP + angle_RP
    cos_RP = 2.443315711809948e-5 * square_RP - 1.388731625493765e-3
    cos_RP = (cos_RP * square_RP + 4.166664568298827e-2) * square_RP * square_RP
    cos_RP = cos_RP - 0.5 * square_RP + 1.0
    odd_RP = (quarter_RP & 1) != 0
    cos_RP, sin_RP = tl.where(odd_RP, -sin_RP, cos_RP), tl.where(odd_RP, cos_RP, sin_RP)
    half_RP = (quarter_RP & 2) != 0
    cos_RP, sin_RP = tl.where(half_RP, -cos_RP, cos_RP), tl.where(half_RP, -sin_RP, sin_RP)
    col_1C = tl.arange(0, 2 * BLOCK_P)[None, :]
    at_RC = table_ptr + row_R1.to(tl.int64) * 2 * P + col_1C
    tl.store(at_RC, _from_pairs(cos_RP, sin_RP), (row_R1 < tokens) & (col_1C < 2 * P))


@triton.jit
def rotate(x_RC, cos_RH, sin_RH):
    even_RH, odd_RH = _pairs(x_RC)
    return _from_pairs(even_RH * cos_RH - odd_RH * sin_RH, even_RH * sin_RH + odd_RH * cos_RH)


@triton.jit
def load_rotation(table_ptr, first, row_R1, col_1C, mask_RC, D: tl.constexpr):
    """Cosines and sines of some tokens, [R, C/2] each: every head rotates alike, so that the
    table's row repeats along the channels."""
    at = table_ptr + first.to(tl.int64) * D + (row_R1 * D + col_1C % D)
    return _pairs(tl.load(at, mask_RC, 0.0).to(tl.float32))


@triton.jit
def _rotate_keys_kernel(
    k_ptr,
    table_ptr,
    valid_ptr,
    out_ptr,
    slots,
    stride_table,
    stride_valid,
    stride_kb,
    stride_kl,
    stride_ob,
    stride_ol,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of slots of a sample, as far as they are valid and there."""
    first, batch = tl.program_id(0).to(tl.int64) * BLOCK_ROWS, tl.program_id(1).to(tl.int64)
    row_R1, col_1C = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    valid = tl.load(valid_ptr + batch * stride_valid)
    mask_RC = (first + row_R1 < tl.minimum(valid, slots)) & (col_1C < C)
    table_ptr += batch * stride_table
    k_at = k_ptr + batch * stride_kb + first * stride_kl + (row_R1 * stride_kl + col_1C)
    k_RC = tl.load(k_at, mask_RC, 0.0).to(tl.float32)
    cos_RH, sin_RH = load_rotation(table_ptr, first, row_R1, col_1C, mask_RC, D)
    out_at = out_ptr + batch * stride_ob + first * stride_ol + (row_R1 * stride_ol + col_1C)
    tl.store(out_at, rotate(k_RC, cos_RH, sin_RH).to(out_ptr.dtype.element_ty), mask_RC)


def rope_table(frame_F: Tensor, grid: tuple[int, int], head_dim: int, theta: float) -> Tensor:
    """Cosine and sine, [F·height·width, P, 2] float32."""
    height, width = grid
    tokens, pairs = len(frame_F) * height * width, head_dim // 2
    table_LP2 = torch.empty(tokens, pairs, 2, dtype=torch.float32, device=frame_F.device)
    block = triton.next_power_of_2(pairs)
    setting = launch.rows("rope_table", frame_F.device, pairs)
    launch.run(
        _rope_table_kernel,
        (triton.cdiv(tokens, setting.rows),),
        (
            frame_F.contiguous(),
            _turns(pairs, theta, frame_F.device),
            table_LP2,
            tokens,
            height,
            width,
        ),
        num_warps=setting.warps(block),
        P=pairs,
        ACROSS=pairs // 3,
        BLOCK_ROWS=setting.rows,
        BLOCK_P=block,
    )
    return table_LP2


@cached_tensors
def _turns(pairs: int, theta: float, device: torch.device) -> Tensor:
    """Turn of each pair from one position to the next, in units of 2^-64 turn, [P] int64."""
    across = pairs // 3
    counts = [pairs - 2 * across] + [across] * 2
    turns = [math.fmod(theta ** (-i / n) / (2 * math.pi), 1) for n in counts for i in range(n)]
    units = [int(t * 2**64) - (2**64 if t >= 0.5 else 0) for t in turns]
    return torch.tensor(units, dtype=torch.int64, device=device)


def rotate_keys(
    k_BSHD: Tensor, table_SP2: Tensor, valid: Tensor, out_BSHD: Tensor | None = None
) -> Tensor:
    """The first `valid` keys rotated, in the first slots of `out` or in a new tensor [B, S, H, D];
    its other slots are not written. For attention over a ring of unrotated keys: every tile of
    queries reads every key. Rotating them once, before, costs 201 MB for a full window of
    Wan2.1-1.3B, 47 us at 4.3 TB/s: 4% of the time that a chunk's attention takes."""
    batch, slots, heads, head_dim = k_BSHD.shape
    if out_BSHD is None:
        out_BSHD = torch.empty_like(k_BSHD, memory_format=torch.contiguous_format)
    channels = heads * head_dim
    setting = launch.rows("qk_norm_rope_fwd", k_BSHD.device, channels)
    block = triton.next_power_of_2(channels)
    launch.run(
        _rotate_keys_kernel,
        (triton.cdiv(slots, setting.rows), batch),
        (
            *(k_BSHD, table_SP2, valid, out_BSHD, slots, launch.of_sample(table_SP2, 4)),
            *(launch.of_sample(valid, 1), *launch.outer_strides(k_BSHD, out_BSHD)),
        ),
        num_warps=setting.warps(block),
        C=channels,
        D=head_dim,
        BLOCK_ROWS=setting.rows,
        BLOCK_C=block,
    )
    return out_BSHD
