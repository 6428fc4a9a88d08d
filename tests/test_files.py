"""A name stands for a whole file, or for the one before."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sfmodel import files
from sfmodel.files import alone, atomic, atomic_folder
from sfmodel.weights.saving import save_tensors

# A limit on the size of files stands in for a full disk.
FULL = """
import resource, signal, sys, torch
from sfmodel.weights import checkpoint
from sfmodel.files import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"weight": torch.zeros(1_000_000)}
try:
    with atomic(sys.argv[1]) as part:
        if sys.argv[2] == "torch":
            torch.save(big, part)
        elif sys.argv[2] == "tensors":
            from sfmodel.weights.saving import write_tensors
            with part.open("wb") as file:
                write_tensors(file, big, {})
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


@pytest.mark.parametrize("writer", ["torch", "tensors", "bytes"])
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


# Writes half of a file or folder and waits to be killed.
HALF = """
import sys, time
from sfmodel import files
with getattr(files, sys.argv[1])(sys.argv[2]) as part:
    (part / "half" if part.is_dir() else part).write_text("half")
    print(flush=True)
    time.sleep(60)
"""


def half_done(function: str, path: Path) -> subprocess.Popen[bytes]:
    """A process that has written half of what it will not end."""
    command = [sys.executable, "-c", HALF, function, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("function", ["atomic", "atomic_folder"])
def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, function: str
) -> None:
    path = tmp_path / "file"
    foreign = [".file.mine.part", ".file.part", ".file.part.01234567", ".tmpABCDEF", "file.part"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    killed, alive = half_done(function, path), half_done(function, path)
    try:
        killed.kill()
        killed.communicate()
        written = atomic if function == "atomic" else atomic_folder
        with written(path) as part:
            (part / "a" if part.is_dir() else part).write_text("whole")
        left = {*names(tmp_path)} - {*foreign, "file"}
        assert {name.rpartition(".")[2] for name in left} <= {"part", "parts"}
        assert len(left) == (1 if function == "atomic" else 2)  # of the one that is alive
    finally:
        alive.kill()
        alive.communicate()
    with atomic(tmp_path / "another") as part:
        part.touch()
    assert left < {*names(tmp_path)}  # they are of another file
    assert (path / "a" if path.is_dir() else path).read_text() == "whole"
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic(path) as first:
        first.write_text("first")
        with atomic(path) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.read_text() == "first"
    assert path.read_text() == "first" and names(tmp_path) == ["file"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_files_have_the_permissions_of_the_users_new_files(tmp_path: Path) -> None:
    save_tensors(tmp_path / "tensors", {"a": torch.zeros(2)}, {})
    with atomic(tmp_path / "replaced") as part:  # as some libraries do
        part.unlink()
        os.close(os.open(part, os.O_CREAT, 0o600))
    with atomic_folder(tmp_path / "folder"):
        pass
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"tensors": 0o640, "replaced": 0o640, "folder": 0o750}


@pytest.mark.parametrize("length", [240, 249, 255])
def test_names_may_be_as_long_as_the_disk_allows(tmp_path: Path, length: int) -> None:
    for letter in "xé":
        name = letter * (length // len(letter.encode()))
        with atomic(tmp_path / name) as part:
            part.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    with (
        pytest.raises(OSError, match=r"cannot write .*: File name too long"),
        atomic(tmp_path / ("x" * 256)),
    ):
        raise AssertionError("it is known before")


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    link.symlink_to(Path("there") / "real")
    for said in ("made", "replaced"):
        with atomic(link) as part:
            part.write_text(said)
            assert part.parent == real.parent
        assert link.is_symlink() and real.read_text() == said and names(real.parent) == ["real"]
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError, match=r"cannot write .*link: Too many levels"), atomic(link):
        pass
    assert link.is_symlink()


def test_a_fifo_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, said = tmp_path / "fifo", "x" * 200_000  # more than it holds
    os.mkfifo(fifo)
    with (
        pytest.raises(OSError, match=r"cannot write .*fifo: nobody reads it"),
        atomic(fifo) as part,
    ):
        monkeypatch.setattr(files, "PATIENCE", 0.1)
        part.write_text(said)
    monkeypatch.undo()
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()), daemon=True)
    with atomic(fifo) as part:
        part.write_text(said)
        reader.start()
    reader.join(30)
    assert read == [said] and fifo.is_fifo() and names(tmp_path) == ["fifo"]


def test_a_device_is_written_through(tmp_path: Path) -> None:
    """A link to it stands for it, so that no mistake harms the machine's own."""
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
    with atomic(tmp_path / "null") as part:
        part.write_text("much")
    with (
        pytest.raises(OSError, match=r"cannot write .*full: No space left"),
        atomic(tmp_path / "full") as part,
    ):
        part.write_text("much")
    assert all((tmp_path / name).is_char_device() for name in ("null", "full"))
    assert names(tmp_path) == ["full", "null"]


def test_standard_output_is_written_through(tmp_path: Path) -> None:
    code = """
import sys
from sfmodel.files import atomic
for name in sys.argv[1:]:
    print("before", flush=True)
    with atomic(name) as part:
        part.write_text("whole ")
print("after")
"""
    aliases = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
    command = [sys.executable, "-c", code, *aliases]
    whole = "before\nwhole " * 3 + "after\n"
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == whole
    with open(tmp_path / "file", "w") as file:
        subprocess.run(command, stdout=file, check=True)
    assert (tmp_path / "file").read_text() == whole and names(tmp_path) == ["file"]


def test_a_folder_is_one_processs_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    code = "import sys, time; from pathlib import Path; from sfmodel.files import alone\n"
    code += "with alone(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            with (
                pytest.raises(ValueError, match="run: another process writes there"),
                alone(folder),
            ):
                pass
        finally:
            other.send_signal(signal.SIGKILL)
    with alone(folder):  # a process that is gone has it no more
        (folder / "file").touch()
    assert names(folder) == ["file"]
    with alone(tmp_path / "none" / "run"):
        pass
    assert not (tmp_path / "none").exists()


def test_tensors_are_written_the_same_every_time(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3, 5).bfloat16().T, "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4), "whole": torch.arange(7), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    metadata = {name: name for name in "zyxwvutsrq"}
    for name in "ab":
        save_tensors(tmp_path / name, state, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
        for name, value in state.items():
            assert torch.equal(file.get_tensor(name), value)
            assert file.get_tensor(name).dtype == value.dtype
