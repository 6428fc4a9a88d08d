"""LoRA files, the changes to a model, merged into it: those of PEFT, diffusers, ComfyUI, kohya and
LightX2V, by their own names.

A change of a weight [out, in] is strength · alpha / rank · B·A, with A [rank, in] ("lora_A",
"lora_down") and B [out, rank] ("lora_B", "lora_up"); alpha is the rank where no file says it.
Beside these, "diff", "diff_b" and "diff_m" are changes of a weight, a bias and a modulation
themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfmodel.hub import local
from sfmodel.weights import names
from sfmodel.weights.opening import open_weights, some

# The ends of names: which part of a change it is, and of which parameter.
_PARTS = {
    r"\.lora_A(\.[^.]+)?\.weight": ("down", "weight"),
    r"\.lora_B(\.[^.]+)?\.weight": ("up", "weight"),
    r"\.lora_B(\.[^.]+)?\.bias": ("diff", "bias"),
    r"\.lora_down\.weight": ("down", "weight"),
    r"\.lora_up\.weight": ("up", "weight"),
    r"\.alpha": ("alpha", "weight"),
    r"\.diff": ("diff", "weight"),
    r"\.diff_b": ("diff", "bias"),
    r"\.diff_m": ("diff", "modulation"),
}
_KOHYA = "lora_unet_"


class Lora(NamedTuple):
    """A file, or PEFT's folder, of a LoRA and how strongly it is merged."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, said: str) -> Lora:
        """A LoRA from PATH or PATH:STRENGTH. Raises ValueError for a strength that is no number."""
        path, _, strength = said.rpartition(":")
        try:
            return cls(Path(path), float(strength)) if path else cls(Path(said))
        except ValueError:
            if Path(path).exists() and not Path(said).exists():
                raise ValueError(
                    f"lora {said}: {strength!r} must be a number, a strength"
                ) from None
            return cls(Path(said))


class Change(NamedTuple):
    """A change of one parameter: B·A scaled, or what is added itself."""

    down: Tensor | None = None
    up: Tensor | None = None
    diff: Tensor | None = None
    scale: float = 1.0

    def of(self, shape: Sequence[int]) -> Tensor:
        """The change in float32, in a parameter's shape."""
        if self.diff is not None:
            return self.scale * self.diff.float().reshape(*shape)
        assert self.down is not None and self.up is not None
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(*shape)


def read_lora(lora: Lora, wanted: Mapping[str, Tensor]) -> dict[str, Change]:
    """Changes of a LoRA by the official names of the parameters, scaled. wanted: the model's own.

    Raises ValueError for what `open_weights` refuses, a name that is of no layer of the model, a
    half of a pair, shapes that do not fit, and kinds of changes that are not known (DoRA, LoHa)."""
    tensors, alphas = _opened(lora.path)
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    by_kohya = {stem.replace(".", "_"): official for stem, official in _stems(wanted).items()}
    for name, value in tensors.items():
        found = next(
            ((name[: m.start()], *kind) for end, kind in _PARTS.items()
             if (m := re.search(end + "$", name))), None
        )  # fmt: skip
        stem = _official_stem(found[0], by_kohya) if found else ""
        if found is None or f"{stem}.{found[2]}" not in wanted:
            strange.append(name)
            continue
        parts.setdefault(f"{stem}.{found[2]}", {})[found[1]] = value
    if strange:
        raise ValueError(
            f"{lora.path}: {some(strange)}: of no layer of this model, or of no kind that is known"
        )
    changes = {}
    for name, of in parts.items():
        shape = tuple(wanted[name].shape)
        rank = len(of["down"]) if "down" in of else 1
        alpha = float(of["alpha"]) if "alpha" in of else alphas(name, rank)
        try:
            scale = lora.strength * (alpha / rank if "down" in of else 1.0)
            change = Change(of.get("down"), of.get("up"), of.get("diff"), scale)
            if "down" in of and "diff" in of:
                raise ValueError
            meta: dict[str, Any] = {
                part: of[part].to("meta") for part in ("down", "up", "diff") if part in of
            }
            Change(**meta).of(shape)
        except (AssertionError, RuntimeError, ValueError):
            sizes = ", ".join(f"{part} {[*value.shape]}" for part, value in of.items())
            raise ValueError(
                f"{lora.path}: the change of {name} is of {sizes}: must be of [rank, in] and [out, "
                f"rank], or as the parameter is, {[*shape]}"
            ) from None
        changes[name] = change
    return changes


def _opened(path: Path) -> tuple[dict[str, Tensor], Any]:
    """A LoRA's tensors, and what alpha is by name and rank where no tensor says it."""
    config: dict[str, Any] = {}
    path = local(path)
    if path.is_dir():
        beside = path / "adapter_config.json"
        if beside.is_file():
            config = json.loads(beside.read_text())
        files = [*path.glob("adapter_model.*"), *path.glob("pytorch_lora_weights.*")]
        if not files:
            raise ValueError(f"{path}: holds no LoRA: no adapter_model or pytorch_lora_weights")
        path = files[0]
    found = open_weights(path)
    for key in ("lora_adapter_metadata", "lora_config"):
        if isinstance(said := found.metadata.get(key), str):
            said = json.loads(said)
        config |= said if isinstance(said, dict) else {}
    flat = {key.rpartition(".")[2]: value for key, value in config.items()}
    alpha, rs = flat.get("lora_alpha"), flat.get("use_rslora")

    def alphas(_: str, rank: int) -> float:
        given = float(rank if alpha is None else alpha)
        return given * rank**0.5 if rs and alpha is not None else given

    return found.tensors, alphas


def _official_stem(stem: str, by_kohya: Mapping[str, str]) -> str:
    if stem.startswith(_KOHYA):
        return by_kohya.get(stem.removeprefix(_KOHYA), "")
    stem = stem.replace("base_model.model.", "").removeprefix("base_model.")
    (name,) = names.official({f"{stem}.weight": torch.empty(0)})
    return name.removesuffix(".weight")


def _stems(wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Layers by their official names and by those of diffusers: their official names."""
    official = {name.rpartition(".")[0] for name in wanted}
    theirs = names.diffusers({f"{stem}.weight": torch.empty(0) for stem in official})
    return {stem: stem for stem in official} | {
        theirs_name.removesuffix(".weight"): stem
        for theirs_name, stem in zip(theirs, official, strict=True)
    }


@torch.no_grad()
def merge(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Adds changes to a model's parameters, computed in float32 and rounded once, also to those
    that are fused with others here."""
    for name, own in names.to_official(model.state_dict()).items():
        if name in changes:
            own.copy_(own.float() + changes[name].of(own.shape).to(own.device))
