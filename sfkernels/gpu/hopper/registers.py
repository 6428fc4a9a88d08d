"""Products in the registers of a consumer: their layouts, and what is done with them there. M rows,
D or N columns."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sfkernels.gpu.hopper.launching import M


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
def store_rows(ptr, x_MD, first, past, stride, BITS: gl.constexpr, D: gl.constexpr):
    """Rows first..past, `stride` elements apart. Addresses depend on `first` row by row: else the
    compiler computes them before the loop over items and keeps them in registers that the loop
    lacks."""
    layout: gl.constexpr = _stored(D, BITS)
    row_M1 = first + gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    col_1D = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    at_MD = row_M1.to(gl.int64) * stride + col_1D
    gl.store(ptr + at_MD, gl.convert_layout(x_MD.to(ptr.dtype.element_ty), layout), row_M1 < past)


@gluon.jit
def masked(s_MN, left, N: gl.constexpr):
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
def quarter_sums(p_MN, N: gl.constexpr):
    """Sums of a row's columns, apart for each of the four threads that have some of them."""
    return gl.sum(gl.sum(p_MN.reshape([M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def over_quarters(x_M, like_M4):
    """Numbers of rows beside their four sums."""
    layout: gl.constexpr = gl.SliceLayout(1, like_M4.type.layout)
    return gl.convert_layout(x_M, layout, assert_trivial=True)[:, None]
