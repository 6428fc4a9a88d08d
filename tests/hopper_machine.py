"""The hardware of tests/hopper_emulator.py: partitions, mbarriers, shared memory, wgmma in flight,
and the clocks by which races are seen."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class HopperError(Exception):
    """A kernel broke a rule of the hardware."""


class _Stopped(Exception):
    """Another partition failed."""


Clock = dict[object, int]  # of each partition or copy, up to where its past is known


def _join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


class Partition:
    """A thread. ready: whether it can go on. speed: how likely it is to. clock: what it knows to
    have happened; its own entry counts its arrivals."""

    def __init__(self, speed: float, known: Clock) -> None:
        self.speed = speed
        self.clock: Clock = {**known, self: 1}
        self.stores: list[Store] = []  # to global memory, that no barrier has come after
        self.ready: Callable[[], bool] = lambda: True
        self.wake = threading.Semaphore(0)
        self.groups: list[InFlight] = []  # wgmma not waited for, oldest first
        self.unfenced: list[Access] = []  # stores to shared memory that no fence has come after
        self.adding: list[tuple[Copy, Access]] = []  # tiles that leave by TMA, not waited for

    def store(self) -> Store:
        """Stores to global memory."""
        store = Store(self)
        self.stores.append(store)
        return store

    def fence(self) -> None:
        """Lets TMA and wgmma see what this partition has stored to shared memory."""
        while self.unfenced:
            self.unfenced.pop().fenced = True

    def order_stores(self) -> None:
        """Waits for all threads: what they have stored, each of them knows."""
        while self.stores:
            self.stores.pop().tick = self.clock[self]

    def acquire_and_release(self, released: Clock) -> None:
        """Learns what others have released there, and releases what this one knows."""
        _join(self.clock, released)
        _join(released, self.clock)
        self.clock[self] += 1


class Store:
    """A store to global memory; one that not all threads of its partition know of has no tick."""

    def __init__(self, actor: Partition, tick: float = math.inf) -> None:
        self.actor, self.tick = actor, tick

    def seen(self) -> bool:
        """Tells whether the partition that runs may read what was stored."""
        return self.tick <= Program.running.current.clock.get(self.actor, 0)


class Copy(NamedTuple):
    """A tile on its way by TMA."""

    speed: float
    land: Callable[[], None]


class Program:
    """One program of a grid: its partitions, and what is on its way to shared memory. running: the
    one that runs now."""

    running: ClassVar[Program]

    def __init__(self, place: Sequence[int], grid: Sequence[int], rng: random.Random) -> None:
        self.place, self.grid, self.rng = place, grid, rng
        self.current = Partition(self.speed(), {})
        self.partitions = [self.current]
        self.copies: list[Copy] = []
        self.barriers: dict[int, NamedBarrier] = {}
        self.shared = 0
        self.failure: Exception | None = None

    def speed(self) -> float:
        """Draws a speed. Some partitions are much slower than others, which then run as far ahead
        as they are let."""
        return self.rng.choice((0.01, 1.0))

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on; returns when `ready()` holds and the draw falls on this one."""
        me = self.current
        me.ready = ready
        self._go_on()
        me.wake.acquire()
        if self.failure:
            raise _Stopped

    def _go_on(self) -> None:
        while not self.failure:
            able: list[Partition | Copy] = [p for p in self.partitions if p.ready()]
            able += self.copies
            if not able:
                self.fail(HopperError("deadlock: every partition waits"))
                return
            chosen = self.rng.choices(able, [a.speed for a in able])[0]
            if isinstance(chosen, Partition):
                self.current = chosen
                chosen.wake.release()
                return
            self.copies.remove(chosen)
            chosen.land()

    def fail(self, error: Exception) -> None:
        """Stops all partitions."""
        if not self.failure:
            self.failure = error
        for partition in [*self.partitions]:
            partition.wake.release()

    def specialize(self, first: tuple[Any, ...], *others: tuple[Any, ...]) -> None:
        """The caller becomes the first partition; returns when all have ended."""
        running = [Partition(self.speed(), self.current.clock) for _ in others]
        threads = [
            threading.Thread(target=self._run, args=(partition, *work), daemon=True)
            for partition, work in zip(running, others, strict=True)
        ]
        self.partitions += running
        for thread in threads:
            thread.start()
        try:
            first[0](*first[1])
            self.pause(lambda: len(self.partitions) == 1)
        except Exception as error:
            self.fail(error)
            raise
        finally:
            for thread in threads:
                thread.join()
        for partition in running:
            partition.order_stores()
            _join(self.current.clock, partition.clock)

    @torch.inference_mode()
    def _run(self, me: Partition, function: Callable[..., None], args: Sequence[Any]) -> None:
        me.wake.acquire()
        try:
            if not self.failure:
                function(*args)
                if me.groups or me.adding:
                    raise HopperError("a partition ends with a wgmma or a tile in flight")
        except _Stopped:
            pass
        except Exception as error:
            self.fail(error)
        self.partitions.remove(me)
        self._go_on()


