"""A name stands for a whole file, or for the one before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sfmodel.files import atomic

# A limit on the size of files stands in for a full disk.
FULL = """
import resource, signal, sys, torch
from sfmodel import checkpoint
from sfmodel.files import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"weight": torch.zeros(1_000_000)}
try:
    with atomic(sys.argv[1]) as part:
        if sys.argv[2] == "torch":
            torch.save(big, part)
        elif sys.argv[2] == "safetensors":
            from safetensors.torch import save_file
            save_file(big, part)
        else:
            part.write_bytes(bytes(1_000_000))
except OSError as error:
    print(error)
"""


def test_the_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == path.parent
    assert path.read_text() == "half" and [*path.parent.iterdir()] == [path]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic(path) as part:
            part.write_text("new")
            raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("writer", ["torch", "safetensors", "bytes"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    command = [sys.executable, "-c", FULL, str(path), writer]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"cannot write {path}: ") and said.count("\n") == 1
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"cannot write .*file is not a folder"),
        atomic(tmp_path / "file" / "below"),
    ):
        pass
    with pytest.raises(ValueError, match="it is a folder"), atomic(tmp_path):
        pass
