"""Video files: write frames as they are generated, draw contact sheets. `footage.py` reads them.

Frames are float tensors [T, 3, H, W] with values in [-1, 1] (red, green, blue), or bytes
[T, H, W, 3]. Shape suffixes: T frames, H height and W width in pixels, C the three colours.
"""

from __future__ import annotations

import functools
import math
import os
import textwrap
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfmodel.extras import needed
from sfmodel.files import Part, atomic, cannot_write
from sfmodel.footage import covering_frames as covering_frames
from sfmodel.footage import opened_video as opened_video
from sfmodel.footage import to_pixels as to_pixels
from sfmodel.pictures import Images
from sfmodel.vae.codec import NotFinite, finite_frames, to_bytes

with needed():
    import av
    from av.video.reformatter import ColorRange, Colorspace
    from PIL import Image, ImageDraw, ImageFont

BT709 = 1  # the code of HD television in ITU-T H.273, for primaries and transfer alike
MIN_SHORT_SIDE = 256  # px: smaller videos are enlarged, players would blur them on a screen


def to_images(frames: Tensor, numbers: Sequence[int], name: str = "") -> Images:
    """Float frames [T, 3, H, W] in [-1, 1] on any device to bytes [T, H, W, 3]; bytes are copied.

    Raises FloatingPointError, with the name and the frame's number, for one that holds NaN or
    infinity. Whether it does comes in one copy with the bytes: the host waits once."""
    if frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[3] == 3:
        copied: Images = frames.cpu().numpy().copy()
        return copied
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape[2:]:
        raise ValueError(
            f"frames: shape {list(frames.shape)}, expected [T, 3, H, W] or bytes [T, H, W, 3]"
        )
    if not frames.is_floating_point():
        raise ValueError(
            f"frames: dtype {frames.dtype}, expected floating point in [-1, 1] or bytes"
        )
    T, C, H, W = frames.shape
    frames = frames.detach()
    both_TN = torch.cat([to_bytes(frames).flatten(1), finite_frames(frames).byte()[:, None]], 1)
    rows_TN: Images = both_TN.cpu().numpy()
    for number, row_N in zip(numbers, rows_TN, strict=True):
        if not row_N[-1]:
            raise FloatingPointError(f"{name}{': ' * bool(name)}{NotFinite(number)}")
    return rows_TN[:, :-1].reshape(T, H, W, C)


def _enlarge(images_THWC: Images, scale: int) -> Images:
    return images_THWC.repeat(scale, axis=1).repeat(scale, axis=2) if scale > 1 else images_THWC


NVENC = "h264_nvenc"


@functools.cache
def _encoder() -> Any:
    """Name of the H.264 encoder: that of the GPU where it has one (an H100 has none), else x264."""
    with suppress(av.FFmpegError, ValueError):
        context: Any = av.CodecContext.create(NVENC, "w")
        context.width = context.height = MIN_SHORT_SIDE
        context.pix_fmt, context.time_base = "yuv420p", Fraction(1, 16)
        context.open()
        return NVENC
    return "libx264"


def check_name(path: Path) -> None:
    """Raises ValueError for a name that a VideoWriter does not write to."""
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path: {str(path)!r}, expected a name ending in .mp4")


