"""Public names, wrappers of training code, and files that are not what they should be."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.pretrained import from_pretrained
from sfmodel.weights import checkpoint, names

CONFIG = DiTConfig(
    dim=16, ffn_dim=24, heads=2, layers=2, channels=4, freq_dim=8, text_dim=8, text_len=4
)
PARITY = Path(__file__).parent / "parity" / "wan_d64"
VAE = Path(__file__).parent / "parity" / "vae_d8" / "weights.safetensors"
STEM = "diffusion_pytorch_model"


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


def in_shards(state: dict[str, Tensor], folder: Path) -> Path:
    """Of two files, and the path of their index."""
    folder.mkdir(parents=True)
    keys, files = sorted(state), [f"{STEM}-{i:05}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {k: files[i % 2] for i, k in enumerate(keys)}
    for file in files:
        save_file({k: state[k].contiguous() for k in keys if weight_map[k] == file}, folder / file)
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(official: dict[str, Tensor], tmp_path: Path) -> None:
    model = DiT(CONFIG)
    index = in_shards(official, tmp_path / "model")
    for path in (index, index.parent):
        model.apply(zero)
        checkpoint.load(model, path)
        assert same(model, official)
    assert checkpoint.describe(index.parent).endswith("tensors, 2 shards")

    def refused() -> str:
        with pytest.raises(ValueError) as error:
            checkpoint.load(model, index.parent)
        assert same(model, official)
        return str(error.value)

    second = index.parent / f"{STEM}-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    assert f"{len(whole) - 4:,} of its {len(whole):,} bytes are there" in refused()
    state = load_file(index.parent / f"{STEM}-00001-of-00002.safetensors")
    save_file(state, second)
    assert f"in {second.name}, which lacks it" in refused()
    second.unlink()
    assert refused().endswith(f"{index}: of its shards there is no {second.name}")
    for text in (
        "[]",
        "{",
        '{"weight_map": {"a": 1}}',
        json.dumps({"weight_map": {"a": index.name}}),
    ):
        index.write_text(text)
        assert "not an index of shards" in refused() or "not a whole safetensors" in refused()


def zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def test_folders(official: dict[str, Tensor], tmp_path: Path) -> None:
    """Of the official layout and that of diffusers, where weights of a VAE lie beside."""
    vae, wan, pipeline = load_file(VAE), tmp_path / "wan", tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    wan.mkdir()
    save_file(official, wan / f"{STEM}.safetensors")
    torch.save(vae, wan / "Wan2.1_VAE.pth")
    index = in_shards(names.diffusers(official), pipeline / "transformer")
    save_file(names.diffusers(vae), pipeline / "vae" / f"{STEM}.safetensors")

    for path in (wan, pipeline, pipeline / "transformer", index):
        model = DiT(CONFIG)
        checkpoint.load(model, path)
        assert same(model, official)
    for path in (wan, pipeline, pipeline / "vae"):
        read = names.official(checkpoint.open_weights(path, family="VAE").tensors)
        assert read.keys() == vae.keys() and all(torch.equal(read[k], vae[k]) for k in vae)
    with pytest.raises(ValueError, match=r"it is a VAE of width 8, not a DiT of 2 blocks × 16$"):
        checkpoint.load(DiT(CONFIG), pipeline / "vae")
    with pytest.raises(ValueError, match=r"holds no weights: looked for taew2_1.safetensors, "):
        checkpoint.open_weights(wan, family="tiny VAE")


def test_loading_a_new_model(official: dict[str, Tensor], tmp_path: Path) -> None:
    """As loading into one that is there, buffers included."""

    class WithTables(DiT):
        def __init__(self) -> None:
            super().__init__(CONFIG)
            self.register_buffer("table", torch.arange(5.0), persistent=False)

    torch.save({"generator": {f"model.{k}": v for k, v in official.items()}}, tmp_path / "m.pt")
    options: Any = {"device": "cpu", "weights": "generator"}
    model = checkpoint.load_model(WithTables, tmp_path / "m.pt", dtype=torch.float32, **options)
    assert same(model, official) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.get_buffer("table"), torch.arange(5.0))
    half = checkpoint.load_model(WithTables, tmp_path / "m.pt", dtype=torch.bfloat16, **options)
    assert same(half, {k: v.bfloat16() for k, v in official.items()})
    model.apply(zero)  # the file stays as it is
    assert same(
        checkpoint.load_model(WithTables, tmp_path / "m.pt", dtype=torch.float32, **options),
        official,
    )


M_MMAP_THRESHOLD = -3  # of malloc.h


class Memory(TorchDispatchMode):
    """The most memory of this process's own, pages of files apart, after any operation."""

    def __init__(self) -> None:
        super().__init__()
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)  # what is freed is no longer counted
        libc.malloc_trim(0)  # else what was freed before would be taken again unseen
        self.start = self.most = self.now()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return out


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_loading_takes_the_memory_of_the_model_alone(tmp_path: Path, suffix: str) -> None:
    config = replace(CONFIG, dim=1536, ffn_dim=8960, heads=12)
    with torch.device("meta"):
        meta = checkpoint.to_official(DiT(config).state_dict())
    path, size = tmp_path / f"m.{suffix}", 2 * sum(v.numel() for v in meta.values())
    state = {k: torch.ones(v.shape, dtype=torch.bfloat16) for k, v in meta.items()}
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    del state

    def most(device: str, dtype: torch.dtype) -> float:
        with Memory() as memory:
            checkpoint.load_model(lambda: DiT(config), path, device=device, dtype=dtype)
        return (memory.most - memory.start) / size

    assert size > 150e6 and 0.9 < most("cpu", torch.bfloat16) < 1.1
    # In the place of a GPU: what is allocated there takes no memory here, all else would.
    assert most("meta", torch.float16) < 0.1


