"""What users do with a stream while it runs: other prompts, given images and clips."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import Noise, euler_step, normal
from sfmodel.dit import DiT
from sfmodel.saved_stream import load_stream, save_stream
from sfmodel.schedule import few_step
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from tests.test_stream import SMALL, TEXT
from tests.test_stream import model as model

GIVEN = [
    dict(chunk=3, window=9),
    dict(chunk=3, window=8, sink=1, first=1),
    dict(chunk=2, window=7, sink=3, positions="absolute"),
    dict(chunk=1, window=4, sink=1),
    dict(chunk=2, window=5, first=1),
]


def held(stream: Stream, everything: Tensor) -> Tensor:
    """Of a stream's latents until now, its last chunk left out, those that it goes on from."""
    preset = stream.preset
    past = everything[:, : everything.shape[1] - stream.pending]
    if past.shape[1] > preset.window:
        rolling = past[:, past.shape[1] - (preset.window - preset.sink) :]
        past = torch.cat([past[:, : preset.sink], rolling], 1)
    extra = (past.shape[1] - stream.first) % preset.chunk
    return torch.cat([past[:, : preset.sink], past[:, preset.sink + extra :]], 1)


@torch.no_grad()
@pytest.mark.parametrize("settings", GIVEN)
@pytest.mark.parametrize("chunks", [2, 3, 9])
def test_a_new_prompt_finds_the_ring_of_a_stream_of_its_own(
    model: DiT, chunks: int, settings: Any
) -> None:
    """Its keys and values are those of a stream with that prompt which was given the latents of the
    window; the noise goes on."""
    preset = replace(SMALL, **settings)
    mine = Stream(model, None, TEXT[:1], preset, seed=4)
    made = torch.cat([mine.denoise().clone() for _ in range(chunks)], 1)
    fresh = Stream(model, None, TEXT[1:], preset)
    fresh.prefill(held(mine, made))
    mine.set_prompt(TEXT[1:])
    pending = mine.latents_BFCHW[mine.size].clone()
    assert mine.denoise().isfinite().all()
    fresh.update(pending)
    frames = range(made.shape[1], made.shape[1] + preset.chunk)
    assert mine.noise_F[preset.chunk].tolist() == [*frames]
    assert int(mine.cache.start) == int(fresh.cache.start)
    torch.testing.assert_close(mine.cache.text_k, fresh.cache.text_k)
    # The new chunk has taken slots too: compare with those of what came before.
    place = fresh.cache.chunk(preset.chunk)
    tokens = math.prod(preset.grid)
    others = [s for s in range(preset.window) if s not in place.slot_F.tolist()]
    for name in ("k", "v"):
        ring, want = (
            getattr(each.cache, name).unflatten(2, (preset.window, tokens))[:, :, others]
            for each in (mine, fresh)
        )
        sink = preset.sink if name == "k" and preset.positions == "relative" else 0
        torch.testing.assert_close(ring[:, :, sink:], want[:, :, sink:], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("settings", GIVEN)
def test_the_same_prompt_again_changes_nothing_while_the_window_holds_all(
    model: DiT, settings: Any
) -> None:
    preset = replace(SMALL, **settings)
    same, plain = (Stream(model, None, TEXT[:1], preset, seed=4) for _ in range(2))
    for _ in range(2):
        same.denoise()
        plain.denoise()
    same.set_prompt(TEXT[:1])
    for _ in range(4):
        torch.testing.assert_close(same.denoise(), plain.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_over_time(model: DiT) -> None:
    """From the chunk on that shows a frame, at once or over several chunks."""
    mine = Stream(model, None, TEXT[:1], SMALL)
    mine.set_prompt(TEXT[1:], frame=10, over=3, recompute=False)
    mine.set_prompt(TEXT[:1], frame=4)
    seen = []
    for _ in range(8):
        mine.denoise()
        seen.append(mine.text_BTE.clone())
    first, second = (mine._padded(text) for text in (TEXT[:1], TEXT[1:]))
    shares = [0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1]
    for i, (got, share) in enumerate(zip(seen, shares, strict=True)):
        torch.testing.assert_close(got, torch.lerp(first, second, share), msg=f"chunk {i}")
    mine.set_prompt(TEXT[1:], frame=100)
    mine.restart()
    assert not mine.prompts
    with pytest.raises(ValueError, match="over=0: must be at least 1"):
        mine.set_prompt(TEXT[:1], over=0)
    with pytest.raises(ValueError, match="frame=-1: must be at least 0"):
        mine.set_prompt(TEXT[:1], frame=-1)
    with pytest.raises(ValueError, match="text has shape"):
        mine.set_prompt(TEXT)


@torch.no_grad()
@pytest.mark.parametrize("settings", GIVEN)
def test_given_latents_are_the_video_and_its_past(model: DiT, settings: Any) -> None:
    """Decoded as they are; what follows is what follows them as a given past."""
    preset, codec = replace(SMALL, **settings), ToyVAE()
    frames = (preset.first or preset.chunk) + 2 * preset.chunk
    latents = torch.randn(2, frames, 4, 8, 8)
    mine, past = (Stream(model, codec, TEXT, preset, seed=4, batch=2) for _ in range(2))
    mine.give(latents[:, : frames - preset.chunk])
    mine.give(latents[:, frames - preset.chunk :])
    pixels = torch.cat([*mine.video(1 + 4 * (frames - 1))], 1)
    torch.testing.assert_close(pixels, codec.decode_chunk(latents)[0], rtol=1e-5, atol=1e-5)
    past.prefill(latents)
    for _ in range(4):
        torch.testing.assert_close(mine.denoise(), past.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", GIVEN)
@pytest.mark.parametrize("euler", [0, 4])
def test_a_clip_made_anew(model: DiT, settings: Any, euler: int) -> None:
    """With a strength of 1 nothing of it is left; with less each step begins as a loop of one's own
    begins it, from the clip in noise."""
    preset = replace(SMALL, **settings)
    count = (preset.first or preset.chunk) + 4 * preset.chunk
    clip = torch.randn(1, count, 4, 8, 8)
    mine, plain = (Stream(model, None, TEXT[:1], preset, seed=4, euler=euler) for _ in range(2))
    mine.give(clip, strength=1.0)
    for _ in range(5):
        torch.testing.assert_close(mine.denoise(), plain.denoise(), rtol=1e-5, atol=1e-5)
    mine.restart()
    mine.give(clip, strength=0.5)
    begin, step = 0, 2  # of 1000, 550, 250, 100, or of 1000, 750, 500, 250
    for _ in range(5):
        size = mine.next
        x = normal(Noise(mine.seed_B, torch.arange(begin, begin + size), 0), (1, size, 4, 8, 8))
        x = torch.lerp(clip[:, begin : begin + size], x, mine.sigmas[step])
        got = mine.denoise().clone()
        place = model.place(mine.cache, size, preset.grid)
        assert place.chunk.frame_F.tolist() == [*range(begin, begin + size)]
        for i in range(step, 4):
            flow = model(x, mine.modulations[i], None, cache=mine.cache, places=[place])
            if euler:
                after = mine.sigmas[i + 1] if i < 3 else torch.zeros(())
                x = euler_step(x, flow, mine.sigmas[i], after)
            else:
                noise = functools.partial(Noise, mine.seed_B, place.chunk.frame_F)
                x = few_step(flow, x, i, mine.sigmas, noise)[1]
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
        begin += size


def test_what_cannot_be_given(model: DiT) -> None:
    mine = Stream(model, None, TEXT[:1], SMALL)
    for latents, strength, said in (
        (torch.zeros(1, 4, 4, 8, 8), 0.0, "latents have 4 frames: must be 3 plus a multiple of 3"),
        (torch.zeros(1, 3, 4, 8, 9), 0.0, "latents has shape"),
        (torch.zeros(1, 3, 4, 8, 8), 0.05, r"strength=0.05: must be 0, or 0.1 to 1"),
        (torch.zeros(1, 3, 4, 8, 8), 1.2, r"strength=1.2: must be 0, or"),
    ):
        with pytest.raises(ValueError, match=said):
            mine.give(latents, strength)
    assert not mine.given


@torch.no_grad()
@pytest.mark.parametrize("settings", GIVEN)
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_new_prompt_while_latents_are_to_come(model: DiT, settings: Any, strength: float) -> None:
    """They stay to come, and the window is computed anew as without them."""
    preset = replace(SMALL, **settings)
    count = (preset.first or preset.chunk) + 4 * preset.chunk
    clip = torch.randn(1, count, 4, 8, 8)
    mine, other = (Stream(model, None, TEXT[:1], preset, seed=4) for _ in range(2))
    mine.give(clip, strength)
    mine.set_prompt(TEXT[1:], frame=count - preset.chunk)
    made = torch.cat([mine.denoise().clone() for _ in range(5)], 1)
    assert made.shape[1] == count and not mine.given and not mine.prompts
    assert strength or torch.equal(made, clip)
    other.give(clip[:, : count - preset.chunk], strength)
    for _ in range(4):
        other.denoise()
    other.set_prompt(TEXT[1:])
    other._take_prompt()
    other.give(clip[:, count - preset.chunk :], strength)
    other.denoise()
    for _ in range(2):
        torch.testing.assert_close(mine.denoise(), other.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
def test_the_last_given_chunk_sees_the_sink_where_it_is(model: DiT, merge: bool) -> None:
    preset = replace(SMALL, window=8, sink=2)
    clip = torch.randn(1, 15, 4, 8, 8)
    given, past = (Stream(model, None, TEXT[:1], preset, merge=merge) for _ in range(2))
    given.prefill(clip[:, :12])
    given.give(clip[:, 12:])
    given.denoise()
    past.prefill(clip)
    for _ in range(3):
        torch.testing.assert_close(given.denoise(), past.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_newest_prompt_is_the_one(model: DiT) -> None:
    """Whatever was on the way to another; and a restart keeps the one on the way."""
    mine = Stream(model, None, TEXT[:1], SMALL)
    mine.set_prompt(TEXT[1:], over=4)
    mine.denoise()
    mine.denoise()
    third = TEXT.mean(0, keepdim=True)
    mine.set_prompt(third)
    for _ in range(4):
        mine.denoise()
        torch.testing.assert_close(mine.text_BTE, mine._padded(third))
    mine.set_prompt(TEXT[1:], over=4)
    mine.denoise()
    mine.restart()
    torch.testing.assert_close(mine.text_BTE, mine._padded(TEXT[1:]))


@torch.no_grad()
@pytest.mark.parametrize("settings", [*GIVEN, dict(window=9)])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("where", ["second chunk", "step", "recompute"])
def test_after_an_error_it_goes_on(
    model: DiT, settings: Any, layer: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the merged pass, which tears a full window and no other, or while the window is
    computed anew: as a stream without it whose window is computed anew there."""
    preset = replace(SMALL, **settings)
    mine, want = (Stream(model, None, TEXT[:1], preset, seed=4) for _ in range(2))
    for _ in range(1 if where == "second chunk" else 6):
        mine.denoise()
        want.denoise()
    block = model.blocks[layer]
    run = type(block).forward
    calls = 0

    def broken(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += self is block
        if calls == (2 if where == "recompute" else 1):
            calls += 1
            raise KeyboardInterrupt
        return run(self, *arguments)

    if where == "recompute":
        mine.set_prompt(TEXT[1:])
        want.set_prompt(TEXT[1:])
    with monkeypatch.context() as patch:
        patch.setattr(type(block), "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            mine.denoise()
    if where == "step":
        want.recompute()
    for _ in range(3):
        torch.testing.assert_close(mine.denoise(), want.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("call", ["save", "update", "prefill"])
def test_after_an_error_all_goes_on(
    model: DiT, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error while the window is computed anew whatever comes next ends that first."""
    mine, want, other = (Stream(model, None, TEXT[:1], SMALL, seed=4) for _ in range(3))
    for _ in range(6):
        mine.denoise()
        want.denoise()
    for each in (mine, want):
        each.set_prompt(TEXT[1:])
    with monkeypatch.context() as patch:
        patch.setattr(model, "append", raising := Raising())
        with pytest.raises(MemoryError):
            mine.denoise()
    assert raising.calls == 1
    want._take_prompt()
    if call == "save":
        save_stream(mine, tmp_path / "a")
        load_stream(other, tmp_path / "a")
        mine = other
    else:
        for each in (mine, want):
            getattr(each, call)(torch.ones(1, 3, 4, 8, 8))
    for _ in range(3):
        torch.testing.assert_close(mine.denoise(), want.denoise(), rtol=1e-5, atol=1e-5)


class Raising:
    """A call that fails."""

    calls = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        raise MemoryError


@torch.no_grad()
def test_a_prompt_whose_keys_fail_is_still_to_come(
    model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, want = (Stream(model, None, TEXT[:1], SMALL) for _ in range(2))
    for each in (mine, want):
        each.denoise()
        each.set_prompt(TEXT[1:], recompute=False)
    with monkeypatch.context() as patch:
        patch.setattr(mine, "_set_text", Raising())
        with pytest.raises(MemoryError):
            mine.denoise()
    assert torch.equal(mine.denoise(), want.denoise())


@torch.no_grad()
def test_nothing_comes_before_given_latents(model: DiT) -> None:
    mine = Stream(model, None, TEXT[:1], SMALL)
    mine.give(torch.zeros(1, 3, 4, 8, 8))
    for call in (mine.update, mine.prefill):
        with pytest.raises(ValueError, match="given latents are to come"):
            call(torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="text is 'a ball': must be a tensor"):
        Stream(model, None, "a ball", SMALL)  # type: ignore[arg-type]
