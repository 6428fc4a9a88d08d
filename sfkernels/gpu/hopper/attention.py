"""Attention for Hopper in Gluon: under a pattern of rows and spans (see tiles.py), and of a chunk
over a ring. The scheme is that of FlashAttention-3 (arXiv 2407.08608).

Shapes: B batch, H heads, D head dim, L queries, S keys, P keys of the prefix or (of partial
results) parts, M queries of a consumer, N keys of a tile. Logarithms are of base 2: lse = log2 Σ
exp2(scale·log2(e)·q·k).

A program is one warp that loads and two warpgroups that compute, 64 queries each. The loading warp
fills a ring of buffers with tiles of K and V by TMA; two mbarriers of each buffer say that it is
full, and that both consumers are done with it. A consumer sends the product with the next tile's
keys to the tensor cores before that of this tile's probabilities with V, and computes the next
tile's softmax while the second is under way:

    S(i)  = Q·K(i)         sent, then waited for | softmax of S(i) gives P(i)
    O    += P(i-1)·V(i-1)  sent                  | under way meanwhile        | waited for, O scaled

Tiles of queries never cross rows of the pattern, hence only the last tile of keys of a span is
masked, by a bound on its columns. The kernel loops over tiles of queries. With one program a tile
that loop has one turn; a persistent program loads Q and keys of its next tile while it computes the
end of this one. Buffers and phases of barriers run on from tile to tile.

Floating-point operations: 4·D·H for each query and key that meet. A chunk of Wan2.1-1.3B (4680
queries, 12 heads of 128) over a full window of 32,760 keys is 0.94 TFLOP: 1.19 ms at the 790
TFLOP/s that an H200 multiplies matrices. One program fits a multiprocessor, of which there are 132:
the 444 tiles of that chunk are 4 waves, 84% full, and the 156 tiles of one frame 2 waves, 59% full.
A ring's keys are therefore split: into 2 parts for the chunk, 96% full, and 5 for the frame, 98%
(`key_splits`). The program that ends last of those that share a tile joins what they have computed.
Not measured on a GPU yet.
"""

from __future__ import annotations

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
from sfkernels.gpu.attention import LOG2E, Sources, Work, pattern_work, ring_work
from sfkernels.gpu.hopper.launching import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    SEMAPHORES,
    M,
    describe,
    hopper_setting,
    launch_specialised,
    programs_of,
    thread_barrier,
)
from sfkernels.gpu.tiles import Pattern
from sfkernels.layout import Span


@gluon.constexpr_function
def accumulator(columns):
    """Layout of a product of M rows in the registers of a warpgroup."""
    shape = [16, columns, 16]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=shape)


@gluon.constexpr_function
def _stored(columns, bits):
    """Layout in which a product is stored: of 16 bits, whole rows, 128 bits a thread, by way of
    shared memory; of 32, as it is, for four threads store a sector of 32 bytes already."""
    if bits == 32:
        return accumulator(columns)
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def store_rows(ptr, x_MD, first, past, sample, tokens, head, BITS: gl.constexpr, H: gl.constexpr,
               D: gl.constexpr):  # fmt: skip
    """Rows first..past of a head in a contiguous [samples, tokens, H, D]. Addresses depend on
    `first` row by row: else the compiler computes them before the loop over tiles and keeps them in
    registers that the loop lacks."""
    layout: gl.constexpr = _stored(D, BITS)
    row_M1 = first + gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    col_1D = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    at_MD = ((sample * tokens + row_M1) * H + head).to(gl.int64) * D + col_1D
    gl.store(ptr + at_MD, gl.convert_layout(x_MD.to(ptr.dtype.element_ty), layout), row_M1 < past)


@gluon.jit
def turn_of(tile):
    """Number of tiles that a program had before this one."""
    return tile // gl.num_programs(0)


@gluon.jit
def _ring_part(valid_ptr, slots, N: gl.constexpr):
    """Number of keys of a ring that are seen, 1 to `slots` whatever valid_ptr holds; and of those
    that a part has, the last one with keys excepted."""
    valid = gl.minimum(gl.maximum(gl.load(valid_ptr), 1), slots).to(gl.int32)
    return valid, gl.cdiv(gl.cdiv(valid, N), gl.num_programs(1)) * N


