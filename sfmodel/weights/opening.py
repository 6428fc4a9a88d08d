"""Opening files of weights of any origin: which tensors are in them, and one sentence for a file
that is missing, damaged, hostile or of something else.

Files are mapped into memory: names, shapes and types are known before a weight is read, and no file
takes more memory than it has bytes.
"""

from __future__ import annotations

import json
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfmodel.extras import needed
from sfmodel.hub import local
from sfmodel.weights import names
from sfmodel.weights.scaled import EIGHT_BITS, scale_of, stored_dtype, with_scales

with needed():
    from safetensors import SafetensorError, safe_open

# Parts of a training checkpoint, the best for generating first; "" is what is in none of them.
GENERATORS = ("generator_ema", "generator", "ema", "")
ENTRIES = (*GENERATORS, "critic", "generator_lora")
_DICTS = (*names.PARTS, *names.WRAPPERS)
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
# Types that weights are computed in; those of 8 bits come with scales (scaled.py).
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
JSON_BYTES = 100_000_000  # more than any index or header; safetensors has the same limit
PICKLE_BYTES = 1 << 24  # of the names and shapes in a PyTorch checkpoint: a large one has a tenth
_BYTEARRAY = b"\nbytearray\n"  # in a pickle: makes an array of any size out of a few bytes


class Weights(NamedTuple):
    """Content of a checkpoint. tensors: mapped into memory, by their names in the file. metadata:
    of a safetensors file. files: what was opened, an index first. entries: parts of a training
    checkpoint, the best for generating first; tensors are those of one of them, `entry`. passed: a
    better one, which is not a whole model."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    files: tuple[Path, ...]
    entries: tuple[str, ...] = ()
    entry: str = ""
    passed: str = ""


class NoTensorsError(ValueError):
    """A file is whole and holds something else."""


def open_weights(path: str | Path, weights: str | None = None, family: str = "") -> Weights:
    """Opens a .safetensors, .pt or .pth file, the .index.json of one in shards, or a folder of
    Wan2.1 (official or of diffusers) or of a part of it. No pickled code is executed.

    weights: which part of a training checkpoint; None takes the first of `GENERATORS` that is a
    whole model, or else the first of `ENTRIES` that holds any tensor.
    family: which model of a folder with several (`names.Kind`); else the first of DiT, VAE, tiny
    VAE. Raises ValueError with one sentence for what is missing, truncated or foreign."""
    path = local(path)
    if path.is_dir():
        places = _INSIDE.get(family) or dict.fromkeys(sum(_INSIDE.values(), ()))
        inside = next((path / place for place in places if (path / place).is_file()), None)
        if inside is None:
            raise ValueError(f"{path}: holds no weights: looked for {', '.join(places)}")
        return open_weights(inside, weights)
    check_file(path)
    if path.suffix == ".safetensors":
        found = _open_safetensors(path)
    elif path.name.endswith(".safetensors.index.json"):
        found = _open_shards(path)
    elif path.suffix in (".pt", ".pth"):
        found = Weights(_open_pickle(path), {}, (path,))
    else:
        raise ValueError(f"{path}: must be a .safetensors, .pt or .pth file")
    marks = str(found.metadata.get("_quantization_metadata", "")).replace(" ", "")
    if '"convrot":true' in marks:
        raise ValueError(f"{path}: its 8-bit weights are rotated (convrot), which is not read")
    states = _states(found.tensors)
    entries = tuple(dict.fromkeys(entry for entry, _ in states if entry))
    if weights is not None:
        states = [each for each in states if each[0] == weights]
        if not states:
            raise ValueError(
                f"{path}: has no {weights!r}: it has {', '.join(entries) or 'bare weights'}"
            )
    if not states:
        raise NoTensorsError(f"{path}: {_nothing(found.tensors)}")
    limit = sum(each.stat().st_size for each in found.files)
    states = [(name, with_scales(state)) for name, state in states]
    usable = (
        (name, state)
        for name, state in states
        if name in GENERATORS and not _no_weights(state, limit) and _is_whole(state)
    )
    entry, tensors = next(usable, states[0])
    better = ENTRIES[: ENTRIES.index(entry)] if weights is None else ()
    passed = next((each for each in better if each in entries or each in found.tensors), "")
    if problem := _no_weights(tensors, limit) or _twice(tensors):
        raise ValueError(f"{path}: {problem}")
    return found._replace(tensors=tensors, entries=entries, entry=entry, passed=passed)


def _nothing(loaded: dict[str, Any]) -> str:
    """A phrase on what is there where there are no tensors."""
    for key in _DICTS:
        if key in loaded and not isinstance(loaded[key], dict):
            return f"{key} holds a {type(loaded[key]).__name__}: must hold a dict of tensors"
    inside = [k for k, v in loaded.items() if isinstance(v, dict) and _holds_tensors(v)]
    if inside:
        known = ", ".join(_DICTS)
        return f"its tensors are in {some(map(str, inside))}: must be in one of {known}, or in none"
    there = [key for key in loaded if isinstance(key, str)]
    return "holds no tensors" + (f", only {some(there)}" if there else "")


def _holds_tensors(state: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _states(loaded: dict[str, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    """All dicts of tensors in a checkpoint, or parts of one, the best for generating first, each
    with the entry that it is. They may be inside one another in any order."""
    found: list[tuple[str, dict[str, Tensor]]] = []
    inner: list[tuple[str, dict[Any, Any]]] = [("", loaded)]
    seen = {id(loaded)}
    for entry, state in inner:  # which grows
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Tensor):
                parts.setdefault(entry or names.part_of(key), {})[key] = value
            elif isinstance(value, dict) and id(value) not in seen and key in _DICTS:
                inner.append((entry or names.part_of(f"{key}."), value))
                seen.add(id(value))
        found += parts.items()
    return sorted(found, key=lambda each: ENTRIES.index(each[0]))


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Tells whether these are all tensors of a DiT or a VAE, of types that it computes in."""
    state = names.official(tensors)
    family, _ = names.kind(state)
    if family not in names.TABLES or foreign_types(state):
        return False
    return state.keys() == names.expected(family, state)


