"""Which public files are found in a folder, in every layout that they are published in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfmodel import assets
from sfmodel.assets import Assets, download_command, find
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.weights import checkpoint

OFFICIAL = {"dim": 1536, "in_dim": 16, "out_dim": 16, "model_type": "t2v"}
DIFFUSERS = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def put(folder: Path, *names: str, config: object = None) -> Path:
    """Empty files, and a config.json."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if config is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def official(folder: Path, dim: int = 1536, weights: str = WEIGHTS) -> Path:
    return put(
        folder,
        weights,
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
        config={**OFFICIAL, "dim": dim},
    )


def diffusers(folder: Path) -> Path:
    put(folder, "model_index.json")
    put(folder / "transformer", WEIGHTS, config=DIFFUSERS)
    put(folder / "vae", WEIGHTS, config={"z_dim": 16})
    shards = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    put(folder / "text_encoder", *shards, config={"model_type": "umt5"})
    put(folder / "tokenizer", "tokenizer.json")
    return folder


@pytest.mark.parametrize("deep", ["", "a", "a/b"])
def test_the_official_layout(tmp_path: Path, deep: str) -> None:
    wan = official(tmp_path / deep)
    assert find(tmp_path) == Assets(
        dit=wan / WEIGHTS,
        vae=wan / "Wan2.1_VAE.pth",
        text_encoder=wan / "models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer=wan / "google/umt5-xxl",
    )


@pytest.mark.parametrize("deep", ["", "a", "a/b"])
def test_the_layout_of_diffusers(tmp_path: Path, deep: str) -> None:
    wan = diffusers(tmp_path / deep)
    assert find(tmp_path) == Assets(
        dit=wan / "transformer" / WEIGHTS,
        vae=wan / "vae" / WEIGHTS,
        text_encoder=wan / "text_encoder",
        tokenizer=wan / "tokenizer",
    )


def test_the_base_model_is_that_of_the_preset(tmp_path: Path) -> None:
    """Shards are named by their index."""
    small = official(tmp_path / "Wan2.1-T2V-1.3B")
    large = official(tmp_path / "Wan2.1-T2V-14B", 5120, f"{WEIGHTS}.index.json")
    assert find(tmp_path).dit == small / WEIGHTS
    assert find(tmp_path, "wan-14b").dit == large / f"{WEIGHTS}.index.json"


@pytest.mark.parametrize(
    ("inside", "config"),
    [
        (".", {**OFFICIAL, "model_type": "i2v"}),
        (".", {**OFFICIAL, "in_dim": 36}),
        ("transformer", {**DIFFUSERS, "in_channels": 36}),
        ("low_noise_model", OFFICIAL),  # of Wan2.2
        (".", ["no", "config"]),
    ],
)
def test_other_models_of_these_sizes_are_not_taken(
    tmp_path: Path, inside: str, config: object
) -> None:
    put(tmp_path / "a" / inside, WEIGHTS, config=config)
    assert find(tmp_path) == Assets()


def test_half_a_wan_2_2_of_diffusers_is_not_taken(tmp_path: Path) -> None:
    put(diffusers(tmp_path) / "transformer_2", WEIGHTS, config=DIFFUSERS)
    assert find(tmp_path).dit is None


def test_few_step_models_and_taehv_beside_all_that(tmp_path: Path) -> None:
    """What is only a start for training comes last; what is deeper is not looked at."""
    names = "checkpoints/ode_init.pt", "checkpoints/self_forcing_dmd.pt", "a/b/causvid.pt"
    put(tmp_path, *names, "a/b/c/deep.pt", ".cache/hidden.pt", "tae/taew2_1.pth")
    found = find(tmp_path)
    assert found.tiny_vae == tmp_path / "tae/taew2_1.pth"
    assert [path.name for path in found.generators] == [
        "self_forcing_dmd.pt",
        "causvid.pt",
        "ode_init.pt",
    ]


