"""A folder of public files from end to end, at small sizes and with random weights: sentences to
videos, videos to latents that training reads, latents to videos."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfmodel import pretrained
from sfmodel.config import PRESETS, DiTConfig, Preset, VAEConfig
from sfmodel.dit import DiT
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.train.data import LatentShards, Prompts, open_source
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.video import VideoWriter
from sfmodel.weights import checkpoint
from tests.clips import read_video
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
    monkeypatch.setattr("sfmodel.cli.generate.load_text", lambda *_: TEXT())
    monkeypatch.setattr("sfmodel.cli.encode.load_text", lambda *_: TEXT())
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
    assert torch.equal(a["text"].float(), TEXT()(["a red ball"])) and not b["text"].any()
    # In pieces, as the command reads them, it is what the whole video is.
    codec = pretrained.load_codec("wan-1.3b", torch.device("cpu"), vae)  # type: ignore[arg-type]
    frames, _ = read_video("videos/a.mp4")
    whole = codec.encode_chunk(frames[None, :37, :, 4:36])[0]
    assert (a["latents"] - whole).norm() / whole.norm() < 0.2  # scaled: the crop is not the same
    source = LatentShards(Path("latents"), SMALL, 6, None)
    drawn = source.draw(0, 2, 6)
    assert drawn.latents_BFCHW is not None and drawn.latents_BFCHW.shape == (2, 6, 16, 4, 6)
    assert not source.skipped
    # What is there and whole is left alone.
    before = Path("latents/a.safetensors").stat().st_mtime_ns
    cut = Path("latents/b.safetensors").read_bytes()[:-100]
    Path("latents/b.safetensors").unlink()  # it is mapped into memory
    Path("latents/b.safetensors").write_bytes(cut)
    run(monkeypatch, "encode", "videos", "--output", "latents", "--vae", vae)
    assert Path("latents/a.safetensors").stat().st_mtime_ns == before
    assert torch.equal(load_file("latents/b.safetensors")["latents"], b["latents"])
    assert "1 of 2 were there already" in capsys.readouterr().out
    run(monkeypatch, "encode", "videos/b.mp4", "--output", "few", "--vae", vae, "--frames", 3)
    fewer = load_file("few/b.safetensors")["latents"]
    torch.testing.assert_close(fewer, b["latents"][:, :3], rtol=0, atol=1e-5)


def encode_toy(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    run(monkeypatch, "encode", *words, "--preset", "toy", "--output", "latents")


def made(folder: str = "latents") -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def test_each_video_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("videos/a.mp4"), 9)
    write_video(Path("videos/sub/a.mp4"), 13)
    write_video(Path("videos/sub/.hidden.mp4"), 13)
    encode_toy(monkeypatch, "videos")
    assert made() == ["a.safetensors", "sub/a.safetensors"]
    # One that comes later and by its name before the other; nothing is lost and nothing left over.
    for name, count in (("a.MKV", 17), ("a.m4v", 21)):
        write_video(Path("other.mp4"), count).rename(f"videos/{name}")
    encode_toy(monkeypatch, "videos")
    frames = {name: load_file(f"latents/{name}")["latents"].shape[1] for name in made()}
    assert frames == {
        "a.safetensors": 5, "a.m4v.safetensors": 6, "a.mp4.safetensors": 3, "sub/a.safetensors": 4
    }  # fmt: skip
    # Training reads all of them.
    source = LatentShards(Path("latents"), PRESETS["toy"], 3, None)
    assert len(source.files) == 4 and not source.skipped


def test_videos_that_cannot_be_encoded_are_named_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "aez":
        write_video(Path(f"videos/{name}.mp4"), 9)
    Path("videos/b.mp4").touch()
    Path("videos/c.mp4").symlink_to("nowhere")
    os.mkfifo("videos/d.mp4")
    Path("videos/e.txt").write_bytes(b"\xff\xfe")
    write_video(Path("videos/sub/f.mp4"), 4)
    with pytest.raises(SystemExit) as exit:
        encode_toy(monkeypatch, "videos", "--frames", 3)
    said = capsys.readouterr()
    assert exit.value.code == 2 and made() == ["a.safetensors", "z.safetensors"]
    names = ["c.mp4", "d.mp4", "e.mp4", "b.mp4", "sub/f.mp4"]
    lines = said.err.splitlines()
    assert sorted(line.split(": skipped: ")[0] for line in lines[:-1]) == sorted(names)
    assert lines[-1] == "sfmodel: 5 of 7 videos were skipped, each named above"
    assert "has 1 latent frames: must have 3 or more" in said.err


def test_an_output_folder_is_of_one_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("videos/sub/a.mp4"), 9)
    write_video(Path("others/sub/a.mp4"), 13)
    encode_toy(monkeypatch, "videos")
    before = Path("latents/sub/a.safetensors").read_bytes()
    words = ("--preset", "toy", "--output", "latents")

    def said(*more: object) -> str:
        return refused(monkeypatch, capsys, "encode", *more, *words)

    must = ": must be another --output"
    for option, was in (
        (("--frames", 2), "latents=[None, 8, 8] (now [2, 8, 8])"),
        (("--height", 96), "latents=[None, 8, 8] (now [None, 12, 8])"),
        (("--fps", 8), "fps=[16, None] (now [16, 8.0])"),
    ):
        wanted = f"latents/sub/a.safetensors: was encoded with {was}{must}"
        assert wanted in said("videos", *option)
    with pytest.raises(SystemExit):
        encode_toy(monkeypatch, "others")
    wanted = (
        f"sub/a.mp4: skipped: latents/sub/a.safetensors is there and of another sub/a.mp4{must}"
    )
    assert wanted in capsys.readouterr().err
    assert Path("latents/sub/a.safetensors").read_bytes() == before
    # Another prompt is no other run.
    Path("videos/sub/a.txt").write_text("a red\x0b\u2028ball\r\nmoves\n")
    encode_toy(monkeypatch, "videos")
    with safe_open("latents/sub/a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["prompts"]) == ["a red\x0b\u2028ball moves"]
    # A file of another's is never replaced.
    saved("latents/mine.safetensors", torch.zeros(1, 1, 4, 8, 8))
    write_video(Path("mine.mp4"), 5)
    assert "mine.safetensors is there and not of this command" in said("mine.mp4")
    assert "frames=0: must be at least 1" in said("videos", "--frames", 0)
    assert "fps=-1.0: must be 0.01 to 1000" in said("videos", "--fps", -1)


def test_encoded_prompts_are_what_training_reads(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a red ball\n\na large blue ball\n")
    run(monkeypatch, "encode", "p.txt", "--output", "deep/prompts")
    path = Path("deep/prompts/p.safetensors")
    source = Prompts(path, SMALL, None)
    assert source.files[0].sentences == ["a red ball", "a large blue ball"]
    kept = load_file(path)
    assert kept["text"].dtype == torch.bfloat16 and kept["text"].shape == (7, 32)
    assert kept["lengths"].tolist() == [3, 4]
    drawn = source.draw(0, 8, 1, latents=False)
    assert torch.equal(drawn.text_BTE, TEXT()(drawn.sentences))


def test_many_prompts_become_files_of_one_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sfmodel.cli.encode.SHARD", 500)  # bytes: 8 words
    prompts = [f"a {colour} ball" for colour in ("red", "green", "blue", "cyan", "white")] * 3
    Path("p.txt").write_text("\n".join(prompts))
    encode_toy(monkeypatch, "p.txt")
    names = made()
    assert names == ["p-00001.safetensors", "p-00002.safetensors", "p-00003.safetensors",
                     "p-00004.safetensors", "p.safetensors"]  # fmt: skip
    for path in (Path("latents"), Path("latents/p.safetensors")):
        source = open_source(path, PRESETS["toy"], 3, None, None)
        assert isinstance(source, Prompts) and not source.skipped
        assert sorted(s for file in source.files for s in file.sentences) == sorted(prompts)
    whole = [{k: v.clone() for k, v in load_file(f"latents/{name}").items()} for name in names]
    # Stopped in the middle: the first of what is not whole, and what comes after it, are written.
    cut = Path("latents/p-00001.safetensors").read_bytes()[:-1]
    Path("latents/p-00001.safetensors").write_bytes(cut)
    Path("latents/p-00004.safetensors").unlink()
    before = Path("latents/p.safetensors").stat().st_mtime_ns
    encode_toy(monkeypatch, "p.txt")
    for name, want in zip(names, whole, strict=True):
        assert all(map(torch.equal, load_file(f"latents/{name}").values(), want.values()))
    assert Path("latents/p.safetensors").stat().st_mtime_ns == before
    encode_toy(monkeypatch, "p.txt")
    Path("p.txt").write_text("a red ball")
    said = refused(monkeypatch, capsys, "encode", "p.txt", "--preset", "toy", "--output", "latents")
    assert "is there and of other prompts: must be another --output" in said
    os.mkfifo("f.txt")
    said = refused(monkeypatch, capsys, "encode", "f.txt", "--preset", "toy")
    assert said == "sfmodel: prompt file f.txt: must be a regular file, because it is read twice"


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


def test_latents_with_nan_end_the_video_before_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    latents = torch.zeros(1, 8, 4, 8, 8)
    latents[0, 4, 0, 3, 3] = torch.nan
    path = saved("a.safetensors", latents)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "decode", path, "--preset", "toy", "--output", "a.mp4")
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out.startswith("stopped after 9 frames")
    assert said.err.startswith("sfmodel: a.mp4: frame 13 holds NaN or infinity: the weights are")
    assert len(read_video("a.mp4")[0]) == 9 and Path("a.png").exists()
    latents[0, 0] = torch.inf
    said_so = refused(monkeypatch, capsys, "decode", saved("b.safetensors", latents), "--preset",
                      "toy", "--output", "b.mp4")  # fmt: skip
    assert "b.mp4: frame 0 holds NaN" in said_so and not Path("b.mp4").exists()
    write_video(Path("c.mp4"), 40)
    monkeypatch.setattr("sfmodel.cli.encode.to_pixels", lambda images: torch.full(
        (len(images), 3, 64, 64), torch.nan if len(images) > 1 else 0.0))  # fmt: skip
    said_so = refused(monkeypatch, capsys, "encode", "c.mp4", "--preset", "toy")
    assert said_so == "sfmodel: c.mp4: its latents hold NaN or infinity from frame 1 on"
    assert not Path("out").exists()


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
