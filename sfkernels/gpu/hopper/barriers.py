"""Named barriers, of which a program has 16 and Gluon has none: partitions meet, or one says that
it is done without waiting, in one instruction a warp. An mbarrier's arrival costs a meeting of all
warps of the partition first."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton takes 0 and 2 for the consumers, 1 to start and end partitions, 3 for the loading warp.
FIRST = gl.constexpr(4)


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
    """Arrives at a barrier with all `warps` of this partition and waits for `threads` in all."""
    _each_thread("sync", barrier, warps, threads)


@gluon.jit
def arrive(barrier, warps: gl.constexpr, threads: gl.constexpr):
    """Arrives at a barrier of `threads` in all, each warp by itself, and waits for nobody."""
    _each_thread("arrive", barrier, warps, threads)
