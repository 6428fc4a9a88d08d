"""Runs Gluon kernels for Hopper on CPU tensors: their own source, unmodified, through the launcher.

`with emulate(seed):` takes every launch of sfkernels.launch. Of a Gluon kernel it runs the programs
of the grid one after the other, in an order that the seed draws; every warp-specialised partition
is a thread, of which one runs at a time, and at each operation that others can see the seed draws
who goes on. Other kernels go to Triton's interpreter. The rules of the hardware that are kept, each
the worst that may happen:

- mbarriers: arrival count, byte count, phase. One arrival too many is an error. A wait asks for the
  parity of a phase, as the hardware does, so that a wrong phase passes too early or never.
- Named barriers: 16, which open when so many threads have come as each of them names. A partition
  that comes twice before, or names another number, is an error, as is who is left waited for at
  the end.
- A tile that TMA adds to global memory is read at any time after, or at the last moment, when it is
  waited for.
- TMA loads poison their destination with NaN when they are issued and land at any time after it,
  in any order; what lies outside of the tensor is zero. Boxes count in full towards the bytes.
- wgmma reads its operands in shared memory at the last moment, when a wait forces it to: a buffer
  that was released too early is NaN or holds other data by then. Until then its result cannot be
  used. It may be passed on to the next wgmma as accumulator, and waits pass on what is not in
  flight and what still is.
- Whatever the seed draws, a copy into shared memory must come after all that read there, and a read
  after the copy, by arrivals and waits alone: both are checked against vector clocks.
- What a partition stores to shared memory itself, wgmma and TMA may read after a fence of its own.
- Shared memory starts as NaN and ends at 227 KiB; global memory at the end of a tensor's storage.
  No element of it is stored to twice in one launch, for the order would be left to chance. What a
  program has stored another may read after an atomic of its own that acquires what an atomic of
  the first has released, of the stores that a barrier of its threads had come after.
- Scalars are of 32 bits and wrap around, unless they are cast.
- That nobody can go on is an error, as are copies or wgmma in flight at the end.

Not modelled: layouts of registers and of shared memory (the compiler checks them), the warps and
threads of a partition (each partition acts as one), alignment of addresses, allocation of
registers, what ptxas serialises, and time.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as real_language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper as real_hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sfkernels import launch
from sfkernels.gpu.hopper import hardware, registers
from sfkernels.gpu.hopper.launching import thread_barrier
from tests.hopper_machine import (
    Barrier,
    Barriers,
    Clock,
    Copy,
    HopperError,
    InFlight,
    NamedBarrier,
    Program,
    Shared,
    Store,
    poison,
)

SHARED_BYTES = 227 * 1024


class _Descriptor:
    def __init__(self, real: TensorDescriptor) -> None:
        self.data = torch.as_strided(real.base, [*real.shape], [*real.strides])
        self.block_shape, self.layout = [*real.block_shape], real.layout
        self.dtype = real.base.dtype
        self.nbytes_per_cta = math.prod(self.block_shape) * real.base.element_size()
        self.block_type = types.SimpleNamespace(
            nbytes=self.nbytes_per_cta, shape=self.block_shape, element_ty=self.dtype
        )


class _Written(NamedTuple):
    """What a launch has written of a tensor's storage. stored: of each element, by which of
    `stores`, or -1. released: of each that atomics have added to, what these released."""

    stored: Tensor
    stores: list[Store]
    released: dict[int, Clock]


class _Pointer:
    """A pointer, or a tensor of them: elements `at` of a tensor's storage."""

    def __init__(self, memory: Tensor, at: Any, written: _Written) -> None:
        self.memory, self.at, self.written = memory, at, written
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.memory, self.at + torch.as_tensor(offset).long(), self.written)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Places of elements, those that are masked replaced by 0; and the mask."""
        at = torch.as_tensor(self.at)
        kept = torch.broadcast_to(torch.as_tensor(True if mask is None else mask), at.shape)
        at = torch.where(kept, at, 0)
        if at.min() < 0 or at.max() >= len(self.memory):
            raise HopperError("an address outside of the tensor")
        return at, kept


def _value(x: Any) -> Tensor:
    if isinstance(x, InFlight):
        assert x.value is not None, "groups finish in order"
        return x.value
    return x.data if isinstance(x, Shared) else x


def _wgmma(a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
           ) -> Any:  # fmt: skip
    if not isinstance(b, Shared):
        raise HopperError("the second operand of wgmma must lie in shared memory")

    def compute() -> Tensor:
        product = _value(a).float() @ _value(b).float()
        return product + _value(acc) if use_acc else product

    Program.running.pause()
    group = InFlight(compute, [x.read() for x in (a, b) if isinstance(x, Shared)])
    Program.running.current.groups.append(group)
    return group if is_async else _wgmma_wait(0, [group])


def _wgmma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    Program.running.pause()
    groups = Program.running.current.groups
    while len(groups) > num_outstanding:
        groups.pop(0).finish(Program.running.current.clock)
    done = [
        d.value if isinstance(d, InFlight) and d.value is not None else d
        for d in deps
    ]  # fmt: skip
    return done[0] if len(done) == 1 else tuple(done)


class _Mbarrier:
    MBarrierLayout = real_hopper.mbarrier.MBarrierLayout

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.count = bar.pending = count
        bar.bytes = bar.phase = 0

    @staticmethod
    def expect(bar: Barrier, bytes_per_cta: int, pred: Any = True) -> None:
        Program.running.pause()
        if pred:
            bar.bytes += bytes_per_cta
            bar.arrive()

    @staticmethod
    def arrive(bar: Barrier, *, count: int = 1, pred: Any = True) -> None:
        Program.running.pause()
        if pred:
            bar.arrive(count)
            Program.running.pause()

    @staticmethod
    def wait(bar: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            bar.wait(int(phase))

    @staticmethod
    def invalidate(bar: Barrier) -> None:
        bar.count = 0


class _Tma:
    @staticmethod
    def async_copy_global_to_shared(
        desc: _Descriptor, coord: Sequence[Any], bar: Barrier, result: Shared, pred: Any = True
    ) -> None:
        Program.running.pause()
        if not pred:
            return
        if [*result.data.shape] != desc.block_shape:
            raise HopperError(f"a box of {desc.block_shape} into {[*result.data.shape]}")
        starts, copy = [int(c) for c in coord], object()
        result.write(copy, 1)
        poison(result.data)

        def land() -> None:
            result.data.zero_()
            source, to = desc.data, result.data
            for dim, (start, size) in enumerate(zip(starts, desc.block_shape, strict=True)):
                lo, hi = max(start, 0), min(start + size, desc.data.shape[dim])
                source = source.narrow(dim, min(lo, hi), max(hi - lo, 0))
                to = to.narrow(dim, min(lo - start, size), max(hi - lo, 0))
            to.copy_(source)
            bar.coming[copy] = 1
            bar.bytes -= desc.nbytes_per_cta
            bar.settle()

        Program.running.copies.append(Copy(Program.running.speed(), land))
        Program.running.pause()

    @staticmethod
    def store_wait(pendings: int) -> None:
        Program.running.pause()
        me = Program.running.current
        while len(me.adding) > pendings:
            copy, read = me.adding.pop(0)
            if copy in Program.running.copies:
                Program.running.copies.remove(copy)
                copy.land()
            read.tick = me.clock[me]


def _int(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32 if abs(value) < 2**31 else torch.int64)


def _range(*bounds: Any) -> Iterator[Tensor]:
    return (_int(i) for i in builtins.range(*(int(b) for b in bounds)))


class _Language:
    """`gl`."""

    int1, int32, int64, float32 = torch.bool, torch.int32, torch.int64, torch.float32
    float16, bfloat16 = torch.float16, torch.bfloat16
    constexpr = real_language.constexpr
    static_range = staticmethod(builtins.range)
    # fmt: off
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)
    where = staticmethod(torch.where)
    program_id = staticmethod(lambda axis: _int(Program.running.place[axis]))
    num_programs = staticmethod(lambda axis: _int(Program.running.grid[axis]))
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    full = staticmethod(lambda s, value, dtype, layout=None: torch.full(s, value, dtype=dtype))
    arange = staticmethod(lambda lo, hi, layout=None: torch.arange(lo, hi, dtype=torch.int32))
    convert_layout = staticmethod(lambda value, layout, assert_trivial=False: value)
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    maximum = staticmethod(lambda a, b: torch.maximum(*map(torch.as_tensor, (a, b))))
    minimum = staticmethod(lambda a, b: torch.minimum(*map(torch.as_tensor, (a, b))))
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    # fmt: on

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("Layout"):
            raise NotImplementedError(f"the emulator has no gl.{name}")
        return getattr(real_language, name)

    @staticmethod
    def static_assert(holds: Any, message: str = "") -> None:
        assert holds, message

    @staticmethod
    def load(pointer: _Pointer, mask: Any = None, other: Any = None) -> Tensor:
        at, kept = pointer.places(mask)
        for i in pointer.written.stored[at[kept]].unique().tolist():
            if i >= 0 and not pointer.written.stores[i].seen():
                raise HopperError("global memory is read that another may not have written yet")
        found = pointer.memory[at]
        if other is None:
            other = math.nan if found.is_floating_point() else torch.iinfo(found.dtype).max
        return torch.where(kept, found, torch.as_tensor(other, dtype=found.dtype))

    @staticmethod
    def store(pointer: _Pointer, value: Any, mask: Any = None) -> None:
        at, kept = pointer.places(mask)
        value = torch.as_tensor(value).to(pointer.memory.dtype)
        if (pointer.written.stored[at[kept]] >= 0).any():
            raise HopperError("an address is stored to twice in one launch")
        pointer.written.stored[at[kept]] = len(pointer.written.stores)
        pointer.written.stores.append(Program.running.current.store())
        pointer.memory[at[kept]] = torch.broadcast_to(value, at.shape)[kept]

    @staticmethod
    def atomic_add(pointer: _Pointer, value: int, *, sem: str, scope: str) -> Tensor:
        Program.running.pause()
        before = pointer.memory[pointer.at].clone()
        pointer.memory[pointer.at] += value
        if (sem, scope) == ("acq_rel", "gpu"):
            released = pointer.written.released.setdefault(int(pointer.at), {})
            Program.running.current.acquire_and_release(released)
        return before

    @staticmethod
    def barrier() -> None:
        Program.running.current.order_stores()

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        Program.running.shared += math.prod(shape) * dtype.itemsize
        if Program.running.shared > SHARED_BYTES:
            raise HopperError(f"{Program.running.shared} bytes of shared memory")
        if isinstance(layout, _Mbarrier.MBarrierLayout):
            return Barriers(Barrier() for _ in builtins.range(shape[0]))
        data = torch.empty([*shape], dtype=dtype)
        poison(data)
        return Shared(data, [], [])

    @staticmethod
    def warp_specialize(
        partitions: Sequence[tuple[Any, ...]], warps: Sequence[int], registers: Sequence[int]
    ) -> None:
        assert len(partitions) - 1 == len(warps) == len(registers)
        Program.running.specialize(*partitions)


class _Hardware:
    """`sfkernels.gpu.hopper.hardware`."""

    @staticmethod
    def meet(barrier: Any, warps: int, threads: int) -> None:
        _Hardware._of(barrier).come(32 * warps, threads, waits=True)

    @staticmethod
    def arrive(barrier: Any, warps: int, threads: int) -> None:
        _Hardware._of(barrier).come(32 * warps, threads, waits=False)

    @staticmethod
    def add_to_global(desc: _Descriptor, coord: Sequence[Any], source: Shared) -> None:
        Program.running.pause()
        me, starts = Program.running.current, [int(c) for c in coord]

        def land() -> None:
            to, tile = desc.data, source.data
            for dim, (start, size) in enumerate(zip(starts, desc.block_shape, strict=True)):
                count = max(min(start + size, to.shape[dim]) - start, 0)
                to, tile = to.narrow(dim, start, count), tile.narrow(dim, 0, count)
            to += tile

        copy = Copy(Program.running.speed(), land)
        me.adding.append((copy, source.read()))
        Program.running.copies.append(copy)
        Program.running.pause()

    @staticmethod
    def _of(barrier: Any) -> NamedBarrier:
        if not hardware.FIRST.value <= int(barrier) < 16:
            raise HopperError(f"named barrier {int(barrier)}: must be {hardware.FIRST.value} to 15")
        return Program.running.barriers.setdefault(int(barrier), NamedBarrier())


# What a kernel's module imports from Gluon, under whatever name, and what it gets instead.
_INSTEAD = [
    (real_language, _Language()),
    (real_hopper.mbarrier, _Mbarrier),
    (real_hopper.tma, _Tma),
    (real_hopper.tma.async_copy_global_to_shared, _Tma.async_copy_global_to_shared),
    (real_hopper.fence_async_shared, lambda: Program.running.current.fence()),
    (thread_barrier, _Language.barrier),
    (hardware, _Hardware),
    (registers.over_quarters, lambda x_M, like_M4: x_M[:, None]),
    (real_hopper.warpgroup_mma, _wgmma),
    (real_hopper.warpgroup_mma_wait, _wgmma_wait),
    (real_hopper.warpgroup_mma_init, lambda value: value),
]


def _rebuilt(function: Any, worlds: dict[int, dict[str, Any]]) -> Callable[..., None]:
    """The Python function of a kernel, which sees the emulator where it would see Gluon."""
    module = function.fn.__globals__
    if id(module) not in worlds:
        world = worlds[id(module)] = {"range": _range}
        for name, value in [*module.items()]:
            ours = [ours for real, ours in _INSTEAD if value is real]
            if ours:
                world[name] = ours[0]
            elif isinstance(value, GluonJITFunction):
                world[name] = _rebuilt(value, worlds)
            elif isinstance(value, real_language.constexpr):
                world[name] = value.value
            elif name != "range":
                world[name] = value
    code = function.fn
    return types.FunctionType(
        code.__code__, worlds[id(module)], code.__name__, code.__defaults__, code.__closure__
    )


def _argument(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return _Descriptor(value)
    if isinstance(value, Tensor):
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        stored = torch.full((len(memory),), -1)
        return _Pointer(memory, value.storage_offset(), _Written(stored, [], {}))
    if isinstance(value, int) and not isinstance(value, bool):
        return _int(value)
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value


@torch.inference_mode()
def run_kernel(
    kernel: Any, grid: Sequence[int], args: Sequence[Any], rng: random.Random, **meta: Any
) -> None:
    """Runs a Gluon kernel, one program of the grid after the other."""
    names = inspect.signature(kernel.fn).parameters
    constant = {p.name for p in kernel.params if p.is_constexpr}
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in meta.items() if k in names}
    given = {k: v if k in constant else _argument(v) for k, v in given.items()}
    function = _rebuilt(kernel, {})
    grid = (*grid, 1, 1)[:3]
    for at in rng.sample(builtins.range(math.prod(grid)), math.prod(grid)):
        place = (at % grid[0], at // grid[0] % grid[1], at // grid[0] // grid[1])
        _run_program(Program(place, grid, rng), function, given)


@contextlib.contextmanager
def emulate(seed: int = 0, launches: list[str] | None = None) -> Iterator[None]:
    """Takes every launch; the same seed draws the same order of events. launches: gets the names of
    the kernels."""
    rng = random.Random(seed)

    def run(kernel: Any, grid: Sequence[int], args: Sequence[Any], **meta: Any) -> None:
        if launches is not None:
            launches.append(kernel.__name__)
        if isinstance(kernel, GluonJITFunction):
            run_kernel(kernel, grid, args, rng, **meta)
            return
        with torch.inference_mode():
            kernel[tuple(grid)](*args, **meta)

    before, launch.recorder = launch.recorder, run
    try:
        yield
    finally:
        launch.recorder = before


def _run_program(program: Program, function: Callable[..., None], given: dict[str, Any]) -> None:
    Program.running = program
    try:
        function(**given)
    except Exception as error:
        program.fail(error)
    if program.failure:
        raise program.failure
    if program.copies or program.current.groups or program.current.adding:
        raise HopperError("a program ends with copies or wgmma in flight")
    for number, barrier in program.barriers.items():
        if barrier.come_by:
            raise HopperError(f"a program ends with who came to named barrier {number} waited for")
