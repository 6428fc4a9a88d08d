"""Reading video files as they are meant to be seen: upright, with square pixels, each frame at its
time.

Shapes: T frames, H height and W width in pixels, C the three colours.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfmodel.extras import needed
from sfmodel.pictures import MAX_PIXELS, Images

with needed():
    import av
    from PIL import Image

# Seconds from a frame to the next. A timestamp that says less or more is not believed.
STEP, LEAP = Fraction(1, 1000), Fraction(60)
Timed = tuple[av.VideoFrame | None, Fraction]


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file and its first video. Raises ValueError, without the name, if it is damaged or none."""
    if not path.is_file():  # opening a FIFO would wait for its writer
        reason = "is no regular file" if path.exists() else "there is no such file"
        raise ValueError(f"cannot be read: {reason}")
    try:
        # An absolute name has no protocol, and a playlist by another name leads nowhere else.
        options = {"protocol_whitelist": "file"}
        with av.open(str(path.absolute()), options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or "attached_pic" in str(stream.disposition):
                raise ValueError("holds no video")
            if stream.codec_context is None:
                raise ValueError("damaged, or of a codec that is not known")
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(
                    f"damaged: says that it is {stream.width} × {stream.height} pixels: must be at "
                    f"most {MAX_PIXELS:,}"
                )
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            stream.thread_type = "NONE"  # threads of frames pass over what is damaged
            yield container, stream
    except (av.FFmpegError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"damaged or no video: {reason}") from None


def covering_frames(
    path: Path, height: int, width: int, fps: float | None = None, rate: float | None = None
) -> Iterator[Images]:
    """The frames of a video one by one [H, W, 3], upright, scaled to cover H × W with square pixels
    and cropped around the centre.

    fps: frames a second that are wanted. At each of their times it is the frame that is then shown,
    so that some are left out or come twice; None: every frame of the file. rate: what the file runs
    at, instead of what its timestamps say. Raises ValueError as `opened_video` does, and for a file
    that ends early or has no times."""
    with opened_video(path) as (container, stream):
        timed = _timed(container, stream, rate)
        for frame, count in _counted(timed, fps):
            if count:
                yield from itertools.repeat(_picture(frame, stream, (height, width)), count)


def length(stream: av.VideoStream, fps: float) -> float:
    """Number of a video's frames at `fps` by its header, infinite where that says nothing."""
    rate = _declared(stream)
    return math.ceil(stream.frames * Fraction(fps) / rate) if stream.frames and rate else math.inf


def to_pixels(images: Sequence[Images]) -> Tensor:
    """Bytes [H, W, 3] of each frame to float32 [T, 3, H, W] in [-1, 1]."""
    pixels_TCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels_TCHW.float().div(127.5).sub(1)


def _declared(stream: av.VideoStream) -> Fraction | None:
    """The frame rate, if the file says one that can be right."""
    rates = (stream.average_rate, stream.guessed_rate)
    return next((rate for rate in rates if rate and 1 / LEAP <= rate <= 1 / STEP), None)


def _timed(
    container: av.container.InputContainer, stream: av.VideoStream, rate: float | None
) -> Iterator[Timed]:
    """Every frame with its time in seconds, and None with the time at which the last one ends.

    Where a timestamp is missing, goes back or leaps, the frame comes one period after that before
    it. Files cut off decode without an error up to their end; their headers know better."""
    declared = Fraction(rate) if rate else _declared(stream)
    at, own, count = Fraction(0), None, 0
    avi = container.format.name == "avi"  # has frames in the order of decoding, no other times
    lasts = 1 / declared if declared else STEP
    for count, frame in enumerate(container.decode(stream), 1):
        unit = frame.time_base or Fraction(0)
        stamp = frame.dts if avi else frame.pts
        own = Fraction(stamp) * unit if stamp is not None else None
        own_length = Fraction(frame.duration) * unit
        if count == 1:
            at = own or at
        elif own is not None and not rate and STEP <= own - at <= LEAP:
            at = own
        elif declared:
            at += 1 / declared
        else:
            raise ValueError(
                f"damaged: frame {count - 1} has no timestamp that can be right, and the file says "
                "no frame rate"
            )
        if not rate and STEP <= own_length <= LEAP:
            lasts = own_length
        yield frame, at
    if own is not None and count < stream.frames and stream.duration and stream.time_base:
        end = ((stream.start_time or 0) + stream.duration) * stream.time_base
        if own + 2 * lasts < end:
            raise ValueError(f"damaged: ends {float(end - own - lasts):.2f} s before its end")
    if count:
        yield None, at + lasts


def _counted(timed: Iterator[Timed], fps: float | None) -> Iterator[tuple[av.VideoFrame, int]]:
    """Every frame and how often it is shown at `fps`: from half a step before its time on, a step
    being that of the file or of `fps`, whichever is less. That is the frame nearest in time, also
    where times are rounded, and a frame that lasts is shown until the next one comes."""
    done, start, step = 0, None, fps and 1 / Fraction(fps)
    for (frame, at), (_, after) in itertools.pairwise(timed):
        assert frame is not None
        start, total = at if start is None else start, done + 1
        if step:
            total = math.ceil((after - min(after - at, step) / 2 - start) / step)
        yield frame, total - done
        done = total


def _picture(
    frame: av.VideoFrame, stream: av.VideoStream, size: tuple[int, int] | None = None
) -> Images:
    """Upright [H, W, 3]: its middle, scaled to cover `size` (height, width); None: all of it."""
    ratio = float(stream.sample_aspect_ratio or 1)
    ratio = ratio if ratio > 0 else 1.0  # of a pixel's width to its height
    # x and y on the screen are a·x + c·y and b·x + d·y of the file.
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5] if matrix else (1, 0, 0, 0, 1)
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if frame.interlaced_frame:  # two pictures, row by row
        frame, ratio = _field(frame), ratio / 2
    H, W = frame.height, frame.width
    if size is None:
        height, width = (H, round(W * ratio)) if ratio >= 1 else (round(H / ratio), W)
        if height * width > MAX_PIXELS:
            raise ValueError(f"damaged: a pixel is {ratio:g} times as wide as high")
    else:
        height, width = size[::-1] if turned else size
    scale = max(height / H, width / (W * ratio))
    high, wide = min(H, height / scale), min(W, width / (scale * ratio))
    top, left = (H - high) / 2, (W - wide) / 2
    image = Image.fromarray(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"))
    box = left, top, min(W, left + wide), min(H, top + high)
    image_HWC: Images = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
    if turned:
        image_HWC, a, d = image_HWC.swapaxes(0, 1), c, b
    image_HWC = image_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image_HWC)


def _field(frame: av.VideoFrame) -> av.VideoFrame:
    """Every other row: the picture of one moment."""
    graph = av.filter.Graph()
    time_base = frame.time_base or Fraction(1)
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    graph.link_nodes(source, graph.add("field", "top"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()
