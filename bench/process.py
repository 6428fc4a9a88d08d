"""Commands in processes of their own: a fault, a leak or a hang there ends nothing else."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TAIL = 200  # lines kept of what a command that failed said


def command(
    arguments: Sequence[str],
    seconds: float,
    tick: Callable[[str], None] = lambda _: None,
    **environment: str,
) -> dict[str, Any]:
    """Runs a command in the repository for at most so long, natively even where tests use Triton's
    interpreter. tick: called with each line it says. Returns ok, how it ended, and where it did
    not end well the last lines it said. Ctrl-C here ends it too."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    cut = threading.Event()

    def end() -> None:
        cut.set()
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started

    timer = threading.Timer(max(seconds, 1), end)
    timer.start()
    lines: collections.deque[str] = collections.deque(maxlen=TAIL)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            tick(line.rstrip())
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
        process.stdout.close()
    ok = process.returncode == 0
    how = f"cut after {seconds:.0f} s" if cut.is_set() else f"exit code {process.returncode}"
    return {"ok": ok, "end": how, **({} if ok else {"tail": "".join(lines)[-6000:]})}
