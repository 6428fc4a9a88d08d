"""Block masks: which chunks of a video's frames attend to which.

A clip is a sequence of chunks, a chunk a few latent frames, a frame `frame_tokens` tokens.
Attention is dense inside a chunk and causal between chunks, so that the whole N×N pattern follows
from a handful of integers and is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sfkernels.arguments import check_count, is_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[int, int]


class Row(NamedTuple):
    """One chunk of queries and the keys it sees, as half-open spans of tokens."""

    queries: Span
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class BlockLayout:
    """The attention pattern of one training or prefill pass.

    chunks: latent frames of each chunk, in order. `(F,)` is bidirectional attention.
    frame_tokens: tokens of one latent frame.
    window: frames a chunk sees, its own included: the first `sink` frames and the newest
        `window - sink`, counted back from the end of the chunk. None: all earlier frames.
    sink: frames at the start of the clip that stay visible when the window has moved on.
    teacher_forcing: the sequence is [clean ‖ noisy]. A clean chunk b sees clean chunks <= b; a
        noisy chunk b sees clean chunks < b and itself (arXiv 2506.08009, Figure 2).
    hide_first: the last chunk does not see the first one, so that training meets what inference
        meets once the first chunk has left the rolling cache (arXiv 2506.08009, section 3.4).

    Raises ValueError where these do not fit together.
    """

    chunks: tuple[int, ...]
    frame_tokens: int
    window: int | None = None
    sink: int = 0
    teacher_forcing: bool = False
    hide_first: bool = False

    def __post_init__(self) -> None:
        sized = isinstance(self.chunks, tuple) and all(isinstance(c, int) for c in self.chunks)
        if not sized or not self.chunks or min(self.chunks) < 1:
            raise ValueError(
                f"chunks={self.chunks}: a tuple of at least one chunk, each of at least one latent "
                "frame"
            )
        check_count("frame_tokens", self.frame_tokens)
        check_window(self.window, self.sink, max(self.chunks))

    @classmethod
    def causal(
        cls,
        frames: int,
        chunk: int,
        frame_tokens: int,
        *,
        first: int | None = None,
        window: int | None = None,
        sink: int = 0,
        teacher_forcing: bool = False,
        hide_first: bool = False,
    ) -> BlockLayout:
        """Chunks of `chunk` frames over a clip; `first` is the size of the first chunk if it
        differs (1 for an independent first frame)."""
        sizes = chunk_sizes(frames, chunk, first)
        return cls(sizes, frame_tokens, window, sink, teacher_forcing, hide_first)

    @property
    def fields(self) -> tuple[Any, ...]:
        """Plain values of which `BlockLayout(*fields)` makes the same layout: torch.compile keeps
        them as constants."""
        return tuple(getattr(self, name) for name in self.__match_args__)

    @property
    def frames(self) -> int:
        """Latent frames of the clip (of one half, under teacher forcing)."""
        return sum(self.chunks)

    @property
    def tokens(self) -> int:
        """Length of the sequence: both halves, under teacher forcing."""
        return self.frames * self.frame_tokens * (2 if self.teacher_forcing else 1)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every chunk of queries with the spans of keys it sees, in the order of the sequence."""
        n = self.frame_tokens
        ends = tuple(accumulate(self.chunks))
        clean, noisy = [], []
        for b, (size, end) in enumerate(zip(self.chunks, ends, strict=True)):
            own = (end - size, end)
            past = [*self._past(b, own)]
            clean.append(Row(_scale(own, n), tuple(_scale(s, n) for s in merge([*past, own]))))
            if self.teacher_forcing:
                shifted = (own[0] + self.frames, own[1] + self.frames)
                spans = merge([*past, shifted])
                noisy.append(Row(_scale(shifted, n), tuple(_scale(s, n) for s in spans)))
        return (*clean, *noisy)

    def _past(self, b: int, own: Span) -> Iterator[Span]:
        """Frames before chunk b that it sees."""
        start, end = own
        hidden = self.chunks[0] if self.hide_first and 0 < b == len(self.chunks) - 1 else 0
        oldest = 0 if self.window is None else max(0, end - (self.window - self.sink))
        for lo, hi in ((0, min(self.sink, oldest, start)), (oldest, start)):
            if max(lo, hidden) < hi:
                yield max(lo, hidden), hi

    @property
    def pairs(self) -> int:
        """(query, key) pairs that attend: the unit of the pattern's arithmetic."""
        return sum(
            (r.queries[1] - r.queries[0]) * sum(hi - lo for lo, hi in r.keys) for r in self.rows
        )

    def dense_mask(self) -> Tensor:
        """The pattern as a boolean [tokens, tokens] tensor: for pictures and small tests."""
        mask = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        for (q0, q1), spans in self.rows:
            for k0, k1 in spans:
                mask[q0:q1, k0:k1] = True
        return mask

    def plot(self, ax: Axes | None = None, title: str | None = None) -> Axes:
        """Draws the pattern by frames (queries down, keys across) on a matplotlib axes, a new one
        if none is given, and returns it. Raises ImportError where matplotlib is not installed."""
        try:
            from matplotlib import pyplot
            from matplotlib.colors import ListedColormap
        except ModuleNotFoundError:
            raise ImportError(
                "plot: needs matplotlib, not installed: pip install matplotlib"
            ) from None

        by_frame = replace(self, frame_tokens=1)
        size = by_frame.tokens
        if ax is None:
            _, ax = pyplot.subplots(figsize=(3, 3), layout="constrained")
        image = by_frame.dense_mask().float()
        if self.teacher_forcing:  # the noisy half in a colour of its own
            image[self.frames :, self.frames :] *= 2
        ax.imshow(
            image.numpy(), cmap=ListedColormap(["#f2f2f2", "#3b6ea5", "#e08a3c"]), vmin=0, vmax=2
        )
        halves = 2 if self.teacher_forcing else 1
        edges = [0, *accumulate(self.chunks * halves)]
        for edge in edges:
            ax.axhline(edge - 0.5, color="white", linewidth=1.5)
            ax.axvline(edge - 0.5, color="white", linewidth=1.5)
        ax.set_xticks(range(size), [str(f % self.frames) for f in range(size)], fontsize=6)
        ax.set_yticks(range(size), [str(f % self.frames) for f in range(size)], fontsize=6)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        kind = "frame (clean ‖ noisy)" if self.teacher_forcing else "frame"
        ax.set_xlabel(f"key {kind}", fontsize=7)
        ax.set_ylabel(f"query {kind}", fontsize=7)
        if title:
            ax.set_title(title, fontsize=8)
        return ax


