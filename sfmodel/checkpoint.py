"""Reading and writing DiT weights under their public names.

Official Wan2.1 and Self Forcing files name the same tensors; this project fuses some projections.
`from_official` and `to_official` are the whole mapping.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfmodel.config import DiTConfig
from sfmodel.files import atomic

# Our fused projection: the official ones it is the concatenation of.
_FUSED = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
}
# The RMSNorms' only parameter is the module's own here.
_NORMS = tuple(f"{a}_attn.norm_{w}" for a in ("self", "cross") for w in "qk")
# Wrappers of training code, anywhere in a key or before it.
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("model.", "net.", "module.")
# Weights inside a training checkpoint, the best for generating first.
_WEIGHTS = ("generator_ema", "generator", "critic")


def clean_key(key: str) -> str:
    """An official parameter name without what training wrappers add."""
    for infix in _INFIXES:
        key = key.replace(infix, "")
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names → this project's: fused projections, everything else by its own name."""
    state = {clean_key(k): v for k, v in state.items()}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        fused = next((f for f, parts in _FUSED.items() if stem.endswith(parts)), None)
        if stem.endswith(_NORMS):
            out[stem] = value
        elif fused is None:
            out[key] = value
        else:
            names = [_sibling(stem, part, leaf) for part in _FUSED[fused]]
            if all(n in state for n in names):
                out.setdefault(_sibling(stem, fused, leaf), torch.cat([state[n] for n in names]))
            else:  # incomplete: kept by its own name, so that the error names what is missing
                out[key] = value
    return out


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`. Also maps gradients."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        fused = next((f for f in _FUSED if stem.endswith(f)), None)
        if key.endswith(_NORMS):
            out[f"{key}.weight"] = value
        elif fused is None:
            out[key] = value
        else:
            parts = _FUSED[fused]
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                out[_sibling(stem, part, leaf)] = piece
    return out


def _sibling(stem: str, part: str, leaf: str) -> str:
    """The parameter `leaf` of `part` (such as self_attn.k) in the block of `stem`."""
    block = stem.rsplit(".", 2)[0]
    return f"{block}.{part}.{leaf}"


def read(path: str | Path, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file or a `.pt`/`.pth` of tensors, memory-mapped, and its
    metadata. No pickled code is executed.

    weights: which entry of a training checkpoint (`generator_ema`, `generator`, `critic`); None
    takes the first of these that is there. Raises ValueError with one sentence for a missing,
    truncated or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: must be a .safetensors, .pt or .pth file")
    try:
        mmap = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not, and are read whole
        with warnings.catch_warnings():  # the sentence below says all there is to say
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: damaged, or holds pickled code, which is not executed: must be tensors only"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}: must hold a dict of tensors")
    entries = [w for w in _WEIGHTS if w in loaded]
    if weights is not None and weights not in entries:
        raise ValueError(
            f"{path}: has no {weights!r}: it has {', '.join(entries) or 'bare weights'}"
        )
    state = loaded[weights or entries[0]] if entries else loaded
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}, {}


def load(model: nn.Module, path: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Copies a checkpoint into a DiT, converting to its dtype and device, and returns the file's
    metadata. Raises ValueError as `matching` does, changing nothing."""
    state, metadata = matching(model, path, weights)
    model.load_state_dict(state)
    return metadata


def matching(
    model: nn.Module, path: str | Path, weights: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors under this project's names, and the file's metadata. Raises ValueError
    where names or shapes are not those of the DiT `model`, with the first of each kind."""
    official, metadata = read(path, weights)
    got, want = {clean_key(k): v for k, v in official.items()}, to_official(model.state_dict())
    missing, unexpected = want.keys() - got.keys(), got.keys() - want.keys()
    reshaped = [k for k in want.keys() & got.keys() if want[k].shape != got[k].shape]
    problems = [f"missing {_first(missing)}"] if missing else []
    problems += [f"unexpected {_first(unexpected)}"] if unexpected else []
    if reshaped:
        k = min(reshaped)
        more = f" and {len(reshaped) - 1} more" if len(reshaped) > 1 else ""
        problems += [f"wrong shape {k} {[*got[k].shape]} (must be {[*want[k].shape]}){more}"]
    if problems:
        raise ValueError(f"{path}: not a checkpoint of this model: {'; '.join(problems)}")
    return from_official(got), metadata


def _first(keys: Iterable[str], count: int = 3) -> str:
    names = sorted(keys)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def save(
    weights: nn.Module | Mapping[str, Tensor], path: str | Path, config: DiTConfig, **extra: Any
) -> None:
    """Writes a DiT's weights under official names, as safetensors, with the configuration in the
    metadata. Atomic: the file is whole or absent."""
    own = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {k: v.detach().cpu().contiguous() for k, v in to_official(own).items()}
    metadata = {
        "config": json.dumps(asdict(config)),
        **{k: json.dumps(v) for k, v in extra.items()},
    }
    with atomic(path) as temporary:
        save_file(state, temporary, metadata)
