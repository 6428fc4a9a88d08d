"""Files written so that a name always stands for a whole file.

Everything goes to a part beside the file first. Parts are locked while their process lives: that
tells those that a killed one left behind, which are removed by the next that writes the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTS = 8  # of one file, which are looked for
LONGEST = 255  # bytes of a name on common file systems
LOCK = ".lock"
PATIENCE = 5.0  # seconds for which the reader of a FIFO is waited for
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without them

# Names of video files that are looked for in folders.
VIDEOS = (
    *(".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".m2v", ".vob", ".ts"),
    *(".mts", ".m2ts", ".flv", ".f4v", ".wmv", ".asf", ".gif", ".ogv", ".ogg", ".3gp", ".3g2"),
    *(".mxf", ".y4m", ".qt", ".divx", ".dv"),
)


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic(path) as part:` gives a name to write to, and puts that file in the place of
    `path` as `Part.commit` does once the body succeeds. Nothing is left behind on an error. Raises
    OSError with one sentence where the file cannot be written."""
    part = Part(path)
    try:
        yield part.path
        part.commit()
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as the latter
        raise cannot_write(part.target, error) from error
    finally:
        part.discard()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a folder, new or empty, as `atomic` writes a file."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock, descriptor = _claim(target)
        try:
            part = _folder(lock)
            part.mkdir()
            yield part
            for each in part.iterdir():
                with each.open("rb") as file:
                    os.fsync(file.fileno())
            part.rename(target)
        finally:
            _remove(lock)
            os.close(descriptor)
    except OSError as error:
        raise cannot_write(Path(path), error) from error


class Part:
    """A file to write to, at `path`, before it takes the place of `target`.

    A link stays one: the file that it names is replaced. What is no file (a device, a FIFO, a
    descriptor such as /dev/stdout) stays, too, and has everything written into it at the end.

    Creating it is the only check of a folder that holds on every file system and for every user.
    Raises ValueError if the target is a folder and OSError if it cannot be written."""

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = Path(target)
        self._there = True  # until it is committed or discarded
        self._through: Path | int | None = None  # what is no file
        try:
            self._through = _open_already(self.target)
            self._real = Path(os.path.realpath(self.target))
            if self._through is None and not self._is_file():
                self._through = self._real
            if self._through is not None:
                with tempfile.TemporaryFile() as scratch:  # it has no name that could be left
                    self._descriptor = os.dup(scratch.fileno())
                self.path = Path(f"/proc/self/fd/{self._descriptor}")
            else:
                self._real.parent.mkdir(parents=True, exist_ok=True)
                self.path, self._descriptor = _claim(self._real)
            self._mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        except FileExistsError:
            reason = f"{self.target.parent} is not a folder"
            raise OSError(f"cannot write {self.target}: {reason}") from None
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def _is_file(self) -> bool:
        """Tells whether the target is one or can become one."""
        try:
            mode = os.stat(self._real).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return True
        if stat.S_ISDIR(mode):
            raise ValueError(f"cannot write {self.target}: it is a folder")
        return stat.S_ISREG(mode)

    def commit(self) -> None:
        """Waits until the disk has the part, and gives it the target's name and the permissions
        that the user's new files have. Raises OSError."""
        if self._through is not None:
            self._write_through(self._through)
        else:
            with open(self.path, "rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != self._mode:
                    os.fchmod(file.fileno(), self._mode)
                os.fsync(file.fileno())
            os.replace(self.path, self._real)
            self._there = False  # the name may be another process's now
        self.discard()

    def _write_through(self, where: Path | int) -> None:
        opened = os.dup(where) if isinstance(where, int) else _for_writing(where)
        with open(self.path, "rb") as source, open(opened, "wb") as sink:
            shutil.copyfileobj(source, sink)

    def discard(self) -> None:
        """Removes the part, unless it was committed."""
        if self._descriptor < 0:
            return
        if self._there and self._through is None:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps it, while the body runs, from other processes that ask for it here.
    A folder that is empty in the end is removed again if it was made. Raises ValueError where
    another process has it, OSError where it cannot be written."""
    path, descriptor = folder / LOCK, -1
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, os.O_CREAT)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process writes there: name another folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)
        for each in made:
            with suppress(OSError):
                each.rmdir()


def check_writable(path: Path) -> None:
    """Raises as `Part` does where a file cannot be written, and leaves nothing: for what takes
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


def _open_already(path: Path) -> int | None:
    """The descriptor of this process that a name such as /dev/stdout or /dev/fd/3 stands for."""
    for _ in range(40):  # as many links as Linux follows
        if path.parent.resolve() == Path(f"/proc/{os.getpid()}/fd"):
            return int(path.name) if path.name.isdecimal() else None
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return None


def _for_writing(path: Path) -> int:
    """A descriptor of a device or FIFO. Raises OSError for a FIFO that nobody comes to read."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise OSError(error.errno, "nobody reads it") from None
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def _claim(path: Path) -> tuple[Path, int]:
    """A new part of a file, and the descriptor that keeps it locked."""
    for i in range(PARTS):
        with suppress(OSError):  # there is none, or it is in use
            descriptor = _locked(_part(path, i))
            try:
                _remove(_part(path, i))
            finally:
                os.close(descriptor)
    for i in itertools.count():
        part = _part(path, i)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # of a process that writes the same file now
            continue
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return part, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked
    raise AssertionError


def _part(path: Path, i: int) -> Path:
    """The name of the i-th part of a file, which no other file's part has."""
    name = os.fsencode(path.name)
    mark = hashlib.blake2b(b"%d %s" % (i, name), digest_size=4).hexdigest()
    end = f".{mark}.part"
    return path.with_name(f".{name[: LONGEST - 1 - len(end)].decode(errors='ignore')}{end}")


def _folder(part: Path) -> Path:
    """The folder that a part stands for, where a folder is written."""
    return part.with_suffix(".parts")


def _remove(part: Path) -> None:
    shutil.rmtree(_folder(part), ignore_errors=True)
    part.unlink(missing_ok=True)


def _locked(path: Path, create: int = 0) -> int:
    """A descriptor that keeps a file locked until it is closed or its process ends. Raises
    BlockingIOError where another has locked it, OSError where it cannot be opened or locked."""
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW | create
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed or replaced meanwhile


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
