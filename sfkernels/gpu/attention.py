"""Attention in plain Triton, for sm_80 and later: under a pattern of rows and spans (see tiles.py),
forward and backward, and of a chunk over a ring.

Shapes: B batch, H heads, D head dim, L queries, S keys, P keys of the prefix or (of partial
results) parts, M queries of a tile, N keys of a tile. Logarithms are of base 2: lse = log2 Σ
exp2(scale·log2(e)·q·k).

Floating-point operations, with a pair for each query and key that meet: forward 4·D·H a pair (two
products), backward 10·D·H needed (five products) and 14·D·H done: keys and queries each recompute
the probabilities, so that no sum is atomic and gradients are the same in every run. A chunk of
Wan2.1-1.3B (4680 queries, 12 heads of 128) over a full window of 32,760 keys is 0.94 TFLOP: 1.19 ms
at the 790 TFLOP/s that an H200 multiplies matrices. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.tiles import Rows, key_splits, tile_table
from sfkernels.layout import Row, Span, transpose

LOG2E = math.log2(math.e)


@triton.jit
def _load_tile(ptr, row, past, stride, MASK: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows row, row + 1, … of one head [R, BLOCK_D]. MASK: those from `past` on are zeros."""
    row_R1, col_1D = tl.arange(0, R)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = ptr + row.to(tl.int64) * stride + (row_R1 * stride + col_1D)
    if MASK and D == BLOCK_D:
        return tl.load(at, row + row_R1 < past, 0.0)
    elif MASK:
        return tl.load(at, (row + row_R1 < past) & (col_1D < D), 0.0)
    elif D == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, col_1D < D, 0.0)


@triton.jit
def _store_tile(ptr, x_RD, row, past, stride, D: tl.constexpr):
    row_R1 = tl.arange(0, x_RD.shape[0])[:, None]
    col_1D = tl.arange(0, x_RD.shape[1])[None, :]
    at = ptr + row.to(tl.int64) * stride + (row_R1 * stride + col_1D)
    tl.store(at, x_RD.to(ptr.dtype.element_ty), (row + row_R1 < past) & (col_1D < D))


