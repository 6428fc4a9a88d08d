"""Public downloads in a folder: Wan2.1 in its official and its diffusers layout, few-step
generators (Self Forcing and its kin), TAEHV.

Names decide, and the small config.json beside a model. No weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sfmodel.config import PRESETS
from sfmodel.weights.known import KNOWN, Known, by_name
from sfmodel.weights.opening import generator_width, read_json

T = TypeVar("T")
DEEP = 2  # levels of subfolders that are searched
WEIGHTS = "diffusion_pytorch_model"


class Public(NamedTuple):
    """Files to download from a repository on Hugging Face (or another place, by its whole address);
    none named: all of them. name: for people."""

    name: str
    where: str
    files: tuple[str, ...] = ()


_1_3B, _14B, _TEACHER = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B", "base model, to train"
_SHARED = ("vae", "tiny_vae", "text_encoder", "tokenizer")  # by all presets
# By preset and by field of Assets.
PUBLIC = {
    "wan-1.3b": {
        "generators": Public(
            "few-step generator", "gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",)
        ),
        "vae": Public("video VAE", _1_3B, ("Wan2.1_VAE.pth",)),
        "text_encoder": Public("text encoder", _1_3B, ("models_t5_umt5-xxl-enc-bf16.pth",)),
        "tokenizer": Public("tokenizer", _1_3B, ("google/umt5-xxl/tokenizer.json",)),
        "tiny_vae": Public(
            "tiny video VAE, optional", "https://github.com/madebyollin/taehv", ("taew2_1.pth",)
        ),
        "dit": Public(_TEACHER, _1_3B, ("config.json", f"{WEIGHTS}.safetensors")),
    },
    "wan-14b": {"dit": Public(_TEACHER, _14B)},
}


@dataclass(frozen=True)
class Assets:
    """Paths of the files that were found, None for what is not there.

    dit: weights of the base model, which is the teacher in training; of a model in shards the
    .index.json. text_encoder: a .pth file or a folder of transformers. tokenizer: a folder.
    generators: .pt files of few-step models of the preset's width, the best to take first: whole
    ones before others and before those that cannot be opened; a mere start for training last."""

    dit: Path | None = None
    vae: Path | None = None
    tiny_vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    generators: tuple[Path, ...] = ()


def default_folder() -> Path:
    """`models`, or what the environment variable SFMODEL_MODELS names."""
    return Path(os.environ.get("SFMODEL_MODELS") or "models")


def find(folder: Path | None = None, preset: str = "wan-1.3b") -> Assets:
    """Files in `folder` and two levels of its subfolders for a preset; None: in
    `default_folder()`, then in the cache of Hugging Face. A cache may also be inside a folder. Of
    several, the one in the folder that is less deep and comes first by name.

    Raises ValueError for a folder that does not exist and for a preset without public weights."""
    if preset not in PUBLIC:
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PUBLIC)}")
    folders, dim = _searched(folder), PRESETS[preset].dit.dim
    return Assets(
        dit=_first(_base_model(each, dim) for each in folders),
        vae=_first(_vae(each) for each in folders),
        tiny_vae=_first(_one_of(each, "taew2_1.safetensors", "taew2_1.pth") for each in folders),
        text_encoder=_first(_text_encoder(each) for each in folders),
        tokenizer=_first(_tokenizer(each) for each in folders),
        generators=_generators(folders, dim),
    )


def _searched(folder: Path | None) -> list[Path]:
    root = default_folder() if folder is None else folder
    cached = _cached() if folder is None and not os.environ.get("SFMODEL_MODELS") else []
    if not root.is_dir() and not cached:
        raise ValueError(
            f"{root}: there is no such folder of models; `sfmodel doctor` says what to download"
        )
    return [*_folders([root], DEEP), *_folders(cached, DEEP)]


def _cached() -> list[Path]:
    """The repositories of PUBLIC and of known checkpoints that Hugging Face's tools have downloaded
    to their cache."""
    hub, home = os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(hub or Path(home or Path(caches, "huggingface"), "hub"))
    public = [one.where for each in PUBLIC.values() for one in each.values()]
    every = dict.fromkeys([*public, *(one.where for one in KNOWN)])
    paths = [root / f"models--{where.replace('/', '--')}" for where in every]
    return [path for path in paths if path.is_dir()]


def download_command(names: Sequence[str], preset: str, folder: Path) -> str:
    """Command that fetches, of the fields `names` of Assets, the first and those that lie in the
    same repository on Hugging Face, to where `find` looks in `folder`."""
    public = PUBLIC[preset]
    where = public[names[0]].where
    files = [file for name in names if public[name].where == where for file in public[name].files]
    # That of the generators has a folder for them.
    target = folder if names[0] == "generators" else folder / where.split("/")[1]
    return " ".join(["hf download", where, *files, "--local-dir", str(target)])


class Found(NamedTuple):
    """A file, for `field` of Assets. preset: that it is for; empty where it serves all of them or
    is not usable. said: what it is or, if it cannot even be opened, why not."""

    field: str
    preset: str
    path: Path
    said: str
    usable: bool


def examine(folder: Path | None) -> list[Found]:
    """Files that `find` finds for any preset, opened as far as it takes to know what it is, and the
    other .pt files. Raises ValueError for a folder that does not exist."""
    bases = [find(folder, preset).dit for preset in PUBLIC]
    there = find(folder)
    others = [path for path in _checkpoints(_searched(folder)) if path not in there.generators]
    paths: list[tuple[str, Path | None]] = [("dit", base) for base in bases]
    paths += [("generators", path) for path in (*there.generators, *others)]
    paths += [(name, getattr(there, name)) for name in _SHARED]
    out = []
    for field, path in paths:
        if path is not None:
            try:
                said, preset = _opened(path, field)
            except (ValueError, OSError) as error:
                said, preset = str(error).removeprefix(f"{path}: "), None
            out.append(Found(field, preset or "", path, said, preset is not None))
    return out


def known(folder: Path | None) -> list[tuple[Known, Path | None]]:
    """All published checkpoints whose settings are known, each with the first file that has its
    name where `find` looks, if there is one."""
    folders: list[Path] = []
    with suppress(ValueError):
        folders = _searched(folder)
    named = [(path, by_name(path)) for each in folders for path in _inside(each)]
    return [(one, _first(path for path, its in named if its is one)) for one in KNOWN]


def missing(found: Iterable[Found]) -> list[tuple[str, str]]:
    """(preset, field) of everything in PUBLIC that `examine` found nothing usable for."""
    usable = {(one.preset, one.field) for one in found if one.usable}
    return [
        (preset, field)
        for preset, public in PUBLIC.items()
        for field in public
        if not usable & {(preset, field), ("", field)}
    ]


def _opened(path: Path, field: str) -> tuple[str, str | None]:
    """Description of a file, and the preset that it is for: "" for all, None for none of them."""
    from sfmodel import umt5
    from sfmodel.weights import checkpoint

    if field == "tokenizer":
        return "tokenizer.json", ""
    if field == "text_encoder":
        return umt5.describe(path), ""
    said = checkpoint.describe(path)
    if field in _SHARED:
        return said, ""
    width, _ = generator_width(path)
    return said, _first(preset for preset in PUBLIC if width == PRESETS[preset].dit.dim)


# --- Finding


def _folders(level: list[Path], deep: int, cache: bool = False) -> Iterator[Path]:
    """The folders `level` and their subfolders, level by level, by name. cache: they are within
    what stands for one repository in the cache of Hugging Face."""
    stored = [] if cache else [path for path in level if path.name.startswith("models--")]
    plain = [path for path in level if path not in stored]
    yield from plain
    if deep:
        below = [path for each in plain for path in _inside(each) if path.is_dir()]
        below = [path for path in below if not path.name.startswith(".")]
        yield from _folders(below, deep - 1, cache)
    for each in stored:
        yield from _folders(_snapshots(each), DEEP, cache=True)


def _snapshots(repository: Path) -> list[Path]:
    """Folders of links to a repository's files, one for each version; that of main first."""
    main = ""
    with suppress(OSError, ValueError):
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    return sorted(_inside(repository / "snapshots"), key=lambda path: path.name != main)


