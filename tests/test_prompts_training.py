"""Prompts of a run at full size, here with small models: as text, as embeddings, and the one that
guidance leads away from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sfmodel.config import PRESETS
from sfmodel.ranks import Ranks
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import loop, text
from sfmodel.train.batch import Batch
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.data import ToyWorld, open_source
from sfmodel.train.defaults import NEGATIVE, defaults
from sfmodel.train.loop import Run, train
from sfmodel.train.text import KeptText
from sfmodel.umt5 import UMT5Encoder
from tests.test_cli import run
from tests.test_umt5 import DIM, OFFICIAL, official_state, public, save_tokenizer
from tests.tiny_runs import TINY, apart, config, saved, tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = replace(TINY, dit=replace(TINY.dit, text_dim=DIM, prediction="flow"))
PROMPTS = ["a bc", "abba", "c a b c a", "b", "cc cc"]
SPACE, END = 3, 1  # tokens, beside letters from 4 on


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wan2.1 is small, its files lie in `models`, and what is kept of embeddings in `cache`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFMODEL_MODELS", "models")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PRESETS, "wan-1.3b", SMALL)
    with tiny():
        yield


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder of the text encoder."""
    folder = tmp_path / "models"
    save_tokenizer(folder / "google" / "umt5-xxl")
    torch.save({k: v.bfloat16() for k, v in official_state().items()}, folder / OFFICIAL)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that the text encoder was loaded to."""
    found, load = [], UMT5Encoder._load

    def counted(self: UMT5Encoder, device: torch.device) -> Any:
        found.append(str(device))
        return load(self, device)

    monkeypatch.setattr(UMT5Encoder, "_load", counted)
    return found


def settings(name: str = "run", recipe: str = "sf+dmd", **change: Any) -> TrainConfig:
    base = {"preset": "wan-1.3b", "drop_text": 0.0, "drop_word": 0.0, "data": Path("p.safetensors")}
    return config(Path.cwd() / name, recipe, **{**base, **change})


def encode(name: str, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `sfmodel encode` makes of a text file."""
    Path(f"{name}.txt").write_text("\n".join(prompts) + "\n")
    run(monkeypatch, "encode", f"{name}.txt", "--output", ".")
    return Path(f"{name}.safetensors")


def negative_of(given: str | None) -> Tensor:
    """What guidance leads away from, [T, E]."""
    (negative_TE,) = Run(settings(negative=given), ALONE).context.negative_1TE
    return negative_TE


@pytest.fixture
def embeddings() -> None:
    """Those of two prompts, made of nothing, as data."""
    save_file({"text": torch.randn(2, 3, DIM)}, "p.safetensors")


