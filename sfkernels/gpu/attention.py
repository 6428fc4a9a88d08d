"""Attention in plain Triton, for sm_80 and later: under a pattern of rows and spans (see tiles.py),
and of a chunk over a ring.

Shapes: B batch, H heads, D head dim, L queries, S keys, P keys of the prefix or (of partial
results) parts, M queries of a tile, N keys of a tile. Logarithms are of base 2: lse = log2 Σ
exp2(scale·log2(e)·q·k).

Floating-point operations: 4·D·H for each query and key that meet. A chunk of Wan2.1-1.3B (4680
queries, 12 heads of 128) over a full window of 32,760 keys is 0.94 TFLOP: 1.19 ms at the 790
TFLOP/s that an H200 multiplies matrices. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.tiles import Pattern, key_splits, tile_table
from sfkernels.kv_cache import SEMAPHORE_ROWS, semaphores_needed
from sfkernels.layout import Span

LOG2E = math.log2(math.e)


@triton.jit
def load_tile(ptr, row, past, stride, MASK: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows row, row + 1, … of one head [R, BLOCK_D]. MASK: those from `past` on are zeros. The
    addresses are left to be computed row by row: with the multiples of `stride` kept in registers
    instead, ptxas no longer moves exponentials in between the products of a pattern's loop."""
    row_R1, col_1D = tl.arange(0, R)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = ptr + (row.to(tl.int64) + row_R1) * stride + col_1D
    if MASK and D == BLOCK_D:
        return tl.load(at, row + row_R1 < past, 0.0)
    elif MASK:
        return tl.load(at, (row + row_R1 < past) & (col_1D < D), 0.0)
    elif D == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, col_1D < D, 0.0)


@triton.jit
def store_tile(ptr, x_RD, row, past, stride, D: tl.constexpr):
    row_R1 = tl.arange(0, x_RD.shape[0])[:, None]
    col_1D = tl.arange(0, x_RD.shape[1])[None, :]
    at = ptr + row.to(tl.int64) * stride + (row_R1 * stride + col_1D)
    tl.store(at, x_RD.to(ptr.dtype.element_ty), (row + row_R1 < past) & (col_1D < D))


@triton.jit
def dot(a, b, acc=None):
    """Product of two tiles, exact for float32, which only tests use."""
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
    """Attention of every query of a tile over the keys lo..hi, of which there is at least one.

    Each turn starts the next tile's product with the keys before this tile's softmax, which needs
    the units that the tensor cores leave free. Every tile but the last is whole."""
    BLOCK_D: tl.constexpr = q_MD.shape[1]
    last = tl.cdiv(hi - lo, BLOCK_N) - 1
    k_ND = load_tile(k_ptr, lo, hi, stride_kl, True, BLOCK_N, D, BLOCK_D)
    s_MN = dot(q_MD, k_ND.T)
    for i in tl.range(0, last, num_stages=STAGES):
        row = lo + i * BLOCK_N
        k_ND = load_tile(k_ptr, row + BLOCK_N, hi, stride_kl, True, BLOCK_N, D, BLOCK_D)
        next_MN = dot(q_MD, k_ND.T)
        p_MN, shrink_M, m_M, l_M = _softmax(s_MN, m_M, l_M, scale, 0, False)
        v_ND = load_tile(v_ptr, row, hi, stride_vl, False, BLOCK_N, D, BLOCK_D)
        acc_MD = dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
        s_MN = next_MN
    row = lo + last * BLOCK_N
    p_MN, shrink_M, m_M, l_M = _softmax(s_MN, m_M, l_M, scale, hi - row, True)
    v_ND = load_tile(v_ptr, row, hi, stride_vl, True, BLOCK_N, D, BLOCK_D)
    acc_MD = dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
    return acc_MD, m_M, l_M


