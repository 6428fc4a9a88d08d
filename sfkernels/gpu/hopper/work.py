"""The list of work of the attention kernels in Gluon: what each program does, one of them on a
multiprocessor.

Heads come one after the other, and of a head the tiles that visit the most come first: programs
that run at the same time share the keys that they read from L2. Each tile goes to the program that
has the least to do, until no program has room for a whole one. The rest is cut where programs are
full, and those that share a tile leave partial results, which the last of them to end joins.

Of a chunk of Wan2.1-1.3B over a full window (444 tiles, 132 multiprocessors) each program gets
three tiles and 93 or 94 steps of the 256 of one of 48 more: 100% of the time all are busy, where a
program a tile has 84%, and 168 partial results of 64 KB, 11 MB. A list in one run, each program
going on where the one before it ended, would have as even loads; but then eleven programs read each
head at eleven places, 201 MB that L2 does not hold.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfkernels import launch
from sfkernels.dispatch import cached_tensors
from sfkernels.gpu.tiles import Pattern
from sfkernels.layout import Span

FIELDS = 9  # of an item
# What a partial result costs, to be written, waited for and joined, in steps: not measured on a GPU
# yet. A step is a tile of keys that a tile of queries visits, about 1.2 us on an H200.
JOIN = 4
# Parts of a tile at most, for one program reads them all.
PARTS = 16


class WorkList(NamedTuple):
    """Items of work, on a device. begins: int32 [programs + 1], the first item of each program.
    items: int32 [N, FIELDS], each a part of a tile of tokens in one head:

        first, past   the tile's tokens
        head          of all samples' heads
        lo, hi        what it visits: some of the spans; of a ring, steps of `steps`
        part          its partial result; -1: it has the whole tile
        joined, end   the partial results of its tile
        shared        number of its tile among those that are shared

    spans: int32 [N, 2], half-open; tokens of the prefix count back from 0, which is where the
    pass's own begin. parts, shared: how many partial results and shared tiles there are."""

    begins: Tensor
    items: Tensor
    spans: Tensor
    steps: int
    parts: int
    shared: int

    @property
    def programs(self) -> int:
        return len(self.begins) - 1

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.begins, self.items, self.spans


class Piece(NamedTuple):
    """Steps lo..hi of a tile in a head."""

    tile: int
    head: int
    lo: int
    hi: int


def list_of(
    q_BLHD: Tensor,
    setting: launch.Tile,
    rows: Pattern,
    prefix: tuple[Span, ...] = (),
    prefix_tokens: int = 0,
    ring: bool = False,
    whole: bool = False,
) -> WorkList:
    """The list of a pattern's tiles in all heads of q. prefix: spans of `prefix_tokens` others,
    which all tiles visit first. ring: the pattern is one row and one span, of which fewer tokens
    may be valid: items say which share of them is theirs. whole: no tile is cut."""
    heads, programs = len(q_BLHD) * q_BLHD.shape[2], launch.multiprocessors(q_BLHD.device)
    tiles = setting.stationary, setting.streamed
    return _list(rows, prefix, prefix_tokens, heads, *tiles, programs, ring, whole, q_BLHD.device)


@cached_tensors
def _list(
    rows: Pattern,
    prefix: tuple[Span, ...],
    prefix_tokens: int,
    heads: int,
    stationary: int,
    streamed: int,
    programs: int,
    ring: bool,
    whole: bool,
    device: torch.device,
) -> WorkList:
    tiles: list[tuple[Span, tuple[Span, ...]]] = []
    before = tuple((lo - prefix_tokens, hi - prefix_tokens) for lo, hi in prefix)
    for (start, end), visited in rows:
        tiles += [
            ((t, min(t + stationary, end)), before + visited) for t in range(start, end, stationary)
        ]
    if ring and steps_of(rows[0][1], streamed) ** 2 >= 2**31:
        raise ValueError(f"a ring of {rows[0][1][0][1]} tokens: impl='gluon' takes fewer")
    tiles.sort(key=lambda tile: -steps_of(tile[1], streamed))
    lengths = [steps_of(spans, streamed) for _, spans in tiles]
    shares = [share for share in shared_out(lengths, heads, programs, whole) if share]

    spans = [*tiles[0][1]] if ring else []
    places = {}  # of a tile's spans, or a part of them, in `spans`
    parts = number_parts(shares, lengths)
    items = []
    for piece in itertools.chain(*shares):
        (first, past), visited = tiles[piece.tile]
        lo, hi = piece.lo, piece.hi
        if not ring:
            key = visited, lo, hi
            if key not in places:
                cut = [*cut_spans(visited, lo, hi, streamed)]
                places[key] = len(spans), len(spans) + len(cut)
                spans += cut
            lo, hi = places[key]
        items.append((first, past, piece.head, lo, hi, *parts.get(piece, (-1, 0, 0, 0))))
    begins = [*itertools.accumulate(map(len, shares), initial=0)]
    return WorkList(
        torch.tensor(begins, dtype=torch.int32, device=device),
        torch.tensor(items, dtype=torch.int32, device=device).view(-1, FIELDS),
        torch.tensor(spans or [(0, 0)], dtype=torch.int32, device=device),
        lengths[0],
        len(parts),
        len({(piece.tile, piece.head) for piece in parts}),
    )


