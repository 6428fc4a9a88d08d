"""The public names of Wan2.1's weights, and which model a set of names and shapes is.

Official files and those of Self Forcing name the same tensors; diffusers names them otherwise and
keeps their shapes. This project's DiT fuses some projections; its VAEs carry the official names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Our fused projection: the official ones it is the concatenation of.
FUSED = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
}
# Linear layers of a block, and those that a LoRA changes unless other ends of names are given.
LINEARS = (
    *(f"{attention}_attn.{name}" for attention in ("self", "cross") for name in "qkvo"),
    *("ffn.0", "ffn.2"),
)
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
# The RMSNorms' only parameter is the module's own here.
_NORMS = tuple(f"{a}_attn.norm_{w}" for a in ("self", "cross") for w in "qk")
# Dicts of weights in the files of training code, or so many parts of one dict, and what may be
# around them.
PARTS = ("generator_ema", "generator", "ema", "critic", "generator_lora")
WRAPPERS = ("model", "state_dict", "module")
_PART = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)*({'|'.join(PARTS)})\.")
# Added by wrappers, anywhere in a key or before it; pipelines and ComfyUI have their own.
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = (
    *(f"{name}." for name in (*PARTS, *WRAPPERS)),
    "net.", "diffusion_model.", "transformer.", "pipe.dit.",
)  # fmt: skip


def _layers(stems: Mapping[str, str]) -> dict[str, str]:
    """Both parameters of linear layers and convolutions."""
    return {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in stems.items() for leaf in ("weight", "bias")}


def _under(official: str, diffusers: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{official}.{a}": f"{diffusers}.{b}" for a, b in table.items()}


def _attention(official: str, diffusers: str) -> dict[str, str]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    norms = {f"norm_{w}.weight": f"norm_{w}.weight" for w in "qk"}
    return _under(official, diffusers, _layers(names) | norms)


# Official name of a DiT's tensor: that of diffusers; * is the number of a block. Their norm2 is the
# norm before cross-attention, here as there the only one with parameters.
DIT = {
    **_layers({
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "blocks.*.norm3": "blocks.*.norm2",
        "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
        "blocks.*.ffn.2": "blocks.*.ffn.net.2",
        "head.head": "proj_out",
    }),
    **_attention("blocks.*.self_attn", "blocks.*.attn1"),
    **_attention("blocks.*.cross_attn", "blocks.*.attn2"),
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    "head.modulation": "scale_shift_table",
}  # fmt: skip


def _vae() -> dict[str, str]:
    """Wan2.1's VAE: four levels, two residual blocks each in the encoder, three in the decoder, and
    a resampling between levels, which changes the number of frames at the two deeper places."""
    norms = {"residual.0.gamma": "norm1.gamma", "residual.3.gamma": "norm2.gamma"}
    residual = norms | _layers({"residual.2": "conv1", "residual.6": "conv2"})
    wider = residual | _layers({"shortcut": "conv_shortcut"})
    resample = _layers({"resample.1": "resample.1"})
    in_time = resample | _layers({"time_conv": "time_conv"})
    middle = {"norm.gamma": "norm.gamma"} | _layers({"to_qkv": "to_qkv", "proj": "proj"})

    table = _layers({"conv1": "quant_conv", "conv2": "post_quant_conv"})
    for side in ("encoder", "decoder"):
        ends = _layers({"conv1": "conv_in", "head.2": "conv_out"})
        table |= _under(side, side, ends | {"head.0.gamma": "norm_out.gamma"})
        for i, (place, inner) in enumerate(
            [("resnets.0", residual), ("attentions.0", middle), ("resnets.1", residual)]
        ):
            table |= _under(f"{side}.middle.{i}", f"{side}.mid_block.{place}", inner)
    for i in range(11):
        inner = (
            in_time if i in (5, 8) else resample if i == 2 else wider if i in (3, 6) else residual
        )
        table |= _under(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", inner)
    for i in range(15):
        inner = in_time if i in (3, 7) else resample if i == 11 else wider if i == 4 else residual
        level, j = divmod(i, 4)
        place = "upsamplers.0" if j == 3 else f"resnets.{j}"
        table |= _under(f"decoder.upsamples.{i}", f"decoder.up_blocks.{level}.{place}", inner)
    return table


VAE = _vae()
TABLES = {"DiT": DIT, "VAE": VAE}
_TO_DIFFUSERS = DIT | VAE
_FROM_DIFFUSERS = {b: a for a, b in _TO_DIFFUSERS.items()}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Name from the table; what it does not have keeps its name."""
    block = _BLOCK.match(name)
    if block is None:
        return table.get(name, name)
    new = table.get(f"blocks.*.{name[block.end() :]}")
    return name if new is None else new.replace("*", block[1])


def clean_key(key: str) -> str:
    """An official parameter name without what training wrappers and pipelines add."""
    for infix in _INFIXES:
        key = key.replace(infix, "")
    while prefix := next((each for each in _PREFIXES if key.startswith(each)), ""):
        key = key.removeprefix(prefix)
    return key


def part_of(key: str) -> str:
    """The part of a training checkpoint that a name is of: one of PARTS, or empty."""
    found = _PART.match(key)
    return found[1] if found else ""


