"""Signals that end a command, and output that ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sfmodel import process
from sfmodel.process import noting, prepared

SAYS = """
import sys
from rich.console import Console
from sfmodel.process import prepared
with prepared():
    for _ in range(100):
        print("σ …" * 1000, flush=True)
        print("σ …" * 1000, file=sys.stderr)
        Console().print("σ …" * 1000)
    sys.stdout.write("x" * 100_000)
    with open(sys.argv[1], "w") as file:
        file.write("written")
"""


def run(tmp_path: Path, shell: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Says much and writes a file; the shell gets the command as $0."""
    command = f"{sys.executable} -c '{SAYS}' {tmp_path}/file"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.replace("SAYS", command)],
        capture_output=True, env=os.environ | environment, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "file").read_text() == "written"
    return ended


@pytest.mark.parametrize(
    "shell",
    ["SAYS 2>&1 | true", "SAYS >/dev/full 2>&1", "SAYS >&- 2>&-", "SAYS </dev/null >&0 2>&0",
     "SAYS <&- >&- 2>&-"],
)  # fmt: skip
def test_output_that_nobody_can_read_ends_nothing(tmp_path: Path, shell: str) -> None:
    ended = run(tmp_path, shell)
    assert ended.returncode == 0 and not ended.stdout and not ended.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437:strict", "utf-8"])
def test_letters_that_the_terminal_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    ended = run(tmp_path, "SAYS", PYTHONIOENCODING=encoding)
    said = ended.stdout.decode(encoding.partition(":")[0])
    assert ended.returncode == 0
    assert said.startswith(
        {"ascii": "? ?", "latin-1": "? ?", "cp437:strict": "σ ?"}.get(encoding, "σ …")
    )


@pytest.mark.parametrize("number", process.STOPS)
def test_signals_are_an_interrupt(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with prepared(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
        with prepared(), noting() as noted:
            signal.raise_signal(number)
            signal.raise_signal(number)
        assert noted == [number, number]
        signal.signal(number, signal.SIG_IGN)
        with prepared(), noting() as noted:
            signal.raise_signal(number)
        assert noted == [] and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_that_come_together_are_one_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # while what the first one ended is closed
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(process, "TOGETHER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
