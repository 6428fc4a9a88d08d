"""Published checkpoints: known by their names, streamed as they were published. Of tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sfmodel.cli import generate as module
from sfmodel.cli.doctor import doctor
from sfmodel.cli.generate import generate
from sfmodel.cli.main import run_command
from sfmodel.config import PRESETS, DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.vae.taehv import TinyVAE
from sfmodel.weights import names
from sfmodel.weights.known import KNOWN, LORA_RANK, by_name
from sfmodel.weights.saving import save_tensors

DIT = DiTConfig(dim=16, ffn_dim=24, heads=1, layers=1, freq_dim=8, text_dim=8, text_len=4)
SMALL = replace(PRESETS["wan-1.3b"], dit=DIT, height=4, width=4)
DOCS = Path(__file__).parent.parent / "docs" / "models.md"


def by_file(file: str) -> Any:
    return next(each for each in KNOWN if each.file.endswith(file))


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: each.name)
def test_known_by_name(known: Any) -> None:
    """In a folder, in the cache of the Hub and there, and under no name of another."""
    for path in (
        f"models/{known.file}",
        f"/hub/models--a--b/snapshots/1/{known.file}",
        f"hf:{known.where}/{known.file}",
        f"hf:{known.where}@main/{known.file}",
    ):
        assert by_name(path) is known and by_name(Path(path)) is known
    assert by_name(f"other/{Path(known.file).stem}-mine.pt") is None


def test_what_no_name_tells() -> None:
    assert by_name("causal_forcing.pt") is by_name("out/model.pt") is by_name("model.pt") is None
    assert by_name("hf:TencentARC/RollingForcing") is by_file("rolling_forcing_dmd.pt")
    assert by_name("hf:gdhe17/Self-Forcing") is None  # which has several


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: each.name)
def test_settings_fit_together(known: Any) -> None:
    preset = replace(PRESETS[known.preset], **known.settings).check()
    FlowSchedule(preset.shift).warp(preset.steps)


def test_options() -> None:
    """Those that differ from the preset's."""
    causvid, longlive = by_file("autoregressive_checkpoint/model.pt"), by_file("longlive_base.pt")
    assert causvid.flags() == "--steps 1000 757 522 --warped --shift 8 --weights generator"
    assert causvid.flags(["steps", "warped", "weights"]) == "--shift 8"
    assert longlive.flags() == "--window 12 --sink 3 --positions absolute --lora models/lora.pt"
    assert by_file("self_forcing_dmd.pt").flags(["weights"]) == ""


def test_the_documentation_has_them_all() -> None:
    rows = [
        f"| {each.name} | `{each.where}`: `{each.file}` | "
        f"{f'`{each.flags()}`' if each.flags() else ''}{'; ' * bool(each.flags() and each.note)}"
        f"{each.note} |"
        for each in KNOWN
    ]
    there = [line for line in DOCS.read_text().splitlines() if line in rows]
    assert there == rows, "\n".join(rows)


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    """A folder with a decoder and an embedding, where wan-1.3b is tiny."""
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save(TinyVAE().state_dict(), folder / "taew2_1.pth")
    text, said = {"text": torch.randn(1, 3, 8)}, {"prompts": json.dumps(["a cat"])}
    save_tensors(tmp_path / "cat.safetensors", text, said)
    with mock.patch.dict(PRESETS, {"wan-1.3b": SMALL}):
        yield folder


