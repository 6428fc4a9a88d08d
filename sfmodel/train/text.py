"""The text encoder of a run at full size, which is in memory only while it encodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfmodel import assets, pretrained
from sfmodel.toy.text import ToyTextEncoder

KEPT = 2**30  # bytes of embeddings: of a thousand prompts of Wan2.1


class KeptText:
    """Sentences to embeddings by a preset's encoder, which are kept in host memory: KEPT bytes of
    those that were asked for last. Nothing is read from the cache on disk or written there: what
    another device has encoded differs by its rounding, and a quarter million prompts would fill
    it."""

    def __init__(self, preset: str, device: torch.device) -> None:
        """device: where it encodes, if there is room, as `UMT5Encoder` does."""
        self.preset, self.device = preset, device
        self._kept: dict[str, Tensor] = {}  # by sentence, those asked for last at the end

    @cached_property
    def encoder(self) -> pretrained.TextEncoder:
        """Raises ValueError where its files are not those of an encoder."""
        return pretrained.load_text(self.preset, kept=False)

    def encode(self, sentences: Iterable[str]) -> None:
        """Encodes all that are not kept, with the encoder loaded once, one at a time."""
        wanted = [*dict.fromkeys(sentences)]
        self._kept |= {each: self._kept.pop(each) for each in wanted if each in self._kept}
        new = [each for each in wanted if each not in self._kept]
        if not new:
            return
        self._kept |= zip(new, self.encoder.rows(new, self.device), strict=True)
        size = sum(text_TE.nbytes for text_TE in self._kept.values())
        for each in [*self._kept][: -len(wanted)]:
            if size > KEPT:
                size -= self._kept.pop(each).nbytes

    def __call__(self, sentences: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Embeddings [B, T, E], float32; short ones end in rows of zeros."""
        self.encode(sentences)
        rows = [self._kept[sentence].float() for sentence in sentences]
        return pad_sequence(rows, batch_first=True).to(device)


def text_encoder(preset: str, device: torch.device) -> ToyTextEncoder | KeptText | None:
    """The text encoder of a preset; None where its files are not found."""
    if preset == "toy":
        return ToyTextEncoder()
    with suppress(ValueError):  # there is no folder of models
        there = assets.find(None, preset)
        if there.text_encoder and there.tokenizer:
            return KeptText(preset, device)
    return None
