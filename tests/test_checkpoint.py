"""Public names, wrappers of training code, and files that are not what they should be."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfmodel import checkpoint
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT

CONFIG = DiTConfig(
    dim=16, ffn_dim=24, heads=2, layers=2, channels=4, freq_dim=8, text_dim=8, text_len=4
)
PARITY = Path(__file__).parent / "parity" / "wan_d64"


@pytest.fixture
def official() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        k: torch.randn_like(v) for k, v in checkpoint.to_official(DiT(CONFIG).state_dict()).items()
    }


def same(model: DiT, official: dict[str, Tensor]) -> bool:
    loaded = checkpoint.to_official(model.state_dict())
    return loaded.keys() == official.keys() and all(
        torch.equal(loaded[k], official[k]) for k in official
    )


def test_names_are_the_public_ones() -> None:
    config = DiTConfig.from_wan(json.loads((PARITY / "config.json").read_text()))
    names = checkpoint.to_official(DiT(config).state_dict()).keys()
    assert names == load_file(PARITY / "weights.safetensors").keys()


def test_mapping_there_and_back_is_exact(official: dict[str, Tensor]) -> None:
    back = checkpoint.to_official(checkpoint.from_official(official))
    assert back.keys() == official.keys()
    assert all(torch.equal(back[k], official[k]) for k in official)


def test_save_and_load(official: dict[str, Tensor], tmp_path: Path) -> None:
    model, other = DiT(CONFIG), DiT(CONFIG)
    checkpoint.save(model, tmp_path / "m.safetensors", CONFIG, step=7)
    metadata = checkpoint.load(other, tmp_path / "m.safetensors")
    assert same(other, checkpoint.to_official(model.state_dict()))
    assert json.loads(metadata["config"]) == json.loads(json.dumps(asdict(CONFIG)))
    assert metadata["step"] == "7"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"model.{k}",
        lambda k: (
            "model._fsdp_wrapped_module." + k.replace(".0.", ".0._checkpoint_wrapped_module.")
        ),
        lambda k: f"module.{k.replace('.ffn', '._orig_mod.ffn')}",
        lambda k: f"net.{k}",
    ],
)
def test_self_forcing_checkpoints(
    official: dict[str, Tensor], tmp_path: Path, rename: Callable[[str], str]
) -> None:
    renamed = {rename(k): v for k, v in official.items()}
    other = {k: v + 1 for k, v in renamed.items()}
    torch.save({"generator": other, "generator_ema": renamed, "step": 3}, tmp_path / "sf.pt")
    model = DiT(CONFIG)
    checkpoint.load(model, tmp_path / "sf.pt")  # the average is the better generator
    assert same(model, official)
    checkpoint.load(model, tmp_path / "sf.pt", weights="generator")
    assert same(model, {k: v + 1 for k, v in official.items()})
    with pytest.raises(ValueError, match="has no 'critic': it has generator_ema, generator"):
        checkpoint.load(model, tmp_path / "sf.pt", weights="critic")


def test_loading_keeps_the_dtype(official: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(official, tmp_path / "m.safetensors")
    model = DiT(CONFIG).bfloat16()
    checkpoint.load(model, tmp_path / "m.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_foreign_checkpoints_name_the_first_differences(
    official: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    before = DiT(CONFIG)
    model = DiT(CONFIG)
    model.load_state_dict(before.state_dict())

    def refused(state: dict[str, Tensor]) -> str:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        with pytest.raises(ValueError, match="not a checkpoint of this model") as error:
            checkpoint.load(model, path)
        assert same(model, checkpoint.to_official(before.state_dict()))  # nothing was changed
        return str(error.value)

    less = {k: v for k, v in official.items() if not k.endswith("self_attn.k.weight")}
    assert "missing blocks.0.self_attn.k.weight, blocks.1.self_attn.k.weight" in refused(less)
    assert "unexpected extra.weight" in refused(official | {"extra.weight": torch.zeros(1)})
    wide = official | {"head.head.bias": torch.zeros(3)}
    assert "wrong shape head.head.bias [3] (must be [16])" in refused(wide)
    many = refused({f"unet.{i}": torch.zeros(1) for i in range(9)})
    assert "unet.0, unet.1, unet.2 and 6 more" in many and "\n" not in many


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('/tmp/sfmodel-was-here', 'w')",)


def truncated(path: Path) -> None:
    state = {k: v.contiguous() for k, v in checkpoint.to_official(DiT(CONFIG).state_dict()).items()}
    torch.save(state, path) if path.suffix != ".safetensors" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("none.safetensors", lambda p: None, "there is no such checkpoint file"),
        ("cut.safetensors", truncated, "not a whole safetensors file"),
        ("cut.pt", truncated, "not a whole PyTorch checkpoint"),
        ("page.safetensors", lambda p: p.write_text("<html>" * 99), "not a whole safetensors file"),
        ("page.pt", lambda p: p.write_text("<html>" * 99), "damaged, or holds pickled code"),
        ("empty.pt", lambda p: p.touch(), "not a whole PyTorch checkpoint"),
        ("evil.pt", lambda p: torch.save({"generator": Evil()}, p), "pickled code"),
        ("old.pth", lambda p: p.write_bytes(pickle.dumps({"a": Evil()})), "pickled code"),
        ("list.pt", lambda p: torch.save([torch.zeros(1)], p), "holds a list"),
        ("model.bin", lambda p: p.touch(), "must be a .safetensors, .pt or .pth file"),
    ],
)
def test_files_that_are_not_checkpoints(
    tmp_path: Path, name: str, write: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=said) as error:
        checkpoint.load(DiT(CONFIG), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not Path("/tmp/sfmodel-was-here").exists()
