"""A stream that is saved goes on in another one as if it had never ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sfmodel.dit import DiT
from sfmodel.saved_stream import fork, load_stream, read_notes, read_preset, save_stream
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from sfmodel.weights.saving import save_tensors
from tests.test_stream import SMALL, TEXT
from tests.test_stream import model as model

CODEC = ToyVAE()
SETTINGS: list[dict[str, Any]] = [
    {},
    dict(window=8, sink=1, first=1),
    dict(chunk=2, window=7, sink=3, positions="absolute"),
]
OPTIONS: list[dict[str, Any]] = [{}, dict(low_latency=True), dict(merge=False), dict(euler=3)]


def new(model: DiT, settings: dict[str, Any], **options: Any) -> Stream:
    preset = replace(SMALL, **settings)
    return Stream(model, CODEC, TEXT, preset, seed=3, batch=2, **options)


def frames(stream: Stream, count: int) -> Tensor:
    return torch.cat([*stream.frames(count)], 1)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("before", [1, 20, 67])
def test_bit_for_bit(model: DiT, tmp_path: Path, before: int, options: Any, settings: Any) -> None:
    """At any frame, also inside a chunk, with a prompt and latents to come; into a stream of
    another prompt and seed that has run; the first one goes on as well."""
    whole, mine = (new(model, settings, **options) for _ in range(2))
    chunks = mine.preset.chunk
    clip = torch.randn(2, (mine.preset.first or chunks) + 8 * chunks, 4, 8, 8)
    for each in (whole, mine):
        each.give(clip[:, : mine.first + chunks])
        each.set_prompt(TEXT.flip(0), frame=8, over=3)
        each.set_prompt(TEXT, frame=40, recompute=False)
    want = frames(whole, before + 90)
    assert torch.equal(frames(mine, before), want[:, :before])
    save_stream(mine, tmp_path / "a", {"prompt": "a ball"})
    assert read_notes(tmp_path / "a") == {"prompt": "a ball"}
    assert read_preset(tmp_path / "a") == mine.preset
    other = Stream(model, CODEC, TEXT.flip(1), mine.preset, seed=9, batch=2, **options)
    frames(other, 5)
    load_stream(other, tmp_path / "a")
    assert torch.equal(frames(other, 40), want[:, before : before + 40])
    assert torch.equal(frames(mine, 90), want[:, before:])
    fork(other, mine)
    for each in (mine, other):
        assert torch.equal(frames(each, 50), want[:, before + 40 :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(window=9), "was saved with preset=window=6, and this stream has 9"),
        (dict(batch=1), "was saved with batch=2, and this stream has 1"),
        (dict(euler=4), "was saved with euler=0, and this stream has 4"),
        (dict(model=True), "was saved with other weights"),
        (dict(codec=True), "was saved with a decoder, and this stream has none"),
    ],
)
@torch.no_grad()
def test_another_stream(model: DiT, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Is refused and goes on as it was."""
    mine = new(model, {})
    frames(mine, 30)
    save_stream(mine, tmp_path / "a")
    preset = replace(SMALL, window=change.get("window", SMALL.window))
    batch = change.get("batch", 2)
    if "model" in change:
        model = DiT(SMALL.dit)
    codec = None if "codec" in change else CODEC
    others = [
        Stream(model, codec, TEXT[:batch], preset, batch=batch, euler=change.get("euler", 0))
        for _ in range(2)
    ]
    for each in others:
        each.denoise()
    with pytest.raises(ValueError, match=f"a: {said}"):
        load_stream(others[0], tmp_path / "a")
    assert torch.equal(others[0].denoise(), others[1].denoise())


def test_a_file_that_is_none(model: DiT, tmp_path: Path) -> None:
    mine = new(model, {})
    frames(mine, 12)
    save_stream(mine, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(tensors: dict[str, Tensor], said: str, **changes: str) -> None:
        save_tensors(tmp_path / "b", tensors, metadata | changes)
        with pytest.raises(ValueError, match=said):
            load_stream(mine, tmp_path / "b")

    refused(tensors, "holds no saved stream", kind="weights")
    refused(tensors, "is of version 7: must be 1", version="7")
    for name in ("cache.k", "decoder.0", "recent_BFCHW", "latents.3"):
        refused({k: v for k, v in tensors.items() if k != name}, "missing")
        refused(tensors | {name: tensors[name][:1]}, "shape")

    def edited(*keys: str, value: Any) -> str:
        facts = json.loads(metadata["facts"])
        inner = facts
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(facts)

    facts = json.loads(metadata["facts"])
    del facts["counts"]["past"]
    refused(tensors, "'past' is missing", facts=json.dumps(facts))
    refused(tensors, "damaged: its facts are none", facts="[1")
    refused(tensors, "is of version : must be 1", version="")
    for name, value in (("past", -1), ("begun", 1e400), ("past", "x"), ("size", 0), ("pending", 2),
                        ("pending", 10**9), ("decoded", 99), ("handed_out", 2**70)):  # fmt: skip
        refused(tensors, "b: ", facts=edited("counts", name, value=value))
    refused(tensors, "b: ", facts=edited("given", value=["a"]))
    refused(tensors, "b: ", facts=edited("prompts", value=[[0, 0, True, False]]))
    refused(tensors, "b: ", facts=edited("leaving", value=3))
    refused(tensors, "was saved with preset=3", facts=edited("preset", value=3))
    with pytest.raises(ValueError, match="b: damaged"):
        read_preset(tmp_path / "b")
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-50])
    with pytest.raises(ValueError, match="c: damaged, or no file of tensors"):
        load_stream(mine, tmp_path / "c")
    with pytest.raises(ValueError, match="d: there is no such file"):
        read_notes(tmp_path / "d")
    want = new(model, {})
    frames(want, 12)
    assert torch.equal(frames(mine, 30), frames(want, 30))