@gluon.jit
def _work(tile, tiles_ptr, valid_ptr, queries, slots, prefix, N: gl.constexpr,
          HAS_TABLE: gl.constexpr):  # fmt: skip
    """A tile's first query and the one past its last; and how many spans it visits. The next two
    are, under a table, the first of its own spans; of a ring, the keys of the program's part."""
    if HAS_TABLE:
        at = tiles_ptr + 4 * tile
        first = gl.load(at + 2)
        count = gl.load(at + 3) - first + prefix
        return gl.load(at), gl.load(at + 1), count, first, 0
    else:
        start = tile * (CONSUMERS * M)
        past = gl.minimum(start + CONSUMERS * M, queries)
        valid, share = _ring_part(valid_ptr, slots, N)
        lo = gl.program_id(1) * share
        hi = gl.minimum(lo + share, valid)
        return start, past, gl.where(lo < hi, 1, 0), lo, hi


@gluon.jit
def _span(i, first, last, spans_ptr, prefix, HAS_TABLE: gl.constexpr):
    """Keys lo..hi of span i of a tile; the prefix's spans come first."""
    if HAS_TABLE:
        at = spans_ptr + 2 * gl.where(i < prefix, i, first + i - prefix)
        return gl.load(at), gl.load(at + 1)
    else:
        return first, last


