"""Fair times of functions that do the same: in turn, on rotating inputs, without launch overhead.

On CUDA each contestant becomes one CUDA graph that runs it over K sets of inputs, together larger
than three L2 caches, so that each run finds its inputs in device memory. The graphs are replayed in
turn, round by round, so that all meet the same clocks. On CPU the same in wall-clock time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = 30
COLD_BYTES = 256 * 2**20  # more than three L2 caches of any GPU here


@dataclass
class Contestant:
    """forward: called with one set of inputs. upstream: for each set the gradients of its outputs;
    where given, the backward pass alone is timed, and forward must return its outputs as a
    sequence. around: what to run it in."""

    name: str
    forward: Callable[..., Any]
    upstream: Sequence[Sequence[Tensor]] | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass
class Timing:
    """Milliseconds of one call. note: what was not as planned, else empty."""

    p50: float
    p99: float
    note: str = ""


def count_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` bytes leave nothing of the first in cache."""
    cold = COLD_BYTES if device.type == "cuda" else 2 * nbytes
    return max(2, -(-cold // max(nbytes, 1)))


def measure(
    contestants: Sequence[Contestant], sets: Sequence[Sequence[Tensor]], rounds: int = ROUNDS
) -> dict[str, Timing | str]:
    """The times of all contestants, or for one that failed the reason why."""
    out: dict[str, Timing | str] = {}
    ready: dict[str, tuple[Callable[[], None], str]] = {}
    cuda = sets[0][0].device.type == "cuda"
    for contestant in contestants:
        try:
            with contestant.around():
                ready[contestant.name] = _prepare(contestant, sets, cuda)
        except Exception as error:  # one that fails is reported, the others are timed
            out[contestant.name] = reason(error)
    around = {contestant.name: contestant.around for contestant in contestants}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for i in range(rounds + 1):
        for name, (run, _) in ready.items():
            with around[name]():
                elapsed = _once(run, cuda)
            if i:  # the first round only warms up
                times[name].append(elapsed / len(sets))
    for name, values in times.items():
        out[name] = Timing(statistics.median(values), quantile(values, 0.99), ready[name][1])
    return out


def reason(error: Exception) -> str:
    """One line for a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest of `values` that at least a share q of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def _once(run: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _prepare(
    contestant: Contestant, sets: Sequence[Sequence[Tensor]], cuda: bool
) -> tuple[Callable[[], None], str]:
    """What runs the contestant once over all sets, and a note."""
    if contestant.upstream is None:
        return _forward_only(contestant.forward, sets, cuda)
    return _backward_only(contestant.forward, contestant.upstream, sets, cuda)


def _forward_only(
    forward: Callable[..., Any], sets: Sequence[Sequence[Tensor]], cuda: bool
) -> tuple[Callable[[], None], str]:
    def all_sets() -> None:
        # All outputs are kept until the end, so that none is written over one still in cache.
        with torch.no_grad():
            void([forward(*inputs) for inputs in sets])

    if not cuda:
        all_sets()
        return all_sets, ""
    _warm(all_sets)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_sets()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return all_sets, f"no CUDA graph, launches included: {str(error).splitlines()[0]}"
    return graph.replay, ""


def _backward_only(
    forward: Callable[..., Any],
    upstream: Sequence[Sequence[Tensor]],
    sets: Sequence[Sequence[Tensor]],
    cuda: bool,
) -> tuple[Callable[[], None], str]:
    """As torch.cuda.make_graphed_callables: forward and backward are captured one after the other
    in one memory pool, and the second graph is timed."""
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
        return lambda: void(run_backward(outs, True)), ""
    _warm(lambda: void(run_backward(run_forward(), False)))
    try:
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            outs = run_forward()
        with torch.cuda.graph(second, pool=first.pool()):
            grads = run_backward(outs, False)
        first.replay()  # what the backward pass reads
    except RuntimeError as error:
        torch.cuda.synchronize()
        outs = run_forward()
        return (
            lambda: void(run_backward(outs, True)),
            f"no CUDA graph, launches included: {str(error).splitlines()[0]}",
        )

    def replay(_alive: object = (first, outs, grads)) -> None:
        second.replay()

    return replay, ""


def void(_: object) -> None:
    """Drops a result."""


def _warm(run: Callable[[], None]) -> None:
    """On a side stream, as capture asks for; the first call compiles."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def copy_bandwidth(device: torch.device, nbytes: int, rounds: int = ROUNDS) -> float:
    """GB/s of a copy that reads and writes `nbytes` bytes in total, timed as any contestant: the
    driver's own or an elementwise kernel, whichever is faster."""
    half = max(nbytes // 2 // 16 * 16, 16)
    sets = [
        [torch.randn(half // 4, device=device) for _ in range(2)]
        for _ in range(count_sets(2 * half, device))
    ]
    copies = [
        Contestant("copy", lambda source, target: target.copy_(source)),
        Contestant("kernel", lambda source, target: torch.neg(source, out=target)),
    ]
    times = [t for t in measure(copies, sets, rounds).values() if isinstance(t, Timing)]
    if not times:
        raise RuntimeError("no copy could be timed")
    return gbps(2 * half, min(t.p50 for t in times))


def gbps(nbytes: int, milliseconds: float) -> float:
    return nbytes / milliseconds / 1e6
