"""A folder of public files from end to end, at small sizes and with random weights: sentences to
videos, videos to latents that training reads, latents to videos."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfmodel import checkpoint, pretrained
from sfmodel.config import PRESETS, DiTConfig, Preset, VAEConfig
from sfmodel.dit import DiT
from sfmodel.text import ToyTextEncoder
from sfmodel.tiny_vae import TinyVAE
from sfmodel.train.data import LatentShards, Prompts
from sfmodel.vae import WanVAE
from sfmodel.video import VideoWriter, read_video
from tests.test_cli import refused, run

# The text encoder has a test of its own (test_umt5.py); the toy's takes its place here.
TEXT = ToyTextEncoder
SMALL = Preset(
    DiTConfig(dim=16, ffn_dim=24, heads=1, layers=1, freq_dim=8, text_dim=32, text_len=16),
    height=4,
    width=6,
    window=6,
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The public files of a small preset, which takes the place of wan-1.3b."""
    folder = tmp_path / "models"
    official, generator = folder / "Wan2.1-T2V-1.3B", folder / "checkpoints"
    official.mkdir(parents=True)
    generator.mkdir()
    torch.manual_seed(0)
    dit = checkpoint.to_official(DiT(SMALL.dit).state_dict())
    entry = {f"model.{k}": v.clone() for k, v in dit.items()}
    torch.save({"generator_ema": entry}, generator / "self_forcing_dmd.pt")
    vae = functools.partial(WanVAE, VAEConfig(dim=8))
    torch.save(vae().state_dict(), official / "Wan2.1_VAE.pth")
    torch.save(TinyVAE().state_dict(), folder / "taew2_1.pth")
    monkeypatch.setitem(PRESETS, "wan-1.3b", SMALL)
    monkeypatch.setattr(pretrained, "WanVAE", vae)
    monkeypatch.setattr(vae, "spatial_factor", 8, raising=False)
    monkeypatch.setattr("sfmodel.cli.load_text", lambda *_: TEXT())
    monkeypatch.setattr("sfmodel.coding.load_text", lambda *_: TEXT())
    monkeypatch.setenv("SFMODEL_MODELS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def write_video(path: Path, count: int, height: int = 40, width: int = 48) -> Path:
    with VideoWriter(path, 16, scale=1) as writer:
        for i in range(count):
            writer.write(torch.full((1, 3, height, width), 2 * i / count - 1))
    return path


def test_one_command_makes_videos_from_public_files(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "two.txt").write_text("a red ball\na blue ball\n")
    words = ["generate", "--preset", "wan-1.3b", "--prompt-file", models / "two.txt"]
    run(monkeypatch, *words, "--frames", 20, "--output", "a.mp4")
    for name in ("a-0.mp4", "a-1.mp4"):
        frames, fps = read_video(name)
        assert frames.shape[0] == 20 and fps == 16
        assert Path(name).with_suffix(".png").exists()
    # The second video is that of the next seed, whatever is made beside it.
    words = ["generate", "--preset", "wan-1.3b", "--prompt", "a blue ball", "--seed", 1]
    run(monkeypatch, *words, "--frames", 20, "--output", "b.mp4")
    assert torch.equal(read_video("b.mp4")[0], read_video("a-1.mp4")[0])
    # Of another size, by the other decoder, in tiles.
    for more in (["--vae", "tiny"], ["--vae", "wan", "--tile", 2]):
        run(monkeypatch, *words, *more, "--height", 64, "--frames", 5, "--output", "c.mp4")
        assert read_video("c.mp4")[0].shape[0] == 5
    assert "5 frames in" in capsys.readouterr().out


@pytest.mark.parametrize("vae", ["wan", "tiny"])
def test_encoded_videos_are_what_training_reads(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], vae: str
) -> None:
    write_video(Path("videos/a.mp4"), 40)
    write_video(Path("videos/b.mp4"), 24)
    Path("videos/a.txt").write_text("a red ball\n")
    run(monkeypatch, "encode", "videos", "--output", "latents", "--vae", vae)
    a, b = (load_file(f"latents/{name}.safetensors") for name in "ab")
    assert a["latents"].shape == (1, 10, 16, 4, 6)  # 37 of 40 frames fill latent frames
    assert b["latents"].shape == (1, 6, 16, 4, 6)
    assert torch.equal(a["text"], TEXT()(["a red ball"])) and not b["text"].any()
    # In pieces, as the command reads them, it is what the whole video is.
    codec = pretrained.load_codec("wan-1.3b", torch.device("cpu"), vae)  # type: ignore[arg-type]
    frames, _ = read_video("videos/a.mp4")
    whole = codec.encode_chunk(frames[None, :37, :, 4:36])[0]
    assert (a["latents"] - whole).norm() / whole.norm() < 0.2  # scaled: the crop is not the same
    source = LatentShards(Path("latents"), SMALL, 6, None)
    drawn = source.draw(0, 2, 6)
    assert drawn.latents_BFCHW is not None and drawn.latents_BFCHW.shape == (2, 6, 16, 4, 6)
    assert not source.skipped
    # What is there is left alone.
    before = Path("latents/a.safetensors").stat().st_mtime_ns
    Path("latents/b.safetensors").unlink()
    run(monkeypatch, "encode", "videos", "--output", "latents", "--vae", vae, "--frames", 3)
    assert Path("latents/a.safetensors").stat().st_mtime_ns == before
    fewer = load_file("latents/b.safetensors")["latents"]
    torch.testing.assert_close(fewer, b["latents"][:, :3], rtol=0, atol=1e-5)
    assert "1 of 2 were there already" in capsys.readouterr().out


