"""The generation loop on a small random model with the toy codec."""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import Noise, normal
from sfmodel import graphs
from sfmodel.config import PRESETS, Preset, VAEConfig
from sfmodel.dit import DiT
from sfmodel.frames import Decoding
from sfmodel.ranges import timed
from sfmodel.schedule import FlowSchedule, few_step
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from sfmodel.vae.codec import NotFinite, to_bytes
from sfmodel.vae.wan import WanVAE

TOY = PRESETS["toy"]
SMALL = replace(
    TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=64, layers=2), first=None, window=6
)


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(SMALL.dit)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.eval()


TEXT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def take(
    count: int,
    model: DiT,
    preset: Preset = SMALL,
    text: Tensor = TEXT[:1],
    initial_BFCHW: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """The latents of so many chunks, after the initial ones."""
    mine = Stream(model, None, text, preset, **more)
    if initial_BFCHW is not None:
        mine.prefill(initial_BFCHW)
    return torch.cat([*itertools.islice(mine.latents(), count)], 1)


def test_a_seed_is_a_video(model: DiT) -> None:
    a, b, c = (take(5, model, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (1, 15, 4, 8, 8) and a.isfinite().all()
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("frames", [1, 9, 10, 30])
def test_exactly_the_frames_asked_for(model: DiT, frames: int) -> None:
    """Chunks come as they are made: 3 latent frames are 9 pixel frames at first, then 12; a still
    as first chunk is one frame."""
    for first, pixels in ((None, 9), (1, 1)):
        preset = replace(SMALL, first=first)
        chunks = [*Stream(model, ToyVAE(), TEXT[:1], preset).video(frames)]
        assert torch.cat(chunks, 1).shape == (1, frames, 3, 64, 64)
        assert [c.shape[1] for c in chunks[:-1]] == [pixels, *[12] * 9][: len(chunks) - 1]


@pytest.mark.parametrize("merge", [False, True])
def test_the_first_chunk_does_not_wait_for_the_cache(
    model: DiT, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk comes after its steps, its cache update when the next one is asked for, where it is
    merged with the first step in the same pass; the latents are those of a loop that updates at
    once, past the wrap of the ring."""
    passes = 0
    run = DiT._run

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return run(*arguments, **named)

    monkeypatch.setattr(DiT, "_run", counted)
    chunks = Stream(model, None, TEXT[:1], SMALL, merge=merge).latents()
    got = [next(chunks)]
    assert passes == len(SMALL.steps)
    got.append(next(chunks))
    assert passes == 2 * len(SMALL.steps) + (not merge)
    got.extend(itertools.islice(chunks, 2))
    passes = 0
    assert len([*Stream(model, ToyVAE(), TEXT[:1], SMALL).video(9)]) == 1
    assert passes == len(SMALL.steps)  # nothing is computed for a chunk that nobody takes

    cache, schedule = model.new_cache(1, SMALL.window, SMALL.grid), FlowSchedule(SMALL.shift)
    t = schedule.warp(SMALL.steps)
    with torch.no_grad():
        model.set_text(cache, TEXT[:1])
        for latents in got:
            noise = functools.partial(Noise, torch.tensor([0]), cache.chunk(3).frame_F)
            x = normal(noise(0), latents.shape)
            for i in range(len(t)):
                flow = model(x, t[i], None, cache=cache)
                x = few_step(flow, x, i, schedule.sigma(t), noise)[1]
            torch.testing.assert_close(latents, x, rtol=1e-6, atol=1e-6)
            if not merge:
                assert torch.equal(latents, x)
            x = latents
            model(x, torch.tensor(0.0), None, cache=cache)
            cache.commit(3)


@pytest.mark.parametrize(
    "settings",
    [
        dict(chunk=3, window=6),
        dict(chunk=1, window=4, sink=2),
        dict(chunk=3, window=8, sink=1, first=1),
        dict(chunk=3, window=3),
        dict(chunk=2, window=7, sink=2, first=3),
    ],
)
@pytest.mark.parametrize("euler", [0, 3])
def test_the_merged_pass_is_the_two_it_merges(model: DiT, settings: Any, euler: int) -> None:
    """Three times around the ring, for a batch, after given frames and without."""
    preset = replace(SMALL, **settings)
    for initial in (None, torch.randn(2, preset.first or preset.chunk, 4, 8, 8)):
        merged, apart = (
            take(
                20 // preset.chunk, model, preset, TEXT, initial, batch=2, euler=euler, merge=merge
            )
            for merge in (True, False)
        )
        torch.testing.assert_close(merged, apart, rtol=1e-6, atol=1e-6 * float(apart.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        dict(chunk=3, window=9, sink=3),
        dict(chunk=1, window=4, sink=1),
        dict(chunk=2, window=8, sink=2, first=1),
        dict(chunk=3, window=9),
    ],
)
def test_relative_positions_are_absolute_until_the_window_moves(model: DiT, settings: Any) -> None:
    """And without a sink for ever, as RoPE sees differences alone."""
    frames, chunk = 18, settings["chunk"]
    relative, absolute = (
        take(frames // chunk, model, replace(SMALL, **settings, positions=positions))
        for positions in ("relative", "absolute")
    )
    window, first = settings["window"], settings.get("first", chunk)
    held = first + (window - first) // chunk * chunk if settings.get("sink") else relative.shape[1]
    torch.testing.assert_close(relative[:, :held], absolute[:, :held], rtol=1e-5, atol=1e-5)
    if held < relative.shape[1]:
        assert (relative - absolute)[:, held : held + chunk].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 10_000])
@pytest.mark.parametrize("merge", [False, True])
def test_a_sink_stays_right_before_the_window(model: DiT, merge: bool, start: int) -> None:
    """Its keys, in complex numbers of 64 bits, turned on by as many frames as have left; those of
    the other frames stay where they were written."""
    preset = replace(SMALL, chunk=2, window=7, sink=3)
    mine = Stream(model, None, TEXT[:1], preset, merge=merge)
    for _ in range(4):
        mine.denoise()
    kept, sink = mine.cache.sink_k.clone(), 3 * preset.grid[0] * preset.grid[1]
    assert kept.any()
    mine.cache.start += start
    for _ in range(5):
        mine.denoise()
    end = 18 + start
    pairs = torch.view_as_complex(kept.double().unflatten(-1, (-1, 2)))
    in_time = pairs.shape[-1] - 2 * (pairs.shape[-1] // 3)
    angle = (end - 7) * 10_000.0 ** -(torch.arange(in_time, dtype=torch.float64) / in_time)
    pairs[..., :in_time] *= torch.polar(torch.ones_like(angle), angle)
    want = torch.view_as_real(pairs).flatten(-2).float()
    torch.testing.assert_close(mine.cache.k[:, :, :sink], want, rtol=1e-5, atol=1e-5)


def pretend_capture(run: Callable[[], object], *more: Any) -> tuple[Callable[[], object], str]:
    """Runs before the capture, as a capture does, and hands the function itself out."""
    for _ in range(3):
        run()
    return run, ""


@pytest.mark.parametrize(("chunk", "sink"), [(1, 0), (3, 0), (1, 2), (3, 3)])
@pytest.mark.parametrize("first", [None, 1])
@torch.no_grad()
def test_graphs_are_the_eager_stream(
    model: DiT, chunk: int, sink: int, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, three times around the ring, whatever was run before to warm up; then again from
    the start, of another prompt and another seed."""
    monkeypatch.setattr(graphs, "captured", pretend_capture)
    monkeypatch.setattr(graphs, "shared_pool", lambda *_: None)
    monkeypatch.setattr(graphs, "possible", lambda _: True)
    preset, codec = replace(SMALL, chunk=chunk, sink=sink, first=first), ToyVAE()
    mine = Stream(model, codec, TEXT[:1], preset, seed=5, graph=True)
    assert not mine.notes
    for text, seed in ((TEXT[:1], 5), (TEXT[1:, :3], 6)):
        mine.restart(text, seed)
        eager = Stream(model, codec, text, preset, seed=seed)
        for _ in range(18 // chunk + 1):
            assert torch.equal(mine.denoise(), eager.denoise())
            assert torch.equal(mine.decode(), eager.decode())
            assert all(map(torch.equal, mine.copy_to_host(), eager.copy_to_host()))
        got, want = mine.video(20), eager.video(20)
        assert all(torch.equal(*both) for both in zip(got, want, strict=True))


def test_what_is_no_graph_is_said(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", lambda run, *_: (None, "no CUDA graph: why"))
    monkeypatch.setattr(graphs, "shared_pool", lambda *_: None)
    monkeypatch.setattr(graphs, "possible", lambda _: True)
    mine = Stream(model, ToyVAE(), TEXT[:1], SMALL, graph=True)
    assert [*mine.notes] == ["no CUDA graph: why"]
    assert torch.equal(mine.denoise(), take(1, model))


def test_phases_of_a_chunk_are_timed(model: DiT) -> None:
    mine = Stream(model, ToyVAE(), TEXT[:1], SMALL)
    with timed(torch.device("cpu")) as ms:
        mine.restart(TEXT[:1])
        mine.denoise()
        mine.decode()
        mine.copy_to_host()
        mine.update()
    steps = [f"step {i}" for i in (1, 2, 3, 4)]
    assert [*ms] == ["prompt keys and values", "noise", *steps, "decode", "copy to host",
                     "cache update"]  # fmt: skip
    assert all(each > 0 for each in ms.values())


@torch.no_grad()
def test_the_host_gets_the_pixels_as_bytes(model: DiT) -> None:
    mine = Stream(model, ToyVAE(), TEXT[:1], SMALL)
    for count in (9, 12):
        mine.denoise()
        pixels = mine.decode()
        assert pixels.shape[1] == count
        expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        on_host = mine.copy_to_host()
        assert torch.equal(on_host.bytes_BTHWC, expected.permute(0, 1, 3, 4, 2))
        assert on_host.finite_BT.shape == (1, count) and on_host.finite_BT.all()


@pytest.mark.parametrize("low_latency", [False, True])
@pytest.mark.parametrize("count", [1, 5, 9, 10, 30])
def test_frames_are_those_of_the_video_as_bytes(model: DiT, count: int, low_latency: bool) -> None:
    """Piece by piece, the first still alone where it is to leave early."""
    codec = ToyVAE()
    made = Stream(model, codec, TEXT, SMALL, batch=2, low_latency=low_latency)
    pieces = [*made.frames(count)]
    sizes = [1, *[4] * 9] if low_latency else [9, *[12] * 9]
    assert [len(p[0]) for p in pieces[:-1]] == sizes[: len(pieces) - 1]
    whole = torch.cat([*Stream(model, codec, TEXT, SMALL, batch=2).video(count)], 1)
    want = to_bytes(whole).int()
    assert torch.cat(pieces, 1).shape == want.shape == (2, count, 64, 64, 3)
    assert (torch.cat(pieces, 1).int() - want).abs().max() <= low_latency  # rounding


@pytest.mark.parametrize("low_latency", [False, True])
def test_a_later_call_goes_on_with_the_next_frame(model: DiT, low_latency: bool) -> None:
    codec = ToyVAE()
    made, whole = (Stream(model, codec, TEXT[:1], SMALL, low_latency=low_latency) for _ in range(2))
    want = torch.cat([*whole.frames(33)], 1)
    for begin, count in ((0, 3), (3, 5), (8, 1), (9, 24)):
        got = torch.cat([*made.frames(count)], 1)
        assert (got.int() - want[:, begin : begin + count].int()).abs().max() <= 1


def test_frames_are_lost_by_nothing_between(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generator, a window computed anew amid a chunk, an error of the decoder."""
    codec = ToyVAE()
    made, whole = (Stream(model, codec, TEXT[:1], SMALL, low_latency=True) for _ in range(2))
    want = torch.cat([*whole.frames(40)], 1)
    first, got = made.frames(), [*made.frames(3)]
    got += [next(first), next(made.frames(2)), next(first)]
    made.recompute()
    got += [next(first)]
    decode, calls = codec.decode_chunk, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return decode(*arguments)

    monkeypatch.setattr(codec, "decode_chunk", failing)
    with pytest.raises(MemoryError):
        for frames in first:
            got.append(frames)
    count = sum(each.shape[1] for each in got)
    got += made.frames(40 - count)
    assert (torch.cat(got, 1).int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["step 2", "step 4"])
def test_an_interrupted_chunk_begins_anew(model: DiT, merge: bool, name: str) -> None:
    mine, whole = (Stream(model, None, TEXT[:1], SMALL, merge=merge) for _ in range(2))
    want = [whole.denoise().clone() for _ in range(4)]
    assert torch.equal(mine.denoise(), want[0])
    steps = mine.steps[3, False]
    run = steps[name]

    def interrupted() -> None:
        steps[name] = run
        raise KeyboardInterrupt

    steps[name] = interrupted
    with pytest.raises(KeyboardInterrupt):
        mine.denoise()
    for each in want[1:]:
        torch.testing.assert_close(mine.denoise(), each, rtol=1e-5, atol=1e-5)
    mine.update()
    with pytest.raises(ValueError, match="no chunk's cache update is to come"):
        mine.update()


def test_a_frame_that_is_no_number_is_named(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = ToyVAE()
    decode = codec.decode_chunk

    def broken(latents: Tensor, state: Any = None) -> Any:
        pixels, after = decode(latents, state)
        if state is not None:
            pixels[1, 4, 0, 3, 3] = torch.nan
        return pixels, after

    monkeypatch.setattr(codec, "decode_chunk", broken)
    pieces = Stream(model, codec, TEXT, SMALL, batch=2).frames()
    assert next(pieces).shape[1] == 9
    with pytest.raises(NotFinite, match=r"^frame 13 holds NaN or infinity") as raised:
        next(pieces)
    assert raised.value.video == 1


@pytest.mark.parametrize("graph", [False, True])
@torch.no_grad()
def test_decoding_goes_on(graph: bool) -> None:
    """Of a second clip too; with a graph, the state stays where it is."""
    torch.manual_seed(0)
    codec, warmed = WanVAE(VAEConfig(dim=8)).eval(), []

    def launch(run: Callable[[], None]) -> Callable[[], None]:
        warmed.append(run)
        return pretend_capture(run)[0]  # type: ignore[return-value]

    decoding, x = Decoding(codec), torch.zeros(1, 3, 16, 4, 4)
    decode = decoding.of(x, launch if graph else None)
    kept = decoding.kept
    for clip in torch.randn(2, 1, 9, 16, 4, 4):
        want, made = codec.decode_chunk(clip)[0], []
        decoding.state = None
        for chunk in clip.split(3, 1):
            x.copy_(chunk)
            decode()
            made.append(decoding.pixels_BTCHW.clone())
        torch.testing.assert_close(torch.cat(made, 1), want, rtol=1e-4, atol=1e-5)
    assert len(warmed) == graph and (decoding.state is kept) == graph


def test_batches_are_streams_of_their_own(model: DiT) -> None:
    both = take(3, model, text=TEXT, batch=2)
    assert both.shape == (2, 9, 4, 8, 8) and not torch.allclose(both[0], both[1])
    swapped = take(3, model, text=TEXT.flip(0), batch=2)
    assert not torch.allclose(both, swapped)  # each follows its own prompt


def test_under_autocast(model: DiT) -> None:
    """The cache is in autocast's dtype, also one made before it in the model's own."""
    want = take(3, model)
    with torch.autocast("cpu", torch.bfloat16):
        got = take(3, model)
        assert model.new_cache(1, 6, SMALL.grid).k.dtype == torch.bfloat16
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    cache = model.new_cache(1, 6, SMALL.grid)
    with torch.no_grad():
        model.set_text(cache, TEXT[:1])
        with torch.autocast("cpu", torch.bfloat16):
            flow = model(want[:, :3], torch.tensor(500.0), None, cache=cache)
    assert flow.isfinite().all() and cache.k.any()


def test_a_sample_is_the_video_of_its_seed(model: DiT) -> None:
    """In a batch or alone, up to rounding."""
    three = take(3, model, seed=7, batch=3)
    for b in range(3):
        torch.testing.assert_close(three[b : b + 1], take(3, model, seed=7 + b))


def test_noise_does_not_depend_on_the_chunks(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial noise and renoise of a frame are those of its index, also after given frames."""

    def noise_alone(self: Stream) -> Tensor:
        if self.pending:
            self.cache.commit(self.size)
        self.size = self.pending = self.next
        self.next = self.preset.chunk
        frame_F = self.cache.chunk(self.size).frame_F
        draws = (Noise(self.seed_B, frame_F, i) for i in range(3))
        return torch.cat([normal(noise, self.x[self.size].shape) for noise in draws], 2)

    monkeypatch.setattr(Stream, "denoise", noise_alone)
    threes, twos = take(2, model), take(3, model, replace(SMALL, chunk=2))
    assert threes.shape == (1, 6, 12, 8, 8) and torch.equal(threes, twos)
    assert len({float(x) for x in threes[0, :, ::4, 0, 0].flatten()}) == 18  # each its own
    continued = take(1, model, initial_BFCHW=torch.zeros(1, 3, 4, 8, 8))
    assert torch.equal(continued, threes[:, 3:])


def test_the_past_matters_as_long_as_it_is_in_the_window(model: DiT) -> None:
    initial = torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    near = initial.clone()
    near[:, 3:] += 1
    base, other = (take(1, model, initial_BFCHW=x) for x in (initial, near))
    assert base.shape == (1, 3, 4, 8, 8) and not torch.allclose(base, other)
    # One layer of a window of one chunk beside the current one cannot see further back.
    shallow = DiT(replace(SMALL.dit, layers=1)).eval()
    torch.nn.init.normal_(shallow.head.head.weight, std=0.1)
    far = initial.clone()
    far[:, :3] += 1
    base, other = (take(1, shallow, initial_BFCHW=x) for x in (initial, far))
    torch.testing.assert_close(base, other)
    sinking = replace(SMALL, sink=3, window=7)
    base, other = (take(1, shallow, sinking, initial_BFCHW=x) for x in (initial, far))
    assert not torch.allclose(base, other)


def test_memory_does_not_grow(model: DiT) -> None:
    chunks = Stream(model, None, TEXT[:1], SMALL).latents()
    for _ in itertools.islice(chunks, 40):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in itertools.islice(chunks, 400):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(window=2), "window=2 is smaller than a chunk of 3"),
        (dict(sink=6), "sink=6 must be smaller than window=6"),
        (dict(sink=4), "the window must be at least 7"),
        (dict(steps=(250, 500)), "must fall"),
    ],
)
def test_bad_settings(model: DiT, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Stream(model, ToyVAE(), TEXT[:1], replace(SMALL, **change))


@pytest.mark.parametrize("frames", [0, -3, 2.5])
@pytest.mark.parametrize("method", ["frames", "video"])
def test_no_frames(model: DiT, method: str, frames: int) -> None:
    with pytest.raises(ValueError, match=f"frames={frames}: must be"):
        next(getattr(Stream(model, ToyVAE(), TEXT[:1], SMALL), method)(frames))


def test_given_latents_must_fit(model: DiT) -> None:
    """And come after a chunk whose cache update was still to come."""
    made, L = Stream(model, None, TEXT[:1], SMALL), torch.randn(1, 3, 4, 8, 8)
    for wrong in (L[..., :1], L[:, :, :1], L.expand(2, -1, -1, -1, -1), L[0]):
        with pytest.raises(ValueError, match=r"latents has shape .* must be \[1, F, 4, 8, 8\]"):
            made.prefill(wrong)
    with pytest.raises(ValueError, match=r"must be \[1, 3, 4, 8, 8\]"):
        made.update(L[:, :2])
    both = made.denoise().clone()
    made.prefill(L)
    want = take(1, model, initial_BFCHW=torch.cat([both, L], 1))
    torch.testing.assert_close(made.denoise(), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="text has shape"):
        Stream(model, None, TEXT, SMALL, batch=3)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, not cpu"):
        Stream(model, None, TEXT[:1], SMALL, graph=True)


def test_initial_latents_must_be_whole_chunks(model: DiT) -> None:
    initial = torch.zeros(1, 3, 4, 8, 8)
    with pytest.raises(ValueError, match="must be 1 plus a multiple of 3"):
        take(1, model, replace(SMALL, first=1), initial_BFCHW=initial)
    assert take(1, model, replace(SMALL, first=1), initial_BFCHW=initial[:, :1]).shape[1] == 3