@pytest.mark.usefixtures("embeddings")
def test_the_negative_prompt_is_embedded_by_the_text_encoder(
    models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as the public code does, here compared with float32. No words are the token that
    ends every text."""
    state = {k: v.bfloat16().float() for k, v in official_state().items()}
    for given, tokens in ((None, [END]), ("", [END]), ("ab", [SPACE, 4, 5, END])):
        want_TE = public(state, tokens)
        torch.testing.assert_close(negative_of(given), want_TE, rtol=0, atol=0.2)
    assert loads == ["cpu"] * 3
    given_TE = negative_of("ab")
    assert torch.equal(negative_of("ab.txt" if Path("ab.txt").write_text("ab\n") else ""), given_TE)
    path = encode("negative", ["ab"], monkeypatch)
    several = encode("several", ["a", "b"], monkeypatch)
    models.rename("elsewhere")  # of a file it needs no encoder
    assert torch.equal(negative_of(str(path)), given_TE)
    with pytest.raises(ValueError, match=r"several.safetensors: has 2 prompts: must have one"):
        negative_of(str(several))
    said = r"negative='色.{19}…': there is no text encoder for it: .*`sfmodel encode negative.txt`"
    with pytest.raises(ValueError, match=said):
        negative_of(NEGATIVE)
    # Without guidance none is needed.
    source = ToyWorld(ToyVAE(), ToyTextEncoder())
    for recipe, scale in (("tf", 4.0), ("sf+dmd", 1.0)):
        unguided = settings(recipe=recipe, negative=NEGATIVE, guidance_scale=scale)
        assert not Run(unguided, ALONE, source=source).context.negative_1TE.any()


def test_the_toy_s_negative_prompt_of_no_words_is_zeros() -> None:
    for given, want in ((None, torch.zeros(1, 1, 32)), ("a red ball", None)):
        toy = Run(config(Path.cwd() / "run", "sf+dmd", negative=given), ALONE)
        want = ToyTextEncoder()([given]) if given else want
        assert want is not None and torch.equal(toy.context.negative_1TE, want)


@pytest.mark.usefixtures("embeddings")
def test_a_ready_negative_prompt_needs_no_encoder() -> None:
    ready = torch.randn(1, 2, DIM)
    assert torch.equal(Run(settings(), ALONE, negative=ready).context.negative_1TE, ready)


def test_the_public_negative_prompt_is_the_default_of_wan_alone() -> None:
    assert len(NEGATIVE) == 137 and NEGATIVE[:2] == "色调" and NEGATIVE[-3:] == "倒着走"
    assert {defaults("wan-14b", recipe).negative for recipe in RECIPES} == {NEGATIVE}
    assert defaults("toy", "sf+dmd").negative is None


@pytest.mark.parametrize(("recipe", "times"), [("sf+dmd", 1), ("ode", 1)])
def test_prompts_as_text_are_learned_as_their_embeddings_are(
    recipe: str, times: int, models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what was encoded before, and what the encoder is loaded for while it trains."""
    path = encode("p", PROMPTS, monkeypatch)
    for name, data in (("before", path), ("meanwhile", path.with_suffix(".txt"))):
        loads.clear()
        train(settings(name, recipe, data=data, negative="c", steps=2), device="cpu")
    assert len(loads) == times + 1  # for all of the data, and for the negative prompt
    one, other = (saved(Path(name, "checkpoints/step-000002")) for name in ("before", "meanwhile"))
    assert apart(one, other) == 0
    assert not Path("cache").exists()


@pytest.mark.parametrize(("ahead", "loaded"), [(1, [1, 1, 1, 1]), (13, [1, 0, 1, 0])])
def test_prompts_are_encoded_ahead_for_whole_steps(
    ahead: int, loaded: list[int], models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update has 4 prompts; the first step has three updates, the others two. A resumed run
    begins with the step that it goes on with."""
    prompts = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=3)]
    Path("p.txt").write_text("\n".join(prompts))
    monkeypatch.setattr(loop, "AHEAD", ahead)

    def update(self: Run, which: str, batch: Batch, rate: float = 1.0) -> dict[str, float]:
        return {"loss": sum(float(batch.load(rows).text_BTE.sum()) for rows in self._split(4))}

    monkeypatch.setattr(Run, "update", update)
    given = settings(data=Path("p.txt"), guidance_scale=1.0, micro_batch=1, steps=4, ema=0.0)
    whole, resumed = Run(given, ALONE), Run(given, ALONE)
    for count in loaded:
        loads.clear()
        whole.train_step()
        assert len(loads) == count
    resumed.step = 3
    resumed.train_step()
    for each, most in ((whole, 36), (resumed, 8)):
        assert isinstance(each.text, KeptText) and most - 4 <= len(each.text._kept) <= most


def test_a_prompt_is_encoded_the_same_whatever_is_drawn_with_it(models: Path) -> None:
    """So that ranks and micro-batches learn the same."""
    Path("p.txt").write_text("\n".join(PROMPTS))
    parts = [slice(0, 8), *(slice(i, i + 1) for i in range(8))]
    whole, *rows = (
        open_source(Path("p.txt"), SMALL, 4, None, KeptText("wan-1.3b", torch.device("cpu"))).draw(
            7, 8, 4, part, latents=False
        )
        for part in parts
    )
    assert {*whole.sentences} <= {*PROMPTS} and len({*whole.sentences}) > 2
    for want_TE, row in zip(whole.text_BTE, rows, strict=True):
        padding = (0, 0, 0, len(want_TE) - row.text_BTE.shape[1])
        assert torch.equal(F.pad(row.text_BTE[0], padding), want_TE)


def test_what_is_kept_of_embeddings_has_an_end(
    models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three rows in bfloat16 here: of those asked for last."""
    monkeypatch.setattr(text, "KEPT", 2 * 3 * DIM * 2)
    encoder = KeptText("wan-1.3b", torch.device("cpu"))
    _, b, c = (encoder([letter]) for letter in "abc")
    assert len(loads) == 3 and [*encoder._kept] == ["b", "c"]
    assert torch.equal(encoder(["c", "b", "c"]), torch.cat([c, b, c])) and len(loads) == 3
    encoder(["a"])
    assert len(loads) == 4 and [*encoder._kept] == ["b", "a"]
    both = encoder(["b", "aa"])  # of which the shorter one is padded
    assert torch.equal(both[:1], F.pad(b, (0, 0, 0, 1))) and both.shape == (2, 4, DIM)
    encoder.encode("abcd")  # more than is kept, but needed now
    assert {*encoder._kept} == {*"abcd"}


def test_an_encoder_that_cannot_be_opened_is_named_before_training(models: Path) -> None:
    (models / OFFICIAL).write_text("<!DOCTYPE html><html>")
    Path("p.txt").write_text("a\n")
    with pytest.raises(ValueError, match=rf"p.txt: models/{OFFICIAL}: is a web page, not weights"):
        Run(settings(data=Path("p.txt")), ALONE)
    (models / OFFICIAL).unlink()
    with pytest.raises(ValueError, match=r"p.txt: there is no text encoder for its prompts: must"):
        Run(settings(data=Path("p.txt")), ALONE)
