"""Weights from one public form to another and back; diffusers' own classes say what theirs is."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfmodel.cli.convert import Form, convert
from sfmodel.config import PRESETS, VAEConfig
from sfmodel.dit import DiT
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import checkpoint, names
from tests.test_checkpoint import CONFIG, STEM, Memory

PARITY = Path(__file__).parent / "parity"
VAE = PARITY / "vae_d8" / "weights.safetensors"


def random(shapes: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: torch.randn(tuple(s)).to(dtype) for k, s in shapes.items()}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in checkpoint.to_official(model.state_dict()).items()}


@pytest.fixture
def dit() -> dict[str, Tensor]:
    """Under official names, of two types: each tensor keeps its own."""
    state = random(shapes(DiT(CONFIG)), torch.bfloat16)
    return state | {k: v.float() for k, v in state.items() if "modulation" in k}


@pytest.fixture
def tiny_vae() -> dict[str, Tensor]:
    return random(json.loads((PARITY / "taehv_seed0" / "config.json").read_text())["keys"])


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def read(path: Path) -> dict[str, Tensor]:
    return names.official(checkpoint.open_weights(path).tensors)


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_names_of_a_dit_are_those_of_diffusers(preset: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS[preset].dit
    with torch.device("meta"):
        ours = checkpoint.to_official(DiT(config).state_dict())
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=config.heads, num_layers=config.layers, ffn_dim=config.ffn_dim
        ).state_dict()
    renamed = names.diffusers(ours)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.items()}
    back = names.official(theirs)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}
    assert ours.keys() == names.expected("DiT", ours)
    assert names.kind(ours).label == f"Wan2.1 DiT {preset[4:].upper()}"


def test_names_of_the_vae_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours, theirs = WanVAE().state_dict(), diffusers.AutoencoderKLWan().state_dict()
    renamed = names.diffusers(ours)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.items()}
    assert names.official(theirs).keys() == ours.keys() == names.expected("VAE", ours)
    assert ours.keys() == load_file(VAE).keys()
    assert names.kind(ours).label == "Wan2.1 VAE"


def test_a_dit_of_diffusers_computes_the_same(tmp_path: Path) -> None:
    """Prompts of fewer rows than text_len are padded with zeros; diffusers takes them padded."""
    diffusers = pytest.importorskip("diffusers")
    config = replace(CONFIG, dim=48, heads=2)
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=24, num_layers=2,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "transformer")
    ours = checkpoint.load_model(lambda: DiT(config), tmp_path, device="cpu", dtype=torch.float32)
    x, text = torch.randn(2, 4, 3, 6, 8), torch.randn(2, 3, 8)
    t = torch.tensor([937.5, 4.98])
    padded = torch.cat([text, torch.zeros(2, config.text_len - 3, 8)], 1)
    with torch.no_grad():
        want = theirs(x, t, padded, return_dict=False)[0]
        got = ours(x.transpose(1, 2), t, text).transpose(1, 2)
    assert (got - want).norm() / want.norm() < 1e-5 and want.std() > 0.1


def test_the_vae_in_diffusers_decodes_the_same(tmp_path: Path) -> None:
    """Tells names of equal shape apart, which the comparison of names does not."""
    diffusers = pytest.importorskip("diffusers")
    convert(VAE, tmp_path / "vae", to="diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    cases = load_file(PARITY / "vae_d8" / "cases.safetensors")
    mean, std = (
        torch.tensor(theirs.config[f"latents_{name}"])[:, None, None, None]
        for name in ("mean", "std")
    )
    with torch.no_grad():
        got = theirs.decode(cases["decode.z"] * std + mean).sample
    want = cases["decode.pixels"].clamp(-1, 1)  # as diffusers does
    assert (got - want).norm() / want.norm() < 1e-4

    ours = checkpoint.load_model(
        lambda: WanVAE(VAEConfig(dim=8)), tmp_path / "vae", device="cpu", dtype=torch.float32
    )
    assert equal(ours.state_dict(), load_file(VAE))


def test_diffusers_takes_the_folder_of_a_dit(dit: dict[str, Tensor], tmp_path: Path) -> None:
    """As its from_pretrained does, which for this class needs another package."""
    model = pytest.importorskip("diffusers").WanTransformer3DModel
    save_file(dit, tmp_path / "m.safetensors", {"config": json.dumps({"dim": 16, "heads": 2})})
    convert(tmp_path / "m.safetensors", tmp_path / "folder", to="diffusers")
    config = model.load_config(tmp_path / "folder")
    assert config["_class_name"] == "WanTransformer3DModel"
    made = model.from_config(config)
    made.load_state_dict(load_file(tmp_path / "folder" / f"{STEM}.safetensors"))
    kept = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "eps")
    assert [made.config[name] for name in kept] == [[1, 2, 2], 2, 8, 4, 1e-6]


def test_a_dit_there_and_back_is_the_same(dit: dict[str, Tensor], tmp_path: Path) -> None:
    first = tmp_path / "0.safetensors"
    checkpoint.save(checkpoint.from_official(dit), first, CONFIG, step=7)
    (tmp_path / "4").mkdir()
    last = first
    ways: list[tuple[str, Form, float]] = [
        ("1.safetensors", "official", 5.0),
        ("Wan2.1-folder", "official", 5e-6),
        ("3", "diffusers", 5e-6),
        ("4", "diffusers", 5.0),
        ("5.pth", "official", 5.0),
        ("6.pt", "self-forcing", 5.0),
        ("7.pt", "self-forcing", 5.0),
    ]
    for name, to, shard_gb in ways:
        convert(last, tmp_path / name, to=to, shard_gb=shard_gb)
        last = tmp_path / name
        assert equal(read(last), dit), name
    _, metadata = checkpoint.read(tmp_path / "1.safetensors")
    _, before = checkpoint.read(first)
    assert metadata == before | {"format": "pt"}
    for folder in ("Wan2.1-folder", "3"):
        shards = [*(tmp_path / folder).glob("*.safetensors")]
        assert len(shards) > 2 and all(path.stat().st_size < 12_000 for path in shards)
    official = json.loads((tmp_path / "Wan2.1-folder" / "config.json").read_text())
    assert type(CONFIG).from_wan(official) == CONFIG
    assert not [*tmp_path.glob(".*")]


def test_other_models_there_and_back_are_the_same(
    tiny_vae: dict[str, Tensor], tmp_path: Path
) -> None:
    convert(VAE, tmp_path / "vae", to="diffusers")
    convert(tmp_path / "vae", tmp_path / "Wan2.1_VAE.pth", to="official")
    assert equal(torch.load(tmp_path / "Wan2.1_VAE.pth", weights_only=True), load_file(VAE))
    torch.save(tiny_vae, tmp_path / "taew2_1.pth")
    convert(tmp_path / "taew2_1.pth", tmp_path / "taew2_1.safetensors", to="official")
    assert equal(load_file(tmp_path / "taew2_1.safetensors"), tiny_vae)
    convert(tmp_path / "taew2_1.safetensors", tmp_path / "again.pth", to="official")
    assert equal(torch.load(tmp_path / "again.pth", weights_only=True), tiny_vae)


def test_entries_of_a_training_checkpoint(dit: dict[str, Tensor], tmp_path: Path) -> None:
    source, average = tmp_path / "m.pt", {k: v + 1 for k, v in dit.items()}
    large = torch.zeros(100_000)
    average["head.modulation"] = large[:32].view(1, 2, 16)  # torch.save writes all of it
    sets = {"generator": dit, "generator_ema": average}
    torch.save({e: {f"model.{k}": v for k, v in s.items()} for e, s in sets.items()}, source)
    convert(source, tmp_path / "both.pt", to="self-forcing")
    assert (tmp_path / "both.pt").stat().st_size < source.stat().st_size - 390_000
    both = torch.load(tmp_path / "both.pt", weights_only=True)
    assert both.keys() == sets.keys()
    assert equal(both["generator"], {f"model.{k}": v for k, v in dit.items()})
    convert(tmp_path / "both.pt", tmp_path / "average.pth", to="official")
    assert equal(read(tmp_path / "average.pth"), average)
    convert(source, tmp_path / "one.pth", to="official", weights="generator")
    assert equal(read(tmp_path / "one.pth"), dit)
    convert(source, tmp_path / "one.pt", to="self-forcing", weights="generator")
    assert torch.load(tmp_path / "one.pt", weights_only=True).keys() == {"generator"}


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_another_type(dit: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    torch.save(dit, tmp_path / "source.pth")
    (tmp_path / "config.json").write_text(json.dumps({"dim": 16, "num_heads": 2}))
    target = tmp_path / name
    words = [tmp_path / "source.pth", target, "--to", "official", "--dtype", "float16"]
    tyro.cli(convert, args=[str(word) for word in words])
    assert equal(read(target), {k: v.half() for k, v in dit.items()})
    assert abs(target.stat().st_size - 2 * sum(v.numel() for v in dit.values())) < 30_000


def memory_of_converting(folder: Path) -> tuple[int, int, list[int]]:
    """Bytes of a model and of its largest tensor, and how many more than before a process has at
    most while it converts them to one file, and to another layout and dtype."""
    with torch.device("meta"):
        meta = shapes(DiT(replace(CONFIG, dim=1536, ffn_dim=8960, heads=12)))
    state = {k: torch.ones(shape, dtype=torch.bfloat16) for k, shape in meta.items()}
    save_file(state, folder / "m.safetensors")
    sizes = [v.nbytes for v in state.values()]
    del state

    def most(target: str, to: Form, **options: Any) -> int:
        with Memory() as memory:
            convert(folder / "m.safetensors", folder / target, to=to, **options)
        return memory.most - memory.start

    needed = [most("m.pt", "self-forcing"), most("folder", "diffusers", dtype="float16")]
    return sum(sizes), max(sizes), needed


def test_memory_does_not_hold_the_model(tmp_path: Path) -> None:
    """In a process of its own: what other tests have freed comes and goes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        size, largest, needed = pool.submit(memory_of_converting, tmp_path).result()
    assert size > 150e6 and needed[0] < 10e6 and needed[1] < 2 * largest, needed
    assert (tmp_path / "m.pt").stat().st_size < size + 1e5


