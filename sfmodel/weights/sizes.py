"""Sizes of a model, from the shapes of its weights and what is said beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfmodel.config import DiTConfig
from sfmodel.weights import names
from sfmodel.weights.opening import Weights, parse_json, read_json

State = Mapping[str, Tensor]


def dit_config(source: Path, found: Weights, state: State) -> DiTConfig:
    """Sizes from shapes. What these do not tell is in the metadata or in the config.json beside the
    weights, in this project's words, official ones or those of diffusers; else it is as in Wan2.1.
    Raises ValueError where the number of heads is not known."""
    sizes = dit_sizes(source, state)
    dim = sizes["dim"]
    config: dict[str, Any] = {}
    try:
        beside = found.files[0].parent / "config.json"
        kept = found.metadata.get("config")
        config = read_json(beside) if kept is None else parse_json(kept)
        heads = config.get("heads") or config.get("num_heads") or int(config["num_attention_heads"])
        width = config.get("dim") or heads * int(config["attention_head_dim"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        heads = width = None
    if width != dim:  # there is none, or it is of another model
        config, heads = {}, None if dim % 128 else dim // 128
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"{source}: a DiT of width {dim} has an unknown number of heads: must be in a "
            "config.json beside it"
        )
    return DiTConfig(
        heads=heads,
        text_len=config.get("text_len", 512),
        eps=config.get("eps", 1e-6),
        prediction=config.get("prediction", "flow"),
        **sizes,
    )


def dit_sizes(source: Path, state: State) -> dict[str, Any]:
    """Sizes of a DiTConfig that shapes tell."""
    dim, channels, *patch = _sizes(source, state, "patch_embedding.weight", 5)
    return {
        "dim": dim,
        "ffn_dim": _sizes(source, state, "blocks.0.ffn.0.weight", 2)[0],
        "layers": names.blocks(state),
        "channels": channels,
        "patch": (patch[0], patch[1], patch[2]),
        "freq_dim": _sizes(source, state, "time_embedding.0.weight", 2)[1],
        "text_dim": _sizes(source, state, "text_embedding.0.weight", 2)[1],
    }


def vae_sizes(source: Path, state: State) -> dict[str, Any]:
    """Sizes of a VAEConfig that shapes tell."""
    return {
        "dim": _sizes(source, state, "encoder.conv1.weight", 5)[0],
        "channels": _sizes(source, state, "conv2.weight", 5)[0],
    }


def _sizes(source: Path, state: State, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor. Raises ValueError for another number of dimensions."""
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{source}: {name} has shape {[*shape]}: must have {dims} dimensions")
    return shape
