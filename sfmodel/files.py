"""Writing files so that a name always stands for a whole file."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    from safetensors import SafetensorError
except ImportError:  # what writes only text, such as the benches, needs no more than PyTorch

    class SafetensorError(Exception):  # type: ignore[no-redef]
        pass


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic(path) as part:` gives a name beside `path` to write to, and moves that file to
    `path` once the body succeeds and the disk has it. Nothing is left behind on an error. Raises
    OSError with one sentence where the file cannot be written."""
    path = Path(path)
    part = reserve(path)
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    # PyTorch and safetensors report a full disk in their own ways.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def reserve(path: Path) -> Path:
    """Creates an empty file beside `path` to write into first, and its folder where needed.

    Creating it is the only check of the folder that holds on every file system and for every user.
    Raises ValueError if `path` is a folder and OSError if it cannot be written."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
    except FileExistsError:
        raise OSError(f"cannot write {path}: {path.parent} is not a folder") from None
    except OSError as error:
        raise cannot_write(path, error) from error
    return part


def check_writable(path: Path) -> None:
    """Raises as `reserve` does where a file cannot be written, and leaves nothing: for what takes
    long before it writes."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise OSError(f"cannot write {path}: {above} is not a folder")
    if path.exists() and not path.is_file():  # a device or a pipe
        return
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error to raise where writing `path` failed with `error`."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return OSError(f"cannot write {path}: {reason}")
