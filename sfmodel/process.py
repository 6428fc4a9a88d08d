"""The process of a command: signals that ask it to end, and output that ends nothing."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Ctrl-C; `kill`, Docker, Kubernetes and torchrun; a terminal that closes; SLURM before the end.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TOGETHER = 1.0  # seconds: a terminal and torchrun, or a system that ends, send several at a time


@contextmanager
def prepared() -> Iterator[None]:
    """Context in which each of `STOPS` raises KeyboardInterrupt, as Ctrl-C does, and no output
    fails: where nobody can read it, it is lost; letters that the terminal lacks are replaced."""
    # The number of a closed one would go to the next file that is opened, and text into that file.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:  # and not what a test or a notebook put there
        sys.stdout = _lasting(sys.stdout, 1, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2, "backslashreplace")
    raised = -TOGETHER

    def stop(number: int, _: object) -> None:
        nonlocal raised
        now = time.monotonic()
        if now - raised >= TOGETHER:
            raised = now
            raise KeyboardInterrupt

    try:
        with handling(stop):
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def noting() -> Iterator[list[int]]:
    """Context in which `STOPS` are only noted, in the list that it gives, so that none of them
    falls between two halves of something. A second Ctrl-C raises KeyboardInterrupt at once."""
    noted: list[int] = []
    first = 0.0

    def note(number: int, _: object) -> None:
        nonlocal first
        first = first if noted else time.monotonic()
        if noted and number == signal.SIGINT and time.monotonic() - first >= TOGETHER:
            raise KeyboardInterrupt
        noted.append(number)

    with handling(note):
        yield noted


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Context in which a function handles `STOPS`, except those that are ignored, as in the
    background and under nohup."""
    before = {each: signal.getsignal(each) for each in STOPS}
    ours = [each for each, was in before.items() if was not in (signal.SIG_IGN, None)]
    for each in ours:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each])


class _Lasting(io.FileIO):
    """A descriptor that takes whatever is written to it."""

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
        except OSError:
            count = None
        return len(data) if count is None else count  # None: a reader that is not waited for


def _lasting(stream: TextIO | None, descriptor: int, errors: str) -> TextIO:
    """The stream on a `_Lasting`; None: of a descriptor that was closed."""
    raw = _Lasting(descriptor, "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(buffer, "utf-8", errors)
    with suppress(OSError, ValueError):
        stream.flush()
    return io.TextIOWrapper(
        buffer, stream.encoding, errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
