"""Video files: what is written comes back, and an interruption or a full disk leaves no mess."""

from __future__ import annotations

import os
import signal
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfmodel.video import (
    ContactSheet,
    VideoWriter,
    contact_sheet_of_rows,
)
from tests.clips import read_video


def moving_disc(frames: int, height: int = 64, width: int = 64) -> Tensor:
    """Frames [T, 3, H, W]: a soft coloured disc crosses a gradient from left to right."""
    t = torch.arange(frames).view(-1, 1, 1)
    y = torch.linspace(-1, 1, height).view(1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, -1)
    disc = torch.sigmoid(20 * (0.4 - ((x - t / frames + 0.5) ** 2 + y**2).sqrt()))
    ramp = (0.5 * x + 0.3 * y).expand(frames, -1, -1)
    return torch.stack([ramp + disc, ramp, ramp - disc], dim=1).clamp(-1, 1)


def grey_levels(frames: int) -> Tensor:
    """Frames [T, 3, 64, 64], each of one grey that tells its number."""
    return torch.linspace(-0.9, 0.9, frames).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1]."""
    return float(-10 * torch.log10(((a - b) / 2).square().mean()))


def image(path: Path) -> npt.NDArray[np.uint8]:
    """A picture as bytes [H, W, 3]."""
    with Image.open(path) as opened:
        return np.asarray(opened)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("size", [(64, 64), (63, 123), (240, 416)])
def test_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = moving_disc(20, *size)
    path = tmp_path / "new" / "folder" / "clip.mp4"
    with VideoWriter(path, fps=Fraction(24000, 1001), scale=1) as writer:
        for chunk in frames.split([1, 8, 3, 8]):
            writer.write(chunk)
        assert not path.exists()
    back, fps = read_video(path)
    assert fps == pytest.approx(24000 / 1001)
    height, width = size
    assert back.shape == (20, 3, height + height % 2, width + width % 2)
    assert back.dtype == torch.float32
    assert back.min() >= -1 and back.max() <= 1
    assert psnr(back[..., :height, :width], frames) > 36
    for t in range(20):  # in order, none twice
        nearest = min(range(20), key=lambda s: -psnr(back[t, :, :height, :width], frames[s]))
        assert nearest == t
    assert leftovers(path.parent) == []


def test_small_frames_are_enlarged_crisply(tmp_path: Path) -> None:
    checkers = ((torch.arange(64).view(-1, 1) + torch.arange(64)) % 2 * 2 - 1).float()
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(checkers.expand(3, 3, -1, -1))
    back, fps = read_video(tmp_path / "a.mp4")
    assert back.shape == (3, 3, 256, 256)
    assert fps == 16
    squares = back.unflatten(-1, (64, 4)).unflatten(-3, (64, 4))
    assert psnr(squares.mean(dim=(-3, -1)), checkers.expand(3, 3, -1, -1)) > 36


@pytest.mark.parametrize(
    "colour", [(1, 1, 1), (-1, -1, -1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.2, -0.4, 0.6)]
)
def test_colours(tmp_path: Path, colour: tuple[float, float, float]) -> None:
    frames = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(frames)
    back, _ = read_video(tmp_path / "a.mp4")
    torch.testing.assert_close(back[..., ::4, ::4], frames, atol=0.03, rtol=0)


def test_half_precision_and_values_beyond_the_range(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        frames = torch.full((2, 3, 64, 64), 7.0, dtype=torch.bfloat16)
        writer.write(frames)
        frames.fill_(-7)  # the writer has its own copy
        writer.write(frames)
    back, _ = read_video(tmp_path / "a.mp4")
    assert back[:2].min() > 0.97 and back[2:].max() < -0.97


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_a_playable_file(
    tmp_path: Path, exception: type[BaseException]
) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("an earlier result")
    with pytest.raises(exception), VideoWriter(path) as writer:
        writer.write(grey_levels(10)[:6])
        assert path.read_text() == "an earlier result"
        raise exception
    back, _ = read_video(path)
    torch.testing.assert_close(
        back.mean(dim=(1, 2, 3)), grey_levels(10)[:6, 0, 0, 0], atol=0.02, rtol=0
    )
    assert leftovers(tmp_path) == []


def test_ctrl_c_while_encoding_loses_nothing(tmp_path: Path) -> None:
    frames = torch.rand(2, 3, 256, 256) * 2 - 1
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(frames)
        writer.write(frames)  # returns when the first batch is encoded
        timer.start()
        for _ in range(10_000):
            writer.write(frames)
    assert writer.frame_count >= 2
    assert len(read_video(tmp_path / "a.mp4")[0]) == writer.frame_count
    assert leftovers(tmp_path) == []


def test_interrupted_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_no_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "a.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_closed_writer_refuses_frames(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(grey_levels(2))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(grey_levels(2))
    assert len(read_video(tmp_path / "a.mp4")[0]) == 2


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    # Below a regular file, because root may write into read-only folders.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/a\.mp4: "):
        VideoWriter(tmp_path / "file" / "a.mp4")
    with pytest.raises(OSError, match=r"cannot write .*file/a\.png: "):
        contact_sheet(grey_levels(2), tmp_path / "file" / "a.png")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        VideoWriter(tmp_path / "folder.mp4")


@pytest.mark.parametrize("many", [False, True])
def test_full_disk(tmp_path: Path, many: bool) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.mp4"
    path.write_text("an earlier result")
    noise = torch.rand(4, 3, 128, 128) * 2 - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Past this size a write fails as on a full disk, also for root. Few frames fail in close(),
    # which has the encoder's last ones to write, many fail in write().
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with (
            pytest.raises(OSError, match=r"^cannot write .*a\.mp4: File"),
            VideoWriter(path) as writer,
        ):
            for _ in range(1000 if many else 1):
                writer.write(noise)
            assert not many, "the failure came too late"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "an earlier result"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "a.avi"}, "path: .*a.avi"),
        ({"fps": 0}, "fps: 0"),
        ({"fps": float("nan")}, "fps: nan"),
        ({"scale": 0}, "scale: 0"),
        ({"scale": 1.5}, "scale: 1.5"),
        ({"crf": 52}, "crf: 52"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    keywords: dict[str, object] = {"path": tmp_path / "a.mp4"} | arguments
    with pytest.raises(ValueError, match=message):
        VideoWriter(**keywords)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 64, 64), "shape"),
        (torch.zeros(2, 1, 64, 64), "shape"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "dtype"),
        (torch.zeros(2, 3, 64, 32), "size"),
    ],
)
def test_bad_frames(tmp_path: Path, frames: Tensor, message: str) -> None:
    with (
        pytest.raises(ValueError, match=f"frames: {message}"),
        VideoWriter(tmp_path / "a.mp4") as writer,
    ):
        writer.write(grey_levels(2))
        writer.write(frames)
    assert len(read_video(tmp_path / "a.mp4")[0]) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_no_picture(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    frames = grey_levels(10).to(dtype).clone()
    frames[7, 1, 5, 5] = value
    wanted = r"a.mp4: frame 7 holds NaN or infinity: the weights are damaged, or the arithmetic"
    with (
        pytest.raises(FloatingPointError, match=wanted),
        VideoWriter(tmp_path / "a.mp4") as writer,
    ):
        for chunk in frames.split(4):
            writer.write(chunk)
    assert len(read_video(tmp_path / "a.mp4")[0]) == 4 and leftovers(tmp_path) == []
    sheet = ContactSheet()
    sheet.add(frames[:5])
    with pytest.raises(FloatingPointError, match=r"^frame 7 holds NaN"):
        sheet.add(frames[5:])
    with pytest.raises(FloatingPointError, match=r"^frame 7 holds NaN"):
        contact_sheet(frames, tmp_path / "a.png")
    with pytest.raises(FloatingPointError, match=r"rows.png: second: frame 7 holds NaN"):
        rows = torch.stack([grey_levels(10).to(dtype), frames])
        contact_sheet_of_rows(rows, tmp_path / "rows.png", ["first", "second"], "two", columns=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def contact_sheet(frames: Tensor, path: Path, **how: Any) -> None:
    sheet = ContactSheet()
    sheet.add(frames)
    sheet.save(path, **how)


def test_contact_sheet(tmp_path: Path) -> None:
    frames = grey_levels(11)
    contact_sheet(frames, tmp_path / "a.png", columns=4, title="eleven greys")
    plain = tmp_path / "plain.png"
    contact_sheet(frames, plain, columns=4)
    sheet = image(plain)
    width, height = 8 + 4 * (128 + 8), 8 + 3 * (128 + 14 + 16)
    assert sheet.shape == (height, width, 3)
    assert image(tmp_path / "a.png").shape == (height + 18 + 16, width, 3)
    for index in range(11):
        row, column = divmod(index, 4)
        upper, left = 8 + row * 158, 8 + column * 136
        grey = round((float(frames[index, 0, 0, 0]) + 1) * 127.5)
        assert (sheet[upper : upper + 128, left : left + 128] == grey).all()
        assert (sheet[upper + 128 : upper + 158, left : left + 128] < 128).any()  # its number
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("title", "lines"),
    [
        ("a", 1),
        ("a\nb", 2),
        ("a\r\n\nb", 3),
        ("a b " * 100, 6),
        ("a" * 240, 5),
        ("a" * 70_000, 101),
        ("\n" * 5000, 101),
        ("\x00\u2028\udcff \u200d 日本 $x$", 1),
    ],
)
def test_titles_are_as_wide_as_the_frames(tmp_path: Path, title: str, lines: int) -> None:
    frames = grey_levels(4)
    for name, said in (("a.png", title), ("plain.png", None)):
        contact_sheet(frames, tmp_path / name, title=said)
    plain, sheet = image(tmp_path / "plain.png"), image(tmp_path / "a.png")
    top = len(sheet) - len(plain)
    assert sheet.shape[1] == plain.shape[1] and top == 34 + 22 * (lines - 1)
    assert (sheet[8 + top :] == plain[8:]).all()  # nothing covers the frames
    assert (sheet[:, -4:] == 255).all()


def test_contact_sheet_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    contact_sheet(moving_disc(2, 480, 832), path, title="a title that is wider than the tiles " * 3)
    assert image(path).shape == (8 + round(320 * 480 / 832) + 30 + 34 + 22, 8 + 2 * (320 + 8), 3)
    contact_sheet(moving_disc(1, 480, 832), path)
    assert image(path).shape == (8 + round(320 * 480 / 832) + 30, 8 + 320 + 8, 3)
    with pytest.raises(ValueError, match="frames: there are none"):
        contact_sheet(torch.zeros(0, 3, 64, 64), path)
    with pytest.raises(ValueError, match="columns: 0"):
        contact_sheet(grey_levels(2), path, columns=0)


@pytest.mark.parametrize("limit", [2, 7, 24])
def test_contact_sheet_of_a_long_stream(tmp_path: Path, limit: int) -> None:
    sheet = ContactSheet(limit=limit, every=3)
    frames = grey_levels(1000)
    start = 0
    for size in [1, 2, 3, 5, 300, 17, 0, 672]:
        sheet.add(frames[start : start + size])
        start += size
    assert sheet.seen == start == 1000
    assert limit / 2 <= len(sheet.indices) <= limit
    assert sheet.indices == list(range(0, 1000, sheet.every))
    held = [kept for _, kept in sheet._kept]
    assert all(kept.base is None and kept.nbytes == 64 * 64 * 3 for kept in held)
    for index, kept in zip(sheet.indices, held, strict=True):
        assert kept[0, 0, 0] == round((float(frames[index, 0, 0, 0]) + 1) * 127.5)
    sheet.save(tmp_path / "a.png")
    assert image(tmp_path / "a.png").shape[1] == 8 + min(8, len(held)) * 136


def test_empty_contact_sheet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames: there are none"):
        ContactSheet().save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
