"""CUDA graphs: a function's launches, recorded once and replayed without Python."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which a GPU is this thread's own, which is the first one until then: kernels are
    launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def possible(device: torch.device) -> bool:
    """Tells whether a device has CUDA graphs."""
    return device.type == "cuda"


@functools.cache
def shared_pool(of: str = "") -> Any:
    """A memory pool for graphs of which no two run at once, and none reads what another left: one
    for each name."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def lane(of: str, device: torch.device) -> Any:
    """A stream of the device for all work of one name, in order: of whatever object it is, graphs
    that share a pool of that name do not run at once."""
    return torch.cuda.Stream(device)


def captured(
    run: Callable[[], object], pool: Any = None, stream: Any = None
) -> tuple[Callable[[], None] | None, str]:
    """The replay of `run` as a CUDA graph; or None and why there is none. It really runs three
    times before, which compiles its kernels and chooses its algorithms. stream: to capture on, one
    of their own for graphs that run beside others, as cuBLAS has a workspace for each stream.
    The graph reads tensors that `run` refers to by address: the caller keeps them."""
    warm(run)
    graph = torch.cuda.CUDAGraph()
    try:
        with capture(graph, pool, stream):
            run()
    except RuntimeError as error:
        return None, why_none(error)
    return graph.replay, ""


def why_none(error: BaseException) -> str:
    """The note that stands beside a time which no graph has."""
    return f"no CUDA graph, launches included: {reason(error)}"


def reason(error: BaseException) -> str:
    """An error in one line for a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any = None, on: Any = None) -> Iterator[None]:
    """`torch.cuda.graph`. Where a capture fails PyTorch 2.11 leaves its stream the current one and
    the allocator in the capture, which no capture and no empty_cache survives: both are put back,
    and the error is that of the body."""
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    pool = pool or torch.cuda.graph_pool_handle()
    cause: BaseException | None = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=on):
            try:
                yield
            except BaseException as error:
                cause = error
                raise
    except BaseException as error:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # later versions have ended it
            torch._C._cuda_endAllocateToPool(device, pool)
        raise cause or error from None


def warm(run: Callable[[], object]) -> None:
    """Runs three times on a side stream, as a capture asks for; the first call compiles."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
