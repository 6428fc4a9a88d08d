"""Tables of a pattern's tiles and spans for the attention kernels, and the number of parts that the
keys of a stream are split into.

A pattern is a list of rows: a run of tokens to keep in place, and the spans of tokens that each of
them visits. Tiles never cross from one row into the next, so that all tokens of a tile visit the
same spans: every visited tile but the last of a span is whole and takes no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfkernels.dispatch import cached_tensors
from sfkernels.layout import Row, Span, transpose

Pattern = tuple[tuple[Span, tuple[Span, ...]], ...]


class Tiles(NamedTuple):
    """Tables of a pattern. tiles: int32 [T, 4], each tile's tokens first..past and its spans
    first..past; those with the most to visit come first. spans: int32 [N, 2], half-open; the
    prefix's come first, and every tile visits them before its own."""

    tiles: Tensor
    spans: Tensor


@cached_tensors
def tile_table(
    rows: Pattern, prefix: tuple[Span, ...], stationary: int, device: torch.device
) -> Tiles:
    """The tables of a pattern for tiles of `stationary` tokens."""
    tiles: list[tuple[int, int, int, int]] = []
    spans = [*prefix]
    for (start, end), visited in sorted(rows, key=lambda row: -sum(hi - lo for lo, hi in row[1])):
        first = len(spans)
        spans += visited
        tiles += [
            (t, min(t + stationary, end), first, len(spans)) for t in range(start, end, stationary)
        ]
    return Tiles(
        torch.tensor(tiles, dtype=torch.int32, device=device),
        torch.tensor(spans or [(0, 0)], dtype=torch.int32, device=device),
    )


@functools.cache
def column_table(rows: Pattern, keys: int, stationary: int, device: torch.device) -> Tiles:
    """The tables of the transposed pattern: tiles of `stationary` of the `keys`, and the spans of
    queries that see them. The prefix, which takes no gradient, has no part in it."""
    return tile_table(transpose([Row(*row) for row in rows], keys), (), stationary, device)


def visits(rows: Pattern, prefix: Sequence[Span], stationary: int, streamed: int) -> int:
    """Number of tiles of `streamed` tokens that the tiles of `stationary` ones visit in all: the
    work of the kernels, and what tests count."""
    return sum(
        -(-(end - start) // stationary)
        * sum(-(-(hi - lo) // streamed) for lo, hi in (*prefix, *visited))
        for (start, end), visited in rows
    )


def key_splits(programs: int, at_once: int, tiles: int, keys: int = 0) -> int:
    """Number of parts to split the `tiles` tiles of keys into that each of `programs` programs
    visits, on a GPU that runs `at_once` of them: the one with the shortest time, in which the waves
    are full, but every part more costs about 1.5%, for programs to begin and end and their outputs
    to be joined. keys: a number that the parts must divide."""

    def time(parts: int) -> float:
        return -(-programs * parts // at_once) / parts * (1 + 0.015 * (parts - 1))

    fitting = (n for n in range(1, max(min(tiles, 16), 1) + 1) if keys % n == 0)
    return min(fitting, key=time)