def _no_weights(tensors: Mapping[str, Tensor], limit: int) -> str:
    """Phrase on a tensor that cannot be computed with, if there is one. One that repeats its memory
    and is larger than its file of `limit` bytes would take any amount once it is copied."""
    for name, x in tensors.items():
        if x.is_meta:
            return f"{shown(name)} has a shape and no values (a meta tensor)"
        if x.layout is not torch.strided or x.is_quantized or x.is_nested:
            return f"{shown(name)} is sparse, quantized or nested: must be a dense tensor"
        if x.numel() * stored_dtype(x).itemsize > limit:
            return f"{shown(name)} has shape {[*x.shape]}, more than there is in the whole file"
    return ""


def _twice(tensors: Mapping[str, Tensor]) -> str:
    """The first name that two keys stand for, and both."""
    seen: dict[str, str] = {}
    for key, value in tensors.items():
        (name,) = names.official({key: value})
        if name in seen:
            return f"holds {shown(name)} twice, as {shown(seen[name])} and as {shown(key)}"
        seen[name] = key
    return ""


def generator_width(path: Path) -> tuple[int, bool]:
    """The width of the generator in a checkpoint, 0 where it holds something else, and whether it
    is a whole one. Reads no weights. Raises ValueError as `open_weights` does."""
    try:
        found = open_weights(path)
    except NoTensorsError:
        return 0, False
    state, (family, label) = recognised(found)
    table = state.get("patch_embedding.weight")
    if table is None or not table.dim() or found.entry == "critic" or (label and family != "DiT"):
        return 0, False
    return len(table), _is_whole(found.tensors)


def recognised(found: Weights) -> tuple[dict[str, Tensor], names.Kind]:
    """The tensors under official names, and which model they are of."""
    state = names.official(found.tensors)
    lora = found.entry == "generator_lora"
    return state, names.Kind("", names.LORA) if lora else names.kind(state)


def check_file(path: Path) -> None:
    """Raises ValueError for what is no file, and for what servers and Git leave in its place."""
    if not path.is_file():
        # A pipe or a device may have no end.
        what = "is not a regular file" if path.exists() else "there is no such checkpoint file"
        raise ValueError(f"{path}: {what}")
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
    except (SafetensorError, RuntimeError, MemoryError, TypeError, KeyError) as error:
        _check_mapped(path, error)
        reason = _missing_bytes(path) or str(error).splitlines()[0]
        raise ValueError(f"{path}: not a whole safetensors file ({reason})") from None


def _check_mapped(path: Path, error: Exception) -> None:
    """Raises ValueError for a file larger than memory and swap, which Linux refuses to map."""
    if "Cannot allocate memory" in str(error):
        raise ValueError(
            f"{path}: too large to be mapped: needs more memory or swap, or vm.overcommit_memory=1"
        ) from None


