"""The backward pass of attention for Hopper in Gluon, under a pattern of rows and spans (tiles.py),
with the same bits in every run, any prefix and heads of 64 too; fused_backward.py has a faster one.

Shapes: B batch, H heads, D head dim, L queries, S keys, P keys of the prefix, M tokens that a
consumer keeps (queries or keys), N tokens of a tile that it visits (keys or queries). Logarithms
are of base 2: lse = log2 Σ exp2(scale·log2(e)·q·k).

    P = exp2(scale·log2(e)·Q·Kᵀ - lse)    dP = dO·Vᵀ    dS = P ∘ (dP - delta), delta = Σ do·o
    dV = Pᵀ·dO    dK = scale·dSᵀ·Q    dQ = scale·dS·K

Two kernels, so that every sum has one owner: no atomics, and the same gradients in every run. One
keeps keys and visits queries (dK and dV, four products), one keeps queries and visits keys (dQ,
three products). Both are the scheme of attention.py: one warp loads by TMA, two warpgroups of 64
kept tokens each compute; mbarriers say which buffers of a ring are full, named barriers which are
free again. The list of work (work.py) has whole tiles alone, of one head after the other, so that
what programs visit is read from L2.

The kept tile is the left operand of S and dP, from shared memory, and P and dS that of the other
products, from the registers in which they were computed. A left operand from shared memory is read
again for every tile: with Q there the dQ kernel would read 80 KB and write 16 KB for every tile and
consumer, all that shared memory moves (128 bytes a clock) in the 768 clocks of its three products.
It keeps Q in registers, which leaves 80 of 96 KB; the other kernel moves 120 of 128 KB.

    dK, dV: issue S = K·Qᵀ, dP = V·dOᵀ | P beside dP | issue dV += P·dO | dS beside dV | dK += dS·Q
    dQ: issue S = Q·Kᵀ, dP = dO·Vᵀ, dQ += dS·K of the tile before | P beside both | dS beside dQ

Only the last tile of a visited span is masked. Where queries are visited the loader does it: it
gives queries past the end an lse of +inf, hence P = 0, and a delta of 0. It copies lse and delta
with ordinary loads, since TMA needs starts that are multiples of 16 bytes and a span may start
anywhere. Where keys are visited a branch that whole tiles do not take sets P to 0. In both, what
lies past the end of a span is multiplied by zero: other tokens of a tensor, whose samples lie side
by side (launching.py).

Floating-point operations for each query and key that meet: 10·D·H are needed (five products) and
14·D·H done, as both kernels compute S and dP. One layer of Wan2.1-1.3B (12 heads of 128) over a
clip of 21 frames in chunks of 3 (32,760 tokens, 0.61 G pairs): 9.4 TFLOP needed, 13.2 done, 16.7 ms
at the 790 TFLOP/s that an H200 multiplies matrices. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sfkernels.gpu.attention import LOG2E
from sfkernels.gpu.attention_backward import row_delta
from sfkernels.gpu.hopper import hardware
from sfkernels.gpu.hopper.backward_loading import (
    FREE,
    Named,
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
from sfkernels.gpu.hopper.fused_backward import fused_backward
from sfkernels.gpu.hopper.launching import (
    ALL,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    M,
    describe,
    hopper_setting,
    launch_specialised,
    seen_of,
    side_by_side,
)
from sfkernels.gpu.hopper.registers import accumulator, operand, store_rows
from sfkernels.gpu.hopper.work import list_of
from sfkernels.gpu.tiles import Pattern
from sfkernels.layout import Row, Span, transpose


@gluon.jit
def _consume_queries(c: gl.constexpr, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys,
                     scale, scale_log2, kept, ring, stats, H: gl.constexpr, D: gl.constexpr,
                     N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """dK and dV of the c-th M keys of every tile."""
    k_s, v_s, kept_full, kept_empty = kept
    q_s, _do_s, _full = ring
    SCORE: gl.constexpr = accumulator(N)
    OUT: gl.constexpr = accumulator(D)
    zero_MN = gl.zeros([M, N], gl.float32, SCORE)
    done = 0
    begin, end = items_of(begins_ptr)
    for item in range(begin, end):
        first, past, head, first_span, past_span = item_of(items_ptr, item)
        # Counted here: the loop over tiles has no registers left for one over spans around it.
        count = tiles_of(first_span, past_span, spans_ptr, N)
        dk_MD = gl.zeros([M, D], gl.float32, OUT)
        dv_MD = gl.zeros([M, D], gl.float32, OUT)
        mbarrier.wait(kept_full.index(c), (item - begin) & 1)
        for t in range(done, done + count):
            slot = t % STAGES
            q_ND = q_s.index(slot)
            ds_MN, dv_MD = visit_queries(k_s.index(c), v_s.index(c), zero_MN, dv_MD, t, scale_log2,
                                         ring, stats, D, N, STAGES)  # fmt: skip
            dk_MD = warpgroup_mma(operand(ds_MN, q_s.dtype, D), q_ND, dk_MD, is_async=True)
            dk_MD, dv_MD = warpgroup_mma_wait(0, deps=[dk_MD, dv_MD])
            hardware.arrive(FREE + slot, 4, ALL)
        mbarrier.arrive(kept_empty.index(c), count=1)
        done += count
        first, past, head, _first_span, _past_span = item_of(items_ptr, item)
        at = start_of(head, keys, H, D)
        store_rows(dv_ptr + at, dv_MD, first + c * M, past, H * D, 16, D)
        store_rows(dk_ptr + at, dk_MD * scale, first + c * M, past, H * D, 16, D)


@gluon.jit
def _consume_keys(c: gl.constexpr, dq_ptr, lse_ptr, delta_ptr, begins_ptr, items_ptr, spans_ptr,
                  queries, scale, scale_log2, kept, ring, H: gl.constexpr,
                  D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """dQ of the c-th M queries of every tile."""
    q_s, do_s, kept_full, kept_empty = kept
    k_s, v_s, full = ring
    SCORE: gl.constexpr = accumulator(N)
    OUT: gl.constexpr = accumulator(D)
    zero_MN = gl.zeros([M, N], gl.float32, SCORE)
    row_M = gl.arange(0, M, gl.SliceLayout(1, SCORE))
    col_N = gl.arange(0, N, gl.SliceLayout(0, SCORE))
    t = 0
    begin, end = items_of(begins_ptr)
    for item in range(begin, end):
        first, past, head, first_span, past_span = item_of(items_ptr, item)
        first += c * M
        at_M = head * queries + first + row_M
        lse_M = gl.load(lse_ptr + at_M, first + row_M < past, 0.0)
        delta_M = gl.load(delta_ptr + at_M, first + row_M < past, 0.0)
        dq_MD = gl.zeros([M, D], gl.float32, OUT)
        # There is no tile before the first: zeros, which multiply the first one's own keys.
        ds_MN = operand(zero_MN, q_s.dtype, D)
        began = t
        mbarrier.wait(kept_full.index(c), (item - begin) & 1)
        q_MD = q_s.index(c).load(gl.DotOperandLayout(0, SCORE, 2))
        for i in range(first_span, past_span):
            lo, hi = span_of(spans_ptr, i)
            for start in range(lo, hi, N):
                slot, before = t % STAGES, gl.maximum(t - 1, began) % STAGES
                mbarrier.wait(full.index(slot), t // STAGES & 1)
                k_DN, v_DN = k_s.index(slot).permute((1, 0)), v_s.index(slot).permute((1, 0))
                s_MN = warpgroup_mma(q_MD, k_DN, zero_MN, use_acc=False, is_async=True)
                dp_MN = warpgroup_mma(do_s.index(c), v_DN, zero_MN, use_acc=False, is_async=True)
                dq_MD = warpgroup_mma(ds_MN, k_s.index(before), dq_MD, is_async=True)
                s_MN = warpgroup_mma_wait(2, deps=[s_MN])
                p_MN = gl.exp2(s_MN * scale_log2 - lse_M[:, None])
                if start + N > hi:
                    p_MN = gl.where((start + col_N < hi)[None, :], p_MN, 0.0)
                # The waits for P and dS wait for nothing. They and the branch of the next wait,
                # which passes at once, keep ptxas from moving the last wait up before dS.
                p_MN = warpgroup_mma_wait(2, deps=[p_MN])
                dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])
                dp_MN = warpgroup_mma_wait(1, deps=[p_MN * (dp_MN - delta_M[:, None])])
                mbarrier.wait(full.index(slot), t // STAGES & 1)
                dq_MD, dp_MN = warpgroup_mma_wait(0, deps=[dq_MD, dp_MN])
                # Into the registers that the product has read.
                ds_MN = operand(dp_MN, q_s.dtype, D)
                if t > began:
                    hardware.arrive(FREE + before, 4, ALL)
                t += 1
        mbarrier.arrive(kept_empty.index(c), count=1)
        if t > began:
            last = (t - 1) % STAGES
            dq_MD = warpgroup_mma(ds_MN, k_s.index(last), dq_MD, is_async=True)
            dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])
            hardware.arrive(FREE + last, 4, ALL)
        at = start_of(head, queries, H, D)
        store_rows(dq_ptr + at, dq_MD * scale, first, past, H * D, 16, D)


@gluon.jit(do_not_specialize=["queries", "keys", "q_rows", "do_rows", "k_rows", "v_rows"])
def _hopper_dkdv_kernel(q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
                        begins_ptr, items_ptr, spans_ptr, queries, keys, scale, scale_log2,
                        q_rows, do_rows, k_rows, v_rows, H: gl.constexpr, D: gl.constexpr,
                        N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    kept, ring, stats = prepare(k_desc, q_desc, D, N, STAGES, True, 1)
    gl.warp_specialize([
        (_consume_queries, (0, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys, scale,
                            scale_log2, kept, ring, stats, H, D, N, STAGES)),
        (_consume_queries, (1, dk_ptr, dv_ptr, begins_ptr, items_ptr, spans_ptr, keys, scale,
                            scale_log2, kept, ring, stats, H, D, N, STAGES)),
        (load_tiles, (k_desc, v_desc, q_desc, do_desc, q_desc, do_desc, lse_ptr, delta_ptr,
                      begins_ptr, items_ptr, spans_ptr, 0, queries, k_rows, v_rows, q_rows,
                      do_rows, 0, 0, kept, ring, stats, H, D, N, STAGES, True, False)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "prefix",
        "queries",
        "do_rows",
        "q_rows",
        "k_rows",
        "v_rows",
        "k_prefix_rows",
        "v_prefix_rows",
    ]
)
def _hopper_dq_kernel(q_desc, do_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, lse_ptr,
                      delta_ptr, dq_ptr, begins_ptr, items_ptr, spans_ptr, prefix, queries, scale,
                      scale_log2, q_rows, do_rows, k_rows, v_rows, k_prefix_rows, v_prefix_rows,
                      H: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
                      HAS_PREFIX: gl.constexpr):  # fmt: skip
    kept, ring, stats = prepare(q_desc, k_desc, D, N, STAGES, False, 1)
    gl.warp_specialize([
        (_consume_keys, (0, dq_ptr, lse_ptr, delta_ptr, begins_ptr, items_ptr, spans_ptr,
                         queries, scale, scale_log2, kept, ring, H, D, N, STAGES)),
        (_consume_keys, (1, dq_ptr, lse_ptr, delta_ptr, begins_ptr, items_ptr, spans_ptr,
                         queries, scale, scale_log2, kept, ring, H, D, N, STAGES)),
        (load_tiles, (q_desc, do_desc, k_desc, v_desc, k_prefix_desc, v_prefix_desc, lse_ptr,
                      delta_ptr, begins_ptr, items_ptr, spans_ptr, prefix, 0, q_rows, do_rows,
                      k_rows, v_rows, k_prefix_rows, v_prefix_rows, kept, ring, stats, H, D, N,
                      STAGES, False, HAS_PREFIX)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def _readable(do_BLHD: Tensor) -> Tensor:
    try:
        describe("do", do_BLHD, M.value)
    except ValueError:
        return do_BLHD.contiguous()
    return do_BLHD


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
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. The prefix gets no gradient. deterministic: the same bits in every run. Raises
    ValueError for tensors that TMA cannot read; do, to which autograd may give any strides, is
    copied instead."""
    queries, keys = q_BLHD.shape[1], k_BSHD.shape[1]
    do_BLHD = _readable(do_BLHD)
    delta_BHL = row_delta(do_BLHD, o_BLHD)
    do_BLHD, q_BLHD, k_BSHD, v_BSHD = map(side_by_side, (do_BLHD, q_BLHD, k_BSHD, v_BSHD))
    if not deterministic and not prefix and q_BLHD.shape[3] == 128:
        return fused_backward(do_BLHD, q_BLHD, k_BSHD, v_BSHD, lse_BHL, delta_BHL, rows, scale)
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BLHD, k_BSHD, v_BSHD)
    )
    by_query: list[Named] = [("q", q_BLHD), ("do", do_BLHD)]
    by_key: list[Named] = [("k", k_BSHD), ("v", v_BSHD)]

    setting = hopper_setting("hopper_dkdv", q_BLHD)
    columns = transpose([Row(*row) for row in rows], keys)
    work = list_of(q_BLHD, setting, columns, whole=True)
    descs, apart = describe_both(by_query, setting.streamed, by_key, M.value)
    args = (*descs, lse_BHL, delta_BHL, dk, dv, *work.tables, queries, keys)
    launch_specialised(_hopper_dkdv_kernel, setting, (work.programs,),
                       (*args, scale, scale * LOG2E, *apart), q_BLHD)  # fmt: skip

    setting = hopper_setting("hopper_dq", q_BLHD)
    before = prefix[-1][1] if prefix else 0
    work = list_of(q_BLHD, setting, rows, prefix, before, whole=True)
    past = (seen_of(t, prefix) for t in (k_prefix_BPHD, v_prefix_BPHD))
    by_key += [*zip(("prefix k", "prefix v"), past, strict=True)]
    descs, apart = describe_both(by_query, M.value, by_key, setting.streamed)
    args = (*descs, lse_BHL, delta_BHL, dq, *work.tables, before, queries)
    launch_specialised(_hopper_dq_kernel, setting, (work.programs,),
                       (*args, scale, scale * LOG2E, *apart), q_BLHD,
                       HAS_PREFIX=before > 0)  # fmt: skip
    return dq, dk, dv