@triton.jit
def _dot(a, b, acc=None):
    """Exact for float32, which only tests use."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _softmax(s_MN, m_M, l_M, scale, left, MASK: tl.constexpr):
    """One step of the online softmax: probabilities relative to the new maximum, what older ones
    shrink by, maximum, sum. MASK: only the first `left` columns count."""
    if MASK:
        s_MN = tl.where(tl.arange(0, s_MN.shape[1])[None, :] < left, s_MN, -float("inf"))
    m_new_M = tl.maximum(m_M, tl.max(s_MN, 1) * scale)
    p_MN = tl.exp2(s_MN * scale - m_new_M[:, None])
    shrink_M = tl.exp2(m_M - m_new_M)
    return p_MN, shrink_M, m_new_M, l_M * shrink_M + tl.sum(p_MN, 1)


@triton.jit
def _attend(q_MD, acc_MD, m_M, l_M, k_ptr, v_ptr, lo, hi, stride_kl, stride_vl, scale,
            D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Every query of a tile over the keys lo..hi, of which there is at least one.

    Each turn starts the next tile's product with the keys before this tile's softmax, which needs
    the units that the tensor cores leave free. Every tile but the last is whole."""
    BLOCK_D: tl.constexpr = q_MD.shape[1]
    last = tl.cdiv(hi - lo, BLOCK_N) - 1
    k_ND = _load_tile(k_ptr, lo, hi, stride_kl, True, BLOCK_N, D, BLOCK_D)
    s_MN = _dot(q_MD, k_ND.T)
    for i in tl.range(0, last, num_stages=STAGES):
        row = lo + i * BLOCK_N
        k_ND = _load_tile(k_ptr, row + BLOCK_N, hi, stride_kl, True, BLOCK_N, D, BLOCK_D)
        next_MN = _dot(q_MD, k_ND.T)
        p_MN, shrink_M, m_M, l_M = _softmax(s_MN, m_M, l_M, scale, 0, False)
        v_ND = _load_tile(v_ptr, row, hi, stride_vl, False, BLOCK_N, D, BLOCK_D)
        acc_MD = _dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
        s_MN = next_MN
    row = lo + last * BLOCK_N
    p_MN, shrink_M, m_M, l_M = _softmax(s_MN, m_M, l_M, scale, hi - row, True)
    v_ND = _load_tile(v_ptr, row, hi, stride_vl, True, BLOCK_N, D, BLOCK_D)
    acc_MD = _dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
    return acc_MD, m_M, l_M


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_prefix_ptr,
    v_prefix_ptr,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    spans_ptr,
    valid_ptr,
    queries,
    heads,
    prefix,
    scale,
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
    HAS_TABLE: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of one head over the spans of the table, or over one part of the ring's
    valid keys. o [parts, B, L, H, D], lse [parts, B, H, L]."""
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch_head = tl.program_id(2)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    lse_ptr += (part * tl.num_programs(2) + batch_head).to(tl.int64) * queries
    if HAS_TABLE:
        start, past = tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1)
        row_M = start + tl.arange(0, BLOCK_M)
    else:
        start = tile * BLOCK_M
        past = tl.minimum(start + BLOCK_M, queries)
        row_M = start + tl.arange(0, BLOCK_M)
        valid = tl.load(valid_ptr).to(tl.int32)
        share = tl.cdiv(tl.cdiv(valid, BLOCK_N), parts) * BLOCK_N
        lo, hi = part * share, tl.minimum((part + 1) * share, valid)
        if lo >= hi:
            tl.store(lse_ptr + row_M, tl.full([BLOCK_M], -float("inf"), tl.float32), row_M < past)
            return

    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    q_MD = _load_tile(q_ptr, start, past, stride_ql, True, BLOCK_M, D, BLOCK_D)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_PREFIX:
        k_prefix_ptr += batch * stride_kpb + head * stride_kph
        v_prefix_ptr += batch * stride_vpb + head * stride_vph
        for i in range(0, prefix):
            lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
            acc_MD, m_M, l_M = _attend(q_MD, acc_MD, m_M, l_M, k_prefix_ptr, v_prefix_ptr, lo, hi,
                                       stride_kpl, stride_vpl, scale,
                                       D, BLOCK_N, STAGES)  # fmt: skip
    if HAS_TABLE:
        for i in range(tl.load(tiles_ptr + 4 * tile + 2), tl.load(tiles_ptr + 4 * tile + 3)):
            lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
            acc_MD, m_M, l_M = _attend(q_MD, acc_MD, m_M, l_M, k_ptr, v_ptr, lo, hi, stride_kl,
                                       stride_vl, scale, D, BLOCK_N, STAGES)  # fmt: skip
    else:
        acc_MD, m_M, l_M = _attend(q_MD, acc_MD, m_M, l_M, k_ptr, v_ptr, lo, hi, stride_kl,
                                   stride_vl, scale, D, BLOCK_N, STAGES)  # fmt: skip
    tl.store(lse_ptr + row_M, m_M + tl.log2(l_M), row_M < past)
    o_ptr += ((part * tl.num_programs(2) // heads + batch) * queries * heads + head) * D
    _store_tile(o_ptr, acc_MD / l_M[:, None], start, past, heads * D, D)


@triton.jit
def _combine_parts_kernel(
    part_ptr,
    lse_ptr,
    o_ptr,
    queries,
    heads,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some queries of one head: the parts' outputs, weighted by their sums of exponentials. A part
    that saw no key has a weight of zero and left nothing that could be read."""
    batch_head, batches_heads = tl.program_id(1), tl.num_programs(1)
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    start = tl.program_id(0) * BLOCK_M
    row_M = start + tl.arange(0, BLOCK_M)
    lse_ptr += batch_head.to(tl.int64) * queries + row_M
    at_M = (batch * queries + row_M) * heads + head
    at_MD = at_M[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    fits_M1 = row_M[:, None] < queries
    fits_1D = tl.arange(0, BLOCK_D)[None, :] < D
    step = batches_heads.to(tl.int64) * queries

    most_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for part in tl.static_range(PARTS):
        lse_M = tl.load(lse_ptr + part * step, row_M < queries, 0.0)
        most_M = tl.maximum(most_M, lse_M)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(PARTS):
        lse_M = tl.load(lse_ptr + part * step, row_M < queries, 0.0)
        weight_M = tl.exp2(lse_M - most_M)
        seen_M1 = (lse_M > -float("inf"))[:, None] & fits_M1
        o_MD = tl.load(part_ptr + part * step * D + at_MD, seen_M1 & fits_1D, 0.0)
        acc_MD += weight_M[:, None] * o_MD
        sum_M += weight_M
    out_MD = acc_MD / sum_M[:, None]
    tl.store(o_ptr + at_MD, out_MD.to(o_ptr.dtype.element_ty), fits_M1 & fits_1D)


@triton.jit
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
    do_MD = _load_tile(do_ptr, start, queries, stride_dol, True, BLOCK_M, D, BLOCK_D)
    o_MD = _load_tile(o_ptr, start, queries, heads * D, True, BLOCK_M, D, BLOCK_D)
    row_M = start + tl.arange(0, BLOCK_M)
    delta_M = tl.sum(do_MD.to(tl.float32) * o_MD.to(tl.float32), 1)
    tl.store(delta_ptr + batch_head.to(tl.int64) * queries + row_M, delta_M, row_M < queries)


@triton.jit
def _dq_of_keys(dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, row, hi, stride_kl, stride_vl,
                scale, MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    BLOCK_D: tl.constexpr = q_MD.shape[1]
    k_ND = _load_tile(k_ptr, row, hi, stride_kl, MASK, BLOCK_N, D, BLOCK_D)
    v_ND = _load_tile(v_ptr, row, hi, stride_vl, MASK, BLOCK_N, D, BLOCK_D)
    s_MN = _dot(q_MD, k_ND.T)
    dp_MN = _dot(do_MD, v_ND.T)
    p_MN = tl.exp2(s_MN * scale - lse_M[:, None])
    if MASK:  # what is no key must not overflow
        p_MN = tl.where(row + tl.arange(0, BLOCK_N)[None, :] < hi, p_MN, 0.0)
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    return _dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD)


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


@triton.jit
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
    q_MD = _load_tile(q_ptr, start, past, stride_ql, True, BLOCK_M, D, BLOCK_D)
    do_MD = _load_tile(do_ptr, start, past, stride_dol, True, BLOCK_M, D, BLOCK_D)
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
    _store_tile(dq_ptr, dq_MD * scale, start, past, heads * D, D)


@triton.jit
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
    k_ND = _load_tile(k_ptr, start, past, stride_kl, True, BLOCK_N, D, BLOCK_D)
    v_ND = _load_tile(v_ptr, start, past, stride_vl, True, BLOCK_N, D, BLOCK_D)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(tl.load(tiles_ptr + 4 * tile + 2), tl.load(tiles_ptr + 4 * tile + 3)):
        lo, hi = tl.load(spans_ptr + 2 * i), tl.load(spans_ptr + 2 * i + 1)
        for j in tl.range(0, tl.cdiv(hi - lo, BLOCK_M), num_stages=STAGES):
            row = lo + j * BLOCK_M
            row_M = row + tl.arange(0, BLOCK_M)
            q_MD = _load_tile(q_ptr, row, hi, stride_ql, True, BLOCK_M, D, BLOCK_D)
            do_MD = _load_tile(do_ptr, row, hi, stride_dol, True, BLOCK_M, D, BLOCK_D)
            # What is no query has a probability of zero.
            lse_M = tl.load(lse_ptr + row_M, row_M < hi, float("inf"))
            delta_M = tl.load(delta_ptr + row_M, row_M < hi, 0.0)
            p_NM = tl.exp2(_dot(k_ND, q_MD.T) * log2_scale - lse_M[None, :])
            dv_ND = _dot(p_NM.to(do_MD.dtype), do_MD, dv_ND)
            ds_NM = p_NM * (_dot(v_ND, do_MD.T) - delta_M[None, :])
            dk_ND = _dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND)
    offset = (batch * keys * heads + head) * D
    _store_tile(dk_ptr + offset, dk_ND * scale, start, past, heads * D, D)
    _store_tile(dv_ptr + offset, dv_ND, start, past, heads * D, D)


