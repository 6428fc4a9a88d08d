"""Pieces that the kernels of attention's backward pass share: the loading warp, the visit of
queries, shared memory and descriptors.
Shapes are named as in attention_backward.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sfkernels.gpu.hopper import hardware
from sfkernels.gpu.hopper.launching import ALL, CONSUMERS, ITEM, M, describe
from sfkernels.gpu.hopper.registers import accumulator, operand

Named = tuple[str, Tensor | None]
# Named barriers: one for each buffer of the ring.
FREE = hardware.FIRST


@gluon.jit
def span_of(spans_ptr, i):
    """Tokens that an item visits. Keys of the prefix count back from 0."""
    return gl.load(spans_ptr + 2 * i), gl.load(spans_ptr + 2 * i + 1)


@gluon.jit
def item_of(items_ptr, i):
    """First token of an item and the one past its last, its head, and its first span and the one
    past its last."""
    at = items_ptr + ITEM * i
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)


@gluon.jit
def tiles_of(first_span, past_span, spans_ptr, N: gl.constexpr):
    """Number of tiles that spans have."""
    count = 0
    for i in range(first_span, past_span):
        lo, hi = span_of(spans_ptr, i)
        count += gl.cdiv(hi - lo, N)
    return count


@gluon.jit
def items_of(begins_ptr):
    """The items of this program."""
    at = begins_ptr + gl.program_id(0)
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def _load_span(x_desc, y_desc, x_row, y_row, col, lse_ptr, delta_ptr, lo, hi, t, ring, stats,
               N: gl.constexpr, STAGES: gl.constexpr, HAS_STATS: gl.constexpr):  # fmt: skip
    """Loads the tiles of the visited tokens lo..hi, the first of them number t of the program."""
    x_s, y_s, full = ring
    lse_s, delta_s = stats
    for start in range(lo, hi, N):
        slot = t % STAGES
        if HAS_STATS:  # sent for before the wait, stored after it
            at_N = start + gl.arange(0, N, gl.BlockedLayout([1], [32], [1], [0]))
            lse_N = gl.load(lse_ptr + at_N, at_N < hi, float("inf"))
            delta_N = gl.load(delta_ptr + at_N, at_N < hi, 0.0)
        if t >= STAGES:
            hardware.meet(FREE + slot, 1, ALL)
        mbarrier.expect(full.index(slot), x_desc.block_type.nbytes + y_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            x_desc, [x_row + start, col], full.index(slot), x_s.index(slot)
        )
        tma.async_copy_global_to_shared(
            y_desc, [y_row + start, col], full.index(slot), y_s.index(slot)
        )
        if HAS_STATS:
            lse_s.index(slot).store(lse_N)
            delta_s.index(slot).store(delta_N)
            mbarrier.arrive(full.index(slot), count=1)
        t += 1
    return t


@gluon.jit
def load_tiles(a_desc, b_desc, x_desc, y_desc, x_prefix_desc, y_prefix_desc, lse_ptr, delta_ptr,
          begins_ptr, items_ptr, spans_ptr, prefix, visited, a_rows, b_rows, x_rows, y_rows,
          x_prefix_rows, y_prefix_rows, kept, ring, stats, H: gl.constexpr, D: gl.constexpr,
          N: gl.constexpr, STAGES: gl.constexpr, HAS_STATS: gl.constexpr, HAS_PREFIX: gl.constexpr
          ):  # fmt: skip
    """The loading warp. Kept are tiles of a and b, visited tiles of x and y: K, V and Q, dO, or
    Q, dO and K, V. Tensors are seen as rows of tokens, and samples are *_rows of them apart."""
    a_s, b_s, kept_full, kept_empty = kept
    begin, end = items_of(begins_ptr)
    t = 0
    for item in range(begin, end):
        first, _past, head, first_span, past_span = item_of(items_ptr, item)
        batch, col = head // H, head % H * D
        turn = (item - begin) & 1
        for c in gl.static_range(CONSUMERS):
            bar, row = kept_full.index(c), first + c * M
            mbarrier.wait(kept_empty.index(c), turn ^ 1)
            mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [batch * a_rows + row, col], bar, a_s.index(c))
            tma.async_copy_global_to_shared(b_desc, [batch * b_rows + row, col], bar, b_s.index(c))
        at = head * visited
        for i in range(first_span, past_span):
            lo, hi = span_of(spans_ptr, i)
            if HAS_PREFIX:
                if lo < 0:
                    lo += prefix
                    t = _load_span(x_prefix_desc, y_prefix_desc, batch * x_prefix_rows,
                                   batch * y_prefix_rows, col, lse_ptr + at, delta_ptr + at, lo,
                                   hi + prefix, t, ring, stats, N, STAGES, HAS_STATS)  # fmt: skip
                else:
                    t = _load_span(x_desc, y_desc, batch * x_rows, batch * y_rows, col,
                                   lse_ptr + at, delta_ptr + at, lo, hi, t, ring, stats, N,
                                   STAGES, HAS_STATS)  # fmt: skip
            else:
                t = _load_span(x_desc, y_desc, batch * x_rows, batch * y_rows, col, lse_ptr + at,
                               delta_ptr + at, lo, hi, t, ring, stats, N, STAGES,
                               HAS_STATS)  # fmt: skip
    # Nobody is left waited for: the barriers end as they began.
    for i in range(gl.maximum(t - STAGES, 0), t):
        hardware.meet(FREE + i % STAGES, 1, ALL)


@gluon.jit
def start_of(head, tokens, H: gl.constexpr, D: gl.constexpr):
    """Start of a head, counted over all samples, in a contiguous [samples, tokens, H, D]."""
    return (head // H * tokens.to(gl.int64) * H + head % H) * D


@gluon.jit
def visit_queries(k_MD, v_MD, zero_MN, dv_MD, t, scale_log2, ring, stats, D: gl.constexpr,
                  N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The dS of kept keys with tile t of queries, and their dV, to which P·dO is still being
    added."""
    q_s, do_s, full = ring
    lse_s, delta_s = stats
    SCORE: gl.constexpr = accumulator(N)
    slot = t % STAGES
    do_ND = do_s.index(slot)
    q_DN, do_DN = q_s.index(slot).permute((1, 0)), do_ND.permute((1, 0))
    mbarrier.wait(full.index(slot), t // STAGES & 1)
    s_MN = warpgroup_mma(k_MD, q_DN, zero_MN, use_acc=False, is_async=True)
    dp_MN = warpgroup_mma(v_MD, do_DN, zero_MN, use_acc=False, is_async=True)
    s_MN = warpgroup_mma_wait(1, deps=[s_MN])
    lse_N = lse_s.index(slot).load(gl.SliceLayout(0, SCORE))
    p_MN = gl.exp2(s_MN * scale_log2 - lse_N[None, :])
    dv_MD = warpgroup_mma(operand(p_MN, q_s.dtype, D), do_ND, dv_MD, is_async=True)
    dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])
    delta_N = delta_s.index(slot).load(gl.SliceLayout(0, SCORE))
    return p_MN * (dp_MN - delta_N[None, :]), dv_MD


