"""Sources of training data: what a row is does not depend on who asks, and bad files are named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sfmodel.config import PRESETS
from sfmodel.toy import world
from sfmodel.toy.text import VOCABULARY, ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.data import (
    Clips,
    LatentShards,
    Prompts,
    Source,
    ToyWorld,
    VideoFiles,
    open_source,
    skipped_report,
)
from sfmodel.video import VideoWriter

PRESET = PRESETS["toy"]
CODEC, TEXT = ToyVAE().eval(), ToyTextEncoder()


def open_toy(path: Path | None, frames: int = 3, text: Any = TEXT) -> Source:
    return open_source(path, PRESET, frames, CODEC, text)


def write_shard(
    path: Path,
    values: Sequence[float],
    frames: int = 3,
    text: Tensor | None = None,
    prompts: Any = "one a clip",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Clips [N, F, 4, 8, 8] of one value each, and sentences that differ."""
    latents = torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, frames, 4, 8, 8).to(dtype)
    tensors = {"latents": latents.contiguous()} | ({} if text is None else {"text": text})
    if prompts == "one a clip":
        prompts = [words(int(value)) for value in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, None if prompts is None else {"prompts": json.dumps(prompts)})
    return path


def words(number: int) -> str:
    """Sentences of 1, 2 or 3 words, of which the last tells the number."""
    return " ".join([*("a", "ball")[: number % 3], VOCABULARY[number % len(VOCABULARY)]])


def drawn(source: Source, count: int, seed: int = 0, frames: int = 1) -> list[float]:
    """The values of clips that `write_shard` wrote."""
    latents = source.draw(seed, count, frames).latents_BFCHW
    assert latents is not None and (latents == latents[:, :1, :1, :1, :1]).all()
    return latents[:, 0, 0, 0, 0].tolist()


def gradient(frames: int, height: int, width: int, level: float) -> Tensor:
    """Frames [T, 3, H, W]: coloured slopes that drift."""
    t = torch.linspace(-0.3, 0.3, frames).view(-1, 1, 1)
    y = torch.linspace(-1, 1, height).view(1, -1, 1).expand(frames, -1, width)
    x = torch.linspace(-1, 1, width).view(1, 1, -1).expand(frames, height, -1)
    return torch.stack([0.8 * x + t, 0.5 * y - t, level + 0 * x], dim=1).clamp(-1, 1)


def write_video(
    path: Path, frames: int = 9, height: int = 64, width: int = 64, level: float = 0.0
) -> Path:
    with VideoWriter(path, scale=1) as writer:
        writer.write(gradient(frames, height, width, level))
    return path


