"""Files of weights as others write them, and files that are made to do harm."""

from __future__ import annotations

import json
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.weights import checkpoint, names
from sfmodel.weights.opening import generator_width, open_weights

CONFIG = DiTConfig(
    dim=16, ffn_dim=24, heads=2, layers=2, channels=4, freq_dim=8, text_dim=8, text_len=4
)
State = dict[str, Tensor]
Write = Callable[[Path], object]


@pytest.fixture(scope="module")
def official() -> State:
    state = checkpoint.to_official(DiT(CONFIG).state_dict())
    return {name: torch.randn_like(value) for name, value in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def loads(path: Path, want: State) -> None:
    model = DiT(CONFIG)
    checkpoint.load(model, path)
    got = checkpoint.to_official(model.state_dict())
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "prefix",
    [
        "diffusion_model.",
        "model.diffusion_model.",
        "transformer.",
        "pipe.dit.",
        "module._orig_mod.",
        "net.module.model.",
        "state_dict.generator_ema.model._fsdp_wrapped_module.",
    ],
)
def test_prefixes(official: State, tmp_path: Path, prefix: str) -> None:
    save_file(under(prefix, official), tmp_path / "m.safetensors")
    loads(tmp_path / "m.safetensors", official)


def inside(state: State, *keys: str) -> Any:
    content: Any = state
    for key in reversed(keys):
        content = {key: content}
    return content


@pytest.mark.parametrize(
    "around",
    [
        ("model",),
        ("ema",),
        ("module", "state_dict"),
        ("state_dict", "generator_ema", "model"),
        ("model",) * 200,
    ],
)
def test_containers(official: State, tmp_path: Path, around: tuple[str, ...]) -> None:
    content = inside(under("model.diffusion_model.", official), *around)
    torch.save(content | {"step": 3, "optimizer": {"x": torch.zeros(1)}}, tmp_path / "m.pt")
    loads(tmp_path / "m.pt", official)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: None,
        lambda state: {"x": torch.zeros(1)},
        lambda state: dict([*state.items()][1:]),
        lambda state: {name: value.to("meta") for name, value in state.items()},
        lambda state: {name: value.to(torch.int8) for name, value in state.items()},
    ],
)
def test_a_broken_part_does_not_hide_a_whole_one(
    official: State,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[State], State | None],
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"generator_ema": spoil(official), "model": {"generator": official}}, path)
    loads(path, official)
    assert "generator_ema is not a whole model: takes generator" in caplog.text


def test_a_critic_does_not_stand_in_for_a_generator(official: State, tmp_path: Path) -> None:
    broken = dict([*official.items()][1:])
    torch.save({"generator": broken, "critic": official}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="missing"):
        checkpoint.load(DiT(CONFIG), tmp_path / "m.pt")


def test_the_best_part_is_taken(official: State, tmp_path: Path) -> None:
    parts = ("critic", "state_dict", "ema", "generator", "generator_ema")
    content: dict[str, State] = {}
    for value, part in enumerate(parts):
        content[part] = {name: torch.full_like(each, value) for name, each in official.items()}
        torch.save(content, tmp_path / "m.pt")
        loads(tmp_path / "m.pt", content[part])


def test_what_a_checkpoint_is_of(official: State, tmp_path: Path) -> None:
    """The width of its generator, and whether that is whole."""
    lora = {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}
    some = {"model.patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2)}
    for content, want in (
        ({"generator": official}, (16, True)),
        ({"generator": some}, (1536, False)),
        ({"critic": official}, (0, False)),
        ({"generator_lora": official}, (0, False)),
        ({"generator_lora": lora}, (0, False)),
        ({"weight": torch.zeros(3)}, (0, False)),
    ):
        torch.save(content, tmp_path / "m.pt")
        assert generator_width(tmp_path / "m.pt") == want


def saved(content: object) -> Write:
    return lambda path: torch.save(content, path)


def with_tensor(value: Tensor) -> Write:
    return saved({"state_dict": {"blocks.0.self_attn.q.weight": value}})


def archive(pickled: bytes, how: int = zipfile.ZIP_STORED) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", how) as file:
            file.writestr("a/data.pkl", pickled)
            file.writestr("a/version", "3\n")

    return write


def header(text: bytes, length: int | None = None, size: int = 0) -> Write:
    """A safetensors file whose header says that it has `length` bytes."""

    def write(path: Path) -> None:
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)
        if size:
            os.truncate(path, size)  # takes no space on the disk

    return write