def test_the_first_usable_generator_is_taken(tmp_path: Path) -> None:
    """Other files are none, whatever their names; one that cannot be opened comes last."""
    (tmp_path / "a_half.pt").write_bytes(b"PK")
    torch.save({"x": torch.zeros(1)}, tmp_path / "b_detector.pt")
    table = {"model.patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2)}
    torch.save({"critic": table}, tmp_path / "c_critic.pt")
    lora = {"model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)}
    torch.save({"generator_lora": lora}, tmp_path / "d_lora.pt")
    torch.save({"state": {0: {"exp_avg": torch.zeros(1)}}}, tmp_path / "e_optimizer.pt")
    table_14b = {"patch_embedding.weight": torch.zeros(5120, 16, 1, 2, 2)}
    torch.save(table_14b, tmp_path / "f_14b.pt")
    with torch.device("meta"):
        names = checkpoint.to_official(DiT(PRESETS["wan-1.3b"].dit).state_dict())
    whole = {name: torch.zeros(1) for name in names} | table
    del whole["patch_embedding.weight"]
    whole |= {"blocks.0.self_attn.q.weight": torch.zeros(1, 1)}
    torch.save({"generator_ema": whole}, tmp_path / "z.pt")

    assert [path.name for path in find(tmp_path).generators] == ["z.pt", "a_half.pt"]
    assert [path.name for path in find(tmp_path, "wan-14b").generators] == ["f_14b.pt", "a_half.pt"]
    said = {one.path.name: one.said for one in assets.examine(tmp_path) if not one.usable}
    assert "LoRA" in said["d_lora.pt"] and "its end is missing" in said["a_half.pt"]
    assert "b_detector.pt" in said


def cached(hub: Path, where: str, files: Path, version: str = "1") -> Path:
    """A folder of files as the cache of Hugging Face keeps it: links to blobs."""
    repository = hub / f"models--{where.replace('/', '--')}"
    snapshot = repository / "snapshots" / version
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(version)
    for i, file in enumerate(path for path in files.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{version}-{i}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("deep", ["", "hub"])
@pytest.mark.parametrize("layout", [official, diffusers])
def test_the_cache_of_hugging_face(
    tmp_path: Path, layout: Callable[[Path], Path], deep: str
) -> None:
    """As a folder of models, or in one."""
    hub, want = tmp_path / "models" / deep, layout(tmp_path / "files")
    plain = find(want)
    put(tmp_path / "old", WEIGHTS, "Wan2.1_VAE.pth", config=OFFICIAL)
    cached(hub, "Wan-AI/Wan2.1-T2V-1.3B", tmp_path / "old", "0")
    there = cached(hub, "Wan-AI/Wan2.1-T2V-1.3B", want)
    few = put(tmp_path / "few", "checkpoints/self_forcing_dmd.pt")
    (there / "models--x").symlink_to(tmp_path / "models")  # a circle
    generators = cached(hub, "gdhe17/Self-Forcing", few) / "checkpoints/self_forcing_dmd.pt"
    found = find(tmp_path / "models")
    for name in ("dit", "vae", "text_encoder", "tokenizer"):
        assert getattr(found, name) == there / getattr(plain, name).relative_to(want)
    assert found.generators == (generators,)


def test_without_a_folder_the_own_cache_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = official(tmp_path / "files")
    mine = cached(tmp_path / "hub", "Wan-AI/Wan2.1-T2V-1.3B", files)
    cached(tmp_path / "hub", "someone/else", put(tmp_path / "few", "x.pt"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFMODEL_MODELS", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find().vae == mine / "Wan2.1_VAE.pth" and not find().generators
    official(tmp_path / "models")
    assert find().vae == Path("models/Wan2.1_VAE.pth")
    assert not find(put(tmp_path / "empty", config={})).vae
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert find().vae == Path("models/Wan2.1_VAE.pth")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"num_attention_heads": [1], "attention_head_dim": 99999999999}',
        b'{"dim": 1536, "dim": 1536, "in_dim": 16, "out_dim": 16}',
        b"\xff\xfe",
    ],
)
def test_a_config_that_is_none_hides_the_model(tmp_path: Path, text: bytes) -> None:
    put(tmp_path, WEIGHTS)
    (tmp_path / "config.json").write_bytes(text)
    assert find(tmp_path) == Assets()


def test_of_two_the_first_by_name_is_taken(tmp_path: Path) -> None:
    official(tmp_path / "b"), official(tmp_path / "a")
    assert find(tmp_path).dit == tmp_path / "a" / WEIGHTS
    assert find(tmp_path).vae == tmp_path / "a" / "Wan2.1_VAE.pth"


def test_the_folder_is_models_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFMODEL_MODELS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="models: there is no such folder"):
        find()
    (tmp_path / "models").mkdir()
    assert find() == Assets()
    monkeypatch.setenv("SFMODEL_MODELS", str(official(tmp_path / "elsewhere")))
    assert find().vae == tmp_path / "elsewhere" / "Wan2.1_VAE.pth"
    with pytest.raises(ValueError, match=r"must be one of wan-1\.3b, wan-14b"):
        find(preset="toy")


def test_what_is_downloaded_as_told_is_found(tmp_path: Path) -> None:
    """By where the commands put the files."""
    put(tmp_path / "Wan2.1-T2V-1.3B", config=OFFICIAL)
    for name, public in assets.PUBLIC["wan-1.3b"].items():
        if "://" in public.where:
            continue
        words = download_command([name], "wan-1.3b", tmp_path).split()
        assert words[:3] == ["hf", "download", public.where]
        put(Path(words[-1]), *(file for file in words[3:-2] if file != "config.json"))
    found = find(tmp_path)
    assert all((found.dit, found.vae, found.text_encoder, found.tokenizer, found.generators))
    both = download_command(["vae", "generators", "tokenizer"], "wan-1.3b", tmp_path)
    assert "Wan2.1_VAE.pth google/umt5-xxl/tokenizer.json --local-dir" in both


def test_what_files_are(tmp_path: Path) -> None:
    """A few-step model is for the preset of its width; a file that cannot be used says why."""
    put(tmp_path / "google/umt5-xxl", "tokenizer.json")
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"<html>not found</html>")
    small, lora = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"generator": {"model.patch_embedding.weight": torch.zeros(1536, 1)}}, small)
    torch.save({"generator": {"model.blocks.0.lora_A": torch.zeros(2, 2)}}, lora)
    found = {one.path.name: one for one in assets.examine(tmp_path)}
    assert (found["a.pt"].preset, found["a.pt"].usable) == ("wan-1.3b", True)
    assert not found["b.pt"].usable
    assert not found["Wan2.1_VAE.pth"].usable and "web page" in found["Wan2.1_VAE.pth"].said
    missing = assets.missing(found.values())
    assert ("wan-1.3b", "vae") in missing and ("wan-14b", "dit") in missing
    assert not {("wan-1.3b", "generators"), ("wan-1.3b", "tokenizer")} & {*missing}
