"""Frames in GIFs, PNGs and pipes, and the names of many videos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfmodel.cli.options import Content, Job, Output
from sfmodel.frame_files import check_name, numbered, sheet_of, writer
from tests.test_generate import made, refused

FRAMES = (torch.arange(5 * 6 * 8 * 3) % 251).byte().view(5, 6, 8, 3)


def write(path: Path, fps: float = 16) -> None:
    with writer(path, fps) as to:
        to.write(FRAMES[:2])
        to.write(FRAMES[2:])


def test_pngs(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "f-%03d.png")
    names = sorted(each.name for each in (tmp_path / "deep").iterdir())
    assert names == [f"f-{i:03d}.png" for i in range(5)]
    for i, name in enumerate(names):
        with Image.open(tmp_path / "deep" / name) as image:
            assert np.array_equal(np.asarray(image), FRAMES[i].numpy())


def test_gif(tmp_path: Path) -> None:
    write(tmp_path / "a.gif", 16)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5 and image.size == (8, 6)  # type: ignore[attr-defined]
        assert image.info["duration"] == 60 and image.info["loop"] == 0
        image.seek(3)
        apart = np.asarray(image.convert("RGB"), dtype=int) - FRAMES[3].numpy()
    assert np.abs(apart).max() < 40


def test_nothing_is_left_of_what_was_empty(tmp_path: Path) -> None:
    with writer(tmp_path / "a.gif", 16):
        pass
    with pytest.raises(FloatingPointError), writer(tmp_path / "b.gif", 16) as to:
        to.write(torch.full((1, 3, 4, 4), torch.nan))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.mp4", "a.GIF", "b/%05d.png", "b/x-%d.png", "-"])
def test_names(name: str) -> None:
    check_name(Path(name))


@pytest.mark.parametrize("name", ["a.avi", "a", "a.png", "%d-%d.png", "%s.png", "a%.png"])
def test_no_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be a name ending in .mp4 or .gif, one ending"):
        check_name(Path(name))


def test_sheets_and_numbers() -> None:
    assert sheet_of(Path("a/b.mp4")) == Path("a/b.png")
    assert sheet_of(Path("a/%03d.png")) == Path("a/sheet.png") and sheet_of(Path("-")) is None
    assert numbered(Path("v.gif"), 2) == [Path("v-0.gif"), Path("v-1.gif")]
    with pytest.raises(ValueError, match="output -: takes one video"):
        numbered(Path("-"), 2)


def test_raw_bytes_through_a_pipe(tmp_path: Path) -> None:
    """Bytes alone on standard output; one who stops reading ends it."""
    command = [sys.executable, "-m", "sfmodel", "generate", "--output", "-", "--frames"]
    done = subprocess.run([*command, "10"], capture_output=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0 and b"10 frames in" in done.stderr
    frames = np.frombuffer(done.stdout, np.uint8).reshape(10, 64, 64, 3)
    assert frames.max() > 100 and not list(tmp_path.iterdir())
    process = subprocess.Popen([*command, "endless"], stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout
    assert np.array_equal(
        np.frombuffer(process.stdout.read(64 * 64 * 3), np.uint8), frames[0].ravel()
    )
    process.stdout.close()
    assert process.wait(60) == 130


def test_jobs() -> None:
    two = Output(Path("out/v.mp4"), samples=2)
    files = ["out/v-0.mp4", "out/v-1.mp4", "out/v-2.mp4", "out/v-3.mp4"]
    want = [Job("ab"[i // 2], 7 + i, Path(file)) for i, file in enumerate(files)]
    assert two.jobs(["a", "b"], 7) == want
    vbench = Output(Path("out"), samples=2, layout="vbench").jobs(["a cat", "b"], 0)
    names = ["a cat-0.mp4", "a cat-1.mp4", "b-0.mp4", "b-1.mp4"]
    assert [job.file.name for job in vbench] == names
    assert {job.file.parent for job in vbench} == {Path("out")}
    moviegen = Output(Path("out"), layout="moviegen").jobs(["a", "b"], 0)
    assert [job.file.name for job in moviegen] == ["0.mp4", "1.mp4"]
    for prompt in ("a/b", "a" * 300):
        with pytest.raises(ValueError, match="cannot be the name of a file"):
            Output(Path("out"), layout="vbench").jobs([prompt], 0)
    for folder in ("out/v.mp4", "-"):
        with pytest.raises(ValueError, match="with a layout must be a folder"):
            Output(Path(folder), layout="vbench").jobs(["a"], 0)
    with pytest.raises(ValueError, match=r"a-0\.mp4: two prompts are the same"):
        Output(Path("out"), layout="vbench").jobs(["a", "a"], 0)
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        Output(samples=0).jobs(["a"], 0)
    assert Content().check() is None  # type: ignore[func-returns-value]


def test_a_list_that_was_stopped_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is left; the others have the seeds that they would have had."""
    (tmp_path / "p.txt").write_text("a red ball\na small blue ball")
    words = ["--prompt-file", tmp_path / "p.txt", "--frames", "9", "--layout", "vbench"]
    words += ["--samples", "3", "--batch", "2"]

    def run(folder: str) -> list[bytes]:
        made_here = ["generate", *map(str, words), "--output", str(tmp_path / folder)]
        from sfmodel.cli.generate import generate
        from sfmodel.cli.main import run_command

        run_command("sfmodel", {"generate": generate, "other": generate}, made_here)
        files = sorted((tmp_path / folder).glob("*.mp4"))
        assert len(files) == 6
        return [each.read_bytes() for each in files]

    want = run("a")
    for name in ("a red ball-1.mp4", "a small blue ball-2.mp4"):
        (tmp_path / "a" / name).unlink()
    capsys.readouterr()
    assert run("a") == want
    assert "4 of 6 videos were there already" in capsys.readouterr().out
    run("a")
    assert "6 of 6 videos were there already" in capsys.readouterr().out


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red ball\na small blue ball")
    assert "samples=0" in refused(capsys, "--samples", "0")
    words = "--samples", "2", "--save-state", tmp_path / "s"
    assert "save_state: is of one prompt's stream" in refused(capsys, *words)
    assert len(made(tmp_path, "--frames", "3")) == 3