@pytest.fixture(scope="module", params=["toy", "shards", "videos", "prompts", "embeddings"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """One of each kind, with a bad clip where there can be one."""
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "toy":
            return open_source(None, PRESET, 3, CODEC, TEXT, drop_word=0.3, drop_text=0.2)
        case "shards":
            write_shard(folder / "a.safetensors", [1, 2, float("inf"), 4], prompts=["a"] * 4)
            write_shard(folder / "b.safetensors", [5, 6], text=torch.randn(2, 5, 32), prompts=None)
            write_shard(folder / "c.safetensors", [7, 8, 9], frames=5)
        case "videos":
            for i, level in enumerate([-0.5, 0.0, 0.5]):
                write_video(folder / f"{i}.mp4", level=level)
                (folder / f"{i}.txt").write_text(f"a {VOCABULARY[4 + i]} ball\n")
            cut = write_video(folder / "cut.mp4", 30).read_bytes()
            (folder / "cut.mp4").write_bytes(cut[: len(cut) * 2 // 3])
        case "prompts":
            (folder / "p.txt").write_text("\n".join(map(words, range(20))))
            return open_toy(folder / "p.txt")
        case "embeddings":
            text, prompts = torch.randn(5, 4, 32), [words(i) for i in range(5)]
            text[2, 1, 1] = torch.nan
            save_file({"text": text}, folder / "e.safetensors", {"prompts": json.dumps(prompts)})
            return open_toy(folder / "e.safetensors")
    return open_toy(folder)


def joined(parts: list[Clips]) -> Clips:
    length = max(part.text_BTE.shape[1] for part in parts)
    texts = [F.pad(p.text_BTE, (0, 0, 0, length - p.text_BTE.shape[1])) for p in parts]
    clips = [p.latents_BFCHW for p in parts if p.latents_BFCHW is not None]
    sentences = [sentence for part in parts for sentence in part.sentences]
    return Clips(torch.cat(clips) if clips else None, torch.cat(texts), sentences)


def same(a: Clips, b: Clips) -> bool:
    if a.latents_BFCHW is None or b.latents_BFCHW is None:
        equal = a.latents_BFCHW is b.latents_BFCHW
    else:
        equal = torch.equal(a.latents_BFCHW, b.latents_BFCHW)
    return equal and torch.equal(a.text_BTE, b.text_BTE) and a.sentences == b.sentences


def test_a_row_does_not_depend_on_the_others(source: Source) -> None:
    def draw(rows: slice = slice(None), seed: int = 3) -> Clips:
        return source.draw(seed, 7, 2, rows, latents=source.has_latents)

    whole = draw()
    if source.has_latents:
        assert whole.latents_BFCHW is not None and whole.latents_BFCHW.shape == (7, 2, 4, 8, 8)
        assert whole.latents_BFCHW.dtype == torch.float32 and whole.latents_BFCHW.isfinite().all()
        assert whole.latents_BFCHW.flatten(1).unique(dim=0).shape[0] > 1
    assert whole.text_BTE.dtype == torch.float32 and whole.text_BTE.shape[::2] == (7, 32)
    assert whole.text_BTE.isfinite().all() and len(whole.sentences) == 7
    assert same(joined([draw(slice(0, 1)), draw(slice(1, 5)), draw(slice(5, None))]), whole)
    odd = draw(slice(1, None, 2))
    assert odd.sentences == whole.sentences[1::2]
    assert not same(draw(seed=4), whole)
    assert same(draw(), whole)  # whatever was drawn between


def test_prompts_alone_are_those_of_the_clips(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not source.has_latents:
        with pytest.raises(ValueError, match=r"has prompts alone, this recipe needs clips: must"):
            source.draw(0, 1, 1)
        return
    clips = source.draw(5, 6, 2, slice(2, 6))
    monkeypatch.setattr(CODEC, "latents_of", None)
    monkeypatch.setattr(CODEC, "encode_chunk", None)
    monkeypatch.setattr("sfmodel.train.data.Files._latents", None)
    alone = source.draw(5, 6, 2, slice(2, 6), latents=False)
    assert alone.latents_BFCHW is None
    if isinstance(source, ToyWorld):  # without bad clips, which give way to others
        assert torch.equal(alone.text_BTE, clips.text_BTE) and alone.sentences == clips.sentences
    assert len(alone.sentences) == 4


def test_rows_and_frames_that_do_not_exist(source: Source) -> None:
    with pytest.raises(ValueError, match=r"rows=slice\(4, 8, None\) of batch=4: must be at least"):
        source.draw(0, 4, 2, slice(4, 8), latents=False)
    if source.has_latents and not isinstance(source, ToyWorld):
        for frames in (0, 4):
            with pytest.raises(ValueError, match=rf"frames={frames}: must be 1 to 3 here"):
                source.draw(0, 4, frames)


def test_the_toy_world_is_that_of_its_codec() -> None:
    source = ToyWorld(CODEC, TEXT, drop_word=0.2, drop_text=0.3)
    clips = source.draw(11, 12, 4)
    want = CODEC.sample_latents(12, 4, 11, drop=0.2, empty=0.3)
    assert clips.latents_BFCHW is not None
    torch.testing.assert_close(clips.latents_BFCHW, want.latents_BFCHW)
    assert clips.sentences == want.sentences and "" in clips.sentences
    assert torch.equal(clips.text_BTE, TEXT(want.sentences))
    pixels = world.sample(12, 13, 11).pixels_BTCHW
    rendered, _ = CODEC.encode_chunk(pixels)
    torch.testing.assert_close(clips.latents_BFCHW, rendered, rtol=0, atol=1e-4)


def test_items_are_uniform_over_shards_of_any_size(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [0])
    write_shard(tmp_path / "b.safetensors", [1, 2, 3, 4, 5, 6])
    write_shard(tmp_path / "c.safetensors", [7, 8, 9])
    counts = Counter(drawn(open_toy(tmp_path), 1000))
    assert len(counts) == 10 and all(70 <= count <= 130 for count in counts.values()), counts


def test_what_is_drawn_never_changes(tmp_path: Path) -> None:
    """A resumed run sees the same data in another process, and on another version."""
    write_shard(tmp_path / "a.safetensors", range(100))
    pinned = [90.0, 7.0, 84.0, 5.0, 3.0, 87.0]
    assert drawn(open_toy(tmp_path), 6, seed=7) == pinned
    assert drawn(open_toy(tmp_path), 3, seed=7) == pinned[:3]  # nor does it depend on the batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_clips_are_cut_at_their_start(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = torch.arange(5, dtype=dtype).view(1, 5, 1, 1, 1).expand(2, 5, 4, 8, 8).contiguous()
    path = tmp_path / "a.safetensors"
    save_file({"latents": latents}, path, {"prompts": '["a ball", "a ball"]'})
    clips = open_toy(path).draw(0, 2, 3).latents_BFCHW
    assert clips is not None and clips.dtype == torch.float32
    assert torch.equal(clips, latents[:, :3].float())


def test_text_is_padded_with_zeros(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [0], text=torch.ones(1, 2, 32), prompts=["said"])
    write_shard(tmp_path / "b.safetensors", [1], text=torch.ones(1, 5, 32).half(), prompts=None)
    clips = open_toy(tmp_path, text=None).draw(0, 8, 1)
    assert {*clips.sentences} == {"said", ""} and clips.text_BTE.shape == (8, 5, 32)
    for text, sentence in zip(clips.text_BTE, clips.sentences, strict=True):
        length = 2 if sentence else 5
        assert (text[:length] == 1).all() and (text[length:] == 0).all()


def test_clips_with_nan_give_way_to_others(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", range(4))
    write_shard(tmp_path / "b.safetensors", range(4, 8))
    before = drawn(open_toy(tmp_path), 100, frames=2)
    latents = torch.arange(4.0, 8).view(4, 1, 1, 1, 1).repeat(1, 3, 4, 8, 8)
    latents[1, 1, 0, 3, 3] = torch.nan
    latents[2, 2] = torch.nan  # not among the frames that are loaded
    prompts = json.dumps(["a"] * 4)
    save_file({"latents": latents}, tmp_path / "b.safetensors", {"prompts": prompts})
    source = open_toy(tmp_path)
    assert source.skipped == {}
    after = drawn(source, 100, frames=2)
    assert 5.0 in before and {*after} == {0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0}
    assert [b for b, a in zip(before, after, strict=True) if a != b] == [5.0] * before.count(5.0)
    assert len({a for b, a in zip(before, after, strict=True) if b == 5.0}) > 2
    assert source.skipped == {"b.safetensors": "item 1: latents holds NaN or infinity"}


def test_a_shard_cut_off_while_training_gives_way(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", range(4))
    path = write_shard(tmp_path / "b.safetensors", range(4, 8))
    source = open_toy(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert {*drawn(source, 50)} == {0.0, 1.0, 2.0, 3.0}
    assert "not a whole safetensors file" in source.skipped["b.safetensors"]


def test_no_clip_that_can_be_used(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [float("nan")] * 3, prompts=["a"] * 3)
    reason = r"nothing in it can be used: 1 file skipped: a.safetensors \(item \d: latents holds"
    with pytest.raises(ValueError, match=reason):
        open_toy(tmp_path).draw(0, 2, 3)


def cut_off(path: Path) -> None:
    write_shard(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-100])


def unnamed(path: Path) -> None:
    save_file({"latent": torch.zeros(2, 3, 4, 8, 8)}, path, {"prompts": '["a", "a"]'})


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        prompts = json.dumps(["a"] * shape[0])
        save_file({"latents": torch.zeros(shape, dtype=dtype)}, path, {"prompts": prompts})

    return write


def with_text(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], Any]:
    return lambda path: write_shard(path, [1, 2], text=torch.zeros(shape, dtype=dtype))


def with_prompts(prompts: Any) -> Callable[[Path], Any]:
    return lambda path: write_shard(path, [1, 2], prompts=prompts)


MUST = ": must be [N, 3 or more, 4, 8, 8]"
LIST = "must have text, or a JSON list of 2 sentences as prompts in its metadata"
BAD_SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut_off, "not a whole safetensors file ("),
    "foreign": (lambda path: path.write_bytes(b"no tensors at all"), "not a whole safetensors"),
    "empty": (lambda path: path.touch(), "not a whole safetensors file ("),
    "unnamed": (unnamed, "holds no tensor named latents"),
    "short": (shaped(2, 2, 4, 8, 8), "latents has shape [2, 2, 4, 8, 8]" + MUST),
    "channels": (shaped(2, 3, 16, 8, 8), "latents has shape [2, 3, 16, 8, 8]" + MUST),
    "height": (shaped(2, 3, 4, 9, 8), "latents has shape [2, 3, 4, 9, 8]" + MUST),
    "width": (shaped(2, 3, 4, 8, 7), "latents has shape [2, 3, 4, 8, 7]" + MUST),
    "one clip": (shaped(3, 4, 8, 8), "latents has shape [3, 4, 8, 8]" + MUST),
    "no clip": (shaped(0, 3, 4, 8, 8), "latents has shape [0, 3, 4, 8, 8]" + MUST),
    "integers": (shaped(2, 3, 4, 8, 8, dtype=torch.uint8), "latents is of type U8: must be floa"),
    "text dim": (with_text(2, 5, 31), "text has shape [2, 5, 31]: must be [2, 1 to 16, 32]"),
    "text rows": (with_text(2, 17, 32), "text has shape [2, 17, 32]: must be [2, 1 to 16, 32]"),
    "no text row": (with_text(2, 0, 32), "text has shape [2, 0, 32]: must be [2, 1 to 16, 32]"),
    "text count": (with_text(3, 5, 32), "text has shape [3, 5, 32]: must be [2, 1 to 16, 32]"),
    "text type": (with_text(2, 5, 32, dtype=torch.int64), "text is of type I64: must be floating"),
    "no prompts": (with_prompts(None), LIST),
    "few prompts": (with_prompts(["a"]), LIST),
    "one string": (with_prompts("ab"), LIST),
    "numbers": (with_prompts([1, 2]), LIST),
    "words": (with_prompts(["a", "a cat"]), "the toy model does not know 'cat' in 'a cat'"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shards_are_skipped(tmp_path: Path, kind: str) -> None:
    write, reason = BAD_SHARDS[kind]
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(ValueError) as raised:
        open_toy(tmp_path)
    said = f"{tmp_path}: has no file that can be used: bad.safetensors ("
    assert str(raised.value).startswith(said + reason)
    if kind != "unnamed":  # which, alone, could be prompts
        with pytest.raises(ValueError) as raised:
            open_toy(path)
        assert str(raised.value).startswith(f"{path}: {reason}")
    write_shard(tmp_path / "good.safetensors", [5, 6])
    source = open_toy(tmp_path)
    assert [*source.skipped] == ["bad.safetensors"]
    assert source.skipped["bad.safetensors"].startswith(reason)
    assert {*drawn(source, 9)} == {5.0, 6.0}


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (128, 96), (48, 40)])
def test_videos_cover_the_frame(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    write_video(tmp_path / "a.MP4", 12, height, width, level=0.4)
    (tmp_path / "a.txt").write_text("a ball\n\nmoves left\n")
    clips = open_toy(tmp_path).draw(0, 2, 3)
    scale = 64 / min(size)
    scaled = F.interpolate(
        gradient(12, height, width, 0.4)[:9],
        [round(scale * height), round(scale * width)],
        mode="bicubic",
        antialias=True,
    )
    top, left = (scaled.shape[2] - 64) // 2, (scaled.shape[3] - 64) // 2
    want, _ = CODEC.encode_chunk(scaled[None, :, :, top : top + 64, left : left + 64])
    assert clips.latents_BFCHW is not None
    # One step of 255 is 0.03 of a colour and 0.06 of the motion.
    error = (clips.latents_BFCHW[1:] - want).abs()
    assert error.max() < 0.25 and error.mean() < 0.06
    assert clips.sentences == ["a ball moves left"] * 2
    assert torch.equal(clips.text_BTE, TEXT(clips.sentences))


def test_large_videos_shrink_smoothly(tmp_path: Path) -> None:
    stripes = (torch.arange(256) % 2 * 2.0 - 1).expand(1, 3, 256, 256)
    with VideoWriter(tmp_path / "a.mp4", scale=1) as writer:
        writer.write(stripes)
    grey, _ = CODEC.encode_chunk(torch.zeros(1, 1, 3, 64, 64))
    clips = open_toy(tmp_path, frames=1).draw(0, 1, 1).latents_BFCHW
    assert clips is not None
    torch.testing.assert_close(clips, grey, rtol=0, atol=0.2)


def write_mkv(path: Path, frames: int) -> None:
    """A format whose header does not tell the number of frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))


def test_bad_videos_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"no file that can be used: a.mp4 \(damaged or no video"):
        open_toy(tmp_path)
    write_video(tmp_path / "b.mp4", 5)
    cut = write_video(tmp_path / "c.mp4", 30).read_bytes()
    (tmp_path / "c.mp4").write_bytes(cut[: len(cut) * 2 // 3])
    write_mkv(tmp_path / "d.mkv", 6)
    write_mkv(tmp_path / "e.mkv", 9)
    write_video(tmp_path / "f.mp4")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\xfa")
    write_video(tmp_path / "g.mp4")
    (tmp_path / "g.txt").write_text("a cat")
    write_video(tmp_path / "h.mov.mp4")
    source = open_toy(tmp_path)
    assert [*source.skipped] == ["a.mp4", "b.mp4", "f.mp4", "g.mp4"]
    assert source.skipped["b.mp4"] == "has 5 frames: must be at least 9"
    assert source.skipped["f.mp4"] == f"prompt file {tmp_path / 'f.txt'}: not a text file"
    assert source.skipped["g.mp4"].startswith("the toy model does not know 'cat'")
    clips = source.draw(0, 20, 3)
    assert clips.latents_BFCHW is not None
    assert clips.latents_BFCHW.flatten(1).unique(dim=0).shape[0] == 2  # e and h
    assert {*clips.sentences} == {""} and (clips.text_BTE == 0).all()
    assert source.skipped["d.mkv"] == "has 6 frames: must be at least 9"
    assert "c.mp4" in source.skipped and len(source.skipped) == 6


def test_videos_are_as_long_as_they_last(tmp_path: Path) -> None:
    """Three latent frames are 9 pixel frames at 16 a second: half a second."""
    for name, frames, rate in (("short", 29, 60), ("whole", 33, 60), ("slow", 5, 8)):
        with VideoWriter(tmp_path / f"{name}.mp4", rate, scale=1) as writer:
            writer.write(gradient(frames, 64, 64, 0.0))
    source = open_toy(tmp_path)
    assert source.skipped == {"short.mp4": "has 8 frames: must be at least 9"}
    drawn = source.draw(0, 20, 3).latents_BFCHW
    assert drawn is not None and len(drawn.flatten(1).unique(dim=0)) == 2


def test_what_a_path_is(tmp_path: Path) -> None:
    assert isinstance(open_toy(None), ToyWorld)
    shard = write_shard(tmp_path / "shards" / "a.safetensors", [1])
    (shard.parent / "README.txt").write_text("not a shard")
    write_video(tmp_path / "videos" / "a.mp4")
    (tmp_path / "p.txt").write_text("a ball")
    prompts = tmp_path / "prompts" / "e.safetensors"
    prompts.parent.mkdir()
    save_file({"text": torch.zeros(1, 2, 32)}, prompts)
    write_video(tmp_path / "both" / "a.mp4")
    write_shard(tmp_path / "both" / "encoded" / "a.safetensors", [1])
    assert isinstance(open_toy(prompts.parent), Prompts)
    assert isinstance(open_toy(tmp_path / "both"), VideoFiles)
    assert isinstance(open_toy(shard), LatentShards)
    assert isinstance(open_toy(shard.parent), LatentShards)
    assert isinstance(open_toy(tmp_path / "videos"), VideoFiles)
    assert isinstance(open_toy(tmp_path / "p.txt"), Prompts)


def test_paths_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    must = r"must be a folder of .safetensors files or of videos \(.mp4, .mkv, .webm, .mov, …\), a "
    for name, why in (
        ("missing.txt", "no such file or folder"),
        ("missing", "no such file or folder"),
        ("empty", "nothing to train on"),
        ("a.png", "nothing to train on"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: {why}: {must}"):
            open_toy(tmp_path / name)


def test_models_without_a_vae_or_a_text_encoder(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "p.txt").write_text("a ball")
    shard = write_shard(tmp_path / "a" / "a.safetensors", [1])
    for codec, text in ((None, None), (None, TEXT), (CODEC, None)):
        with pytest.raises(ValueError, match="videos of this preset are encoded before training"):
            open_source(tmp_path, PRESET, 3, codec, text)
        with pytest.raises(ValueError, match=r"no data: the toy world is for the toy model alone"):
            open_source(None, PRESET, 3, codec, text)
    for path in (tmp_path / "p.txt", shard, shard.parent):
        with pytest.raises(ValueError, match=r"there is no text encoder for its prompts: must be "):
            open_source(path, PRESET, 3, None, None)


def test_the_report_of_what_was_skipped(tmp_path: Path) -> None:
    source = open_toy(None)
    assert skipped_report(source) == ""
    source.skipped = {"a.mp4": "has 5 frames: must be at least 25"}
    assert skipped_report(source) == "1 file skipped: a.mp4 (has 5 frames: must be at least 25)"
    source.skipped = {f"{i}.mp4": "no" for i in range(5)}
    assert skipped_report(source).endswith("3.mp4 (no), 4.mp4 (no)")
    source.skipped = {f"{i}.mp4": "no" for i in range(7)}
    assert skipped_report(source).startswith("7 files skipped: 0.mp4 (no), 1.mp4 (no), ")
    assert skipped_report(source).endswith(", 4.mp4 (no) and 2 more")