def transpose(rows: Sequence[Row], keys: int) -> tuple[tuple[Span, tuple[Span, ...]], ...]:
    """The pattern of `rows` from the side of its `keys`: runs of keys, which cover all of them,
    each with the spans of queries that see it (none, for a key that nobody sees)."""
    edges = sorted({0, keys, *(edge for row in rows for span in row.keys for edge in span)})
    runs: list[tuple[Span, tuple[Span, ...]]] = []
    for lo, hi in pairwise(edges):
        seen = tuple(
            merge([row.queries for row in rows if any(a <= lo and hi <= b for a, b in row.keys)])
        )
        if runs and runs[-1][1] == seen:
            lo = runs.pop()[0][0]
        runs.append(((lo, hi), seen))
    return tuple(runs)


def flat_rows(*fields: Any) -> tuple[int, ...]:
    """The rows of `BlockLayout(*fields)` as plain numbers, which an op can take: of each its
    queries, how many spans of keys it sees, and those."""
    return _flat_rows(BlockLayout(*fields))


# A constant for torch.compile, which looks through lru_cache: what
# torch.compiler.assume_constant_result sets, without importing all of Dynamo, which takes a second.
flat_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _flat_rows(layout: BlockLayout) -> tuple[int, ...]:
    return tuple(
        number
        for queries, keys in layout.rows
        for number in (*queries, len(keys), *(edge for span in keys for edge in span))
    )


