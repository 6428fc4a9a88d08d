"""Conversion of weights to another public form: official, Self Forcing's or that of diffusers.

Which model a file is of is recognised from names and shapes. Tensors go from the mapped source to
the target one by one, so that memory does not hold the model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sfmodel.config import DiTConfig, VAEConfig
from sfmodel.dit import DiT
from sfmodel.files import atomic, atomic_folder
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import names
from sfmodel.weights.checkpoint import to_official
from sfmodel.weights.opening import (
    STEM,
    Weights,
    differences,
    foreign_types,
    open_weights,
    recognised,
    wrong_shapes,
)
from sfmodel.weights.saving import size_of, write_tensors
from sfmodel.weights.sizes import dit_config, dit_sizes, vae_sizes

Form = Literal["official", "self-forcing", "diffusers"]
State = Mapping[str, Tensor]
Tick = Callable[[int], object]  # is told how many more bytes were written

_FORMS: dict[str, tuple[Form, ...]] = {
    "DiT": ("official", "self-forcing", "diffusers"),
    "VAE": ("official", "diffusers"),
    "tiny VAE": ("official",),
}
_ENTRIES = ("generator_ema", "generator", "critic")  # of self-forcing
_PICKLED = (".pt", ".pth")
_FILES = (".safetensors", *_PICKLED)
_LARGE = 1_000_000_000  # bytes that take long enough to show how far it is


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    to: Form,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    weights: Literal["generator_ema", "generator", "critic"] | None = None,
    shard_gb: float = 5.0,
) -> None:
    """Write weights in another form: of a DiT, of Wan2.1's VAE or of TAEHV. There and back they are
    the same bit for bit, unless their type is changed.

    Args:
        source: A .safetensors, .pt or .pth file, the .index.json of shards, or a folder: official,
            of diffusers, or a part of one.
        target: A .safetensors, .pt or .pth file; any other name is a folder's, which must be new.
        to: Whose names and layout: official (a file; of a DiT also a folder), self-forcing (a .pt
            file), diffusers (a folder for its from_pretrained).
        dtype: Change the type of the weights. Those of a .pt file are then in memory at once.
        weights: Which entry of a training checkpoint; if not given the averaged generator, and in
            self-forcing form all that there are.
        shard_gb: The largest file of a folder in GB; a larger model is cut into several.
    """
    if not shard_gb > 0:
        raise ValueError(f"shard_gb={shard_gb}: must be more than 0")
    found = open_weights(source, weights)
    state, family = _recognised(source, found, to)
    _check_target(target, found, to, folder=family == "DiT")
    new = None if dtype is None else getattr(torch, dtype)
    content: dict[str, Any] = dict(state)
    if to == "self-forcing":
        there = [weights] if weights else [each for each in _ENTRIES if each in found.entries]
        content = {}
        for entry in there or ["generator"]:
            one = open_weights(source, entry) if there else found
            each, _ = _recognised(source, one, to)
            content[entry] = {f"model.{k}": v for k, v in each.items()}
    total = sum(size_of(v, new) for v in _tensors(content))
    with _progress(target, total) as tick:
        if target.suffix in _PICKLED:
            _write_pickle(target, content, new, tick)
        elif target.suffix == ".safetensors":
            metadata = {"format": "pt"} | found.metadata
            if family == "DiT":
                metadata["config"] = json.dumps(asdict(dit_config(source, found, state)))
            with atomic(target) as part, _Counting(part, tick) as file:
                write_tensors(file, state, metadata, new)
        else:
            config = _config_json(source, found, state, to)
            with atomic_folder(target) as part:
                (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
                own = state if to == "official" else names.diffusers(state)
                _write_shards(part, own, new, int(min(shard_gb, 1e9) * 1e9), tick)


def _recognised(source: Path, found: Weights, to: Form) -> tuple[State, str]:
    """The tensors under official names and the family of the model, whole and convertible."""
    state, (family, label) = recognised(found)
    if family not in _FORMS:
        raise ValueError(
            f"{source}: is {label or 'no model that is known here'}: must be a DiT or VAE of "
            "Wan2.1, or TAEHV"
        )
    if to not in _FORMS[family]:
        raise ValueError(f"{source}: is {label}: to={to} must be one of {_FORMS[family]}")
    problems = foreign_types(state)
    if family in names.TABLES:
        problems += differences(state, names.expected(family, state))
    if not problems:
        problems = wrong_shapes(state, _shapes(source, state, family))
    if problems:
        raise ValueError(f"{source}: is {label}, but not a whole one: {'; '.join(problems)}")
    return state, family


def _shapes(source: Path, state: State, family: str) -> State:
    """The tensors of a whole model of these sizes, without values."""
    model: nn.Module
    with torch.device("meta"):
        if family == "DiT":  # the number of heads does not show in the shapes
            model = DiT(DiTConfig(heads=1, **dit_sizes(source, state)))
        elif family == "VAE":
            model = WanVAE(VAEConfig(**vae_sizes(source, state)))
        else:
            model = TinyVAE()
    return to_official(model.state_dict())


def _check_target(target: Path, found: Weights, to: Form, *, folder: bool) -> None:
    """Raises ValueError for a name that the form does not have or that must not be written to.
    folder: the official form may be one."""
    is_file = target.suffix in _FILES
    if to == "self-forcing" and target.suffix not in _PICKLED:
        raise ValueError(f"{target}: must be a .pt or .pth file for self-forcing")
    if to == "diffusers" and is_file:
        raise ValueError(f"{target}: must be a folder for diffusers")
    if to == "official" and not (is_file or folder):
        raise ValueError(f"{target}: must be a .safetensors, .pt or .pth file")
    if target.exists():
        if any(target.samefile(each) for each in found.files):
            raise ValueError(f"{target}: is the source itself")
        if not is_file and not target.is_dir():
            raise ValueError(f"{target}: is a file: must be a folder")
        if not is_file and any(target.iterdir()):
            raise ValueError(f"{target}: holds files already: must be a new or an empty folder")


def _config_json(source: Path, found: Weights, state: State, to: Form) -> dict[str, Any]:
    """The config.json of a folder."""
    if "conv2.weight" in state:
        sizes = vae_sizes(source, state)
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": sizes["dim"],
            "z_dim": sizes["channels"],
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
            "dropout": 0.0,
        }
    c = dit_config(source, found, state)
    if c.prediction != "flow":
        raise ValueError(f"{source}: predicts {c.prediction}, which only a .safetensors file says")
    same = {
        "patch_size": c.patch,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.layers,
        "eps": c.eps,
    }
    if to == "official":
        return same | {
            "_class_name": "WanModel",
            "model_type": "t2v",
            "dim": c.dim,
            "num_heads": c.heads,
            "in_dim": c.channels,
            "out_dim": c.channels,
            "text_len": c.text_len,
        }
    return same | {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": c.heads,
        "attention_head_dim": c.head_dim,
        "in_channels": c.channels,
        "out_channels": c.channels,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }


class _Counting(io.BufferedWriter):
    """A file that tells how much is written to it."""

    def __init__(self, path: Path, tick: Tick) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._tick = tick

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._tick(count)
        return count


def _write_shards(
    folder: Path, state: State, new: torch.dtype | None, limit: int, tick: Tick
) -> None:
    """One file where `state` is within `limit` bytes, else as many as needed and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, value in state.items():
        room -= size_of(value, new)
        if room < 0 and shards[-1]:
            shards.append({})
            room = limit - size_of(value, new)
        shards[-1][name] = value
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        weight_map |= dict.fromkeys(shard, f"{STEM}{part}.safetensors")
        with _Counting(folder / f"{STEM}{part}.safetensors", tick) as file:
            write_tensors(file, shard, {"format": "pt"}, new)
    if len(shards) > 1:
        total = sum(size_of(value, new) for value in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_pickle(
    path: Path, content: Mapping[str, Any], new: torch.dtype | None, tick: Tick
) -> None:
    def ready(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _alone(value, new)
        return {k: ready(v) for k, v in value.items()}

    with atomic(path) as part, _Counting(part, tick) as file:
        torch.save(ready(content), file)


def _alone(value: Tensor, new: torch.dtype | None) -> Tensor:
    """`value` in the type `new`, in memory of its own or in exactly its part of a mapped file:
    torch.save writes the whole memory that a tensor is a view of."""
    value = value.detach().to(new or value.dtype).contiguous()
    data = torch.from_numpy(value.flatten().view(torch.uint8).numpy())
    return data.view(value.dtype).view(value.shape)


def _tensors(content: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in content.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


@contextmanager
def _progress(target: Path, total: int) -> Iterator[Tick]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=total < _LARGE) as progress:
        task = progress.add_task(target.name, total=total)
        yield lambda count: progress.advance(task, count)
