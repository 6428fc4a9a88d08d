"""Reading, checking and writing weights under their public names.

Files are mapped into memory: names, shapes and types are known, and a wrong file is named, before a
weight is read. Then each tensor is read once, straight to where it is wanted.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfmodel import names
from sfmodel.config import DiTConfig
from sfmodel.names import clean_key as clean_key
from sfmodel.names import from_official as from_official
from sfmodel.names import to_official as to_official
from sfmodel.tensors import save_tensors

Module = TypeVar("Module", bound=nn.Module)
# Weights inside a training checkpoint, the best for generating first.
ENTRIES = ("generator_ema", "generator", "critic")
STEM = "diffusion_pytorch_model"  # of the weights in official folders and those of diffusers
# Where a model's weights are in a folder, by its family: the first that is there.
_INSIDE = {
    "DiT": tuple(
        f"{folder}{STEM}.safetensors{index}"
        for folder in ("transformer/", "")
        for index in (".index.json", "")
    ),
    "VAE": (f"vae/{STEM}.safetensors", "Wan2.1_VAE.pth", f"{STEM}.safetensors"),
    "tiny VAE": ("taew2_1.safetensors", "taew2_1.pth"),
}
# Types that weights are computed in. 8 bits and fewer need scales, which no two files have alike.
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Weights(NamedTuple):
    """What a checkpoint holds. tensors: mapped into memory, by their names in the file. metadata:
    of a safetensors file. files: what was opened, an index first. entries: of a training
    checkpoint, the best for generating first; tensors are those of one of them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    files: tuple[Path, ...]
    entries: tuple[str, ...] = ()


def open_weights(path: str | Path, weights: str | None = None, family: str = "") -> Weights:
    """Opens a .safetensors, .pt or .pth file, the .index.json of one in shards, or a folder of
    Wan2.1 (official or of diffusers) or of a part of it. No pickled code is executed.

    weights: which entry of a training checkpoint; None takes the first of `ENTRIES` that is there.
    family: which model of a folder with several (`names.Kind`); else the first of DiT, VAE, tiny
    VAE. Raises ValueError with one sentence for what is missing, truncated or foreign."""
    path = Path(path)
    if path.is_dir():
        places = _INSIDE.get(family) or dict.fromkeys(sum(_INSIDE.values(), ()))
        inside = next((path / place for place in places if (path / place).is_file()), None)
        if inside is None:
            raise ValueError(f"{path}: holds no weights: looked for {', '.join(places)}")
        return open_weights(inside, weights)
    entries: tuple[str, ...] = ()
    _check_start(path)
    if path.suffix == ".safetensors":
        found = _open_safetensors(path)
    elif path.name.endswith(".safetensors.index.json"):
        found = _open_shards(path)
    elif path.suffix in (".pt", ".pth"):
        loaded = _open_pickle(path)
        entries = tuple(entry for entry in ENTRIES if entry in loaded)
        state = loaded[weights if weights in entries else entries[0]] if entries else loaded
        if not isinstance(state, dict):
            raise ValueError(f"{path}: holds a {type(state).__name__}: must hold a dict of tensors")
        tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
        found = Weights(tensors, {}, (path,), entries)
    else:
        raise ValueError(f"{path}: must be a .safetensors, .pt or .pth file")
    if weights is not None and weights not in entries:
        raise ValueError(
            f"{path}: has no {weights!r}: it has {', '.join(entries) or 'bare weights'}"
        )
    if not found.tensors:
        raise ValueError(f"{path}: holds no tensors")
    return found


def _check_start(path: Path) -> None:
    """Refuses what servers and Git leave in the place of a file."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint file")
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ValueError(f"{path}: is a web page, not weights")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer: fetch the file itself (git lfs pull)")


def _open_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return Weights(tensors, file.metadata() or {}, (path,))
    except (SafetensorError, RuntimeError, MemoryError) as error:
        _check_mapped(path, error)
        reason = _missing_bytes(path) or str(error).splitlines()[0]
        raise ValueError(f"{path}: not a whole safetensors file ({reason})") from None


def _check_mapped(path: Path, error: Exception) -> None:
    """Linux refuses by default to map a file that is larger than memory and swap."""
    if "Cannot allocate memory" in str(error):
        raise ValueError(
            f"{path}: too large to be mapped: needs more memory or swap, or vm.overcommit_memory=1"
        ) from None


def _missing_bytes(path: Path) -> str | None:
    """What a safetensors file has of the bytes that its header promises, where that is less."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else {}
        ends = (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        want = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"{size:,} of its {want:,} bytes are there" if header and size < want else None


def _open_shards(index: Path) -> Weights:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {name: index.parent / name for name in sorted({*shard_of.values()})}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index of shards: has no weight_map") from None
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise ValueError(f"{index}: of its shards there is no {_first(missing)}")
    shards = {}
    for name, path in paths.items():
        _check_start(path)
        shards[name] = _open_safetensors(path).tensors
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ValueError(f"{index}: names {name} in {shard}, which lacks it")
    tensors = {name: shards[shard][name] for name, shard in shard_of.items()}
    return Weights(tensors, {}, (index, *paths.values()))


def _open_pickle(path: Path) -> dict[str, Any]:
    try:
        mmap = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not, and are read whole
        with path.open("rb") as file:
            if not mmap and file.read(2) == b"PK":
                raise ValueError("its end is missing")
        with warnings.catch_warnings():  # the sentence below says all there is to say
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: damaged, or holds pickled code, which is not executed: must be tensors only"
        ) from None
    except Exception as error:  # damaged pickles fail in any way
        _check_mapped(path, error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}: must hold a dict of tensors")
    return loaded


