"""Parts of Hopper that Gluon lacks: named barriers, and adding to global memory by TMA."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

# A program has 16 named barriers, at which each warp arrives by itself in one instruction; an
# mbarrier's arrival costs a meeting of all warps of the partition first. Triton takes 0 and 2 for
# the consumers, 1 to start and end partitions, 3 and 4 for other partitions.
FIRST = gl.constexpr(5)


@gluon.constexpr_function
def _instruction(name, threads):
    return f"mov.b32 $0, $1; bar.{name} $1, {threads};"


@gluon.jit
def _each_thread(name: gl.constexpr, barrier, warps: gl.constexpr, threads: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    barrier_T = gl.full([32 * warps], barrier, gl.int32, layout)
    asm: gl.constexpr = _instruction(name, threads)
    gl.inline_asm_elementwise(asm, "=r,r", [barrier_T], gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(barrier, warps: gl.constexpr, threads: gl.constexpr):
    """Arrives at a named barrier with all `warps` of this partition and waits for `threads` in
    all."""
    _each_thread("sync", barrier, warps, threads)


@gluon.jit
def arrive(barrier, warps: gl.constexpr, threads: gl.constexpr):
    """Arrives at a named barrier of `threads` in all, each warp by itself, and waits for nobody."""
    _each_thread("arrive", barrier, warps, threads)


@builtin
def add_to_global(tensor_desc, coord, source, _semantic=None):
    """Adds a tile of shared memory to global memory by TMA, in no order; `tma.store_wait` waits
    until the tile has been read."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, source.handle
    )
