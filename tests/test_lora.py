"""LoRA files of every naming, merged: base + strength · alpha / rank · B·A."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.pretrained import load_model
from sfmodel.weights import names
from sfmodel.weights.lora import Lora, merge, read_lora
from tests.test_checkpoint import CONFIG

RANK, ALPHA = 3, 6.0
# Layers by their official names, and those of diffusers.
LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.v": "blocks.1.attn1.to_v",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "time_projection.1": "condition_embedder.time_proj",
    "patch_embedding": "patch_embedding",
}


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(2)
    made = DiT(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def pairs(model: DiT) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of each layer."""
    own = names.to_official(model.state_dict())
    shapes = {layer: own[f"{layer}.weight"].shape for layer in LAYERS}
    return {
        layer: (torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, *[1] * len(shape[2:])))
        for layer, shape in shapes.items()
    }


Naming = Callable[[str, Tensor, Tensor], dict[str, Tensor]]


def naming(stem_of: Callable[[str], str], down: str, up: str) -> Naming:
    def named(layer: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        stem, alpha = stem_of(layer), torch.tensor(ALPHA)
        return {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b, f"{stem}.alpha": alpha}

    return named


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
NAMINGS = {
    "peft": naming("base_model.model.{}".format, *AB),
    "peft, named": naming("base_model.model.{}".format, "lora_A.default", "lora_B.default"),
    "diffusers": naming(lambda layer: f"transformer.{LAYERS[layer]}", *AB),
    "comfy": naming("diffusion_model.{}".format, *AB),
    "lightx2v": naming("diffusion_model.{}".format, *DOWN_UP),
    "kohya": naming(lambda layer: f"lora_unet_{layer.replace('.', '_')}", *DOWN_UP),
    "kohya of diffusers": naming(
        lambda layer: f"lora_unet_{LAYERS[layer].replace('.', '_')}", *DOWN_UP
    ),
}


def wanted(model: DiT) -> dict[str, Tensor]:
    return {k: v.to("meta") for k, v in names.to_official(model.state_dict()).items()}


def check(model: DiT, loras: list[Lora], expected: dict[str, Tensor]) -> None:
    """The model with the LoRAs is the model with what is `expected` to be added."""
    before = {k: v.clone() for k, v in names.to_official(model.state_dict()).items()}
    for lora in loras:
        merge(model, read_lora(lora, wanted(model)))
    for name, own in names.to_official(model.state_dict()).items():
        want = before[name] + expected.get(name, torch.zeros(())).reshape(before[name].shape) \
            if name in expected else before[name]  # fmt: skip
        torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("named", NAMINGS.values(), ids=[*NAMINGS])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_naming(model: DiT, tmp_path: Path, named: Naming, suffix: str) -> None:
    made = pairs(model)
    tensors = {k: v for layer, (a, b) in made.items() for k, v in named(layer, a, b).items()}
    file = tmp_path / f"lora.{suffix}"
    if suffix == "pt":  # as training code saves them
        torch.save({"generator_lora": tensors}, file)
    else:
        save_file(tensors, file)
    scale = 0.5 * ALPHA / RANK
    check(model, [Lora.parse(f"{file}:0.5")], {
        f"{layer}.weight": scale * b.flatten(1) @ a.flatten(1) for layer, (a, b) in made.items()
    })  # fmt: skip


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 12, "r": RANK}, 12 / RANK),
        ({"lora_alpha": 12, "r": RANK, "use_rslora": True}, 12 / RANK**0.5),
        ({"lora_alpha": 12, "alpha_pattern": {"self_attn.k": 3, "k": 5}}, 3 / RANK),
        ({"lora_alpha": 12, "alpha_pattern": {"attn.k": 3}}, 12 / RANK),
    ],
)
def test_alpha_of_a_folder_and_of_metadata(
    model: DiT, tmp_path: Path, said: dict[str, Any], scale: float
) -> None:
    layer = "blocks.0.self_attn.k"
    a, b = torch.randn(RANK, CONFIG.dim), torch.randn(CONFIG.dim, RANK)
    stem = f"base_model.model.{layer}"
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    check(model, [Lora(folder)], {f"{layer}.weight": scale * b @ a})
    metadata: dict[str, Any] = {f"transformer.{key}": value for key, value in said.items()}
    metadata["text_encoder.lora_alpha"] = 1000
    save_file(
        tensors, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(metadata)}
    )
    check(model, [Lora(tmp_path / "one.safetensors")], {f"{layer}.weight": scale * b @ a})


