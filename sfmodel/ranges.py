"""Named phases of work: ranges that a profiler shows and that `timed` measures.

With the package nvtx installed, Nsight Systems shows each phase as a range of the domain
"sfkernels" in a colour of its own. Without it, and outside `timed`, a phase does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

_nvtx: Any = importlib.import_module("nvtx") if importlib.util.find_spec("nvtx") else None

COLOURS = {
    "rollout": "blue",
    "score": "purple",
    "forward": "green",
    "backward": "orange",
    "optimiser": "red",
    "noise": "grey",
    "decode": "lime",
    "copy to host": "magenta",
    "cache update": "yellow",
}
OTHER = "cyan"  # of a phase that is not in COLOURS: the steps of a stream

_spans: list[tuple[str, Any, Any]] | None = None  # name, begin and end of `timed`'s phases
_mark: Callable[[], Any] = time.perf_counter


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A range around the body."""
    shown: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if _nvtx is not None:
        shown = _nvtx.annotate(name, color=COLOURS.get(name, OTHER), domain="sfkernels")
    with shown:
        if _spans is None:
            yield
        else:
            begin = _mark()
            yield
            _spans.append((name, begin, _mark()))


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """`with timed(device) as ms`: afterwards ms[name] is how many milliseconds the body's phases of
    that name took together, in the order in which they ended first.

    On CUDA that is the time between two events on the current stream, and the device is waited for
    at the end alone; elsewhere wall clock. A phase that raised is not counted.
    """
    global _spans, _mark
    ms: dict[str, float] = {}
    cuda = device.type == "cuda"
    before = _spans, _mark
    spans: list[tuple[str, Any, Any]] = []
    _spans, _mark = spans, (_event if cuda else time.perf_counter)
    try:
        yield ms
    finally:
        _spans, _mark = before
    if cuda:
        torch.cuda.synchronize(device)
    for name, begin, end in spans:
        took = begin.elapsed_time(end) if cuda else 1e3 * (end - begin)
        ms[name] = ms.get(name, 0.0) + took


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
