"""The model that options name, and the settings that it is streamed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sfmodel.cli.options import Content, Sampling, Streaming, Weights, explicit, settings_of
from sfmodel.config import Preset
from sfmodel.dit import DiT
from sfmodel.pretrained import checked_model, chosen_generator, find_preset
from sfmodel.weights.known import Known, by_lora, by_metadata, by_name, flag, is_wans_own, its_lora
from sfmodel.weights.lora import Lora
from sfmodel.weights.opening import open_weights


class Chosen(NamedTuple):
    """Model that options name. settings: those asked for, else its own, else the preset's. path: of
    its weights, where they are not the toy's; known: what that was published as. whole: it makes
    whole clips. asked: settings that options set."""

    preset: str
    settings: Preset
    path: Path | None
    known: Known | None
    weights: Weights
    whole: bool
    asked: Mapping[str, Any]

    def checked(self, device: torch.device) -> tuple[Callable[[], DiT], str]:
        """Loader for later, and a line on what it loads where there is something to say of it.
        Raises ValueError for files that are not what they should be."""
        weights, part, line = self.weights, None, ""
        loras = [Lora.parse(said) for said in weights.lora]
        if self.path is not None and not self.whole and (self.known or self.preset != "toy"):
            part, own, line = _recognised(self.path, self.known, self.asked, weights, self.preset)
            loras += own
        load = checked_model(
            self.preset, weights.checkpoint, device, weights.models, loras, self.whole,
            weights.weights or part, weights.attention_impl,
        )  # fmt: skip
        return load, line


def choose(
    content: Content,
    stream: Streaming,
    sampling: Sampling,
    weights: Weights,
    saved: dict[str, Any],
) -> Chosen:
    """The model and the settings that options name, or those of a saved stream. Raises ValueError
    for what does not exist or does not go together."""
    whole, preset = sampling.sampler != "few-step", weights.preset or saved.get("preset")
    path = weights.checkpoint or (None if whole else chosen_generator(preset, weights.models))
    known = None
    if path is not None and not whole:
        loras = [Lora.parse(said) for said in weights.lora]
        known = by_name(path) or by_metadata(path) or by_lora(loras)
    preset = preset or (known.preset if known else "toy")
    known = known if known and known.preset == preset else None
    published = known.settings if known else {}
    settings = settings_of(content, stream, sampling, preset, saved, published)
    asked = explicit(stream, sampling)
    return Chosen(preset, settings, path, known, weights, whole, asked)


def _recognised(
    path: Path, known: Known | None, given: Mapping[str, Any], weights: Weights, preset: str
) -> tuple[str | None, list[Lora], str]:
    """Part of a checkpoint that was published for generating, the LoRA that belongs to it, and a
    line on what it is known as and what follows. given: settings that do not follow. Raises
    ValueError as `open_weights` does."""
    found = open_weights(path, family="DiT")
    if known is None:
        own = vars(find_preset(preset))
        rest = [name for name in ("steps", "shift", "chunk", "window", "sink") if name not in given]
        words = " ".join(word for name in rest for word in flag(name, own[name]))
        line = f"{path}: no checkpoint that is known" + f": as {preset}, {words}" * bool(words)
        if is_wans_own(found):
            line = (
                f"{path}: is named as Wan2.1's own weights, a bidirectional model, which gives "
                "noise when streamed in few steps: unless it was distilled, use --sampler unipc"
            )
        return None, [], line
    part = known.weights if known.weights in found.entries else None
    its = [] if weights.lora else its_lora(known, path)
    but = [*given, *["weights"] * (weights.weights is not None or not part), *["lora"] * (not its)]
    note = known.note
    if known.lora and not its and not weights.lora:
        note = f"was published with {known.lora}, which is not beside it: --lora names it"
    how = "name" if by_name(path) is known else "LoRA" if known.lora else "metadata"
    line = f"{path}: {known.name}, by its {how}: {known.flags(but) or 'as the preset is'}"
    return part, its, line + f"; {note}" * bool(note)
