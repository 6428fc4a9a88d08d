"""`sfmodel generate` with prompts over time, images and videos, in the toy world."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from sfmodel.cli.generate import generate
from sfmodel.cli.main import run_command
from sfmodel.config import PRESETS
from sfmodel.footage import to_pixels
from sfmodel.pictures import covering_image
from sfmodel.pretrained import load_toy
from sfmodel.prompts import read_timeline
from sfmodel.saved_stream import load_stream, save_stream
from sfmodel.stream import Stream
from sfmodel.toy import world
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.video import VideoWriter
from tests.clips import read_video

RED, BLUE = (list(world.COLOURS).index(name) for name in ("red", "blue"))


def seen(file: Path, frames: int | None = None) -> Tensor:
    """Pixels [T, 3, 64, 64] of a video, which is written in larger ones."""
    pixels_TCHW = read_video(file, frames)[0]
    return F.avg_pool2d(pixels_TCHW, pixels_TCHW.shape[-1] // 64)


def made(folder: Path, *words: str | Path) -> Tensor:
    """Pixels [T, 3, 64, 64] of the video that the command makes."""
    file = folder / "made.mp4"
    arguments = ["generate", *map(str, words), "--output", str(file)]
    run_command("sfmodel", {"generate": generate, "other": generate}, arguments)
    return seen(file)


def refused(
    capsys: pytest.CaptureFixture[str], *words: str | Path, folder: Path = Path("out")
) -> str:
    with pytest.raises(SystemExit) as ended:
        made(folder, *words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


def clip(folder: Path, frames: int = 33) -> Path:
    """A real video of a red ball."""
    truth = world.draw(64, frames, 5)
    red = truth.colour_B.tolist().index(RED)
    file = folder / "red.mp4"
    with VideoWriter(file, 16) as writer:
        writer.write(world.render(truth)[red])
    return file


def colours(pixels_TCHW: Tensor) -> list[int]:
    return world.measure(pixels_TCHW[None]).colour_BT[0].tolist()


def test_prompts_over_time(tmp_path: Path) -> None:
    """Red from the start, and no more of it from the chunk on that shows second 2, frames 25 to
    36, in which it becomes blue."""
    (tmp_path / "at.txt").write_text("2.0s: a large blue ball\n0 a large red ball moves slowly\n")
    seen = colours(made(tmp_path, "--prompts-at", tmp_path / "at.txt", "--frames", "61"))
    assert {*seen[:25]} == {RED} and RED not in seen[25:] and {*seen[33:]} == {BLUE}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red ball", "'a red ball' must be a second and a prompt: 7.5 a cat sleeps"),
        ("1 a ball\n1.0 a red ball", "has two prompts at second 1"),
        ("-1 a ball", "must be a second and a prompt"),
        ("nan a ball", "must be a second and a prompt"),
        ("3", "must be a second and a prompt"),
        ("", "has no prompt"),
    ],
)
def test_a_timeline_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "at.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_timeline(tmp_path / "at.txt")


def test_an_image_is_the_first_frame(tmp_path: Path) -> None:
    """Through the codec; the ball goes on from there. Taller than the video: its middle."""
    pixels = seen(clip(tmp_path), 1)
    still = pixels[0].add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    tall = Image.new("RGB", (64, 128))
    tall.paste(Image.fromarray(still), (0, 32))
    tall.save(tmp_path / "still.png")
    got = made(
        tmp_path, "--image", tmp_path / "still.png", "--prompt", "a red ball", "--frames", "25"
    )
    assert (got[0] - pixels[0]).abs().mean() < 0.05
    at = world.measure(got[None]).position_BT2[0]
    want = world.measure(pixels[None]).position_BT2[0, 0]
    assert (at[0] - want).norm() < 2 and (at[1] - at[0]).norm() < 4
    assert {*colours(got)} == {RED}


def test_an_image_is_seen_as_it_is_meant(tmp_path: Path) -> None:
    """Upright, whatever the file says of it, and without transparency."""
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 255, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned right by a quarter
    image.save(tmp_path / "turned.png", exif=turned)
    seen = covering_image(tmp_path / "turned.png", 4, 2)
    assert seen.shape == (4, 2, 3) and seen[0, 1].tolist() == [0, 0, 255]
    assert to_pixels([seen]).shape == (1, 3, 4, 2)


def test_a_video_goes_on(tmp_path: Path) -> None:
    """It is kept as it is, but for what fills no chunk; the ball flies on from its end."""
    file = clip(tmp_path)  # 1 + 32 pixel frames: a still and 8 latent frames, two chunks of three
    pixels, got = seen(file), made(tmp_path, "--video", file, "--frames", "49")
    assert len(got) == 49 and (got[:25] - pixels[:25]).abs().mean() < 0.05
    at = world.measure(got[None]).position_BT2[0, 20:40]
    assert at.diff(dim=0).norm(dim=-1).max() < 5
    assert len(made(tmp_path, "--video", file)) == 25 + 121


def test_a_video_made_anew(tmp_path: Path) -> None:
    """With less strength the ball is where it was; another prompt gives it another colour."""
    file = clip(tmp_path)
    want = world.measure(seen(file)[None, :25]).position_BT2[0]

    def away(strength: str) -> float:
        words = "--strength", strength, "--prompt", "a large blue ball"
        got = made(tmp_path, "--video", file, *words)
        assert len(got) == 25
        if strength != "0.15":
            assert colours(got)[-1] == BLUE
        return float((world.measure(got[None]).position_BT2[0] - want).norm(dim=-1).nanmean())

    assert away("0.15") < 3 < away("1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--image {0}/no.png", "no.png: No such file"),
        ("--image {0}/bad.png", "bad.png: damaged, or no picture"),
        ("--image {0}", "Is a directory"),
        ("--image {0}/bad.png --video {0}/v.mp4", "image and video: give one of them"),
        ("--video {0}/no.mp4", "no.mp4: cannot be read: there is no such file"),
        ("--video {0}/bad.png", "bad.png: damaged or no video"),
        ("--video {0}/red.mp4 --frames 20", "red.mp4 has 25 already"),
        ("--video {0}/red.mp4 --strength 0.01", "strength=0.01: must be 0, or 0.1 to 1"),
        ("--video {0}/red.mp4 --strength 2", "strength=2.0: must be 0 to 1"),
        ("--strength 0.5", "strength=0.5: goes with a video"),
        ("--prompts-at {0}/no.txt", "no.txt: No such file"),
        ("--prompts-at {0}/bad.txt", "'a cat' must be a second and a prompt"),
        ("--prompts-at {0}/bad.txt --prompt-file {0}/bad.txt", "prompts_at: give one of them"),
        ("--positions here", "positions"),
        ("--guidance 3", "guidance and negative: go with --sampler euler or unipc"),
        ("--prompt-file {0}/two.txt --frames endless", "the first of 2 videos would never end"),
        ("--video {0}/made.mp4", "made.mp4: would be written over"),
        ("--image {0}/made.png", "made.png: would be written over"),
        ("--save-state {0}/made.mp4", "made.mp4: would be written over"),
        ("--prompt-over 0", "prompt_over=0: must be at least 1"),
        ("--resume {0}/no", "no: there is no such file"),
        ("--resume {0}/bad.png", "bad.png: damaged, or no file of tensors"),
        ("--save-state {0}", "it is a folder"),
        ("--save-state {0}/s --prompt-file {0}/two.txt", "save_state: is of one prompt's stream"),
        ("--resume {0}/s --seed 3", "seed: is of a new stream"),
        ("--resume {0}/s --window 5", "window=5: {0}/s goes on with its own"),
        ("--resume {0}/s --warped", "warped=True: {0}/s goes on with its own"),
        ("--resume {0}/s --samples 2", "resume: is of one stream, and 2 videos are asked for"),
        ("--sampler euler --warped", "warped: goes with --sampler few-step"),
        ("--sampler unipc --keep-cache", "keep_cache: goes with --sampler few-step"),
        ("--sampler unipc --prompt-over 2", "prompt_over: goes with --sampler few-step"),
        ("--resume {0}/s --preset wan-1.3b", "preset=wan-1.3b: {0}/s goes on with its own"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    (tmp_path / "bad.png").write_bytes(b"none")
    (tmp_path / "bad.txt").write_text("a cat")
    (tmp_path / "two.txt").write_text("a red ball\na blue ball")
    if "red.mp4" in words:
        clip(tmp_path)
    if "--resume {0}/s" in words:
        made(tmp_path, "--frames", "5", "--save-state", tmp_path / "s")
        capsys.readouterr()
    if words == "--positions here":
        with pytest.raises(SystemExit):
            made(tmp_path, *words.split())
        return
    words = words.format(tmp_path)
    assert said.format(tmp_path) in refused(capsys, *words.split(), folder=tmp_path)


def run(*words: str | Path) -> None:
    arguments = ["generate", *map(str, words)]
    run_command("sfmodel", {"generate": generate, "other": generate}, arguments)


def test_an_image_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "00001.png"
    Image.new("RGB", (64, 64)).save(image)
    before = image.read_bytes()
    with pytest.raises(SystemExit):
        run("--image", image, "--output", tmp_path / "%05d.png")
    assert f"{image}: would be written over" in capsys.readouterr().err
    assert image.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_a_state_is_not_saved_of_what_may_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--layout", "vbench", "--output", tmp_path, "--save-state", tmp_path / "s")
    assert "save_state: goes with --layout numbers, not vbench" in capsys.readouterr().err


def test_a_name_with_a_percent_sign(tmp_path: Path) -> None:
    run("--frames", "5", "--output", tmp_path / "50% red.mp4")
    assert len(read_video(tmp_path / "50% red.mp4")[0]) == 5


def test_what_fails_does_not_count_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--frames", "40", "--layout", "moviegen", "--output", tmp_path)
    denoise, calls = Stream.denoise, itertools.count()

    def failing(self: Stream) -> Tensor:
        if next(calls) == 2:
            raise MemoryError
        return denoise(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "denoise", failing)
        with pytest.raises(SystemExit):
            run(*words)
    assert next(calls) == 3 and not [*tmp_path.glob("*.mp4")]
    run(*words)
    assert len(read_video(tmp_path / "0.mp4")[0]) == 40


def test_a_stream_that_a_library_saved_goes_on(tmp_path: Path) -> None:
    """Its notes are its own."""
    model, codec, _ = load_toy()
    stream = Stream(model, codec, ToyTextEncoder()(["a red ball"]), PRESETS["toy"])
    several: list[dict[str, Any]] = [{}, {"preset": "toy"}, {"mine": 3}]
    for i, notes in enumerate(several):
        save_stream(stream, tmp_path / f"{i}", notes)
        assert {*colours(made(tmp_path, "--resume", tmp_path / f"{i}", "--frames", "5"))} == {RED}


def test_a_stream_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """In another process: what is in the file of the stream comes after what is in the video."""
    state, video = tmp_path / "state", tmp_path / "endless.mp4"
    words = ["generate", "--frames", "endless", "--prompt", "a red ball", "--sink", "1"]
    words += ["--output", str(video), "--save-state", str(state)]
    command = [sys.executable, "-m", "sfmodel", *words]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}  # other numbers of them round otherwise
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threads)
    while sum(each.stat().st_size for each in tmp_path.rglob("*")) < 30_000:  # of video
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and state.exists() and "stopped after" in said
    with safe_open(state, "pt") as file:
        counts = json.loads(file.metadata()["facts"])["counts"]
    assert counts["handed_out"] == len(read_video(video)[0]) > 12
    text = ToyTextEncoder()(["a red ball"])
    model, codec, _ = load_toy()
    whole = Stream(model, codec, text, replace(PRESETS["toy"], sink=1))
    want = torch.cat([*whole.frames(counts["handed_out"] + 20)], 1)[:, -20:]
    other = Stream(model, codec, text, replace(PRESETS["toy"], sink=1), seed=5)
    load_stream(other, state)
    got = torch.cat([*other.frames(20)], 1)
    assert (got.int() - want.int()).abs().max() <= 1
    resumed = made(tmp_path, "--resume", state, "--frames", "20")
    assert {*colours(resumed)} == {RED}
    other_prompt = made(tmp_path, "--resume", state, "--frames", "30", "--prompt", "a blue ball")
    assert colours(other_prompt)[-1] == BLUE