def steps_of(spans: Sequence[Span], streamed: int) -> int:
    """Number of tiles of `streamed` tokens that spans have."""
    return sum(-(-(hi - lo) // streamed) for lo, hi in spans)


def cut_spans(spans: Sequence[Span], first: int, past: int, streamed: int) -> Iterator[Span]:
    """The tokens that steps first..past of these spans visit."""
    at = 0
    for lo, hi in spans:
        steps = -(-(hi - lo) // streamed)
        a, b = max(first - at, 0), min(past - at, steps)
        if a < b:
            yield lo + a * streamed, min(lo + b * streamed, hi)
        at += steps


def shared_out(
    lengths: Sequence[int], heads: int, programs: int, whole: bool = False
) -> list[list[Piece]]:
    """The pieces of each program; lengths: steps of the tiles of a head, the longest first. Tiles
    are cut where that saves more than it costs, unless they are to be whole."""
    level = -(-heads * sum(lengths) // programs)
    uncut, _ = _greedy(lengths, heads, programs)
    most = max(map(_load, uncut))
    if whole or most <= level + JOIN:
        return uncut
    shares, rest = _greedy(lengths, heads, programs, level)
    while (cut := _cut(rest, [level - _load(share) for share in shares])) is None:
        level += 1
    # Parts first, so that joining them runs beside what the others still have to do.
    found = [pieces + share for pieces, share in zip(cut, shares, strict=True)]
    parts = [sum(p.hi - p.lo < lengths[p.tile] for p in pieces) for pieces in cut]
    cost = max(_load(mine) + JOIN * n for mine, n in zip(found, parts, strict=True))
    return found if cost < most else uncut


def _load(share: Sequence[Piece]) -> int:
    return sum(piece.hi - piece.lo for piece in share)


def _greedy(
    lengths: Sequence[int], heads: int, programs: int, most: int | None = None
) -> tuple[list[list[Piece]], list[Piece]]:
    """Gives each whole tile to the program with the least to do; and those that then would have
    more than `most`."""
    shares: list[list[Piece]] = [[] for _ in range(programs)]
    rest: list[Piece] = []
    loads = [(0, program) for program in range(programs)]
    for head, (tile, steps) in itertools.product(range(heads), enumerate(lengths)):
        load, program = loads[0]
        piece = Piece(tile, head, 0, steps)
        if most is not None and load + steps > most:
            rest.append(piece)
            continue
        shares[program].append(piece)
        heapq.heapreplace(loads, (load + max(steps, 1), program))  # zeros are stored too
    return shares, rest


def _cut(rest: Sequence[Piece], room: Sequence[int]) -> list[list[Piece]] | None:
    """Gives each program as much of the rest as it has room for, in order; None if that is too
    little. No part is much shorter than what joining it costs, and no tile has more than PARTS."""
    cut: list[list[Piece]] = [[] for _ in room]
    waiting = [*reversed(rest)]
    for mine, has in zip(cut, room, strict=True):
        left = has
        while waiting:
            tile, head, lo, hi = waiting[-1]
            least = min(max(JOIN, -(-hi // PARTS)), hi - lo)
            if left < least:
                break
            at = lo + left
            if hi - at < least:
                at = hi  # a crumb goes along with the part before it
            mine.append(Piece(tile, head, lo, at))
            left -= at - lo
            waiting.pop()
            if at < hi:
                waiting.append(Piece(tile, head, at, hi))
    return None if waiting else cut


def number_parts(
    shares: Sequence[Sequence[Piece]], lengths: Sequence[int]
) -> dict[Piece, tuple[int, int, int, int]]:
    """part, joined, end and shared of each piece that is not a whole tile."""
    by_tile: dict[tuple[int, int], list[Piece]] = {}
    for piece in itertools.chain(*shares):
        if piece.hi - piece.lo < lengths[piece.tile]:
            by_tile.setdefault((piece.tile, piece.head), []).append(piece)
    found = {}
    joined = 0
    for shared, pieces in enumerate(by_tile.values()):
        end = joined + len(pieces)
        for part, piece in enumerate(sorted(pieces), joined):
            found[piece] = part, joined, end, shared
        joined = end
    return found
