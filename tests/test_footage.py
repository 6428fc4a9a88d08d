"""Video files are read as they are meant to be seen, and what is none is one sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from sfmodel import footage
from sfmodel.footage import covering_frames, length, opened_video
from sfmodel.pictures import Images
from sfmodel.video import VideoWriter
from tests.clips import read_video
from tests.test_video import grey_levels, moving_disc

ONE, END = 1 << 16, 1 << 30


def quarters(height: int, width: int) -> Images:
    """Yellow, red / cyan, blue."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, :, 0] = image[height // 2 :, :, 2] = image[:, : width // 2, 1] = 220
    return image


def seen(image: Images) -> str:
    """The colours of the four quarters, row by row."""
    H, W, _ = image.shape
    at = [(y, x) for y in (H // 4, 3 * H // 4) for x in (W // 4, 3 * W // 4)]
    names = {(1, 1, 0): "y", (0, 0, 1): "b", (1, 0, 0): "r", (0, 1, 1): "c"}
    return "".join(names.get(tuple((image[p] > 120).astype(int).tolist()), "?") for p in at)


def write(
    path: Path,
    frames: int = 3,
    rate: Any = 16,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 128),
    times: Sequence[int] | None = None,
    unit: Fraction = Fraction(1, 1000),
    picture: Callable[[int], Images] | None = None,
    **options: str,
) -> Path:
    """times: of each frame, in units."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if ratio := options.pop("ratio", None):
            stream.codec_context.sample_aspect_ratio = Fraction(ratio)
        stream.options = options
        if times:
            stream.codec_context.time_base = unit
        for i in range(frames):
            image = picture(i) if picture else quarters(*size)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            if times:
                frame.pts, frame.time_base = times[i], unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def grey(i: int) -> Images:
    return np.full((64, 64, 3), 5 * i, np.uint8)


def shown(path: Path, **how: Any) -> list[int]:
    """Which of the `grey` frames are."""
    return [round(image.mean() / 5) for image in covering_frames(path, 64, 64, **how)]


@pytest.mark.parametrize(
    ("matrix", "wanted"),
    [
        ((1, 0, 0, 1), "yrcb"),
        ((0, 1, -1, 0), "cybr"),
        ((-1, 0, 0, -1), "bcry"),
        ((0, -1, 1, 0), "rbyc"),
        ((-1, 0, 0, 1), "rybc"),
        ((1, 0, 0, -1), "cbyr"),
        ((0, 1, 1, 0), "ycrb"),
        ((0, 0, 0, 0), "yrcb"),
    ],
)
def test_cameras_held_in_any_way(
    tmp_path: Path, matrix: tuple[int, int, int, int], wanted: str
) -> None:
    path = write(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (ONE * each for each in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, END)
    path.write_bytes(data)
    for image in covering_frames(path, 64, 64):
        assert image.shape == (64, 64, 3) and image.flags.c_contiguous
        # The middle of the picture is all that is left of its long side.
        assert seen(image) == wanted
    frames, _ = read_video(path)
    assert frames.shape == ((3, 3, 128, 64) if matrix[1] else (3, 3, 64, 128))
    assert seen(((frames[0] + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)) == wanted


@pytest.mark.parametrize(("ratio", "size"), [("2", (64, 256)), ("1/2", (128, 128))])
def test_pixels_are_square(tmp_path: Path, ratio: str, size: tuple[int, int]) -> None:
    path = write(tmp_path / "a.mp4", ratio=ratio)
    frames, _ = read_video(path)
    assert frames.shape[2:] == size
    (image, *_) = covering_frames(path, 64, 64)
    H, W = size
    crop = frames[0, :, (H - min(H, W)) // 2 :, (W - min(H, W)) // 2 :][:, : min(H, W), : min(H, W)]
    small = torch.nn.functional.interpolate(crop[None], (64, 64), mode="area")[0]
    error = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1) - small
    assert error.abs().mean() < 0.05


def test_frames_are_those_of_their_times(tmp_path: Path) -> None:
    fast = write(tmp_path / "a.mp4", 41, 60, size=(64, 64), picture=grey)
    assert shown(fast) == [*range(41)]
    assert shown(fast, fps=16) == [0, 4, 8, 11, 15, 19, 23, 26, 30, 34, 38]  # 60 / 16 = 3.75
    slow = write(tmp_path / "b.mp4", 5, 8, size=(64, 64), picture=grey)
    assert shown(slow, fps=16) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert shown(slow, fps=16, rate=16) == [*range(5)]
    held = write(tmp_path / "c.mkv", 4, 10, times=[0, 50, 1000, 1125], size=(64, 64), picture=grey)
    assert shown(held, fps=8) == [0, *[1] * 7, 2, 3]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv", "a.avi"])
def test_a_video_of_the_wanted_rate_keeps_every_frame(tmp_path: Path, name: str) -> None:
    """Also where the container rounds times to milliseconds."""
    for rate in (16, Fraction(16000, 1001)):
        path = write(tmp_path / name, 50, rate, size=(64, 64), picture=grey)
        assert shown(path, fps=rate) == [*range(50)]
        with opened_video(path) as (_, stream):
            assert length(stream, 16) in (50, 51, float("inf"))


def test_times_that_cannot_be_right(tmp_path: Path) -> None:
    hours = write(tmp_path / "a.mkv", 6, 16, times=[0, 62, 125, 10**8, 10**8 + 62, 10**8 + 125],
                  size=(64, 64), picture=grey)  # fmt: skip
    assert shown(hours, fps=16) == [*range(6)]  # a leap is no day-long picture
    dense = write(tmp_path / "b.mp4", 9, 10**6, times=[*range(9)], unit=Fraction(1, 10**6))
    with pytest.raises(ValueError, match="frame 1 has no timestamp that can be right, and the fil"):
        [*covering_frames(dense, 64, 64, 16)]
    assert len([*covering_frames(dense, 64, 64, 16, rate=16)]) == 9


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("grey.mkv", {"codec": "ffv1", "pixels": "gray"}),
        ("alpha.mkv", {"codec": "ffv1", "pixels": "yuva420p"}),
        ("ten.mkv", {"codec": "ffv1", "pixels": "yuv420p10le"}),
        ("deep.mkv", {"codec": "ffv1", "pixels": "gbrp16le"}),
        ("odd.mkv", {"codec": "ffv1", "pixels": "yuv420p", "size": (63, 127)}),
        ("full.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
        ("interlaced.mp4", {"x264-params": "interlaced=1"}),
        ("a.gif", {"codec": "gif", "pixels": "rgb8", "rate": 10}),
        ("a.mpg", {"codec": "mpeg2video", "rate": 25}),
        ("a.ts", {}),
        ("one.mp4", {"frames": 1}),
    ],
)
def test_other_formats(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    path = write(tmp_path / name, **more)
    images = [*covering_frames(path, 64, 128)]
    assert len(images) == more.get("frames", 3)
    if name == "grey.mkv":
        assert np.ptp(images[0], axis=2).max() == 0
    else:
        assert {seen(image) for image in images} == {"yrcb"}
    assert read_video(path)[0].shape[0] == len(images)


def test_rows_of_two_moments_are_not_mixed(tmp_path: Path) -> None:
    """An interlaced frame: every other row is of a later moment."""
    combed = np.zeros((64, 128, 3), np.uint8)
    combed[::2] = 200
    coded: dict[str, Any] = {"qp": "0", "x264-params": "interlaced=1"}
    path = write(tmp_path / "a.mkv", picture=lambda _: combed, **coded)
    (image, *_) = covering_frames(path, 64, 128)
    assert np.ptp(image) <= 4 and 190 < image.mean() < 210


def test_a_wide_video_takes_the_memory_of_its_frames(tmp_path: Path) -> None:
    """Not that of all of it at the height that is wanted, which is 80 times as much."""
    resource = pytest.importorskip("resource")
    path = write(tmp_path / "a.mkv", 1, codec="ffv1", pixels="gray", size=(2, 16384))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (image,) = covering_frames(path, 480, 832)
    assert image.shape == (480, 832, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def said(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        [*covering_frames(path, 64, 64, 16)]
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_video_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, empty, fifo, folder, link = (tmp_path / f"{name}.mp4" for name in "tefdl")
    text.write_text("no video\n" * 999)
    empty.touch()
    os.mkfifo(fifo)
    folder.mkdir()
    link.symlink_to("nowhere")
    assert said(text).startswith("damaged or no video: ")
    assert said(empty).startswith("damaged or no video: ")
    assert said(fifo) == said(folder) == "cannot be read: is no regular file"
    assert said(link) == said(tmp_path / "none.mp4") == "cannot be read: there is no such file"
    playlist = tmp_path / "p.mp4"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")
    said(playlist)
    sound = tmp_path / "s.mp4"
    with av.open(str(sound), "w") as file:
        stream: Any = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        file.mux([*stream.encode(frame), *stream.encode(None)])
    assert said(sound) == "holds no video"
    monkeypatch.setattr(footage, "MAX_PIXELS", 8000)
    assert "says that it is 128 × 64 pixels: must be at most 8,000" in said(
        write(tmp_path / "h.mp4")
    )
    stretched = write(tmp_path / "s.mp4", size=(64, 64), ratio="20")
    assert len([*covering_frames(stretched, 64, 64)]) == 3
    with pytest.raises(ValueError, match="damaged: a pixel is 20 times as wide as high"):
        read_video(stretched)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_video(tmp_path / "missing.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="damaged or no video"):
        read_video(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or no video"):
        read_video(path)
    with VideoWriter(path) as writer:
        writer.write(moving_disc(60))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match="damaged"):
        read_video(path)


def test_read_some_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(grey_levels(10))
    every, _ = read_video(tmp_path / "a.mp4")
    some, _ = read_video(tmp_path / "a.mp4", max_frames=3)
    assert torch.equal(some, every[:3])


def test_a_video_that_was_cut_off_is_damaged_to_its_end(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(moving_disc(60))
    content = (tmp_path / "a.mp4").read_bytes()
    for share in (0.5, 0.7, 0.95):
        (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * share)])
        assert said(tmp_path / "a.mp4").startswith("damaged")
