"""Weights read, checked and written under their public names.

A wrong file is named before a weight is read. Then each tensor is read once, straight to where it
is wanted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfmodel.config import DiTConfig
from sfmodel.weights import names
from sfmodel.weights.names import clean_key as clean_key
from sfmodel.weights.names import from_official as from_official
from sfmodel.weights.names import to_official as to_official
from sfmodel.weights.opening import Weights as Weights
from sfmodel.weights.opening import (
    differences,
    dtype_name,
    foreign_types,
    recognised,
    some,
    wrong_shapes,
)
from sfmodel.weights.opening import open_weights as open_weights
from sfmodel.weights.saving import save_tensors
from sfmodel.weights.scaled import stored_dtype

log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of what `open_weights` opens, by their names there and mapped into memory, and
    the metadata of a safetensors file. Raises ValueError as `open_weights` does."""
    found = open_weights(path)
    return found.tensors, found.metadata


def describe(path: Path) -> str:
    """Line on what `open_weights` finds, such as "Wan2.1 DiT 1.3B (official), bfloat16, 825
    tensors, generator_ema + generator". Reads no weights. Raises ValueError as `open_weights`
    does."""
    found = open_weights(path)
    state, (_, label) = recognised(found)
    is_official = state.keys() == {*map(clean_key, found.tensors)}
    words = [
        f"{label} ({'official' if is_official else 'diffusers'})"
        if label
        else f"an unknown model with {some(state)}",
        " + ".join(sorted({dtype_name(stored_dtype(v)) for v in state.values()})),
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
    """Model of `build` with a checkpoint's weights in `dtype` on `device`; path and weights as in
    `open_weights`. Beside the model itself and the pages of the file, which the system can drop,
    memory holds one tensor at most. Buffers that the file has not (constants) keep their type.

    Raises ValueError as `matching` does, before anything is allocated on the device."""
    return checked(build, path, device=device, dtype=dtype, weights=weights)()


def checked(
    build: Callable[[], Module],
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    weights: str | None = None,
) -> Callable[[], Module]:
    """Loader for later, as `load_model`. The file is checked now, so that all that a command needs
    can be checked before any of it is loaded. Raises ValueError as `load_model` does."""
    with _Unfilled():
        model = build()
    state, _ = _checked(model, path, weights)

    def load() -> Module:
        own = {
            k: torch.empty_like(v, dtype=dtype, device=device)
            for k, v in model.state_dict().items()
        }
        _fill(own, state)
        model.load_state_dict(own, assign=True)
        return model.to(device)

    return load


def check(build: Callable[[], nn.Module], path: str | Path) -> None:
    """Raises ValueError as `matching` does for a file that is not of what `build` makes."""
    with _Unfilled():
        model = build()
    _checked(model, path, None)


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


def matching(model: nn.Module, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors under this project's names, and the file's metadata. Raises ValueError
    as `open_weights` does, and for another model: says which if it knows it, and the first names
    that are missing, unexpected, of a wrong shape or not of a floating-point type."""
    state, metadata = _checked(model, path, None)
    return from_official(state), metadata


def _checked(
    model: nn.Module, path: str | Path, weights: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under official names and metadata, checked."""
    want = to_official(model.state_dict())
    wanted = names.kind(want)
    found = open_weights(path, weights, wanted.family)
    if found.passed:
        instead = found.entry or "what is beside it"
        log.warning("%s: %s is not a whole model: takes %s", path, found.passed, instead)
    got, (family, label) = recognised(found)
    problems = []
    if label and label != wanted.label:
        problems += [f"it is {label}" + (f", not {wanted.label}" if wanted.label else "")]
    problems += foreign_types(got)
    if not label or family == wanted.family:
        problems += differences(got.keys(), want.keys())
        problems += wrong_shapes(got, want)
    if problems:
        raise ValueError(f"{path}: not a checkpoint of this model: {'; '.join(problems)}")
    return got, found.metadata


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