def _missing_bytes(path: Path) -> str | None:
    """A phrase on the bytes that a safetensors file lacks of those its header promises, if any."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length)) if length < min(size, JSON_BYTES) else {}
        ends = (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        want = 8 + length + max(ends, default=0)
        return f"{size:,} of its {want:,} bytes are there" if header and size < want else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def read_json(path: Path) -> Any:
    """Content of a JSON file of moderate size. Raises ValueError, without the path, for another."""
    if not path.is_file() or path.stat().st_size > JSON_BYTES:
        raise ValueError(f"must be a file of at most {JSON_BYTES:,} bytes")
    return parse_json(path.read_bytes())


def parse_json(text: bytes | str) -> Any:
    """Raises ValueError for what is damaged, nested too deeply or ambiguous."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _open_shards(index: Path) -> Weights:
    try:
        content = read_json(index)
    except ValueError as error:
        raise ValueError(f"{index}: not an index of shards: {error}") from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(v, str) for v in shard_of.values()):
        raise ValueError(f"{index}: not an index of shards: has no weight_map")
    paths = {name: index.parent / name for name in sorted({*shard_of.values()})}
    outside = [name for name in paths if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: its shards must be files beside it: not {some(outside)}")
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise ValueError(f"{index}: of its shards there is no {some(missing)}")
    shards = {}
    for name, path in paths.items():
        check_file(path)
        shards[name] = _open_safetensors(path).tensors
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ValueError(f"{index}: names {shown(name)} in {shard}, which lacks it")
    tensors = {name: shards[shard][name] for name, shard in shard_of.items()}
    return Weights(tensors, {}, (index, *paths.values()))


def _open_pickle(path: Path) -> dict[str, Any]:
    try:
        zipped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not: they are read
        _check_pickle(path, zipped)
        with warnings.catch_warnings():  # the sentence below says all there is to say
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: damaged, or holds pickled code, which is not executed: must be tensors only"
        ) from None
    except Exception as error:  # damaged pickles fail in any way
        _check_mapped(path, error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if isinstance(loaded, Tensor):  # alone in the file
        return {"tensor": loaded}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}: must hold a dict of tensors")
    return loaded


def _check_pickle(path: Path, zipped: bool) -> None:
    """Raises ValueError for a file that would take more memory than it has bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not zipped:
            if data[:2] == b"PK":
                raise ValueError("its end is missing")
            grows = data.find(_BYTEARRAY) >= 0
        else:
            with zipfile.ZipFile(file) as archive:
                inside = archive.infolist()
                if any(one.compress_type != zipfile.ZIP_STORED for one in inside):
                    raise ValueError("a compressed archive, which torch.save does not write")
                pickles = [one for one in inside if one.filename.endswith(".pkl")]
                if any(one.file_size > PICKLE_BYTES for one in pickles):
                    raise ValueError("its list of tensors is far too long")
                grows = any(_BYTEARRAY in archive.read(one) for one in pickles)
    if grows:
        raise ValueError("holds an array of bytes: must hold tensors only")


def differences(got: Iterable[str], want: Iterable[str]) -> list[str]:
    """Phrases on the names that are missing and on those that are unexpected."""
    missing, unexpected = {*want} - {*got}, {*got} - {*want}
    phrases = {"missing": missing, "unexpected": unexpected}
    return [f"{phrase} {some(keys)}" for phrase, keys in phrases.items() if keys]


def wrong_shapes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[str]:
    """A phrase on the tensors that are of another shape than the same of `want`, if there are."""
    wrong = sorted(k for k in want.keys() & got.keys() if want[k].shape != got[k].shape)
    if not wrong:
        return []
    k = wrong[0]
    shapes = f"{[*got[k].shape]} (must be {[*want[k].shape]})"
    return [f"wrong shape {k} {shapes}{more(wrong, 1)}"]


def foreign_types(state: Mapping[str, Tensor]) -> list[str]:
    """A phrase on the tensors that are not of a type that weights are computed in, if there are."""
    foreign = [k for k, v in state.items() if v.dtype not in _TYPES]
    if not foreign:
        return []
    k = min(foreign)
    if state[k].dtype in EIGHT_BITS:
        scale = scale_of(k, state)
        has = "has no scale" if scale is None else f"has scales of shape {[*state[scale].shape]}"
        want = f"in 8 bits {has}: must have one, or one for each row"
    else:
        want = "must be floating point of 16 bits or more, or of 8 bits with scales"
    return [f"{shown(k)} is of type {dtype_name(state[k].dtype)}: {want}{more(foreign, 1)}"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(map(shown, ordered[:3])) + more(ordered, 3)


def shown(name: str) -> str:
    """A name from a file, in one line."""
    short = name if len(name) < 100 else f"{name[:100]}…"
    return short if short.isprintable() else repr(short)


def more(keys: Sequence[str], count: int) -> str:
    return f" and {len(keys) - count} more" if len(keys) > count else ""
