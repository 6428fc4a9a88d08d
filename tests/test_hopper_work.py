"""The list of work of the kernels in Gluon: all of it is there, once, and evenly shared out."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from sfkernels import BlockLayout
from sfkernels.gpu.hopper import work
from sfkernels.gpu.hopper.work import PARTS, Piece, cut_spans, list_of, number_parts, shared_out
from sfkernels.launch import Tile
from tests.hopper_cases import LAYOUTS, rows_of

pytestmark = pytest.mark.usefixtures("fresh_seed")
CHUNK, FRAME = [256] * 37, [256] * 13  # tiles of a head, over a full window of 32,760 keys


def loads(shares: list[list[Piece]]) -> list[int]:
    return [sum(piece.hi - piece.lo for piece in share) for share in shares]


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
@pytest.mark.parametrize("heads", [1, 12])
def test_every_step_is_done_once(programs: int, heads: int) -> None:
    for _ in range(20):
        longest, tiles = random.choice([1, 5, 300]), random.randint(1, 60)
        lengths = sorted((random.randint(0, longest) for _ in range(tiles)), reverse=True)
        shares = shared_out(lengths, heads, programs)
        done: Counter[tuple[int, int, int]] = Counter()
        for tile, head, lo, hi in (piece for share in shares for piece in share):
            done.update((tile, head, step) for step in range(lo, hi))
        everything = {
            (tile, head, step)
            for head in range(heads)
            for tile, steps in enumerate(lengths)
            for step in range(steps)
        }
        assert set(done) == everything and max(done.values(), default=1) == 1
        # Tiles that visit nothing are there too: their outputs are zeros.
        assert {(p.tile, p.head) for s in shares for p in s} == {
            (tile, head) for head in range(heads) for tile in range(tiles)
        }
        assert len(shares) == programs
        whole = shared_out(lengths, heads, programs, whole=True)
        assert all(p.hi - p.lo == lengths[p.tile] for share in whole for p in share)
        assert max(loads(shares)) <= max(loads(whole))


@pytest.mark.parametrize(
    ("lengths", "heads", "busy", "most"),
    [(CHUNK, 12, 0.995, 180), (FRAME, 12, 0.995, 160), (CHUNK, 40, 0.995, 180),
     ([37] * 37, 12, 0.99, 180), (FRAME, 40, 0.98, 0)],
)  # fmt: skip
def test_multiprocessors_are_busy(lengths: list[int], heads: int, busy: float, most: int) -> None:
    """At the shapes of Wan2.1, with few partial results."""
    shares = shared_out(lengths, heads, 132)
    assert heads * sum(lengths) / 132 / max(loads(shares)) >= busy
    assert len(number_parts(shares, lengths)) <= most


@pytest.mark.parametrize("teacher_forcing", [False, True])
@pytest.mark.parametrize(("whole", "busy"), [(False, 0.995), (True, 0.98)])
def test_training_is_even(teacher_forcing: bool, whole: bool, busy: float) -> None:
    layout = BlockLayout.causal(21, 3, 1560, teacher_forcing=teacher_forcing)
    lengths = [
        sum(-(-(hi - lo) // 128) for lo, hi in row.keys)
        for row in layout.rows
        for _ in range(*row.queries, 128)
    ]
    shares = shared_out(sorted(lengths, reverse=True), 12, 132, whole)
    assert 12 * sum(lengths) / 132 / max(loads(shares)) >= busy


def test_parts_of_a_tile() -> None:
    """No more than one program can join in a short time, none of next to nothing, side by side in
    the order of their keys."""
    for programs in (5, 132):
        for tiles in (1, 3, 50):
            shares = shared_out([256] * tiles, 1, programs)
            by_tile: dict[int, list[tuple[Piece, tuple[int, int, int, int]]]] = {}
            for piece, record in number_parts(shares, [256] * tiles).items():
                by_tile.setdefault(piece.tile, []).append((piece, record))
                assert piece.hi - piece.lo >= work.JOIN
            for pieces in by_tile.values():
                pieces.sort()
                assert 2 <= len(pieces) <= PARTS
                _, joined, end, shared = pieces[0][1]
                assert end - joined == len(pieces)
                for at, (_, record) in enumerate(pieces, joined):
                    assert record == (at, joined, end, shared)
            numbers = {pieces[0][1][3] for pieces in by_tile.values()}
            assert numbers == {*range(len(by_tile))}


def test_spans_are_cut_between_tiles_of_keys() -> None:
    spans = ((-90, -20), (0, 33), (40, 41))  # 3, 2 and 1 steps of 32
    assert [*cut_spans(spans, 0, 6, 32)] == [*spans]
    assert [*cut_spans(spans, 1, 4, 32)] == [(-58, -20), (0, 32)]
    assert [*cut_spans(spans, 4, 6, 32)] == [(32, 33), (40, 41)]
    for _ in range(20):
        a, b = sorted(random.choices(range(7), k=2))
        cut = [*cut_spans(spans, 0, a, 32), *cut_spans(spans, a, b, 32),
               *cut_spans(spans, b, 6, 32)]  # fmt: skip
        keys = [key for lo, hi in cut for key in range(lo, hi)]
        assert keys == [key for lo, hi in spans for key in range(lo, hi)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_say_what_the_layout_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as the kernels read them, pieces and whole tiles, of two samples of two heads."""
    monkeypatch.setattr(work, "JOIN", 0)
    layout, programs = LAYOUTS[name], random.choice([2, 3, 23])
    monkeypatch.setattr("sfkernels.launch.multiprocessors", lambda _: programs)
    q = torch.empty(2, layout.tokens, 2, 64)
    found = list_of(q, Tile(128, 32, 4, 2), rows_of(layout))
    seen = torch.zeros(4, layout.tokens, layout.tokens, dtype=torch.int32)
    for first, past, head, lo, hi, *_ in found.items.tolist():
        for start, end in found.spans[lo:hi].tolist():
            seen[head, first:past, start:end] += 1
    assert all(torch.equal(one.bool(), layout.dense_mask()) and one.max() == 1 for one in seen)
    assert found.begins[0] == 0 and found.begins[-1] == len(found.items)