class OneBehind:
    """A thread that works on one batch while the next one is made."""

    def __init__(self, name: str) -> None:
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: Future[None] | None = None

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Begins work once that before is done, whose error it raises instead."""
        self.wait()
        self._pending = self.worker.submit(work, *arguments)

    def wait(self) -> None:
        """Returns when the work is done, and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class VideoWriter:
    """Write an H.264 MP4 file frame by frame; use it as a context manager.

    The file appears under its name when the writer closes, never half written. It closes also
    when the body ends in an exception or KeyboardInterrupt, and then holds the frames written so
    far. Encoding runs in a thread of its own, beside the generation of the next frames, which also
    keeps Ctrl-C from falling between two packets of the file.

    path: the file, ending in .mp4; missing folders are created, an existing file is replaced.
    fps: frames per second.
    scale: whole factor of enlargement, each pixel becoming a square; by default the smallest that
        brings the short side to 256 pixels. Sides that are odd after that grow by one pixel, which
        repeats the edge, because the pixel format needs even sides.
    crf: the constant rate factor of x264, 0 (lossless) to 51; 18 is visually lossless.

    Raises ValueError for arguments out of range and OSError where the path cannot be written, at
    construction; OSError from `write` or `close` when the disk fills up.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction = 16,
        *,
        scale: int | None = None,
        crf: int = 18,
    ) -> None:
        self.path = Path(path)
        check_name(self.path)
        if not 0 < fps < math.inf:
            raise ValueError(f"fps: {fps}, expected a positive number")
        if scale is not None and not (isinstance(scale, int) and scale >= 1):
            raise ValueError(f"scale: {scale}, expected a whole number from 1")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf: {crf}, expected 0 to 51")
        self.fps = Fraction(fps).limit_denominator(100_000)
        self.scale = scale
        self.crf = crf
        self.frame_count = 0  # encoded so far
        self._given = 0
        self._size: tuple[int, int] | None = None  # H, W of the frames as given
        self._closed = False
        self._error: OSError | None = None
        self._part = Part(self.path)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._behind = OneBehind("video")

    def write(self, frames: Tensor) -> None:
        """Append float frames [T, 3, H, W] in [-1, 1], values beyond are clamped, or bytes
        [T, H, W, 3].

        Returns when the frames given before are encoded, so that at most one batch waits. The
        tensor may be overwritten afterwards. Raises ValueError for another shape than before, and
        FloatingPointError, without writing any of them, for frames with NaN or infinity.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed, no more frames can be written")
        numbers = range(self._given, self._given + len(frames))
        images_THWC = to_images(frames, numbers, str(self.path))
        size = (images_THWC.shape[1], images_THWC.shape[2])
        if self._size is None:
            self._size = size
        if size != self._size:
            raise ValueError(f"frames: size {size}, expected {self._size} as in the first frames")
        self._behind.submit(self._encode, images_THWC)
        self._given += len(frames)

    def close(self) -> None:
        """Finish the file and give it its name. Raises ValueError if no frame was written."""
        self._close(empty_allowed=False)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close(empty_allowed=exception is not None)
        except OSError as error:
            if exception is None:
                raise
            if error is not exception:  # the exception of the body matters more
                warnings.warn(str(error), stacklevel=2)

    def _close(self, *, empty_allowed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        # The worker also renames the file, so a second Ctrl-C while waiting here loses nothing.
        finished = self._behind.worker.submit(self._finish)
        self._behind.worker.shutdown(wait=False)
        finished.result()
        if self.frame_count == 0 and not empty_allowed:
            raise ValueError(f"no frame was written to {self.path}, there is no file")

    # What follows runs in the worker thread, one call after the other.

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(
            str(self._part.path), "w", format="mp4", options={"movflags": "+faststart"}
        )
        stream = self._container.add_stream(_encoder(), rate=self.fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if stream.codec_context.name == NVENC:
            stream.options = {"rc": "vbr", "cq": str(self.crf), "preset": "p4"}
        else:
            # veryfast keeps up with real-time generation; at a fixed crf it costs file size.
            stream.options = {"crf": str(self.crf), "preset": "veryfast"}
        # Said in the file, because players otherwise guess the colours from the height.
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = BT709
        context.color_trc = BT709
        self._stream = stream

    def _encode(self, images_THWC: Images) -> None:
        if self._error is not None:
            raise self._error
        height, width = images_THWC.shape[1:3]
        scale = self.scale or math.ceil(MIN_SHORT_SIDE / min(height, width))
        try:
            for image_HWC in images_THWC:
                image_HWC = _enlarge(image_HWC[None], scale)[0]
                odd_height, odd_width = image_HWC.shape[0] % 2, image_HWC.shape[1] % 2
                if odd_height or odd_width:
                    padding = ((0, odd_height), (0, odd_width), (0, 0))
                    image_HWC = np.pad(image_HWC, padding, mode="edge")
                if self._stream is None:
                    self._open(*image_HWC.shape[:2])
                assert self._container is not None and self._stream is not None
                frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                frame.pts, frame.time_base = self.frame_count, 1 / self.fps
                self._container.mux(self._stream.encode(frame))
                self.frame_count += 1
        except Exception as error:  # whatever it is, the caller has to hear of it
            raise self._abandon(error) from error

    def _finish(self) -> None:
        if self._error is not None:
            raise self._error
        if self._container is None or self._stream is None:
            self._part.discard()
            return
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._part.commit()
        except Exception as error:  # whatever it is, the caller has to hear of it
            raise self._abandon(error) from error

    def _abandon(self, error: Exception) -> OSError:
        """Remove the unfinished file; from now on every call raises the error returned."""
        self._error = cannot_write(self.path, error)
        if self._container is not None:
            with suppress(av.FFmpegError, OSError):
                self._container.close()
        self._part.discard()
        return self._error


class ContactSheet:
    """Collect frames for a contact sheet from a stream of unknown length, in bounded memory.

    At most `limit` frames are kept, evenly spaced: each `every`-th at first; when they are too
    many, every other one is dropped and the spacing doubles. A long stream therefore leaves
    between limit / 2 and limit frames, the first one always among them.
    """

    def __init__(self, limit: int = 24, every: int = 1) -> None:
        if limit < 2:
            raise ValueError(f"limit: {limit}, expected 2 or more")
        if every < 1:
            raise ValueError(f"every: {every}, expected 1 or more")
        self.limit = limit
        self.every = every  # the present spacing, in frames
        self.seen = 0
        self._kept: list[tuple[int, Images]] = []

    @property
    def indices(self) -> list[int]:
        """Numbers of the frames kept, counted from 0 over all frames seen."""
        return [index for index, _ in self._kept]

    def add(self, frames: Tensor) -> None:
        """Take the next frames of the stream, float [T, 3, H, W] in [-1, 1] or bytes
        [T, H, W, 3]."""
        first = -self.seen % self.every
        indices = range(self.seen + first, self.seen + len(frames), self.every)
        # One copy for the batch, of what may be kept: on a GPU each copy makes the host wait.
        images_THWC = to_images(frames[first :: self.every], indices)
        for index, image_HWC in zip(indices, images_THWC, strict=True):
            if index % self.every:  # the spacing has grown within this batch
                continue
            if len(self._kept) == self.limit:
                self._kept = self._kept[::2]
                self.every *= 2
                if index % self.every:
                    continue
            # A copy, because a view would keep the whole batch in memory.
            self._kept.append((index, image_HWC.copy()))
        self.seen += len(frames)

    def save(
        self,
        path: str | os.PathLike[str],
        columns: int | None = None,
        title: str | None = None,
    ) -> None:
        """Write the sheet as PNG. Raises ValueError without frames, OSError if it cannot."""
        _draw_sheet(self._kept, Path(path), columns, title)


def contact_sheet_of_rows(
    videos: Tensor,
    path: str | os.PathLike[str],
    labels: Sequence[str],
    title: str,
    columns: int = 10,
) -> None:
    """Write a PNG with a row for each of several videos, the same frames of all.

    videos: float [B, T, 3, H, W] in [-1, 1], or bytes [B, T, H, W, 3]; `columns` of their frames
    are shown, the first and last included. labels: one for each, without formulas: a dollar is a
    dollar. Raises FloatingPointError for frames with NaN or infinity, OSError where the path cannot
    be written.
    """
    from matplotlib.figure import Figure

    chosen = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    size = 1.1 * len(chosen) + 1.8, 1.2 * len(videos) + 0.3
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(videos), len(chosen), squeeze=False)
    for row, video, label in zip(axes, videos, labels, strict=True):
        images_THWC = to_images(video, range(len(video)), f"{path}: {label}")
        for ax, image_HWC in zip(row, images_THWC[chosen], strict=True):
            ax.imshow(image_HWC)
            ax.set(xticks=[], yticks=[])
        words = textwrap.fill(label, 20)
        style = {"ha": "right", "va": "center", "fontsize": 8, "parse_math": False}
        row[0].set_ylabel(words, rotation=0, **style)
    for ax, frame in zip(axes[0], chosen, strict=True):
        ax.set_title(f"{frame}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=120)


TILE_MIN, TILE_MAX, GAP = 128, 320, 8  # px: short side at least, long side at most, distance
TITLE_SIZE, TITLE_LINE, LABEL_SIZE = 18, 22, 14  # px
TITLE_LINES = 100  # that are drawn


def _draw_sheet(
    numbered: list[tuple[int, Images]], path: Path, columns: int | None, title: str | None
) -> None:
    if not numbered:
        raise ValueError("frames: there are none, expected at least one")
    if columns is not None and columns < 1:
        raise ValueError(f"columns: {columns}, expected 1 or more")
    columns = min(columns or 8, len(numbered))
    rows = math.ceil(len(numbered) / columns)
    tiles = [_tile(image_HWC) for _, image_HWC in numbered]
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)

    label_font = ImageFont.load_default(LABEL_SIZE)
    title_font = ImageFont.load_default(TITLE_SIZE)
    sheet_width = GAP + columns * (width + GAP)
    lines = _wrapped(title or "", title_font, sheet_width - 2 * GAP)
    top = GAP + (TITLE_SIZE + (len(lines) - 1) * TITLE_LINE + 2 * GAP if lines else 0)
    row_height = height + LABEL_SIZE + 2 * GAP
    sheet = Image.new("RGB", (sheet_width, top + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((GAP, GAP + i * TITLE_LINE), line, fill="black", font=title_font)
    for place, ((index, _), tile) in enumerate(zip(numbered, tiles, strict=True)):
        left = GAP + place % columns * (width + GAP)
        upper = top + place // columns * row_height
        sheet.paste(tile, (left, upper))
        middle = left + tile.width / 2
        draw.text(
            (middle, upper + tile.height + 4),
            str(index),
            fill="black",
            font=label_font,
            anchor="ma",
        )
    with atomic(path) as part:
        sheet.save(part, format="PNG")


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines that are no wider, broken between words where that can be; without what has no shape,
    such as control characters and half a surrogate pair."""

    def wide(piece: str) -> int:
        return math.ceil(font.getlength(piece))

    lines: list[str] = []
    for given in text.split("\n") if text else ():
        lines.append("")
        for word in given.split():
            word = "".join(filter(str.isprintable, word))
            longer = f"{lines[-1]} {word}".lstrip()
            if len(longer) <= width and wide(longer) <= width:
                lines[-1] = longer
                continue
            lines += [""] if lines[-1] else []
            while word and len(lines) <= TITLE_LINES:
                starts = [word[:n] for n in range(1, min(len(word), width) + 1)]
                lines[-1] = starts[max(0, bisect_right(starts, width, key=wide) - 1)]
                word = word.removeprefix(lines[-1])
                lines += [""] if word else []
    return lines if len(lines) <= TITLE_LINES else [*lines[:TITLE_LINES], "…"]


def _tile(image_HWC: Images) -> Image.Image:
    """Enlarges small frames pixel by pixel, shrinks large ones smoothly."""
    scale = math.ceil(TILE_MIN / min(image_HWC.shape[:2]))
    tile = Image.fromarray(_enlarge(image_HWC[None], scale)[0])
    if scale == 1:
        tile.thumbnail((TILE_MAX, TILE_MAX), Image.Resampling.LANCZOS)
    return tile