def test_what_is_refused_leaves_nothing(dit: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    source = folder / "m.safetensors"
    save_file(dit, source)
    (folder / "link.pt").symlink_to(source)
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    toy = folder / "toy.safetensors"
    checkpoint.save(checkpoint.from_official(dit), toy, replace(CONFIG, prediction="x0"))
    whole = folder / "whole.safetensors"
    checkpoint.save(checkpoint.from_official(dit), whole, CONFIG)
    less = folder / "less.safetensors"
    save_file({k: v for k, v in dit.items() if "1.ffn.0" not in k}, less)
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    int8 = {k: v.to(torch.int8) for k, v in dit.items()}
    save_file(int8, folder / "int8.safetensors")
    before = {path: path.stat() for path in folder.rglob("*")}

    def refused(source: Path, target: str, to: Form) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            convert(source, folder / target, to=to)
        now = {path: path.stat() for path in folder.rglob("*")}
        assert now.keys() == before.keys() and "\n" not in str(error.value)
        assert all(
            now[path].st_mtime_ns == before[path].st_mtime_ns for path in before if path.is_file()
        )
        return str(error.value)

    assert "m.safetensors: is the source itself" in refused(source, "m.safetensors", "official")
    assert "link.pt: is the source itself" in refused(source, "link.pt", "self-forcing")
    assert "must be a .pt or .pth file" in refused(source, "new.safetensors", "self-forcing")
    assert "must be a folder for diffusers" in refused(source, "new.pt", "diffusers")
    assert "full: holds files already" in refused(toy, "full", "official")
    assert "m.safetensors is not a folder" in refused(source, "m.safetensors/x.pt", "self-forcing")
    assert "cannot write" in refused(whole, "m.safetensors/x", "diffusers")
    assert "of width 16 has an unknown number of heads" in refused(source, "new", "diffusers")
    assert "predicts x0, which only a .safetensors" in refused(toy, "new", "diffusers")
    assert "must be a .safetensors, .pt or .pth file" in refused(VAE, "new", "official")
    assert "is a VAE of width 8: to=self-forcing" in refused(VAE, "new.pt", "self-forcing")
    assert "not a whole one: missing blocks.1.ffn.0.bias" in refused(less, "new.pt", "official")
    assert "type int8" in refused(folder / "int8.safetensors", "new.pt", "official")
    other = refused(folder / "other.safetensors", "new.pt", "official")
    assert "is no model that is known here" in other


def test_an_interrupted_folder_is_not_there(
    dit: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(dit, tmp_path / "m.safetensors", {"config": json.dumps({"dim": 16, "heads": 2})})
    written = []

    def interrupted(file: BinaryIO, *arguments: Any) -> None:
        written.append(file.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("sfmodel.cli.convert.write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m.safetensors", tmp_path / "new", to="diffusers")
    assert written and [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_are_described(
    dit: dict[str, Tensor], tiny_vae: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"

    def described(content: dict[str, Any]) -> str:
        torch.save(content, path)
        return checkpoint.describe(path)

    sets = {e: {f"model.{k}": v for k, v in dit.items()} for e in ("generator", "generator_ema")}
    dit_is = "a DiT of 2 blocks × 16 (official), bfloat16 + float32, 69 tensors"
    assert described(sets) == f"{dit_is}, generator_ema + generator"
    theirs = names.diffusers(load_file(VAE))
    assert described(theirs) == "a VAE of width 8 (diffusers), float32, 194 tensors"
    assert described(tiny_vae).startswith("a tiny VAE (TAEHV) of 16 channels (official), float32, ")
    assert described({"a": torch.zeros(1, dtype=torch.int8)}) == (
        "an unknown model with a, int8, 1 tensors"
    )
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.describe(tmp_path / "none.pt")


@pytest.mark.parametrize("shape", [(), (0,), (3,)])
@pytest.mark.parametrize(
    "name", ["head.head.bias", "blocks.0.ffn.0.weight", "patch_embedding.bias"]
)
def test_wrong_shapes_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    state = checkpoint.to_official(DiT(CONFIG).state_dict()) | {name: torch.zeros(shape)}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=name):
        convert(tmp_path / "m.pt", tmp_path / "to.pt", to="official")
    assert not (tmp_path / "to.pt").exists()


@pytest.mark.parametrize("heads", ["a", [1], 0, -2, 1.5, 10**40])
def test_a_config_with_odd_heads_is_one_sentence(tmp_path: Path, heads: object) -> None:
    state = checkpoint.to_official(DiT(CONFIG).state_dict())
    torch.save(state, tmp_path / "m.pt")
    config = {"num_heads": heads, "dim": CONFIG.dim}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="heads"):
        convert(tmp_path / "m.pt", tmp_path / "to", to="diffusers")