def test_encoded_prompts_are_what_training_reads(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a red ball\n\na large blue ball\n")
    run(monkeypatch, "encode", "p.txt", "--output", "deep/prompts")
    path = Path("deep/prompts/p.safetensors")
    source = Prompts(path, SMALL, None)
    assert source.files[0].sentences == ["a red ball", "a large blue ball"]
    assert torch.equal(load_file(path)["text"], TEXT()(["a red ball", "a large blue ball"]))


def saved(path: str, latents: Tensor, **others: Any) -> Path:
    save_file({"latents": latents.contiguous(), **others}, path, {"prompts": json.dumps([""])})
    return Path(path)


def test_latents_are_decoded_whichever_axis_comes_first(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = torch.randn(2, 4, 16, 2, 3)
    run(monkeypatch, "decode", saved("a.safetensors", latents), "--output", "a.mp4")
    run(monkeypatch, "decode", saved("b.safetensors", latents.transpose(1, 2)),
        "--output", "b.mp4")  # fmt: skip
    for i in (0, 1):
        video = read_video(f"a-{i}.mp4")[0]
        assert video.shape[0] == 13 and Path(f"a-{i}.png").exists()
        assert torch.equal(read_video(f"b-{i}.mp4")[0], video)
    codec = pretrained.load_codec("wan-1.3b", torch.device("cpu"))
    whole = codec.decode_chunk(latents[:1])[0][0].clamp(-1, 1)
    video = read_video("a-0.mp4")[0]  # enlarged, as players would blur it
    scale = video.shape[-1] // whole.shape[-1]
    assert (video[..., ::scale, ::scale] - whole).abs().mean() < 0.05
    square = saved("c.safetensors", torch.randn(1, 16, 16, 2, 3))
    said = refused(monkeypatch, capsys, "decode", square)
    assert "16 frames and as many channels: --axes must say which come first" in said
    run(monkeypatch, "decode", square, "--axes", "channels-frames", "--output", "c.mp4")
    assert read_video("c.mp4")[0].shape[0] == 61


def test_wrong_files_are_one_sentence(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: object) -> str:
        return refused(monkeypatch, capsys, *words)

    assert "none: there is no such file or folder" in said("encode", "none")
    Path("empty").mkdir()
    assert "empty: holds no video" in said("encode", "empty")
    Path("bad.mp4").write_bytes(b"no video")
    assert "bad.mp4: damaged or no video" in said("encode", "bad.mp4")
    short = write_video(Path("short.mp4"), 8)
    assert "has 2 latent frames: must have 3 or more" in said("encode", short, "--frames", 3)
    assert not Path("out").exists()
    assert "must be [N, frames, 16, height, width] or" in said(
        "decode", saved("d.safetensors", torch.randn(1, 3, 4, 2, 2))
    )
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, "e.safetensors")
    assert "holds 2 tensors, none of them named latents" in said("decode", "e.safetensors")
    one = saved("f.safetensors", torch.randn(1, 2, 16, 2, 3))
    assert "2 channels by these axes" in said("decode", one, "--axes", "channels-frames")
    (models / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").write_text("<!DOCTYPE html><html>")
    assert "Wan2.1_VAE.pth: is a web page, not weights" in said("decode", one)
    (models / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").unlink()
    wanted = "holds no video VAE for wan-1.3b (Wan-AI/Wan2.1-T2V-1.3B: Wan2.1_VAE.pth)"
    assert wanted in said("decode", one, "--vae", "wan")
    (models / "taew2_1.pth").unlink()
    assert wanted in said("decode", one)
    (models / "checkpoints" / "self_forcing_dmd.pt").unlink()
    wanted = "holds no few-step generator for wan-1.3b (gdhe17/Self-Forcing"
    words = ("generate", "--prompt", "a ball", "--preset")
    assert wanted in said(*words, "wan-1.3b")
    assert "wan-14b': has no public few-step weights" in said(*words, "wan-14b")
