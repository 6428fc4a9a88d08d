"""LoRA files, the changes to a model, merged into it: those of PEFT, diffusers, ComfyUI, kohya and
LightX2V, by their own names.

A change of a weight [out, in] is strength · alpha / rank · B·A, with A [rank, in] ("lora_A",
"lora_down") and B [out, rank] ("lora_B", "lora_up"); alpha is the rank where no file says it.
Beside these, "diff", "diff_b" and "diff_m" are changes of a weight, a bias and a modulation
themselves.
"""

from __future__ import annotations

import json
import math
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
    r"\.lora_B(\.[^.]+)?\.bias": ("up", "bias"),
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
            return self.scale * self.diff.float().view(*shape)
        assert self.up is not None
        if self.down is None:  # the bias of B
            return self.scale * self.up.float().view(*shape)
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(*shape)


def read_lora(lora: Lora, wanted: Mapping[str, Tensor]) -> dict[str, Change]:
    """Changes of a LoRA by the official names of the parameters, scaled. wanted: the model's own.

    Raises ValueError for what `open_weights` refuses, a name that is of no layer of the model, a
    half of a pair, shapes that do not fit, and kinds of changes that are not known (DoRA, LoHa)."""
    if not math.isfinite(lora.strength):
        raise ValueError(f"{lora.path}: strength {lora.strength}: must be a number")
    tensors, alphas = _opened(lora.path)
    parts: dict[str, dict[str, Tensor]] = {}
    raw: dict[str, str] = {}
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
        of = parts.setdefault(f"{stem}.{found[2]}", {})
        if found[1] in of:
            raise ValueError(f"{lora.path}: holds two changes of {stem}: must be one adapter")
        of[found[1]], raw[f"{stem}.{found[2]}"] = value, found[0]
    if strange:
        raise ValueError(
            f"{lora.path}: {some(strange)}: of no layer of this model, or of no kind that is known"
        )
    changes = {}
    for name, of in parts.items():
        shape = tuple(wanted[name].shape)
        weight = f"{name.rpartition('.')[0]}.weight"  # whose rank and alpha are those of its bias
        pair = parts.get(weight, {})
        try:
            scale = lora.strength
            if "diff" not in of:
                rank = len(pair["down"])
                alpha = float(pair["alpha"]) if "alpha" in pair else alphas(raw[weight], rank)
                scale *= alpha / rank
            if not math.isfinite(scale) or len({*of} & {"diff", "up"}) != 1:
                raise ValueError
            if "diff" in of and tuple(of["diff"].shape) != shape:
                raise ValueError
            change = Change(of.get("down"), of.get("up"), of.get("diff"), scale)
            if name == weight and "up" in of and change.down is None:
                raise ValueError
            meta: dict[str, Any] = {
                part: of[part].to("meta") for part in ("down", "up", "diff") if part in of
            }
            Change(**meta).of(shape)
        except (KeyError, TypeError, IndexError, RuntimeError, ValueError, ZeroDivisionError):
            sizes = ", ".join(f"{part} {[*value.shape]}" for part, value in of.items())
            raise ValueError(
                f"{lora.path}: the change of {name} is of {sizes}: must be of [rank, in] and [out, "
                f"rank], or as the parameter is, {[*shape]}, and its alpha a number"
            ) from None
        changes[name] = change
    return changes


def _opened(path: Path) -> tuple[dict[str, Tensor], Any]:
    """A LoRA's tensors, and what alpha is by name and rank where no tensor says it."""
    path, said = local(path), dict[str, Any]()
    try:
        if path.is_dir():
            beside = path / "adapter_config.json"
            if beside.is_file():
                said = dict(json.loads(beside.read_text()))
            files = [*path.glob("adapter_model.*"), *path.glob("pytorch_lora_weights.*")]
            if not files:
                raise ValueError("holds no LoRA: no adapter_model or pytorch_lora_weights")
            found = open_weights(files[0])
        else:
            found = open_weights(path)
        for key in ("lora_adapter_metadata", "lora_config"):
            if key in found.metadata:
                more = found.metadata[key]
                more = dict(json.loads(more) if isinstance(more, str) else more)
                # Those of other models, such as text_encoder.r, are not of this one.
                own = {name.removeprefix("transformer."): value for name, value in more.items()}
                said |= {name: value for name, value in own.items() if "." not in name}
        alpha = None if said.get("lora_alpha") is None else float(said["lora_alpha"])
        patterns = {k: float(v) for k, v in dict(said.get("alpha_pattern") or {}).items()}
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError, OSError):
        raise ValueError(f"{path}: its configuration is damaged") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def alphas(stem: str, rank: int) -> float:
        """Alpha of a layer, by its name in the file, as PEFT has it."""
        own = (v for k, v in patterns.items() if re.search(rf"(^|\.){k}$", stem))
        given = next(own, alpha)
        if given is None:
            return float(rank)
        return given * rank**0.5 if said.get("use_rslora") else given

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