def index(text: bytes) -> Write:
    return lambda path: path.write_bytes(text)


ARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x05\x85R."  # of 20 GB
BIG = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("lora.pt", saved({"generator_lora": {"w": torch.zeros(1)}}), "it is a LoRA, the changes"),
        ("sparse.pt", with_tensor(torch.eye(16).to_sparse()), "is sparse, quantized or nested"),
        ("meta.pt", with_tensor(torch.zeros(4, device="meta")), "has a shape and no values"),
        ("zero.pt", with_tensor(torch.tensor(1.0)), "wrong shape blocks.0.self_attn.q.weight"),
        ("bool.pt", with_tensor(torch.zeros(16, 16).bool()), "is of type bool"),
        (
            "large.pt",
            with_tensor(torch.zeros(1).expand(10**6, 10**6)),
            "has shape [1000000, 1000000], more than there is in the whole file",
        ),
        (
            "twice.pt",
            saved({"model.a": torch.zeros(1), "net.a": torch.zeros(1)}),
            "holds a twice, as model.a and as net.a",
        ),
        ("keys.pt", saved({3: torch.zeros(1), "a\nb": 4}), r"holds no tensors, only 'a\nb'"),
        ("bomb.pt", archive(b"\0" * 2**26, zipfile.ZIP_DEFLATED), "a compressed archive"),
        ("long.pt", archive(b"\0" * 2**25), "its list of tensors is far too long"),
        ("array.pt", archive(ARRAY), "holds an array of bytes"),
        ("array.pth", lambda path: path.write_bytes(ARRAY), "holds an array of bytes"),
        ("deep.pt", archive(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."), "holds a list"),
        ("length.safetensors", header(b"{}", 2**63), "not a whole safetensors file"),
        ("sparse.safetensors", header(b"{}", 2**35, 2**36), "not a whole safetensors file"),
        ("deep.safetensors", header(b'{"a":' * 50_000), "not a whole safetensors file"),
        (
            "large.safetensors",
            header(json.dumps(BIG).encode()),
            "of its 4,398,046,511,197 bytes are there",
        ),
        ("deep.safetensors.index.json", index(b"[" * 100_000), "it is nested too deeply"),
        ("list.safetensors.index.json", index(b"[]"), "has no weight_map"),
        (
            "two.safetensors.index.json",
            index(b'{"weight_map": {}, "weight_map": {}}'),
            "a name is there twice",
        ),
        (
            "out.safetensors.index.json",
            index(b'{"weight_map": {"a": "../a.safetensors"}}'),
            "its shards must be files beside it: not ../a.safetensors",
        ),
        ("fifo.pt", lambda path: os.mkfifo(path), "is not a regular file"),
        ("endless.pt", lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        ("loop.pt", lambda path: path.symlink_to(path), "there is no such checkpoint file"),
        ("folder.pt", lambda path: path.mkdir(), "holds no weights: looked for"),
    ],
)
def test_files_that_do_harm(tmp_path: Path, name: str, write: Write, said: str) -> None:
    path = tmp_path / name
    write(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        checkpoint.load(DiT(CONFIG), path)
    assert said in str(error.value) and str(path) in str(error.value), error.value
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_shapes_of_any_kind_are_recognised_without_an_error() -> None:
    keys = {"patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.head.bias"}
    keys |= {"encoder.downsamples.0.residual.0.gamma", "blocks.0.ffn.0.bias"}
    keys |= {"encoder.0.weight", "decoder.1.weight", "decoder.3.conv.0.weight"}
    for shape in ((), (0,), (1,), (0, 4, 1, 2, 2), (3, 0, 1, 2, 2), (1, 1, 1, 1)):
        family, _ = names.kind({key: torch.zeros(shape) for key in keys})
        assert family in ("VAE", "tiny VAE", "")


def test_a_tensor_alone_in_a_file(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "x.pt")
    assert torch.equal(open_weights(tmp_path / "x.pt").tensors["tensor"], torch.ones(2, 3))