def state(seed: int) -> dict[str, Tensor]:
    generator, model = torch.Generator().manual_seed(seed), DiT(DIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return {f"model.{k}": v.clone() for k, v in names.to_official(model.state_dict()).items()}


def put(path: Path, *entries: str) -> Path:
    """A checkpoint of those entries, each of other weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({entry: state(len(entry)) for entry in entries}, path)
    return path


def put_lora(path: Path, rank: int = LORA_RANK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = "base_model.model.blocks.0.self_attn.q"
    down, up = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    torch.save({"generator_lora": {down: torch.ones(rank, 16), up: torch.ones(16, rank)}}, path)
    return path


def run(*words: object) -> None:
    run_command("sfmodel", {"generate": generate, "other": generate}, [*map(str, words)])


def streamed(
    models: Path, monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[DiT, Preset, list[Tensor]]:
    """The model, settings and prompts of the streams that the command makes."""
    made: list[tuple[DiT, Preset, Tensor]] = []

    class Spied(Stream):
        def __init__(
            self, model: DiT, codec: Any, text_BTE: Tensor, preset: Preset, **kw: Any
        ) -> None:
            made.append((model, preset, text_BTE))
            super().__init__(model, codec, text_BTE, preset, **kw)

    monkeypatch.setattr(module, "Stream", Spied)
    own = ["--models", models, "--frames", 1, "--output", models.parent / "v.mp4"]
    if "--embeddings" not in words:
        own += ["--embeddings", models.parent / "cat.safetensors"]
    run("generate", *words, *own)
    return made[-1][0], made[-1][1], [text_BTE for *_, text_BTE in made]


def same(model: DiT, seed: int) -> bool:
    got, want = names.to_official(model.state_dict()), state(seed)
    return all(torch.equal(value, want[f"model.{name}"]) for name, value in got.items())


def test_causvid(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a preset, the part that was published; options come first."""
    path = put(models / "autoregressive_checkpoint/model.pt", "generator_ema", "generator")
    model, preset, _ = streamed(models, monkeypatch, "--checkpoint", path)
    assert (preset.steps, preset.warped, preset.shift) == ((1000, 757, 522), True, 8)
    assert same(model, len("generator"))
    line = f"{path}: CausVid, by its name: --steps 1000 757 522 --warped --shift 8 --weights genera"
    assert line in capsys.readouterr().err
    words = ["--steps", 1000, 500, "--weights", "generator_ema", "--checkpoint", path]
    model, preset, _ = streamed(models, monkeypatch, *words)
    assert (preset.steps, preset.warped, preset.shift) == ((1000, 500), False, 8)
    assert same(model, len("generator_ema"))
    assert f"{path}: CausVid, by its name: --shift 8\n" in capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_longlive(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: bool,
) -> None:
    """By its name with the LoRA beside it, or by a LoRA of that rank."""
    path = put(models / ("longlive_base.pt" if named else "mine.pt"), "generator")
    lora = put_lora(models / ("lora.pt" if named else "other.pt"))
    words = [] if named else ["--lora", lora]
    model, preset, _ = streamed(models, monkeypatch, "--checkpoint", path, *words)
    assert (preset.window, preset.sink, preset.positions) == (12, 3, "absolute")
    q = state(len("generator"))["model.blocks.0.self_attn.q.weight"]
    q_merged = names.to_official(model.state_dict())["blocks.0.self_attn.q.weight"]
    assert torch.equal(q_merged, q + LORA_RANK)
    said = "--window 12 --sink 3 --positions absolute"
    how = f"name: {said} --lora models/lora.pt\n" if named else f"LoRA: {said}\n"
    assert f"{path}: LongLive 1.3B, by its {how}" in capsys.readouterr().err


def test_longlive_without_its_lora(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(models / "longlive_base.pt", "generator")
    streamed(models, monkeypatch, "--checkpoint", path)
    assert "models/lora.pt, which is not beside it: --lora names it" in capsys.readouterr().err


def test_a_lora_of_another_rank_tells_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lora = put(models / "mine.pt", "generator"), put_lora(models / "lora.pt", 8)
    words = ["--preset", "wan-1.3b", "--checkpoint", path, "--lora", lora, "--shift", 3]
    assert streamed(models, monkeypatch, *words)[1] == replace(SMALL, shift=3)
    said = capsys.readouterr().err
    own = "--steps 1000 750 500 250 --chunk 3 --window 21 --sink 0\n"
    assert f"{path}: no checkpoint that is known: as wan-1.3b, {own}" in said


def test_the_one_in_the_folder(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(models / "framewise/causal_forcing.pt", "generator_ema")
    _, preset, _ = streamed(models, monkeypatch, "--preset", "wan-1.3b")
    assert preset == replace(SMALL, chunk=1)
    line = f"{path}: Causal Forcing, frame-wise, by its name: --chunk 1 --weights generator_ema\n"
    assert line in capsys.readouterr().err


def test_what_is_not_done_as_published(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(models / "rolling_forcing_dmd.pt", "generator_ema")
    _, preset, _ = streamed(models, monkeypatch, "--checkpoint", path)
    assert (len(preset.steps), preset.sink) == (5, 3)
    assert "generator_ema; was made to denoise several chunks at a time" in capsys.readouterr().err


def test_wans_own_weights_are_warned_about(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / "diffusion_pytorch_model.safetensors"
    save_tensors(path, {k.removeprefix("model."): v for k, v in state(1).items()}, {})
    streamed(models, monkeypatch, "--preset", "wan-1.3b", "--checkpoint", path)
    assert "a bidirectional model, which gives noise when streamed" in capsys.readouterr().err


def test_a_part_that_is_not_there(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(models / "self_forcing_dmd.pt", "generator_ema")
    words = ["--checkpoint", path, "--weights", "generator", "--models", models]
    with pytest.raises(SystemExit):
        run("generate", *words, "--embeddings", models.parent / "cat.safetensors")
    assert "has no 'generator': it has generator_ema" in capsys.readouterr().err


def test_a_bad_checkpoint_is_told_before_the_prompt_is_encoded(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, encoder = put(models / "self_forcing_dmd.pt", "generator_ema"), mock.Mock()
    monkeypatch.setattr(module, "load_text", lambda *_: encoder)
    for damage in (path.read_bytes()[:-5000], b"<html>", b"version https://git-lfs"):
        path.write_bytes(damage)
        with pytest.raises(SystemExit):
            run("generate", "--checkpoint", path, "--models", models)
        assert f"sfmodel: {path}: " in capsys.readouterr().err
    assert not encoder.mock_calls


def test_embeddings_take_the_place_of_the_encoder(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All prompts of the file if none is given; without padding, and without prompts."""
    put(models / "self_forcing_dmd.pt", "generator_ema")
    rows, file = torch.randn(5, 8), models.parent / "two.safetensors"
    tensors = {"text": rows, "lengths": torch.tensor([2, 3])}
    save_tensors(file, tensors, {"prompts": json.dumps(["a dog", "a cat"])})
    words = ["--preset", "wan-1.3b", "--embeddings", file]
    *_, texts = streamed(models, monkeypatch, *words, "--prompt", "a cat")
    assert torch.equal(texts[0], rows[None, 2:])
    save_tensors(file, tensors, {})
    *_, texts = streamed(models, monkeypatch, *words, "--batch", 2)
    assert torch.equal(texts[0], torch.stack([nn.functional.pad(rows[:2], (0, 0, 0, 1)), rows[2:]]))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        streamed(models, monkeypatch, *words, "--prompt", "a bird")
    said = capsys.readouterr().err
    assert f"{file}: has no embedding of 'a bird': it has 2 prompts, such as 'two 0'" in said
    with pytest.raises(SystemExit):
        streamed(models, monkeypatch, *words[:-1], models / "taew2_1.pth")
    assert "taew2_1.pth: not a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("impl", "said"),
    [
        ("sdpa", ""),
        ("gluon", "impl='gluon' takes CUDA tensors"),
        ("cpp", "impl='cpp': ring_attention has triton"),
        ("x", "impl='x': ring_attention has triton"),
    ],
)
def test_attention_impl(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    impl: str,
    said: str,
) -> None:
    path = put(models / "self_forcing_dmd.pt", "generator_ema")
    words = ["--checkpoint", path, "--attention-impl", impl]
    if not said:
        assert streamed(models, monkeypatch, *words)[0].attention_impl == impl
        return
    with pytest.raises(SystemExit):
        streamed(models, monkeypatch, *words)
    assert said in capsys.readouterr().err


def test_doctor_lists_them(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(models / "chunkwise/causal_forcing.pt", "generator")
    doctor(models, json_path=models.parent / "d.json")
    found = json.loads((models.parent / "d.json").read_text())["known"]
    here = [each for each in found if each["here"]]
    assert [(each["name"], each["checkpoint"]) for each in here] == [
        ("Causal Forcing, chunk-wise", str(path))
    ]
    out = capsys.readouterr().out
    assert all(each["name"] in out and each["checkpoint"] in out for each in found)
    assert "no    hf:gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt" in out