class Barrier:
    """An mbarrier. `pending` arrivals and `bytes` are still to come in phase number `phase`. done:
    what whoever waits for it then knows; coming: what this phase adds."""

    count = pending = bytes = phase = 0

    def __init__(self) -> None:
        self.coming: Clock = {}
        self.done: Clock = {}

    def arrive(self, count: int = 1) -> None:
        if not self.count:
            raise HopperError("an mbarrier was not initialised")
        me = Program.running.current
        _join(self.coming, me.clock)
        me.clock[me] += 1
        self.pending -= count
        if self.pending < 0:
            raise HopperError("one arrival too many at an mbarrier")
        self.settle()

    def wait(self, parity: int) -> None:
        Program.running.pause(lambda: self.phase % 2 != parity)
        _join(Program.running.current.clock, self.done)

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            _join(self.done, self.coming)


class NamedBarrier:
    """A named barrier. come_by: who has come in this phase, with so many of the `expected`
    threads."""

    expected = phase = 0

    def __init__(self) -> None:
        self.come_by: dict[Partition, int] = {}
        self.coming: Clock = {}

    def come(self, threads: int, expected: int, waits: bool) -> None:
        program = Program.running
        program.pause()
        me = program.current
        if me in self.come_by:
            raise HopperError("a partition comes twice to a named barrier before it opens")
        if self.come_by and expected != self.expected:
            raise HopperError(f"a named barrier of {self.expected} threads, and of {expected}")
        self.come_by[me], self.expected = threads, expected
        _join(self.coming, me.clock)
        me.clock[me] += 1
        phase, done = self.phase, self.coming
        if sum(self.come_by.values()) > expected:
            raise HopperError("more threads come to a named barrier than it waits for")
        if sum(self.come_by.values()) == expected:
            self.phase, self.come_by, self.coming = phase + 1, {}, {}
        if waits:
            program.pause(lambda: self.phase > phase)
            _join(program.current.clock, done)
        program.pause()


class Access:
    """A read or write of some elements lo..hi of an allocation; an unfinished one has no tick. What
    a partition stores itself is not fenced, and seen by ordinary loads alone, until it fences."""

    fenced = True

    def __init__(self, data: Tensor, actor: object, tick: float = math.inf) -> None:
        self.lo = data.storage_offset()
        self.hi = self.lo + 1 + sum((data.shape[d] - 1) * data.stride(d) for d in range(data.dim()))
        self.actor, self.tick = actor, tick

    def meets(self, other: Access) -> bool:
        return self.lo < other.hi and other.lo < self.hi

    def races(self, other: Access, clock: Clock) -> bool:
        """Tells whether `other` meets the same elements and may not be over for one who knows
        `clock`."""
        return self.meets(other) and other.tick > clock.get(other.actor, 0)


class Shared:
    """A piece of shared memory. reads, writes: what is known of those to the whole allocation."""

    def __init__(self, data: Tensor, reads: list[Access], writes: list[Access]) -> None:
        self.data, self.reads, self.writes = data, reads, writes
        self.dtype, self.shape = data.dtype, [*data.shape]

    def view(self, data: Tensor) -> Shared:
        return Shared(data, self.reads, self.writes)

    def read(self, ordinary: bool = False) -> Access:
        """Begins a read by the partition that runs: an ordinary load, or one of wgmma or TMA."""
        me = Program.running.current
        access = Access(self.data, me)
        if any(access.races(write, me.clock) for write in self.writes):
            raise HopperError("shared memory is read that nobody has waited for")
        if not ordinary and any(access.meets(w) and not w.fenced for w in self.writes):
            raise HopperError("shared memory is read by TMA or wgmma before a fence")
        self.reads.append(access)
        return access

    def write(self, actor: object, tick: int) -> Access:
        access = Access(self.data, actor, tick)
        if any(access.races(read, Program.running.current.clock) for read in self.reads):
            raise HopperError("shared memory is overwritten while it may still be read")
        for old in (self.reads, self.writes):
            old[:] = [a for a in old if not (access.lo <= a.lo and a.hi <= access.hi)]
        self.writes.append(access)
        return access

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < len(self.data):
            raise HopperError(f"buffer {int(i)} of {len(self.data)}")
        return self.view(self.data[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self.view(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self.view(self.data.permute(*order))

    def load(self, layout: Any = None) -> Tensor:
        Program.running.pause()
        self.read(ordinary=True).tick = Program.running.current.clock[Program.running.current]
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        Program.running.pause()
        me = Program.running.current
        access = self.write(me, me.clock[me])
        access.fenced = False
        me.unfenced.append(access)
        self.data.copy_(value)


class InFlight:
    """Promise of a wgmma: a result that nothing but a wait or another wgmma may take."""

    def __init__(self, compute: Callable[[], Tensor], reads: list[Access]) -> None:
        self.compute, self.reads = compute, reads
        self.value: Tensor | None = None

    def finish(self, clock: Clock) -> None:
        self.value = self.compute()
        for read in self.reads:
            read.tick = clock[read.actor]

    def __getattr__(self, name: str) -> Any:
        raise HopperError(f"a wgmma in flight is used (.{name})")

    def _used(self, *_: Any) -> Any:
        raise HopperError("a wgmma in flight is used")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = _used


class Barriers(list[Barrier]):
    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


def poison(data: Tensor) -> None:
    data.fill_(math.nan if data.is_floating_point() else torch.iinfo(data.dtype).max)
