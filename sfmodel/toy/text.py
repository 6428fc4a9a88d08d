"""The text encoder of the toy world: a fixed vector for each word, nothing learned.

Shapes: B sentences, L rows (words of the longest sentence), E text_dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sfmodel.toy.world import BRIGHTNESS, COLOURS, DIRECTIONS, RADIUS, SPEED

# The order is part of every trained toy model: a word's place is its dimension.
VOCABULARY: tuple[str, ...] = (
    "a", "ball", "moves", "and", *RADIUS, *BRIGHTNESS, *COLOURS,
    *(word for word in DIRECTIONS if " " not in word), *SPEED,
)  # fmt: skip


class ToyTextEncoder:
    """Sentences to embeddings: one row for each word, the unit vector of the word's place in
    VOCABULARY. The rows carry no position; the toy world's sentences need none."""

    text_dim = 32
    text_len = 16
    identity = "toy"

    def __call__(self, sentences: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Embeddings [B, L, 32], float32. Short sentences end in rows of zeros; the empty sentence,
        which stands for "no condition", is all zeros.

        Case and punctuation do not matter. Raises ValueError for a word that is not in VOCABULARY,
        for a sentence of punctuation alone, and for more than `text_len` words."""
        if isinstance(sentences, str) or not sentences:
            raise ValueError(f"sentences={sentences!r}: must be a list of at least one sentence")
        rows = [self.words(sentence) for sentence in sentences]
        out_BLE = torch.zeros(len(rows), max(1, *map(len, rows)), self.text_dim)
        for out_LE, words in zip(out_BLE, rows, strict=True):
            for out_E, word in zip(out_LE, words, strict=False):
                out_E[VOCABULARY.index(word)] = 1.0
        return out_BLE.to(device)

    def rows(
        self, sentences: Iterable[str], device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """The embedding [T, 32] of each sentence as it comes, on the CPU."""
        for sentence in sentences:
            yield self([sentence])[0]

    def words(self, sentence: str) -> list[str]:
        """The words of a sentence, checked. Raises ValueError as `__call__` does."""
        words = re.findall(r"\w+", sentence.lower())
        unknown = [word for word in words if word not in VOCABULARY]
        known = ", ".join(VOCABULARY)
        if unknown:
            raise ValueError(
                f"the toy model does not know {', '.join(map(repr, unknown))} in {sentence!r}; "
                f"it knows the words {known}"
            )
        if sentence.strip() and not words:
            raise ValueError(f"there is no word in {sentence!r}; the toy model knows {known}")
        if len(words) > self.text_len:
            raise ValueError(
                f"the sentence has {len(words)} words, of which the toy model reads at most "
                f"{self.text_len}; it knows {known}"
            )
        return words
