"""The commands as a user types them: what they write, and one sentence for what cannot be."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfmodel.cli.main import main
from sfmodel.extras import EXTRAS
from sfmodel.pretrained import TOY_WEIGHTS
from tests.clips import read_video


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
    assert "must be a name ending in .mp4" in said("--output", tmp_path / "v.avi")
    assert not list(tmp_path.glob("*.mp4"))


class Loaded(Exception):
    """Something heavy was done."""


@pytest.fixture
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read, no prompt is encoded, no model is built."""

    def heavy(*_: object, **__: object) -> None:
        raise Loaded

    for name in (
        "weights.checkpoint._fill",
        "toy.vae.ToyVAE.from_pretrained",
        "umt5.UMT5Encoder.__call__",
    ):
        monkeypatch.setattr(f"sfmodel.{name}", heavy)
    monkeypatch.setattr("sfmodel.train.parallel.place", heavy)
    monkeypatch.setattr("sfmodel.train.loop.open_source", heavy)


@pytest.mark.usefixtures("nothing_heavy")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --output {0}/a/v.avi", "must be a name ending in .mp4"),
        ("generate --output /proc/none/v.mp4", "cannot write /proc/none/v.mp4"),
        ("generate --output {0}/sheet.mp4", "sheet.png: it is a folder"),
        ("generate --frames 0", "frames=0: must be at least 1"),
        ("generate --chunk 0", "chunk=0: must be at least 1"),
        ("generate --window 4 --sink 2", "leaves 2 latent frames, fewer than a chunk of 3"),
        ("generate --height 100", "height=100: must be a multiple of 32"),
        ("generate --tile 4", "tile=4: the toy has one codec"),
        ("generate --preset wan-1.3b --models {0} --tile 0", "holds no text encoder"),
        (f"generate --seed {2**63 - 1}", "seed=9223372036854775807: must be at least"),
        (f"generate --seed -{2**64}", "seed=-18446744073709551616: must be at least"),
        ("generate --watch", "not a terminal"),
        ("generate --checkpoint {0}", "holds no weights"),
        (f"train --seed {10**30}", "must be at least -2**63"),
        ("train --lr nan", "lr=nan: must be at least 0"),
        ("train --betas 0 2", "betas=(0.0, 2.0): must be at least 0 and at most 1"),
        ("train --betas 0 1", "betas=(0.0, 1.0): must be less than 1"),
        ("train --ema 1", "ema=1.0: must be less than 1"),
        ("train --lr inf", "lr=inf: must be at least 0, and finite"),
        ("train --lora-alpha 2", "lora_alpha=2.0: goes with a lora_rank"),
        ("train --preset wan-1.3b --darken 0.5", "darken=0.5: only the toy world has a light"),
        ("train --recipe sf+gan --gan-sigma 0", "gan_sigma=0: penalties are measured by"),
        ("train --recipe sf+dmd --judged random", "give rollouts"),
        ("train --recipe consistency --first 1 --image", "has a teacher that makes whole clips"),
        ("train --recipe tf --recipe sf+dmd --batch 0", "batch=0: must be at least 1"),
        ("train --threads -1", "threads=-1: must be at least 0"),
        ("train --attention-impl x", "attention_impl='x': must be one of auto"),
        ("train --init {0}/none.pt", "there is no such checkpoint file"),
        ("train --recipe sf+dmd --critic {0}/lora.pt", "it is a LoRA"),
        ("train --output /proc/none", "cannot write /proc/none"),
        ("evaluate --output /proc/none", "cannot write /proc/none/evaluation.json"),
        ("evaluate --chunk 0", "chunk=0: must be at least 1"),
        ("evaluate --window 2", "window=2 is smaller than a chunk of 3"),
        ("evaluate --euler -1", "euler=-1: must be 0 to 1000"),
        ("encode {0}/none.mp4 --preset toy --frames 0", "frames=0: must be at least 1"),
        ("encode {0}/none.mp4 --preset toy --output /proc/none", "cannot write /proc/none"),
        ("decode {0}/latents.pt --preset toy --output {0}/v.avi", "must be a name ending in .mp4"),
        ("decode {0}/none.pt --preset toy", "there is no such checkpoint file"),
        ("convert {0}/toy.safetensors {0}/to --to diffusers --shard-gb 0", "shard_gb=0.0"),
        ("doctor --json {0}", "it is a folder"),
    ],
)
def test_what_the_command_line_decides_is_checked_first(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: str,
    said: str,
) -> None:
    """And nothing is left behind."""
    torch.save({"generator_lora": {"w": torch.zeros(1)}}, tmp_path / "lora.pt")
    torch.save(torch.zeros(1, 2, 4, 8, 8), tmp_path / "latents.pt")
    (tmp_path / "toy.safetensors").symlink_to(TOY_WEIGHTS)
    (tmp_path / "sheet.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert said in refused(monkeypatch, capsys, *words.format(tmp_path).split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 2])
def test_any_seed_of_64_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    run(monkeypatch, "generate", "--frames", 1, "--seed", seed, "--output", tmp_path / "v.mp4")


@pytest.mark.parametrize("module", ["tyro", "rich", "av", "PIL", "safetensors", "matplotlib"])
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "sfmodel.cli.main")
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("sfmodel.cli.main")
    said = capsys.readouterr().err.strip()
    name = {"PIL": "pillow"}.get(module, module)
    assert exit.value.code == 2
    assert said == f"sfmodel: needs {name}, not installed: pip install 'sfkernels[model]'"


@pytest.mark.parametrize(
    ("module", "library", "name"),
    [
        ("sfmodel.pretrained", "rich", "rich"),
        ("sfmodel.saved_stream", "safetensors", "safetensors"),
        ("sfmodel.video", "av", "av"),
        ("sfmodel.frame_files", "PIL", "pillow"),
        ("sfmodel.train.loop", "rich", "rich"),
        ("sfmodel.cli.predict", "rich", "rich"),
    ],
)
def test_an_import_names_the_library_that_is_missing(module: str, library: str, name: str) -> None:
    code = f"import sys; sys.modules['{library}'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"ImportError: sfmodel: needs {name}, not installed: pip install 'sfkernels[model]'"
    assert done.stderr.splitlines()[-1] == said


def test_the_model_needs_no_library_of_the_commands() -> None:
    missing = ", ".join(f"{name}=None" for name in EXTRAS["model"])
    code = f"import sys; sys.modules.update({missing}); import sfmodel.stream, sfmodel.vae.wan"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_latents_alone_in_a_file_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    latents = torch.randn(1, 3, 4, 8, 8)
    for x in (latents, latents[0], latents.transpose(1, 2), latents[0].transpose(0, 1)):
        torch.save(x, tmp_path / "x.pt")
        words = "decode", tmp_path / "x.pt", "--preset", "toy", "--output", tmp_path / "v.mp4"
        run(monkeypatch, *words)
        assert len(read_video(tmp_path / "v.mp4")[0]) == 9


def test_a_signal_keeps_the_video_so_far(tmp_path: Path) -> None:
    """Any that tests/test_process.py proves to be an interrupt."""
    output = tmp_path / "v.mp4"
    command = [sys.executable, "-m", "sfmodel", "generate", "--frames", "endless"]
    with subprocess.Popen([*command, "--output", output], stdout=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(p.stat().st_size for p in tmp_path.glob(".v.mp4.*")):  # it is writing
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
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