@triton.jit(do_not_specialize=["queries", "slots", "heads", "prefix", "stride_valid"])
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
    part_ptr,
    semaphores_ptr,
    queries,
    slots,
    heads,
    prefix,
    scale,
    stride_valid,
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
    HAS_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SEMAPHORE_ROWS: tl.constexpr,
):
    """One tile of queries of one head over the spans of the table, or over one part of the ring's
    valid keys, which are 1 to `slots` whatever valid_ptr holds. o [B, L, H, D], lse
    [parts, B, H, L]. HAS_PARTS: of the programs that share a tile each leaves its output in part
    [parts, B, L, H, D], and the last of them to end joins these."""
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
        valid = tl.load(valid_ptr + batch * stride_valid)
        valid = tl.minimum(tl.maximum(valid, 1), slots).to(tl.int32)
        share = tl.cdiv(tl.cdiv(valid, BLOCK_N), parts) * BLOCK_N
        lo, hi = part * share, tl.minimum((part + 1) * share, valid)
        if lo >= hi:
            return

    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    q_MD = load_tile(q_ptr, start, past, stride_ql, True, BLOCK_M, D, BLOCK_D)
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
    o_at = (batch * queries * heads + head) * D
    if HAS_PARTS:
        step = tl.num_programs(2).to(tl.int64) * queries
        store_tile(part_ptr + part * step * D + o_at, acc_MD / l_M[:, None], start, past, heads * D,
                   D)  # fmt: skip
        # All threads have stored before the one that counts releases what it sees of them.
        tl.debug_barrier()
        semaphores_ptr += batch_head * tl.cdiv(queries, SEMAPHORE_ROWS) + start // SEMAPHORE_ROWS
        ended = tl.atomic_add(semaphores_ptr, 1, sem="acq_rel", scope="gpu") + 1
        if ended == tl.cdiv(valid, share):
            JOINED: tl.constexpr = min(BLOCK_M, 64)  # at once, for lack of registers
            for i in range(BLOCK_M // JOINED):
                _join(part_ptr + o_at, lse_ptr - part * step, o_ptr + o_at, start + i * JOINED,
                      past, step, ended, heads, D, JOINED, BLOCK_D)  # fmt: skip
            tl.store(semaphores_ptr, 0)
    else:
        store_tile(o_ptr + o_at, acc_MD / l_M[:, None], start, past, heads * D, D)


@triton.jit
def _join(part_ptr, lse_ptr, o_ptr, start, past, step, parts, heads, D: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Queries start..past of one head: the parts' outputs, weighted by their sums of exponentials,
    in the order of the parts, whoever joins them. Parts are `step` queries and heads apart."""
    row_M = start + tl.arange(0, BLOCK_M)
    most_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for part in range(parts):
        most_M = tl.maximum(most_M, tl.load(lse_ptr + part * step + row_M, row_M < past, 0.0))
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for part in range(parts):
        weight_M = tl.exp2(tl.load(lse_ptr + part * step + row_M, row_M < past, 0.0) - most_M)
        o_MD = load_tile(
            part_ptr + part * step * D, start, past, heads * D, True, BLOCK_M, D, BLOCK_D
        )
        acc_MD += weight_M[:, None] * o_MD.to(tl.float32)
        sum_M += weight_M
    store_tile(o_ptr, acc_MD / sum_M[:, None], start, past, heads * D, D)


@triton.jit(do_not_specialize=["parts", "queries", "heads"])
def _combine_parts_kernel(
    part_ptr,
    lse_ptr,
    o_ptr,
    parts,
    queries,
    heads,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some queries of one head, of all `parts`."""
    batch_head, start = tl.program_id(1), tl.program_id(0) * BLOCK_M
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    at, step = (batch * queries * heads + head) * D, tl.num_programs(1).to(tl.int64) * queries
    lse_ptr += batch_head.to(tl.int64) * queries
    _join(part_ptr + at, lse_ptr, o_ptr + at, start, queries, step, parts, heads, D, BLOCK_M,
          BLOCK_D)  # fmt: skip


def attention_fwd(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    rows: Pattern,
    k_prefix_BPHD: Tensor | None,
    v_prefix_BPHD: Tensor | None,
    prefix: tuple[Span, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [B, L, H, D] and lse [B, H, L] float32, of queries that see the spans of their row, and
    before them those of the prefix. Every query sees a key, and no span is empty."""
    setting = tile_setting("attention_fwd", q_BLHD)
    work, o_BLHD, lse_BHL = pattern_work(setting, q_BLHD, rows, prefix)
    sources = k_BSHD, v_BSHD, k_prefix_BPHD, v_prefix_BPHD
    _launch_forward(setting, q_BLHD, sources, o_BLHD, lse_BHL, work, scale)
    return o_BLHD, lse_BHL


def ring_attention(
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    semaphores: Tensor | None,
    scale: float,
) -> Tensor:
    """o [B, L, H, D] of queries that see the first `valid` slots of the ring, of all samples or of
    each; at least one, and at most all. The keys are split where that fills the card better.
    semaphores: int32 zeros, as many as `semaphores_needed` says, or new ones; they are zeros again
    at the end."""
    setting = tile_setting("attention_fwd", q_BLHD)
    work, o_BLHD, lse_PBHL = ring_work(setting, q_BLHD, k_ring_BSHD, valid, semaphores)
    sources = k_ring_BSHD, v_ring_BSHD, None, None
    _launch_forward(setting, q_BLHD, sources, o_BLHD, lse_PBHL, work, scale)
    return o_BLHD


Sources = tuple[Tensor | None, ...]  # k, v, and those of the prefix


class Work(NamedTuple):
    """The reach of one launch of a forward kernel: tiles of queries, parts of the keys, spans that
    belong to the prefix; where it reads which keys are seen, the tables of a pattern or the valid
    length of a ring; and, where there is more than one part, their outputs and the semaphores that
    count how many have ended."""

    tiles: int
    parts: int
    prefix: int
    tables: Sequence[Tensor | None]
    valid: Tensor | None
    joining: Sequence[Tensor | None] = (None, None)


def pattern_work(
    setting: launch.Tile, q_BLHD: Tensor, rows: Pattern, prefix: tuple[Span, ...]
) -> tuple[Work, Tensor, Tensor]:
    """Work of a launch under a pattern, and its empty outputs: o [B, L, H, D] and lse [B, H, L]."""
    table = tile_table(rows, prefix, setting.stationary, q_BLHD.device)
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    return Work(len(table.tiles), 1, len(prefix), table, None), o_BLHD, by_row(q_BLHD)


def ring_work(
    setting: launch.Tile,
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    valid: Tensor,
    semaphores: Tensor | None,
) -> tuple[Work, Tensor, Tensor]:
    """Work of a launch over a ring, and its empty outputs: o [B, L, H, D] and lse [P, B, H, L]."""
    batch, queries, heads, _ = q_BLHD.shape
    tiles = triton.cdiv(queries, setting.stationary)
    parts = key_splits(
        tiles * batch * heads,
        launch.multiprocessors(q_BLHD.device),
        triton.cdiv(k_ring_BSHD.shape[1], setting.streamed),
    )
    joining: Sequence[Tensor | None] = None, None
    if parts > 1:
        if semaphores is None:
            needed = semaphores_needed(batch, queries, heads)
            semaphores = q_BLHD.new_zeros(needed, dtype=torch.int32)
        joining = q_BLHD.new_empty(parts, *q_BLHD.shape, dtype=torch.float32), semaphores
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    work = Work(tiles, parts, 0, (None, None), valid, joining)
    return work, o_BLHD, by_row(q_BLHD, parts)


def _launch_forward(
    setting: launch.Tile,
    q_BLHD: Tensor,
    sources: Sources,
    o_BLHD: Tensor,
    lse: Tensor,
    work: Work,
    scale: float,
) -> None:
    """Writes o [B, L, H, D] and lse [parts, B, H, L]."""
    batch, queries, heads, head_dim = q_BLHD.shape
    k_BSHD = sources[0]
    assert k_BSHD is not None
    launch.run(
        _attention_fwd_kernel,
        (work.tiles, work.parts, batch * heads),
        (
            *(q_BLHD, *sources, o_BLHD, lse, *work.tables, work.valid, *work.joining),
            *(queries, k_BSHD.shape[1], heads, work.prefix, scale * LOG2E),
            *(launch.of_sample(work.valid, 1), *head_strides(q_BLHD, *sources)),
        ),
        num_warps=setting.warps,
        D=head_dim,
        HAS_TABLE=work.valid is None,
        HAS_PREFIX=work.prefix > 0,
        HAS_PARTS=work.parts > 1,
        BLOCK_D=block_d(head_dim),
        BLOCK_M=setting.stationary,
        BLOCK_N=setting.streamed,
        STAGES=setting.stages,
        SEMAPHORE_ROWS=SEMAPHORE_ROWS,
    )


def combine_parts(part_PBLHD: Tensor, lse_PBHL: Tensor, dtype: torch.dtype) -> Tensor:
    """o [B, L, H, D] from the outputs of parts of the keys: their mean, weighted by their sums."""
    parts, batch, queries, heads, head_dim = part_PBLHD.shape
    o_BLHD = part_PBLHD.new_empty(batch, queries, heads, head_dim, dtype=dtype)
    launch.run(
        _combine_parts_kernel,
        (triton.cdiv(queries, FLAT_ROWS), batch * heads),
        (part_PBLHD, lse_PBHL, o_BLHD, parts, queries, heads),
        num_warps=4,
        D=head_dim,
        BLOCK_M=FLAT_ROWS,
        BLOCK_D=block_d(head_dim),
    )
    return o_BLHD


FLAT_ROWS = 32  # of a program that only reads and writes rows of one head


def tile_setting(kernel: str, q_BLHD: Tensor) -> launch.Tile:
    return launch.tile(kernel, q_BLHD.device, q_BLHD.shape[-1] * q_BLHD.element_size())


def by_row(x_BLHD: Tensor, *more: int) -> Tensor:
    """An empty [..., B, H, L] in float32."""
    batch, queries, heads, _ = x_BLHD.shape
    return x_BLHD.new_empty(*more, batch, heads, queries, dtype=torch.float32)


def block_d(head_dim: int) -> int:
    """Padded head dim: tensor cores multiply at least 16 wide."""
    return max(triton.next_power_of_2(head_dim), 16)


def head_strides(*tensors: Tensor | None) -> list[int]:
    """The first three strides of each tensor, zeros where it is absent."""
    return [0 if t is None else t.stride(d) for t in tensors for d in (0, 1, 2)]
