"""Frames in other files than MP4s: a GIF, a PNG each, raw bytes through a pipe.

Each writer takes bytes [T, H, W, 3] or float frames [T, 3, H, W] in [-1, 1] batch by batch, as a
`VideoWriter` does, and is a context manager. Work is done in a thread of its own, beside the
generation of the next frames.
"""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from sfmodel.extras import needed
from sfmodel.files import atomic, cannot_write
from sfmodel.pictures import Images
from sfmodel.video import OneBehind, VideoWriter, to_images

with needed():
    from PIL import Image

STANDARD_OUTPUT = Path("-")
NAMES = "a name ending in .mp4 or .gif, one ending in .png with a number such as %05d, or -"
_NUMBER = re.compile(r"%0?\d*d")


class Writer(Protocol):
    """Taker of frames until it is closed, by the end of its context."""

    def write(self, frames: Tensor) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def writer(path: Path, fps: float) -> Writer:
    """The writer for a name. Raises ValueError for a name of another kind."""
    check_name(path)
    if path == STANDARD_OUTPUT:
        return RawWriter()
    kinds = {".gif": GifWriter, ".png": PngWriter, ".mp4": VideoWriter}
    made: Writer = kinds[path.suffix.lower()](path, fps)
    return made


def check_name(path: Path) -> None:
    """Raises ValueError for a name that there is no writer for."""
    suffix = path.suffix.lower()
    numbered = len(_NUMBER.findall(path.name)) == 1 and path.name.count("%") == 1
    if path != STANDARD_OUTPUT and suffix not in (".mp4", ".gif") and not (
        suffix == ".png" and numbered
    ):  # fmt: skip
        raise ValueError(f"output {str(path)!r}: must be {NAMES}")


class _InThread(abc.ABC):
    """Writer whose work on a batch is `_put`, at the end `_finish`."""

    def __init__(self) -> None:
        self.given = 0
        self._behind = OneBehind("frames")

    @abc.abstractmethod
    def _put(self, images_THWC: Images, first: int) -> None:
        """Works on a batch, whose first frame has this number."""

    def _finish(self) -> None:  # noqa: B027, for most there is nothing to do
        """Ends the file."""

    def write(self, frames: Tensor) -> None:
        """Returns when the batch before is done. Raises its error, and FloatingPointError for
        frames with NaN or infinity."""
        images_THWC = to_images(frames, range(self.given, self.given + len(frames)))
        self._behind.submit(self._put, images_THWC, self.given)
        self.given += len(frames)

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._behind.wait()
            if self.given:
                self._behind.worker.submit(self._finish).result()
        finally:
            self._behind.worker.shutdown()


class PngWriter(_InThread):
    """Writes each frame into a file of its own, whole or absent. path: with a number such as %05d,
    which becomes that of the frame, from 0."""

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__()
        self.path = path

    def _put(self, images_THWC: Images, first: int) -> None:
        for number, image_HWC in enumerate(images_THWC, first):
            with atomic(file_of(self.path, number)) as part:
                Image.fromarray(image_HWC).save(part, format="png")


class GifWriter(_InThread):
    """Writes a GIF at the end, until when its frames are in memory, in 256 colours each. Players
    count hundredths of a second, so that 16 frames a second become 16.7."""

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__()
        self.path, self.hundredths = path, max(2, round(100 / fps))
        self.images: list[Image.Image] = []

    def _put(self, images_THWC: Images, first: int) -> None:
        self.images += [Image.fromarray(image_HWC).quantize(256) for image_HWC in images_THWC]

    def _finish(self) -> None:
        with atomic(self.path) as part:
            self.images[0].save(
                part, format="gif", save_all=True, append_images=self.images[1:],
                duration=10 * self.hundredths, loop=0,
            )  # fmt: skip


class RawWriter(_InThread):
    """Writes bytes of frames, rows of red, green, blue, to standard output, as
    `ffplay -f rawvideo -pix_fmt rgb24 -video_size WxH -framerate 16 -` reads them. Raises
    BrokenPipeError where nobody reads any more."""

    def __init__(self) -> None:
        super().__init__()
        self.file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)

    def _put(self, images_THWC: Images, first: int) -> None:
        left = memoryview(images_THWC.tobytes())
        try:
            while left:
                left = left[self.file.write(left) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(STANDARD_OUTPUT, error) from error

    def _finish(self) -> None:
        self.file.close()


def sheet_of(path: Path) -> Path | None:
    """The contact sheet beside a video; none of what goes through a pipe."""
    if path == STANDARD_OUTPUT:
        return None
    if path.suffix.lower() == ".png":
        return path.with_name(f"{_NUMBER.sub('sheet', path.name)}")
    return path.with_suffix(".png")


def file_of(path: Path, number: int) -> Path:
    """The file that holds the frame of this number: among PNGs one of its own."""
    return path.with_name(path.name % number) if path.suffix.lower() == ".png" else path


def writes(path: Path, other: Path) -> bool:
    """Tells whether a writer of this name would write that file."""
    if path.suffix.lower() != ".png":
        return path.resolve() == other.resolve()
    name = _NUMBER.sub(r"\\d+", re.escape(path.name))
    return path.parent.resolve() == other.parent.resolve() and bool(re.fullmatch(name, other.name))


def numbered(path: Path, count: int) -> Sequence[Path]:
    """Names for so many videos: the path itself for one, else with -0, -1, … behind its stem."""
    if count == 1:
        return [path]
    if path == STANDARD_OUTPUT:
        raise ValueError("output -: takes one video, not several")
    return [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
