"""Writing files so that a name always stands for a whole file."""

from __future__ import annotations

import os
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


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error to raise where writing `path` failed with `error`."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return OSError(f"cannot write {path}: {reason}")


def within(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file itself, or what ends so in a folder and its subfolders, by name: files, and what only
    looks like one (a FIFO, a link to nothing), for its reader to refuse. Hidden ones are left out;
    a folder that links lead to is searched once. Raises OSError for a folder that is not
    readable."""
    if not path.is_dir():
        return [path]

    def stop(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    out: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True):
        new = os.path.realpath(folder) not in seen
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        visible = (Path(folder, name) for name in names if new and not name.startswith("."))
        out += [each for each in visible if each.suffix.lower() in suffixes]
    return sorted(out)