def attention_fwd(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    rows: Rows,
    k_prefix_BPHD: Tensor | None,
    v_prefix_BPHD: Tensor | None,
    prefix: tuple[Span, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, L, H, D] and lse [B, H, L] float32, of queries that see the spans of their row, and
    before them those of the prefix."""
    setting = _setting("attention_fwd", q_BLHD)
    table = tile_table(rows, prefix, setting.keep, q_BLHD.device)
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    lse_BHL = _by_row(q_BLHD)
    sources = (k_BSHD, v_BSHD, k_prefix_BPHD, v_prefix_BPHD)
    _run_fwd(setting, q_BLHD, sources, o_BLHD, lse_BHL, len(table.tiles), 1, (*table, None),
             len(prefix), scale)  # fmt: skip
    return o_BLHD, lse_BHL


def ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """o [B, L, H, D] of queries that see the first `valid` slots of the ring."""
    setting = _setting("attention_fwd", q_BLHD)
    batch, queries, heads, _ = q_BLHD.shape
    tiles = triton.cdiv(queries, setting.keep)
    parts = key_splits(
        tiles * batch * heads,
        launch.multiprocessors(q_BLHD.device) * max(setting.per_sm, 1),
        triton.cdiv(k_ring_BSHD.shape[1], setting.visit),
    )
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    part_PBLHD, lse_PBHL = o_BLHD, _by_row(q_BLHD, parts)
    if parts > 1:
        part_PBLHD = o_BLHD.new_empty(parts, *o_BLHD.shape, dtype=torch.float32)
    sources = (k_ring_BSHD, v_ring_BSHD, None, None)
    _run_fwd(setting, q_BLHD, sources, part_PBLHD, lse_PBHL, tiles, parts, (None, None, valid), 0,
             scale)  # fmt: skip
    if parts > 1:
        combine_parts(part_PBLHD, lse_PBHL, o_BLHD)
    return o_BLHD


def _run_fwd(
    setting: launch.Tile,
    q_BLHD: Tensor,
    sources: tuple[Tensor | None, ...],
    o: Tensor,
    lse: Tensor,
    tiles: int,
    parts: int,
    tables: tuple[Tensor | None, ...],
    prefix: int,
    scale: float,
) -> None:
    batch, queries, heads, head_dim = q_BLHD.shape
    launch.run(
        _attention_fwd_kernel,
        (tiles, parts, batch * heads),
        (
            *(q_BLHD, *sources, o, lse, *tables),
            *(queries, heads, prefix, scale * LOG2E),
            *_strides(q_BLHD, *sources),
        ),
        num_warps=setting.warps,
        D=head_dim,
        HAS_TABLE=tables[0] is not None,
        HAS_PREFIX=prefix > 0,
        BLOCK_D=_block_d(head_dim),
        BLOCK_M=setting.keep,
        BLOCK_N=setting.visit,
        STAGES=setting.stages,
    )


def combine_parts(part_PBLHD: Tensor, lse_PBHL: Tensor, o_BLHD: Tensor) -> None:
    """Writes o [B, L, H, D], contiguous, from the float32 outputs of parts of the keys. A part with
    an lse of minus infinity saw no key, and its output is not read."""
    parts, batch, queries, heads, head_dim = part_PBLHD.shape
    launch.run(
        _combine_parts_kernel,
        (triton.cdiv(queries, _FLAT_ROWS), batch * heads),
        (part_PBLHD, lse_PBHL, o_BLHD, queries, heads),
        num_warps=4,
        D=head_dim,
        PARTS=parts,
        BLOCK_M=_FLAT_ROWS,
        BLOCK_D=_block_d(head_dim),
    )


def row_delta(do_BLHD: Tensor, o_BLHD: Tensor) -> Tensor:
    """Σ do·o over the head dim, [B, H, L] float32; o is contiguous."""
    delta_BHL = _by_row(o_BLHD)
    _, queries, heads, head_dim = o_BLHD.shape
    launch.run(
        _row_delta_kernel,
        (triton.cdiv(queries, _FLAT_ROWS), len(o_BLHD) * heads),
        (do_BLHD, o_BLHD, delta_BHL, queries, heads, *_strides(do_BLHD)),
        num_warps=4,
        D=head_dim,
        BLOCK_M=_FLAT_ROWS,
        BLOCK_D=_block_d(head_dim),
    )
    return delta_BHL


def attention_bwd(
    do_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    o_BLHD: Tensor,
    lse_BHL: Tensor,
    rows: Rows,
    k_prefix_BPHD: Tensor | None,
    v_prefix_BPHD: Tensor | None,
    prefix: tuple[Span, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. The prefix gets no gradient."""
    _, queries, heads, head_dim = q_BLHD.shape
    keys, device = k_BSHD.shape[1], q_BLHD.device
    delta_BHL = row_delta(do_BLHD, o_BLHD)
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BLHD, k_BSHD, v_BSHD)
    )
    shape: dict[str, Any] = {"D": head_dim, "BLOCK_D": _block_d(head_dim)}
    setting = _setting("attention_dkdv", q_BLHD)
    columns = transpose([Row(*row) for row in rows], keys)
    table = tile_table(columns, (), setting.keep, device)
    launch.run(
        _attention_dkdv_kernel,
        (len(table.tiles), len(q_BLHD) * heads),
        (
            *(do_BLHD, q_BLHD, k_BSHD, v_BSHD, lse_BHL, delta_BHL, dk, dv, *table),
            *(queries, keys, heads, scale, scale * LOG2E),
            *_strides(do_BLHD, q_BLHD, k_BSHD, v_BSHD),
        ),
        num_warps=setting.warps,
        BLOCK_N=setting.keep,
        BLOCK_M=setting.visit,
        STAGES=setting.stages,
        **shape,
    )
    setting = _setting("attention_dq", q_BLHD)
    table = tile_table(rows, prefix, setting.keep, device)
    sources = (k_BSHD, v_BSHD, k_prefix_BPHD, v_prefix_BPHD)
    launch.run(
        _attention_dq_kernel,
        (len(table.tiles), len(q_BLHD) * heads),
        (
            *(do_BLHD, q_BLHD, *sources, lse_BHL, delta_BHL, dq, *table),
            *(queries, heads, len(prefix), scale, scale * LOG2E),
            *_strides(do_BLHD, q_BLHD, *sources),
        ),
        num_warps=setting.warps,
        HAS_PREFIX=len(prefix) > 0,
        BLOCK_M=setting.keep,
        BLOCK_N=setting.visit,
        STAGES=setting.stages,
        **shape,
    )
    return dq, dk, dv


_FLAT_ROWS = 32  # of a program that only reads and writes rows of one head


def _setting(kernel: str, q_BLHD: Tensor) -> launch.Tile:
    return launch.tile(kernel, q_BLHD.device, q_BLHD.shape[-1] * q_BLHD.element_size())


def _by_row(x_BLHD: Tensor, *more: int) -> Tensor:
    """An empty [..., B, H, L] in float32."""
    batch, queries, heads, _ = x_BLHD.shape
    return x_BLHD.new_empty(*more, batch, heads, queries, dtype=torch.float32)


def _block_d(head_dim: int) -> int:
    """Tensor cores multiply at least 16 wide."""
    return max(triton.next_power_of_2(head_dim), 16)


def _strides(*tensors: Tensor | None) -> list[int]:
    """The first three strides of each tensor, zeros where it is absent."""
    return [0 if t is None else t.stride(d) for t in tensors for d in (0, 1, 2)]
