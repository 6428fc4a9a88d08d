"""Checkpoints in 8 bits, as ComfyUI and LightX2V write them: read as the numbers they stand for."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfmodel.cli.main import main
from sfmodel.dit import DiT
from sfmodel.pretrained import TOY_WEIGHTS, from_pretrained, load_toy
from sfmodel.weights import checkpoint, names
from sfmodel.weights.scaled import Scaled
from tests.test_opening import CONFIG, State, loads, under
from tests.test_opening import official as official

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
KINDS = ("per layer", "per row", "int8", "cast", "e5m2")


def in_eight_bits(state: State, kind: str) -> tuple[State, State]:
    """A file's content, whose linear layers are in 8 bits, and what it stands for."""
    dtype = {"int8": torch.int8, "e5m2": torch.float8_e5m2}.get(kind, torch.float8_e4m3fn)
    file, want = dict(state), dict(state)
    for name, weight in state.items():
        if not name.endswith(".weight") or weight.dim() != 2:
            continue
        rows = kind in ("per row", "int8")
        top = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
        scale = torch.ones(()) if kind in ("cast", "e5m2") else top / LARGEST[dtype]
        numbers = weight / scale
        file[name] = (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
        want[name] = file[name].float() * scale
        if kind == "per layer":
            file[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
            file[name.removesuffix("weight") + "scale_input"] = torch.ones(1)
        elif rows:
            file[name.removesuffix("weight") + "weight_scale"] = scale
    if kind == "per layer":
        file["scaled_fp8"] = torch.empty(2, dtype=dtype)
    return file, want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("naming", ["official", "comfy", "diffusers"])
def test_they_are_read_as_what_they_stand_for(
    official: State, tmp_path: Path, kind: str, naming: str
) -> None:
    file, want = in_eight_bits(official, kind)
    if naming == "comfy":
        file = under("model.diffusion_model.", file)
    if naming == "diffusers":  # scales go by the names of their weights
        names_of = dict(zip(official, names.diffusers(official), strict=True))
        scales = ("scale_weight", "weight_scale", "scale_input")
        file = {
            next(
                (names_of[name.removesuffix(s) + "weight"].removesuffix("weight") + s
                 for s in scales if name.endswith(f".{s}")),
                names_of.get(name, name),
            ): x
            for name, x in file.items()
        }  # fmt: skip
    save_file(file, tmp_path / "m.safetensors")
    loads(tmp_path / "m.safetensors", want)
    said = checkpoint.describe(tmp_path / "m.safetensors")
    assert {"int8": "int8", "e5m2": "float8_e5m2"}.get(kind, "float8_e4m3fn") in said
    assert f"{len(official)} tensors" in said
    assert checkpoint.matching(DiT(CONFIG), tmp_path / "m.safetensors")[0].keys() == (
        DiT(CONFIG).state_dict().keys()
    )
    torch.save({"generator": under("model.", file)}, tmp_path / "m.pt")
    if naming != "comfy":
        loads(tmp_path / "m.pt", want)


def test_they_take_no_memory_until_they_are_used(official: State, tmp_path: Path) -> None:
    file, want = in_eight_bits(official, "per row")
    save_file(file, tmp_path / "m.safetensors")
    state, _ = checkpoint.read(tmp_path / "m.safetensors")
    name = "blocks.0.ffn.0.weight"
    weight = state[name]
    assert isinstance(weight, Scaled) and weight.numbers.dtype == torch.float8_e4m3fn
    assert weight.shape == want[name].shape and weight.dtype == torch.float32
    assert torch.equal(weight[:3], want[name][:3]) and not isinstance(weight[:3], Scaled)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([want[name]] * 2))
    assert torch.equal(weight.to(torch.bfloat16), want[name].bfloat16())
    assert "float8_e4m3fn" in repr(weight)


def test_half_a_scale_is_refused(official: State, tmp_path: Path) -> None:
    def said(**more: Tensor) -> str:
        file, _ = in_eight_bits(official, "int8")
        for key, value in more.items():
            file[f"blocks.0.self_attn.q.{key}"] = value
        save_file({k: v for k, v in file.items() if v.numel()}, tmp_path / "m.safetensors")
        with pytest.raises(ValueError) as error:
            checkpoint.load(DiT(CONFIG), tmp_path / "m.safetensors")
        return str(error.value)

    q = "blocks.0.self_attn.q.weight is of type int8: in 8 bits has"
    assert f"{q} no scale: must have one, or one for each row" in said(weight_scale=torch.empty(0))
    assert f"{q} scales of shape [16, 2]: must have" in said(weight_scale=torch.ones(16, 2))
    assert f"{q} scales of shape [1]" in said(weight_scale=torch.ones(1, dtype=torch.int32))
    for value in (0.0, torch.nan, torch.inf):
        assert f"{q} scales of shape [1]" in said(weight_scale=torch.tensor([value]))
    rotated = json.dumps({"layers": {"a": {"format": "int8_tensorwise", "convrot": True}}})
    file, _ = in_eight_bits(official, "int8")
    save_file(file, tmp_path / "m.safetensors", {"_quantization_metadata": rotated})
    with pytest.raises(ValueError, match="rotated"):
        checkpoint.load(DiT(CONFIG), tmp_path / "m.safetensors")
    four = said(**{"weight": torch.zeros(16, 8, dtype=torch.uint8)})
    assert "is of type uint8: must be floating point of 16 bits or more, or of 8 bits" in four


def test_a_stream_and_a_conversion_from_eight_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The toy's own weights: near to what they were, and the same again once converted."""
    config = json.dumps(dataclasses.asdict(load_toy()[0].config))
    state = load_file(TOY_WEIGHTS)
    file, want = in_eight_bits(state, "per row")
    path = tmp_path / "toy-fp8.safetensors"
    save_file(file, path, {"config": config})
    assert path.stat().st_size < 0.5 * TOY_WEIGHTS.stat().st_size

    def run(*words: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["sfmodel", *map(str, words)])
        main()

    output = tmp_path / "v.mp4"
    run("generate", "--preset", "toy", "--checkpoint", path, "--frames", 13, "--output", output)
    assert output.stat().st_size > 1000
    for target in ("m.safetensors", "m.pt"):
        run("convert", path, tmp_path / target, "--to", "official", "--dtype", "float32")
        back = checkpoint.read(tmp_path / target)[0]
        assert all(torch.equal(back[name], want[name]) for name in want)
    model = from_pretrained(path, "cpu")
    assert all(
        torch.equal(x, want[name]) for name, x in checkpoint.to_official(model.state_dict()).items()
    )
