"""The commands as a user types them: what they write, and one sentence for what cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sfmodel.cli import main
from sfmodel.pretrained import TOY_WEIGHTS
from sfmodel.video import read_video


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sfmodel", *map(str, words)])
    main()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> str:
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *words)
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and "\n" not in said, said
    return said


def test_generate_writes_a_video_and_a_sheet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["generate", "--prompt", "a small blue ball", "--frames", 20, "--seed", 3]
    words += ["--window", 6, "--sink", 1, "--chunk", 2, "--output", tmp_path / "deep" / "a.mp4"]
    run(monkeypatch, *words)
    frames, fps = read_video(tmp_path / "deep" / "a.mp4")
    assert len(frames) == 20 and fps == 16
    with Image.open(tmp_path / "deep" / "a.png") as sheet:
        assert sheet.width > 500
    assert "20 frames in" in capsys.readouterr().out


def test_prompt_file_makes_a_video_of_each_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\na large green ball moves up\n")
    output = tmp_path / "v.mp4"
    run(monkeypatch, "generate", "--prompt-file", prompts, "--frames", 5, "--output", output)
    written = sorted(p.name for p in tmp_path.glob("v*"))
    assert written == ["v-0.mp4", "v-0.png", "v-1.mp4", "v-1.png"]


def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(*words: object) -> str:
        output = () if "--output" in words else ("--output", tmp_path / "v.mp4")
        return refused(monkeypatch, capsys, "generate", *words, *output)

    assert "No such file" in said("--prompt-file", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no prompt" in said("--prompt-file", tmp_path / "empty.txt")
    assert "does not know 'cat'" in said("--prompt", "a red cat")
    assert "window=2 is smaller than a chunk of 3" in said("--window", 2)
    assert "sink=9 must be smaller than window=9" in said("--sink", 9)
    assert "frames=0: must be at least 1" in said("--frames", 0)
    assert "must be one of toy" in said("--preset", "huge")
    assert "no such folder of models" in said("--preset", "wan-1.3b", "--models", tmp_path / "no")
    lacking = said("--preset", "wan-1.3b", "--models", tmp_path)
    assert "holds no text encoder for wan-1.3b (Wan-AI/Wan2.1-T2V-1.3B: models_t5" in lacking
    assert "height=100: must be a multiple of 32 pixels" in said("--height", 100)
    assert "there is no such checkpoint" in said("--checkpoint", tmp_path / "none.pt")

    state = load_file(TOY_WEIGHTS)
    other = tmp_path / "other.safetensors"
    save_file({f"unet.{k}": v for k, v in state.items()}, other)
    assert "not a checkpoint of this model: missing" in said("--checkpoint", other)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(TOY_WEIGHTS.read_bytes()[:5000])
    assert "not a whole safetensors file" in said("--checkpoint", cut)
    blocked = tmp_path / "file"
    blocked.touch()
    assert "cannot write" in said("--output", blocked / "v.mp4")
    assert "expected a name ending in .mp4" in said("--output", tmp_path / "v.avi")
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_video_so_far(tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "v.mp4"
    command = [sys.executable, "-m", "sfmodel", "generate", "--frames", "endless"]
    with subprocess.Popen([*command, "--output", output], stdout=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(p.stat().st_size for p in tmp_path.glob(".v.mp4.*")):  # it is writing
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and b"stopped after" in out
    frames, _ = read_video(output)
    assert len(frames) >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.mp4", "v.png"]


def test_train_and_generate_with_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "--steps", 2, "--batch", 7, "--frames", 7, "--windows", 6, "--threads", 1]
    run(monkeypatch, *words, "--output", tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    assert str(weights) in capsys.readouterr().out
    assert "holds a run already" in refused(
        monkeypatch, capsys, *words, "--output", tmp_path / "run"
    )
    video = tmp_path / "v.mp4"
    run(monkeypatch, "generate", "--checkpoint", weights, "--frames", 3, "--output", video)
    assert len(read_video(video)[0]) == 3
