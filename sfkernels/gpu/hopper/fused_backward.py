"""The backward pass of attention for Hopper in Gluon in one kernel of five products, for head dim
128 and patterns without a prefix. It adds to dQ in no order: gradients differ from run to run in
their last bits. attention_backward.py has the other one, and the names of shapes.

A program keeps 128 keys and visits queries, 64 at a time. Each consumer has 64 of the keys:

    S = K·Qᵀ, dP = V·dOᵀ | P beside dP | dV += P·dO | dS beside dV | dK += dS·Q, dQ = dSᵀ·K

All but dQ are as in the kernel that keeps keys there. dQ sums over the keys of both consumers:
each puts its dS into shared memory, they meet, and each computes one half of the head dim of dQ for
all 128 keys. A warp of its own adds both halves to global memory by TMA, in float32, while dK is
under way. Two tiles of dS take turns, so that one meeting a tile of queries is enough: who is there
has read what was in the other.

Floating-point operations: 10·D·H for each query and key that meet, all needed. A tile of queries
takes 2,560 clocks of the tensor cores. Shared memory moves 384 KB meanwhile, 3,072 clocks at 128
bytes each: 64 each for S, dP and dQ, whose left operands lie there, 32 each for dV and dK, 32 to
load Q and dO, 16 for lse and delta, 16 to write dS, 64 to write dQ and to read it again. That
binds: 658 TFLOP/s at the most where products alone reach 790. To L2 go 32 KB of dQ a tile, 29 GB
for one layer of Wan2.1-1.3B (12 heads) over a clip of 21 frames in chunks of 3. The two kernels of
attention_backward.py do 14·D·H. Not measured on a GPU yet.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sfkernels.gpu.attention import LOG2E
from sfkernels.gpu.hopper import hardware
from sfkernels.gpu.hopper.backward_loading import (
    FREE,
    describe_both,
    item_of,
    items_of,
    load_tiles,
    prepare,
    span_of,
    start_of,
    tiles_of,
    visit_queries,
)
from sfkernels.gpu.hopper.launching import (
    ALL,
    BOTH,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    M,
    hopper_setting,
    launch_specialised,
    shared_layout,
)
from sfkernels.gpu.hopper.registers import accumulator, operand, store_rows
from sfkernels.gpu.hopper.work import list_of
from sfkernels.gpu.tiles import Pattern
from sfkernels.layout import Row, transpose

# Named barriers, after those of the ring's buffers: the dS of both consumers is there; and, for
# each consumer, its half of dQ is there, and has been read.
MET, SUMMED, READ = gl.constexpr(11), gl.constexpr(12), gl.constexpr(14)
# Threads of a consumer and the adding warp.
PAIR = gl.constexpr(160)


@gluon.jit
def _consume(c: gl.constexpr, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys, scale,
             scale_log2, kept, ring, stats, ds_s, dq_s, H: gl.constexpr, D: gl.constexpr,
             N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """dK and dV of the c-th M keys of every tile, and the c-th half of the columns of dQ."""
    k_s, v_s, kept_full, kept_empty = kept
    q_s, _do_s, _full = ring
    HALF: gl.constexpr = D // 2
    SCORE: gl.constexpr = accumulator(N)
    OUT: gl.constexpr = accumulator(D)
    zero_MN = gl.zeros([M, N], gl.float32, SCORE)
    zero_NE = gl.zeros([N, HALF], gl.float32, accumulator(HALF))
    row_M = gl.arange(0, M, gl.SliceLayout(1, SCORE))
    done = 0
    begin, end = items_of(begins_ptr)
    for item in range(begin, end):
        first, past, head, first_span, past_span = item_of(items_ptr, item)
        rest = past - first - c * M
        count = tiles_of(first_span, past_span, spans_ptr, N)
        dk_MD = gl.zeros([M, D], gl.float32, OUT)
        dv_MD = gl.zeros([M, D], gl.float32, OUT)
        mbarrier.wait(kept_full.index(c), (item - begin) & 1)
        for t in range(done, done + count):
            slot = t % STAGES
            q_ND = q_s.index(slot)
            ds_MN, dv_MD = visit_queries(k_s.index(c), v_s.index(c), zero_MN, dv_MD, t, scale_log2,
                                         ring, stats, D, N, STAGES)  # fmt: skip
            if rest < M:  # keys of others, or none, come after the last ones
                ds_MN = gl.where((row_M < rest)[:, None], ds_MN, 0.0)
            ds_MN = ds_MN.to(q_s.dtype)
            ds_s.index(t % 2 * CONSUMERS + c).store(ds_MN)
            fence_async_shared()
            hardware.meet(MET, 4, BOTH)
            dq_NE = zero_NE
            for other in gl.static_range(CONSUMERS):
                ds_NM = ds_s.index(t % 2 * CONSUMERS + other).permute((1, 0))
                k_ME = k_s.index(other).slice(c * HALF, HALF, dim=1)
                dq_NE = warpgroup_mma(ds_NM, k_ME, dq_NE, use_acc=other > 0, is_async=True)
            dk_MD = warpgroup_mma(operand(ds_MN, q_s.dtype, D), q_ND, dk_MD, is_async=True)
            dv_MD, dq_NE = warpgroup_mma_wait(1, deps=[dv_MD, dq_NE])
            if t > 0:
                hardware.meet(READ + c, 4, PAIR)
            dq_s.index(c).store(dq_NE)
            fence_async_shared()
            hardware.arrive(SUMMED + c, 4, PAIR)
            dk_MD = warpgroup_mma_wait(0, deps=[dk_MD])
            hardware.arrive(FREE + slot, 4, ALL)
        for other in gl.static_range(CONSUMERS):  # both have read both tiles of K
            mbarrier.arrive(kept_empty.index(other), count=1)
        done += count
        first, past, head, _first_span, _past_span = item_of(items_ptr, item)
        at = start_of(head, keys, H, D)
        store_rows(dv_ptr + at, dv_MD, first + c * M, past, H * D, 16, D)
        store_rows(dk_ptr + at, dk_MD * scale, first + c * M, past, H * D, 16, D)
    if done > 0:
        hardware.meet(READ + c, 4, PAIR)


@gluon.jit
def _add(dq_desc, begins_ptr, items_ptr, spans_ptr, queries, dq_s, H: gl.constexpr,
         D: gl.constexpr, N: gl.constexpr):  # fmt: skip
    """The adding warp: both halves of each tile of dQ to those that are there."""
    begin, end = items_of(begins_ptr)
    for item in range(begin, end):
        _first, _past, head, first_span, past_span = item_of(items_ptr, item)
        batch, col = head // H, head % H * D
        for i in range(first_span, past_span):
            lo, hi = span_of(spans_ptr, i)
            for start in range(lo, hi, N):
                for c in gl.static_range(CONSUMERS):
                    hardware.meet(SUMMED + c, 1, PAIR)
                    at = [batch * queries + start, col + c * (D // 2)]
                    hardware.add_to_global(dq_desc, at, dq_s.index(c))
                for c in gl.static_range(CONSUMERS):
                    tma.store_wait(CONSUMERS - 1 - c)
                    hardware.arrive(READ + c, 1, PAIR)


@gluon.jit(do_not_specialize=["queries", "keys", "q_rows", "do_rows", "k_rows", "v_rows"])
def _hopper_bwd_kernel(q_desc, do_desc, k_desc, v_desc, dq_desc, lse_ptr, delta_ptr, dk_ptr,
                       dv_ptr, begins_ptr, items_ptr, spans_ptr, queries, keys, scale, scale_log2,
                       q_rows, do_rows, k_rows, v_rows, H: gl.constexpr, D: gl.constexpr,
                       N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    kept, ring, stats = prepare(k_desc, q_desc, D, N, STAGES, True, CONSUMERS)
    dtype: gl.constexpr = q_desc.dtype
    ds_s = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, M, N], q_desc.layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [CONSUMERS, N, D // 2], dq_desc.layout)
    gl.warp_specialize([
        (_consume, (0, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys, scale, scale_log2,
                    kept, ring, stats, ds_s, dq_s, H, D, N, STAGES)),
        (_consume, (1, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys, scale, scale_log2,
                    kept, ring, stats, ds_s, dq_s, H, D, N, STAGES)),
        (load_tiles, (k_desc, v_desc, q_desc, do_desc, q_desc, do_desc, lse_ptr, delta_ptr,
                      begins_ptr, items_ptr, spans_ptr, 0, queries, k_rows, v_rows, q_rows,
                      do_rows, 0, 0, kept, ring, stats, H, D, N, STAGES, True, False)),
        (_add, (dq_desc, begins_ptr, items_ptr, spans_ptr, queries, dq_s, H, D, N)),
    ], [4, 1, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def fused_backward(
    do_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    lse_BHL: Tensor,
    delta_BHL: Tensor,
    rows: Pattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; do as TMA can read it. Raises ValueError for tensors that TMA cannot read."""
    (batch, queries, heads, head_dim), keys = q_BLHD.shape, k_BSHD.shape[1]
    setting = hopper_setting("hopper_bwd", q_BLHD)
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BLHD, k_BSHD, v_BSHD)
    )
    sum_BLHD = q_BLHD.new_zeros(q_BLHD.shape, dtype=torch.float32)
    flat, box = sum_BLHD.view(batch * queries, heads * head_dim), [setting.streamed, head_dim // 2]
    dq_desc = TensorDescriptor.from_tensor(flat, box, shared_layout(*box, torch.float32))
    work = list_of(q_BLHD, setting, transpose([Row(*row) for row in rows], keys), whole=True)
    by_query, by_key = (("q", q_BLHD), ("do", do_BLHD)), (("k", k_BSHD), ("v", v_BSHD))
    descs, apart = describe_both(by_query, setting.streamed, by_key, M.value)
    launch_specialised(
        _hopper_bwd_kernel,
        setting,
        (work.programs,),
        (
            *(*descs, dq_desc, lse_BHL, delta_BHL, dk, dv, *work.tables, queries, keys),
            *(scale, scale * LOG2E, *apart),
        ),
        q_BLHD,
    )
    return torch.mul(sum_BLHD, scale, out=dq), dk, dv