def test_changes_themselves_and_several_files(model: DiT, tmp_path: Path) -> None:
    """Of weights, biases, norms and modulations, as LightX2V's files have them; strengths add up,
    and may be negative."""
    changes = {
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.1.self_attn.k.bias": "blocks.1.self_attn.k.diff_b",
        "blocks.1.modulation": "blocks.1.diff_m",
        "blocks.0.norm3.bias": "blocks.0.norm3.diff_b",
    }
    own = names.to_official(model.state_dict())
    made = {name: torch.randn(own[name].shape) for name in changes}
    for i in range(2):
        save_file({f"diffusion_model.{changes[name]}": value for name, value in made.items()},
                  tmp_path / f"{i}.safetensors")  # fmt: skip
    loras = [Lora(tmp_path / "0.safetensors", 0.75), Lora(tmp_path / "1.safetensors", -0.25)]
    check(model, loras, {name: 0.5 * value for name, value in made.items()})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blocks.0.self_attn.x.lora_A.weight": (3, 16)}, "self_attn.x.lora_A.weight: of no"),
        ({"blocks.7.self_attn.q.lora_A.weight": (3, 16)}, "blocks.7.self_attn.q.lora_A.weight"),
        ({"blocks.0.self_attn.q.hada_w1_a": (3, 16)}, "hada_w1_a: of no layer .* known"),
        ({"blocks.0.self_attn.q.lora_A.weight": (3, 16)}, "q.weight is of down .3, 16.: must be"),
        ({"blocks.0.self_attn.q.lora_A.weight": (3, 16),
          "blocks.0.self_attn.q.lora_B.weight": (16, 4)}, r"up \[16, 4\]: must be of \[rank, in\]"),
        ({"blocks.0.self_attn.q.diff": (15, 16)}, "as the parameter is, .16, 16."),
        ({"blocks.0.self_attn.q.diff": (256,)}, "as the parameter is, .16, 16."),
        ({"blocks.0.self_attn.q.lora_A.weight": (0, 16),
          "blocks.0.self_attn.q.lora_B.weight": (16, 0)}, "must be of"),
        ({"blocks.0.self_attn.q.lora_A.weight": (16,),
          "blocks.0.self_attn.q.lora_B.weight": (16,)}, "must be of"),
        ({"blocks.0.self_attn.q.lora_A.one.weight": (3, 16),
          "blocks.0.self_attn.q.lora_A.two.weight": (3, 16)}, "holds two changes of blocks.0"),
    ],
)  # fmt: skip
def test_what_is_no_change_of_this_model(
    model: DiT, tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"lora.safetensors: .*{said}"):
        read_lora(Lora(file), wanted(model))


def test_the_bias_of_b_is_scaled_as_it_is(model: DiT, tmp_path: Path) -> None:
    a, b = torch.randn(RANK, CONFIG.dim), torch.randn(CONFIG.dim, RANK)
    bias, stem = torch.randn(CONFIG.dim), "base_model.model.blocks.0.self_attn.k"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.lora_B.bias": bias}
              | {f"{stem}.alpha": torch.tensor(ALPHA)}, tmp_path / "a.safetensors")  # fmt: skip
    layer, scale = "blocks.0.self_attn.k", 2 * ALPHA / RANK
    check(model, [Lora(tmp_path / "a.safetensors", 2.0)],
          {f"{layer}.weight": scale * b @ a, f"{layer}.bias": scale * bias})  # fmt: skip


@pytest.mark.parametrize("config", ["[]", "{", '{"lora_alpha": [1]}', '{"alpha_pattern": 3}'])
def test_a_damaged_configuration(model: DiT, tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    stem = "base_model.model.blocks.0.self_attn.k"
    pair = {
        f"{stem}.lora_A.weight": torch.zeros(1, 16),
        f"{stem}.lora_B.weight": torch.zeros(16, 1),
    }
    save_file(pair, tmp_path / "adapter_model.safetensors")
    if config == "[]":  # as good as none
        assert read_lora(Lora(tmp_path), wanted(model))
        return
    with pytest.raises(ValueError, match="its configuration is damaged"):
        read_lora(Lora(tmp_path), wanted(model))
    with pytest.raises(ValueError, match="strength nan: must be a number"):
        read_lora(Lora(tmp_path, float("nan")), wanted(model))


def test_no_file(model: DiT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such checkpoint file"):
        read_lora(Lora.parse(f"{tmp_path}/none.safetensors:2"), wanted(model))
    with pytest.raises(ValueError, match="holds no LoRA"):
        read_lora(Lora(tmp_path), wanted(model))
    (tmp_path / "a.pt").touch()
    with pytest.raises(ValueError, match=r"a\.pt:abc: 'abc' must be a number, a strength"):
        Lora.parse(f"{tmp_path}/a.pt:abc")
    assert Lora.parse("C:models.pt") == Lora(Path("C:models.pt"))
    assert Lora.parse("a/b.pt:-0.5") == Lora(Path("a/b.pt"), -0.5)


def test_the_loaded_model_has_it(tmp_path: Path) -> None:
    config, device = PRESETS["toy"].dit, torch.device("cpu")
    a, b = torch.randn(2, config.dim), torch.randn(config.dim, 2)
    stem = "diffusion_model.blocks.3.self_attn.o"
    file = tmp_path / "lora.safetensors"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, file)
    plain = load_model("toy", None, device)
    changed = load_model("toy", None, device, loras=[Lora(file, 2.0)])
    own, other = (names.to_official(m.state_dict()) for m in (changed, plain))
    for name in own:
        want = other[name] + 2 * b @ a if name == "blocks.3.self_attn.o.weight" else other[name]
        torch.testing.assert_close(own[name], want)
