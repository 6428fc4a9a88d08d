"""Attention for Hopper in Gluon: under a pattern of rows and spans (see tiles.py), and of a chunk
over a ring. The scheme is that of FlashAttention-3 (arXiv 2407.08608).

Shapes: B batch, H heads, D head dim, L queries, S keys, P keys of the prefix, M queries of a
consumer, N keys of a tile. Logarithms are of base 2: lse = log2 Σ exp2(scale·log2(e)·q·k).

A program is one warp that loads and two warpgroups that compute, 64 queries each. The loading warp
fills a ring of buffers with tiles of K and V by TMA. An mbarrier of each buffer says that it is
full; a named barrier, at which each warp of the consumers arrives by itself, that it is free again.
A consumer sends the product with the next tile's keys to the tensor cores before that of this
tile's probabilities with V, and computes the next tile's softmax while the second is under way:

    S(i)  = Q·K(i)         sent, then waited for | softmax of S(i) gives P(i)
    O    += P(i-1)·V(i-1)  sent                  | under way meanwhile        | waited for, O scaled

Consumers take turns in sending both, so that the tensor cores have the products of one while the
other computes its softmax. Probabilities become 16 bits only once the product with those of the
tile before is done, in the registers that it has read.

One program runs on each multiprocessor and goes through its items of a list (work.py): tiles of
queries, which never cross rows of the pattern, so that only the last tile of keys of a span is
masked, by a bound on its columns; or parts of such tiles, whose results the consumers that end last
join, each its 64 rows. Q and the keys of the next item are loaded while this one ends. Buffers and
phases of barriers run on from item to item.

Floating-point operations: 4·D·H for each query and key that meet. A chunk of Wan2.1-1.3B (4680
queries, 12 heads of 128) over a full window of 32,760 keys is 0.94 TFLOP: 1.19 ms at the 790
TFLOP/s that an H200 multiplies matrices. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
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

from sfkernels import launch
from sfkernels.gpu.attention import LOG2E, Sources, by_row
from sfkernels.gpu.hopper import hardware
from sfkernels.gpu.hopper.launching import (
    ALL,
    BOTH,
    CONSUMER_REGISTERS,
    CONSUMERS,
    ITEM,
    PRODUCER_REGISTERS,
    M,
    describe,
    hopper_setting,
    launch_specialised,
    seen_of,
    side_by_side,
    thread_barrier,
)
from sfkernels.gpu.hopper.registers import (
    accumulator,
    masked,
    operand,
    over_quarters,
    quarter_sums,
    store_rows,
)
from sfkernels.gpu.hopper.work import WorkList, list_of
from sfkernels.gpu.tiles import Pattern
from sfkernels.layout import Span

# Named barriers: a consumer's turn to send products; from FREE on, two for each buffer: K, V.
TURN, FREE = hardware.FIRST, gl.constexpr(hardware.FIRST.value + 2)


@gluon.jit
def _visited(item_ptr, spans_ptr, valid_ptr, slots, steps, stride_valid, H: gl.constexpr,
             N: gl.constexpr, HAS_TABLE: gl.constexpr):  # fmt: skip
    """The keys that an item visits: spans first..past of the table; or, of a ring, whose valid keys
    are 1 to `slots` whatever valid_ptr holds, those of its share of the steps as the span 0..1."""
    lo, hi = gl.load(item_ptr + 3), gl.load(item_ptr + 4)
    if HAS_TABLE:
        return lo, hi, 0, 0
    else:
        valid = gl.load(valid_ptr + gl.load(item_ptr + 2) // H * stride_valid)
        valid = gl.minimum(gl.maximum(valid, 1), slots).to(gl.int32)
        visits = gl.cdiv(valid, N)
        lo, hi = lo * visits // steps * N, gl.minimum(hi * visits // steps * N, valid)
        return 0, gl.where(lo < hi, 1, 0), lo, hi


@gluon.jit
def _span(i, lo, hi, spans_ptr, HAS_TABLE: gl.constexpr):
    """Span i of those that an item visits. Keys of the prefix count back from 0."""
    if HAS_TABLE:
        return gl.load(spans_ptr + 2 * i), gl.load(spans_ptr + 2 * i + 1)
    else:
        return lo, hi


@gluon.jit
def _load_span(k_desc, v_desc, k_row, v_row, col, visits, n, k_pipe, v_pipe, N: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """Loads the tiles of a span, the first of which is number n of the program's, in the order in
    which they are wanted: K a tile ahead of V."""
    k_s, k_full = k_pipe
    v_s, v_full = v_pipe
    for i in range(visits + 1):
        if i < visits:
            at = (n + i) % STAGES
            if n + i >= STAGES:
                hardware.meet(FREE + 2 * at, 1, ALL)
            mbarrier.expect(k_full.index(at), k_desc.block_type.nbytes)
            row = k_row + i * N
            tma.async_copy_global_to_shared(k_desc, [row, col], k_full.index(at), k_s.index(at))
        if i > 0:
            at = (n + i - 1) % STAGES
            if n + i > STAGES:
                hardware.meet(FREE + 2 * at + 1, 1, ALL)
            mbarrier.expect(v_full.index(at), v_desc.block_type.nbytes)
            row = v_row + (i - 1) * N
            tma.async_copy_global_to_shared(v_desc, [row, col], v_full.index(at), v_s.index(at))
    return n + visits


@gluon.jit
def _produce(q_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, q_pipe, k_pipe, v_pipe,
             begins_ptr, items_ptr, spans_ptr, valid_ptr, slots, steps, stride_valid, prefix,
             q_rows, k_rows, v_rows, k_prefix_rows, v_prefix_rows, H: gl.constexpr,
             D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, HAS_TABLE: gl.constexpr,
             HAS_PREFIX: gl.constexpr):  # fmt: skip
    """The loading warp. What it loads beyond a tile's or a span's end is masked by the consumers;
    beyond the tensor's it is zero."""
    q_s, q_full, q_empty = q_pipe
    n = 0
    turn = 0
    program = gl.program_id(0)
    for i in range(gl.load(begins_ptr + program), gl.load(begins_ptr + program + 1)):
        item_ptr = items_ptr + ITEM * i
        head = gl.load(item_ptr + 2)
        batch, col = head // H, head % H * D
        first, past, lo, hi = _visited(item_ptr, spans_ptr, valid_ptr, slots, steps, stride_valid,
                                       H, N, HAS_TABLE)  # fmt: skip
        if first < past:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                row = batch * q_rows + gl.load(item_ptr) + c * M
                tma.async_copy_global_to_shared(q_desc, [row, col], q_full.index(c), q_s.index(c))
            turn += 1
        for j in range(first, past):
            key, end = _span(j, lo, hi, spans_ptr, HAS_TABLE)
            visits = gl.cdiv(end - key, N)
            if HAS_PREFIX:
                if key < 0:
                    key += prefix
                    n = _load_span(k_prefix_desc, v_prefix_desc, batch * k_prefix_rows + key,
                                   batch * v_prefix_rows + key, col, visits, n, k_pipe, v_pipe,
                                   N, STAGES)  # fmt: skip
                else:
                    n = _load_span(k_desc, v_desc, batch * k_rows + key, batch * v_rows + key, col,
                                   visits, n, k_pipe, v_pipe, N, STAGES)  # fmt: skip
            else:
                n = _load_span(k_desc, v_desc, batch * k_rows + key, batch * v_rows + key, col,
                               visits, n, k_pipe, v_pipe, N, STAGES)  # fmt: skip
    # Nobody is left waited for: the barriers end as they began.
    for i in range(gl.maximum(n - STAGES, 0), n):
        hardware.meet(FREE + 2 * (i % STAGES), 1, ALL)
        hardware.meet(FREE + 2 * (i % STAGES) + 1, 1, ALL)