@gluon.jit
def prepare(a_desc, x_desc, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
            HAS_STATS: gl.constexpr, READERS: gl.constexpr):  # fmt: skip
    """Shared memory: the kept tiles of both consumers, which READERS of them read, the ring of
    visited tiles, each with their barriers, and the ring's lse and delta."""
    dtype: gl.constexpr = a_desc.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    stats: gl.constexpr = STAGES if HAS_STATS else 1
    a_s = gl.allocate_shared_memory(dtype, [CONSUMERS, M, D], a_desc.layout)
    b_s = gl.allocate_shared_memory(dtype, [CONSUMERS, M, D], a_desc.layout)
    x_s = gl.allocate_shared_memory(dtype, [STAGES, N, D], x_desc.layout)
    y_s = gl.allocate_shared_memory(dtype, [STAGES, N, D], x_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [stats, N], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [stats, N], flat)
    kept_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bars)
    kept_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bars)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(kept_full.index(c), count=1)
        mbarrier.init(kept_empty.index(c), count=READERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if HAS_STATS else 1)
    fence_async_shared()
    return (a_s, b_s, kept_full, kept_empty), (x_s, y_s, full), (lse_s, delta_s)


def describe_both(
    by_query: Sequence[Named], queries: int, by_key: Sequence[Named], keys: int
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Descriptors, with boxes of so many queries and keys, and how many rows samples are apart."""
    both = [*(describe(*t, queries) for t in by_query), *(describe(*t, keys) for t in by_key)]
    descs, apart = zip(*both, strict=True)
    return descs, apart