def read(path: str | Path, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of what `open_weights` opens, by their names there and mapped into memory, and
    the metadata of a safetensors file. Raises ValueError as `open_weights` does."""
    found = open_weights(path, weights)
    return found.tensors, found.metadata


def describe(path: Path) -> str:
    """What `open_weights` finds there, in a line such as "Wan2.1 DiT 1.3B (official), bfloat16,
    825 tensors, generator_ema + generator". Reads no weights. Raises ValueError as it does."""
    found = open_weights(path)
    state = names.official(found.tensors)
    _, label = names.kind(state)
    is_official = state.keys() == {*map(clean_key, found.tensors)}
    words = [
        f"{label} ({'official' if is_official else 'diffusers'})"
        if label
        else f"an unknown model with {_first(state)}",
        " + ".join(sorted({_name(v.dtype) for v in state.values()})),
        f"{len(state)} tensors",
        f"{len(found.files) - 1} shards" if len(found.files) > 1 else "",
        " + ".join(found.entries),
    ]
    return ", ".join(filter(None, words))


def load_model(
    build: Callable[[], Module],
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    weights: str | None = None,
) -> Module:
    """What `build` makes, with a checkpoint's weights in `dtype` on `device`; path and weights as
    in `open_weights`. Beside the model itself and the pages of the file, which the system can drop,
    memory holds one tensor at most. Buffers that the file has not (constants) keep their type.

    Raises ValueError as `matching` does, before anything is allocated on the device."""
    with _Unfilled():
        model = build()
    state, _ = _checked(model, path, weights)
    own = {
        k: torch.empty_like(v, dtype=dtype, device=device) for k, v in model.state_dict().items()
    }
    _fill(own, state)
    model.load_state_dict(own, assign=True)
    return model.to(device)


class _Unfilled(TorchFunctionMode):
    """Parameters that a layer makes to be initialised or loaded take no memory and no time; what a
    module computes, such as a table, is real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def load(model: nn.Module, path: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Copies a checkpoint into a model, converting to its dtype and device, and returns the file's
    metadata; path and weights as in `open_weights`. Raises ValueError as `matching` does, changing
    nothing."""
    state, metadata = _checked(model, path, weights)
    _fill(model.state_dict(), state)
    return metadata


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], official: Mapping[str, Tensor]) -> None:
    """Copies tensors into `own`, by this project's names: each into its rows of a fused one."""
    for name, rows in to_official(own).items():
        rows.copy_(official[name])


def matching(
    model: nn.Module, path: str | Path, weights: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors under this project's names, and the file's metadata. Raises ValueError
    as `open_weights` does, and for another model: says which if it knows it, and the first names
    that are missing, unexpected, of a wrong shape or not of a floating-point type."""
    state, metadata = _checked(model, path, weights)
    return from_official(state), metadata


def _checked(
    model: nn.Module, path: str | Path, weights: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same under official names."""
    want = to_official(model.state_dict())
    wanted = names.kind(want)
    found = open_weights(path, weights, wanted.family)
    got = names.official(found.tensors)
    family, label = names.kind(got)
    problems = []
    if label and label != wanted.label:
        problems += [f"it is {label}" + (f", not {wanted.label}" if wanted.label else "")]
    problems += foreign_types(got)
    if not label or family == wanted.family:
        problems += differences(got.keys(), want.keys())
        reshaped = [k for k in want.keys() & got.keys() if want[k].shape != got[k].shape]
        if reshaped:
            k = min(reshaped)
            shapes = f"{[*got[k].shape]} (must be {[*want[k].shape]})"
            problems += [f"wrong shape {k} {shapes}{_more(reshaped, 1)}"]
    if problems:
        raise ValueError(f"{path}: not a checkpoint of this model: {'; '.join(problems)}")
    return got, found.metadata


def differences(got: Iterable[str], want: Iterable[str]) -> list[str]:
    """Which names are missing and which unexpected, a phrase each."""
    missing, unexpected = {*want} - {*got}, {*got} - {*want}
    phrases = {"missing": missing, "unexpected": unexpected}
    return [f"{phrase} {_first(keys)}" for phrase, keys in phrases.items() if keys]


def foreign_types(state: Mapping[str, Tensor]) -> list[str]:
    """A phrase on the tensors that are not of a type that weights are computed in, if there are."""
    foreign = [k for k, v in state.items() if v.dtype not in _TYPES]
    if not foreign:
        return []
    k = min(foreign)
    kind = _name(state[k].dtype)
    return [f"{k} is of type {kind}: must be floating point of 16 bits or more{_more(foreign, 1)}"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(keys: Iterable[str], count: int = 3) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:count]) + _more(ordered, count)


def _more(keys: Sequence[str], count: int) -> str:
    return f" and {len(keys) - count} more" if len(keys) > count else ""


def save(
    weights: nn.Module | Mapping[str, Tensor], path: str | Path, config: DiTConfig, **extra: Any
) -> None:
    """Writes a DiT's weights under official names, as safetensors, with the configuration in the
    metadata. Atomic: the file is whole or absent."""
    own = weights.state_dict() if isinstance(weights, nn.Module) else weights
    metadata = {
        "config": json.dumps(asdict(config)),
        **{k: json.dumps(v) for k, v in extra.items()},
    }
    save_tensors(path, to_official(own), metadata)
