"""BlockLayout against the definition, pair of frames by pair of frames."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from sfkernels import BlockLayout
from sfkernels.layout import chunk_sizes, flat_rows, unflattened

LAYOUTS = [
    BlockLayout((5,), 4),
    BlockLayout.causal(6, 3, 4),
    BlockLayout.causal(7, 3, 4, first=1),
    BlockLayout.causal(9, 3, 1, window=4),
    BlockLayout.causal(12, 3, 2, window=7, sink=2),
    BlockLayout.causal(6, 1, 3, window=3, sink=2),
    BlockLayout.causal(9, 3, 2, hide_first=True),
    BlockLayout.causal(7, 2, 2, first=1, window=5, sink=3, hide_first=True),
]
LAYOUTS += [
    BlockLayout(x.chunks, x.frame_tokens, x.window, x.sink, True, x.hide_first) for x in LAYOUTS
]


def expected(layout: BlockLayout) -> torch.Tensor:
    """The definition of the class's docstring, said without spans."""
    chunk_of = [b for b, size in enumerate(layout.chunks) for _ in range(size)]
    end_of = [sum(layout.chunks[: b + 1]) for b in chunk_of]
    frames = len(chunk_of)
    halves = 2 if layout.teacher_forcing else 1
    mask = torch.zeros(halves * frames, halves * frames, dtype=torch.bool)
    for q, k in itertools.product(range(halves * frames), repeat=2):
        q_noisy, k_noisy = q >= frames, k >= frames
        f, g = q % frames, k % frames
        if q_noisy == k_noisy and chunk_of[f] == chunk_of[g]:
            mask[q, k] = True
            continue
        in_window = (
            layout.window is None
            or g < layout.sink
            or g >= end_of[f] - (layout.window - layout.sink)
        )
        hidden = layout.hide_first and chunk_of[f] == chunk_of[-1] and chunk_of[g] == 0
        mask[q, k] = not k_noisy and chunk_of[g] < chunk_of[f] and in_window and not hidden
    n = layout.frame_tokens
    return mask.repeat_interleave(n, 0).repeat_interleave(n, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pattern_is_the_definition(layout: BlockLayout) -> None:
    mask = expected(layout)
    assert torch.equal(layout.dense_mask(), mask)
    assert layout.pairs == int(mask.sum())
    assert [r.queries for r in layout.rows] == sorted(r.queries for r in layout.rows)
    for row in layout.rows:  # spans are sorted and never touch, so that a kernel has no double work
        assert all(a[1] < b[0] for a, b in itertools.pairwise(row.keys))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plain_values_say_it_all(layout: BlockLayout) -> None:
    assert BlockLayout(*layout.fields) == layout
    assert unflattened(flat_rows(*layout.fields), layout.tokens, layout.tokens) == layout.rows


def test_real_size_needs_no_dense_mask() -> None:
    """The full training sequence of Wan2.1 at 480×832 under teacher forcing: 65,520 tokens."""
    layout = BlockLayout.causal(21, 3, 1560, teacher_forcing=True)
    assert layout.tokens == 65_520
    # 7 chunks: clean sees 1..7 chunks, noisy 0..6 and itself.
    assert layout.pairs == (3 * 1560) ** 2 * 2 * sum(range(1, 8))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(chunks=(), frame_tokens=4), "at least one chunk"),
        (dict(chunks=(3, 0), frame_tokens=4), "at least one latent frame"),
        (dict(chunks=(3,), frame_tokens=0), "frame_tokens=0"),
        (dict(chunks=(3, 3), frame_tokens=4, window=2), "smaller than a chunk"),
        (dict(chunks=(3,), frame_tokens=4, window=3, sink=3), "sink=3 must be smaller"),
        (dict(chunks=(3,), frame_tokens=4, window=4, sink=2), "must be at least 5"),
        (dict(chunks=(3,), frame_tokens=4, sink=-1), "sink=-1"),
    ],
)
def test_bad_layouts_say_what_is_wrong(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BlockLayout(**arguments)  # type: ignore[arg-type]


def test_chunk_sizes() -> None:
    assert chunk_sizes(7, 3, 1) == (1, 3, 3)
    assert chunk_sizes(6, 3) == (3, 3)
    with pytest.raises(ValueError, match="multiple of the chunk size 3"):
        chunk_sizes(7, 3)


def test_plot_shows_the_pattern() -> None:
    ax = BlockLayout.causal(6, 3, 1560, teacher_forcing=True).plot(title="TF")
    image = ax.images[0].get_array()
    assert image is not None and image.shape == (12, 12)
    assert image[11, 9] == 2 and image[11, 0] == 1 and image[0, 11] == 0


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib, not installed: pip install matplotlib"):
        BlockLayout.causal(6, 3, 1560).plot()
