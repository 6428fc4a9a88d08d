"""Fair times of functions that do the same: in turn, on rotating inputs, without launch overhead.

On CUDA each becomes one CUDA graph that runs it over K sets of inputs, together larger than three
L2 caches, so that each run finds its inputs in device memory. The graphs are replayed in turn,
round by round, so that all meet the same clocks. What Python's launches add is timed apart.
On CPU the same in wall-clock time. A profiler sees each as an NVTX range.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sfmodel import graphs, ranges
from sfmodel.graphs import reason as reason

ROUNDS = 30
LAUNCHED_ROUNDS = 5
FEWEST = 3  # rounds, whatever they take
COLD_BYTES = 256 * 2**20  # more than three L2 caches of any GPU here
MATMUL = 8192  # rows and columns of the product that is the ceiling
LARGE_COPY = 2**31  # bytes read and written
WRONG = "wrong, not timed"

T = TypeVar("T")
Sets = Sequence[Sequence[Tensor]]  # of inputs, or of the gradients of outputs


@dataclass
class Implementation:
    """One of several functions that do the same. forward: called with one set of inputs. upstream:
    for each set the gradients of its outputs; where given, the backward pass alone is timed, and
    forward must return its outputs as a sequence. context: what to run it in."""

    name: str
    forward: Callable[..., Any]
    upstream: Sets | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass
class Timing:
    """Milliseconds of one call. spread: interquartile range of the rounds / median. launched: the
    median where Python launches each call, as p50 and p99 on CUDA are those of a graph. peak_mib:
    the most device memory that a call takes beside its inputs, for a backward pass its forward
    pass included. note: what was not as planned, else empty. rounds: timed."""

    p50: float
    p99: float
    spread: float = 0.0
    launched: float | None = None
    peak_mib: float | None = None
    note: str = ""
    rounds: int = 0


class Ready(NamedTuple):
    """An implementation over all sets of inputs. run: what is timed; launched: the same from
    Python, where that is something else."""

    run: Callable[[], object]
    launched: Callable[[], object] | None = None
    note: str = ""


def count_sets(nbytes: int, device: torch.device) -> int:
    """The number of sets of inputs of `nbytes` bytes that leave nothing of the first in cache."""
    cold = COLD_BYTES if device.type == "cuda" else 2 * nbytes
    return max(2, -(-cold // max(nbytes, 1)))


def measure(
    implementations: Sequence[Implementation],
    sets: Sets,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    pool: Any = None,
) -> dict[str, Timing | str]:
    """The times of all implementations, or for one that failed the reason why.

    seconds: after which no round is begun, but for the first FEWEST. pool: of memory for all CUDA
    graphs whose forward passes are timed, whose outputs are then written over; None: one each."""
    device = sets[0][0].device
    out: dict[str, Timing | str] = {}
    ready: dict[str, Ready] = {}
    peaks: dict[str, float | None] = {}
    for one in implementations:
        try:
            with one.context():
                ready[one.name] = prepare(one, sets, pool)
                peaks[one.name] = _peak_of_a_call(one, sets[0])
        except Exception as error:  # one that fails is reported, the others are timed
            out[one.name] = reason(error)
            free(device)
    contexts = {one.name: one.context for one in implementations}

    def all_rounds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        def in_context(name: str) -> float:
            with contexts[name]():
                return once(runs[name], device) / len(sets)

        until = time.monotonic() + seconds
        calls = {name: functools.partial(in_context, name) for name in runs}
        times, failures = in_turn(
            calls, rounds + 1, lambda i: i <= FEWEST or time.monotonic() < until
        )
        out.update({name: reason(error) for name, error in failures.items()})
        return {name: each[1:] for name, each in times.items()}  # the first round only warms up

    times = all_rounds({name: r.run for name, r in ready.items()}, rounds)
    by_hand = {name: r.launched for name, r in ready.items() if r.launched and name in times}
    launched = all_rounds(by_hand, min(rounds, LAUNCHED_ROUNDS))
    for name, values in times.items():
        if name not in out:
            timed = out[name] = summary(values)
            timed.note, timed.peak_mib = ready[name].note, peaks[name]
            if name in launched:
                timed.launched = statistics.median(launched[name])
    return out


def right(checks: Mapping[str, Callable[[], T]], entries: dict[str, Any]) -> dict[str, T]:
    """The results of those checks that raise no error. `entries` gets the reason for the others."""
    found: dict[str, T] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # the others are timed
            entries[name] = failed(error)
    return found


def in_turn(
    calls: Mapping[str, Callable[[], T]],
    rounds: int,
    goes_on: Callable[[int], bool] = lambda _: True,
) -> tuple[dict[str, list[T]], dict[str, Exception]]:
    """Results of several functions that are called in turn, round by round, so that all meet the
    same moods of the machine; and the errors of those that failed, which then drop out.
    goes_on: asked before each round."""
    results: dict[str, list[T]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    for i in range(rounds):
        if not goes_on(i):
            break
        for name in [*results]:
            try:
                with ranges.phase(name):
                    results[name].append(calls[name]())
            except Exception as error:  # the others go on
                errors[name] = error
                del results[name]
    return results, errors


def summary(values: Sequence[float]) -> Timing:
    middle = statistics.median(values)
    spread = (quantile(values, 0.75) - quantile(values, 0.25)) / middle if middle else 0.0
    return Timing(middle, quantile(values, 0.99), spread, rounds=len(values))


def middle_and_tail(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds of a part of what an entry is of."""
    return {"ms": statistics.median(values), "p99_ms": quantile(values, 0.99)}