def test_a_wrong_file_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    config = replace(CONFIG, dim=1024, ffn_dim=8192, heads=8)
    save_file(load_file(VAE), tmp_path / "vae.safetensors")
    with Memory() as memory, pytest.raises(ValueError, match="it is a VAE"):
        checkpoint.load_model(
            lambda: DiT(config), tmp_path / "vae.safetensors", device="cpu", dtype=torch.float32
        )
    assert memory.most - memory.start < 10e6  # the model has 200 MB


def lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{k[:-7]}.lora_A.weight": v for k, v in state.items() if k.endswith("q.weight")}


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"patch_embedding.weight": torch.zeros(16, 9, 1, 2, 2)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lora, "it is a LoRA"),
        (lambda s: s | {"img_emb.proj.0.weight": torch.zeros(1)}, "it is an image-to-video DiT"),
        (wider, "it is an image-to-video DiT, of 9 input channels, not a DiT of 2 blocks × 16"),
        (lambda s: {"shared.weight": torch.zeros(1)}, "it is a text encoder"),
        (lambda s: {"token_embedding.weight": torch.zeros(1)}, "it is a text encoder"),
        (lambda s: {"visual.proj": torch.zeros(1)}, "it is an image encoder"),
        (
            lambda s: s | {k.replace(".1.", ".2."): v for k, v in s.items() if "blocks.1." in k},
            "it is a DiT of 3 blocks × 16, not a DiT of 2 blocks × 16; unexpected blocks.2.",
        ),
        (
            lambda s: s | {"head.head.bias": s["head.head.bias"].to(torch.int8)},
            "head.head.bias is of type int8: in 8 bits has no scale: must have one, or one",
        ),
        (
            lambda s: {k: v.to(torch.int32) for k, v in s.items()},
            "blocks.0.cross_attn.k.bias is of type int32: must be floating point of 16 bits or "
            "more, or of 8 bits with scales and 68 more",
        ),
    ],
)
def test_other_models_are_named(
    official: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
) -> None:
    save_file({k: v.clone() for k, v in change(official).items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError) as error:
        checkpoint.load(DiT(CONFIG), tmp_path / "m.safetensors")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_larger_than_memory_is_one_sentence(tmp_path: Path) -> None:
    """A limit on what this process may map stands in for the memory."""
    path, size = tmp_path / "large.safetensors", 1 << 36
    header = {"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)  # takes no space on the disk
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size // 2, limits[1]))
    try:
        with pytest.raises(ValueError, match="too large to be mapped: needs more memory or swap"):
            checkpoint.read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5676070424\n"


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
        (
            "cut.safetensors",
            truncated,
            r"not a whole safetensors file \([\d,]+ of its [\d,]+ bytes",
        ),
        ("cut.pt", truncated, r"not a whole PyTorch checkpoint \(its end is missing\)"),
        ("page.safetensors", lambda p: p.write_text("\n<!DOCTYPE html>" * 99), "is a web page"),
        ("page.pt", lambda p: p.write_text("<html>" * 99), "is a web page, not weights"),
        ("pointer.pth", lambda p: p.write_text(POINTER), "is a Git LFS pointer: fetch the file"),
        ("noise.pt", lambda p: p.write_bytes(b"noise" * 99), "damaged, or holds pickled code"),
        ("noise.safetensors", lambda p: p.write_bytes(b"1" * 99), "not a whole safetensors file"),
        ("empty.pt", lambda p: p.touch(), "not a whole PyTorch checkpoint"),
        ("evil.pt", lambda p: torch.save({"generator": Evil()}, p), "pickled code"),
        ("old.pth", lambda p: p.write_bytes(pickle.dumps({"a": Evil()})), "pickled code"),
        ("list.pt", lambda p: torch.save([torch.zeros(1)], p), "holds a list"),
        ("none.pt", lambda p: torch.save({"step": 3}, p), "holds no tensors"),
        ("inner.pt", lambda p: torch.save({"generator": 3}, p), "holds a int: must hold a dict"),
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


def test_from_pretrained(official: dict[str, Tensor], tmp_path: Path) -> None:
    """Of our own files by their metadata, of others by the config.json beside them."""
    checkpoint.save(checkpoint.from_official(official), tmp_path / "own.safetensors", CONFIG)
    made = from_pretrained(tmp_path / "own.safetensors", "cpu")
    assert made.config == CONFIG and same(made, official) and not made.training
    half = from_pretrained(str(tmp_path / "own.safetensors"), "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    folder = tmp_path / "wan"
    folder.mkdir()
    save_file(official, folder / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match="width 16 has an unknown number of heads"):
        from_pretrained(folder, "cpu")
    config = {"dim": 16, "num_heads": 2, "text_len": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert same(from_pretrained(folder, "cpu"), official)
    with pytest.raises(ValueError, match=r"must be a Wan2\.1 DiT"):
        from_pretrained(VAE, "cpu")
