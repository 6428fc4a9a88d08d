"""Streams in files: whatever the next chunk depends on, so that a stream goes on in another process
as if it had never ended, bit for bit, or twice.

A file of tensors (safetensors) whose metadata hold the rest. It is whole or absent. The weights are
not in it: a digest of some tells whether they are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sfkernels.arguments import check_count, check_shape
from sfmodel.config import DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.extras import needed
from sfmodel.frames import FrameStream, OnHost, copy_all
from sfmodel.stream import Given, Prompt, Stream
from sfmodel.weights.saving import save_tensors

with needed():
    from safetensors import SafetensorError, safe_open

VERSION = 1
KIND = "sfmodel stream"
COUNTS = ("size", "next", "pending", "past", "begun", "decoded", "to_leave", "handed_out")
DAMAGED = (ValueError, KeyError, TypeError, IndexError, ArithmeticError, AttributeError)
TENSORS = ("recent_BFCHW", "seed_B", "uncounted", "text_BTE")


def save_stream(stream: Stream, path: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes a stream as it is between two chunks, with notes that JSON can hold. Raises OSError
    where the file cannot be written."""
    stream.mend()
    tensors, facts = state_of(stream)
    facts |= {"notes": dict(notes or {})}
    save_tensors(path, tensors, {"kind": KIND, "version": str(VERSION), "facts": json.dumps(facts)})


def read_notes(path: Path) -> dict[str, Any]:
    """The notes that a stream was saved with. Raises ValueError for a file that holds no stream."""
    notes: dict[str, Any] = _opened(path)[1].get("notes", {})
    return notes


def read_preset(path: Path) -> Preset:
    """Preset that a saved stream was made with. Raises ValueError as `read_notes` does."""
    said = _opened(path)[1]
    with _one_sentence(path):
        said = said["preset"]
        dit = DiTConfig(**said["dit"] | {"patch": tuple(said["dit"]["patch"])})
        return Preset(**said | {"dit": dit, "steps": tuple(said["steps"])}).check()


def load_stream(stream: Stream, path: Path) -> None:
    """Makes a stream go on from a file. Raises ValueError, changing nothing, where it is of another
    model, preset, batch or sampler, or damaged."""
    tensors, facts = _opened(path)
    with _one_sentence(path):
        restore(stream, tensors, facts)


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Raises what a damaged file leads to as a ValueError that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: damaged: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("kind") != KIND:
                raise ValueError(f"{path}: holds no saved stream")
            if said.get("version") != str(VERSION):
                raise ValueError(f"{path}: is of version {said.get('version')}: must be {VERSION}")
            try:
                facts = dict(json.loads(said["facts"]))
            except DAMAGED:
                raise ValueError(f"{path}: damaged: its facts are none") from None
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        damaged = "damaged, or no file of tensors" if path.is_file() else "there is no such file"
        reason = getattr(error, "strerror", None) or damaged
        raise ValueError(f"{path}: {reason}") from None


def fork(stream: Stream, other: Stream) -> None:
    """Makes another stream of the same model, preset and batch go on from where this one is."""
    stream.mend()
    restore(other, *state_of(stream))


def state_of(stream: Stream) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A stream's tensors, which are its own, and all else as JSON can hold it."""
    stream.before_overwriting()  # for what is being decoded leaves its state
    tensors = {name: getattr(stream, name) for name in TENSORS}
    cache = stream.cache.state_dict()
    geometry = cache.pop("geometry")
    tensors |= {f"cache.{name}": value for name, value in cache.items()}
    tensors |= {f"latents.{frames}": x for frames, x in stream.latents_BFCHW.items()}
    decoding = stream.decoding and stream.decoding.state
    leaves = pytree.tree_leaves(decoding) if decoding is not None else []
    tensors |= {f"decoder.{i}": leaf for i, leaf in enumerate(leaves)}
    tensors |= {f"given.{i}": each.latents_BFCHW for i, each in enumerate(stream.given)}
    tensors |= {f"prompts.{i}": each.text_BTE for i, each in enumerate(stream.prompts)}
    for i, (on_host, event) in enumerate(stream.leaving):
        if event is not None:
            event.synchronize()
        tensors |= {f"leaving.{i}.{name}": x for name, x in on_host._asdict().items()}
    facts = {
        "model": _digest(stream.model),
        **_made_with(stream),
        "geometry": geometry,
        "counts": {name: getattr(stream, name) for name in COUNTS},
        "decodes": stream.decoding is not None,
        "decoder": len(leaves),
        "given": [each.step for each in stream.given],
        "prompts": [[each.frame, each.over, each.recompute, each.begun] for each in stream.prompts],
        "leaving": len(stream.leaving),
    }
    return tensors, facts


def _made_with(stream: Stream) -> dict[str, Any]:
    """Settings that two streams must have in common, as JSON gives them back."""
    made = {"preset": asdict(stream.preset), "batch": stream.batch, "euler": stream.euler}
    made |= {"low_latency": stream.low_latency}
    return dict(json.loads(json.dumps(made)))


