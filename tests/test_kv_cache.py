"""The ring: slots, wrap, pinned frames, memory, save and restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfkernels import RingKVCache

SIZES: dict[str, Any] = dict(layers=2, batch=2, window=5, frame_tokens=3, heads=2, head_dim=4)


def expected_slots(frame: int, window: int, sink: int) -> int:
    return frame if frame < sink else sink + (frame - sink) % (window - sink)


@pytest.mark.parametrize(("window", "sink"), [(5, 0), (5, 2), (7, 1)])
@pytest.mark.parametrize("sizes", [[1] * 20, [2] * 10, [1, 3, 3, 2, 3, 3, 1]])
def test_slots_hold_the_sink_and_the_newest(window: int, sink: int, sizes: list[int]) -> None:
    cache = RingKVCache(**SIZES | dict(window=window, sink=sink))
    held: dict[int, int] = {}
    end = 0
    for size in sizes:
        for _ in range(2):  # denoising again does not move the chunk
            place = cache.chunk(size)
            frames = range(end, end + size)
            assert place.frame_F.tolist() == [*frames]
            assert place.slot_F.tolist() == [expected_slots(f, window, sink) for f in frames]
            assert int(place.valid) == 3 * min(end + size, window)
        held.update(zip(place.slot_F.tolist(), frames, strict=True))
        end += size
        behind = cache.chunk(2, after=size)
        cache.commit(size)
        assert all(map(torch.equal, behind, cache.chunk(2)))
        oldest = max(0, end - (window - sink))
        assert {*held.values()} == {*range(min(sink, end))} | {*range(oldest, end)}


def test_samples_at_different_frames() -> None:
    """Each has the place that a cache of its own would give it."""
    starts = torch.tensor([0, 9], dtype=torch.int64)
    both = RingKVCache(**SIZES, sink=1, positions="relative").chunk(2, start=starts)
    for i, start in enumerate(starts):
        alone = RingKVCache(**SIZES, sink=1, positions="relative")
        alone.start.fill_(start)
        assert all(map(torch.equal, [t[i] for t in both], alone.chunk(2)))
    cache = RingKVCache(**SIZES)
    assert cache.chunk(1, start=torch.tensor([3])).slot_F.tolist() == [[3], [3]]
    for start in ([0, 0, 0], [[0]], [-1, 0], [2**31 - 5]):
        with pytest.raises(ValueError, match=r"start is .*: must be one .*\[2\] of them"):
            cache.chunk(1, start=torch.tensor(start))


def test_a_rewound_ring_remembers_what_it_holds() -> None:
    def rewound(frame: int) -> RingKVCache:
        cache = RingKVCache(**SIZES)
        for _ in range(4):
            cache.chunk(2)
            cache.commit(2)
        cache.rewind(frame)
        return cache

    cache = rewound(6)
    with pytest.raises(ValueError, match="frame=2: frames have left the window of 5, sink 0"):
        cache.rewind(2)
    other = RingKVCache(**SIZES)
    other.load_state_dict(cache.state_dict())
    for one in (cache, other, rewound(6)):
        one.rewind(6)
        with pytest.raises(ValueError, match="must have 2 at least"):
            one.chunk(1)
        one.commit(1)  # frame 6 stays as it was
        one.chunk(1)
        one.commit(1)
        one.chunk(1)


@pytest.mark.parametrize(
    ("end", "frame", "size", "said"),
    [
        (5, 1, 1, ""),
        (5, 5, 1, ""),
        (8, 6, 2, ""),
        (8, 6, 3, ""),
        (8, 6, 1, "a chunk of 1 frames would see those after it, .* must have 2 at least"),
        (8, 4, 4, ""),
        (8, 1, 2, ""),
        (8, 0, 1, ""),
        (8, 3, 4, "frame=3: frames have left the window of 5, sink 1, .* to frame 4 at most"),
        (8, 9, 1, "frame=9: must be at least 0 and at most 8"),
    ],
)
def test_a_rewound_ring_never_shows_what_came_later(
    end: int, frame: int, size: int, said: str
) -> None:
    """Either what is visible is what a stream that never went on would see, or it is refused."""
    cache = RingKVCache(**SIZES, sink=1)
    held: dict[int, int] = {}

    def write(frames: int) -> None:
        place = cache.chunk(frames)
        held.update(zip(place.slot_F.tolist(), place.frame_F.tolist(), strict=True))

    for _ in range(end):
        write(1)
        cache.commit(1)
    if said:
        with pytest.raises(ValueError, match=said):
            cache.rewind(frame)
            write(size)
        cache.reset()
        write(1)
        return
    cache.rewind(frame)
    write(size)
    seen = {held[slot] for slot in range(int(cache.chunk(size).valid) // 3)}
    last = frame + size
    assert seen == {f for f in range(last) if f < 1 or f >= last - 4}


def test_nothing_moves_and_positions_stay_on_the_device() -> None:
    cache = RingKVCache(**SIZES)
    storage = cache.k.data_ptr(), cache.v.data_ptr(), cache.start.data_ptr()
    for _ in range(40):
        place = cache.chunk(2)
        assert {t.dtype for t in place} == {torch.int32} and cache.start.dtype == torch.int32
        cache.commit(2)
    assert storage == (cache.k.data_ptr(), cache.v.data_ptr(), cache.start.data_ptr())
    assert int(cache.start) == 80


def test_a_reset_ring_is_a_new_one_but_for_the_prompt() -> None:
    """Also after a stream that went NaN, which no mask could keep out: NaN times zero is NaN."""
    cache = RingKVCache(**SIZES, text_tokens=2)
    storage = cache.k.data_ptr(), cache.v.data_ptr()
    for tensor in (cache.k, cache.v):
        tensor.fill_(torch.nan)
    cache.text_k.fill_(1)
    cache.commit(4)
    cache.reset()
    assert int(cache.start) == 0 and cache.chunk(1).valid == 3
    assert storage == (cache.k.data_ptr(), cache.v.data_ptr())
    assert not cache.k.any() and not cache.v.any() and cache.text_k.all()


def test_a_sink_that_moves() -> None:
    """By as many frames as have left the window; `keep_sink` keeps its keys as they are then."""
    moving, still = (
        RingKVCache(**SIZES, sink=2, positions=positions) for positions in ("relative", "absolute")
    )
    assert moving.sink_k.shape == (2, 2, 6, 2, 4) and not still.sink_k.numel()
    assert moving.nbytes == RingKVCache.bytes_needed(**SIZES, moving=2)
    moving.k.normal_()
    moving.keep_sink()
    assert torch.equal(moving.sink_k, moving.k[:, :, :6])
    for start in range(0, 30, 2):
        assert int(moving.chunk(2).moved) == max(0, start + 2 - 5)
        assert int(moving.chunk(2, after=2).moved) == max(0, start + 4 - 5)
        assert int(still.chunk(2).moved) == 0
        assert all(map(torch.equal, moving.chunk(2)[:3], still.chunk(2)[:3]))
        moving.commit(2)
        still.commit(2)
    with pytest.raises(ValueError, match=r"'absolute'\): this cache has \(5, 2, 3, 'relative'\)"):
        moving.load_state_dict(still.state_dict())
    moving.reset()
    assert not moving.sink_k.any()


def test_memory_is_known_before_it_is_taken() -> None:
    # FACTS of Wan2.1-1.3B: keys and values of one latent frame in bfloat16 over 30 layers: 274 MiB.
    wan: dict[str, Any] = dict(layers=30, batch=1, heads=12, head_dim=128, dtype=torch.bfloat16)
    frame = RingKVCache.bytes_needed(window=1, frame_tokens=1560, **wan)
    assert round(frame / 2**20) == 274
    cache = RingKVCache(**SIZES, text_tokens=7)
    assert cache.nbytes == RingKVCache.bytes_needed(**SIZES, text_tokens=7)
    with pytest.raises(MemoryError, match=r"window of 1000000 frames needs .* room for \d+ frames"):
        RingKVCache(window=1_000_000, frame_tokens=1560, **wan)


def test_save_and_restore(tmp_path: Path) -> None:
    cache = RingKVCache(**SIZES, text_tokens=2)
    for tensor in (cache.k, cache.v, cache.text_k, cache.text_v):
        tensor.normal_()
    cache.commit(4)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    other = RingKVCache(**SIZES, text_tokens=2)
    other.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    for name in ("k", "v", "text_k", "text_v", "start"):
        assert torch.equal(getattr(cache, name), getattr(other, name))
    with pytest.raises(ValueError, match="this cache has"):
        RingKVCache(**SIZES | dict(window=6)).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="saved k has shape"):
        RingKVCache(**SIZES | dict(heads=1)).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="not a saved KV cache"):
        other.load_state_dict({"k": cache.k})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(window=0), "window=0: must be at least 1"),
        (dict(batch=0), "batch=0"),
        (dict(sink=5), "sink=5 must be smaller than window=5"),
        (dict(sink=-1), "sink=-1"),
        (dict(window=2.5), "window=2.5: must be an integer"),
        (dict(heads=-1), "heads=-1"),
        (dict(positions="here"), "positions='here': must be 'absolute' or 'relative'"),
        (dict(head_dim="4"), "head_dim='4'"),
        (dict(text_tokens=-1), "text_tokens=-1"),
        (dict(dtype=None), "dtype=None: must be floating point"),
        (dict(dtype=torch.int8), "dtype=torch.int8: must be floating point"),
    ],
)
def test_bad_sizes(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RingKVCache(**SIZES | change)


def test_the_prompt_may_have_more_heads() -> None:
    """As where the ring holds those of one rank of several."""
    sizes = SIZES | dict(heads=2, text_tokens=4, text_heads=6)
    cache = RingKVCache(**sizes)
    assert cache.k.shape[3] == 2 and cache.text_v.shape[2:4] == (4, 6)
    assert cache.nbytes == RingKVCache.bytes_needed(**sizes)
    with pytest.raises(ValueError, match="text_heads=0: must be at least 1"):
        RingKVCache(**sizes | dict(text_heads=0))


@pytest.mark.parametrize("after", [-1, 6, 1.5])
def test_a_chunk_may_come_after_a_window_at_most(after: Any) -> None:
    with pytest.raises(ValueError, match=f"after={after}: must be"):
        RingKVCache(**SIZES).chunk(1, after=after)


def test_a_chunk_must_fit_beside_the_sink() -> None:
    cache = RingKVCache(**SIZES, sink=3)
    with pytest.raises(ValueError, match="leaves 2 latent frames"):
        cache.chunk(3)
    with pytest.raises(ValueError, match="smaller than a chunk of 6"):
        cache.chunk(6)


@pytest.mark.parametrize("frames", [0, -5, 6, 100, 2.5])
def test_a_commit_is_of_a_chunk(frames: Any) -> None:
    """Frames that were never written would become visible."""
    cache = RingKVCache(**SIZES)
    with pytest.raises(ValueError, match=f"chunk.*{frames}"):
        cache.commit(frames)
    assert int(cache.start) == 0


@pytest.mark.parametrize(("window", "sink"), [(5, 0), (9, 1), (7, 4)])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("before", [1, 2, 40])
def test_a_stream_is_endless(window: int, sink: int, size: int, before: int) -> None:
    """Past the last index of 32 bits slots and valid go on, and no frame takes one of the sink."""
    cache = RingKVCache(**SIZES | dict(window=window, sink=sink))
    storage, first = cache.start.data_ptr(), 2**31 - before
    cache.start.fill_(first)
    for frame in range(first, first + 60 * size, size):
        for _ in range(2):
            place = cache.chunk(size)
            assert place.slot_F.tolist() == [
                expected_slots(f, window, sink) for f in range(frame, frame + size)
            ]
            assert int(place.valid) == 3 * window
            assert place.frame_F.diff().eq(1).all() and place.frame_F.min() >= window
        cache.commit(size)
        assert cache.start.dtype == torch.int32 and cache.start.data_ptr() == storage


def test_the_index_is_kept_for_as_long_as_it_fits() -> None:
    cache = RingKVCache(**SIZES)
    cache.start.fill_(2**31 - 20)
    cache.commit(5)
    assert cache.chunk(5).frame_F.tolist() == [*range(2**31 - 15, 2**31 - 10)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(start=torch.tensor(-7, dtype=torch.int32)), "saved start is -7: must be 0 or more"),
        (dict(start=torch.tensor(7)), "saved start is torch.int64 on cpu: must be torch.int32"),
        (dict(start=torch.zeros(1, dtype=torch.int32)), r"saved start has shape \[1\]"),
        (dict(start=7), "saved start is 7: must be a tensor"),
        (dict(k=torch.zeros(2, 2, 15, 2, 4).half()), "saved k is torch.float16 on cpu"),
        (dict(v=torch.zeros(2, 2, 15, 2, 4, device="meta")), "saved v is torch.float32 on meta"),
        (dict(v=torch.zeros(2, 2, 15, 2, 4).to_sparse()), "saved v is of layout torch.sparse_coo"),
        (dict(geometry=None), r"saved with \(window, sink, frame_tokens, positions\) None"),
        (dict(geometry=(5, 0)), r"positions\) \(5, 0\): this cache has \(5, 0, 3, 'abs"),
        (dict(geometry="abc"), "positions. abc"),
    ],
)
def test_a_damaged_state(change: dict[str, Any], said: str) -> None:
    """Changes nothing."""
    cache = RingKVCache(**SIZES)
    cache.commit(4)
    with pytest.raises(ValueError, match=said):
        cache.load_state_dict(cache.state_dict() | change)
    assert int(cache.start) == 4 and not cache.k.any()


@pytest.mark.parametrize("state", [None, [], 3, torch.zeros(3)])
def test_what_is_no_state(state: Any) -> None:
    with pytest.raises(ValueError, match="not a saved KV cache: geometry, k, sink_k, start"):
        RingKVCache(**SIZES).load_state_dict(state)