def official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names from any public ones. A name that is none of them stays, without wrappers."""
    return {_renamed(clean_key(k), _FROM_DIFFUSERS): v for k, v in state.items()}


def diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers from official ones."""
    return {_renamed(k, _TO_DIFFUSERS): v for k, v in state.items()}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by this project's names from official ones: some projections are fused."""
    state = {clean_key(k): v for k, v in state.items()}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        fused = next((f for f, parts in FUSED.items() if stem.endswith(parts)), None)
        if stem.endswith(_NORMS):
            out[stem] = value
        elif fused is None:
            out[key] = value
        else:
            names = [_sibling(stem, part, leaf) for part in FUSED[fused]]
            if all(n in state for n in names):
                own = _sibling(stem, fused, leaf)
                if own not in out:
                    out[own] = torch.cat([state[n] for n in names])
            else:  # incomplete: kept by its own name, so that the error names what is missing
                out[key] = value
    return out


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`; its tensors are views of those of `state`. Also maps
    gradients."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        fused = next((f for f in FUSED if stem.endswith(f)), None)
        if key.endswith(_NORMS):
            out[f"{key}.weight"] = value
        elif fused is None:
            out[key] = value
        else:
            parts = FUSED[fused]
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                out[_sibling(stem, part, leaf)] = piece
    return out


def _sibling(stem: str, part: str, leaf: str) -> str:
    """The parameter `leaf` of `part` (such as self_attn.k) in the block of `stem`."""
    block = stem.rsplit(".", 2)[0]
    return f"{block}.{part}.{leaf}"


def targeted(targets: Iterable[str]) -> list[str]:
    """The linear layers of a block whose names are these or end in them, as PEFT matches
    target_modules. Raises ValueError for an end that none has."""
    ends = {target: [n for n in LINEARS if f".{n}".endswith(f".{target}")] for target in targets}
    for target, found in ends.items():
        if not found:
            raise ValueError(f"{target!r}: must be the end of one of {', '.join(LINEARS)}")
    return [name for name in LINEARS if any(name in found for found in ends.values())]


class Kind(NamedTuple):
    """Kind of model. family: DiT, VAE or tiny VAE; empty if this project does not run it. label:
    for people; empty if it is not known."""

    family: str
    label: str


# (width, blocks, width of the FFN) of the public DiTs.
_SIZES = {(1536, 30, 8960): "1.3B", (5120, 40, 13824): "14B"}
LORA = "a LoRA, the changes to a model, which must be merged into that model first"
# What is recognised only to be named, by a name that it alone has.
_OTHERS = {
    r"(^|[._])lora_": LORA,
    r"^vace_": "a VACE DiT",
    r"^(img_emb|condition_embedder\.image_embedder)\.": "an image-to-video DiT",
    r"^encoder\.downsamples\.0\.downsamples\.": "the VAE of Wan2.2",
    r"^(token_embedding|shared)\.weight$|\.SelfAttention\.": "a text encoder (T5)",
    r"^(visual|vision_model|textual)\.": "an image encoder (CLIP)",
}


def kind(state: Mapping[str, Tensor]) -> Kind:
    """Kind of model that tensors under official names are of, complete or not."""
    for pattern, label in _OTHERS.items():
        if any(re.search(pattern, name) for name in state):
            return Kind("", label)

    def sizes(name: str, dims: int) -> tuple[int, ...]:
        shape = tuple(state[name].shape) if name in state else ()
        return shape if len(shape) == dims and 0 not in shape else ()

    patch, q = sizes("patch_embedding.weight", 5), sizes("blocks.0.self_attn.q.weight", 2)
    if patch and q:
        (dim, channels, *size), depth = patch, blocks(state)
        ffn = sum(sizes("blocks.0.ffn.0.bias", 1))
        (out,) = sizes("head.head.bias", 1) or (channels * math.prod(size),)
        if out % math.prod(size) == 0 and out < channels * math.prod(size):
            return Kind("", f"an image-to-video DiT, of {channels} input channels")
        known = _SIZES.get((dim, depth, ffn))
        return Kind("DiT", f"Wan2.1 DiT {known}" if known else f"a DiT of {depth} blocks × {dim}")
    if norm := sizes("encoder.downsamples.0.residual.0.gamma", 4):
        return Kind("VAE", "Wan2.1 VAE" if norm[0] == 96 else f"a VAE of width {norm[0]}")
    if {"encoder.0.weight", "decoder.1.weight", "decoder.3.conv.0.weight"} <= state.keys():
        width = sum(sizes("decoder.1.weight", 4)[1:2])
        return Kind("tiny VAE", f"a tiny VAE (TAEHV) of {width} channels")
    return Kind("", "")


def blocks(state: Mapping[str, Tensor]) -> int:
    """Number of blocks of a DiT that there are tensors of."""
    return len({block[1] for block in map(_BLOCK.match, state) if block})


def expected(family: str, state: Mapping[str, Tensor]) -> set[str]:
    """All official names of a DiT with as many blocks as `state` has, or of the VAE."""
    return {
        name.replace("*", str(i))
        for name in TABLES[family]
        for i in range(blocks(state) if "*" in name else 1)
    }