def entry(timed: Timing | str, **more: Any) -> dict[str, Any]:
    """The entry of an implementation in a file of results; `more` of one that was timed."""
    if isinstance(timed, str):
        return {"failed": timed}
    said = {"ms": timed.p50, "p99_ms": timed.p99, "spread": timed.spread, **more}
    rest = {"launched_ms": timed.launched, "peak_mib": timed.peak_mib, "note": timed.note or None}
    return said | {name: value for name, value in rest.items() if value is not None}


def failed(error: Exception) -> dict[str, str]:
    """The entry of an implementation that raised an error: AssertionError for a wrong result."""
    wrong = f"{WRONG}: " if isinstance(error, AssertionError) else ""
    return {"failed": wrong + reason(error)}


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest of `values` that at least a share q of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """`with peak_memory(device) as peak`: afterwards peak[0] is the most memory in MiB that the
    body held beside what was there before; None on a CPU, where PyTorch does not count."""
    peak: list[float | None] = [None]
    if device.type != "cuda":
        yield peak
        return
    free(device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    torch.cuda.synchronize(device)
    peak[0] = (torch.cuda.max_memory_allocated(device) - before) / 2**20


def free(device: torch.device) -> None:
    """Gives a GPU's memory back, that of reference cycles too, which streams and graphs are in."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of an earlier failure: what follows says so
            torch.cuda.empty_cache()


def keep_memory() -> None:
    """Keeps memory that is freed with the process, where the allocator is glibc's: nothing is
    mapped apart (M_MMAP_MAX), nothing given back to the system (M_TRIM_THRESHOLD). Else every call
    faults the pages of large outputs in anew, which takes longer than the op."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(NamedTuple):
    """Milliseconds: wall clock, and of each phase."""

    whole: float
    phases: dict[str, float]


def clocked(run: Callable[[], object], device: torch.device) -> Timed:
    """Runs a function from an idle device to an idle device."""
    wait(device)
    began = time.perf_counter()
    with ranges.timed(device) as phases:
        run()
    wait(device)
    return Timed(1e3 * (time.perf_counter() - began), phases)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a function: on CUDA of what it launches, else by the wall clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def prepare(one: Implementation, sets: Sets, pool: Any = None) -> Ready:
    """A function that runs an implementation once over all sets."""
    cuda = sets[0][0].device.type == "cuda"
    if one.upstream is None:
        return _forward_only(one.forward, sets, cuda, pool)
    return _backward_only(one.forward, one.upstream, sets, cuda)


def _forward_only(forward: Callable[..., Any], sets: Sets, cuda: bool, pool: Any = None) -> Ready:
    @torch.no_grad()
    def all_sets() -> object:
        # All outputs are kept until the end, so that none is written over one still in cache.
        return [forward(*inputs) for inputs in sets]

    if not cuda:
        all_sets()
        return Ready(all_sets)
    graph, note = graphs.captured(all_sets, pool)
    return Ready(graph or all_sets, all_sets if graph else None, note)


def _backward_only(forward: Callable[..., Any], upstream: Sets, sets: Sets, cuda: bool) -> Ready:
    """Captures forward and backward one after the other in one memory pool, as
    torch.cuda.make_graphed_callables; the second graph is timed."""
    leaves = [[t.detach().requires_grad_(t.is_floating_point()) for t in inputs] for inputs in sets]
    wanted = [[t for t in inputs if t.requires_grad] for inputs in leaves]

    def run_forward() -> list[Sequence[Tensor]]:
        return [forward(*inputs) for inputs in leaves]

    def run_backward(outs: Sequence[Sequence[Tensor]], keep: bool) -> list[Any]:
        return [
            torch.autograd.grad(o, w, g, retain_graph=keep, allow_unused=True)
            for o, w, g in zip(outs, wanted, upstream, strict=True)
        ]

    if not cuda:
        outs = run_forward()
        run_backward(outs, True)
        return Ready(lambda: run_backward(outs, True))
    graphs.warm(lambda: run_backward(run_forward(), False))
    try:
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with graphs.capture(first):
            outs = run_forward()
        with graphs.capture(second, first.pool()):
            grads = run_backward(outs, False)
        first.replay()  # what the backward pass reads
    except RuntimeError as error:
        outs = run_forward()
        return Ready(lambda: run_backward(outs, True), None, graphs.why_none(error))

    def replay(_alive: object = (first, outs, grads)) -> None:
        second.replay()

    return Ready(replay)


def _peak_of_a_call(one: Implementation, inputs: Sequence[Tensor]) -> float | None:
    """MiB of one forward call, or of a forward and a backward pass, once it is compiled."""
    if inputs[0].device.type != "cuda":
        return None
    backward = one.upstream is not None
    leaves = [t.detach().requires_grad_(backward and t.is_floating_point()) for t in inputs]
    with peak_memory(inputs[0].device) as peak, torch.set_grad_enabled(backward):
        outs = one.forward(*leaves)
        if one.upstream is not None:
            wanted = [t for t in leaves if t.requires_grad]
            torch.autograd.grad(outs, wanted, one.upstream[0], allow_unused=True)
    return peak[0]


def ceilings(device: torch.device, dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, Any]:
    """The two limits of the roofline, measured here and now: TFLOP/s of a large square matrix
    product by PyTorch, GB/s of a large copy. Both are timed as any op."""
    size, nbytes = (MATMUL, LARGE_COPY) if device.type == "cuda" else (512, 2**26)
    sets = [[torch.randn(size, size, device=device).to(dtype) for _ in range(2)] for _ in range(2)]
    (timed,) = measure([Implementation("matrix product", torch.matmul)], sets, rounds).values()
    if isinstance(timed, str):
        raise RuntimeError(f"the matrix product could not be timed: {timed}")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": 2 * size**3 / timed.p50 / 1e9,
        "copy_gbps": copy_bandwidth(device, nbytes, rounds),
    }


def floor_ms(flops: int, nbytes: int, ceilings: dict[str, Any]) -> float:
    """Milliseconds that the roofline allows: the products or the bytes, whichever take longer."""
    return max(flops / ceilings["matmul_tflops"] / 1e9, nbytes / ceilings["copy_gbps"] / 1e6)


def copy_bandwidth(device: torch.device, nbytes: int, rounds: int = ROUNDS) -> float:
    """GB/s of a copy that reads and writes `nbytes` bytes in total, timed as any op: the
    driver's own or an elementwise kernel, whichever is faster."""
    half = max(nbytes // 2 // 16 * 16, 16)
    count = count_sets(2 * half, device)
    sets = [[torch.randn(half // 4, device=device) for _ in range(2)] for _ in range(count)]
    copies = [
        Implementation("copy", lambda source, target: target.copy_(source)),
        Implementation("kernel", lambda source, target: torch.neg(source, out=target)),
    ]
    times = [t.p50 for t in measure(copies, sets, rounds).values() if isinstance(t, Timing)]
    if not times:
        raise RuntimeError("no copy could be timed")
    return 2 * half / min(times) / 1e6