def _digest(model: DiT) -> str:
    """A digest of some of a model's weights."""
    digest = hashlib.sha256()
    some = [p.detach().flatten()[:64].float() for p in model.parameters()]
    digest.update(torch.cat(some).cpu().numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def restore(stream: Stream, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Makes a stream go on from what `state_of` gave of one. Raises ValueError, changing nothing,
    where that does not fit."""
    mine = {"model": _digest(stream.model), **_made_with(stream)}
    for name, value in mine.items():
        if facts[name] != value:
            said = (
                "other weights" if name == "model" else f"{name}={_differing(facts[name], value)}"
            )
            raise ValueError(f"was saved with {said}")
    device = stream.device
    cache = {n.removeprefix("cache."): t for n, t in tensors.items() if n.startswith("cache.")}
    for name in TENSORS:
        check_shape(name, tensors[name], tuple(getattr(stream, name).shape))
    for frames, x in stream.latents_BFCHW.items():
        check_shape("latents", tensors[f"latents.{frames}"], tuple(x.shape))
    state = None
    if facts["decodes"] != (stream.decoding is not None):
        which = ("without", "one") if stream.decoding is not None else ("with", "none")
        raise ValueError(f"was saved {which[0]} a decoder, and this stream has {which[1]}")
    if facts["decoder"]:
        assert stream.decoding is not None
        codec = stream.decoding.codec
        template = codec.decode_chunk(torch.zeros_like(stream.latents_BFCHW[stream.first]))[1]
        leaves, structure = pytree.tree_flatten(template)
        if len(leaves) != facts["decoder"]:
            raise ValueError("was saved with another decoder")
        for i, leaf in enumerate(leaves):
            check_shape("the decoder's state", tensors[f"decoder.{i}"], tuple(leaf.shape))
        kept = [tensors[f"decoder.{i}"].to(leaf, copy=True) for i, leaf in enumerate(leaves)]
        state = pytree.tree_unflatten(kept, structure)
    counts = {name: facts["counts"][name] for name in COUNTS}
    sizes, steps = [*stream.latents_BFCHW], len(stream.sigmas)
    for name, value in counts.items():
        check_count(name, value, least=0, most=2**62)
    if (
        {counts["size"], counts["next"], counts["pending"]} - {*sizes, 0}
        or not counts["size"] * counts["next"]
        or counts["to_leave"] > counts["size"]
        or counts["decoded"] > counts["size"]
    ):
        raise ValueError(f"damaged: {counts} are no counts of a stream of chunks of {sizes}")
    given = [Given(tensors[f"given.{i}"].to(device), at) for i, at in enumerate(facts["given"])]
    for each in given:
        check_count("step of given latents", each.step, least=0, most=steps)
        latent = tuple(stream.latents_BFCHW[stream.first].shape[2:])
        check_shape("given latents", each.latents_BFCHW, (stream.batch, "F", *latent))
    prompts = [
        Prompt(frame, tensors[f"prompts.{i}"].to(device), over, bool(recompute), bool(begun))
        for i, (frame, over, recompute, begun) in enumerate(facts["prompts"])
    ]
    for prompt in prompts:
        check_count("frame of a prompt", prompt.frame, least=0)
        check_count("over of a prompt", prompt.over)
        check_shape("prompt", prompt.text_BTE, tuple(stream.text_BTE.shape))
    leaving = [
        OnHost(*(tensors[f"leaving.{i}.{name}"] for name in OnHost._fields))
        for i in range(facts["leaving"])
    ]
    for on_host in leaving:
        check_shape("frames", on_host.bytes_BTHWC, (stream.batch, "T", "H", "W", 3))
        check_shape("finite", on_host.finite_BT, tuple(on_host.bytes_BTHWC.shape[:2]))
        check_count("frames that leave", on_host.finite_BT.shape[1])
    stream.before_overwriting()
    # Checks, and changes nothing before.
    stream.cache.load_state_dict(cache | {"geometry": tuple(facts["geometry"])})
    FrameStream.restart(stream)
    for name in TENSORS:
        getattr(stream, name).copy_(tensors[name])
    for frames, x in stream.latents_BFCHW.items():
        x.copy_(tensors[f"latents.{frames}"])
    if stream.decoding is not None and state is not None:
        if stream.decoding.kept is not None:
            copy_all(stream.decoding.kept, state)
            state = stream.decoding.kept
        stream.decoding.state = state
    for name, value in counts.items():
        setattr(stream, name, value)
    stream.given, stream.prompts, stream.torn = given, prompts, None
    stream.leaving.extend((each, None) for each in leaving)


def _differing(saved: Any, mine: Any) -> str:
    """The first of the values that differ."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        for name in mine:
            if saved.get(name) != mine[name]:
                return f"{name}={_differing(saved.get(name), mine[name])}"
    return f"{saved!r}, and this stream has {mine!r}"
