"""The backward pass of attention.py in plain Triton: dq from one kernel, dk and dv from another.

Shapes as there. Ten operations for each pair of a query and a key that meet, channel and head are
needed (five products) and 14 are done: queries and keys each recompute the probabilities, so that
no sum is atomic and gradients are the same in every run. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.attention import (
    FLAT_ROWS,
    LOG2E,
    block_d,
    by_row,
    dot,
    head_strides,
    load_tile,
    store_tile,
    tile_setting,
)
from sfkernels.gpu.tiles import Pattern, column_table, tile_table
from sfkernels.layout import Span


@triton.jit(do_not_specialize=["queries", "heads"])
def _row_delta_kernel(
    do_ptr,
    o_ptr,
    delta_ptr,
    queries,
    heads,
    stride_dob,
    stride_dol,
    stride_doh,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ do·o over the head dim, for some queries of one head: [B, H, L]."""
    batch_head, start = tl.program_id(1), tl.program_id(0) * BLOCK_M
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    do_ptr += batch * stride_dob + head * stride_doh
    o_ptr += (batch * queries * heads + head) * D
    do_MD = load_tile(do_ptr, start, queries, stride_dol, True, BLOCK_M, D, BLOCK_D)
    o_MD = load_tile(o_ptr, start, queries, heads * D, True, BLOCK_M, D, BLOCK_D)
    row_M = start + tl.arange(0, BLOCK_M)
    delta_M = tl.sum(do_MD.to(tl.float32) * o_MD.to(tl.float32), 1)
    tl.store(delta_ptr + batch_head.to(tl.int64) * queries + row_M, delta_M, row_M < queries)


@triton.jit
def _dq_of_keys(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, row, hi, stride_kl, stride_vl,
                scale, MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    BLOCK_D: tl.constexpr = q_MD.shape[1]
    k_ND = load_tile(k_ptr, row, hi, stride_kl, MASK, BLOCK_N, D, BLOCK_D)
    v_ND = load_tile(v_ptr, row, hi, stride_vl, MASK, BLOCK_N, D, BLOCK_D)
    s_MN = dot(q_MD, k_ND.T)
    dp_MN = dot(do_MD, v_ND.T)
    p_MN = tl.exp2(s_MN * scale - lse_M[:, None])
    if MASK:  # what is no key must not overflow
        p_MN = tl.where(row + tl.arange(0, BLOCK_N)[None, :] < hi, p_MN, 0.0)
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    return dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD)


@triton.jit
def _dq_of_span(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, lo, hi, stride_kl, stride_vl,
                scale, D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    whole = (hi - lo) // BLOCK_N
    for i in tl.range(0, whole, num_stages=STAGES):
        dq_MD = _dq_of_keys(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, lo + i * BLOCK_N, hi,
                            stride_kl, stride_vl, scale, False, D, BLOCK_N)  # fmt: skip
    if lo + whole * BLOCK_N < hi:
        dq_MD = _dq_of_keys(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, lo + whole * BLOCK_N,
                            hi, stride_kl, stride_vl, scale, True, D, BLOCK_N)  # fmt: skip
    return dq_MD


@triton.jit(do_not_specialize=["queries", "heads", "prefix"])
def _attention_dq_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_prefix_ptr,
    v_prefix_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    spans_ptr,
    queries,
    heads,
    prefix,
    scale,
    log2_scale,
    stride_dob,
    stride_dol,
    stride_doh,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_kpb,
    stride_kpl,
    stride_kph,
    stride_vpb,
    stride_vpl,
    stride_vph,
    D: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of one head: dq [B, L, H, D]."""
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    start, past = tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    do_ptr += batch * stride_dob + head * stride_doh
    q_MD = load_tile(q_ptr, start, past, stride_ql, True, BLOCK_M, D, BLOCK_D)
    do_MD = load_tile(do_ptr, start, past, stride_dol, True, BLOCK_M, D, BLOCK_D)
    row_M = start + tl.arange(0, BLOCK_M)
    at_M = batch_head.to(tl.int64) * queries + row_M
    lse_M = tl.load(lse_ptr + at_M, row_M < past, 0.0)
    delta_M = tl.load(delta_ptr + at_M, row_M < past, 0.0)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_PREFIX:
        k_prefix_ptr += batch * stride_kpb + head * stride_kph
        v_prefix_ptr += batch * stride_vpb + head * stride_vph
        for i in range(0, prefix):
            lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
            dq_MD = _dq_of_span(dq_MD, q_MD, do_MD, lse_M, delta_M, k_prefix_ptr, v_prefix_ptr, lo,
                                hi, stride_kpl, stride_vpl, log2_scale,
                                D, BLOCK_N, STAGES)  # fmt: skip
    for i in range(tl.load(tiles_ptr + 4 * tile + 2), tl.load(tiles_ptr + 4 * tile + 3)):
        lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
        dq_MD = _dq_of_span(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, lo, hi, stride_kl,
                            stride_vl, log2_scale, D, BLOCK_N, STAGES)  # fmt: skip
    dq_ptr += (batch * queries * heads + head) * D
    store_tile(dq_ptr, dq_MD * scale, start, past, heads * D, D)


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def _attention_dkdv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    spans_ptr,
    queries,
    keys,
    heads,
    scale,
    log2_scale,
    stride_dob,
    stride_dol,
    stride_doh,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of keys of one head over the queries that see it: dk, dv [B, S, H, D]."""
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    start, past = tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    do_ptr += batch * stride_dob + head * stride_doh
    lse_ptr += batch_head.to(tl.int64) * queries
    delta_ptr += batch_head.to(tl.int64) * queries
    k_ND = load_tile(k_ptr, start, past, stride_kl, True, BLOCK_N, D, BLOCK_D)
    v_ND = load_tile(v_ptr, start, past, stride_vl, True, BLOCK_N, D, BLOCK_D)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(tl.load(tiles_ptr + 4 * tile + 2), tl.load(tiles_ptr + 4 * tile + 3)):
        lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
        for j in tl.range(0, tl.cdiv(hi - lo, BLOCK_M), num_stages=STAGES):
            row = lo + j * BLOCK_M
            row_M = row + tl.arange(0, BLOCK_M)
            q_MD = load_tile(q_ptr, row, hi, stride_ql, True, BLOCK_M, D, BLOCK_D)
            do_MD = load_tile(do_ptr, row, hi, stride_dol, True, BLOCK_M, D, BLOCK_D)
            # What is no query has a probability of zero.
            lse_M = tl.load(lse_ptr + row_M, row_M < hi, float("inf"))
            delta_M = tl.load(delta_ptr + row_M, row_M < hi, 0.0)
            p_NM = tl.exp2(dot(k_ND, q_MD.T) * log2_scale - lse_M[None, :])
            dv_ND = dot(p_NM.to(do_MD.dtype), do_MD, dv_ND)
            ds_NM = p_NM * (dot(v_ND, do_MD.T) - delta_M[None, :])
            dk_ND = dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND)
    offset = (batch * keys * heads + head) * D
    store_tile(dk_ptr + offset, dk_ND * scale, start, past, heads * D, D)
    store_tile(dv_ptr + offset, dv_ND, start, past, heads * D, D)


