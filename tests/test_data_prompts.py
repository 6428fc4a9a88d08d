"""Prompts and texts of an encoder as training data, without clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sfmodel.train.data import Prompts, open_source, read_prompts
from tests.test_data import PRESET, TEXT, open_toy


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.TXT"
    path.write_text("a red ball\n\n  a ball moves up  \n", encoding="utf-8")
    source = open_toy(path)
    clips = source.draw(0, 20, 5, latents=False)
    assert {*clips.sentences} == {"a red ball", "a ball moves up"}
    assert clips.latents_BFCHW is None and torch.equal(clips.text_BTE, TEXT(clips.sentences))
    path.write_text("a red ball\na cat\n")
    with pytest.raises(ValueError, match=r"p.TXT: the toy model does not know 'cat' in 'a cat'"):
        open_toy(path)


def test_embeddings_need_no_text_encoder(tmp_path: Path) -> None:
    path, text = tmp_path / "e.safetensors", torch.randn(6, 4, 32)
    save_file({"text": text.bfloat16()}, path)
    source = open_source(path, PRESET, 3, None, None)
    assert isinstance(source, Prompts) and not source.has_latents
    clips = source.draw(0, 30, 1, latents=False)
    assert {*clips.sentences} == {""} and clips.text_BTE.dtype == torch.float32
    assert torch.equal(clips.text_BTE.unique(dim=0), text.bfloat16().float().unique(dim=0))
    save_file({"text": text[..., :8].contiguous()}, path)
    with pytest.raises(ValueError, match=r"text has shape \[6, 4, 8\]: must be \[N, 1 to 16, 32\]"):
        open_toy(path)
    save_file({"text": text}, path, {"prompts": '["a"]'})
    with pytest.raises(ValueError, match=r"safetensors: must have a JSON list of 6 sentences as"):
        open_toy(path)


def test_embeddings_without_padding(tmp_path: Path) -> None:
    path, rows = tmp_path / "e.safetensors", torch.randn(6, 32).bfloat16()
    lengths = torch.tensor([1, 3, 2])
    prompts = {"prompts": json.dumps(["one", "two", "three"])}
    save_file({"text": rows, "lengths": lengths}, path, prompts)
    source = open_source(path, PRESET, 3, None, None)
    clips = source.draw(0, 20, 1, latents=False)
    wanted = dict(zip(("one", "two", "three"), rows.float().split([1, 3, 2]), strict=True))
    for text_TE, sentence in zip(clips.text_BTE, clips.sentences, strict=True):
        want_TE = wanted[sentence]
        assert torch.equal(text_TE, F.pad(want_TE, (0, 0, 0, 3 - len(want_TE))))
    for bad in ([1, 3, 3], [6, 0, 0], [7, -3, 2], [17, 1, 1], [], [[1], [3], [2]], [1.0, 3.0, 2.0]):
        save_file({"text": rows, "lengths": torch.tensor(bad)}, path, prompts)
        with pytest.raises(
            ValueError, match=r"lengths must be N whole numbers from 1|must be \[7,"
        ):
            open_source(path, PRESET, 3, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_a_draw_reads_the_rows_of_its_prompt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Not the header, which holds all sentences: of 100,000 that takes a tenth of a second."""
    path = tmp_path / "e.safetensors"
    whole = torch.arange(5 * 2 * 32).view(5, 2, 32).div(32).to(dtype)
    save_file({"text": whole, "other": torch.zeros(7)}, path, {"prompts": json.dumps([*"abcde"])})
    source = open_source(path, PRESET, 3, None, None)
    monkeypatch.setattr("sfmodel.train.shards.safe_open", None)
    clips = source.draw(0, 30, 1, latents=False)
    assert {*clips.sentences} == {*"abcde"}
    want = whole.float()[["abcde".index(sentence) for sentence in clips.sentences]]
    assert torch.equal(clips.text_BTE, want)
    path.write_bytes(path.read_bytes()[:-28])  # the header stays whole
    assert {*source.draw(0, 30, 1, latents=False).sentences} == {*"abcd"}
    said = "item 4: not a whole safetensors file (it has become shorter)"
    assert source.skipped == {"e.safetensors": said}


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n one \n\ntwo\n")
    assert read_prompts(path) == ["one", "two"]
    path.write_text(" \n")
    for bad, reason in (
        (path, "has no prompt, must have one a line"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ValueError, match=rf"^prompt file {bad}: {reason}$"):
            read_prompts(bad)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=rf"^prompt file {path}: not a text file$"):
        Prompts(path, PRESET, TEXT)
