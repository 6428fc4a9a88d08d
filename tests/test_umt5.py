"""Wan2.1's text encoder: equal to the public code and to transformers, on a tiny model with random
weights; and the cache on disk."""

from __future__ import annotations

import json
import math
import pwd
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfmodel.umt5 import UMT5Encoder, clean, describe, read_weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")
tokenizers = pytest.importorskip("tokenizers")

DIM, HEADS, INNER, FFN, LAYERS, BUCKETS, ROWS = 32, 4, 24, 48, 2, 32, 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FP32, BF16 = torch.float32, torch.bfloat16
OFFICIAL = "models_t5_umt5-xxl-enc-bf16.pth"


def official_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {"token_embedding.weight": torch.randn(ROWS, DIM), "norm.weight": torch.rand(DIM) + 0.5}
    for i in range(LAYERS):
        block = {
            "norm1.weight": torch.rand(DIM) + 0.5,
            **{f"attn.{n}.weight": torch.randn(INNER, DIM) / 4 for n in "qkv"},
            "attn.o.weight": torch.randn(DIM, INNER) / 5,
            "norm2.weight": torch.rand(DIM) + 0.5,
            "ffn.gate.0.weight": torch.randn(FFN, DIM) / 6,
            "ffn.fc1.weight": torch.randn(FFN, DIM) / 6,
            "ffn.fc2.weight": torch.randn(DIM, FFN) / 7,
            "pos_embedding.embedding.weight": torch.randn(BUCKETS, HEADS),
        }
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return state


def save_tokenizer(folder: Path, end: str = "</s>") -> Path:
    """Of letters; the end token is 1. It makes small letters, as no rebuilt tokenizer would."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in LETTERS]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official file, the same in shards of diffusers, and a tokenizer."""
    folder = tmp_path_factory.mktemp("umt5")
    torch.save(official_state(), folder / OFFICIAL)
    tokenizer = save_tokenizer(folder / "tokenizer")
    model = UMT5Encoder(folder / OFFICIAL, tokenizer, dtype=FP32)._load(torch.device("cpu"))
    model.save_pretrained(folder / "text_encoder", max_shard_size="10KB")
    assert (folder / "text_encoder" / "model.safetensors.index.json").exists()
    return folder


def encoder(
    files: Path, cache: Path, weights: str = OFFICIAL, dtype: torch.dtype = FP32
) -> UMT5Encoder:
    return UMT5Encoder(files / weights, files / "tokenizer", dtype=dtype, cache=cache)