def row_delta(do_BLHD: Tensor, o_BLHD: Tensor) -> Tensor:
    """Σ do·o over the head dim, [B, H, L] float32; o is contiguous."""
    delta_BHL = by_row(o_BLHD)
    _, queries, heads, head_dim = o_BLHD.shape
    launch.run(
        _row_delta_kernel,
        (triton.cdiv(queries, FLAT_ROWS), len(o_BLHD) * heads),
        (do_BLHD, o_BLHD, delta_BHL, queries, heads, *head_strides(do_BLHD)),
        num_warps=4,
        D=head_dim,
        BLOCK_M=FLAT_ROWS,
        BLOCK_D=block_d(head_dim),
    )
    return delta_BHL


def attention_bwd(
    do_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    o_BLHD: Tensor,
    lse_BHL: Tensor,
    rows: Pattern,
    k_prefix_BPHD: Tensor | None,
    v_prefix_BPHD: Tensor | None,
    prefix: tuple[Span, ...],
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, of which every sum has one owner: always the same bits. The prefix gets no
    gradient."""
    _, queries, heads, head_dim = q_BLHD.shape
    keys, device = k_BSHD.shape[1], q_BLHD.device
    delta_BHL = row_delta(do_BLHD, o_BLHD)
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BLHD, k_BSHD, v_BSHD)
    )
    shape: dict[str, Any] = {"D": head_dim, "BLOCK_D": block_d(head_dim)}
    setting = tile_setting("attention_dkdv", q_BLHD)
    table = column_table(rows, keys, setting.stationary, device)
    launch.run(
        _attention_dkdv_kernel,
        (len(table.tiles), len(q_BLHD) * heads),
        (
            *(do_BLHD, q_BLHD, k_BSHD, v_BSHD, lse_BHL, delta_BHL, dk, dv, *table),
            *(queries, keys, heads, scale, scale * LOG2E),
            *head_strides(do_BLHD, q_BLHD, k_BSHD, v_BSHD),
        ),
        num_warps=setting.warps,
        BLOCK_N=setting.stationary,
        BLOCK_M=setting.streamed,
        STAGES=setting.stages,
        **shape,
    )
    setting = tile_setting("attention_dq", q_BLHD)
    table = tile_table(rows, prefix, setting.stationary, device)
    sources = (k_BSHD, v_BSHD, k_prefix_BPHD, v_prefix_BPHD)
    launch.run(
        _attention_dq_kernel,
        (len(table.tiles), len(q_BLHD) * heads),
        (
            *(do_BLHD, q_BLHD, *sources, lse_BHL, delta_BHL, dq, *table),
            *(queries, heads, len(prefix), scale, scale * LOG2E),
            *head_strides(do_BLHD, q_BLHD, *sources),
        ),
        num_warps=setting.warps,
        HAS_PREFIX=len(prefix) > 0,
        BLOCK_M=setting.stationary,
        BLOCK_N=setting.streamed,
        STAGES=setting.stages,
        **shape,
    )
    return dq, dk, dv