@gluon.jit
def _step(C: gl.constexpr, q, k_pipe, v_pipe, zero_MN, p_MN, acc_MD, m_M, l_M4, n, last, left,
          scale, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Tile n of keys, not the first for this tile of queries: P of tile n - 1 comes in, that of
    tile n goes out. K of this tile and V of the one before are there: the step before waited for
    them. `last` is the last tile's number."""
    k_s, k_full = k_pipe
    v_s, v_full = v_pipe
    at, before, after = n % STAGES, (n - 1) % STAGES, (n + 1) % STAGES
    hardware.meet(TURN + C, 4, BOTH)
    s_MN = warpgroup_mma(q, k_s.index(at).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
    acc_MD = warpgroup_mma(p_MN, v_s.index(before), acc_MD, is_async=True)
    hardware.arrive(TURN + 1 - C, 4, BOTH)
    s_MN = warpgroup_mma_wait(1, deps=[s_MN])
    hardware.arrive(FREE + 2 * at, 4, ALL)
    # The branch in this wait keeps ptxas from moving the arrival down below the softmax.
    mbarrier.wait(k_full.index(after), ((n + 1) // STAGES) & 1, pred=n < last)
    if left < N:
        s_MN = masked(s_MN, left, N)
    m_new_M = gl.maximum(m_M, gl.max(s_MN, 1) * scale)
    p_MN = gl.exp2(s_MN * scale - m_new_M[:, None])
    shrink_M = gl.exp2(m_M - m_new_M)
    part_M4 = quarter_sums(p_MN, N)
    l_M4 = l_M4 * over_quarters(shrink_M, part_M4) + part_M4
    # This waits for nothing, for the product with V is the only one under way. It and the branch in
    # the wait for V keep ptxas from moving the wait for that product up before the softmax.
    p_MN = warpgroup_mma_wait(1, deps=[p_MN])
    mbarrier.wait(v_full.index(at), (n // STAGES) & 1)
    acc_MD, p_MN = warpgroup_mma_wait(0, deps=[acc_MD, p_MN])
    p_MN = operand(p_MN, q.dtype, D)
    hardware.arrive(FREE + 2 * before + 1, 4, ALL)
    acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, accumulator(D)))[:, None]
    return p_MN, acc_MD, m_new_M, l_M4


@gluon.jit
def _consume(C: gl.constexpr, q_pipe, k_pipe, v_pipe, o_ptr, lse_ptr, part_ptr, part_lse_ptr,
             semaphores_ptr, begins_ptr, items_ptr, spans_ptr, valid_ptr, queries, slots, steps,
             shared, stride_valid, scale, H: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
             STAGES: gl.constexpr, HAS_TABLE: gl.constexpr, HAS_PARTS: gl.constexpr):  # fmt: skip
    """Consumer C: rows C·M to (C+1)·M of every item."""
    q_s, q_full, q_empty = q_pipe
    k_s, k_full = k_pipe
    v_s, v_full = v_pipe
    O_LAYOUT: gl.constexpr = accumulator(D)
    zero_MN = gl.zeros([M, N], gl.float32, accumulator(N))
    row_M = gl.arange(0, M, gl.SliceLayout(1, O_LAYOUT))
    n = 0
    turn = 0
    if C == 1:
        hardware.arrive(TURN, 4, BOTH)
    program = gl.program_id(0)
    for i in range(gl.load(begins_ptr + program), gl.load(begins_ptr + program + 1)):
        item_ptr = items_ptr + ITEM * i
        first, past, lo, hi = _visited(item_ptr, spans_ptr, valid_ptr, slots, steps, stride_valid,
                                       H, N, HAS_TABLE)  # fmt: skip
        if first < past:
            last = n - 1
            for j in range(first, past):
                key, end = _span(j, lo, hi, spans_ptr, HAS_TABLE)
                last += gl.cdiv(end - key, N)
            # The first tile: nothing runs beside its softmax.
            key, end = _span(first, lo, hi, spans_ptr, HAS_TABLE)
            q = q_s.index(C)
            mbarrier.wait(q_full.index(C), turn & 1)
            mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
            k = k_s.index(n % STAGES).permute((1, 0))
            s_MN = warpgroup_mma(q, k, zero_MN, use_acc=False, is_async=True)
            s_MN = warpgroup_mma_wait(0, deps=[s_MN])
            hardware.arrive(FREE + 2 * (n % STAGES), 4, ALL)
            s_MN = masked(s_MN, end - key, N)
            m_M = gl.max(s_MN, 1) * scale
            p_MN = gl.exp2(s_MN * scale - m_M[:, None])
            l_M4 = quarter_sums(p_MN, N)
            p_MN = operand(p_MN, q.dtype, D)
            acc_MD = gl.zeros([M, D], gl.float32, O_LAYOUT)
            mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n < last)
            mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
            n += 1
            skip = N
            for j in range(first, past):
                key, end = _span(j, lo, hi, spans_ptr, HAS_TABLE)
                for at in range(key + skip, end, N):
                    p_MN, acc_MD, m_M, l_M4 = _step(C, q, k_pipe, v_pipe, zero_MN, p_MN, acc_MD,
                                                    m_M, l_M4, n, last, end - at, scale,
                                                    D, N, STAGES)  # fmt: skip
                    n += 1
                skip = 0
            mbarrier.arrive(q_empty.index(C))
            turn += 1
            at = (n - 1) % STAGES
            acc_MD = warpgroup_mma(p_MN, v_s.index(at), acc_MD, is_async=True)
            acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
            hardware.arrive(FREE + 2 * at + 1, 4, ALL)
            l_M = gl.convert_layout(gl.sum(l_M4, 1), gl.SliceLayout(1, O_LAYOUT))
            o_MD = acc_MD / l_M[:, None]
            lse_M = gl.convert_layout(m_M, gl.SliceLayout(1, O_LAYOUT)) + gl.log2(l_M)
            start = gl.load(item_ptr) + C * M
            end = gl.load(item_ptr + 1)
            head = gl.load(item_ptr + 2)
            part = gl.load(item_ptr + 5)
            if HAS_PARTS:
                if part >= 0:
                    at = part * (CONSUMERS * M) + C * M
                    store_rows(part_ptr, o_MD, at, at + end - start, D, 32, D)
                    gl.store(part_lse_ptr + at + row_M, lse_M, start + row_M < end)
            if part < 0:
                o_at = (head // H * queries.to(gl.int64) * H + head % H) * D
                store_rows(o_ptr + o_at, o_MD, start, end, H * D, 16, D)
                if HAS_TABLE:
                    lse_at = lse_ptr + head.to(gl.int64) * queries + start
                    gl.store(lse_at + row_M, lse_M, start + row_M < end)
        if HAS_PARTS:
            start = gl.load(item_ptr) + C * M
            end = gl.load(item_ptr + 1)
            part = gl.load(item_ptr + 5)
            if (part >= 0) & (start < end):
                if first == past:  # no valid keys are in its share
                    at = part * (CONSUMERS * M) + C * M
                    none_M = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(1, O_LAYOUT))
                    gl.store(part_lse_ptr + at + row_M, none_M, start + row_M < end)
                # All threads have stored before the one that counts releases what it sees of them.
                thread_barrier()
                semaphore_ptr = semaphores_ptr + C * shared + gl.load(item_ptr + 8)
                joined, parts_end = gl.load(item_ptr + 6), gl.load(item_ptr + 7)
                counted = gl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu")
                if counted == parts_end - joined - 1:
                    for row in range(0, M, 4096 // D):
                        _join(part_ptr, part_lse_ptr, o_ptr, lse_ptr, joined, parts_end,
                              C * M + row, start + row, end, gl.load(item_ptr + 2), queries, H, D,
                              HAS_TABLE)  # fmt: skip
                    gl.store(semaphore_ptr, 0)
    if C == 0:
        hardware.meet(TURN, 4, BOTH)


@gluon.jit
def _join(part_ptr, part_lse_ptr, o_ptr, lse_ptr, joined, parts_end, row, start, end, head,
          queries, H: gl.constexpr, D: gl.constexpr, HAS_TABLE: gl.constexpr):  # fmt: skip
    """Queries start..start + 4096 / D of a head, before `end`, which are rows `row` and on of a
    tile: the parts' outputs, weighted by their sums of exponentials, in the order of the parts,
    whoever joins them."""
    R: gl.constexpr = 4096 // D
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    row_R = gl.arange(0, R, gl.SliceLayout(1, layout))
    col_1D = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    fits_R = start + row_R < end
    most_R = gl.full([R], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    for part in range(joined, parts_end):
        at_R = part * (CONSUMERS * M) + row + row_R
        most_R = gl.maximum(most_R, gl.load(part_lse_ptr + at_R, fits_R, 0.0))
    acc_RD = gl.zeros([R, D], gl.float32, layout)
    sum_R = gl.zeros([R], gl.float32, gl.SliceLayout(1, layout))
    for part in range(joined, parts_end):
        at_R = part * (CONSUMERS * M) + row + row_R
        lse_R = gl.load(part_lse_ptr + at_R, fits_R, 0.0)
        weight_R = gl.exp2(lse_R - most_R)
        at_RD = at_R.to(gl.int64)[:, None] * D + col_1D
        has_R1 = (fits_R & (lse_R > -float("inf")))[:, None]
        acc_RD += weight_R[:, None] * gl.load(part_ptr + at_RD, has_R1, 0.0)
        sum_R += weight_R
    query_R = head // H * queries.to(gl.int64) + start + row_R
    o_at = o_ptr + (query_R * H + head % H)[:, None] * D + col_1D
    gl.store(o_at, (acc_RD / sum_R[:, None]).to(o_ptr.dtype.element_ty), fits_R[:, None])
    if HAS_TABLE:
        lse_at = lse_ptr + head.to(gl.int64) * queries + start
        gl.store(lse_at + row_R, most_R + gl.log2(sum_R), fits_R)


@gluon.jit(do_not_specialize=["queries", "slots", "steps", "shared", "stride_valid", "prefix",
                              "q_rows", "k_rows", "v_rows", "k_prefix_rows",
                              "v_prefix_rows"])  # fmt: skip
def _hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    k_prefix_desc,
    v_prefix_desc,
    o_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    semaphores_ptr,
    begins_ptr,
    items_ptr,
    spans_ptr,
    valid_ptr,
    queries,
    slots,
    steps,
    shared,
    stride_valid,
    prefix,
    q_rows,
    k_rows,
    v_rows,
    k_prefix_rows,
    v_prefix_rows,
    scale,
    H: gl.constexpr,
    D: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_PREFIX: gl.constexpr,
    HAS_PARTS: gl.constexpr,
):
    """Attention of the items of a `WorkList`, one program for each entry of its `begins`.
    Descriptors are of rows [B·stride_b/stride_l, H·D], and *_rows says how many of them a sample is
    apart from the next. o [B, L, H, D]; lse [B, H, L], of a pattern. HAS_PARTS: some items are
    parts, whose outputs are part [parts, 2·M, D] and part_lse [parts, 2·M] until they are joined;
    semaphores [2, shared]."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, M, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()
    q_pipe, k_pipe, v_pipe = (q_s, q_full, q_empty), (k_s, k_full), (v_s, v_full)
    gl.warp_specialize(
        [
            (_consume, (0, q_pipe, k_pipe, v_pipe, o_ptr, lse_ptr, part_ptr, part_lse_ptr,
                        semaphores_ptr, begins_ptr, items_ptr, spans_ptr, valid_ptr, queries,
                        slots, steps, shared, stride_valid, scale, H, D, N, STAGES, HAS_TABLE,
                        HAS_PARTS)),
            (_consume, (1, q_pipe, k_pipe, v_pipe, o_ptr, lse_ptr, part_ptr, part_lse_ptr,
                        semaphores_ptr, begins_ptr, items_ptr, spans_ptr, valid_ptr, queries,
                        slots, steps, shared, stride_valid, scale, H, D, N, STAGES, HAS_TABLE,
                        HAS_PARTS)),
            (_produce, (q_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, q_pipe, k_pipe,
                        v_pipe, begins_ptr, items_ptr, spans_ptr, valid_ptr, slots, steps,
                        stride_valid, prefix, q_rows, k_rows, v_rows, k_prefix_rows,
                        v_prefix_rows, H, D, N, STAGES, HAS_TABLE, HAS_PREFIX)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


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
    """o and lse as `sfkernels.gpu.attention_fwd` gives them. Raises ValueError for tensors that TMA
    cannot read."""
    setting, lse_BHL = hopper_setting("hopper_fwd", q_BLHD), by_row(q_BLHD)
    before = prefix[-1][1] if prefix else 0
    work = list_of(q_BLHD, setting, rows, prefix, before)
    past = (seen_of(t, prefix) for t in (k_prefix_BPHD, v_prefix_BPHD))
    sources = side_by_side(k_BSHD), side_by_side(v_BSHD), *past
    return _forward(setting, q_BLHD, sources, work, None, None, lse_BHL, scale, before), lse_BHL


def ring_attention(
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    semaphores: Tensor | None,
    scale: float,
) -> Tensor:
    """o as `sfkernels.gpu.ring_attention` gives it; slots that are not valid hold anything finite,
    as a RingKVCache sees to when it is made and reset. Raises ValueError for tensors that TMA
    cannot read."""
    setting = hopper_setting("hopper_fwd", q_BLHD)
    rows = (((0, q_BLHD.shape[1]), ((0, k_ring_BSHD.shape[1]),)),)
    work = list_of(q_BLHD, setting, rows, ring=True)
    sources = k_ring_BSHD, v_ring_BSHD, None, None
    return _forward(setting, q_BLHD, sources, work, valid, semaphores, None, scale)


def _forward(
    setting: launch.Tile,
    q_BLHD: Tensor,
    sources: Sources,
    work: WorkList,
    valid: Tensor | None,
    semaphores: Tensor | None,
    lse_BHL: Tensor | None,
    scale: float,
    prefix_tokens: int = 0,
) -> Tensor:
    _, queries, _, head_dim = q_BLHD.shape
    k_BSHD = sources[0]
    assert k_BSHD is not None
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    part, part_lse = None, None
    if work.parts:
        tile = work.parts, setting.stationary
        part = q_BLHD.new_empty(*tile, head_dim, dtype=torch.float32)
        part_lse = q_BLHD.new_empty(tile, dtype=torch.float32)
        if semaphores is None:
            semaphores = q_BLHD.new_zeros(2 * work.shared, dtype=torch.int32)
    names = ("q", "k", "v", "prefix k", "prefix v")
    boxes = (M.value, *[setting.streamed] * 4)
    described = [describe(*one) for one in zip(names, (q_BLHD, *sources), boxes, strict=True)]
    descriptors, apart = zip(*described, strict=True)
    launch_specialised(
        _hopper_fwd_kernel,
        setting,
        (work.programs,),
        (
            *(*descriptors, o_BLHD, lse_BHL, part, part_lse, semaphores if work.parts else None),
            *(*work.tables, valid, queries, k_BSHD.shape[1], work.steps),
            *(work.shared, launch.of_sample(valid, 1), prefix_tokens, *apart, scale * LOG2E),
        ),
        q_BLHD,
        HAS_TABLE=valid is None,
        HAS_PREFIX=prefix_tokens > 0,
        HAS_PARTS=work.parts > 0,
    )
    return o_BLHD