def public(state: dict[str, Tensor], ids: list[int]) -> Tensor:
    """What the public Wan2.1 computes (wan/modules/t5.py), [T, DIM]."""

    def norm(x_TE: Tensor, weight: Tensor) -> Tensor:
        return weight * x_TE * torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + 1e-6)

    at = torch.arange(len(ids))
    after = at[None] - at[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = exact + (after.abs() / exact).log() / math.log(128 / exact) * (half - exact)
    near = after.abs() < exact
    bucket = torch.where(near, after.abs(), far.clamp(0, half - 1).long()) + half * (after > 0)
    x = state["token_embedding.weight"][ids]
    for i in range(LAYERS):
        w = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, w["norm1.weight"])
        q, k, v = (
            F.linear(h, w[f"attn.{n}.weight"]).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for n in "qkv"
        )
        bias_TTH = w["pos_embedding.embedding.weight"][bucket]
        scores = q @ k.mT + bias_TTH.permute(2, 0, 1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + F.linear(mixed, w["attn.o.weight"])
        h = norm(x, w["norm2.weight"])
        gate = F.gelu(F.linear(h, w["ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(h, w["ffn.fc1.weight"]) * gate, w["ffn.fc2.weight"])
    return norm(x, state["norm.weight"])


def test_it_computes_what_the_public_code_does(files: Path, tmp_path: Path) -> None:
    prompts = ["ab c", "a bc d" * 60]
    out_BLE = encoder(files, tmp_path)(prompts)
    tokenizer = tokenizers.Tokenizer.from_file(str(files / "tokenizer" / "tokenizer.json"))
    for out_LE, prompt in zip(out_BLE, prompts, strict=True):
        want_TE = public(official_state(), tokenizer.encode(prompt).ids)
        torch.testing.assert_close(out_LE[: len(want_TE)], want_TE, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_both_layouts_are_what_transformers_computes(
    files: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Which pads to 512 tokens and masks the padding, as the public pipelines do."""
    prompts = ["The ball moves", "", "a b c d e f g"]
    out_BLE = encoder(files, tmp_path / "a", dtype=dtype)(prompts)
    assert out_BLE.dtype == FP32 and out_BLE.shape[2] == DIM
    folder = encoder(files, tmp_path / "b", "text_encoder", dtype)
    atol = 2e-5 if dtype == FP32 else 0.2
    # Not bit for bit: what a CPU rounds how depends on where in memory, so in a file, weights lie.
    torch.testing.assert_close(out_BLE, folder(prompts), rtol=0, atol=atol)

    model = transformers.UMT5EncoderModel.from_pretrained(files / "text_encoder").to(dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "tokenizer")
    tokens = tokenizer(prompts, padding="max_length", max_length=512, return_tensors="pt")
    mask_BL1 = tokens.attention_mask[..., None].float()
    with torch.no_grad():
        want_BLE = model.eval()(tokens.input_ids, tokens.attention_mask).last_hidden_state
    want_BLE = want_BLE.float() * mask_BL1
    rows = out_BLE.shape[1]
    assert rows == mask_BL1.sum(1).max()
    assert out_BLE[mask_BL1[:, :rows, 0] == 0].abs().max() == 0
    torch.testing.assert_close(out_BLE, want_BLE[:, :rows], rtol=0, atol=atol)


def test_both_layouts_hold_the_same_tensors(files: Path) -> None:
    official, folder = read_weights(files / OFFICIAL), read_weights(files / "text_encoder")
    assert official.keys() == folder.keys() and len(official) == 2 + 10 * LAYERS
    assert all(torch.equal(tensor, folder[name]) for name, tensor in official.items())


def test_a_sentence_does_not_depend_on_the_others(files: Path, tmp_path: Path) -> None:
    alone_LE = encoder(files, tmp_path / "a", dtype=BF16)(["a b"])[0]
    beside_LE = encoder(files, tmp_path / "b", dtype=BF16)(["c" * 99, "a b"])[1]
    assert torch.equal(alone_LE, beside_LE[: len(alone_LE)])
    assert beside_LE[len(alone_LE) :].abs().max() == 0


def test_the_empty_sentence_and_one_that_is_too_long(files: Path, tmp_path: Path) -> None:
    encode = encoder(files, tmp_path)
    empty_LE = encode([" \n"])[0]
    torch.testing.assert_close(empty_LE, public(official_state(), [1]))
    for _ in range(2):  # said also of what the cache has
        with pytest.warns(UserWarning, match=r"prompt 'a{60}'… has 2,002 tokens: the first 512"):
            long_LE = encode(["a" * 2000])[0]
        assert len(long_LE) == encode.text_len == 512
    with pytest.warns(UserWarning, match="2,002 tokens"):
        assert encode._tokens(encode._tokenizer(), "a" * 2000)[0][-2:] == [4, 1]
    assert len(encode(["a" * 510])[0]) == 512  # with the first space and the end: nothing is cut


def test_a_kept_prompt_that_does_not_say_whether_it_was_cut_is_encoded_anew(
    files: Path, tmp_path: Path
) -> None:
    encode = encoder(files, tmp_path)
    with pytest.warns(UserWarning, match="600 tokens"):
        encode(["a" * 598])
    path = encode._kept("a" * 598)
    assert path is not None
    save_file(load_file(path), path)
    with pytest.warns(UserWarning, match="600 tokens"):
        encode(["a" * 598])


def test_any_number_of_sentences_is_encoded_by_one_load_as_they_come(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, asked = [], []
    load = UMT5Encoder._load
    monkeypatch.setattr(UMT5Encoder, "_load", lambda *a: loads.append(1) or load(*a))  # type: ignore

    def sentences() -> Iterator[str]:
        for i in range(5):
            asked.append(i)
            yield "ab" * i

    encode = encoder(files, tmp_path)
    for i, text_TE in enumerate(encode.rows(sentences())):
        assert asked == [*range(i + 1)] and text_TE.shape == (2 * i + 1 + (i > 0), DIM)
    assert loads == [1]


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        ("  a\t ball\n\nmoves ", "a ball moves"),
        ("salt &amp;amp; pepper &lt;b&gt;", "salt & pepper <b>"),
        ("a < b &amp;amp; c", "a < b & c"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只猫", "一只猫"),
    ],
)
def test_cleaning_is_that_of_the_public_code(said: str, cleaned: str) -> None:
    assert clean(said) == cleaned


def test_a_kept_prompt_needs_no_model_and_has_the_same_bits(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_BLE = encoder(files, tmp_path, dtype=BF16)(["a b", "c"])
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2 and {load_file(path)["text"].dtype for path in kept} == {BF16}
    with monkeypatch.context() as patched:
        patched.setattr(UMT5Encoder, "_load", lambda *_: pytest.fail("loaded"))
        again = encoder(files, tmp_path, dtype=BF16)
        assert torch.equal(again(["a b", "c"]), first_BLE)
        assert torch.equal(again(["a  B &amp;".replace("B &amp;", "b")])[0], first_BLE[0])
    for other in (encoder(files, tmp_path), encoder(files, tmp_path, "text_encoder", BF16)):
        other(["c"])
    assert len([*tmp_path.iterdir()]) == 4, "another encoder has embeddings of its own"


def test_a_changed_file_is_another_encoder(files: Path, tmp_path: Path) -> None:
    """Of the same size and name, in the last of its bytes; large files are sampled."""
    state = official_state() | {"token_embedding.weight": torch.zeros(20_000, DIM)}
    hashes = set()
    for value in (0.0, 1.0, 1.0):
        state["token_embedding.weight"][10_000:] = value
        torch.save(state, tmp_path / OFFICIAL)
        hashes.add(UMT5Encoder(tmp_path / OFFICIAL, files / "tokenizer").identity)
    assert (tmp_path / OFFICIAL).stat().st_size > 2**21 and len(hashes) == 2


@pytest.mark.parametrize("damage", ["cut", "shape", "dtype", "name"])
def test_a_damaged_kept_file_is_made_anew(files: Path, tmp_path: Path, damage: str) -> None:
    first = encoder(files, tmp_path)(["a b"])
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(whole[:-1])
    else:
        shape = (3, DIM + 1) if damage == "shape" else (3, DIM)
        tensor = torch.zeros(shape, dtype=BF16 if damage == "dtype" else FP32)
        save_file({"other" if damage == "name" else "text": tensor}, kept)
    assert torch.equal(encoder(files, tmp_path)(["a b"]), first)
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_a_warning(files: Path, tmp_path: Path) -> None:
    want = encoder(files, tmp_path / "good")(["a b", "c"])
    (tmp_path / "file").touch()
    with pytest.warns(
        UserWarning, match="embeddings of prompts are not kept: cannot write"
    ) as said:
        assert torch.equal(encoder(files, tmp_path / "file")(["a b", "c"]), want)
    assert len(said) == 1


def test_the_cache_is_where_the_user_keeps_caches(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = UMT5Encoder(files / OFFICIAL, files / "tokenizer")
    assert made.cache == tmp_path / "sfmodel" / "text" and made.text_dim == DIM
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert UMT5Encoder(files / OFFICIAL, files / "tokenizer").cache == (
        tmp_path / ".cache" / "sfmodel" / "text"
    )


def test_without_a_home_nothing_is_kept(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user whom the system does not know."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    encode = UMT5Encoder(files / OFFICIAL, files / "tokenizer")
    assert encode.cache is None and encode(["a b"]).shape[0] == 1


def test_parameters_stay_mapped_to_the_file(files: Path, tmp_path: Path) -> None:
    encode = encoder(files, tmp_path)
    model = encode._load(torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        name = name.replace("encoder.embed_tokens", "shared")
        assert tensor.data_ptr() == encode._state[name].data_ptr()


def test_a_gpu_encodes_only_where_it_has_room(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoder(files, tmp_path)
    needed = 4 * sum(tensor.numel() for tensor in official_state().values()) + 2**30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, where in ((needed + 1, "cuda"), (needed, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**40))
        assert encode._where(torch.device("cuda")).type == where


@pytest.mark.gpu
def test_a_gpu_is_left_without_the_weights(files: Path, tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    out = encoder(files, tmp_path / "a")(["a b"], "cuda")
    assert torch.cuda.memory_allocated() - before == out.untyped_storage().nbytes()
    torch.testing.assert_close(out.cpu(), encoder(files, tmp_path / "b")(["a b"]))


def test_what_a_file_is_said_to_be(files: Path) -> None:
    count = sum(tensor.numel() for tensor in official_state().values())
    said = f"a UMT5 text encoder of {count:,} parameters, float32"
    assert describe(files / OFFICIAL) == describe(files / "text_encoder") == said


@pytest.mark.parametrize("wrong", ["a ball", []])
def test_sentences_must_be_a_list(files: Path, tmp_path: Path, wrong: str | list[str]) -> None:
    with pytest.raises(ValueError, match="list of at least one sentence"):
        encoder(files, tmp_path)(wrong)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm.weight": None}, "not the weights of a UMT5 text encoder"),
        ({"token_embedding.weight": torch.zeros(ROWS)}, "not the weights of a UMT5 text encoder"),
        ({"blocks.1.attn.q.weight": None}, "SelfAttention.q.weight missing"),
        ({"blocks.1.ffn.fc1.weight": torch.zeros(FFN + 1, DIM)}, "wi_1.weight missing, unexp"),
        ({"extra.weight": torch.zeros(1)}, "not a whole UMT5 text encoder: extra.weight"),
        ({"blocks.0.attn.q.weight": None}, "not a whole UMT5 text encoder"),
        ({"blocks.0.attn.q.weight": torch.tensor(1.0)}, "has wrong shapes"),
        ({"blocks.0.pos_embedding.embedding.weight": torch.zeros(0, 0)}, "has wrong shapes"),
        ({"norm.weight": torch.full((DIM,), math.nan)}, "'a' becomes NaN or infinity"),
    ],
)
def test_wrong_weights_are_named(
    files: Path, tmp_path: Path, change: dict[str, Tensor | None], reason: str
) -> None:
    state = {k: v for k, v in {**official_state(), **change}.items() if v is not None}
    torch.save(state, tmp_path / OFFICIAL)
    with pytest.raises(ValueError, match=reason) as error:
        UMT5Encoder(tmp_path / OFFICIAL, files / "tokenizer", cache=tmp_path / "cache")(["a"])
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_wrong_folders_and_tokenizers_are_named(files: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of shards"):
        UMT5Encoder(tmp_path, files / "tokenizer")
    with pytest.raises(ValueError, match=r"no such checkpoint file"):
        UMT5Encoder(tmp_path / "nothing.pth", files / "tokenizer")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        UMT5Encoder(files / OFFICIAL, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        UMT5Encoder(files / OFFICIAL, tmp_path, cache=tmp_path / "cache")(["a"])
    with pytest.raises(ValueError, match="must end in token 1 of 40"):
        other = save_tokenizer(tmp_path / "other", "<pad>")
        UMT5Encoder(files / OFFICIAL, other, cache=tmp_path / "cache")(["a"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 10**9}, f"num_layers={10**9}: there are {LAYERS}"),
        ({"d_ff": 10**15}, "of another shape"),
        ({"num_heads": -1}, "no model has its config"),
        (None, "nested too deeply"),
    ],
)
def test_odd_configs_are_named(
    files: Path, tmp_path: Path, change: dict[str, object] | None, reason: str
) -> None:
    folder = tmp_path / "text_encoder"
    shutil.copytree(files / "text_encoder", folder)
    config = json.loads((folder / "config.json").read_text())
    text = "[" * 100_000 if change is None else json.dumps(config | change)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        UMT5Encoder(folder, files / "tokenizer", cache=tmp_path / "cache")(["a"])
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["ftfy", "transformers", "tokenizers"])
def test_a_missing_library_names_what_installs_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"needs {library}.*pip install 'sfkernels\[text\]'"):
        encoder(files, tmp_path)(["a"])