@gluon.jit
def _load_span(k_desc, v_desc, k_row, v_row, col, visits, n, k_pipe, v_pipe, N: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """Loads the tiles of a span, the first of which is number n of the program's, in the order in
    which they are wanted: K a tile ahead of V."""
    k_s, k_full, k_empty = k_pipe
    v_s, v_full, v_empty = v_pipe
    for i in range(visits + 1):
        if i < visits:
            at, phase = (n + i) % STAGES, ((n + i) // STAGES) & 1
            mbarrier.wait(k_empty.index(at), phase ^ 1)
            mbarrier.expect(k_full.index(at), k_desc.block_type.nbytes)
            row = k_row + i * N
            tma.async_copy_global_to_shared(k_desc, [row, col], k_full.index(at), k_s.index(at))
        if i > 0:
            at, phase = (n + i - 1) % STAGES, ((n + i - 1) // STAGES) & 1
            mbarrier.wait(v_empty.index(at), phase ^ 1)
            mbarrier.expect(v_full.index(at), v_desc.block_type.nbytes)
            row = v_row + (i - 1) * N
            tma.async_copy_global_to_shared(v_desc, [row, col], v_full.index(at), v_s.index(at))
    return n + visits


@gluon.jit
def _produce(q_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, q_pipe, k_pipe, v_pipe,
             tiles_ptr, spans_ptr, valid_ptr, tiles, queries, slots, prefix, q_rows, k_rows,
             v_rows, k_prefix_rows, v_prefix_rows, H: gl.constexpr, D: gl.constexpr,
             N: gl.constexpr, STAGES: gl.constexpr, HAS_TABLE: gl.constexpr,
             HAS_PREFIX: gl.constexpr):  # fmt: skip
    """The loading warp. What it loads beyond a tile's or a span's end is masked by the consumers;
    beyond the tensor's it is zero."""
    q_s, q_full, q_empty = q_pipe
    batch, col = gl.program_id(2) // H, gl.program_id(2) % H * D
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start, _past, count, first, last = _work(
            tile, tiles_ptr, valid_ptr, queries, slots, prefix, N, HAS_TABLE
        )
        if count > 0:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (turn_of(tile) & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                row = batch * q_rows + start + c * M
                tma.async_copy_global_to_shared(q_desc, [row, col], q_full.index(c), q_s.index(c))
        for i in range(count):
            lo, hi = _span(i, first, last, spans_ptr, prefix, HAS_TABLE)
            visits = gl.cdiv(hi - lo, N)
            if HAS_PREFIX:
                if i < prefix:
                    n = _load_span(k_prefix_desc, v_prefix_desc, batch * k_prefix_rows + lo,
                                   batch * v_prefix_rows + lo, col, visits, n, k_pipe, v_pipe,
                                   N, STAGES)  # fmt: skip
                else:
                    n = _load_span(k_desc, v_desc, batch * k_rows + lo, batch * v_rows + lo, col,
                                   visits, n, k_pipe, v_pipe, N, STAGES)  # fmt: skip
            else:
                n = _load_span(k_desc, v_desc, batch * k_rows + lo, batch * v_rows + lo, col,
                               visits, n, k_pipe, v_pipe, N, STAGES)  # fmt: skip


@gluon.jit
def _masked(s_MN, left, N: gl.constexpr):
    """Scores without columns from `left` on. V in their rows is multiplied by zero, so that it may
    be anything finite: another key, a ring's slot not written yet, or zeros."""
    col_N = gl.arange(0, N, gl.SliceLayout(0, accumulator(N)))
    return gl.where((col_N < left)[None, :], s_MN, -float("inf"))


@gluon.jit
def operand(p_MN, dtype: gl.constexpr, D: gl.constexpr):
    """Probabilities as a product's first operand, in the registers where they are."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    return gl.convert_layout(p_MN.to(dtype), layout, assert_trivial=True)


@gluon.jit
def _step(q, k_pipe, v_pipe, zero_MN, p_MN, acc_MD, m_M, l_M, n, last, left, scale,
          MASK: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """Tile n of keys, not the first for this tile of queries: P of tile n - 1 comes in, that of
    tile n goes out. `last` is the last tile's number."""
    k_s, k_full, k_empty = k_pipe
    v_s, v_full, v_empty = v_pipe
    at, before, after = n % STAGES, (n - 1) % STAGES, (n + 1) % STAGES
    # K of this tile is there: the step before waited for it.
    s_MN = warpgroup_mma(q, k_s.index(at).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    acc_MD = warpgroup_mma(p_MN, v_s.index(before), acc_MD, is_async=True)
    s_MN = warpgroup_mma_wait(1, deps=[s_MN])
    mbarrier.arrive(k_empty.index(at))
    if MASK:
        s_MN = _masked(s_MN, left, N)
    m_new_M = gl.maximum(m_M, gl.max(s_MN, 1) * scale)
    p_MN = gl.exp2(s_MN * scale - m_new_M[:, None])
    shrink_M = gl.exp2(m_M - m_new_M)
    l_M = l_M * shrink_M + gl.sum(p_MN, 1)
    # This waits for nothing, for the product with V is the only one under way. It and the branch in
    # the wait for K keep ptxas from moving the wait for that product up before the softmax.
    p_MN = warpgroup_mma_wait(1, deps=[operand(p_MN, q.dtype, D)])
    mbarrier.wait(k_full.index(after), ((n + 1) // STAGES) & 1, pred=n < last)
    acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
    mbarrier.arrive(v_empty.index(before))
    acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, accumulator(D)))[:, None]
    return p_MN, acc_MD, m_new_M, l_M


@gluon.jit
def _consume(C: gl.constexpr, q_pipe, k_pipe, v_pipe, o_ptr, lse_ptr, tiles_ptr, spans_ptr,
             valid_ptr, tiles, queries, slots, prefix, scale, H: gl.constexpr, D: gl.constexpr,
             N: gl.constexpr, STAGES: gl.constexpr, HAS_TABLE: gl.constexpr,
             O_BITS: gl.constexpr):  # fmt: skip
    """Consumer C: rows C·M to (C+1)·M of every tile of queries."""
    q_s, q_full, q_empty = q_pipe
    k_s, k_full, k_empty = k_pipe
    v_s, v_full, v_empty = v_pipe
    O_LAYOUT: gl.constexpr = accumulator(D)
    zero_MN = gl.zeros([M, N], gl.float32, accumulator(N))
    n = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start, past, count, first, end = _work(
            tile, tiles_ptr, valid_ptr, queries, slots, prefix, N, HAS_TABLE
        )
        # Of all parts, samples and heads.
        sample_head = gl.program_id(1) * gl.num_programs(2) + gl.program_id(2)
        if count > 0:
            last = n - 1
            for i in range(count):
                lo, hi = _span(i, first, end, spans_ptr, prefix, HAS_TABLE)
                last += gl.cdiv(hi - lo, N)

            # The first tile: nothing runs beside its softmax.
            lo, hi = _span(0, first, end, spans_ptr, prefix, HAS_TABLE)
            q = q_s.index(C)
            mbarrier.wait(q_full.index(C), turn_of(tile) & 1)
            mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
            k = k_s.index(n % STAGES).permute((1, 0))
            s_MN = warpgroup_mma(q, k, zero_MN, use_acc=False, is_async=True)
            s_MN = warpgroup_mma_wait(0, deps=[s_MN])
            mbarrier.arrive(k_empty.index(n % STAGES))
            s_MN = _masked(s_MN, hi - lo, N)
            m_M = gl.max(s_MN, 1) * scale
            p_MN = gl.exp2(s_MN * scale - m_M[:, None])
            l_M = gl.sum(p_MN, 1)
            p_MN = operand(p_MN, q.dtype, D)
            acc_MD = gl.zeros([M, D], gl.float32, O_LAYOUT)
            mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n < last)
            n += 1

            skip = 1
            for i in range(count):
                lo, hi = _span(i, first, end, spans_ptr, prefix, HAS_TABLE)
                whole = (hi - lo) // N
                for _ in range(skip, whole):
                    p_MN, acc_MD, m_M, l_M = _step(q, k_pipe, v_pipe, zero_MN, p_MN, acc_MD, m_M,
                                                   l_M, n, last, 0, scale,
                                                   False, D, N, STAGES)  # fmt: skip
                    n += 1
                for j in range(gl.maximum(skip, whole), gl.cdiv(hi - lo, N)):  # one at most
                    p_MN, acc_MD, m_M, l_M = _step(q, k_pipe, v_pipe, zero_MN, p_MN, acc_MD, m_M,
                                                   l_M, n, last, hi - lo - j * N, scale,
                                                   True, D, N, STAGES)  # fmt: skip
                    n += 1
                skip = 0
            mbarrier.arrive(q_empty.index(C))

            at = (n - 1) % STAGES
            mbarrier.wait(v_full.index(at), ((n - 1) // STAGES) & 1)
            acc_MD = warpgroup_mma(p_MN, v_s.index(at), acc_MD, is_async=True)
            acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
            mbarrier.arrive(v_empty.index(at))
            o_MD = acc_MD / gl.convert_layout(l_M, gl.SliceLayout(1, O_LAYOUT))[:, None]
            lse_M = gl.convert_layout(m_M + gl.log2(l_M), gl.SliceLayout(1, O_LAYOUT))
            sample, head = sample_head // H, gl.program_id(2) % H
            store_rows(o_ptr, o_MD, start + C * M, past, sample, queries, head, O_BITS, H, D)
            row_M = start + C * M + gl.arange(0, M, gl.SliceLayout(1, O_LAYOUT))
            lse_at = lse_ptr + sample_head.to(gl.int64) * queries + row_M
            gl.store(lse_at, lse_M, row_M < past)


@gluon.jit
def _join(part_ptr, lse_ptr, o_ptr, row, past, queries, parts, H: gl.constexpr,
          D: gl.constexpr):  # fmt: skip
    """Queries row..row + 4096 / D of a head: the parts' outputs, weighted by their sums of
    exponentials, in the order of the parts, whoever joins them."""
    R: gl.constexpr = 4096 // D
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    batch, head = gl.program_id(2) // H, gl.program_id(2) % H
    step = gl.num_programs(2).to(gl.int64) * queries  # of a part
    row_R = row + gl.arange(0, R, gl.SliceLayout(1, layout))
    lse_at = lse_ptr + gl.program_id(2).to(gl.int64) * queries + row_R
    at_R1 = ((batch * queries + row_R) * H + head).to(gl.int64)[:, None] * D
    at_RD = at_R1 + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    fits_R1 = (row_R < past)[:, None]
    most_R = gl.full([R], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    for part in range(parts):
        most_R = gl.maximum(most_R, gl.load(lse_at + part * step, row_R < past, 0.0))
    acc_RD = gl.zeros([R, D], gl.float32, layout)
    sum_R = gl.zeros([R], gl.float32, gl.SliceLayout(1, layout))
    for part in range(parts):
        weight_R = gl.exp2(gl.load(lse_at + part * step, row_R < past, 0.0) - most_R)
        acc_RD += weight_R[:, None] * gl.load(part_ptr + part * step * D + at_RD, fits_R1, 0.0)
        sum_R += weight_R
    o_RD = (acc_RD / sum_R[:, None]).to(o_ptr.dtype.element_ty)
    gl.store(o_ptr + at_RD, o_RD, fits_R1)


@gluon.jit
def _hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    k_prefix_desc,
    v_prefix_desc,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    spans_ptr,
    valid_ptr,
    part_ptr,
    semaphores_ptr,
    tiles,
    queries,
    slots,
    prefix,
    q_rows,
    k_rows,
    v_rows,
    k_prefix_rows,
    v_prefix_rows,
    scale,
    stride_valid,
    H: gl.constexpr,
    D: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_PREFIX: gl.constexpr,
    HAS_PARTS: gl.constexpr,
):
    """Attention of tiles of queries. Descriptors are of rows [B·stride_b/stride_l, H·D], and *_rows
    says how many of them a sample is apart from the next. The grid is (programs that share the
    tiles, parts, B · H): those of a head run side by side, so that its keys are read from L2. o
    [B, L, H, D], lse [parts, B, H, L]. HAS_PARTS: of the programs that share a tile each leaves its
    output in part [parts, B, L, H, D], and the last of them to end joins these."""
    if not HAS_TABLE:
        valid_ptr += gl.program_id(2) // H * stride_valid
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, M, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    q_pipe, k_pipe, v_pipe = (q_s, q_full, q_empty), (k_s, k_full, k_empty), (v_s, v_full, v_empty)
    out_ptr = part_ptr if HAS_PARTS else o_ptr
    O_BITS: gl.constexpr = 32 if HAS_PARTS else 16
    gl.warp_specialize(
        [
            (_consume, (0, q_pipe, k_pipe, v_pipe, out_ptr, lse_ptr, tiles_ptr, spans_ptr,
                        valid_ptr, tiles, queries, slots, prefix, scale, H, D, N, STAGES,
                        HAS_TABLE, O_BITS)),
            (_consume, (1, q_pipe, k_pipe, v_pipe, out_ptr, lse_ptr, tiles_ptr, spans_ptr,
                        valid_ptr, tiles, queries, slots, prefix, scale, H, D, N, STAGES,
                        HAS_TABLE, O_BITS)),
            (_produce, (q_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, q_pipe, k_pipe,
                        v_pipe, tiles_ptr, spans_ptr, valid_ptr, tiles, queries, slots, prefix,
                        q_rows, k_rows, v_rows, k_prefix_rows, v_prefix_rows, H, D, N, STAGES,
                        HAS_TABLE, HAS_PREFIX)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    if HAS_PARTS:
        valid, share = _ring_part(valid_ptr, slots, N)
        parts = gl.cdiv(valid, share)
        if gl.program_id(1) < parts:  # else it has no keys
            # All threads have stored before the one that counts releases what it sees of them.
            thread_barrier()
            for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
                first = tile * (CONSUMERS * M)
                at = gl.program_id(2) * gl.cdiv(queries, SEMAPHORES) + first // SEMAPHORES
                counted = gl.atomic_add(semaphores_ptr + at, 1, sem="acq_rel", scope="gpu")
                if counted == parts - 1:
                    past = gl.minimum(first + CONSUMERS * M, queries)
                    for row in range(first, past, 4096 // D):
                        _join(part_ptr, lse_ptr, o_ptr, row, past, queries, parts, H, D)
                    gl.store(semaphores_ptr + at, 0)


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
    setting = hopper_setting("hopper_fwd", q_BLHD)
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
    """o as `sfkernels.gpu.ring_attention` gives it; slots that are not valid hold anything finite,
    as a RingKVCache sees to when it is made and reset. Raises ValueError for tensors that TMA
    cannot read."""
    setting = hopper_setting("hopper_fwd", q_BLHD)
    work, o_BLHD, lse_PBHL = ring_work(setting, q_BLHD, k_ring_BSHD, valid, semaphores)
    sources = k_ring_BSHD, v_ring_BSHD, None, None
    _launch_forward(setting, q_BLHD, sources, o_BLHD, lse_PBHL, work, scale)
    return o_BLHD


def _launch_forward(
    setting: launch.Tile,
    q_BLHD: Tensor,
    sources: Sources,
    o_BLHD: Tensor,
    lse: Tensor,
    work: Work,
    scale: float,
) -> None:
    (batch, queries, heads, _), k_BSHD = q_BLHD.shape, sources[0]
    assert k_BSHD is not None
    names = ("q", "k", "v", "prefix k", "prefix v")
    boxes = (M.value, *[setting.streamed] * 4)
    described = [describe(*one) for one in zip(names, (q_BLHD, *sources), boxes, strict=True)]
    descriptors, apart = zip(*described, strict=True)
    programs = programs_of(setting, q_BLHD.device, work.tiles, work.parts * batch * heads)
    launch_specialised(
        _hopper_fwd_kernel,
        setting,
        (programs, work.parts, batch * heads),
        (
            *(*descriptors, o_BLHD, lse, *work.tables, work.valid, *work.joining),
            *(work.tiles, queries, k_BSHD.shape[1], work.prefix, *apart, scale * LOG2E),
            launch.of_sample(work.valid, 1),
        ),
        q_BLHD,
        HAS_TABLE=work.valid is None,
        HAS_PREFIX=work.prefix > 0,
        HAS_PARTS=work.parts > 1,
    )