@lru_cache(maxsize=256)
def unflattened(flat: tuple[int, ...], queries: int, keys: int) -> tuple[Row, ...]:
    """Rows that `flat_rows` wrote as numbers, of so many queries and keys. Raises ValueError unless
    they cover all queries in order and see keys that are there."""
    rows, at, before = [], 0, 0
    while at < len(flat):
        end = at + 3 + 2 * (flat[at + 2] if at + 2 < len(flat) else len(flat))
        row = (
            Row((before, flat[at + 1]), as_spans(flat[at + 3 : end])) if end <= len(flat) else None
        )
        if row is None or flat[at] != before or not row.keys or not in_order(row.keys, keys):
            raise ValueError(
                f"rows={flat}: must be of each row its first query, the one past its last, how "
                f"many spans of the {keys} keys it sees, and those"
            )
        rows.append(row)
        at, before = end, row.queries[1]
    if before != queries or not all(row.queries[0] < row.queries[1] for row in rows):
        raise ValueError(f"rows={flat}: must cover the {queries} queries in order")
    return tuple(rows)


def as_spans(flat: Sequence[int]) -> tuple[Span, ...]:
    """Spans of their edges, one after the other."""
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def in_order(spans: Sequence[Any], tokens: int) -> bool:
    """Tells whether these are spans inside 0..tokens, one behind the other."""
    before = 0
    for span in spans:
        if not isinstance(span, Sequence) or len(span) != 2 or not all(map(is_integer, span)):
            return False
        if not before <= span[0] < span[1] <= tokens:
            return False
        before = span[1]
    return True


def chunk_sizes(frames: int, chunk: int, first: int | None = None) -> tuple[int, ...]:
    """Splits `frames` latent frames into chunks of `chunk`, the first of size `first` if given.
    Raises ValueError where they do not divide."""
    first = chunk if first is None else first
    for name, size in (("frames", frames), ("chunk", chunk), ("first", first)):
        check_count(name, size)
    if frames < first or (frames - first) % chunk:
        raise ValueError(
            f"frames={frames}: must be {first} plus a multiple of the chunk size {chunk}"
        )
    return (first, *(chunk,) * ((frames - first) // chunk))


def check_positions(positions: str) -> None:
    """Raises ValueError for positions of a sink that do not exist."""
    if positions not in ("absolute", "relative"):
        raise ValueError(f"positions={positions!r}: must be 'absolute' or 'relative'")


def check_window(window: int | None, sink: int, chunk: int) -> None:
    """Raises ValueError unless a window of `window` latent frames with `sink` pinned ones can hold
    a chunk of `chunk` frames beside them."""
    check_count("sink", sink, least=0)
    check_count("chunk", chunk)
    if window is None:
        return
    check_count("window", window)
    if window < chunk:
        raise ValueError(
            f"window={window} is smaller than a chunk of {chunk} latent frames: it must be at "
            f"least {chunk + sink}"
        )
    if sink >= window:
        raise ValueError(f"sink={sink} must be smaller than window={window} (latent frames)")
    if window - sink < chunk:
        raise ValueError(
            f"window={window} with sink={sink} leaves {window - sink} latent frames, fewer than a "
            f"chunk of {chunk}: the window must be at least {chunk + sink}"
        )


def _scale(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def merge(spans: Sequence[Span]) -> list[Span]:
    """Joins neighbouring spans of a sorted list."""
    merged: list[Span] = []
    for lo, hi in spans:
        if merged and merged[-1][1] == lo:
            merged[-1] = (merged[-1][0], hi)
        else:
            merged.append((lo, hi))
    return merged