def _inside(folder: Path) -> list[Path]:
    with suppress(OSError):  # not ours to read
        return sorted(folder.iterdir())
    return []


def _checkpoints(folders: Iterable[Path]) -> list[Path]:
    return [path for each in folders for path in _inside(each) if path.suffix == ".pt"]


def _generators(folders: Iterable[Path], dim: int) -> tuple[Path, ...]:
    ranked = []
    for path in _checkpoints(folders):
        try:
            width, whole = generator_width(path)
            rank = 0 if whole else 1
        except (ValueError, OSError):  # perhaps half a download: it says so if it is needed
            width, rank = dim, 2
        if width == dim:
            ranked.append((rank, "init" in path.stem, path))
    return tuple(path for *_, path in sorted(ranked, key=lambda each: each[:2]))


def _first(found: Iterable[T | None]) -> T | None:
    return next((one for one in found if one is not None), None)


def _one_of(folder: Path, *names: str) -> Path | None:
    return _first(folder / name for name in names if (folder / name).is_file())


def _config(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        config = read_json(folder / "config.json")
        return config if isinstance(config, dict) else {}
    return {}


def _weights(folder: Path, stem: str = WEIGHTS) -> Path | None:
    return _one_of(folder, f"{stem}.safetensors.index.json", f"{stem}.safetensors")


def _base_model(folder: Path, dim: int) -> Path | None:
    for each in (folder, folder / "transformer"):
        config = _config(each)
        heads, size = (config.get(a) for a in ("num_attention_heads", "attention_head_dim"))
        width = config.get("dim", (heads, size))
        channels = [config.get(f"{a}_dim", config.get(f"{a}_channels")) for a in ("in", "out")]
        text_to_video = config.get("model_type", "t2v") == "t2v" and channels[0] == channels[1]
        # Wan2.2 has two models of these sizes, each for some of the noise levels.
        half = "noise_model" in each.name or (each.parent / "transformer_2").is_dir()
        if width in (dim, (dim // 128, 128)) and text_to_video and not half:
            return _weights(each)
    return None


def _vae(folder: Path) -> Path | None:
    official = _one_of(folder, "Wan2.1_VAE.pth")
    diffusers = _config(folder / "vae").get("z_dim") == 16
    return official or (_weights(folder / "vae") if diffusers else None)


def _text_encoder(folder: Path) -> Path | None:
    official = _one_of(folder, "models_t5_umt5-xxl-enc-bf16.pth")
    inner = folder / "text_encoder"
    return official or (inner if _is_umt5(inner) and _weights(inner, "model") else None)


def _tokenizer(folder: Path) -> Path | None:
    """diffusers' is beside its text encoder; pipelines of other models have other tokenizers."""
    names = ["google/umt5-xxl", "umt5-xxl"]
    if _is_umt5(folder / "text_encoder"):
        names.append("tokenizer")
    return _first(folder / name for name in names if _one_of(folder / name, "tokenizer.json"))


def _is_umt5(folder: Path) -> bool:
    return _config(folder).get("model_type") == "umt5"
